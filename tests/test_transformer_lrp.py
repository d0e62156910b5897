"""AttnLRP of any transformer against the slow oracle, zennit, and conservation."""

import oracle_attnlrp as oracle
import pytest
import torch
import transformers
from helpers import relative_difference
from torch import nn
from torch.nn import functional as F
from zennit.rules import Gamma

from lrp_utils import TransformerLRP, attention_in_steps

SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
WORDS = 5
ATTENTIONS = ["eager", "sdpa"]


def in_float64(model):
    """A model with random weights large enough that every nonlinearity is used."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
        else:
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            nn.init.normal_(parameter, mean=centre, std=0.3)
    return model.double().eval()


def drawn(*shape):
    torch.manual_seed(1)
    return torch.randn(shape, dtype=torch.float64)


def bert(attention):
    config = transformers.BertConfig(
        vocab_size=20, intermediate_size=16, attn_implementation=attention, **SIZES
    )
    model = in_float64(transformers.BertForSequenceClassification(config))
    return model, "inputs_embeds", drawn(WORDS, 12), oracle.bert, config.layer_norm_eps


def vit(attention):
    config = transformers.ViTConfig(
        image_size=6, patch_size=3, intermediate_size=16, attn_implementation=attention, **SIZES
    )
    model = in_float64(transformers.ViTForImageClassification(config))
    return model, "pixel_values", drawn(3, 6, 6), oracle.vit, config.layer_norm_eps


def gpt2(attention):
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=12, n_layer=2, n_head=3, attn_implementation=attention
    )
    model = in_float64(transformers.GPT2LMHeadModel(config))
    return model, "inputs_embeds", drawn(WORDS, 12), oracle.gpt2, config.layer_norm_epsilon


def explained(model, epsilon, leaves, index):
    """The relevance of the leaves {argument: tensor without a batch}, for one of the logits."""
    leaves = {name: value.clone()[None].requires_grad_() for name, value in leaves.items()}

    def logits_of_copies():
        """BLIP adds to its words in place, and a leaf must not be changed."""
        return model(**{name: leaf.clone() for name, leaf in leaves.items()}).logits

    with TransformerLRP(epsilon):
        logits = logits_of_copies()
    torch.testing.assert_close(logits, logits_of_copies())
    gradients = torch.autograd.grad(logits[(0, *index)], list(leaves.values()))
    return [(leaf * slope)[0] for leaf, slope in zip(leaves.values(), gradients)]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("epsilon", [1e-6, 0.05])
@pytest.mark.parametrize("build", [bert, vit, gpt2])
def test_a_transformer_equals_the_oracle(build, epsilon, attention):
    model, argument, value, write, eps = build(attention)
    index = (-1, 1) if build is gpt2 else (1,)
    (ours,) = explained(model, epsilon, {argument: value}, index)
    tape = oracle.Tape(epsilon)
    leaf = oracle.Node(value)
    with torch.no_grad():
        layers = oracle.Layers(tape, model.state_dict(), eps)
        logits = write(layers, leaf, SIZES["num_hidden_layers"], SIZES["num_attention_heads"])
        tape.explain(logits, (-1, 1))
    # Some of transformers' eager attentions take their softmax in float32.
    tolerance = 1e-6 if build is vit and attention == "eager" else 1e-9
    assert relative_difference(ours, leaf.relevance) < tolerance


def test_a_decoder_with_cross_attention_equals_the_oracle():
    config = transformers.BlipTextConfig(
        vocab_size=20, intermediate_size=16, encoder_hidden_size=7, **SIZES
    )
    model = in_float64(transformers.models.blip.modeling_blip_text.BlipTextLMHeadModel(config))
    words = drawn(WORDS, 12)
    image = drawn(4, 7)
    leaves = {"inputs_embeds": words, "encoder_hidden_states": image}
    ours = explained(model, 1e-3, leaves, (3, 6))
    tape = oracle.Tape(1e-3)
    nodes = [oracle.Node(words), oracle.Node(image)]
    with torch.no_grad():
        layers = oracle.Layers(tape, model.state_dict(), config.layer_norm_eps)
        tape.explain(oracle.blip(layers, *nodes, 2, 3), (3, 6))
    for found, node in zip(ours, nodes):
        assert relative_difference(found, node.relevance) < 1e-9


def test_the_modules_of_pytorch_give_what_their_steps_give():
    """nn.MultiheadAttention is a function that hides its steps; the mode has to see them."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    value = drawn(WORDS, 12)
    epsilon = (
        1e-12  # for a larger one it matters whether q or q k' is scaled, and PyTorch does either
    )
    tape = oracle.Tape(epsilon)
    node = oracle.Node(value)
    with torch.no_grad():
        parts = []
        for weight, bias in zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)):
            parts.append(tape.linear(node, weight, bias))
        context = tape.attention(*parts, 3)
        output = tape.linear(context, layer.out_proj.weight, layer.out_proj.bias)
        tape.explain(output, (2, 7))
    for need_weights in (True, False):
        leaf = value.clone()[None].requires_grad_()
        with TransformerLRP(epsilon):
            output = layer(leaf, leaf, leaf, need_weights=need_weights)[0]
        (gradient,) = torch.autograd.grad(output[0, 2, 7], leaf)
        assert relative_difference((leaf * gradient)[0], node.relevance) < 1e-9


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"masked": 1}])
@pytest.mark.parametrize("queries", [2, 4])
def test_attention_in_steps_is_the_fused_attention(queries, options):
    query = drawn(1, queries, 5, 6)
    key = drawn(1, 2, 5, 6) + 1
    value = drawn(1, 2, 5, 6) * 2
    options = {**options, "enable_gqa": queries > 2}
    if options.pop("masked", 0):
        options["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).tril(2)
    truth = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attention_in_steps(query, key, value, **options), truth)


@pytest.mark.parametrize("gamma", [0.05, 0.25, 10.0])
def test_the_gamma_rule_is_that_of_zennit(gamma):
    torch.manual_seed(0)
    for layer, shape in ((nn.Linear(7, 9), (4, 7)), (nn.Conv2d(3, 8, 2, 2), (2, 3, 6, 6))):
        layer = layer.double()
        value = drawn(*shape).requires_grad_()
        with TransformerLRP(1e-6, linear_gamma=gamma, convolution_gamma=gamma):
            z = layer(value)
        torch.testing.assert_close(z, layer(value))
        relevance = torch.randn_like(z)
        (gradient,) = torch.autograd.grad(z, value, relevance / z.detach())
        handles = Gamma(gamma=gamma, stabilizer=1e-6).register(layer)
        (truth,) = torch.autograd.grad(layer(value), value, relevance)
        handles.remove()
        assert relative_difference(value * gradient, truth) < 1e-5


def test_relevance_is_conserved_but_for_what_softmax_absorbs():
    """Without biases and epsilon, only softmax does not hand on all that it gets (Prop. 3.1)."""
    torch.manual_seed(0)
    maps = [nn.Linear(12, 12, bias=False).double() for _ in range(5)]
    norm = nn.LayerNorm(12, bias=False).double()
    leaf = drawn(WORDS, 12).requires_grad_()
    with TransformerLRP(epsilon=0):
        x = norm(leaf)
        query, key, value = (layer(x) for layer in maps[:3])
        scores = query @ key.T
        weights = scores.softmax(-1)
        x = leaf + maps[3](weights @ value)
        x = x + maps[4](F.gelu(norm(x)) * F.silu(x))
        score = x[2].sum()
    inner = [leaf, scores, weights]
    relevance = []
    for tensor, gradient in zip(inner, torch.autograd.grad(score, inner)):
        relevance.append((tensor * gradient).sum())
    absorbed = relevance[2] - relevance[1]
    assert abs(absorbed) > 1e-3
    torch.testing.assert_close(relevance[0] + absorbed, score)


def test_an_rms_norm_is_linear():
    """Of a module, and written by hand as transformers of language write it."""
    norm = nn.RMSNorm(12, eps=1e-6).double()
    nn.init.normal_(norm.weight)
    value = drawn(WORDS, 12)
    truth = norm.weight.detach() / (value.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def by_hand(x):
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    for function in (norm, by_hand):
        leaf = value.clone().requires_grad_()
        with TransformerLRP(epsilon=0):
            output = function(leaf)
        torch.testing.assert_close(output, norm(leaf))
        torch.testing.assert_close(torch.autograd.grad(output.sum(), leaf)[0], truth)


def test_the_length_of_a_vector_is_a_constant():
    """F.normalize hides its steps, too."""
    leaf = drawn(WORDS, 12).requires_grad_()
    with TransformerLRP():
        output = F.normalize(leaf, dim=-1)
    torch.testing.assert_close(output, F.normalize(leaf, dim=-1))
    (gradient,) = torch.autograd.grad(output.sum(), leaf)
    torch.testing.assert_close(leaf * gradient, output)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_fast", "quick_gelu", "silu", "tanh"])
def test_relevance_passes_an_activation(name):
    activation = transformers.activations.ACT2FN[name]
    leaf = torch.tensor([-2.0, -0.1, 0.3, 5.0], dtype=torch.float64, requires_grad=True)
    with TransformerLRP():
        output = activation(leaf)
    torch.testing.assert_close(output, activation(leaf))
    (gradient,) = torch.autograd.grad(output.sum(), leaf)
    torch.testing.assert_close(leaf * gradient, output)


def test_an_activation_has_a_finite_slope_at_zero():
    for function, slope in ((F.gelu, 0.5), (F.silu, 0.5), (torch.tanh, 1.0)):
        leaf = torch.zeros(3, requires_grad=True)
        with TransformerLRP():
            output = function(leaf)
        (gradient,) = torch.autograd.grad(output.sum(), leaf)
        torch.testing.assert_close(gradient, torch.full((3,), slope))
        assert not output.any()


def test_the_network_is_not_touched():
    model, argument, value, *_ = bert("sdpa")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explained(model, 1e-6, {argument: value}, (1,))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is None
        assert torch.equal(parameter, before[name])
