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
changes the convolutions of any encoder from outside, for the time of a `with`, and
`TransformerLRP` does AttnLRP of any transformer so.
"""

from types import FunctionType, MappingProxyType

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

EPSILON = 0.01  # paper §4, "LRP parameters"
# A transformer has many more sums in a row, and 0.01 in each would absorb most of the relevance.
TRANSFORMER_EPSILON = 1e-6


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
            return self.convolution(*args, **kwargs)
        if function in self.SUMS:
            return _explained_sum(*args, **kwargs)
        if is_relu6(function, args, kwargs):
            return _passing_relu6(kwargs["input"] if "input" in kwargs else args[0])
        if function is torch.Tensor.add_:
            return args[0].copy_(_explained_sum(*args, **kwargs))
        return function(*args, **kwargs)

    def convolution(self, *args, **kwargs):
        """F.conv2d, and its rule on the way back."""
        return _explained_convolution(*args, **kwargs)


class AlphaTwoBetaOne(AlphaOneBetaZero):
    """The same with alpha2-beta1: what lowered a unit's activation gets negative relevance.

    Bach et al. (2015), eq. 60: twice the relevance that alpha1-beta0 gives, less as much for the
    negative contributions. Biases are left out of both sums.
    """

    def convolution(self, input, weight, bias=None, *geometry, **options):
        """F.conv2d, explained by alpha2-beta1."""

        def layer(x, w):
            return F.conv2d(x, w, None, *geometry, **options)

        weight = weight.detach()
        raising = weight.clamp(min=0)
        lowering = weight.clamp(max=0)
        above = input.clamp(min=0)
        below = input.clamp(max=0)
        positive = layer(above, raising) + layer(below, lowering)
        negative = layer(above, lowering) + layer(below, raising)
        output = F.conv2d(input.detach(), weight, bias, *geometry, **options).detach()
        raised = 2 * safe_ratio(output, positive.detach())
        lowered = -safe_ratio(output, negative.detach())
        nothing = torch.zeros_like(output)
        return _ScaledBackward.apply(positive, output, raised) + _ScaledBackward.apply(
            negative, nothing, lowered
        )


class EpsilonConvolutions(AlphaOneBetaZero):
    """The same with the epsilon-rule (Bach et al. 2015, eq. 58); biases get their share."""

    gamma = 0.0

    def convolution(self, input, weight, bias=None, *geometry, **options):
        """F.conv2d, explained by the epsilon-rule or, where gamma is not 0, by the gamma-rule."""

        def favoured(parameter):
            if parameter is None:
                return None
            return parameter.detach() + self.gamma * parameter.detach().clamp(min=0)

        z = F.conv2d(input, favoured(weight), favoured(bias), *geometry, **options)
        output = F.conv2d(input.detach(), weight, bias, *geometry, **options).detach()
        return _ScaledBackward.apply(z, output, output / stabilize(z.detach(), EPSILON))


class GammaConvolutions(EpsilonConvolutions):
    """The same with the gamma-rule, which favours positive weights.

    Montavon et al. (2019), for inputs that are not negative, as behind a ReLU.
    """

    gamma = 0.25


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


def carries(x):
    """Whether x is a tensor that depends on a leaf, so that relevance flows through it."""
    return isinstance(x, torch.Tensor) and x.requires_grad


def _constant(value):
    """A parameter without its gradient; anything else as it is."""
    return value.detach() if isinstance(value, torch.nn.Parameter) else value


class TransformerLRP(TorchFunctionMode):
    """`with TransformerLRP():` explains any transformer called inside by AttnLRP.

    Achtibat et al. (2024). For c = R / value the rules are:

    * linear layers, convolutions, matrix products, sums: epsilon-rule, or for layers the
      gamma-rule;
    * layer norm and RMS norm: linear, since the deviation is a constant;
    * GELU, SiLU, tanh: relevance passes (the identity rule), so the backward is f(x) / x;
    * products of two tensors that carry relevance, such as q k' and A v: half for each factor;
    * softmax: its own gradient (Prop. 3.1).

    Parameters are constants. So is what is usually only a gate or a scale: sigmoid, erf, and roots.
    Addends that do not depend on a leaf, such as position embeddings, keep their share. Fused
    attention is taken apart. The network is not touched.

    epsilon            of every epsilon- and gamma-rule
    linear_gamma       of linear layers; 0 is the epsilon-rule. The authors' vision transformer has
                       0.05, and 0.25 for its convolution
    convolution_gamma  of convolutions, such as a patch embedding
    """

    def __init__(self, epsilon=TRANSFORMER_EPSILON, linear_gamma=0.0, convolution_gamma=0.0):
        super().__init__()
        self.rules = LRP(epsilon)
        self.linear_gamma = linear_gamma
        self.convolution_gamma = convolution_gamma

    def __torch_function__(self, function, types, args=(), kwargs=None):
        values = [_constant(value) for value in args]
        options = {name: _constant(value) for name, value in (kwargs or {}).items()}
        rule = _TRANSFORMER_RULES.get(function)
        if rule is None:
            return function(*values, **options)
        return rule(self, function, *values, **options)

    def linear(self, function, input, weight, bias=None):
        """F.linear: input (..., I), weight (O, I), bias (O) or None -> (..., O)."""
        return self._layer(F.linear, input, weight, bias, self.linear_gamma)

    def addmm(self, function, bias, input, weight, **options):
        """torch.addmm(bias, input, weight), as GPT-2's layers call it."""

        def layer(x, w, b):
            return torch.addmm(b, x, w, **options)

        return self._layer(layer, input, weight, bias, self.linear_gamma)

    def convolution(self, function, input, weight, bias=None, *geometry, **options):
        """F.conv1d, F.conv2d, F.conv3d."""

        def layer(x, w, b):
            return function(x, w, b, *geometry, **options)

        return self._layer(layer, input, weight, bias, self.convolution_gamma)

    def _layer(self, layer, input, weight, bias, gamma):
        """layer(input, weight, bias), explained by the epsilon-rule, or with gamma by that rule."""
        z = layer(input, weight, bias)
        if not carries(z):
            return z
        if not gamma:
            return self.rules.epsilon(z)
        return _gamma_rule(layer, input, weight, bias, z.detach(), gamma, self.rules.stabilizer)

    def sum(self, function, input, other, **options):
        """A sum of two tensors; a residual connection's shares relevance by the epsilon-rule."""
        if carries(input) and carries(other):
            total = self.rules.epsilon(torch.add(input, other, **options))
            return input.copy_(total) if function is torch.Tensor.add_ else total
        total = function(input, other, **options)
        # GPT-2 writes its GELU as x (1 + tanh ...) / 2: a tanh plus a number is a gate.
        numbers = [part for part in (input, other) if not isinstance(part, torch.Tensor)]
        is_tanh = [getattr(part, "is_tanh", False) for part in (input, other)]
        return total.detach() if numbers and any(is_tanh) else total

    def product(self, function, *factors, **options):
        """Factors, multiplied element by element, share the relevance equally (Prop. 3.3)."""
        return function(*_sharing(factors), **options)

    def matrix_product(self, function, *factors, **options):
        """So do the factors of sums of products, for which the epsilon-rule holds, too."""
        product = function(*_sharing(factors), **options)
        return self.rules.epsilon(product) if carries(product) else product

    def activation(self, function, input, *rest, **options):
        """A function f with f(0) = 0 of each element: R(x) = R(f(x)), so its backward is f(x)/x."""
        if not carries(input):
            return function(input, *rest, **options)
        value = input.detach()
        tiny = torch.finfo(value.dtype).eps
        nonzero = torch.where(value == 0, tiny, value)  # f(x)/x has its limit there
        slope = function(nonzero.clone(), *rest, **options) / nonzero
        output = _ScaledBackward.apply(input, slope * value, slope)
        output.is_tanh = function in _TANH
        return output

    def constant(self, function, *values, **options):
        """A gate or a scale."""
        return function(*values, **options).detach()

    def layer_norm(self, function, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        """F.layer_norm, whose deviation is a constant."""
        dimensions = tuple(range(-len(normalized_shape), 0))
        centred = input - input.mean(dimensions, keepdim=True)
        variance = centred.detach().square().mean(dimensions, keepdim=True)
        return self._scaled(centred / (variance + eps).sqrt(), weight, bias)

    def rms_norm(self, function, input, normalized_shape, weight=None, eps=None):
        """F.rms_norm, whose root mean square is a constant."""
        dimensions = tuple(range(-len(normalized_shape), 0))
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        mean_square = input.detach().square().mean(dimensions, keepdim=True)
        return self._scaled(input / (mean_square + eps).sqrt(), weight, None)

    def _scaled(self, normalized, weight, bias):
        """normalized * weight + bias by the epsilon-rule; weight or bias may be None."""
        z = normalized if weight is None else normalized * weight
        z = z if bias is None else z + bias
        return self.rules.epsilon(z) if carries(z) else z

    def attention(self, function, *values, **options):
        """Fused attention, one step after the other, so that each step has its rule."""
        with self:
            return attention_in_steps(*values, **options)

    def composed(self, function, *values, **options):
        """A function of several steps, each of which has its rule."""
        with self:
            return _open_copy(function)(*values, **options)


_TANH = {torch.tanh, torch.Tensor.tanh, F.tanh}
_RULES_AND_FUNCTIONS = [
    (TransformerLRP.linear, [F.linear]),
    (TransformerLRP.addmm, [torch.addmm]),
    (TransformerLRP.convolution, [F.conv1d, F.conv2d, F.conv3d]),
    (TransformerLRP.sum, [*AlphaOneBetaZero.SUMS, torch.Tensor.add_, torch.Tensor.__radd__]),
    (TransformerLRP.product, [torch.mul, torch.Tensor.mul, torch.Tensor.__mul__]),
    (TransformerLRP.matrix_product, [torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__]),
    (TransformerLRP.matrix_product, [torch.bmm, torch.Tensor.bmm, torch.baddbmm, torch.einsum]),
    (TransformerLRP.activation, [F.gelu, F.silu, F.mish, F.elu, *_TANH]),
    (TransformerLRP.constant, [torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid]),
    (TransformerLRP.constant, [torch.erf, torch.Tensor.erf, torch.rsqrt, torch.Tensor.rsqrt]),
    (TransformerLRP.constant, [torch.sqrt, torch.Tensor.sqrt, torch.std, torch.Tensor.std]),
    (TransformerLRP.constant, [torch.Tensor.norm, torch.norm, torch.linalg.vector_norm]),
    (TransformerLRP.layer_norm, [F.layer_norm]),
    (TransformerLRP.rms_norm, [F.rms_norm]),
    (TransformerLRP.attention, [F.scaled_dot_product_attention]),
    (TransformerLRP.composed, [F.multi_head_attention_forward, F.normalize]),
]
_TRANSFORMER_RULES = {}
for _rule, _functions in _RULES_AND_FUNCTIONS:
    _TRANSFORMER_RULES.update(dict.fromkeys(_functions, _rule))


def _sharing(factors):
    """The factors of a product; those that carry relevance get equal shares of it."""
    count = sum(map(carries, factors))
    if count < 2:
        return factors
    shared = []
    for factor in factors:
        if carries(factor):
            share = torch.full_like(factor, 1 / count).detach()
            factor = _ScaledBackward.apply(factor, factor.detach(), share)
        shared.append(factor)
    return shared


def _gamma_rule(layer, input, weight, bias, z, gamma, epsilon):
    """z = layer(input, weight, bias), explained by the gamma-rule for inputs of either sign.

    Where z > 0, relevance goes by the parts of z after those that are positive have been multiplied
    by 1 + gamma, where z < 0 after the negative ones have. Montavon et al. (2019), as zennit
    generalises it. A bias is a part, too.
    """
    rising = weight + gamma * weight.clamp(min=0)
    falling = weight + gamma * weight.clamp(max=0)
    bias_rising = None if bias is None else bias + gamma * bias.clamp(min=0)
    bias_falling = None if bias is None else bias + gamma * bias.clamp(max=0)
    no_bias = None if bias is None else torch.zeros_like(bias)
    positive = input.clamp(min=0)
    negative = input - positive
    up = layer(positive, rising, bias_rising) + layer(negative, falling, no_bias)
    down = layer(positive, falling, bias_falling) + layer(negative, rising, no_bias)
    above = z.clamp(min=0)
    below = z.clamp(max=0)
    from_up = _ScaledBackward.apply(up, above, above / stabilize(up.detach(), epsilon))
    from_down = _ScaledBackward.apply(down, below, below / stabilize(down.detach(), epsilon))
    return from_up + from_down


def attention_in_steps(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """F.scaled_dot_product_attention as PyTorch's documentation writes it, step by step."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p, dropout_p > 0) @ value


def _open_copy(function):
    """A function of torch.nn.functional that does not hand itself to a mode as a whole.

    So the mode sees the functions that it calls.
    """

    def no_mode(*_):
        return False

    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    known = {**function.__globals__, **dict.fromkeys(names, no_mode)}
    return FunctionType(function.__code__, known, function.__name__, function.__defaults__)
