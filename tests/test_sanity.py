"""What any explanation must do: depend on the weights, cost the same every time, leave no memory behind.

python tests/test_sanity.py      # prints how maps change as the weights are randomised, stage by stage
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

from helpers import random_captioner  # noqa: E402

from captioner import METHODS, load_captioner  # noqa: E402
from images import image_transform, load_image  # noqa: E402 (the path comes first)

STAGES = (
    "fc",
    "language_lstm",
    "attention_lstm",
    "image_projection",
    "encoder",
)  # from the words to the pixels
DRAWS = 5  # of random weights: one alone moves a correlation by tenths


def randomised(stages, seed=0):
    """The captioner that ships, with the weights of these stages drawn anew, at their own scale."""
    captioner = load_captioner(ROOT / "checkpoints/scenes-gridtd.pt")
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in captioner.named_parameters():
            if name.startswith(stages) and parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.std() + parameter.mean())
    return captioner


def rank_correlation(one, other):
    """Spearman's correlation of two tensors of the same shape."""
    ranks = [
        torch.argsort(torch.argsort(value.flatten())).double().numpy() for value in (one, other)
    ]
    return np.corrcoef(*ranks)[0, 1]


def randomisation_correlations(method, depths=range(1, len(STAGES) + 1)):
    """The cascading randomisation of Adebayo et al. (2018): rank correlation of the maps of two object words with those of
    the captioner whose last stage, last two stages, ... all stages are randomised; the mean size over DRAWS draws."""
    image = image_transform(128)(load_image(ROOT / "data/demo/lamb.jpg"))[None]
    caption = ["a", "photo", "of", "a", "lamb", "with", "a", "guy"]

    def maps(captioner):
        return captioner.explain(image, [caption], method)[0].image_relevance[[4, 7]]

    original = maps(randomised(()))
    return [
        np.mean(
            [
                abs(rank_correlation(original, maps(randomised(STAGES[:depth], seed))))
                for seed in range(DRAWS)
            ]
        )
        for depth in depths
    ]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "attnlrp"])
def test_maps_change_when_weights_are_randomised(method):
    """All do once the encoder is random too. Guided backpropagation, and with it half of Guided Grad-CAM, hardly heeds the
    decoder; attention does not depend on the last layer."""
    last_layer, everything = randomisation_correlations(method, depths=(1, len(STAGES)))
    assert everything < 0.5
    assert last_layer < {"guided_gradcam": 0.8, "guided_backprop": 1, "attention": 1.01}.get(
        method, 0.6
    )


def test_explaining_again_and_again_takes_no_more_memory_and_gives_the_same():
    captioner = random_captioner().float()
    image, caption = torch.randn(1, 3, 128, 128), [["w1", "w2", "w3"]]
    first = captioner.explain(image, caption)[0]
    for _ in range(50):
        captioner.explain(image, caption)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        last = captioner.explain(image, caption)[0]
    grown = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    ) / 1024  # MiB (kilobytes on Linux)
    assert grown < 30
    assert torch.equal(first.image_relevance, last.image_relevance)


def test_relevance_of_permuted_regions_is_permuted():
    for model_type in ("adaptive", "gridtd", "aoa"):
        captioner = random_captioner(model_type=model_type)
        features, order = torch.rand(1, 9, 256, dtype=torch.float64), torch.randperm(9)
        plain, permuted = (
            region_relevance(captioner, grid) for grid in (features, features[:, order])
        )
        torch.testing.assert_close(permuted, plain[:, order])


def region_relevance(captioner, features):
    """LRP of a two-word caption down to features (1, L, D), whatever encoder they come from -> (2, L)."""
    captioner = captioner.double()
    encoder, captioner.encoder = captioner.encoder, Given(features)
    try:
        return captioner.explain(torch.zeros(1, 3, 4, 4, dtype=torch.float64), [["w1", "w2"]])[
            0
        ].region_relevance
    finally:
        captioner.encoder = encoder


class Given(nn.Module):
    """An encoder that gives these features for any image."""

    grid = (3, 3)
    given = False
    out_channels = 256

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, images):
        return self.features + 0 * images.sum()

    def folded(self):
        return self

    def check_inputs(self, images):
        pass

    def region_mask(self, features):
        return None


if __name__ == "__main__":
    print(f"{'randomised up to':18s}" + "  ".join(STAGES))
    for name in METHODS:
        print(
            f"{name:18s}"
            + "  ".join(
                f"{value:{len(stage)}.2f}"
                for stage, value in zip(STAGES, randomisation_correlations(name))
            )
        )
