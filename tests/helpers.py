"""What several test files share: a random captioner, and how far two arrays are apart."""

import numpy as np
import torch
from torch import nn

from captioner import CaptionerConfig, build_captioner
from encoder import build_encoder
from vocabulary import Vocabulary


def relative_difference(ours, truth):
    """The largest difference as a share of the largest true value."""
    ours = np.asarray(torch.as_tensor(ours).detach())
    truth = np.asarray(torch.as_tensor(truth).detach())
    return np.abs(ours - truth).max() / np.abs(truth).max()


def random_captioner(encoder="scenes_vgg", words=30, seed=0xC0FFEE, vocabulary=None, **sizes):
    """A float64 captioner with random weights, large enough that every nonlinearity is used."""
    torch.manual_seed(seed)
    if vocabulary is None:
        names = [f"w{i}" for i in range(words)]
        vocabulary = Vocabulary(["<pad>", *names, "<unk>", "<start>", "<end>"])
    sizes = {"embed_dim": 12, "hidden_dim": 16, "num_head": 4, **sizes}
    config = CaptionerConfig(encoder=encoder, **sizes)
    captioner = build_captioner(config, vocabulary, build_encoder(encoder, "random"))
    captioner = captioner.double().eval()
    for name, parameter in captioner.named_parameters():
        if not name.startswith("encoder.") and parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    calibrate(captioner.encoder)
    return captioner


def calibrate(encoder):
    """Give an encoder's batch-norms weights, biases and statistics that are not trivial."""
    layers = [layer for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, -0.5, 0.5)
        layer.momentum = 1.0
        layer.train()
    if layers:
        encoder(torch.randn(2, 3, 128, 128, dtype=torch.float64))
        encoder.eval()


def unpadded(text):
    """A text with one blank for each run of blanks, so that a table's columns are not aligned."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines())
