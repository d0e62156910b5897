"""Is the oracle itself right? It is compared with PyTorch, hand arithmetic and zennit, and it must
conserve relevance.
"""

import numpy as np
import pytest
import torch
from oracle_lrp import (
    conv_transposed,
    encoder_forward,
    encoder_lrp,
    gridtd_forward,
    gridtd_lrp,
    linear,
    share,
)
from small_networks import (
    TARGETS,
    TOKENS,
    D,
    E,
    H,
    L,
    frozen_cell,
    frozen_relu,
    grid_td,
    kept,
    vgg_like,
)
from torch import nn


def torch_logits(modules, features, tokens):
    """The model in PyTorch's own words: logits (T,V), alpha (T,L), beta (T,)."""
    v = modules["image_projection"](features).relu()
    v_g = modules["global_projection"](features.mean(0)).relu()
    h1, c1, h2, c2 = torch.zeros(4, 1, H, dtype=torch.float64)
    rows = []
    for token in tokens:
        x1 = torch.cat([h2[0], v_g, modules["embedding"].weight[token]])[None]
        gate = torch.sigmoid(modules["sentinel_input"](x1) + modules["sentinel_hidden"](h1))
        h1, c1 = modules["attention_lstm"](x1, (h1, c1))
        s = gate * c1.tanh()
        keys = torch.cat([modules["attention_visual"](v), modules["attention_sentinel"](s)])
        scores = modules["attention_score"]((keys + modules["attention_hidden"](h1)).tanh())[:, 0]
        alpha = scores[:-1].softmax(0)
        beta = scores.softmax(0)[-1]
        c_hat = (1 - beta) * alpha[None] @ v + beta * s
        h2, c2 = modules["language_lstm"](torch.cat([c_hat, h1], 1), (h2, c2))
        rows.append((modules["fc"](c_hat + h2)[0], alpha, beta))
    return [torch.stack(column) for column in zip(*rows)]


def test_forward_agrees_with_torch():
    modules, features = grid_td()
    forward = gridtd_forward(modules.state_dict(), features, TOKENS)
    logits, alpha, beta = torch_logits(modules, features, TOKENS)
    np.testing.assert_allclose(forward["logits"], logits, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(forward["alpha"], alpha, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(forward["beta"], beta, rtol=1e-12, atol=1e-12)


def test_without_epsilon_and_biases_all_relevance_arrives():
    modules, features = grid_td(biases=False)
    feature_relevance, word_relevance, scores = gridtd_lrp(
        modules.state_dict(), features, TOKENS, TARGETS, epsilon=0
    )
    assert feature_relevance.shape == (5, L, D)
    assert word_relevance.shape == (5, 5)
    logits, _, _ = torch_logits(modules, features, TOKENS)
    np.testing.assert_allclose(scores, logits[range(5), TARGETS], rtol=1e-12)
    total = feature_relevance.sum((1, 2)) + word_relevance.sum(1)
    np.testing.assert_allclose(total, scores, atol=1e-9, rtol=0)
    assert not np.triu(word_relevance, 1).any()
    assert np.tril(word_relevance).all(where=np.tri(5, dtype=bool))


def frozen_logit(params, forward, last, target, a, words, epsilon):
    """The logit as a linear function of features a (L,D) and embeddings words (T,E).

    All else is frozen and the biases are left out.
    """
    v = frozen_relu(params, "image_projection", forward["v"], forward["v_before"], a, epsilon)
    mean = a.mean(0) * kept(forward["mean"], epsilon)
    v_g = frozen_relu(
        params, "global_projection", forward["v_g"], forward["v_g_before"], mean, epsilon
    )
    h1, c1, h2, c2 = np.zeros((4, H))
    for step, word in zip(forward["steps"][: last + 1], words):
        cell = step["attention_lstm"]
        x1 = np.concatenate([h2, v_g, word])
        h1, c1 = frozen_cell(params, "attention_lstm", cell, x1, h1, c1, epsilon)
        context = step["alpha"] @ v * kept(step["c"], epsilon)
        c_hat = (1 - step["beta"]) * context + step["beta"] * step["s"] / cell["c"] * c1
        c_hat = c_hat * kept(step["c_hat"], epsilon)
        cell = step["language_lstm"]
        x2 = np.concatenate([c_hat, h1])
        h2, c2 = frozen_cell(params, "language_lstm", cell, x2, h2, c2, epsilon)
    z = (c_hat + h2) * kept(step["z"], epsilon)
    return params["fc.weight"][target] @ z * kept(step["logits"][target], epsilon)


@pytest.mark.parametrize("epsilon", [0, 0.01, 0.3])
def test_each_input_gets_its_share_of_the_frozen_logit(epsilon):
    """LRP's other reading, run forwards.

    The relevance of an input is what remains of the frozen logit when all other inputs are zero.
    """
    modules, features = grid_td()
    params = {name: value.numpy() for name, value in modules.state_dict().items()}
    forward = gridtd_forward(params, features, TOKENS)
    # Both sides of the ReLU are tested.
    assert (forward["v"] == 0).any()
    assert (forward["v"] > 0).any()
    feature_relevance, word_relevance, _ = gridtd_lrp(params, features, TOKENS, TARGETS, epsilon)
    embedded = params["embedding.weight"][TOKENS]
    no_features = np.zeros((L, D))
    no_words = np.zeros((len(TOKENS), E))
    for last, target in enumerate(TARGETS):
        for index in np.ndindex(L, D):
            only = no_features.copy()
            only[index] = features[index]
            expected = frozen_logit(params, forward, last, target, only, no_words, epsilon)
            assert feature_relevance[last][index] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        for t in range(last + 1):
            only = no_words.copy()
            only[t] = embedded[t]
            expected = frozen_logit(params, forward, last, target, no_features, only, epsilon)
            assert word_relevance[last, t] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_epsilon_rule_by_hand():
    # z = 1*2 + 2*1 - 1*3 + bias 1 = 2; R = 2, so R/z = 1 and the inputs get 2, 2, -3 (the bias
    # keeps 1). With epsilon 0.5: R / 2.5 = 0.8 -> 1.6, 1.6, -2.4. With z = 0 (bias -1) and sign
    # 0 = +1: 2 / 0.5 = 4 -> 8, 8, -12.
    x = np.array([1.0, 2.0, -1.0])
    weight = np.array([[2.0, 1.0, 3.0]])
    R = np.array([2.0])
    np.testing.assert_allclose(linear(R, x, weight, np.array([2.0]), 0), [2, 2, -3])
    np.testing.assert_allclose(linear(R, x, weight, np.array([2.0]), 0.5), [1.6, 1.6, -2.4])
    np.testing.assert_allclose(linear(R, x, weight, np.array([0.0]), 0.5), [8, 8, -12])
    # -2 = 1 + (-3): the stabiliser moves away from zero, -2 - 0.5, so R = 5 is shared as -2 * 1 and
    # -2 * -3.
    parts = share(np.array([5.0]), np.array([1.0, -3.0]), np.array([-2.0]), 0.5)
    np.testing.assert_allclose(parts, [-2, 6])
    assert share(np.zeros(1), np.zeros(1), np.zeros(1), 0) == 0  # 0/0 := 0


def model_of_one_unit():
    """The state_dict of a grid-TD captioner of sizes 1, most of whose weights are 0."""
    one = np.ones((1, 1))
    zero = np.zeros
    params = {
        "embedding.weight": one,
        "fc.weight": one,
        "fc.bias": zero(1),
        "image_projection.weight": one,
        "image_projection.bias": zero(1),
        "global_projection.weight": one,
        "global_projection.bias": zero(1),
        "attention_lstm.weight_ih": np.array([[0, 0, 0], [0, 0, 0], [0, 0.25, 0.5], [0, 0, 0]]),
        "language_lstm.weight_ih": zero((4, 2)),
        "sentinel_input.weight": zero((1, 3)),
        "sentinel_input.bias": zero(1),
        "attention_hidden.weight": zero((1, 1)),
        "attention_score.weight": zero((1, 1)),
    }
    for name in ("attention_lstm", "language_lstm"):
        params[f"{name}.weight_hh"] = zero((4, 1))
        params[f"{name}.bias_ih"] = zero(4)
        params[f"{name}.bias_hh"] = zero(4)
    for name in ("sentinel_hidden", "attention_visual", "attention_sentinel"):
        params[f"{name}.weight"] = zero((1, 1))
        params[f"{name}.bias"] = zero(1)
    return params


@pytest.mark.parametrize("epsilon", [0, 0.01])
def test_model_of_one_unit_each_by_hand(epsilon):
    # One region a = 2. v = v_g = ReLU(a) = 2, the embedding is 1 and the attention cell's
    # g = 0.25 v_g + 0.5 embedding = 1. All gates are sigmoid(0) = 1/2, so c1 = tanh(1)/2 and
    # s = tanh(c1)/2. All scores are 0: alpha = 1, beta = 1/2, c = 2, c_hat = 1 + tanh(c1)/4. The
    # language cell is 0: the logit is c_hat = q.
    # Back: q meets epsilon at fc, at the sum with h2 = 0 and in c_hat; there c takes 1 and s takes
    # tanh(c1)/4. c meets epsilon as the sum (2) and as v (2); s goes to c1, g = 1 and there half to
    # the word, half to v_g = 2, mean = 2.
    c1 = np.tanh(1) / 2
    q = 1 + np.tanh(c1) / 4
    top = (q / (q + epsilon)) ** 3
    at_two = (2 / (2 + epsilon)) ** 2
    through_cell = np.tanh(c1) / 8 * top * c1 / (c1 + epsilon) / (1 + epsilon)
    feature_relevance, word_relevance, scores = gridtd_lrp(
        model_of_one_unit(), [[2.0]], [0], [0], epsilon
    )
    np.testing.assert_allclose(scores, [q])
    np.testing.assert_allclose(word_relevance, [[through_cell]])
    np.testing.assert_allclose(feature_relevance, [[[(top + through_cell) * at_two]]])


def test_encoder_forward_agrees_with_torch():
    model, layers = vgg_like()
    image = torch.randn(3, 21, 19, dtype=torch.float64)
    output = encoder_forward(layers, image)[-1]
    np.testing.assert_allclose(output, model(image[None])[0], atol=1e-12)


def test_the_transposed_convolution_agrees_with_torch():
    torch.manual_seed(0)
    y = torch.randn(6, 5, 4, dtype=torch.float64)
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    expected = nn.functional.conv_transpose2d(
        y[None], weight, stride=2, padding=1, output_padding=1
    )[0]
    got = conv_transposed(y.numpy(), weight.numpy(), 2, 1, (5, 10, 8))
    np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("weights", ["non-negative", "mixed"])
def test_encoder_conserves_relevance(weights):
    """Without bias a positive z takes all that arrives: nothing is lost, whatever the sign of R."""
    model, layers = vgg_like(biases=False)
    if weights == "non-negative":
        for parameter in model.parameters():
            parameter.abs_()
    image = torch.rand(3, 20, 20, dtype=torch.float64)
    R_out = torch.randn(6, 2, 2, dtype=torch.float64) * (model(image[None])[0] > 0)
    assert R_out.any()
    assert encoder_lrp(layers, image, R_out).sum() == pytest.approx(R_out.sum().item(), abs=1e-9)


def test_encoder_by_hand():
    # 1x1 convolutions of x = (1, -2, 3) with w = (2, -1, -1) and bias 9: the positive products are
    # 1*2 and -2*-1, so z = 4 and R = 8 gives 4, 4, 0.
    weight = np.array([2.0, -1.0, -1.0]).reshape(1, 3, 1, 1)
    layers = [("conv", weight, np.array([9.0]), 1, 0), ("relu",)]
    image = np.array([1.0, -2.0, 3.0]).reshape(3, 1, 1)
    R_out = [[[8.0]]]
    assert encoder_lrp(layers, image, R_out).ravel().tolist() == [4, 4, 0]
    # Of x = (-1, 0, 3) no product is positive: z = 0, and the relevance ends.
    assert not encoder_lrp(layers, -image * [[[1]], [[0]], [[-1]]], R_out).any()
    # Of the pool's (1, 5, 5, 2) the first 5 wins.
    R = encoder_lrp([("maxpool", 2, 2)], [[[1.0, 5.0], [5.0, 2.0]]], R_out)
    assert R.ravel().tolist() == [0, 8, 0, 0]


def test_encoder_agrees_with_zennit():
    rules = pytest.importorskip("zennit.rules")
    composites = pytest.importorskip("zennit.composites")
    types = pytest.importorskip("zennit.types")
    model, layers = vgg_like()
    image = torch.randn(1, 3, 20, 20, dtype=torch.float64, requires_grad=True)
    alpha1_beta0 = rules.AlphaBeta(alpha=1, beta=0, stabilizer=1e-14, zero_params=["bias"])
    composite = composites.LayerMapComposite(
        [(types.Convolution, alpha1_beta0), (types.Activation, rules.Pass())]
    )
    with composite.context(model) as hooked:
        output = hooked(image)
        R_out = torch.randn_like(output)
        (expected,) = torch.autograd.grad(output, image, R_out)
    assert expected.any()
    R = encoder_lrp(layers, image[0].detach(), R_out[0])
    np.testing.assert_allclose(R, expected[0], rtol=1e-8, atol=1e-10)
