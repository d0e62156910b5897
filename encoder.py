"""Image encoders: an image becomes a grid of region features A (L, D), where a_i is the feature
vector of region i (paper §3.1).

    encoder = build_encoder("vgg16")                          # downloads torchvision's weights once
    encoder = build_encoder("squeezenet1_1", "weights.pth")   # a local state dict
    features = encoder(images)                                # (B, 3, 224, 224) -> (B, L, D)

Images are ImageNet-normalised (images.py).
"""

import copy
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.optimizer import register_optimizer_step_post_hook

from commandline import UserError
from images import IMAGENET_MEAN, IMAGENET_STD

# Feature maps and max-pools ("M") of the small VGG that learns from nothing on the drawn scenes. It
# makes 8 x 8 regions of 128 x 128 pixels.
SCENES_VGG = (16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 256)


def scenes_vgg_layers():
    """The scenes' VGG: 3x3 convolutions with batch-norm and ReLU, and four max-pools.

    Like the paper's relu5_3 it ends with a ReLU.
    """
    layers = []
    channels = 3
    for width in SCENES_VGG:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU(inplace=True))
        channels = width
    return nn.Sequential(*layers)


def vgg16_layers():
    """The paper's encoder: VGG16 up to relu5_3, that is without its last max-pool (§4)."""
    return torchvision.models.vgg16().features[:-1]


def resnet101_layers():
    """ResNet-101 up to its last residual stage."""
    return children_before(torchvision.models.resnet101(), "avgpool")


def squeezenet1_1_layers():
    """SqueezeNet 1.1 without its classifier."""
    return torchvision.models.squeezenet1_1().features


def inception_v3_7a_layers():
    """Inception-v3 up to and with the block Mixed_7a; see `_fold_input_transform` for its input."""
    return children_before(_inception_v3(), "Mixed_7b")


def inception_v3_6e_layers():
    """Inception-v3 up to and with the block Mixed_6e; see `_fold_input_transform` for its input."""
    return children_before(_inception_v3(), "Mixed_7a")


def _inception_v3():
    return torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False)


def children_before(network, name):
    """The children of a network before the one called `name`, as a Sequential of the same names."""
    kept = OrderedDict()
    for child_name, child in network.named_children():
        if child_name == name:
            break
        kept[child_name] = child
    return nn.Sequential(kept)


@dataclass(frozen=True)
class EncoderSpec:
    """What is fixed about an encoder.

    layers        () -> an nn.Sequential with random weights; empty where features are given
    pretrained    torchvision's name of the network that carries the ImageNet weights, or None
    out_channels  D of the region features
    image_size    the side of its images in pixels; None where features are given
    grid          (h, w): how the L = h * w regions lie in the image
    scale         what the features are multiplied by, so that their mean is near that of VGG16's;
                  it is part of the encoder
    """

    layers: Callable
    pretrained: str | None
    out_channels: int
    image_size: int | None
    grid: tuple
    scale: float = 1.0


ENCODERS = {
    "scenes_vgg": EncoderSpec(scenes_vgg_layers, None, 256, 128, (8, 8), scale=5.0),
    "vgg16": EncoderSpec(vgg16_layers, "vgg16", 512, 224, (14, 14)),
    "resnet101": EncoderSpec(resnet101_layers, "resnet101", 2048, 224, (7, 7)),
    "squeezenet1_1": EncoderSpec(
        squeezenet1_1_layers, "squeezenet1_1", 512, 224, (13, 13), scale=0.2
    ),
    "inception_v3": EncoderSpec(
        inception_v3_7a_layers, "inception_v3", 1280, 299, (8, 8), scale=5.0
    ),
    "inception_v3_6e": EncoderSpec(
        inception_v3_6e_layers, "inception_v3", 768, 299, (17, 17), scale=10.0
    ),
    # Features of at most 36 boxes from an object detector (Anderson et al. 2018). The detector
    # itself is not part of this project.
    "bottom_up": EncoderSpec(nn.Sequential, None, 2048, None, (36, 1)),
}


class Encoder(nn.Module):
    """A convolutional network whose last feature map is read as L = h * w region features.

    name: one of ENCODERS. Its weights are random; `build_encoder` loads some.
    """

    def __init__(self, name):
        super().__init__()
        spec = ENCODERS[name]
        self.name = name
        self.out_channels = spec.out_channels
        self.image_size = spec.image_size
        self.grid = spec.grid
        self.scale = spec.scale
        self.net = spec.layers()
        self._folded = None  # (state of the weights, the encoder folded from them)

    @property
    def given(self):
        """Whether region features are given from outside, and no image is looked at."""
        return self.image_size is None

    def forward(self, images):
        """images (B, 3, S, S), ImageNet-normalised -> region features (B, L, D), row by row.

        Given features are returned as they are.
        """
        if self.given:
            return images
        maps = self.net(images)  # (B, D, h, w)
        return maps.flatten(2).transpose(1, 2) * self.scale

    def region_mask(self, features):
        """Which of the regions (B, L, D) are real: bool (B, L), or None where all are.

        The padding of given features is all zero.
        """
        return features.ne(0).any(dim=-1) if self.given else None

    def check_inputs(self, inputs):
        """Raise a UserError unless `inputs` are what this encoder is made for.

        That is images (B, 3, S, S), or for given features (B, L, D) with a real region each.
        """
        shape = tuple(inputs.shape)
        if not self.given:
            size = self.image_size
            if len(shape) != 4 or shape[1:] != (3, size, size):
                raise UserError(
                    f"the encoder {self.name} wants images of shape (B, 3, {size}, {size}), "
                    f"not {shape}"
                )
            return
        if len(shape) != 3 or shape[2] != self.out_channels:
            raise UserError(
                f"the encoder {self.name} wants features of shape (B, L, {self.out_channels}), "
                f"not {shape}"
            )
        self.check_regions(inputs)

    def check_regions(self, features):
        """Raise a UserError if an image of the features (B, L, D) has no real region."""
        mask = self.region_mask(features)
        if mask is not None and not mask.any(dim=1).all():
            raise UserError("an image has no region: its features are all zero")

    def folded(self):
        """This encoder in eval mode, with every batch-norm merged into its convolution.

        LRP needs it in this form. It is kept until the weights change. A change through `.data` is
        not noticed.
        """
        if not any(isinstance(module, nn.BatchNorm2d) for module in self.net.modules()):
            return eval_view(self)
        state = self._state_of_weights()
        kept = self._folded  # read once, for another thread may replace it
        if kept is None or kept[0] != state:
            folded = copy.copy(self)
            folded.training = False
            folded._modules = {"net": fold_batch_norm(copy.deepcopy(self.net).eval())}
            folded._folded = None
            kept = (state, folded)
            self._folded = kept
        return kept[1]

    def _state_of_weights(self):
        """Something that changes whenever a weight or a statistic is written to or replaced."""
        tensors = [
            (part.data_ptr(), part._version) for part in self.state_dict(keep_vars=True).values()
        ]
        trained = any(parameter.requires_grad for parameter in self.parameters())
        return tensors, _optimizer_steps if trained else None

    def weights_hash(self):
        """16 hex digits that tell this encoder from any other.

        They are of the SHA-256 of its name, scale and float32 state dict.
        """
        digest = hashlib.sha256(f"{self.name} {self.scale}".encode())
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]


_optimizer_steps = 0  # of all optimizers of this process


def _count_optimizer_step(*_):
    global _optimizer_steps
    _optimizer_steps += 1


# A fused optimizer writes to parameters without raising their version.
register_optimizer_step_post_hook(_count_optimizer_step)


def eval_view(module):
    """A module in eval mode that shares the parameters and buffers of `module`.

    It is `module` itself if that is in eval mode already, else a copy of the tree of modules, which
    costs little. The mode of `module` is not touched, for another thread may be using it.
    """
    if not any(child.training for child in module.modules()):
        return module
    view = copy.copy(module)
    view.training = False
    view._modules = {}
    for name, child in module._modules.items():
        view._modules[name] = None if child is None else eval_view(child)
    return view


def fold_batch_norm(module):
    """Merge every batch-norm into the convolution before it among its parent's children, in place.

    Returns the module.
    """
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

    weights: None for torchvision's ImageNet weights (random ones for an encoder that has none),
    "random", or the file of a state dict: of torchvision's whole network, of an Encoder, or of a
    captioner. UserError for an unknown name, or weights that cannot be had.
    """
    if name not in ENCODERS:
        raise UserError(f"there is no encoder '{name}'; choose from {', '.join(ENCODERS)}")
    encoder = Encoder(name)
    if has_learnt(name, weights):
        pretrained = ENCODERS[name].pretrained
        state = _download(pretrained) if weights is None else _read_state_dict(weights)
        _load_weights(encoder.net, state, weights or f"torchvision's {pretrained}")
        if pretrained == "inception_v3" and _is_torchvision_inception(state):
            _fold_input_transform(encoder.net.Conv2d_1a_3x3)
    return encoder.eval().requires_grad_(False)


def has_learnt(name, weights):
    """Whether `build_encoder(name, weights)` finds weights rather than draws random ones."""
    if weights is None:
        return ENCODERS[name].pretrained is not None
    return weights != "random"


def _download(pretrained):
    weights_class = torchvision.models.get_model_weights(pretrained).__name__
    try:
        weights = torchvision.models.get_weight(f"{weights_class}.IMAGENET1K_V1")
        return weights.get_state_dict(progress=True)
    except (URLError, OSError) as error:
        raise UserError(
            f"the ImageNet weights of {pretrained} could not be downloaded ({error}); "
            "give a file as encoder_weights, or 'random'"
        ) from None


def _read_state_dict(path):
    if not Path(path).is_file():
        raise UserError(
            f"there is no file {path}; encoder_weights is the file of a state dict that torch.save "
            "wrote, or 'random'"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        return loaded.get("state_dict", loaded)  # a captioner's checkpoint holds more
    except Exception:  # torch.load raises many kinds for a file that is not a state dict
        raise UserError(f"{path} is not a PyTorch state dict") from None


def _load_weights(net, state_dict, source):
    """Load a state dict of torchvision's network, an Encoder or a captioner into `net`.

    UserError if it is of another network.
    """
    prefixes = re.compile(r"^(features\.|(encoder\.)?net\.)")
    available = {prefixes.sub("", key): value for key, value in state_dict.items()}
    try:
        wanted = {}
        for key in net.state_dict():
            if key in available or "num_batches" not in key:  # old files lack these counts
                wanted[key] = available[key]
        net.load_state_dict(wanted, strict=False)
    except (KeyError, RuntimeError):
        raise UserError(f"{source} does not hold the weights of this encoder") from None


def _is_torchvision_inception(state_dict):
    """Whether this is torchvision's own whole Inception-v3, which wants other pixels than ours."""
    return {"fc.weight", "Conv2d_1a_3x3.conv.weight"} <= state_dict.keys()


@torch.no_grad()
def _fold_input_transform(stem):
    """Let torchvision's Inception-v3, which wants pixels in -1..1, take ImageNet-normalised ones.

    Its first convolution has no padding, so it can take the transform in: for each colour
    x' = x std / 0.5 + (mean - 0.5) / 0.5. The constant part moves the batch-norm's running mean.
    """
    mean = stem.conv.weight.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = stem.conv.weight.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    stem.bn.running_mean -= (stem.conv.weight * (mean - 0.5) / 0.5).sum((1, 2, 3))
    stem.conv.weight *= std / 0.5
