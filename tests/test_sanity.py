"""What any explanation must do: depend on the weights, cost the same every time, leave no memory.

python tests/test_sanity.py      # prints how maps change as the weights are randomised by stages
"""

import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import random_captioner  # noqa: E402 (the path comes first)

from captioner import MODELS, load_captioner  # noqa: E402
from images import image_transform, load_image  # noqa: E402

# From the words to the pixels.
STAGES = ("fc", "language_lstm", "attention_lstm", "image_projection", "encoder")
DRAWS = 5  # of random weights: one alone moves a correlation by tenths
CAPTION = ["a", "photo", "of", "a", "lamb", "with", "a", "guy"]
OBJECT_WORDS = [4, 7]  # their positions
# AttnLRP is for another captioner than the shipped one.
# The others are too slow, or only vary a rule.
SUITING_METHODS = ["lrp", "gradcam", "guided_gradcam", "guided_backprop", "gradient"]
SUITING_METHODS += ["input_x_gradient", "attention"]

# How strongly a method's maps may correlate with those of a random last layer. Guided
# backpropagation, and with it half of Guided Grad-CAM, hardly heeds the decoder; attention does not
# depend on the last layer.
LAST_LAYER_LIMITS = {"guided_gradcam": 0.8, "guided_backprop": 1, "attention": 1.01}


def shipped_captioner():
    return load_captioner(ROOT / "checkpoints/scenes-gridtd.pt")


def randomised(stages, seed=0):
    """The shipped captioner, with the weights of these stages drawn anew, at their own scale."""
    captioner = shipped_captioner()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in captioner.named_parameters():
            if name.startswith(stages) and parameter.dim() > 1:
                noise = torch.randn_like(parameter)
                parameter.copy_(noise * parameter.std() + parameter.mean())
    return captioner


def rank_correlation(one, other):
    """Spearman's correlation of two tensors of the same shape."""
    ranks = []
    for value in (one, other):
        ranks.append(value.flatten().argsort().argsort().double().numpy())
    return np.corrcoef(*ranks)[0, 1]


def maps_of_object_words(captioner, method):
    image = image_transform(128)(load_image(ROOT / "data/demo/lamb.jpg"))[None]
    return captioner.explain(image, [CAPTION], method)[0].image_relevance[OBJECT_WORDS]


def randomisation_correlation(method, depth):
    """The cascading randomisation of Adebayo et al. (2018).

    The size of the rank correlation between the maps of two object words and those of a captioner
    whose last `depth` stages are randomised, a mean over DRAWS draws.
    """
    original = maps_of_object_words(shipped_captioner(), method)
    sizes = []
    for seed in range(DRAWS):
        maps = maps_of_object_words(randomised(STAGES[:depth], seed), method)
        sizes.append(abs(rank_correlation(original, maps)))
    return np.mean(sizes)


@pytest.mark.parametrize("method", SUITING_METHODS)
def test_maps_change_when_weights_are_randomised(method):
    """All do once the encoder is random too."""
    assert randomisation_correlation(method, len(STAGES)) < 0.5
    assert randomisation_correlation(method, 1) < LAST_LAYER_LIMITS.get(method, 0.6)


def test_explaining_again_and_again_takes_no_more_memory_and_gives_the_same():
    captioner = random_captioner().float()
    image = torch.randn(1, 3, 128, 128)
    caption = [["w1", "w2", "w3"]]
    first = captioner.explain(image, caption)[0]
    for _ in range(50):
        captioner.explain(image, caption)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        last = captioner.explain(image, caption)[0]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown / 1024 < 30  # MiB (kilobytes on Linux)
    assert torch.equal(first.image_relevance, last.image_relevance)


@pytest.mark.parametrize("model_type", MODELS)
def test_relevance_of_permuted_regions_is_permuted(model_type):
    captioner = random_captioner(model_type=model_type)
    features = torch.rand(1, 9, 256, dtype=torch.float64)
    order = torch.randperm(9)
    plain = region_relevance(captioner, features)
    permuted = region_relevance(captioner, features[:, order])
    torch.testing.assert_close(permuted, plain[:, order])


def region_relevance(captioner, features):
    """LRP of a two-word caption down to features (1, L, D), whatever their encoder -> (2, L)."""
    encoder = captioner.encoder
    captioner.encoder = Given(features)
    image = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    try:
        return captioner.explain(image, [["w1", "w2"]])[0].region_relevance
    finally:
        captioner.encoder = encoder


class Given(nn.Module):
    """An encoder that gives these features for any image."""

    grid = (3, 3)
    given = False

    def __init__(self, features):
        super().__init__()
        self.features = features

    def own_pixels(self, images):
        return images

    def regions(self, images):
        return self.features + 0 * images.sum()

    def check_inputs(self, images):
        """Any will do."""

    def check_lrp_rules(self):
        """There is nothing to explain."""

    def folded(self):
        return self

    def region_mask(self, features):
        return None


if __name__ == "__main__":
    print(f"{'randomised up to':18s}" + "  ".join(STAGES))
    for name in SUITING_METHODS:
        cells = []
        for number, stage in enumerate(STAGES, start=1):
            correlation = randomisation_correlation(name, number)
            cells.append(f"{correlation:{len(stage)}.2f}")
        print(f"{name:18s}" + "  ".join(cells))
