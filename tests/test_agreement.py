"""LRP of every captioner through every encoder equals the slow oracles; see also agreement.py."""

import pytest
import torch
from agreement import CAPTION, ENCODERS, ROOT, lrp_disagreement
from helpers import random_captioner

from captioner import load_captioner
from images import image_transform, load_image

SIZES = {"vgg16": 48, "resnet101": 64, "inception_v3": 107}  # smaller than life, for speed
PAIRS = [("gridtd", encoder) for encoder in ENCODERS]
PAIRS += [(model_type, "squeezenet1_1") for model_type in ("adaptive", "aoa", "soft")]


@pytest.mark.parametrize("model_type, encoder", PAIRS)
def test_lrp_equals_the_oracles(model_type, encoder):
    captioner = random_captioner(encoder, model_type=model_type)
    size = SIZES.get(encoder, 64)
    image = torch.randn(3, size, size, dtype=torch.float64)
    assert max(lrp_disagreement(captioner, image, CAPTION).values()) < 1e-7


def test_lrp_of_trained_weights_equals_the_oracles():
    captioner = load_captioner(ROOT / "checkpoints/scenes-gridtd.pt").double()
    torch.manual_seed(0)
    image = image_transform(128)(load_image(ROOT / "data/demo/lamb.jpg")).double()
    # Equal pixels of a flat drawing would tie in a max-pool, and rounding would decide who wins.
    image += 1e-3 * torch.randn_like(image)
    ids = captioner.vocabulary.encode(captioner.caption(image[None])[0])
    assert len(ids) > 3 and max(lrp_disagreement(captioner, image, ids).values()) < 1e-7
