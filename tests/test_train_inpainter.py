"""Training the generative inpainter: holes, resuming, and what is measured of inpainters."""

import json

import numpy as np
import pytest
import torch
from fixtures import command, prepared_scenes
from scipy.linalg import sqrtm
from skimage.metrics import structural_similarity

import inpainting
import train_inpainter
from commandline import UserError
from gatedconv import Inpainter, save_inpainter
from holes import random_holes
from inpainting import load_inpainter, window
from train_inpainter import Training, frechet_distance, measured

SMALL = ["--width", 4, "--batch_size", 2, "--steps", 4, "--critic_from", 0.5, "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared_scenes(tmp_path_factory.mktemp("data") / "scenes", 6, 4, 4)


def test_half_of_the_holes_are_boxes_and_all_depend_on_the_generator_only():
    masks = random_holes(40, 128, np.random.default_rng(3))
    assert masks.shape == (40, 128, 128) and masks.dtype == bool
    assert np.array_equal(masks, random_holes(40, 128, np.random.default_rng(3)))
    boxes = 0
    for mask in masks:
        rows, columns = np.nonzero(mask)
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        boxes += box == mask.sum()
        assert 0 < mask.mean() < 0.6
    assert 20 <= boxes <= 25


def test_an_interrupted_training_goes_on_bit_for_bit(folder, tmp_path, monkeypatch):
    flags = ["--dataset", folder, *SMALL, "--checkpoint_every", 2]
    command(monkeypatch, train_inpainter, *flags, "--output", tmp_path / "whole.pt")
    train_inpainter.main()
    step = Training.train_step

    def killed(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Training, "train_step", killed)
    command(monkeypatch, train_inpainter, *flags, "--output", tmp_path / "cut.pt")
    with pytest.raises(KeyboardInterrupt):
        train_inpainter.main()
    assert (tmp_path / "cut.last.pt").exists()
    monkeypatch.setattr(Training, "train_step", step)
    command(monkeypatch, train_inpainter, *flags, "--lr", 0.1, "--output", tmp_path / "cut.pt")
    with pytest.raises(UserError, match="other settings"):
        train_inpainter.main()
    command(monkeypatch, train_inpainter, *flags, "--output", tmp_path / "cut.pt")
    train_inpainter.main()
    assert not (tmp_path / "cut.last.pt").exists()
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)["state_dict"]
    cut = torch.load(tmp_path / "cut.pt", weights_only=True)["state_dict"]
    for name, weight in whole.items():
        assert torch.equal(weight, cut[name])
    (tmp_path / "cut.last.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no training of this command"):
        train_inpainter.main()


def test_training_lowers_the_distance():
    photographs = torch.full((3, 144, 144, 3), 40, dtype=torch.uint8)
    photographs[1:, :, :72] = 220
    settings = {"width": 4, "lr": 2e-3, "batch_size": 4, "steps": 20, "critic_from": 1, "seed": 0}
    torch.manual_seed(0)
    training = Training(photographs, settings, torch.device("cpu"))
    distances = [training.train_step()[0].item() for _ in range(20)]
    assert np.mean(distances[-5:]) < 0.8 * np.mean(distances[:5])


def test_the_generative_inpainter_fills_the_hole_only(tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "tiny.pt"
    save_inpainter(weights, Inpainter(4))
    inpaint = load_inpainter("generative", weights)
    image = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    mask = np.zeros((300, 200), bool)
    mask[250:290, 20:160] = True
    filled = inpaint(image, mask)
    assert np.array_equal(filled[~mask], image[~mask])
    assert not np.array_equal(filled[mask], image[mask])
    other = np.where(mask[..., None], 255 - image, image)
    assert np.array_equal(inpaint(other, mask), filled)  # what was there does not matter
    assert np.array_equal(inpaint(image, np.zeros_like(mask)), image)


def test_the_window_lies_in_the_image_and_holds_the_hole():
    mask = np.zeros((400, 300), bool)
    mask[380:400, 10:110] = True
    rows, columns = window(mask)
    assert (rows.start, rows.stop) == (200, 400)
    assert (columns.start, columns.stop) == (0, 200)
    small = np.zeros((100, 90), bool)
    small[50, 50] = True
    assert window(small) == (slice(0, 100), slice(0, 90))
    assert inpainting.SIDE == 128


def test_psnr_ssim_and_fid_by_their_definitions():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    made = rng.integers(0, 256, (64, 64, 3), np.uint8)
    found = measured([image], [made])
    error = ((image.astype(float) - made) ** 2).mean()
    assert found["PSNR"] == [pytest.approx(10 * np.log10(255**2 / error))]
    assert found["SSIM"] == [
        pytest.approx(structural_similarity(image, made, channel_axis=2, data_range=255))
    ]
    first = rng.normal(size=(40, 5))
    second = rng.normal(size=(40, 5)) * 2 + 1
    one, other = np.cov(first.T), np.cov(second.T)
    apart = ((first.mean(0) - second.mean(0)) ** 2).sum()
    truth = apart + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert frechet_distance(first, second) == pytest.approx(truth)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_all_inpainters_are_measured_with_the_same_holes(folder, tmp_path, monkeypatch, capsys):
    save_inpainter(tmp_path / "tiny.pt", Inpainter(4))
    flags = ["--dataset", folder, "--evaluate", "--images", 3, "--device", "cpu"]
    flags += ["--encoder", "scenes_vgg", "--encoder_weights", "random"]
    flags += ["--inpainter_weights", tmp_path / "tiny.pt", "--output", tmp_path / "table.json"]
    command(monkeypatch, train_inpainter, *flags)
    train_inpainter.main()
    table = json.loads((tmp_path / "table.json").read_text())
    rows = {row["inpainter"]: row for row in table["inpainters"]}
    assert list(rows) == ["mean", "blur", "telea", "navier_stokes", "generative"]
    assert rows["telea"]["PSNR"] > rows["mean"]["PSNR"]  # scenes are smooth
    assert "PSNR - telea" in rows["mean"] and "PSNR - telea" not in rows["telea"]
    assert "scenes_vgg" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--width", 5], "--width must be even"),
        (["--evaluate", "--steps", 9], "--steps goes with training only"),
        (["--split", "test"], "--split goes with --evaluate only"),
    ],
)
def test_wrong_flags_are_told_in_one_line(flags, message, monkeypatch):
    command(monkeypatch, train_inpainter, *flags)
    with pytest.raises(UserError, match=message):
        train_inpainter.main()
