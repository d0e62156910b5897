"""Image encoders: an image becomes a grid of region features A (L, D), a_i the feature vector of region i (paper §3.1).

encoder = build_encoder("vgg16")                          # torchvision's ImageNet weights, downloaded once
encoder = build_encoder("squeezenet1_1", "weights.pth")   # a local state dict of torchvision's whole network
features = encoder(images)                                # (B, 3, 224, 224), ImageNet-normalised -> (B, L, D)
"""

import copy
import hashlib
import itertools
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable
from urllib.error import URLError

import torch
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from commandline import UserError
from images import IMAGENET_MEAN, IMAGENET_STD

# Feature maps and max-pools ("M") of the small VGG that is trained from scratch on the drawn scenes (128 -> 8 pixels).
SCENES_VGG = (16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 256)


def scenes_vgg_layers():
    """The scenes' VGG: 3x3 convolutions with batch-norm and ReLU, four max-pools, ends with a ReLU as relu5_3 does."""
    layers, channels = [], 3
    for width in SCENES_VGG:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
    return nn.Sequential(*layers)


def resnet101_layers():
    """ResNet-101 up to its last residual stage."""
    return without_tail(torchvision.models.resnet101(), "avgpool")


def inception_v3_layers(end):
    """Inception-v3 up to and with the block `end`; its input is normalised as all others' (see `_fold_input_transform`)."""
    network = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False)
    names = [name for name, _ in network.named_children()]
    return without_tail(network, names[names.index(end) + 1])


def without_tail(network, name):
    """The children of a torchvision network before the one called `name`, in order, as a Sequential that keeps their names."""
    children = dict(network.named_children())
    return nn.Sequential(
        OrderedDict(itertools.takewhile(lambda item: item[0] != name, children.items()))
    )


@dataclass(frozen=True)
class EncoderSpec:
    """What is fixed about an encoder; `scale` brings the mean activation near that of VGG16, and is part of the encoder."""

    layers: (
        Callable  # () -> nn.Sequential, random weights; empty where the regions' features are given
    )
    pretrained: str | None  # torchvision's name of the network that carries the ImageNet weights
    out_channels: int
    image_size: int | None
    grid: tuple
    scale: float = 1.0


ENCODERS = {
    "scenes_vgg": EncoderSpec(scenes_vgg_layers, None, 256, 128, (8, 8), scale=5.0),
    # The paper's encoder: VGG16 up to relu5_3, that is without its last max-pool (§4).
    "vgg16": EncoderSpec(
        lambda: torchvision.models.vgg16().features[:-1], "vgg16", 512, 224, (14, 14)
    ),
    "resnet101": EncoderSpec(resnet101_layers, "resnet101", 2048, 224, (7, 7)),
    "squeezenet1_1": EncoderSpec(
        lambda: torchvision.models.squeezenet1_1().features,
        "squeezenet1_1",
        512,
        224,
        (13, 13),
        scale=0.2,
    ),
    "inception_v3": EncoderSpec(
        lambda: inception_v3_layers("Mixed_7a"), "inception_v3", 1280, 299, (8, 8), scale=5.0
    ),
    "inception_v3_6e": EncoderSpec(
        lambda: inception_v3_layers("Mixed_6e"), "inception_v3", 768, 299, (17, 17), scale=10.0
    ),
    # Features of at most 36 boxes from an object detector (Anderson et al. 2018), which stands outside of this project.
    "bottom_up": EncoderSpec(nn.Sequential, None, 2048, None, (36, 1)),
}


class Encoder(nn.Module):
    """A convolutional network whose last feature map, (B, D, h, w), is read as L = h*w region features."""

    def __init__(self, name):
        super().__init__()
        spec = ENCODERS[name]
        self.name, self.out_channels, self.image_size, self.grid = (
            name,
            spec.out_channels,
            spec.image_size,
            spec.grid,
        )
        self.scale = spec.scale
        self.net = spec.layers()

    @property
    def given(self):
        """Whether region features are given from outside, and no image is looked at."""
        return self.image_size is None

    def forward(self, images):
        """images (B, 3, S, S), ImageNet-normalised -> region features (B, L, D), row by row; given features as they are."""
        return images if self.given else self.net(images).flatten(2).transpose(1, 2) * self.scale

    def region_mask(self, features):
        """Which of the regions (B, L, D) are real: bool (B, L); padding is all zero. None where all are."""
        return features.ne(0).any(dim=-1) if self.given else None

    def folded(self):
        """This encoder with every batch-norm merged into its convolution, as LRP wants it; itself if it has none."""
        if not any(isinstance(module, nn.BatchNorm2d) for module in self.net.modules()):
            return self
        folded = copy.copy(self)
        folded._modules = {"net": fold_batch_norm(copy.deepcopy(self.net).eval())}
        return folded

    def weights_hash(self):
        """16 hex digits that tell this encoder from any other (SHA-256 of its name, scale and float32 state dict)."""
        digest = hashlib.sha256(f"{self.name} {self.scale}".encode())
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]


def fold_batch_norm(module):
    """Merge, in place, every batch-norm into the convolution that stands before it among its parent's children."""
    before = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            module._modules[before] = fuse_conv_bn_eval(module._modules[before], child)
            module._modules[name] = nn.Identity()
        fold_batch_norm(child)
        before = name
    return module


def build_encoder(name, weights=None):
    """The encoder called `name`, in eval mode and frozen.

    weights: None (torchvision's ImageNet weights, or random for an encoder that has none), "random", or the file of a
    state dict, of torchvision's whole network or of an Encoder, or of a captioner. Raises UserError for an unknown name, or weights that cannot be had.
    """
    if name not in ENCODERS:
        raise UserError(f"there is no encoder '{name}'; choose from {', '.join(ENCODERS)}")
    encoder = Encoder(name)
    pretrained = ENCODERS[name].pretrained
    if has_learnt(name, weights):
        state = _download(pretrained) if weights is None else _read_state_dict(weights)
        _load_weights(encoder.net, state, weights or f"torchvision's {pretrained}")
        if (
            pretrained == "inception_v3"
            and {"fc.weight", "Conv2d_1a_3x3.conv.weight"} <= state.keys()
        ):  # torchvision's whole network
            _fold_input_transform(encoder.net.Conv2d_1a_3x3)
    return encoder.eval().requires_grad_(False)


def has_learnt(name, weights):
    """Whether `build_encoder` of these finds weights, in a file or torchvision's, rather than draws random ones."""
    return (
        weights not in (None, "random") or weights is None and ENCODERS[name].pretrained is not None
    )


def _download(pretrained):
    try:
        return torchvision.models.get_weight(
            f"{_weights_class(pretrained)}.IMAGENET1K_V1"
        ).get_state_dict(progress=True)
    except (URLError, OSError) as error:
        raise UserError(
            f"the ImageNet weights of {pretrained} could not be downloaded ({error}); "
            "give a file with --encoder_weights, or --encoder_weights random"
        ) from None


def _weights_class(pretrained):
    return torchvision.models.get_model_weights(pretrained).__name__


def _read_state_dict(path):
    if not Path(path).is_file():
        raise UserError(
            f"there is no file {path}; --encoder_weights takes a state dict saved by torch.save, or 'random'"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        return loaded.get("state_dict", loaded)  # a captioner's checkpoint holds more
    except Exception:  # torch.load raises many kinds for a file that is not a state dict
        raise UserError(f"{path} is not a PyTorch state dict") from None


def _load_weights(net, state_dict, source):
    """Load a state dict of torchvision's whole network, an Encoder or a captioner into `net`; UserError if of another network."""
    prefixes = re.compile(r"^(features\.|(encoder\.)?net\.)")
    values = {prefixes.sub("", key): value for key, value in state_dict.items()}
    try:
        net.load_state_dict(
            {
                key: values[key]
                for key in net.state_dict()
                if key in values or "num_batches" not in key
            },
            strict=False,
        )
    except (KeyError, RuntimeError):
        raise UserError(f"{source} does not hold the weights of this encoder") from None


@torch.no_grad()
def _fold_input_transform(stem):
    """torchvision's Inception-v3 wants pixels in -1..1; let its first convolution, which has no padding, take ours instead.

    x' = x std / 0.5 + (mean - 0.5) / 0.5 for each colour; the constant part moves the batch-norm's running mean.
    """
    mean, std = (
        stem.conv.weight.new_tensor(values).view(1, 3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    stem.bn.running_mean -= (stem.conv.weight * (mean - 0.5) / 0.5).sum((1, 2, 3))
    stem.conv.weight *= std / 0.5
