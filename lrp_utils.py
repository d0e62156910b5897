"""Layer-wise relevance propagation (LRP) as a modified gradient; paper §3.2, Algorithm 1.

Every rule used here shares relevance in proportion to (part / total). So c = R / value can be
carried instead of R: linear maps, sums and weighted sums then hand c on by ordinary autograd, and
the relevance of any activation is value * c. Four small things differ from the true gradient:

* the epsilon-rule is an identity whose backward multiplies by z / (z + epsilon * sign z)
  (Bach et al. 2015, eq. 58);
* gates, attention weights and beta are constants: they are detached (Arras et al. 2017; eq. 8);
* tanh passes relevance through: its backward is tanh(g) / g (Arras et al. 2017);
* convolutions use alpha1-beta0: only what raised a unit's activation gets relevance
  (Bach et al. 2015, eq. 60).

`Rules` says what a captioner asks of the rules of an explanation. The captioners are written once,
in these terms, for the sets of rules `TrueGradient`, `LRP` and `AttnLRP`. `AlphaOneBetaZero`
changes the convolutions of any encoder from outside, for the time of a `with`.
"""

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

EPSILON = 0.01  # paper §4, "LRP parameters"


def stabilize(z, epsilon):
    """z + epsilon * sign(z), with sign(0) = +1, so that nothing is divided by zero."""
    return z + epsilon * torch.where(z < 0, -1.0, 1.0).to(z)


def safe_ratio(numerator, denominator):
    """numerator / denominator; 0 where the denominator is 0, for then there is nothing to share."""
    zero = denominator == 0
    return torch.where(zero, 0, numerator / torch.where(zero, 1, denominator))


class _ScaledBackward(torch.autograd.Function):
    """`output` going forward; going back, the gradient of z is multiplied by `factor`."""

    @staticmethod
    def forward(ctx, z, output, factor):
        ctx.save_for_backward(factor)
        return output.clone()  # not a view: the ReLU that follows may work in place

    @staticmethod
    def backward(ctx, gradient):
        (factor,) = ctx.saved_tensors
        return gradient * factor, None, None


class Rules:
    """What a captioner's forward asks of an explanation; here nothing differs from the forward.

    A set of rules overrides what it wants to differ on the way back. Going forward no rule changes
    a value.

    stepwise  whether the rules act inside the LSTM, so that it has to be taken step by step
    watched   {name: list of tensors}: the inner values that the explanation wants gradients of
    """

    stepwise = False
    watched = MappingProxyType({})

    def epsilon(self, z):
        """A sum z of parts, such as a linear layer's output; the shape of z."""
        return z

    def constant(self, x):
        """A gate, or a weight of a weighted sum; the shape of x."""
        return x

    def weights(self, alpha):
        """The attention weights of heads, which multiply the values; the shape of alpha."""
        return alpha

    def factor(self, x):
        """One of the two factors of a product (query and key, weight and value); the shape of x."""
        return x

    def tanh(self, g):
        """tanh(g)."""
        return torch.tanh(g)

    def leaf(self, name, x):
        """An inner value x that an explanation may want the gradient of; returns x.

        A captioner names such values, and a method lists the names that it wants (`Method.leaves`).
        Today's captioners name "attention": in each step its weights (B, N, heads, L).
        """
        if name in self.watched:
            self.watched[name].append(x)
        return x


class TrueGradient(Rules):
    """The captioner as it is: for training, decoding, and the gradient-based explanations."""


TRUE_GRADIENT = TrueGradient()


class LRP(Rules):
    """The decoder rules of LRP (paper §3.2, Algorithm 1).

    epsilon: the stabiliser of every linear layer, sum and weighted sum; the paper's is 0.01.
    """

    stepwise = True

    def __init__(self, epsilon=EPSILON):
        self.stabilizer = epsilon

    def epsilon(self, z):
        """The epsilon-rule for a sum z: R(part) = part / (z + epsilon sign z) * R(z).

        Bach et al. (2015), eq. 58. A bias is one of the parts and keeps its share.
        """
        value = z.detach()
        kept = safe_ratio(value, stabilize(value, self.stabilizer))
        return _ScaledBackward.apply(z, value, kept)

    def constant(self, x):
        """A gate or attention weight shares relevance out and takes none itself (eq. 8)."""
        return x.detach()

    def weights(self, alpha):
        """Heads' attention weights are constants too: all relevance goes through the values."""
        return alpha.detach()

    def tanh(self, g):
        """tanh(g), with R(g) = R(tanh g): the backward is tanh(g)/g, and 1, its limit, at g = 0."""
        value = g.detach()
        output = value.tanh()
        slope = torch.where(value == 0, 1, safe_ratio(output, value))
        return _ScaledBackward.apply(g, output, slope)


class AttnLRP(LRP):
    """LRP that also goes through the attention scores (Achtibat et al. 2024).

    The two factors of a product share its relevance equally (Prop. 3.3). Softmax hands on
    x * (R - s sum R) (Prop. 3.1), which for c = R / value is its own gradient.
    """

    def weights(self, alpha):
        """The attention weights are a factor of the products with the values."""
        return self.factor(alpha)

    def factor(self, x):
        """One factor of a product gets half of the product's relevance."""
        half = torch.full_like(x, 0.5).detach()
        return _ScaledBackward.apply(x, x.detach(), half)


def inference_weights(addends, rows, scores, epsilon=EPSILON):
    """LRP-inference's omega = 1 + R / max|R| of every addend (final version of the paper, §3.5).

    addends (..., H) each are summed into the last layer; rows (..., H) are its weights for the
    explained words, and scores (...) the words' logits. Returns a list of omegas (..., H), each
    between 0 and 2, and 1 where no relevance arrives.

    Only these words carry relevance, so the sum over the vocabulary in the epsilon-rule is its one
    term: R(sum) = sum * row * score / st(score), and R(part) = R(sum) * part / st(sum).
    """
    total = summed(addends)
    arriving = (scores / stabilize(scores, epsilon)).unsqueeze(-1)
    shared = total * rows * arriving / stabilize(total, epsilon)
    omegas = []
    for addend in addends:
        relevance = shared * addend
        omegas.append(1 + safe_ratio(relevance, relevance.abs().amax(-1, keepdim=True)))
    return omegas


def summed(addends):
    """The sum of tensors of one shape, in their order."""
    total = addends[0]
    for addend in addends[1:]:
        total = total + addend
    return total


class _AlphaOneBetaZero(torch.autograd.Function):
    """A convolution y = w * x + b whose backward is the alpha1-beta0 rule, bias left out:

    R(x) = x+ . convT(R(y) / z, w+) + x- . convT(R(y) / z, w-)
    z = conv(x+, w+) + conv(x-, w-),   x = x+ + x-

    In terms of c = R / value this is convT(c(y) y/z, w+) where x > 0, and convT(c(y) y/z, w-) where
    x < 0.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, *geometry):
        """x (B, C, H, W), weight (D, C/groups, h, w), bias (D) or None -> y (B, D, H', W').

        geometry: stride, padding, dilation, groups as F.conv2d has them. Keeps y / z for the way
        back.
        """
        y = F.conv2d(x, weight, bias, *geometry)
        positive = weight.clamp(min=0)
        z = F.conv2d(x.clamp(min=0), positive, None, *geometry)
        # Behind a ReLU no input is negative, and half of the work falls away.
        ctx.signed = bool((x < 0).any())
        if ctx.signed:
            negative = weight.clamp(max=0)
            z = z + F.conv2d(x.clamp(max=0), negative, None, *geometry)
            ctx.save_for_backward(safe_ratio(y, z), positive, negative, x)
        else:
            ctx.save_for_backward(safe_ratio(y, z), positive)
        ctx.geometry = geometry
        ctx.shape = x.shape
        return y

    @staticmethod
    def backward(ctx, gradient):
        """c(y) (B, D, H', W') -> c(x) (B, C, H, W); Bach et al. (2015), eq. 60."""
        ratio, positive, *rest = ctx.saved_tensors
        shared = gradient * ratio
        result = _convolution_backward(shared, ctx.shape, positive, *ctx.geometry)
        if ctx.signed:
            negative, x = rest
            through_negative = _convolution_backward(shared, ctx.shape, negative, *ctx.geometry)
            result = torch.where(x < 0, through_negative, result)
        no_gradients = [None] * (2 + len(ctx.geometry))  # of weight, bias and geometry
        return result, *no_gradients


def _convolution_backward(gradient, shape, weight, stride, padding, dilation, groups):
    """The gradient of a convolution with respect to its input, which had the given shape."""
    unread = weight.new_empty(1).expand(shape)  # of the input only the shape matters
    geometry = (stride, padding, dilation, False, (0, 0), groups)
    of_the_input_only = (True, False, False)
    return torch.ops.aten.convolution_backward(
        gradient, unread, weight, None, *geometry, of_the_input_only
    )[0]


class AlphaOneBetaZero(TorchFunctionMode):
    """`with AlphaOneBetaZero():` explains every 2-d convolution called inside by alpha1-beta0.

    Every sum of two tensors, such as a residual connection's, is explained in proportion to its
    parts by the epsilon-rule. ReLU6 passes relevance, also where it is cut off at 6, and there its
    gradient would not. ReLU, max-pooling (winner takes all), average pooling and
    concatenation need no rule: their gradient hands on c = R / value as LRP wants. The network
    itself is not touched. Batch-norm has to be folded into its convolution before.
    """

    SUMS = {torch.Tensor.add, torch.add, torch.Tensor.__iadd__, torch.Tensor.__add__}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.conv2d:
            return _explained_convolution(*args, **kwargs)
        if function in self.SUMS:
            return _explained_sum(*args, **kwargs)
        if is_relu6(function, args, kwargs):
            return _passing_relu6(kwargs["input"] if "input" in kwargs else args[0])
        if function is torch.Tensor.add_:
            return args[0].copy_(_explained_sum(*args, **kwargs))
        return function(*args, **kwargs)


def is_relu6(function, arguments, keywords):
    """Whether a function that is called so is ReLU6, which PyTorch's module calls hardtanh."""
    if function is F.hardtanh:
        bounds = [*arguments[1:3], keywords.get("min_val"), keywords.get("max_val")]
        return [bound for bound in bounds if bound is not None] == [0, 6]
    return function is F.relu6


def _passing_relu6(x):
    """ReLU6 with R(x) = R(ReLU6(x)): its backward is ReLU6(x) / x, and 0 where x <= 0."""
    value = x.detach()
    output = value.clamp(0, 6)
    return _ScaledBackward.apply(x, output, safe_ratio(output, value.clamp(min=0)))


def _explained_sum(input, other, **options):
    """torch.add whose two tensors share relevance by the epsilon-rule; a number gets none."""
    total = torch.add(input, other, **options)
    return LRP().epsilon(total) if isinstance(other, torch.Tensor) else total


def _explained_convolution(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """F.conv2d with the backward of alpha1-beta0; input (B, C, H, W) or (C, H, W)."""
    pair = torch.nn.modules.utils._pair
    dilation = pair(dilation)
    if padding == "same":
        input = F.pad(input, _same_padding(weight.shape[2:], dilation))
    if isinstance(padding, str):
        padding = 0  # "valid", or done above
    geometry = (pair(stride), pair(padding), dilation, groups)
    if input.dim() == 3:
        return _AlphaOneBetaZero.apply(input.unsqueeze(0), weight, bias, *geometry).squeeze(0)
    return _AlphaOneBetaZero.apply(input, weight, bias, *geometry)


def _same_padding(kernel, dilation):
    """How F.pad makes a convolution keep its input's size: left, right, top, bottom."""
    padding = []
    for size, step in zip(reversed(kernel), reversed(dilation)):
        total = step * (size - 1)
        padding += [total // 2, total - total // 2]
    return padding
