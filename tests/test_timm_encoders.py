"""timm's networks as encoders: their features, LRP against the slow oracle, and what is refused."""

import oracle_models
import pytest
import torch
from agreement import graph as torchvision_graph
from helpers import calibrate, random_captioner, relative_difference
from torch import nn

from captioner import load_captioner
from commandline import UserError
from encoder import build_encoder, encoder_spec
from explanation import METHODS
from images import IMAGENET_MEAN, IMAGENET_STD

timm = pytest.importorskip("timm")
from timm.layers import Conv2dSame  # noqa: E402 (only where there is timm)
from timm.models._efficientnet_blocks import (  # noqa: E402
    DepthwiseSeparableConv,
    InvertedResidual,
)
from timm.models.resnet import BasicBlock, Bottleneck  # noqa: E402

# The first layers of each, as many as the slow oracle explains in a few seconds. Together they
# have all that the whole networks are made of: grouped, strided and TensorFlow-padded convolutions,
# ReLU6 below and at its limit, residual sums, max-pooling.
EXPLAINED = {
    "tf_efficientnet_lite0": lambda model: (model.conv_stem, model.bn1, *model.blocks[:2]),
    "mobilenetv2_050": lambda model: (model.conv_stem, model.bn1, *model.blocks[:3]),
    "resnet18": lambda model: (model.conv1, model.bn1, model.act1, model.maxpool, *model.layer1),
    "resnet26": lambda model: (model.conv1, model.bn1, model.act1, model.maxpool, *model.layer1),
    "vgg11": lambda model: tuple(model.features[:8]),
}
SIZE = 32  # pixels


def sequence(*modules):
    """Modules one after the other."""
    nodes = [node_of(module) for module in modules]
    return ("sequence", [node for node in nodes if node is not None])


def node_of(module):
    """One module of a folded network as the oracle's node."""
    match module:
        case nn.Sequential():
            return sequence(*module)
        case InvertedResidual():
            parts = (module.conv_pw, module.bn1, module.conv_dw, module.bn2)
            main = sequence(*parts, module.conv_pwl, module.bn3)
            return ("residual", main, sequence()) if module.has_skip else main
        case DepthwiseSeparableConv():
            main = sequence(module.conv_dw, module.bn1, module.conv_pw, module.bn2)
            return ("residual", main, sequence()) if module.has_skip else main
        case BasicBlock():
            main = sequence(module.conv1, module.bn1, module.act1, module.conv2, module.bn2)
            shortcut = sequence(*(module.downsample or []))
            return sequence_of(("residual", main, shortcut), module.act2)
        case Bottleneck():
            parts = (module.conv1, module.bn1, module.act1, module.conv2, module.bn2, module.act2)
            main = sequence(*parts, module.conv3, module.bn3)
            shortcut = sequence(*(module.downsample or []))
            return sequence_of(("residual", main, shortcut), module.act3)
    return simple_node(module)


def sequence_of(node, module):
    """A node, and a module behind it."""
    return ("sequence", [node, node_of(module)])


def simple_node(module):
    """A module without parts as the oracle's node."""
    match module:
        case Conv2dSame():
            weight = module.weight.detach().numpy()
            return ("same_conv", weight, bias_of(module), module.stride, module.groups)
        case nn.Conv2d():
            weight = module.weight.detach().numpy()
            geometry = (module.stride, module.padding, module.groups)
            return ("grouped_conv", weight, bias_of(module), *geometry)
        case nn.ReLU6():
            return ("relu6",)
    return torchvision_graph(module)


def bias_of(module):
    """A convolution's bias as an array, or None."""
    return None if module.bias is None else module.bias.detach().numpy()


def spread_batch_norms(encoder):
    """Give the batch-norms statistics, weights and biases that are not trivial, and use them."""
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 1.5)
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.02, 0.2)


def colours(values):
    """Three numbers as (3, 1, 1) in float64."""
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


def random_encoder(name):
    """A float64 encoder whose batch-norms do something."""
    torch.manual_seed(0x717)
    encoder = build_encoder(name, "random").double()
    spread_batch_norms(encoder)
    return encoder


@pytest.mark.parametrize("network", EXPLAINED)
def test_lrp_of_timms_networks_equals_the_oracle(network):
    encoder = random_encoder(f"timm/{network}:{SIZE}")
    encoder.check_lrp_rules()
    layers = nn.Sequential(*EXPLAINED[network](encoder.folded().net.model))
    pixels = 2 * torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64)
    pixels.requires_grad_()
    with METHODS["lrp"].encoder():
        maps = layers(pixels)
    relevance = torch.randn_like(maps) * (maps > 0)
    carried = torch.where(maps > 0, relevance / maps, 0).detach()
    (c,) = torch.autograd.grad(maps, pixels, carried)
    ours = (pixels * c)[0].detach()
    node = sequence(*layers)
    expected = oracle_models.graph_lrp(node, pixels[0].detach().numpy(), relevance[0].numpy())
    assert relative_difference(ours, expected) < 1e-9


@pytest.mark.parametrize("network", ["tf_efficientnet_lite0", "resnet18"])
def test_regions_are_timms_features_of_timms_pixels(network):
    torch.manual_seed(0x717)
    encoder = build_encoder(f"timm/{network}:64", "random").double()
    calibrate(encoder)
    model = timm.create_model(network, pretrained=False).double().eval()
    weights = {**model.state_dict(), **encoder.net.model.state_dict()}
    model.load_state_dict(weights)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    config = model.pretrained_cfg
    plain = images * colours(IMAGENET_STD) + colours(IMAGENET_MEAN)  # in 0..1
    own = (plain - colours(config["mean"])) / colours(config["std"])
    with torch.no_grad():
        expected = model.forward_features(own).flatten(2).transpose(1, 2)
        assert relative_difference(encoder(images), expected) < 1e-9
        assert relative_difference(encoder.folded()(images), expected) < 1e-9


@pytest.mark.parametrize(
    "network, reason",
    [
        ("vit_tiny_patch16_224", "LRP has no rule for LayerNorm"),
        ("efficientnet_b0:64", "LRP has no rule for SiLU"),
        ("densenet121:64", "LRP has no rule for BatchNormAct2d"),
    ],
)
def test_what_lrp_has_no_rule_for_is_refused_by_name_and_still_explained(network, reason):
    torch.manual_seed(1)
    captioner = random_captioner(f"timm/{network}").float()
    size = captioner.encoder.image_size
    images = torch.randn(1, 3, size, size)
    with pytest.raises(UserError, match=f"{reason} .* of the encoder timm/{network}"):
        captioner.explain(images, [["w1"]])
    explanation = captioner.explain(images, [["w1", "w2"]], "gradcam")[0]
    assert explanation.image_relevance.shape == (2, size, size)
    assert captioner.caption(images, max_length=3)


def test_guided_backpropagation_knows_relu6():
    x = torch.tensor([-1.0, 2.0, 5.0, 7.0], requires_grad=True)
    with METHODS["guided_backprop"].encoder():
        y = nn.ReLU6()(x)
    (found,) = torch.autograd.grad(y, x, torch.tensor([1.0, 1.0, -1.0, 1.0]))
    assert y.tolist() == [0, 2, 5, 6]
    assert found.tolist() == [0, 1, 0, 0]


def test_a_captioner_on_timms_features_is_saved_and_loaded(tmp_path):
    captioner = random_captioner("timm/tf_efficientnet_lite0:64").float()
    captioner.half().save(tmp_path / "it.pt")
    loaded = load_captioner(tmp_path / "it.pt")
    images = torch.randn(2, 3, 64, 64)
    assert loaded.config.encoder == "timm/tf_efficientnet_lite0:64"
    assert loaded.fc.weight.dtype == torch.float32
    assert loaded.caption(images) == captioner.float().caption(images)


def test_weights_are_read_from_a_file_in_timms_layout(tmp_path):
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    torch.save({key: value.half() for key, value in model.state_dict().items()}, tmp_path / "w.pth")
    encoder = build_encoder("timm/tf_efficientnet_lite0", tmp_path / "w.pth")
    expected = model.conv_head.weight.half().float()
    assert torch.equal(encoder.net.model.conv_head.weight, expected)
    with pytest.raises(UserError, match="does not hold the weights of this encoder"):
        build_encoder("timm/resnet18", tmp_path / "w.pth")


@pytest.mark.parametrize(
    "name, message",
    [
        ("timm/parrot", "timm has no network 'parrot'"),
        ("timm/resnet18:large", "'large' in timm/resnet18:large is not an image size"),
        ("parrot", "there is no encoder 'parrot'; choose from .*, or timm/NAME"),
    ],
)
def test_an_unknown_network_is_named(name, message):
    with pytest.raises(UserError, match=message):
        encoder_spec(name)
