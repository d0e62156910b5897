"""The front door: the captioners there are, and how to build or load one.

    captioner = load_captioner("checkpoints/flickr8k.pt", device="cpu")
    captions = captioner.caption(images, method="beam", beam_size=3)    # lists of words
    explanations = captioner.explain(images)                            # one Explanation an image

What a captioner can do is in basemodel.py, how it explains in explanation.py.
"""

import torch

from aoamodel import AoACaptioner
from basemodel import CaptionerConfig, read_checkpoint
from commandline import UserError
from encoder import Encoder
from explanation import METHODS, Explanation
from gridTDmodel import AdaptiveCaptioner, GridTDCaptioner
from vocabulary import Vocabulary

__all__ = [
    "METHODS",
    "MODELS",
    "CaptionerConfig",
    "Explanation",
    "build_captioner",
    "load_captioner",
]

MODELS = {"adaptive": AdaptiveCaptioner, "gridtd": GridTDCaptioner, "aoa": AoACaptioner}


def build_captioner(config, vocabulary, encoder):
    """A captioner with random decoder weights over the given encoder.

    UserError if there is no such model_type.
    """
    if config.model_type not in MODELS:
        known = ", ".join(MODELS)
        raise UserError(f"there is no model_type '{config.model_type}'; choose from {known}")
    return MODELS[config.model_type](config, vocabulary, encoder)


def load_captioner(path, device="cpu"):
    """The captioner saved in `path`, in eval mode on `device`. UserError if the file is not one."""
    # Parameters that are made in inference mode could not be explained later.
    with torch.inference_mode(False):
        checkpoint = read_checkpoint(path, device)
        config = CaptionerConfig(**checkpoint["config"])
        vocabulary = Vocabulary(checkpoint["vocabulary"])
        try:
            encoder = Encoder(config.encoder)
        except UserError as error:
            raise UserError(f"{path} cannot be loaded: {error}") from None
        captioner = build_captioner(config, vocabulary, encoder)
        captioner.load_state_dict(checkpoint["state_dict"])
        captioner.encoder.to(memory_format=torch.channels_last)  # twice as fast on CPUs
        return captioner.to(device).eval()
