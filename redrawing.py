"""The exact counterfactual: a drawn scene again, pixel by pixel, without one of its objects.

scenes.py draws an image from a record of what is in it. The same record with one object left out
gives the image as it would have been: what the object hid appears, its shadow is gone, and nothing
else changes. So the error of an inpainter can be measured.

    scenes = Redrawer(dataset)            # a CaptionDataset of drawn scenes
    pixels = scenes.without(index, 0)     # of the index-th image without its first object
"""

import io
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from commandline import UserError, read_json
from scenes import (
    ATTEMPTS,
    FIRST_ID,
    NIGHT,
    QUALITY,
    SETTINGS,
    cast_shadow,
    draw_backdrop,
    draw_thing,
    fingerprint,
    make_palette,
    render,
    sample_scene,
)


class Redrawer:
    """Draws the scenes of one split again.

    dataset: a CaptionDataset. UserError if it is not of drawn scenes, or they were drawn by another
    version of scenes.py.
    """

    def __init__(self, dataset):
        record = Path(dataset.image_path(0)).parent.parent / "drawn.json"
        if not record.exists():
            raise UserError(
                "only drawn scenes can be drawn again without an object; "
                "prepare them with preparedataset.py --dataset scenes"
            )
        drawn = read_json(record)
        if drawn.get("drawings") != fingerprint():
            raise UserError(f"{record}: the scenes were drawn by another version; draw them again")
        self.dataset = dataset
        self.seed = drawn.get("seed", 0)
        self.size = drawn["size"]
        self.bias = drawn["bias"] if dataset.split == "train" else drawn["test_bias"]

    def scene(self, index):
        """The record of an image, as it was drawn; its "objects" are those of the dataset."""
        number = self.dataset.entries[index]["image_id"] - FIRST_ID[self.dataset.split]
        for attempt in range(ATTEMPTS):
            scene = sample_scene(self.seed, self.dataset.split, number, self.bias, attempt)
            if render(scene, self.size):
                return scene
        raise UserError(f"scene {number} cannot be drawn")

    def without(self, index, left_out):
        """The image without the object of this index, or all of it for None: uint8 (H, W, 3)."""
        return redrawn(self.scene(index), self.size, left_out)


def redrawn(scene, size, left_out=None):
    """A scene's pixels as its JPEG file holds them, uint8 (size, size, 3), without one object.

    It follows `scenes.render`. The colours of all objects are drawn from one generator, so they are
    drawn for the missing one too.
    """
    generator = Random(scene["backdrop"] + 1)
    objects = scene["objects"]
    palettes = [make_palette(thing, generator) for thing in objects]
    tint = NIGHT if scene["setting"] == "night" else (1, 1, 1)
    image = draw_backdrop(SETTINGS[scene["setting"]], scene["backdrop"], size)
    for number in sorted(range(len(objects)), key=lambda i: objects[i]["depth"]):
        if number == left_out:
            continue
        cast_shadow(image, objects[number], size)
        layer, corner = draw_thing(objects[number], palettes[number], size, tint)
        image.paste(layer, corner, layer)
    return as_jpeg(image)


def as_jpeg(image):
    """A PIL image after a JPEG file has held it, as uint8 (H, W, 3)."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return np.array(Image.open(file).convert("RGB"))
