"""LRP of every captioner through every encoder equals the slow oracles; `agreement.py` does it at full size."""

import pytest
import torch

from agreement import CAPTION, ENCODERS, MODELS, lrp_disagreement
from test_lrp_utils import random_captioner

SIZES = {"vgg16": 48, "resnet101": 64, "inception_v3": 107}  # smaller than life, for speed
PAIRS = [("gridtd", encoder) for encoder in ENCODERS] + [(model, "squeezenet1_1") for model in MODELS if model != "gridtd"]


@pytest.mark.parametrize("model_type, encoder", PAIRS)
def test_lrp_equals_the_oracles(model_type, encoder):
    captioner = random_captioner(encoder, model_type=model_type)
    size = SIZES.get(encoder, 64)
    image = torch.randn(3, size, size, dtype=torch.float64)
    assert max(lrp_disagreement(captioner, image, CAPTION).values()) < 1e-7
