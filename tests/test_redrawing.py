"""A scene drawn again: the file itself, and without an object no other change."""

import json

import numpy as np
import pytest
from fixtures import prepared_scenes
from PIL import Image

import redrawing
from captiondata import CaptionDataset
from commandline import UserError
from redrawing import Redrawer, redrawn
from scenes import alone, draw_thing, make_palette


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    from scenes import draw_scenes

    parameters = {"train": 1, "val": 1, "test": 6, "size": 64, "bias": 0.9, "test_bias": 0.6}
    draw_scenes(folder, folder, **parameters, seed=3)
    return CaptionDataset(prepared_again(folder), "test")


def prepared_again(folder):
    """The folder, with its scenes prepared as a dataset; they are not drawn anew."""
    from preparedataset import prepare

    prepare("scenes", folder, folder)
    return folder


def test_the_whole_scene_is_the_file_itself(dataset):
    scenes = Redrawer(dataset)
    for index in range(len(dataset)):
        assert np.array_equal(scenes.without(index, None), np.asarray(dataset.image(index)))
        categories = [thing["category"] for thing in scenes.scene(index)["objects"]]
        assert categories == [thing["category"] for thing in dataset.entries[index]["objects"]]


def test_nothing_changes_but_the_object_and_its_shadow(dataset, monkeypatch):
    """Compared before the JPEG file blurs it; the shadow is the ellipse of `cast_shadow`."""
    monkeypatch.setattr(redrawing, "as_jpeg", np.array)
    scenes = Redrawer(dataset)
    changed = 0
    for index in range(len(dataset)):
        scene = scenes.scene(index)
        whole = redrawn(scene, 64)
        for number, thing in enumerate(scene["objects"]):
            without = redrawn(scene, 64, number)
            different = (whole != without).any(axis=2)
            assert not (different & ~touched(scene, number)).any()
            changed += different.sum()
            assert different.any(), thing["category"]
    assert changed > 500


def touched(scene, number):
    """The pixels that an object or its shadow may have changed: bool (64, 64)."""
    from random import Random

    generator = Random(scene["backdrop"] + 1)
    palettes = [make_palette(thing, generator) for thing in scene["objects"]]
    thing = scene["objects"][number]
    layer, corner = draw_thing(thing, palettes[number], 64, (1, 1, 1))
    # Where the layer is not quite transparent, and not only where it fills more than half.
    solid = layer.getchannel("A").point(lambda value: 255 * (value > 0))
    pixels = alone(Image.merge("RGBA", [solid] * 4), corner, 64)
    y, x = np.mgrid[:64, :64]
    reach = max(1.5, thing["h"] * 64 * 0.05) + 1
    beside = (x >= thing["x"] * 64 - 1) & (x <= (thing["x"] + thing["w"]) * 64 + 1)
    return pixels | (beside & (np.abs(y - thing.base * 64) <= reach))


def test_only_these_very_scenes_are_drawn_again(dataset, tmp_path):
    folder = prepared_scenes(tmp_path, 1, 1, 1)  # by write_scenes, which keeps no record
    with pytest.raises(UserError, match="only drawn scenes"):
        Redrawer(CaptionDataset(folder, "test"))
    record = dataset.folder / "drawn.json"
    text = record.read_text()
    try:
        record.write_text(json.dumps(json.loads(text) | {"drawings": "of old"}))
        with pytest.raises(UserError, match="another version"):
            Redrawer(dataset)
    finally:
        record.write_text(text)
