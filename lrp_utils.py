"""Layer-wise relevance propagation (LRP) as a modified gradient; paper §3.2, Algorithm 1.

Every rule used here shares relevance in proportion to (part / total), so the quantity c = R / value can be carried instead
of R: linear maps, sums and weighted sums then hand c on by ordinary autograd, and the relevance of any activation is
value * c. What differs from the true gradient is four small things:

* the epsilon-rule is an identity whose backward multiplies by z / (z + epsilon * sign z)      (Bach et al. 2015, eq. 58)
* gates, attention weights and beta are constants: they are detached                            (Arras et al. 2017; eq. 8)
* tanh passes relevance through: its backward is tanh(g) / g                                    (Arras et al. 2017)
* convolutions use alpha1-beta0: only what raised a unit's activation gets relevance            (Bach et al. 2015, eq. 60)

`TrueGradient` and `LRP` are the two sets of decoder rules: the captioners are written once, in terms of `rules.epsilon`,
`rules.constant` and `rules.tanh`. `AlphaOneBetaZero` changes the convolutions of any encoder from outside, for a `with`.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

EPSILON = 0.01  # paper §4, "LRP parameters"


def stabilize(z, epsilon):
    """z + epsilon * sign(z), with sign(0) = +1, so that nothing is divided by zero; the shape of z."""
    return z + epsilon * torch.where(z < 0, -1.0, 1.0).to(z)


def safe_ratio(numerator, denominator):
    """numerator / denominator, and 0 where the denominator is 0 (nothing arrived, so there is nothing to share out)."""
    zero = denominator == 0
    return torch.where(zero, 0, numerator / torch.where(zero, 1, denominator))


class _ScaledBackward(torch.autograd.Function):
    """`output` going forward; going back the gradient with respect to z is multiplied by `factor` (element by element)."""

    @staticmethod
    def forward(ctx, z, output, factor):
        ctx.save_for_backward(factor)
        return output.clone()  # not a view: the ReLU that follows may work in place

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None, None


class TrueGradient:
    """The captioner as it is: training, decoding, and the gradient-based explanations."""

    stepwise = False  # an LSTM may take a whole sequence at once
    tanh = staticmethod(torch.tanh)

    @staticmethod
    def epsilon(z):
        return z

    @staticmethod
    def constant(x):
        return x

    @staticmethod
    def factor(x):
        return x

    weights = factor


class LRP:
    """The decoder rules of LRP; `epsilon` is the stabiliser of every linear layer and sum (paper: 0.01)."""

    stepwise = True  # the rules act inside the LSTM

    def __init__(self, epsilon=EPSILON):
        self.stabilizer = epsilon

    def epsilon(self, z):
        """epsilon-rule for z = sum of parts (+ bias): R(part) = part / (z + epsilon sign z) * R(z). Identity forward."""
        value = z.detach()
        return _ScaledBackward.apply(z, value, safe_ratio(value, stabilize(value, self.stabilizer)))

    @staticmethod
    def constant(x):
        """A gate or attention weight: it shares out relevance and takes none itself."""
        return x.detach()

    @staticmethod
    def weights(alpha):
        """Attention weights of heads: constants too; all relevance goes through the values (the paper's choice)."""
        return alpha.detach()

    @staticmethod
    def factor(x):
        """What is multiplied by attention weights, or makes them: as it is."""
        return x

    @staticmethod
    def tanh(g):
        """tanh(g), with R(g) = R(tanh g): the backward is tanh(g)/g, and 1 (its limit) at g = 0."""
        value = g.detach()
        output = value.tanh()
        return _ScaledBackward.apply(
            g, output, torch.where(value == 0, 1, safe_ratio(output, value))
        )


class AttnLRP(LRP):
    """LRP that also goes through the attention scores (Achtibat et al. 2024): the two factors of a product share its relevance
    equally (Prop. 3.3), and softmax hands on x * (R - s sum R) (Prop. 3.1), which for c = R / value is its own gradient."""

    @staticmethod
    def factor(x):
        """One factor of a product: it gets half of the product's relevance."""
        return _ScaledBackward.apply(x, x.detach(), torch.full_like(x, 0.5).detach())

    weights = factor


def inference_weights(context, hidden, rows, scores, epsilon=EPSILON):
    """LRP-inference's omega = 1 + R / max|R| of context and hidden, between 0 and 2 (final version of the paper, §3.5).

    context, hidden (..., H) are summed into the last layer; rows (..., H) are its weights for the explained words and scores
    (...) their logits. Only these words carry relevance, so the sum over the vocabulary in the epsilon-rule is its one term:
    R(sum) = sum * row * score / st(score), R(part) = R(sum) * part / st(sum). Where nothing arrives omega is 1.
    """
    total = context + hidden
    shared = (
        total
        * rows
        * (scores / stabilize(scores, epsilon)).unsqueeze(-1)
        / stabilize(total, epsilon)
    )
    relevances = shared * context, shared * hidden
    return tuple(
        1 + safe_ratio(relevance, relevance.abs().amax(-1, keepdim=True))
        for relevance in relevances
    )


class _AlphaOneBetaZero(torch.autograd.Function):
    """A convolution y = w * x + b whose backward shares relevance by the alpha1-beta0 rule, bias left out:

    R(x) = x+ . convT(R(y) / z, w+) + x- . convT(R(y) / z, w-),   z = conv(x+, w+) + conv(x-, w-)      (x = x+ + x-)

    In terms of c = R / value this is convT(c(y) y/z, w+) where x > 0, and convT(c(y) y/z, w-) where x < 0.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, *geometry):
        """x (B, C, H, W), weight (D, C/groups, h, w), bias (D) or None, stride, padding, dilation, groups -> y (B, D, H', W'), as
        F.conv2d; keeps y / z for the way back."""
        y = F.conv2d(x, weight, bias, *geometry)
        ctx.signed = bool(
            (x < 0).any()
        )  # behind a ReLU no input is negative, and half of the work falls away
        parts, weights = [x.clamp(min=0)], [weight.clamp(min=0)]
        if ctx.signed:
            parts, weights = [*parts, x.clamp(max=0)], [*weights, weight.clamp(max=0)]
        z = sum(F.conv2d(part, weight, None, *geometry) for part, weight in zip(parts, weights))
        ctx.save_for_backward(safe_ratio(y, z), *weights, *[x] * ctx.signed)
        ctx.geometry, ctx.shape = geometry, x.shape
        return y

    @staticmethod
    def backward(ctx, gradient):
        ratio, positive, *rest = ctx.saved_tensors
        shared = gradient * ratio
        result = _convolution_backward(shared, ctx.shape, positive, *ctx.geometry)
        if ctx.signed:
            negative, x = rest
            result = torch.where(
                x < 0, _convolution_backward(shared, ctx.shape, negative, *ctx.geometry), result
            )
        return result, *[None] * (2 + len(ctx.geometry))


def _convolution_backward(gradient, shape, weight, stride, padding, dilation, groups):
    """The gradient of a convolution with respect to its input, which had the given shape."""
    unread = weight.new_empty(1).expand(shape)  # of the input only the shape matters
    geometry = (stride, padding, dilation, False, (0, 0), groups)
    return torch.ops.aten.convolution_backward(
        gradient, unread, weight, None, *geometry, (True, False, False)
    )[0]


class AlphaOneBetaZero(TorchFunctionMode):
    """`with AlphaOneBetaZero():` every 2-d convolution called inside is explained by the alpha1-beta0 rule, and every sum of
    two tensors, such as a residual connection's, in proportion to its parts by the epsilon-rule.

    ReLU, max-pooling (winner takes all), average pooling and concatenation need no rule: their gradient hands on c = R /
    value as LRP wants. The network itself is not touched. Batch-norm has to be folded into its convolution before.
    """

    SUMS = {
        torch.Tensor.add_,
        torch.Tensor.add,
        torch.add,
        torch.Tensor.__iadd__,
        torch.Tensor.__add__,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.conv2d:
            return _AlphaOneBetaZero.apply(*_conv2d_arguments(*args, **(kwargs or {})))
        if function in self.SUMS and isinstance(args[1], torch.Tensor):
            return LRP().epsilon(torch.add(*args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))


def _conv2d_arguments(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    pair = torch.nn.modules.utils._pair
    return input, weight, bias, pair(stride), pair(padding), pair(dilation), groups
