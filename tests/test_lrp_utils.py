"""LRP against the slow float64 oracle (oracle_lrp.py), against zennit, and against conservation."""

import numpy as np
import pytest
import torch
import torchvision
from helpers import random_captioner, relative_difference
from oracle_lrp import encoder_lrp, gridtd_forward, gridtd_lrp
from torch import nn
from torch.nn import functional as F

from captioner import MODELS
from commandline import UserError
from explanation import Method, explain_batch
from gradient_utils import input_x_gradient
from lrp_utils import LRP, AlphaOneBetaZero, AttnLRP, TrueGradient, stabilize, summed


def explain_double(captioner, images, ids, epsilon):
    """LRP with another epsilon than the paper's; everything stays float64."""
    method = Method(lambda: LRP(epsilon), AlphaOneBetaZero, input_x_gradient)
    return explain_batch(captioner, images, ids, method)


def encoder_layers(encoder):
    """The layers of a VGG-type encoder (batch-norm folded) as the oracle wants them."""
    layers = []
    for layer in encoder.folded().net:
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.detach().numpy()
            bias = layer.bias.detach().numpy()
            layers.append(("conv", weight, bias, layer.stride[0], layer.padding[0]))
        elif isinstance(layer, nn.ReLU):
            layers.append(("relu",))
        elif isinstance(layer, nn.MaxPool2d):
            layers.append(("maxpool", layer.kernel_size, layer.stride))
    return layers


@pytest.mark.parametrize("epsilon", [0.01, 0.5])
def test_lrp_of_regions_words_and_pixels_equals_the_oracle(epsilon):
    captioner = random_captioner()
    images = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    captions = [[3, 7, 7, 12, 5, 20], [9, 1, 4]]
    parameters = {name: value.numpy() for name, value in captioner.state_dict().items()}
    layers = encoder_layers(captioner.encoder)
    found = explain_double(captioner, images, captions, epsilon)
    for image, ids, ours in zip(images, captions, found):
        with torch.no_grad():
            features = captioner.encoder(image[None])[0].numpy()
        inputs = [captioner.vocabulary.start, *ids[:-1]]
        regions, words, scores = gridtd_lrp(parameters, features, inputs, ids, epsilon)
        forward = gridtd_forward(parameters, features, inputs)
        assert relative_difference(ours.scores, scores) < 1e-10
        assert relative_difference(ours.attention[:, 0], forward["alpha"]) < 1e-10
        assert relative_difference(ours.beta, forward["beta"]) < 1e-10
        assert relative_difference(ours.region_relevance, regions.sum(-1)) < 1e-8
        assert relative_difference(ours.word_relevance, words) < 1e-8
        t = len(ids) - 1
        maps = regions[t].T.reshape(-1, *captioner.encoder.grid)
        pixels = encoder_lrp(layers, image.numpy(), maps)
        assert relative_difference(ours.image_relevance[t], pixels.sum(0)) < 1e-8


def test_float32_equals_the_float64_oracle_to_1e_5():
    captioner = random_captioner().float()
    image = torch.randn(1, 3, 128, 128)
    ids = [3, 7, 7, 12, 5, 20]
    ours = captioner.explain(image, [captioner.vocabulary.decode(ids)])[0]
    captioner = captioner.double()
    parameters = {name: value.numpy() for name, value in captioner.state_dict().items()}
    with torch.no_grad():
        features = captioner.encoder(image.double())[0].numpy()
    inputs = [captioner.vocabulary.start, *ids[:-1]]
    regions, words, scores = gridtd_lrp(parameters, features, inputs, ids)
    assert relative_difference(ours.scores, scores) < 1e-5
    assert relative_difference(ours.word_relevance, words) < 1e-5
    assert relative_difference(ours.region_relevance, regions.sum(-1)) < 1e-5


@pytest.mark.parametrize("model_type", MODELS)
def test_without_biases_and_epsilon_relevance_is_conserved(model_type):
    captioner = random_captioner(model_type=model_type)
    for name, parameter in captioner.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
    images = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    for explanation in explain_double(captioner, images, [[3, 7, 12, 5], [1, 2, 2, 8]], epsilon=0):
        total = explanation.region_relevance.sum(1) + explanation.word_relevance.sum(1)
        torch.testing.assert_close(total, explanation.scores, rtol=1e-6, atol=1e-9)


def test_encoder_relevance_is_conserved_where_no_bias_takes_part():
    torch.manual_seed(0xBEEF)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.ReLU(),
    ).double()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    with AlphaOneBetaZero():
        y = net(x)
    (c,) = torch.autograd.grad(y.sum(), x)  # R = y at the top
    torch.testing.assert_close((x * c).sum((1, 2, 3)), y.sum((1, 2, 3)), rtol=1e-9, atol=1e-9)


def random_vgg16(size, seed):
    """A random VGG16 to relu5_3 whose activations neither die out nor explode, in float64."""
    torch.manual_seed(seed)
    net = torchvision.models.vgg16().features[:-1].double().eval().requires_grad_(False)
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.uniform_(layer.bias, -0.1, 0.1)
    return net, torch.randn(1, 3, size, size, dtype=torch.float64)


def test_vgg16_agrees_with_zennit():
    zennit_rules = pytest.importorskip("zennit.rules")
    from zennit.composites import LayerMapComposite

    net, image = random_vgg16(64, 0xACE)
    rule = zennit_rules.AlphaBeta(alpha=1, beta=0, stabilizer=1e-12, zero_params="bias")
    # Max-pooling keeps its gradient, which is winner-take-all.
    composite = LayerMapComposite([(nn.Conv2d, rule), (nn.ReLU, zennit_rules.Pass())])
    # Relevance of either sign, and none where a unit is silent.
    relevance = net(image) * torch.randn(512, 1, 1, dtype=torch.float64)
    theirs = image.clone().requires_grad_()
    with composite.context(net) as explained:
        (theirs,) = torch.autograd.grad(explained(theirs), theirs, relevance)
    ours = image.clone().requires_grad_()
    with AlphaOneBetaZero():
        out = net(ours)
    (c,) = torch.autograd.grad(out, ours, torch.where(out > 0, relevance / out, 0))
    assert relative_difference(ours * c, theirs) < 1e-6


def alpha_one_beta_zero(x, weight, relevance, geometry):
    """R(x) of one convolution by eq. 60 of Bach et al. (2015), unit by unit.

    x (C, H, W), weight (D, C/groups, h, w), relevance (D, H', W') of its output; geometry: stride,
    padding, dilation, groups, all ints but the padding ((top, bottom), (left, right)).
    """
    stride, padding, dilation, groups = geometry
    (top, bottom), (left, right) = padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right)))
    shared = np.zeros_like(padded)
    depth = weight.shape[1]
    for d, i, j in np.ndindex(relevance.shape):
        first = d // (weight.shape[0] // groups) * depth
        rows = i * stride + dilation * np.arange(weight.shape[2])
        columns = j * stride + dilation * np.arange(weight.shape[3])
        window = np.ix_(range(first, first + depth), rows, columns)
        positive = np.maximum(padded[window] * weight[d], 0)
        if positive.sum() > 0:
            shared[window] += positive / positive.sum() * relevance[d, i, j]
    height, width = x.shape[1:]
    return shared[:, top : top + height, left : left + width]


GEOMETRIES = {  # of F.conv2d, and of the slow version
    "plain": ({}, (1, ((0, 0), (0, 0)), 1, 1)),
    "strided": ({"stride": 2, "padding": 1}, (2, ((1, 1), (1, 1)), 1, 1)),
    "dilated": ({"dilation": 2, "padding": (2, 0)}, (1, ((2, 2), (0, 0)), 2, 1)),
    "grouped": ({"groups": 2, "padding": 1}, (1, ((1, 1), (1, 1)), 1, 2)),
    "same": ({"padding": "same"}, (1, ((1, 1), (0, 1)), 1, 1)),
    "same, dilated": ({"padding": "same", "dilation": 3}, (1, ((3, 3), (1, 2)), 3, 1)),
    "valid": ({"padding": "valid"}, (1, ((0, 0), (0, 0)), 1, 1)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_alpha_one_beta_zero_of_any_convolution_equals_the_slow_rule(name, signed):
    """With a kernel of 3 x 2, so that "same" needs more padding on one side than on the other."""
    torch.manual_seed(0x5A3E)
    options, geometry = GEOMETRIES[name]
    groups = options.get("groups", 1)
    x = torch.randn(4, 9, 8, dtype=torch.float64)
    x = (x if signed else x.abs()).requires_grad_()
    weight = torch.randn(6, 4 // groups, 3, 2, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    plain = F.conv2d(x, weight, bias, **options)
    with AlphaOneBetaZero():
        unbatched = F.conv2d(x, weight, bias, **options)
        batched = F.conv2d(input=x.unsqueeze(0), weight=weight, bias=bias, **options)
    torch.testing.assert_close(unbatched, plain)
    torch.testing.assert_close(batched[0], plain)
    relevance = torch.randn_like(plain)
    expected = alpha_one_beta_zero(x.detach().numpy(), weight.numpy(), relevance.numpy(), geometry)
    for output in (unbatched, batched[0]):
        (c,) = torch.autograd.grad(output, x, relevance / output.detach())
        assert relative_difference(x * c, expected) < 1e-9


def test_every_way_to_add_two_tensors_is_explained_in_proportion():
    a = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)

    def in_place(x, y):
        total = x.clone()
        total.add_(y)
        return total

    def augmented(x, y):
        total = x.clone()
        total += y
        return total

    ways = {
        "operator": lambda: a + b,
        "function": lambda: torch.add(a, b),
        "keywords": lambda: torch.add(input=a, other=b),
        "method": lambda: a.add(b),
        "in place": lambda: in_place(a, b),
        "augmented": lambda: augmented(a, b),
    }
    for name, way in ways.items():
        with AlphaOneBetaZero():
            total = way()
        assert torch.equal(total, a + b), name
        value = total.detach()
        (c,) = torch.autograd.grad(total.sum(), a)
        torch.testing.assert_close(c, value / stabilize(value, 0.01), msg=name)
    with AlphaOneBetaZero():
        doubled = torch.add(a, b, alpha=2)
        shifted = torch.add(a, other=1)
    (c,) = torch.autograd.grad(doubled.sum(), b)
    value = doubled.detach()
    torch.testing.assert_close(c, 2 * value / stabilize(value, 0.01))
    assert torch.equal(torch.autograd.grad(shifted.sum(), a)[0], torch.ones_like(a))


def test_the_mode_leaves_the_network_as_it_was():
    net = nn.Conv2d(3, 4, 3).double()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    (before,) = torch.autograd.grad(net(x).sum(), x)
    with AlphaOneBetaZero():
        inside = net(x)
    (changed,) = torch.autograd.grad(inside.sum(), x)
    (after,) = torch.autograd.grad(net(x).sum(), x)
    assert torch.equal(before, after) and not torch.allclose(before, changed)
    assert torch.equal(inside, net(x))


def test_rules_do_not_change_the_forward_pass():
    captioner = random_captioner()
    features = torch.randn(2, 9, 256, dtype=torch.float64)
    inputs = torch.randint(1, 30, (2, 3, 5))
    embeddings = captioner.embedding(inputs)
    outputs = []
    for rules in (TrueGradient(), LRP()):
        memory = captioner.image_memory(features, rules)
        outputs.append(summed(captioner.unroll(embeddings, memory, rules).addends))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


def test_stabilize_takes_the_sign_of_zero_as_positive():
    z = torch.tensor([-2.0, -0.0, 0.0, 3.0])
    assert stabilize(z, 0.5).tolist() == [-2.5, 0.5, 0.5, 3.5]


def test_tanh_rule_at_zero_is_its_limit():
    g = torch.tensor([0.0, 1e-30, 2.0], dtype=torch.float64, requires_grad=True)
    (c,) = torch.autograd.grad(LRP().tanh(g).sum(), g)
    np.testing.assert_allclose(c, [1, 1, np.tanh(2) / 2])


def attnlrp_by_hand(query, keys, values, R_context, epsilon):
    """AttnLRP of one head and one query, by its propositions.

    query (d,), keys and values (L, d), R(context) (d,) -> R(query), R(keys), R(values). Every
    product gives half of its relevance to each factor.
    """
    scores = keys @ query / np.sqrt(len(query))
    alpha = np.exp(scores) / np.exp(scores).sum()
    context = alpha @ values
    R_values = np.zeros_like(values)
    R_alpha = np.zeros_like(alpha)
    stabilised = context + epsilon * np.where(context < 0, -1, 1)
    for p in range(len(alpha)):
        products = alpha[p] * values[p] * R_context / stabilised
        R_values[p] = products / 2
        R_alpha[p] = products.sum() / 2
    R_scores = scores * (R_alpha - alpha * R_alpha.sum())
    R_query = np.zeros_like(query)
    R_keys = np.zeros_like(keys)
    for p in range(len(alpha)):
        stabilised = scores[p] + epsilon * (-1 if scores[p] < 0 else 1)
        products = query * keys[p] / np.sqrt(len(query)) * R_scores[p] / stabilised
        R_query += products / 2
        R_keys[p] = products / 2
    return R_query, R_keys, R_values


def test_attnlrp_follows_its_propositions():
    captioner = random_captioner(model_type="aoa", num_head=1)
    with torch.no_grad():  # the projections do nothing, so that _attend is the attention alone
        for layer in (captioner.query, captioner.context_projection):
            layer.weight.copy_(torch.eye(16))
            layer.bias.zero_()
        captioner.context_gate.weight.zero_()
        captioner.context_gate.bias.fill_(100)
    rules = AttnLRP(epsilon=1e-9)  # next to nothing at the other sites
    hidden = torch.randn(1, 1, 16, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    values = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    memory = {
        "mask": None,
        "keys": rules.factor(keys.unsqueeze(1)),
        "values": rules.factor(values.unsqueeze(1)),
    }
    output, _ = captioner._attend(hidden, memory, rules)
    c = torch.randn(16, dtype=torch.float64)
    leaves = (hidden, keys, values)
    slopes = torch.autograd.grad((output * c).sum(), leaves)
    found = [(leaf * slope)[0].detach() for leaf, slope in zip(leaves, slopes)]
    context = torch.nn.functional.scaled_dot_product_attention(*leaves)
    query, keys, values = (leaf[0].detach().numpy() for leaf in leaves)
    R_context = (context[0, 0] * c).detach().numpy()
    R_query, R_keys, R_values = attnlrp_by_hand(query[0], keys, values, R_context, epsilon=0)
    assert relative_difference(found[0][0], R_query) < 1e-6
    assert relative_difference(found[1], R_keys) < 1e-6
    assert relative_difference(found[2], R_values) < 1e-6


def test_attnlrp_is_a_method_of_the_multi_head_captioner_only():
    image = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    caption = [["w1", "w2", "w3"]]
    captioner = random_captioner(model_type="aoa")
    plain = captioner.explain(image, caption, "lrp")[0]
    through = captioner.explain(image, caption, "attnlrp")[0]
    assert torch.equal(plain.scores, through.scores)
    assert relative_difference(through.region_relevance, plain.region_relevance) > 1e-3
    for model_type in ("gridtd", "adaptive", "soft"):
        with pytest.raises(UserError, match="only LRP of the multi-head captioner"):
            random_captioner(model_type=model_type).explain(image, caption, "attnlrp")
