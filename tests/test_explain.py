"""The command that explains: its files, its figures, and what it says of a user's mistake."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import command, refused
from helpers import random_captioner
from PIL import Image

import explain as explain_script
from captioner import METHODS
from plots import explanation_figure, heat_map, overlay

ROOT = Path(__file__).resolve().parent.parent
OWN = ["--checkpoint", "it.pt", "--device", "cpu"]
ENDINGS = ("png", "npz", "json")
GRIDTD_METHODS = [name for name in METHODS if name != "attnlrp"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    random_captioner().float().save(folder / "it.pt")
    random_captioner(model_type="aoa").float().save(folder / "aoa.pt")
    pixels = np.random.default_rng(0xCAFE).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    (folder / "broken.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:900])
    return folder


def explain(workplace, monkeypatch, *arguments):
    """Run the command in the workplace."""
    monkeypatch.chdir(workplace)
    command(monkeypatch, explain_script, *arguments)
    explain_script.main()


def files_of(names):
    """The names of the three files of each explanation."""
    files = set()
    for name in names:
        files.update(f"{name}.{ending}" for ending in ENDINGS)
    return files


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_it_writes_figure_maps_and_numbers(workplace):
    line = [sys.executable, ROOT / "explain.py", "photo.jpg", *OWN]
    line += ["--caption", "w1 w2 w3", "--output", "out"]
    done = subprocess.run(line, cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out/photo-lrp.png" in done.stdout
    assert Image.open(workplace / "out/photo-lrp.png").size[0] > 500
    numbers = json.loads((workplace / "out/photo-lrp.json").read_text())
    maps = np.load(workplace / "out/photo-lrp.npz")
    assert numbers["words"] == ["w1", "w2", "w3"] == maps["words"].tolist()
    assert numbers["method"] == "lrp"
    assert maps["image_relevance"].shape == (3, 128, 128)
    np.testing.assert_allclose(numbers["word_relevance"], maps["word_relevance"], rtol=1e-6)
    assert not [name for name in names_in(workplace / "out") if name.startswith(".")]


def test_an_image_of_which_the_captioner_says_nothing_does_not_stop_the_others(
    workplace, monkeypatch, capsys
):
    captioner = random_captioner().float()
    Image.new("RGB", (64, 64), "red").save(workplace / "red.jpg")
    monkeypatch.setattr(captioner, "caption", lambda pixels, **options: [[], ["w1", "w2"]])
    monkeypatch.setattr(explain_script, "load_captioner", lambda path, device: captioner)
    explain(workplace, monkeypatch, "photo.jpg", "red.jpg", *OWN, "--output", "told")
    assert "photo.jpg: the captioner says nothing of it" in capsys.readouterr().out
    assert names_in(workplace / "told") == files_of(["red-lrp"])


def test_nothing_is_written_if_the_captioner_says_nothing_at_all(workplace, monkeypatch, capsys):
    captioner = random_captioner().float()
    monkeypatch.setattr(captioner, "caption", lambda pixels, **options: [[]])
    monkeypatch.setattr(explain_script, "load_captioner", lambda path, device: captioner)
    explain(workplace, monkeypatch, "photo.jpg", *OWN, "--output", "silent")
    assert "photo.jpg: the captioner says nothing of it" in capsys.readouterr().out
    assert not (workplace / "silent").exists()


def test_several_methods_stand_side_by_side(workplace, monkeypatch):
    arguments = ["photo.jpg", *OWN, "--caption", "w1 w2 w3", "--method", *GRIDTD_METHODS]
    explain(workplace, monkeypatch, *arguments, "--output", "several")
    expected = files_of([f"photo-{method}" for method in GRIDTD_METHODS])
    assert names_in(workplace / "several") == expected | {"photo-methods.png"}


def test_through_attention_is_the_method_attnlrp_under_the_name_lrp(workplace, monkeypatch):
    arguments = ["photo.jpg", *OWN, "--checkpoint", "aoa.pt", "--caption", "w1 w2 w3"]
    explain(workplace, monkeypatch, *arguments, "--through_attention", "--output", "through")
    explain(workplace, monkeypatch, *arguments, "--method", "lrp", "attnlrp", "--output", "both")
    assert names_in(workplace / "through") == files_of(["photo-lrp"])
    found = np.load(workplace / "through/photo-lrp.npz")["image_relevance"]
    attnlrp = np.load(workplace / "both/photo-attnlrp.npz")["image_relevance"]
    lrp = np.load(workplace / "both/photo-lrp.npz")["image_relevance"]
    assert (found == attnlrp).all()
    assert (found != lrp).any()


def test_a_name_with_dots_stays_whole(workplace, monkeypatch):
    for name in ("a.1.jpg", "a.2.jpg"):
        (workplace / name).write_bytes((workplace / "photo.jpg").read_bytes())
    arguments = ["a.1.jpg", "a.2.jpg", *OWN, "--caption", "w1", "--output", "dots"]
    explain(workplace, monkeypatch, *arguments)
    assert names_in(workplace / "dots") == files_of(["a.1-lrp", "a.2-lrp"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.jpg"], "there is no image missing.jpg"),
        (["broken.jpg"], "broken.jpg cannot be read as an image"),
        (["photo.jpg", "broken.jpg"], "broken.jpg cannot be read as an image"),
        (["photo.jpg", "./photo.jpg"], "two of the images are called photo"),
        (["photo.jpg", "--checkpoint", "photo.jpg"], "photo.jpg is not a checkpoint"),
        (["photo.jpg", "--caption", "a zebra"], "vocabulary"),
        (["photo.jpg", "--caption", ""], "empty caption"),
        (["photo.jpg", "--caption", "w1", "--beam_size", "2"], "--caption gives another"),
        (
            ["photo.jpg", "--method", "gradcam", "--through_attention"],
            "--through_attention goes with --method lrp",
        ),
        (["photo.jpg", "--method", "attnlrp"], "only LRP of the multi-head captioner"),
        (["photo.jpg", "--through_attention"], "only LRP of the multi-head captioner"),
        (["photo.jpg", "--device", "meta"], "cannot be used on this machine"),
    ],
)
def test_mistakes_are_one_line_exit_code_2_and_nothing_written(
    workplace, arguments, message, monkeypatch, capsys
):
    monkeypatch.chdir(workplace)
    line = [*OWN, *arguments, "--output", "nothing"]
    assert message in refused(explain_script, line, monkeypatch, capsys)
    assert not (workplace / "nothing").exists()


def test_a_method_that_does_not_suit_the_captioner_is_refused_before_anything_is_computed(
    workplace, monkeypatch, capsys
):
    captioner = random_captioner().float()
    monkeypatch.setattr(captioner, "caption", None)  # a call would fail
    monkeypatch.setattr(explain_script, "load_captioner", lambda path, device: captioner)
    monkeypatch.chdir(workplace)
    line = ["photo.jpg", *OWN, "--method", "lrp", "attnlrp"]
    assert "multi-head captioner" in refused(explain_script, line, monkeypatch, capsys)


def test_heat_maps_are_red_for_blue_against_and_white_at_zero():
    relevance = np.zeros((60, 60), dtype=np.float32)
    relevance[10:20, 10:20] = 2
    relevance[40:50, 40:50] = -2
    colours = heat_map(relevance)
    red = colours[15, 15]
    blue = colours[45, 45]
    zero = colours[15, 45]
    assert red[0] > red[2] + 0.4
    assert blue[2] > blue[0] + 0.25
    assert zero.min() > 0.98
    assert overlay(Image.new("RGB", (30, 20)), relevance).shape == (60, 60, 3)


@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (10, 400), (400, 10)])
def test_a_heat_map_of_nothing_is_white_in_any_shape(shape):
    """The height of a panorama is less than the blur, which goes by the width."""
    assert heat_map(np.zeros(shape, dtype=np.float32)).min() > 0.98


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_a_figure_has_a_panel_for_every_word(length):
    captioner = random_captioner().float()
    words = [f"w{index}" for index in range(length)]
    [explanation] = captioner.explain(torch.zeros(1, 3, 128, 128), [words])
    figure = explanation_figure(Image.new("RGB", (128, 128), "gray"), explanation)
    titles = [axes.get_title() for axes in figure.axes]
    assert sum(title.startswith("w") for title in titles) == length
