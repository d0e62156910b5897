"""Are the oracle's other models right? They are compared with PyTorch, hand arithmetic and zennit,
and they must conserve relevance.
"""

import functools

import numpy as np
import pytest
import torch
from oracle_lrp import encoder_lrp
from oracle_models import (
    adaptive_forward,
    adaptive_lrp,
    aoa_forward,
    aoa_lrp,
    as_cell,
    graph_forward,
    graph_lrp,
    gridtd_forward,
    gridtd_lrp,
    soft_forward,
    soft_lrp,
)
from small_networks import (
    TARGETS,
    TOKENS,
    D,
    E,
    H,
    L,
    V,
    frozen_cell,
    frozen_relu,
    grid_td,
    kept,
    scaled,
    vgg_like,
)
from torch import nn

N = 2
T = len(TOKENS)


def adaptive(biases=True, seed=0):
    """A small random adaptive captioner and the features (L,D) of one image."""
    torch.manual_seed(seed)
    modules = {
        "embedding": nn.Embedding(V, E),
        "image_projection": nn.Linear(D, H),
        "global_projection": nn.Linear(D, E),
        "lstm": nn.LSTM(2 * E, H),
        "sentinel_input": nn.Linear(2 * E, H),
        "sentinel_hidden": nn.Linear(H, H),
        "attention_visual": nn.Linear(H, H),
        "attention_hidden": nn.Linear(H, H, bias=False),
        "attention_sentinel": nn.Linear(H, H),
        "attention_score": nn.Linear(H, 1, bias=False),
        "fc": nn.Linear(H, V),
    }
    modules = scaled(modules, biases)
    return modules, torch.rand(L, D, dtype=torch.float64)


def aoa(biases=True, seed=0):
    """A small random multi-head captioner and the features (L,D) of one image."""
    torch.manual_seed(seed)
    modules = {
        "embedding": nn.Embedding(V, E),
        "image_projection": nn.Linear(D, H),
        "lstm": nn.LSTM(E + H, H),
        "key": nn.Linear(H, H),
        "value": nn.Linear(H, H),
        "query": nn.Linear(H, H),
        "context_projection": nn.Linear(H, H),
        "context_gate": nn.Linear(H, H),
        "fc": nn.Linear(H, V),
    }
    modules = scaled(modules, biases)
    return modules, torch.rand(L, D, dtype=torch.float64)


def soft(biases=True, seed=0):
    """A small random captioner with soft attention and the features (L,D) of one image."""
    torch.manual_seed(seed)
    modules = {
        "embedding": nn.Embedding(V, E),
        "image_projection": nn.Linear(D, H),
        "initial_hidden": nn.Linear(D, H),
        "initial_cell": nn.Linear(D, H),
        "lstm": nn.LSTMCell(E + D, H),
        "attention_hidden": nn.Linear(H, H, bias=False),
        "attention_score": nn.Linear(H, 1, bias=False),
        "context_gate": nn.Linear(H, 1),
        "hidden_output": nn.Linear(H, E, bias=False),
        "context_output": nn.Linear(D, E, bias=False),
        "fc": nn.Linear(E, V),
    }
    modules = scaled(modules, biases)
    return modules, torch.rand(L, D, dtype=torch.float64)


MODELS = {
    "adaptive": (adaptive, adaptive_forward, adaptive_lrp),
    "aoa": (aoa, functools.partial(aoa_forward, heads=N), functools.partial(aoa_lrp, heads=N)),
    "gridtd": (grid_td, gridtd_forward, gridtd_lrp),
    "soft": (soft, soft_forward, soft_lrp),
}


def torch_adaptive(modules, features, tokens):
    """The adaptive captioner in PyTorch's own words: logits (T,V), alpha (T,L), beta (T,)."""
    v = modules["image_projection"](features).relu()
    v_g = modules["global_projection"](features.mean(0)).relu()
    h, c = torch.zeros(2, 1, H, dtype=torch.float64)
    rows = []
    for token in tokens:
        x = torch.cat([modules["embedding"](torch.tensor([token])), v_g[None]], 1)
        gate = torch.sigmoid(modules["sentinel_input"](x) + modules["sentinel_hidden"](h))
        _, (h, c) = modules["lstm"](x, (h, c))
        s = gate * c.tanh()
        keys = torch.cat([modules["attention_visual"](v), modules["attention_sentinel"](s)])
        scores = modules["attention_score"]((keys + modules["attention_hidden"](h)).tanh())[:, 0]
        alpha = scores[:-1].softmax(0)
        beta = scores.softmax(0)[-1]
        c_hat = (1 - beta) * alpha[None] @ v + beta * s
        rows.append((modules["fc"](c_hat + h)[0], alpha, beta))
    return [torch.stack(column) for column in zip(*rows)]


def torch_aoa(modules, features, tokens):
    """The multi-head captioner with nn.LSTM over the whole caption and nn.MultiheadAttention.

    Returns logits (T,V) and alpha (T,N,L).
    """
    v = modules["image_projection"](features).relu()
    v_g = v.mean(0).expand(len(tokens), -1)
    embeddings = modules["embedding"](torch.tensor(tokens))
    h, _ = modules["lstm"](torch.cat([embeddings, v_g], 1))
    attention = nn.MultiheadAttention(H, N).double().eval()
    inputs = [modules[name] for name in ("query", "key", "value")]
    attention.load_state_dict(
        {
            "in_proj_weight": torch.cat([linear.weight for linear in inputs]),
            "in_proj_bias": torch.cat([linear.bias for linear in inputs]),
            "out_proj.weight": torch.eye(H),
            "out_proj.bias": torch.zeros(H),
        }
    )
    with torch.no_grad():
        ctx, alpha = attention(h, v, v, average_attn_weights=False)
    projected = modules["context_projection"](ctx)
    c = nn.functional.glu(torch.cat([projected, modules["context_gate"](h)], 1))
    return modules["fc"](c + h), alpha.transpose(0, 1)


def torch_soft(modules, features, tokens):
    """The captioner with soft attention in PyTorch's own words: logits (T,V), alpha (T,L)."""
    mean = features.mean(0, keepdim=True)
    h = modules["initial_hidden"](mean).tanh()
    c = modules["initial_cell"](mean).tanh()
    rows = []
    for token in tokens:
        word = modules["embedding"](torch.tensor([token]))
        keys = modules["image_projection"](features)
        scores = modules["attention_score"]((keys + modules["attention_hidden"](h)).tanh())
        alpha = scores.softmax(0)  # (L, 1)
        z = modules["context_gate"](h).sigmoid() * (alpha * features).sum(0)
        h, c = modules["lstm"](torch.cat([word, z], 1), (h, c))
        deep = word + modules["hidden_output"](h) + modules["context_output"](z)
        rows.append((modules["fc"](deep)[0], alpha[:, 0]))
    return [torch.stack(column) for column in zip(*rows)]


def test_soft_forward_agrees_with_torch():
    modules, features = soft()
    forward = soft_forward(modules.state_dict(), features, TOKENS)
    logits, alpha = torch_soft(modules, features, TOKENS)
    np.testing.assert_allclose(forward["logits"], logits, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(forward["alpha"], alpha, rtol=1e-12, atol=1e-12)


def test_adaptive_forward_agrees_with_torch():
    modules, features = adaptive()
    forward = adaptive_forward(modules.state_dict(), features, TOKENS)
    logits, alpha, beta = torch_adaptive(modules, features, TOKENS)
    np.testing.assert_allclose(forward["logits"], logits, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(forward["alpha"], alpha, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(forward["beta"], beta, rtol=1e-12, atol=1e-12)


def test_aoa_forward_agrees_with_torch():
    modules, features = aoa()
    forward = aoa_forward(modules.state_dict(), features, TOKENS, heads=N)
    logits, alpha = torch_aoa(modules, features, TOKENS)
    np.testing.assert_allclose(forward["logits"], logits, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(forward["alpha"], alpha, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError):
        aoa_forward(modules.state_dict(), features, TOKENS, heads=3)


@pytest.mark.parametrize("model", ["adaptive", "aoa", "soft"])
def test_without_epsilon_and_biases_all_relevance_arrives(model):
    build, forward, explain = MODELS[model]
    modules, features = build(biases=False)
    params = modules.state_dict()
    feature_relevance, word_relevance, scores = explain(
        params, features, TOKENS, TARGETS, epsilon=0
    )
    assert feature_relevance.shape == (T, L, D)
    assert word_relevance.shape == (T, T)
    logits = forward(params, features, TOKENS)["logits"]
    np.testing.assert_array_equal(scores, logits[range(T), TARGETS])
    total = feature_relevance.sum((1, 2)) + word_relevance.sum(1)
    np.testing.assert_allclose(total, scores, atol=1e-9, rtol=0)
    assert not np.triu(word_relevance, 1).any()
    assert np.tril(word_relevance).all(where=np.tri(T, dtype=bool))


def frozen_lstm(params, forward, last, v_g, words, epsilon):
    """h and c of step `last`, linear in v_g and the embeddings words (T,E)."""
    h, c = np.zeros((2, H))
    for step, word in zip(forward["steps"][: last + 1], words):
        x = np.concatenate([word, v_g])
        h, c = frozen_cell(params, "lstm", step["lstm"], x, h, c, epsilon)
    return h, c


def frozen_logit(params, step, context, h, target, epsilon):
    """The logit, linear in context and h."""
    z = (context + h) * kept(step["z"], epsilon)
    return params["fc.weight"][target] @ z * kept(step["logits"][target], epsilon)


def frozen_adaptive(params, forward, last, target, a, words, epsilon):
    """The logit of the adaptive captioner as a linear function of a (L,D) and words (T,E).

    These are the features and the embeddings; all else is frozen and the biases are left out.
    """
    step = forward["steps"][last]
    v = frozen_relu(params, "image_projection", forward["v"], forward["v_before"], a, epsilon)
    mean = a.mean(0) * kept(forward["mean"], epsilon)
    v_g = frozen_relu(
        params, "global_projection", forward["v_g"], forward["v_g_before"], mean, epsilon
    )
    h, c = frozen_lstm(params, forward, last, v_g, words, epsilon)
    context = step["alpha"] @ v * kept(step["c"], epsilon)
    c_hat = (1 - step["beta"]) * context + step["beta"] * step["s"] / step["lstm"]["c"] * c
    return frozen_logit(params, step, c_hat * kept(step["c_hat"], epsilon), h, target, epsilon)


def frozen_aoa(params, forward, last, target, a, words, epsilon):
    """The same of the multi-head captioner."""
    step = forward["steps"][last]
    v = frozen_relu(params, "image_projection", forward["v"], forward["v_before"], a, epsilon)
    v_g = v.mean(0) * kept(forward["v_g"], epsilon)
    h, _ = frozen_lstm(params, forward, last, v_g, words, epsilon)
    value = v @ params["value.weight"].T * kept(forward["value"], epsilon)
    value = value.reshape(L, N, H // N)
    ctx = np.einsum("np,pnd->nd", step["alpha"], value).ravel() * kept(step["ctx"], epsilon)
    gate = step["c"] / step["c_before"]
    projected = params["context_projection.weight"] @ ctx
    c = gate * projected * kept(step["c_before"], epsilon)
    return frozen_logit(params, step, c, h, target, epsilon)


def frozen_tanh(params, name, z, x, epsilon):
    """The linear map `name` and its tanh, frozen where it gave z: linear in x."""
    return np.tanh(z) / z * (params[f"{name}.weight"] @ x) * kept(z, epsilon)


def frozen_soft(params, forward, last, target, a, words, epsilon):
    """The same of the captioner with soft attention."""
    mean = a.mean(0) * kept(forward["mean"], epsilon)
    h = frozen_tanh(params, "initial_hidden", forward["h_before"], mean, epsilon)
    c = frozen_tanh(params, "initial_cell", forward["c_before"], mean, epsilon)
    for step, word in zip(forward["steps"][: last + 1], words):
        z_t = step["beta"] * (step["alpha"] @ a) * kept(step["c"], epsilon)
        x = np.concatenate([word, z_t])
        h, c = frozen_cell(params, "lstm", step["lstm"], x, h, c, epsilon)
    from_h = params["hidden_output.weight"] @ h * kept(step["from_h"], epsilon)
    from_z = params["context_output.weight"] @ z_t * kept(step["from_z"], epsilon)
    return frozen_logit(params, step, word, from_h + from_z, target, epsilon)


FROZEN = {"adaptive": frozen_adaptive, "aoa": frozen_aoa, "soft": frozen_soft}


@pytest.mark.parametrize("model", FROZEN)
@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_each_input_gets_its_share_of_the_frozen_logit(model, epsilon):
    """LRP's other reading, run forwards.

    The relevance of an input is what remains of the frozen logit when all other inputs are zero.
    """
    build, forward, explain = MODELS[model]
    frozen = FROZEN[model]
    modules, features = build()
    params = as_cell(modules.state_dict())
    features = features.numpy()
    values = forward(modules.state_dict(), features, TOKENS)
    if model != "soft":  # which has no ReLU; of the others both sides are tested
        assert (values["v"] == 0).any()
        assert (values["v"] > 0).any()
    feature_relevance, word_relevance, _ = explain(
        modules.state_dict(), features, TOKENS, TARGETS, epsilon
    )
    embedded = params["embedding.weight"][TOKENS]
    no_features = np.zeros((L, D))
    no_words = np.zeros((T, E))
    for last, target in enumerate(TARGETS):
        for index in np.ndindex(L, D):
            only = no_features.copy()
            only[index] = features[index]
            expected = frozen(params, values, last, target, only, no_words, epsilon)
            assert feature_relevance[last][index] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        for t in range(last + 1):
            only = no_words.copy()
            only[t] = embedded[t]
            expected = frozen(params, values, last, target, no_features, only, epsilon)
            assert word_relevance[last, t] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_permuted_regions_permute_relevance(model):
    build, forward, explain = MODELS[model]
    modules, features = build()
    params = modules.state_dict()
    order = [2, 0, 1]
    expected_regions, expected_words, _ = explain(params, features, TOKENS, TARGETS)
    regions, words, _ = explain(params, features[order], TOKENS, TARGETS)
    np.testing.assert_allclose(regions, expected_regions[:, order], atol=1e-12)
    np.testing.assert_allclose(words, expected_words, atol=1e-12)
    expected_alpha = forward(params, features, TOKENS)["alpha"]
    alpha = forward(params, features[order], TOKENS)["alpha"]
    np.testing.assert_allclose(alpha, expected_alpha[..., order], atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_masked_regions_equal_dropped_ones(model):
    build, forward, explain = MODELS[model]
    modules, features = build()
    params = modules.state_dict()
    mask = np.array([True, False, True, True, False])
    padded = np.full((5, D), 1e3)  # padding that would show
    padded[mask] = features
    expected_regions, expected_words, expected_scores = explain(params, features, TOKENS, TARGETS)
    regions, words, scores = explain(params, padded, TOKENS, TARGETS, mask=mask)
    assert regions.shape == (T, 5, D)
    assert regions.any()
    assert not regions[:, ~mask].any()
    np.testing.assert_array_equal(regions[:, mask], expected_regions)
    np.testing.assert_array_equal(words, expected_words)
    np.testing.assert_array_equal(scores, expected_scores)
    expected = forward(params, features, TOKENS)
    got = forward(params, padded, TOKENS, mask=mask)
    np.testing.assert_array_equal(got["logits"], expected["logits"])
    assert got["alpha"].shape[-1] == 5
    assert not got["alpha"][..., ~mask].any()
    np.testing.assert_array_equal(got["alpha"][..., mask], expected["alpha"])


@pytest.mark.parametrize("mask", [np.zeros(L, dtype=bool), np.ones(L + 1, dtype=bool), np.ones(L)])
def test_impossible_masks_are_refused(mask):
    modules, features = adaptive()
    with pytest.raises(ValueError, match="mask"):
        adaptive_lrp(modules.state_dict(), features, TOKENS, TARGETS, mask=mask)


class Concat(nn.ModuleList):
    """Branches over one input, channels concatenated."""

    def forward(self, x):
        return torch.cat([branch(x) for branch in self], 1)


class Total(nn.Module):
    """The sum over the last axis, a module so that a rule can be given to it."""

    def forward(self, x):
        return x.sum(-1)


class Residual(nn.Module):
    """main(x) + shortcut(x)."""

    def __init__(self, main, shortcut):
        super().__init__()
        self.main = main
        self.shortcut = shortcut
        self.total = Total()

    def forward(self, x):
        return self.total(torch.stack([self.main(x), self.shortcut(x)], -1))


def conv_relu(*sizes, **settings):
    """A convolution and its ReLU."""
    return [nn.Conv2d(*sizes, **settings), nn.ReLU()]


def fire_like(biases):
    """SqueezeNet's way: squeeze, expand by 1x1 beside 3x3, pools rounded up."""
    chain = functools.partial(conv_relu, bias=biases)
    return nn.Sequential(
        *chain(3, 6, 3, stride=2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        *chain(6, 4, 1),
        Concat([nn.Sequential(*chain(4, 5, 1)), nn.Sequential(*chain(4, 6, 3, padding=1))]),
        nn.MaxPool2d(3, 2, ceil_mode=True),
    )


def bottleneck_like(biases):
    """ResNet's way: a padded pool and two blocks.

    The shortcut of the first is a strided projection, that of the second is the identity.
    """
    chain = functools.partial(conv_relu, bias=biases)
    conv = functools.partial(nn.Conv2d, bias=biases)
    first = Residual(
        nn.Sequential(*chain(6, 5, 1), *chain(5, 5, 3, stride=2, padding=1), conv(5, 8, 1)),
        nn.Sequential(conv(6, 8, 1, stride=2)),
    )
    second = Residual(nn.Sequential(*chain(8, 5, 1), conv(5, 8, 3, padding=1)), nn.Sequential())
    return nn.Sequential(
        *chain(3, 6, 7, stride=2, padding=3),
        nn.MaxPool2d(3, 2, 1),
        first,
        nn.ReLU(),
        second,
        nn.ReLU(),
    )


def inception_like(biases):
    """Inception's way: factorised kernels, a padded mean as a branch, branches within a branch."""
    chain = functools.partial(conv_relu, bias=biases)
    wide = nn.Sequential(*chain(6, 3, (1, 3), padding=(0, 1)))
    high = nn.Sequential(*chain(6, 4, (3, 1), padding=(1, 0)))
    first = chain(3, 6, 3)
    factorised = nn.Sequential(
        *chain(6, 5, 1),
        *chain(5, 5, (1, 7), padding=(0, 3)),
        *chain(5, 6, (7, 1), padding=(3, 0)),
    )
    branched = nn.Sequential(*chain(6, 6, 1), Concat([wide, high]))
    pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), *chain(6, 4, 1))
    return nn.Sequential(
        *first,
        Concat([factorised, branched, pooled]),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d((2, 3), 2),
    )


NETWORKS = [fire_like, bottleneck_like, inception_like]


def network(build, biases=True, seed=0):
    """The float64 network, random, with an image of uneven size."""
    torch.manual_seed(seed)
    return build(biases).double().requires_grad_(False), torch.randn(3, 22, 19, dtype=torch.float64)


def as_graph(module):
    """A network as the oracle's node."""
    match module:
        case nn.Conv2d():
            return "conv", module.weight, module.bias, module.stride, module.padding
        case nn.ReLU():
            return ("relu",)
        case nn.MaxPool2d():
            return "maxpool", module.kernel_size, module.stride, module.padding, module.ceil_mode
        case nn.AvgPool2d():
            return "avgpool", module.kernel_size, module.stride, module.padding
        case Residual():
            return "residual", as_graph(module.main), as_graph(module.shortcut)
        case Concat():
            return "concat", [as_graph(branch) for branch in module]
        case nn.Sequential():
            return "sequence", [as_graph(layer) for layer in module]


@pytest.mark.parametrize("build", NETWORKS)
def test_graph_forward_agrees_with_torch(build):
    model, image = network(build)
    expected = model(image[None])[0]
    assert expected.any()
    np.testing.assert_allclose(graph_forward(as_graph(model), image), expected, atol=1e-12)


@pytest.mark.parametrize("size", [5, 6, 7, 8])
@pytest.mark.parametrize(
    "kernel, stride, padding",
    [(3, 2, 0), (3, 2, 1), (2, 3, 1), (2, 2, 1), ((3, 2), (2, 1), (1, 0))],
)
def test_pools_agree_with_torch(size, kernel, stride, padding):
    x = torch.randn(2, size, size + 1, dtype=torch.float64)
    for ceil_mode in (False, True):
        expected = nn.functional.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)
        np.testing.assert_array_equal(
            graph_forward(("maxpool", kernel, stride, padding, ceil_mode), x), expected
        )
    expected = nn.functional.avg_pool2d(x, kernel, stride, padding)
    np.testing.assert_allclose(
        graph_forward(("avgpool", kernel, stride, padding), x), expected, atol=1e-12
    )


@pytest.mark.parametrize("build", NETWORKS)
@pytest.mark.parametrize("weights", ["non-negative", "mixed"])
def test_graph_conserves_relevance(build, weights):
    """Without bias and epsilon a positive z takes all that arrives: nothing is lost.

    This holds whatever the sign of R. The addends of a residual sum have no ReLU, so one may be
    negative, have no positive product and end its relevance (rightly): their weights are
    non-negative in both cases.
    """
    model, image = network(build, biases=False)
    if weights == "non-negative":
        image.abs_()
        make_positive(model)
    for block in model:
        if isinstance(block, Residual):
            make_positive(block.main[-1:])
            make_positive(block.shortcut[-1:])
    output = model(image[None])[0]
    R_out = torch.randn_like(output) * (output > 0)
    assert R_out.any()
    R = graph_lrp(as_graph(model), image, R_out, epsilon=0)
    assert R.shape == image.shape
    assert R.sum() == pytest.approx(R_out.sum().item(), abs=1e-9)


def make_positive(module):
    """Replace all parameters of a module by their absolute values."""
    for parameter in module.parameters():
        parameter.abs_()


@pytest.mark.parametrize("build", NETWORKS)
def test_graph_agrees_with_zennit(build):
    rules = pytest.importorskip("zennit.rules")
    composites = pytest.importorskip("zennit.composites")
    types = pytest.importorskip("zennit.types")
    model, image = network(build)
    image = image[None].requires_grad_()
    alpha1_beta0 = rules.AlphaBeta(alpha=1, beta=0, stabilizer=1e-14, zero_params=["bias"])
    composite = composites.LayerMapComposite(
        [
            (types.Convolution, alpha1_beta0),
            (types.Activation, rules.Pass()),
            (nn.AvgPool2d, rules.Norm(stabilizer=1e-14)),
            (Total, rules.Norm(stabilizer=0.01)),
        ]
    )
    with composite.context(model) as hooked:
        output = hooked(image)
        R_out = torch.randn_like(output)
        (expected,) = torch.autograd.grad(output, image, R_out)
    assert expected.any()
    R = graph_lrp(as_graph(model), image[0].detach(), R_out[0])
    np.testing.assert_allclose(R, expected[0], rtol=1e-8, atol=1e-10)


def test_sequence_is_the_chain_of_the_first_oracle():
    model, layers = vgg_like()
    image = torch.randn(3, 20, 20, dtype=torch.float64)
    R_out = torch.randn_like(model(image[None])[0])
    R = graph_lrp(("sequence", layers), image, R_out)
    np.testing.assert_array_equal(R, encoder_lrp(layers, image, R_out))


IDENTITY = ("sequence", [])


def test_residual_by_hand():
    # x = (1, 2) in two channels; main: 1x1 convolution with rows (1, 1) and (-2, 0.5) -> (3, -1);
    # the sum with x is (4, 1). With epsilon 1, R = (10, 4): main gets 3 * 10/5 = 6 and
    # -1 * 4/2 = -2, the shortcut 1 * 2 and 2 * 2. alpha1-beta0 of main: 6 is shared 1:2 as (2, 4);
    # of the second row only 0.5 * 2 counts: (0, -2). In all (4, 6).
    weight = np.array([[1.0, 1.0], [-2.0, 0.5]]).reshape(2, 2, 1, 1)
    node = ("residual", ("conv", weight, None, 1, 0), IDENTITY)
    x = np.array([1.0, 2.0]).reshape(2, 1, 1)
    R_out = np.array([10.0, 4.0]).reshape(2, 1, 1)
    assert graph_forward(node, x).ravel().tolist() == [4, 1]
    np.testing.assert_allclose(graph_lrp(node, x, R_out, epsilon=1).ravel(), [4, 6])


def scaling(factor):
    """A 1x1 convolution of one channel with this weight, as the oracle's node."""
    return ("conv", np.full((1, 1, 1, 1), factor), None, 1, 0)


def test_the_sign_of_a_residual_sum_by_hand():
    # A sum of 0 counts as positive: x = 2 and main -x, with epsilon 0.5 and R = 1, get 4 and -4;
    # main's only product is negative, so its -4 ends there.
    node = ("residual", scaling(-1.0), IDENTITY)
    assert graph_lrp(node, [[[2.0]]], [[[1.0]]], epsilon=0.5).item() == 4
    # A negative sum moves away from zero: x = -1 and main 2 x make -3, so R = 7 gives the shortcut
    # -1 * 7/-3.5 = 2; main's 4 ends again.
    node = ("residual", scaling(2.0), IDENTITY)
    assert graph_lrp(node, [[[-1.0]]], [[[7.0]]], epsilon=0.5).item() == 2
    # Two shortcuts, -1 - 1, get -1 * 7/-2.5 each.
    node = ("residual", IDENTITY, IDENTITY)
    R = graph_lrp(node, [[[-1.0]]], [[[7.0]]], epsilon=0.5)
    assert R.item() == pytest.approx(5.6)


def test_pools_by_hand():
    # Mean over (1, 3) and (3, -3): R = 8 goes 2 and 6; the second mean is 0, its R ends.
    x = np.array([[[1.0, 3.0, -3.0]]])
    assert graph_lrp(("avgpool", (1, 2), 1, 0), x, [[[8.0, 5.0]]]).ravel().tolist() == [2, 6, 0]
    assert graph_lrp(("avgpool", 3, 1, 1), [[[2.0]]], [[[7.0]]]).item() == 7
    # Of a padded -1 the -1 wins.
    assert graph_lrp(("maxpool", 3, 2, 1, True), [[[-1.0]]], [[[7.0]]]).item() == 7


def test_unknown_nodes_are_refused():
    for node in (("dropout",), ("conv", np.ones((1, 1, 1, 1)))):
        with pytest.raises(ValueError, match=node[0]):
            graph_forward(node, np.ones((1, 2, 2)))
        with pytest.raises(ValueError, match=node[0]):
            graph_lrp(node, np.ones((1, 2, 2)), np.ones((1, 2, 2)))
