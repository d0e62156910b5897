"""Bottom-up region features: from the original's HDF5 files to a captioner, and to relevance of
boxes. They are padded and masked.
"""

import sys

import h5py
import numpy as np
import pytest
import torch
from fixtures import prepared_scenes
from helpers import random_captioner, relative_difference
from oracle_models import adaptive_lrp, aoa_lrp, gridtd_lrp, soft_lrp
from PIL import Image

import explain
import preparedataset
import train
from captiondata import CaptionDataset, load_regions
from captioner import load_captioner
from commandline import UserError
from encoder import build_encoder
from explanation import methods_of
from plots import paint_boxes

ORACLES = {"adaptive": adaptive_lrp, "gridtd": gridtd_lrp, "aoa": aoa_lrp, "soft": soft_lrp}


def write_regions(path, count, size=128, seed=0):
    generator = np.random.default_rng([seed, count])
    corners = np.sort(generator.uniform(0, size, (count, 2, 2)), axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image_features"] = generator.exponential(0.5, (count, 2048)).astype(np.float32)
        file["image_boxes"] = corners.reshape(count, 4).astype(np.float32)
    return path


@pytest.mark.parametrize("model_type", ORACLES)
def test_lrp_of_padded_regions_equals_the_oracle_without_them(model_type):
    captioner = random_captioner("bottom_up", model_type=model_type)
    features = torch.rand(2, 36, 2048, dtype=torch.float64)
    features[0, 20:] = 0
    captions = [[3, 7, 12], [9, 1]]
    parameters = {name: value.numpy() for name, value in captioner.state_dict().items()}
    heads = {"heads": 4} if model_type == "aoa" else {}
    found = captioner.explain(features, [captioner.vocabulary.decode(ids) for ids in captions])
    for row, ours, ids in zip(features.numpy(), found, captions):
        mask = row.any(axis=1)
        inputs = [captioner.vocabulary.start, *ids[:-1]]
        oracle = ORACLES[model_type]
        regions, words, scores = oracle(parameters, row, inputs, ids, mask=mask, **heads)
        assert relative_difference(ours.scores, scores) < 1e-9
        assert relative_difference(ours.region_relevance, regions.sum(-1)) < 1e-9
        assert relative_difference(ours.word_relevance, words) < 1e-9
        assert ours.image_relevance is None
        assert not ours.region_relevance[:, ~mask].any()
        assert not ours.attention[..., ~mask].any()


@pytest.mark.parametrize("model_type", ORACLES)
def test_padding_changes_no_explanation_and_no_caption(model_type):
    captioner = random_captioner("bottom_up", model_type=model_type)
    features = torch.rand(1, 20, 2048, dtype=torch.float64)
    padded = torch.cat([features, torch.zeros(1, 16, 2048, dtype=torch.float64)], dim=1)
    assert captioner.caption(features) == captioner.caption(padded)
    # A gradient may well be there where no feature is.
    zero_where_no_feature_is = ("lrp", "attnlrp", "attention", "input_x_gradient")
    for method in methods_of(captioner):
        plain = captioner.explain(features, [["w1", "w2"]], method)[0]
        more = captioner.explain(padded, [["w1", "w2"]], method)[0]
        torch.testing.assert_close(more.word_relevance, plain.word_relevance)
        if method in zero_where_no_feature_is:
            torch.testing.assert_close(more.region_relevance[:, :20], plain.region_relevance)


@pytest.mark.parametrize("method", ["guided_backprop", "guided_gradcam"])
def test_guided_methods_are_refused_without_pixels(method):
    captioner = random_captioner("bottom_up")
    with pytest.raises(UserError, match="bottom-up features come without them"):
        captioner.explain(torch.rand(1, 20, 2048), [["w1", "w2"]], method)


def test_an_image_without_a_region_is_refused():
    captioner = random_captioner("bottom_up")
    features = torch.rand(2, 20, 2048)
    features[1] = 0
    for call in (captioner.explain, captioner.decode):
        with pytest.raises(UserError, match="an image has no region"):
            call(features)


def test_from_files_to_an_explained_photograph(tmp_path, monkeypatch, capsys):
    def command(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, arguments)])
        module.main()

    folder = prepared_scenes(tmp_path / "scenes", 12, 4, 4)
    regions = tmp_path / "regions"
    for split in ("train", "val", "test"):
        dataset = CaptionDataset(folder, split)
        for index, entry in enumerate(dataset.entries):
            write_regions(regions / split / f"{entry['file'].rpartition('/')[2]}.hdf5", 10 + index)
    encoder = build_encoder("bottom_up")
    preparedataset.cache_features(folder, encoder, workers=0, regions=regions)
    row, _, _ = CaptionDataset(folder, "train", features="bottom_up")[0]
    assert row.shape == (36, 2048) and row[:10].any() and not row[10:].any()
    small = "--encoder bottom_up --embed_dim 8 --hidden_dim 16 --workers 0 --epochs 1".split()
    small += ["--pretrain_epochs", 0, "--output", tmp_path / "it.pt"]
    command(train, "--dataset", folder, *small)
    photograph = folder / dataset.entries[0]["file"]
    given = ["--regions", next((regions / "test").iterdir()), "--output", tmp_path / "out"]
    caption = ["--caption", "there is a"]
    command(explain, photograph, "--checkpoint", tmp_path / "it.pt", *caption, *given)
    maps = np.load(next((tmp_path / "out").glob("*.npz")))
    assert maps["image_relevance"].shape == (3, 128, 128)
    assert Image.open(next((tmp_path / "out").glob("*.png"))).size[0] > 300
    assert load_captioner(tmp_path / "it.pt").encoder.given
    with pytest.raises(UserError, match="--regions with one HDF5 file for each image"):
        command(explain, photograph, "--checkpoint", tmp_path / "it.pt")


def test_files_that_hold_no_regions_are_named(tmp_path):
    features, boxes = load_regions(write_regions(tmp_path / "good.hdf5", 7))
    assert features.shape == (36, 2048) and boxes.shape == (7, 4) and not features[7:].any()
    (tmp_path / "text.hdf5").write_text("no")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["something"] = [1]
    write_regions(tmp_path / "many.hdf5", 40)
    messages = {
        "missing": "there is no file",
        "text": "does not hold",
        "other": "does not hold",
        "many": "expected 1 to 36 regions",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            load_regions(tmp_path / f"{name}.hdf5")


def test_boxes_are_painted_evenly_and_add_up():
    relevance = torch.tensor([[4.0, -2.0, 9.0]])
    boxes = torch.tensor([[0, 0, 2, 2], [1, 1, 2, 3]])
    maps = paint_boxes(relevance, boxes, (3, 4))
    assert maps[0].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, -1, 0, 0]]
    assert maps.sum() == 2  # the third region is padding
