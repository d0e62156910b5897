"""Image encoders: an image becomes a grid of region features A (L, D), where a_i is the feature
vector of region i (paper §3.1).

    encoder = build_encoder("vgg16")                          # downloads torchvision's weights once
    encoder = build_encoder("squeezenet1_1", "weights.pth")   # a local state dict
    encoder = build_encoder("timm/tf_efficientnet_lite2")     # any of timm's networks
    features = encoder(images)                                # (B, 3, 224, 224) -> (B, L, D)

Images are ImageNet-normalised (images.py).
"""

import copy
import functools
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
from images import IMAGENET_MEAN, IMAGENET_STD, renormalized

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
    mean, std     of the three colours, as the network wants its pixels normalised
    """

    layers: Callable
    pretrained: str | None
    out_channels: int
    image_size: int | None
    grid: tuple
    scale: float = 1.0
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD


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


TIMM = "timm/"  # begins the names of timm's networks: timm/NAME or timm/NAME:SIZE


def encoder_spec(name):
    """The EncoderSpec of a row of ENCODERS, or of one of timm's networks.

    name: as ENCODERS has it, or timm/NAME for a network of timm, at its own image size, or
    timm/NAME:SIZE at another. UserError if there is no such encoder.
    """
    if name.startswith(TIMM):
        return timm_spec(name)
    if name not in ENCODERS:
        known = ", ".join(ENCODERS)
        raise UserError(f"there is no encoder '{name}'; choose from {known}, or timm/NAME")
    return ENCODERS[name]


@functools.cache
def timm_spec(name):
    """The EncoderSpec of timm's network called timm/NAME or timm/NAME:SIZE."""
    try:
        import timm
    except ImportError:
        raise UserError("timm's networks need the package timm; pip install timm") from None
    network_name, _, size = name.removeprefix(TIMM).partition(":")
    if not timm.is_model(network_name):
        raise UserError(f"timm has no network '{network_name}'; see timm.list_models()")
    if size and not size.isdigit():
        raise UserError(f"'{size}' in {name} is not an image size in pixels")
    with torch.device("meta"):  # shapes only
        network = timm.create_model(network_name, pretrained=False, num_classes=0)
    defaults = network.pretrained_cfg
    image_size = int(size) if size else defaults["input_size"][-1]
    layers = functools.partial(TimmFeatures, network_name, image_size)
    with torch.device("meta"):
        maps = layers().eval()(torch.zeros(1, 3, image_size, image_size))
    return EncoderSpec(
        layers,
        network_name,
        out_channels=maps.shape[1],
        image_size=image_size,
        grid=tuple(maps.shape[2:]),
        mean=tuple(defaults["mean"]),
        std=tuple(defaults["std"]),
    )


class TimmFeatures(nn.Module):
    """The features of one of timm's networks as a map: (B, 3, S, S) -> (B, D, h, w).

    What the network has for classifying only is left out. The weights are random.
    """

    def __init__(self, network_name, image_size):
        super().__init__()
        import timm

        options = {"pretrained": False, "num_classes": 0}
        default_size = timm.get_pretrained_cfg(network_name).input_size[-1]
        if image_size != default_size and timm.get_pretrained_cfg(network_name).fixed_input_size:
            options["img_size"] = image_size
        self.model = timm.create_model(network_name, **options)
        self.model.global_pool = nn.Identity()
        for head in ("head", "pre_logits", "fc_norm"):
            if isinstance(getattr(self.model, head, None), nn.Module):
                setattr(self.model, head, nn.Identity())

    def forward(self, images):
        """images (B, 3, S, S) -> features (B, D, h, w); tokens are laid out as a square."""
        features = self.model.forward_features(images)
        if features.dim() == 3:  # tokens (B, N, D), some of which stand for the whole image
            tokens = features[:, getattr(self.model, "num_prefix_tokens", 0) :]
            side = round(tokens.shape[1] ** 0.5)
            return tokens.transpose(1, 2).unflatten(2, (side, side))
        if features.shape[-1] == self.model.num_features != features.shape[1]:
            return features.permute(0, 3, 1, 2)
        return features


class Encoder(nn.Module):
    """A network whose last feature map is read as L = h * w region features.

    name: as `encoder_spec` has it. Its weights are random; `build_encoder` loads some.
    """

    def __init__(self, name):
        super().__init__()
        spec = encoder_spec(name)
        self.name = name
        self.out_channels = spec.out_channels
        self.image_size = spec.image_size
        self.grid = spec.grid
        self.scale = spec.scale
        self.mean = spec.mean
        self.std = spec.std
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
        return self.regions(self.own_pixels(images))

    def own_pixels(self, images):
        """Images (B, 3, S, S), ImageNet-normalised -> normalised as the network wants them.

        Given features are returned as they are.
        """
        return images if self.given else renormalized(images, self.mean, self.std)

    def regions(self, pixels):
        """What `own_pixels` returns -> region features (B, L, D)."""
        if self.given:
            return pixels
        maps = self.net(pixels)  # (B, D, h, w)
        return maps.flatten(2).transpose(1, 2) * self.scale

    def region_mask(self, features):
        """Which of the regions (B, L, D) are real: bool (B, L), or None where all are.

        The padding of given features is all zero.
        """
        return features.ne(0).any(dim=-1) if self.given else None

    def check_inputs(self, inputs):
        """Raise a UserError unless `inputs` are what this encoder is made for.

        That is a float tensor without NaN and infinity: images (B, 3, S, S), or for given features
        (B, L, D) with a real region each.
        """
        if not isinstance(inputs, torch.Tensor):
            raise UserError(f"{self._wanted()}, not a {type(inputs).__name__}")
        if not inputs.is_floating_point():
            raise UserError(f"{self._wanted()}, not {inputs.dtype}")
        shape = tuple(inputs.shape)
        if self.given:
            fits = len(shape) == 3 and shape[2] == self.out_channels
        else:
            fits = len(shape) == 4 and shape[1:] == (3, self.image_size, self.image_size)
        if not fits:
            raise UserError(f"{self._wanted()}, not {shape}")
        if not inputs.isfinite().all():
            raise UserError("an image holds a value that is no finite number (NaN or infinity)")
        self.check_regions(inputs)

    def _wanted(self):
        """What the inputs have to be, in words."""
        if self.given:
            inputs = f"features of shape (B, L, {self.out_channels})"
        else:
            inputs = f"images of shape (B, 3, {self.image_size}, {self.image_size})"
        return f"the encoder {self.name} wants {inputs} as a float tensor"

    def check_regions(self, features):
        """Raise a UserError if an image of the features (B, L, D) has no real region."""
        mask = self.region_mask(features)
        if mask is not None and not mask.any(dim=1).all():
            raise UserError("an image has no region: its features are all zero")

    @torch.inference_mode(False)  # weights that are made in inference mode have no gradients
    def folded(self):
        """This encoder in eval mode, with every batch-norm merged into the convolution before it.

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
            if self.name.startswith(TIMM) and not self._computes_the_same(folded):
                folded = eval_view(self)
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

    @torch.no_grad()
    def _computes_the_same(self, other):
        """Whether another encoder has the same features, of an image of noise.

        A folded one has, if its batch-norms did follow the convolutions that they were merged into,
        as they do in most networks. It is found out on the CPU: a GPU may multiply in TF32, whose
        error would be taken for a difference.
        """
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, 3, self.image_size, self.image_size, generator=generator)
        pixels = pixels.to(next(self.parameters()).dtype)
        expected = eval_view(_on_cpu(self)).regions(pixels)
        regions = eval_view(_on_cpu(other)).regions(pixels)
        if regions.shape != expected.shape:
            return False
        difference = (regions - expected).abs().max()
        return bool(difference <= 1e-3 * expected.abs().max())

    def check_lrp_rules(self):
        """Raise a UserError if LRP has no rule for something in the network."""
        if self.given:
            return
        for name, module in self.folded().net.named_modules():
            whole = next(module.children(), None) is None or isinstance(module, BatchNorm)
            if whole and not isinstance(module, LRP_MODULES):
                kind = type(module).__name__
                raise UserError(
                    f"LRP has no rule for {kind} ({name}) of the encoder {self.name}; "
                    "the gradient methods explain it"
                )

    def weights_hash(self):
        """16 hex digits that tell this encoder from any other.

        They are of the SHA-256 of its name, scale and float32 state dict.
        """
        return _hash_of_weights(f"{self.name} {self.scale}", self.state_dict())


class CutEncoder:
    """An encoder that is cut into two: the parts before a stage, and those from it on.

    The outputs of frozen first parts are computed once and cached; the last parts are trained on
    them, which costs a fraction of training from images. The modules are those of the encoder.

    stage: the name of a part as `stages` lists it. UserError if there is no such part, or nothing
    before it, or if the network is more than a chain of parts.
    """

    def __init__(self, encoder, stage):
        self.encoder = encoder
        self.stage = stage
        parts = stages(encoder)
        require_stage(encoder, parts, stage)
        first = list(parts).index(stage)
        self.before = nn.Sequential(*list(parts.values())[:first])
        self.after = nn.Sequential(*list(parts.values())[first:])

    def shape(self):
        """(L', D') of what the stage is given of an image."""
        size = self.encoder.image_size
        weight = next(self.encoder.parameters())
        with torch.no_grad():
            return tuple(self.begin(weight.new_zeros(1, 3, size, size)).shape[1:])

    def begin(self, images):
        """Images (B, 3, S, S), ImageNet-normalised -> what the stage is given, (B, L', D')."""
        maps = self.before(self.encoder.own_pixels(images))
        return maps.flatten(2).transpose(1, 2)

    def finish(self, rows):
        """What `begin` returns -> the region features of the encoder, (B, L, D)."""
        side = round(rows.shape[1] ** 0.5)  # images are square, so maps are, too
        maps = rows.transpose(1, 2).unflatten(2, (side, side))
        maps = self.after(maps.contiguous(memory_format=torch.channels_last))
        return maps.flatten(2).transpose(1, 2) * self.encoder.scale

    def weights_hash(self):
        """16 hex digits that tell the parts before the stage from any other encoder's."""
        name = f"{self.encoder.name} before {self.stage}"
        return _hash_of_weights(name, self.before.state_dict())


def stages(encoder):
    """The parts that an encoder's network runs one after the other: {name: module}, in order.

    UserError for a network that is more than such a chain, and for given features.
    """
    parts = OrderedDict()
    if not encoder.given:
        network = encoder.net.model if encoder.name.startswith(TIMM) else encoder.net
        parts.update(_chain(network))
    if not parts or not _is_chain(encoder, parts):
        raise UserError(f"the encoder {encoder.name} is no chain of stages, so it cannot be cut")
    return parts


def require_stage(encoder, parts, stage):
    """Raise a UserError unless an encoder has such a stage, and something before it.

    parts: what `stages` returns of the encoder.
    """
    names = list(parts)[1:]
    if stage not in names:
        known = ", ".join(names)
        raise UserError(
            f"the encoder {encoder.name} cannot be cut at '{stage}'; choose from {known}"
        )


def _is_chain(encoder, parts):
    """Whether an encoder has the same features if these parts run one after the other."""
    chained = copy.copy(encoder)
    chained._modules = {"net": nn.Sequential(*parts.values())}
    try:
        return encoder._computes_the_same(chained)
    except (RuntimeError, IndexError):  # shapes that do not fit
        return False


def _chain(network, prefix=""):
    """The children of a network and, of every nn.Sequential among them, its children: pairs of name
    and module."""
    for name, child in network.named_children():
        if isinstance(child, nn.Sequential):
            yield from _chain(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _hash_of_weights(name, state_dict):
    """16 hex digits of the SHA-256 of a name and a float32 state dict."""
    digest = hashlib.sha256(name.encode())
    for key, value in sorted(state_dict.items()):
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


# What LRP has rules for, or needs none for, in a network whose batch-norms are merged. (What is
# called as a function instead of a module is not seen here.)
BatchNorm = nn.modules.batchnorm._BatchNorm
LRP_MODULES = (
    nn.Conv2d,
    nn.ReLU,
    nn.ReLU6,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Dropout,
    nn.Identity,
)


def _on_cpu(encoder):
    """An encoder, or a copy of it on the CPU."""
    if next(encoder.parameters()).device.type == "cpu":
        return encoder
    return copy.deepcopy(encoder).cpu()


def fold_batch_norm(module):
    """Merge every batch-norm into the convolution before it among its parent's children, in place.

    What timm's batch-norms do besides, the activation, stays in their place. A batch-norm that
    stands behind something else than a convolution of its size is left as it is. Returns the
    module.
    """
    before = None
    for name, child in list(module.named_children()):
        convolution = module._modules.get(before)
        if (
            isinstance(child, nn.BatchNorm2d)
            and isinstance(convolution, nn.Conv2d)
            and convolution.out_channels == child.num_features
        ):
            module._modules[before] = fuse_conv_bn_eval(convolution, child)
            module._modules[name] = getattr(child, "act", nn.Identity())
        else:
            fold_batch_norm(child)
        before = name
    return module


def build_encoder(name, weights=None):
    """The encoder called `name`, in eval mode and frozen.

    name: as `encoder_spec` has it; weights: None for torchvision's or timm's ImageNet weights
    (random ones for an encoder that has none), "random", or the file of a state dict: of
    torchvision's or timm's whole network, of an Encoder, or of a captioner. UserError for an
    unknown name, or weights that cannot be had.
    """
    encoder = Encoder(name)
    if has_learnt(name, weights):
        pretrained = encoder_spec(name).pretrained
        if weights is not None:
            state = _read_state_dict(weights)
        elif name.startswith(TIMM):
            state = _download_timm(pretrained)
        else:
            state = _download(pretrained)
        _load_weights(encoder.net, state, weights or f"the published {pretrained}")
        if pretrained == "inception_v3" and _is_torchvision_inception(state):
            _fold_input_transform(encoder.net.Conv2d_1a_3x3)
    return encoder.eval().requires_grad_(False)


def has_learnt(name, weights):
    """Whether `build_encoder(name, weights)` finds weights rather than draws random ones."""
    if weights is None:
        return encoder_spec(name).pretrained is not None
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


def _download_timm(network_name):
    import timm

    try:
        return timm.create_model(network_name, pretrained=True).state_dict()
    except Exception as error:  # the hub's client raises many kinds where there is no network
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"timm could not load the weights of {network_name} ({reason}); "
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
    prefixes = re.compile(r"^((encoder\.)?net\.)?(features\.|model\.)?")
    available = {prefixes.sub("", key): value for key, value in state_dict.items()}
    try:
        wanted = {}
        for key in net.state_dict():
            bare = prefixes.sub("", key)
            if bare in available or "num_batches" not in key:  # old files lack these counts
                wanted[key] = available[bare]
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
