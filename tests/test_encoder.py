"""Encoders: torchvision's networks read as regions; batch-norm folded without changing features."""

from pathlib import Path

import pytest
import torch
import torchvision
from helpers import calibrate

import encoder as encoders
from commandline import UserError
from encoder import ENCODERS, CutEncoder, build_encoder
from images import image_transform, load_image

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
WEIGHTS = {
    "squeezenet1_1": "squeezenet1_1-imagenet.pth",
    "inception_v3": "inception_v3-imagenet-to-Mixed_7a-fp16.pth",
}


def shared_weights(name):
    path = SHARED / "weights" / WEIGHTS[name]
    if not path.exists():
        pytest.skip(f"ImageNet weights of {name} are not in ../shared/weights")
    return path


def photographs(size, count=8):
    paths = sorted((SHARED / "data/coco2017/val2017").glob("*.jpg"))[:count]
    if not paths:
        pytest.skip("no photographs in ../shared/data/coco2017/val2017")
    return torch.stack([image_transform(size)(load_image(path)) for path in paths])


@pytest.mark.parametrize("name", ENCODERS)
def test_the_features_are_as_the_table_says(name):
    encoder = build_encoder(name, "random")
    spec = ENCODERS[name]
    if encoder.given:
        features = encoder(torch.rand(1, 36, 2048))
    else:
        features = encoder(torch.zeros(1, 3, spec.image_size, spec.image_size))
    assert features.shape == (1, spec.grid[0] * spec.grid[1], spec.out_channels)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_regions_are_counted_row_by_row():
    encoder = build_encoder("scenes_vgg", "random")
    image = torch.zeros(1, 3, 128, 128)
    image[..., :16, 112:] = 3  # the upper right corner
    changed = (encoder(image) - encoder(torch.zeros_like(image))).abs().sum(-1).reshape(8, 8)
    assert changed[0, 7] > 0 and changed[:, :4].max() == 0 and changed[4:].max() == 0


@pytest.mark.parametrize("name", ["scenes_vgg", "resnet101", "inception_v3"])
def test_folding_batch_norm_keeps_the_features(name):
    torch.manual_seed(0xF01D)
    encoder = build_encoder(name, "random").double()
    calibrate(encoder)
    image = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    before = encoder.weights_hash()
    folded = encoder.folded()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(image), encoder(image), rtol=1e-9, atol=1e-9)
    assert encoder.weights_hash() == before


def test_squeezenet_is_torchvisions():
    path = shared_weights("squeezenet1_1")
    whole = torchvision.models.squeezenet1_1()
    whole.load_state_dict(torch.load(path, weights_only=True))
    encoder = build_encoder("squeezenet1_1", path)
    images = photographs(224)
    with torch.no_grad():
        maps = encoder(images).transpose(1, 2).unflatten(-1, encoder.grid) / encoder.scale
        ours = whole.eval().classifier(maps).flatten(1)
        theirs = whole(images)
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5


def test_inception_loads_and_tells_photographs_apart():
    encoder = build_encoder("inception_v3", shared_weights("inception_v3"))
    with torch.no_grad():
        features = encoder(photographs(299, 4))
    assert features.isfinite().all() and 0.2 < features.mean() < 3
    earlier = build_encoder("inception_v3_6e", shared_weights("inception_v3"))
    weights = [network.net.Mixed_6e.branch1x1.conv.weight for network in (earlier, encoder)]
    assert torch.equal(*weights)


def test_torchvisions_inception_takes_our_normalisation():
    network = torchvisions_inception().double()
    encoder = build_encoder("inception_v3", "random").double()
    weights = network.state_dict()
    encoder.net.load_state_dict({key: weights[key] for key in encoder.net.state_dict()})
    encoders._fold_input_transform(encoder.net.Conv2d_1a_3x3)
    assert_same_stem(encoder, network, rtol=1e-9, atol=1e-12)


def torchvisions_inception():
    """The whole network with random weights."""
    options = {"init_weights": False, "transform_input": True}
    return torchvision.models.inception_v3(weights=None, **options).eval()


def assert_same_stem(encoder, network, **tolerances):
    """Our first convolution on our pixels is torchvision's on its own."""
    image = torch.randn(1, 3, 139, 139, dtype=torch.float64)
    with torch.no_grad():
        ours = encoder.net.Conv2d_1a_3x3(image)
        theirs = network.Conv2d_1a_3x3(network._transform_input(image))
    torch.testing.assert_close(ours, theirs, **tolerances)


def test_a_file_of_torchvisions_inception_is_read_as_its_download(tmp_path, monkeypatch):
    """In our normalisation; a file of our own takes it already."""
    network = torchvisions_inception()
    torch.save(network.state_dict(), tmp_path / "torchvision.pth")
    monkeypatch.setattr(encoders, "_download", lambda name: network.state_dict())
    encoder = build_encoder("inception_v3", tmp_path / "torchvision.pth")
    downloaded = build_encoder("inception_v3")
    torch.save(encoder.state_dict(), tmp_path / "own.pth")
    own = build_encoder("inception_v3", tmp_path / "own.pth")
    assert encoder.weights_hash() == downloaded.weights_hash() == own.weights_hash()
    # The weights were rounded to float32 after the transform had been folded in.
    assert_same_stem(encoder.double(), network.double(), rtol=1e-5, atol=1e-6)


def test_the_hash_tells_weights_apart():
    torch.manual_seed(1)
    one = build_encoder("scenes_vgg", "random")
    other = build_encoder("scenes_vgg", "random")
    assert one.weights_hash() != other.weights_hash()
    other.load_state_dict(one.state_dict())
    assert one.weights_hash() == other.weights_hash()


def test_unknown_names_and_weights_of_others_are_refused(tmp_path):
    with pytest.raises(UserError, match="no encoder 'alexnet'"):
        build_encoder("alexnet")
    with pytest.raises(UserError, match="there is no file"):
        build_encoder("vgg16", tmp_path / "missing.pth")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="does not hold the weights"):
        build_encoder("vgg16", tmp_path / "wrong.pth")


@pytest.mark.parametrize(
    "name, stage",
    [
        ("scenes_vgg", "13"),
        ("squeezenet1_1", "7"),
        ("timm/resnet18:64", "layer2.1"),
        ("timm/tf_efficientnet_lite0:64", "blocks.6.0"),
    ],
)
def test_an_encoder_that_was_cut_has_the_same_features(name, stage):
    encoder = build_encoder(name, "random").double()
    calibrate(encoder)
    cut = CutEncoder(encoder, stage)
    size = encoder.image_size
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    rows = cut.begin(images)
    assert rows.shape[1] > 1 and rows.shape != encoder(images).shape
    torch.testing.assert_close(cut.finish(rows), encoder(images))


def test_the_last_stages_learn_as_those_of_the_whole_encoder():
    encoder = build_encoder("scenes_vgg", "random")
    encoder.requires_grad_(True)
    images = torch.randn(2, 3, 128, 128)
    cut = CutEncoder(encoder, "16")
    encoder(images).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    encoder.zero_grad(set_to_none=True)
    cut.finish(cut.begin(images).detach()).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if int(name.split(".")[1]) < 16:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_the_hash_of_the_first_stages_does_not_depend_on_the_last():
    encoder = build_encoder("scenes_vgg", "random")
    cut = CutEncoder(encoder, "13")
    before = cut.weights_hash()
    encoder.net[22].weight.data += 1
    assert cut.weights_hash() == before
    assert CutEncoder(encoder, "16").weights_hash() != before
    encoder.net[0].weight.data += 1
    assert cut.weights_hash() != before


@pytest.mark.parametrize(
    "name", ["bottom_up", "timm/vit_tiny_patch16_224", "timm/mobilenetv3_small_050:64"]
)
def test_what_is_no_chain_of_stages_cannot_be_cut(name):
    with pytest.raises(UserError, match=f"{name} is no chain of stages"):
        CutEncoder(build_encoder(name, "random"), "1")


@pytest.mark.parametrize("stage", ["0", "99", "blocks.1"])
def test_a_cut_is_made_between_two_stages(stage):
    with pytest.raises(UserError, match=f"cannot be cut at '{stage}'; choose from 1, 2, 3"):
        CutEncoder(build_encoder("scenes_vgg", "random"), stage)
