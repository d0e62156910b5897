"""Methods beside the paper's: LRP with other rules, LayerCAM, integrated gradients, SmoothGrad."""

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from helpers import random_captioner, relative_difference
from torch import nn
from zennit.rules import AlphaBeta, Epsilon, Gamma

import gradient_utils
from explanation import METHODS
from lrp_utils import EPSILON, TRUE_GRADIENT, AlphaTwoBetaOne, EpsilonConvolutions
from lrp_utils import GammaConvolutions as Gammas

CAPTION = ["w3", "w7", "w8"]


@pytest.fixture(scope="module")
def captioner():
    return random_captioner()


@pytest.fixture(scope="module")
def image():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, 3, 128, 128, dtype=torch.float64, generator=generator)


def layer_and_input(bias=True, signed=False):
    """A convolution, and an input that is not negative unless it is signed."""
    torch.manual_seed(5)
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=bias).double()
    inputs = torch.randn(1, 3, 7, 6, dtype=torch.float64)
    return layer, inputs if signed else inputs.abs()


def relevance(rule, layer, inputs):
    """The relevance (1, 3, 7, 6) of the inputs, if each output has its own value as relevance."""
    inputs = inputs.clone().requires_grad_()
    with rule():
        outputs = layer(inputs)
    (carried,) = torch.autograd.grad(outputs, inputs, torch.ones_like(outputs))
    return inputs.detach() * carried


def by_zennit(rule, layer, inputs):
    """The same by one of zennit's rules."""
    inputs = inputs.clone().requires_grad_()
    handles = rule.register(layer)
    try:
        outputs = layer(inputs)
        (found,) = torch.autograd.grad(outputs, inputs, outputs.detach())
    finally:
        handles.remove()
    return found


@pytest.mark.parametrize(
    "rule, theirs, signed",
    [
        (AlphaTwoBetaOne, AlphaBeta(2.0, 1.0, stabilizer=1e-12, zero_params="bias"), True),
        (EpsilonConvolutions, Epsilon(epsilon=EPSILON), True),
    ],
)
def test_a_rule_of_convolutions_equals_zennits(rule, theirs, signed):
    layer, inputs = layer_and_input(signed=signed)
    ours = relevance(rule, layer, inputs)
    assert relative_difference(ours, by_zennit(theirs, layer, inputs)) < 1e-5


def test_the_gamma_rule_equals_zennits_where_outputs_are_not_negative():
    layer, inputs = layer_and_input()
    layer.weight.data += 0.2  # so that no output is negative, for which zennit has another rule
    assert (layer(inputs) > 0).all()
    theirs = Gamma(gamma=Gammas.gamma, stabilizer=EPSILON)
    assert (
        relative_difference(relevance(Gammas, layer, inputs), by_zennit(theirs, layer, inputs))
        < 1e-5
    )


def slow_relevance(layer, inputs, share):
    """Relevance by a loop over all pairs of an output and an input.

    share: a function of (contributions of the inputs to an output, its bias) -> parts.
    """
    outputs = layer(inputs).detach()
    padded = F.pad(inputs, (1, 1, 1, 1))
    found = torch.zeros_like(padded)
    for channel in range(outputs.shape[1]):
        for row in range(outputs.shape[2]):
            for column in range(outputs.shape[3]):
                window = (0, slice(None), slice(2 * row, 2 * row + 3))
                window += (slice(2 * column, 2 * column + 3),)
                contributions = padded[window] * layer.weight[channel].detach()
                parts = share(contributions, layer.bias[channel].detach())
                found[window] += parts * outputs[0, channel, row, column]
    return found[:, :, 1:-1, 1:-1]


def alpha2beta1(contributions, bias):
    """Bach et al. (2015), eq. 60."""
    raising = contributions.clamp(min=0)
    lowering = contributions.clamp(max=0)
    return 2 * raising / raising.sum() - lowering / lowering.sum()


def test_alpha2_beta1_equals_a_slow_version():
    layer, inputs = layer_and_input(signed=True)
    expected = slow_relevance(layer, inputs, alpha2beta1)
    assert relative_difference(relevance(AlphaTwoBetaOne, layer, inputs), expected) < 1e-9


@pytest.mark.parametrize("rule, gamma", [(EpsilonConvolutions, 0.0), (Gammas, 0.25)])
def test_epsilon_and_gamma_equal_a_slow_version(rule, gamma):
    def parts(contributions, bias):
        favoured = contributions + gamma * contributions.clamp(min=0)
        total = favoured.sum() + bias + gamma * bias.clamp(min=0)
        return favoured / (total + EPSILON * (1 if total >= 0 else -1))

    layer, inputs = layer_and_input()
    expected = slow_relevance(layer, inputs, parts)
    assert relative_difference(relevance(rule, layer, inputs), expected) < 1e-9


@pytest.mark.parametrize("method", ["lrp_alpha2beta1", "lrp_gamma", "lrp_epsilon"])
def test_another_rule_changes_the_pixels_only(captioner, image, method):
    (usual,) = captioner.explain(image, [CAPTION], "lrp")
    (other,) = captioner.explain(image, [CAPTION], method)
    assert torch.equal(other.scores, usual.scores)
    assert torch.allclose(other.region_relevance, usual.region_relevance)
    assert torch.allclose(other.word_relevance, usual.word_relevance)
    assert relative_difference(other.image_relevance, usual.image_relevance) > 0.01


def test_layer_cam_weighs_every_region_by_its_positive_gradient(captioner, image):
    (found,) = captioner.explain(image, [CAPTION], "layercam")
    features, gradients = leaves_and_gradients(captioner, image, position=2)
    expected = (gradients["regions"].clamp(min=0) * features).sum(-1).clamp(min=0)
    assert relative_difference(found.region_relevance[2], expected[0]) < 1e-9


def word_score(captioner, images, embeddings, position, features=None):
    """The logit of the caption's word, written out: (B,)."""
    if features is None:
        features = captioner.encoder.folded().regions(images)
    memory = captioner.image_memory(features, TRUE_GRADIENT)
    unrolled = captioner.unroll(embeddings.unsqueeze(1), memory, TRUE_GRADIENT)
    outputs = torch.stack(list(unrolled.addends)).sum(0).squeeze(1)
    word = captioner.vocabulary.encode(CAPTION)[position]
    return captioner.fc(outputs)[:, position, word]


def embeddings_of(captioner):
    """Of `<start>` and all words but the last: (1, T, E)."""
    ids = [captioner.vocabulary.start, *captioner.vocabulary.encode(CAPTION)[:-1]]
    return captioner.embedding(torch.tensor([ids])).detach()


def leaves_and_gradients(captioner, image, position):
    """The region features and the gradients of a word's logit."""
    features = captioner.encoder.folded().regions(image).detach().requires_grad_()
    score = word_score(captioner, image, embeddings_of(captioner), position, features)
    (regions,) = torch.autograd.grad(score.sum(), features)
    return features.detach(), {"regions": regions}


@pytest.mark.parametrize("position", [0, 2])
def test_integrated_gradients_equal_captums(captioner, image, position):
    (found,) = captioner.explain(image, [CAPTION], "integrated_gradients")
    embeddings = embeddings_of(captioner)

    def score(images, words):
        return word_score(captioner, images, words, position)

    pixels, words = IntegratedGradients(score).attribute(
        (image, embeddings),
        n_steps=gradient_utils.STEPS,
        method="riemann_middle",
        internal_batch_size=8,
    )
    assert relative_difference(found.image_relevance[position], pixels[0].sum(0)) < 1e-6
    row = found.word_relevance[position, : position + 1]
    assert relative_difference(row, words[0, : position + 1].sum(-1)) < 1e-6


def test_integrated_gradients_are_complete(captioner, image, monkeypatch):
    """Their sum is the score less that of the baseline (Sundararajan et al. 2017, prop. 1).

    It is the more so, the more steps there are.
    """
    nothing = word_score(captioner, 0 * image, 0 * embeddings_of(captioner), 2).detach()
    errors = []
    for steps in (4, 64):
        monkeypatch.setattr(gradient_utils, "STEPS", steps)
        (found,) = captioner.explain(image, [CAPTION], "integrated_gradients")
        total = found.image_relevance[2].sum() + found.word_relevance[2].sum()
        errors.append(abs(float(total - (found.scores[2] - nothing[0]))))
    size = found.image_relevance[2].abs().sum() + found.word_relevance[2].abs().sum()
    assert errors[1] < 0.01 * float(size)
    assert errors[1] < errors[0] / 2


def test_smoothgrad_is_the_mean_gradient_of_noisy_copies(captioner, image, monkeypatch):
    monkeypatch.setattr(gradient_utils, "NOISY_COPIES", 3)
    (found,) = captioner.explain(image, [CAPTION], "smoothgrad")
    total = 0
    for seed in range(3):
        noise = torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(seed))
        noisy = image + 0.1 * (image.max() - image.min()) * noise.double()
        total = total + captioner.explain(noisy, [CAPTION], "gradient")[0].image_relevance
    assert relative_difference(found.image_relevance, total / 3) < 1e-6


def test_what_needs_several_passes_is_the_same_in_a_batch(captioner, image, monkeypatch):
    monkeypatch.setattr(gradient_utils, "STEPS", 3)
    monkeypatch.setattr(gradient_utils, "NOISY_COPIES", 3)
    images = torch.cat([image, 2 * image])
    for method in [name for name, method in METHODS.items() if method.samples is not None]:
        (alone,) = captioner.explain(images[1:], [CAPTION], method)
        together = captioner.explain(images, [CAPTION[:1], CAPTION], method)[1]
        assert relative_difference(together.image_relevance, alone.image_relevance) < 1e-9
