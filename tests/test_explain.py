"""The command that explains: its files, its figure, and what it says of a user's mistake."""

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
from explain import explanation_figure, heat_map, overlay

ROOT = Path(__file__).resolve().parent.parent
OWN = ["--checkpoint", "it.pt", "--device", "cpu"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    random_captioner().float().save(folder / "it.pt")
    pixels = np.random.default_rng(0xCAFE).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    (folder / "broken.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:900])
    return folder


def test_it_writes_figure_maps_and_numbers(workplace):
    line = [
        sys.executable,
        ROOT / "explain.py",
        "photo.jpg",
        *OWN,
        "--caption",
        "w1 w2 w3",
        "--output",
        "out",
    ]
    done = subprocess.run(line, cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out/photo-lrp.png" in done.stdout
    assert Image.open(workplace / "out/photo-lrp.png").size[0] > 500
    numbers, maps = (
        json.loads((workplace / "out/photo-lrp.json").read_text()),
        np.load(workplace / "out/photo-lrp.npz"),
    )
    assert numbers["words"] == ["w1", "w2", "w3"] == maps["words"].tolist()
    assert maps["image_relevance"].shape == (3, 128, 128) and numbers["method"] == "lrp"
    np.testing.assert_allclose(numbers["word_relevance"], maps["word_relevance"], rtol=1e-6)
    assert not [path for path in (workplace / "out").iterdir() if path.name.startswith(".")]


def test_an_image_of_which_the_captioner_says_nothing_does_not_stop_the_others(
    workplace, monkeypatch, capsys
):
    captioner = random_captioner().float()
    Image.new("RGB", (64, 64), "red").save(workplace / "red.jpg")
    monkeypatch.setattr(captioner, "caption", lambda pixels, **options: [[], ["w1", "w2"]])
    monkeypatch.setattr(explain_script, "load_captioner", lambda path, device: captioner)
    command(monkeypatch, explain_script, "photo.jpg", "red.jpg", *OWN, "--output", "told")
    monkeypatch.chdir(workplace)
    explain_script.main()
    assert "photo.jpg: the captioner says nothing of it" in capsys.readouterr().out
    assert {path.name for path in (workplace / "told").iterdir()} == {
        f"red-lrp.{kind}" for kind in ("png", "npz", "json")
    }


def test_several_methods_stand_side_by_side(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    command(
        monkeypatch,
        explain_script,
        "photo.jpg",
        *OWN,
        "--caption",
        "w1 w2 w3",
        "--method",
        *METHODS,
        "--output",
        "several",
    )
    explain_script.main()
    names = {path.name for path in (workplace / "several").iterdir()}
    assert names == {
        f"photo-{method}.{kind}" for method in METHODS for kind in ("png", "npz", "json")
    } | {"photo-methods.png"}


def test_a_name_with_dots_stays_whole(workplace, monkeypatch):
    for name in ("a.1.jpg", "a.2.jpg"):
        (workplace / name).write_bytes((workplace / "photo.jpg").read_bytes())
    monkeypatch.chdir(workplace)
    command(
        monkeypatch,
        explain_script,
        "a.1.jpg",
        "a.2.jpg",
        *OWN,
        "--caption",
        "w1",
        "--output",
        "dots",
    )
    explain_script.main()
    names = {path.name for path in (workplace / "dots").iterdir()}
    assert names == {
        f"a.{number}-lrp.{kind}" for number in (1, 2) for kind in ("png", "npz", "json")
    }


@pytest.mark.parametrize("arguments, message", [
    (["missing.jpg"], "there is no image missing.jpg"),
    (["broken.jpg"], "broken.jpg cannot be read as an image"),
    (["photo.jpg", "broken.jpg"], "broken.jpg cannot be read as an image"),
    (["photo.jpg", "./photo.jpg"], "two of the images are called photo"),
    (["photo.jpg", "--checkpoint", "photo.jpg"], "photo.jpg is not a checkpoint"),
    (["photo.jpg", "--caption", "a zebra"], "vocabulary"),
    (["photo.jpg", "--caption", "w1", "--beam_size", "2"], "--caption gives another"),
    (["photo.jpg", "--method", "gradcam", "--through_attention"], "--through_attention goes with --method lrp"),
    (["photo.jpg", "--device", "meta"], "cannot be used on this machine"),
])  # fmt: skip
def test_mistakes_are_one_line_exit_code_2_and_nothing_written(
    workplace, arguments, message, monkeypatch, capsys
):
    monkeypatch.chdir(workplace)
    assert message in refused(
        explain_script, [*OWN, *arguments, "--output", "nothing"], monkeypatch, capsys
    )
    assert not (workplace / "nothing").exists()


def test_heat_maps_are_red_for_blue_against_and_white_at_zero():
    relevance = np.zeros((60, 60), dtype=np.float32)
    relevance[10:20, 10:20], relevance[40:50, 40:50] = 2, -2
    colours = heat_map(relevance)
    red, blue, zero = colours[15, 15], colours[45, 45], colours[15, 45]
    assert red[0] > red[2] + 0.4 and blue[2] > blue[0] + 0.25
    assert zero.min() > 0.98
    for shape in (
        (8, 8),
        (1, 1),
        (10, 400),
        (400, 10),
    ):  # a panorama's height is less than the blur of its width
        assert heat_map(np.zeros(shape, dtype=np.float32)).min() > 0.98
    assert overlay(Image.new("RGB", (30, 20)), relevance).shape == (60, 60, 3)


@pytest.mark.parametrize("words", [1, 2, 7, 16])
def test_a_figure_has_a_panel_for_every_word(words):
    captioner = random_captioner().float()
    explanation = captioner.explain(torch.zeros(1, 3, 128, 128), [[f"w{i}" for i in range(words)]])[
        0
    ]
    figure = explanation_figure(Image.new("RGB", (128, 128), "gray"), explanation)
    titles = [axes.get_title() for axes in figure.axes]
    assert sum(title.startswith("w") for title in titles) == words
