"""Image encoders: an image becomes a grid of region features A (L, D), a_i the feature vector of region i (paper §3.1).

    encoder = build_encoder("vgg16")                          # torchvision's ImageNet weights, downloaded once
    encoder = build_encoder("squeezenet1_1", "weights.pth")   # a local state dict of torchvision's whole network
    features = encoder(images)                                # (B, 3, 224, 224), ImageNet-normalised -> (B, L, D)
"""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable
from urllib.error import URLError

import torch
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from commandline import UserError

# Feature maps and max-pools ("M") of the small VGG that is trained from scratch on the drawn scenes (128 -> 8 pixels).
SCENES_VGG = (16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 256)


def scenes_vgg_layers():
    """The scenes' VGG: 3x3 convolutions with batch-norm and ReLU, four max-pools, ends with a ReLU as relu5_3 does."""
    layers, channels = [], 3
    for width in SCENES_VGG:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class EncoderSpec:
    """What is fixed about an encoder; `scale` brings the mean activation near that of VGG16, and is part of the encoder."""

    layers: Callable  # () -> nn.Sequential, random weights
    pretrained: str | None  # torchvision's name of the network whose `features` carry the ImageNet weights
    out_channels: int
    image_size: int
    grid: tuple
    scale: float = 1.0


ENCODERS = {
    "scenes_vgg": EncoderSpec(scenes_vgg_layers, None, 256, 128, (8, 8), scale=5.0),
    # The paper's encoder: VGG16 up to relu5_3, that is without its last max-pool (§4).
    "vgg16": EncoderSpec(lambda: torchvision.models.vgg16().features[:-1], "vgg16", 512, 224, (14, 14)),
    "squeezenet1_1": EncoderSpec(
        lambda: torchvision.models.squeezenet1_1().features, "squeezenet1_1", 512, 224, (13, 13), scale=0.2
    ),
}


class Encoder(nn.Module):
    """A convolutional network whose last feature map, (B, D, h, w), is read as L = h*w region features."""

    def __init__(self, name):
        super().__init__()
        spec = ENCODERS[name]
        self.name, self.out_channels, self.image_size, self.grid = name, spec.out_channels, spec.image_size, spec.grid
        self.scale = spec.scale
        self.net = spec.layers()

    def forward(self, images):
        """images (B, 3, S, S), ImageNet-normalised -> region features (B, L, D), row by row."""
        return self.net(images).flatten(2).transpose(1, 2) * self.scale

    def folded(self):
        """This encoder with every batch-norm merged into its convolution, as LRP wants it; itself if it has none."""
        if not any(isinstance(layer, nn.BatchNorm2d) for layer in self.net):
            return self
        layers = []
        for layer in copy.deepcopy(self.net).eval():
            if isinstance(layer, nn.BatchNorm2d):
                layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
            else:
                layers.append(layer)
        folded = copy.copy(self)
        folded._modules = {"net": nn.Sequential(*layers)}
        return folded

    def weights_hash(self):
        """16 hex digits that tell this encoder from any other (SHA-256 of its name, scale and float32 state dict)."""
        digest = hashlib.sha256(f"{self.name} {self.scale}".encode())
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]


def build_encoder(name, weights=None):
    """The encoder called `name`, in eval mode and frozen.

    weights: None (torchvision's ImageNet weights, or random for an encoder that has none), "random", or the file of a
    state dict, of torchvision's whole network or of an Encoder. Raises UserError for an unknown name, or weights that cannot be had.
    """
    if name not in ENCODERS:
        raise UserError(f"there is no encoder '{name}'; choose from {', '.join(ENCODERS)}")
    encoder = Encoder(name)
    pretrained = ENCODERS[name].pretrained
    if weights not in (None, "random"):
        _load_features(encoder.net, _read_state_dict(weights), weights)
    elif weights is None and pretrained:
        _load_features(encoder.net, _download(pretrained), f"torchvision's {pretrained}")
    return encoder.eval().requires_grad_(False)


def _download(pretrained):
    try:
        return torchvision.models.get_weight(f"{_weights_class(pretrained)}.IMAGENET1K_V1").get_state_dict(progress=True)
    except (URLError, OSError) as error:
        raise UserError(
            f"the ImageNet weights of {pretrained} could not be downloaded ({error}); "
            "give a file with --encoder_weights, or --encoder_weights random"
        ) from None


def _weights_class(pretrained):
    return torchvision.models.get_model_weights(pretrained).__name__


def _read_state_dict(path):
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; --encoder_weights takes a state dict saved by torch.save, or 'random'")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises many kinds for a file that is not a state dict
        raise UserError(f"{path} is not a PyTorch state dict") from None


def _load_features(net, state_dict, source):
    """Load torchvision's `features.*` or an Encoder's own `net.*` into `net`; UserError if they are another network's."""
    values = {key.partition(".")[2]: value for key, value in state_dict.items() if key.startswith(("features.", "net."))}
    try:
        net.load_state_dict({key: values[key] for key in net.state_dict()})
    except (KeyError, RuntimeError):
        raise UserError(f"{source} does not hold the weights of this encoder") from None
