"""Gradient explanations against the slow float64 oracle (oracle_gradients.py), captum, and finite
differences.
"""

import copy
import dataclasses
import functools

import oracle_lrp
import oracle_models
import pytest
import torch
from helpers import random_captioner, relative_difference
from oracle_gradients import DECODERS, REFERENCES, all_word_gradients, explain_words, with_relus
from torch import nn
from torch.nn import functional as F

from captioner import METHODS
from explanation import explain_batch

MODELS = ("adaptive", "gridtd", "aoa", "soft")
HEADS = 4
# Only the multi-head captioner has attention scores that AttnLRP has rules for.
PAIRS = [
    (model_type, method)
    for model_type in MODELS
    for method in METHODS
    if METHODS[method].one_pass and (method != "attnlrp" or model_type == "aoa")
]
# No input word stands there twice, so that each embedding can be moved alone.
CAPTIONS = [[3, 7, 8, 12, 5], [9, 1, 4]]


@functools.cache
def setting(model_type, encoder="scenes_vgg"):
    """A random captioner and two images for it; tests must leave both as they are."""
    captioner = random_captioner(encoder, model_type=model_type, num_head=HEADS)
    size = captioner.encoder.image_size
    return captioner, torch.randn(2, 3, size, size, dtype=torch.float64)


def parameters(captioner):
    """The state dict, not attached to the graph."""
    return {name: value.detach() for name, value in captioner.state_dict().items()}


def true_words(captioner, image, ids):
    """The oracle's gradients for every word of one caption."""
    return all_word_gradients(
        captioner.config.model_type,
        parameters(captioner),
        captioner.encoder,
        captioner.config.num_head,
        image,
        ids,
        captioner.vocabulary.start,
    )


@functools.cache
def truth(model_type):
    """The oracle's gradients for both captions; all methods are made of them."""
    captioner, images = setting(model_type)
    return [true_words(captioner, image, ids) for image, ids in zip(images, CAPTIONS)]


def explained(captioner, images, captions, method):
    """captioner.explain of captions that are given as ids."""
    return captioner.explain(images, [captioner.vocabulary.decode(ids) for ids in captions], method)


def assert_equals_oracle(ours, method, words, grid, tolerance=1e-6):
    """All three relevances of one Explanation, as near as `tolerance` times the largest value."""
    image, regions, inputs = explain_words(method, words, grid)
    assert ours.image_relevance.shape == image.shape
    assert relative_difference(ours.image_relevance, image) < tolerance
    assert relative_difference(ours.region_relevance, regions) < tolerance
    assert ours.word_relevance.shape == inputs.shape
    if method == "attention":
        assert not ours.word_relevance.any()
    else:
        assert relative_difference(ours.word_relevance, inputs) < tolerance


def test_the_oracle_knows_every_gradient_method():
    gradients = {name for name in METHODS if "lrp" not in name}
    further = {"layercam", "integrated_gradients", "smoothgrad", "occlusion", "rise"}
    assert set(REFERENCES) == gradients - further


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("model_type", MODELS)
def test_explanations_equal_the_oracle(model_type, method):
    captioner, images = setting(model_type)
    for ours, words in zip(explained(captioner, images, CAPTIONS, method), truth(model_type)):
        assert_equals_oracle(ours, method, words, captioner.encoder.grid)
        scores = torch.stack([word["score"] for word in words])
        attention = torch.stack([word["attention"] for word in words])
        assert relative_difference(ours.scores, scores) < 1e-10
        assert relative_difference(ours.attention, attention) < 1e-10


@pytest.mark.parametrize("model_type", MODELS)
def test_the_oracle_has_the_decoder_of_the_numpy_oracle(model_type):
    captioner, images = setting(model_type)
    with torch.no_grad():
        features = captioner.encoder(images[:1])[0].numpy()
    inputs = [captioner.vocabulary.start, *CAPTIONS[0][:-1]]
    params = {name: value.numpy() for name, value in parameters(captioner).items()}
    forward = {
        "adaptive": oracle_models.adaptive_forward,
        "gridtd": oracle_lrp.gridtd_forward,
        "aoa": functools.partial(oracle_models.aoa_forward, heads=HEADS),
        "soft": oracle_models.soft_forward,
    }[model_type](params, features, inputs)
    for t, (word, target) in enumerate(zip(truth(model_type)[0], CAPTIONS[0])):
        assert float(word["score"]) == pytest.approx(forward["logits"][t, target], rel=1e-10)


@pytest.mark.parametrize("encoder", ["squeezenet1_1", "inception_v3_6e"])
def test_guided_backprop_enters_every_branch(encoder):
    """SqueezeNet's ReLUs are modules in concatenated branches, Inception's are calls of F.relu."""
    captioner, images = setting("gridtd", encoder)
    (ours,) = explained(captioner, images[:1], [[3, 7]], "guided_backprop")
    words = true_words(captioner, images[0], [3, 7])
    assert_equals_oracle(ours, "guided_backprop", words, captioner.encoder.grid)
    unguided, _, _ = explain_words("gradient", words, captioner.encoder.grid)
    # Else the comparison would prove nothing.
    assert relative_difference(ours.image_relevance, unguided) > 0.1


@pytest.mark.parametrize("method", ["gradient", "guided_backprop"])
def test_pixels_of_float32_equal_float64(method):
    captioner, images = setting("aoa")
    (ours,) = explained(copy.deepcopy(captioner).float(), images[1:].float(), CAPTIONS[1:], method)
    assert ours.image_relevance.dtype == torch.float32
    assert_equals_oracle(ours, method, truth("aoa")[1], captioner.encoder.grid, tolerance=1e-4)


class WordLogit(nn.Module):
    """What captum explains: pixels -> the logit (B, 1) of one word.

    The oracle's decoder stands behind the encoder.
    """

    def __init__(self, captioner, ids, t):
        super().__init__()
        # captum hooks the ReLUs, which forbids in-place ones.
        self.encoder = with_relus(captioner.encoder, nn.ReLU)
        self.layer = self.encoder.net[-1]
        self.params = parameters(captioner)
        self.config = captioner.config
        self.inputs = [captioner.vocabulary.start, *ids[:t]]
        self.target = ids[t]

    def forward(self, images):
        """images (B, 3, H, W) -> (B, 1)."""
        decode = DECODERS[self.config.model_type]
        embeddings = self.params["embedding.weight"][self.inputs]
        logits = []
        for features in self.encoder(images):
            logits.append(decode(self.params, features, embeddings, HEADS)[0])
        return torch.stack(logits)[:, self.target, None]


# captum sums no channels: GuidedBackprop and GuidedGradCam return (1, 3, H, W). It hooks nn.ReLU
# modules only, and the decoder's ReLUs are functions, so its guided gradient, like ours, is guided
# in the encoder alone. Its hook clips the gradient that has already passed the ReLU, which is the
# same two conditions. LayerGradCam takes the ReLU of the map only if told to, GuidedGradCam always.
# GuidedGradCam enlarges to the nearest pixel unless told to do it bilinearly, which is then without
# aligned corners, as ours. Its layer is the last ReLU, before the encoder's `scale`: features that
# are s times as large have gradients 1/s times as large, so the map is the same. Regions are the
# map's rows, flattened.


@pytest.mark.filterwarnings("ignore::UserWarning:captum")
@pytest.mark.parametrize("model_type", MODELS)
def test_captum_agrees(model_type):
    attr = pytest.importorskip("captum.attr")
    captioner, images = setting(model_type)
    image = images[1:]
    t = 2
    ours = {method: explained(captioner, image, CAPTIONS[1:], method)[0] for method in REFERENCES}
    model = WordLogit(captioner, CAPTIONS[1], t)

    saliency = attr.Saliency(model).attribute(image, abs=False).sum(1)[0]
    assert relative_difference(ours["gradient"].image_relevance[t], saliency) < 1e-6
    product = attr.InputXGradient(model).attribute(image).sum(1)[0]
    assert relative_difference(ours["input_x_gradient"].image_relevance[t], product) < 1e-6
    guided = attr.GuidedBackprop(model).attribute(image).sum(1)[0]
    assert relative_difference(ours["guided_backprop"].image_relevance[t], guided) < 1e-6
    cam = attr.LayerGradCam(model, model.layer).attribute(image, relu_attributions=True)
    assert relative_difference(ours["gradcam"].region_relevance[t], cam.flatten()) < 1e-6
    large = attr.LayerAttribution.interpolate(cam, image.shape[2:], "bilinear")[0, 0]
    assert relative_difference(ours["gradcam"].image_relevance[t], large) < 1e-6
    both = attr.GuidedGradCam(model, model.layer).attribute(image, interpolate_mode="bilinear")
    assert relative_difference(ours["guided_gradcam"].image_relevance[t], both.sum(1)[0]) < 1e-6


def slope(score, step=1e-6):
    """The derivative of score(x) at x = 0 by a central difference."""
    return (score(step) - score(-step)) / (2 * step)


@pytest.mark.parametrize("model_type", MODELS)
def test_gradient_of_pixels_is_the_slope_of_the_logits(model_type):
    captioner, images = setting(model_type)
    (ours,) = explained(captioner, images[:1], CAPTIONS[:1], "gradient")
    # A grey direction moves the three channels alike, so that it meets their summed gradient.
    generator = torch.Generator().manual_seed(0xD1CE)
    direction = torch.randn(images.shape[2:], dtype=torch.float64, generator=generator)

    def scores(x):
        return explained(captioner, images[:1] + x * direction, CAPTIONS[:1], "attention")[0].scores

    slopes = slope(scores, step=1e-8)  # a longer one turns some of the many ReLUs or max-pools
    assert relative_difference((ours.image_relevance * direction).sum((1, 2)), slopes) < 1e-5


@pytest.mark.parametrize("model_type", MODELS)
def test_gradient_of_regions_is_the_slope_of_the_logits(model_type):
    captioner, images = setting(model_type)
    (ours,) = explained(captioner, images[:1], CAPTIONS[:1], "gradient")
    inputs = torch.tensor([[[captioner.vocabulary.start, *CAPTIONS[0][:-1]]]])
    with torch.no_grad():
        features = captioner.encoder(images[:1])
        for p in (0, 27, 63):  # all channels of one region move alike
            moved = F.one_hot(torch.tensor(p), features.shape[1])[:, None]
            logits = slope(lambda x, moved=moved: captioner(features + x * moved, inputs)[0, 0])
            slopes = logits[range(len(CAPTIONS[0])), CAPTIONS[0]]
            assert relative_difference(ours.region_relevance[:, p], slopes) < 1e-5


@pytest.mark.parametrize("model_type", MODELS)
def test_gradient_of_words_is_the_slope_of_the_logits(model_type):
    captioner, images = setting(model_type)
    (ours,) = explained(captioner, images[:1], CAPTIONS[:1], "gradient")
    captioner = copy.deepcopy(captioner)
    inputs = [captioner.vocabulary.start, *CAPTIONS[0][:-1]]
    before = captioner.embedding.weight.detach().clone()
    with torch.no_grad():
        features = captioner.encoder(images[:1])

        def scores(word, x):
            captioner.embedding.weight.copy_(before)
            captioner.embedding.weight[word] += x
            logits = captioner(features, torch.tensor([[inputs]]))[0, 0]
            return logits[range(len(CAPTIONS[0])), CAPTIONS[0]]

        for i, word in enumerate(inputs):
            slopes = slope(functools.partial(scores, word))
            assert relative_difference(ours.word_relevance[:, i], slopes) < 1e-5


@pytest.mark.parametrize("model_type", MODELS)
def test_grad_cam_has_no_negative_relevance_and_some_positive(model_type):
    captioner, images = setting(model_type)
    for ours in explained(captioner, images, CAPTIONS, "gradcam"):
        assert (ours.region_relevance >= 0).all() and (ours.image_relevance >= 0).all()
        assert (ours.region_relevance > 0).any()


@pytest.mark.parametrize("model_type, method", PAIRS)
def test_later_words_have_no_part_in_an_explanation(model_type, method):
    captioner, images = setting(model_type)
    ours, other = explained(captioner, images[[1, 1]], [[9, 1, 4], [9, 1, 20, 6]], method)
    for explanation in (ours, other):
        assert not explanation.word_relevance.triu(1).any()
    for part in ("image_relevance", "region_relevance"):
        assert relative_difference(getattr(other, part)[:2], getattr(ours, part)[:2]) < 1e-10
    torch.testing.assert_close(
        other.word_relevance[:2, :2], ours.word_relevance[:2, :2], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("model_type", MODELS)
def test_the_oracle_is_blind_to_the_order_of_regions(model_type):
    captioner, _ = setting(model_type)
    params = parameters(captioner)
    order = torch.randperm(9)
    channels = captioner.encoder.out_channels
    features = torch.randn(9, channels, dtype=torch.float64, requires_grad=True)
    found = []
    for rows in (torch.arange(9), order):
        shown = features[rows]
        logits, _ = DECODERS[model_type](params, shown, params["embedding.weight"][[3, 1]], HEADS)
        found.append(torch.autograd.grad(logits[5], shown)[0].sum(1))
    torch.testing.assert_close(found[0][order], found[1])


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PATCHABLE = (
    (nn.ReLU, "forward"),
    (nn.Conv2d, "forward"),
    (nn.MaxPool2d, "forward"),
    (F, "relu"),
    (F, "relu_"),
    (F, "conv2d"),
    (F, "max_pool2d"),
    (torch, "relu"),
    (torch, "relu_"),
    (torch, "sigmoid"),
    (torch, "tanh"),
)


def state(captioner):
    """All that an explanation could leave changed: of the captioner, its modules, and PyTorch."""
    modules = []
    for name, module in captioner.named_modules():
        hooks = [list(getattr(module, kind)) for kind in HOOKS]
        attributes = {}
        for key, value in vars(module).items():
            if not isinstance(value, dict) and key != "_folded":  # the encoder's cache
                attributes[key] = value
        modules.append((name, module, type(module), hooks, attributes))
    tensors = []
    for name, tensor in (*captioner.named_parameters(), *captioner.named_buffers()):
        gradient = (tensor.requires_grad, tensor.grad, tensor._backward_hooks)
        tensors.append((name, tensor.data_ptr(), *gradient))
    functions = [getattr(*place) for place in PATCHABLE]
    return modules, tensors, functions, torch.is_grad_enabled()


@pytest.mark.parametrize("model_type, method", PAIRS)
def test_explaining_leaves_everything_as_it_was(model_type, method):
    captioner = copy.deepcopy(setting(model_type)[0])
    images = setting(model_type)[1][1:].clone()
    captioner.train()
    captioner.encoder.eval()  # as in training: modes differ between the parts
    captioner.fc.weight.grad = gradient = torch.ones_like(captioner.fc.weight)
    before = state(captioner)
    values = copy.deepcopy(captioner.state_dict())
    pixels = images.clone()
    explained(captioner, images, CAPTIONS[1:], method)
    with torch.no_grad():
        explained(captioner, images, CAPTIONS[1:], method)
    assert state(captioner) == before
    assert captioner.fc.weight.grad is gradient and (gradient == 1).all()
    assert torch.equal(images, pixels) and not images.requires_grad and images.grad is None
    for name, value in captioner.state_dict().items():
        assert torch.equal(value, values[name]), name


@pytest.mark.parametrize("method", REFERENCES)
def test_an_explanation_that_fails_leaves_everything_as_it_was(method):
    captioner, images = setting("gridtd")
    before = state(captioner)
    with pytest.raises(RuntimeError):  # a colour is missing
        explain_batch(captioner, images[:1, :2], CAPTIONS[:1], METHODS[method])
    assert state(captioner) == before
    (ours,) = explained(captioner, images[1:], CAPTIONS[1:], "gradient")
    assert_equals_oracle(ours, "gradient", truth("gridtd")[1], captioner.encoder.grid)


@pytest.mark.parametrize("model_type", MODELS)
def test_attention_goes_no_way_back_and_is_the_same(model_type, monkeypatch):
    captioner, images = setting(model_type)
    chosen = METHODS["attention"]
    assert not chosen.backward
    with_gradients = dataclasses.replace(chosen, backward=True)
    expected = explain_batch(captioner, images, CAPTIONS, with_gradients)
    monkeypatch.delattr("explanation.word_gradients")  # a call would be an error
    for own, other in zip(explain_batch(captioner, images, CAPTIONS, chosen), expected):
        assert own.words == other.words
        for name, value in vars(other).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(own, name), value), name
