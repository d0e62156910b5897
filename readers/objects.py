"""The objects of one photograph, as masks, read from what a user has of them.

objects = read_objects("instances.json", "photo.jpg")    # COCO: the image of that file name
objects = read_objects("1001.xml", "photo.jpg")          # Flickr30k Entities
objects = read_objects("masks", "photo.jpg")             # a folder: man.png, man-2.png, dog.png
objects = read_objects("boxes.json", "photo.jpg")        # {"man": [x0, y0, x1, y1], ...}
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from commandline import UserError, read_json
from images import image_files, image_size, load_image
from readers.coco import read_coco_json
from readers.entities import read_entities_file


@dataclass(frozen=True)
class ImageObject:
    """An object of an image.

    name   what it is called
    mask   bool (H, W), its pixels
    words  the words and phrases that name it
    """

    name: str
    mask: np.ndarray
    words: tuple


def read_objects(source, photograph):
    """The ImageObjects that a file or folder says are in a photograph; see the top of this file.

    UserError naming the source if there is none, or if an object lies outside of the photograph or
    its mask has another size.
    """
    source = Path(source)
    photograph = Path(photograph)
    size = image_size(photograph)
    if source.is_dir():
        objects = _of_masks(source, size)
    elif source.suffix.lower() == ".xml":
        things = read_entities_file(source, photograph)
        objects = [object_of(thing, size, source) for thing in things]
    else:
        objects = _of_json(source, photograph, size)
    if not objects:
        raise UserError(f"{source} has no object of {photograph.name}")
    return objects


def object_of(thing, size, source, phrases=None):
    """The ImageObject of an entry's object, a dict of category, bbox and perhaps a segmentation.

    size: (width, height) of its image; source: whose fault it is, for messages; phrases:
    {category: words that name it}.
    """
    name = thing["category"]
    outline = thing.get("segmentation")
    mask = segmentation_mask(outline, size) if outline else box_mask(thing["bbox"], size)
    if not mask.any():
        raise UserError(f"{source}: the object '{name}' lies outside of the picture")
    words = thing.get("words") or (phrases or {}).get(name) or [name]
    return ImageObject(name, mask, tuple(words))


def box_mask(box, size):
    """The pixels whose centre lies in a box: bool (H, W).

    box: x0, y0, x1, y1 in pixels; size: (width, height).
    """
    x0, y0, x1, y1 = box
    x = np.arange(size[0]) + 0.5
    y = np.arange(size[1]) + 0.5
    return ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None]


def segmentation_mask(segmentation, size):
    """A COCO segmentation, polygons or a run-length code, as a mask bool (H, W).

    size: (width, height). UserError for a code of another size.
    """
    width, height = size
    if isinstance(segmentation, list):
        segmentation = rle.merge(rle.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, *segmentation["size"])
    mask = rle.decode(segmentation).astype(bool)
    if mask.shape != (height, width):
        raise UserError(_other_size("a mask", mask.shape[::-1], size))
    return mask


def _other_size(what, found, size):
    """What to tell a user of a mask that does not fit its photograph."""
    return f"{what} is {found[0]}x{found[1]} pixels, and its photograph {size[0]}x{size[1]}"


def _of_masks(folder, size):
    """The objects of a folder of mask images; what is not black belongs to the object."""
    objects = []
    for file in image_files(folder):
        mask = np.asarray(load_image(file).convert("L")) > 0
        if mask.shape != size[::-1]:
            raise UserError(_other_size(f"the mask {file}", mask.shape[::-1], size))
        if not mask.any():
            raise UserError(f"{file} is all black, so it shows no object")
        name = re.sub(r"-\d+$", "", file.stem).replace("_", " ")
        objects.append(ImageObject(name, mask, (name,)))
    return objects


def _of_json(source, photograph, size):
    """The objects of a JSON file, COCO's instances or named boxes."""
    data = read_json(source)
    if not isinstance(data, dict):
        raise UserError(
            f"{source} is neither a COCO instances file nor of the form "
            '{"man": [x0, y0, x1, y1], ...}'
        )
    if "annotations" in data:
        return _of_instances(source, photograph, size)
    objects = []
    for name, boxes in data.items():
        several = isinstance(boxes, list) and bool(boxes) and isinstance(boxes[0], list)
        for box in boxes if several else [boxes]:
            if not _is_box(box):
                raise UserError(f"{source}: '{name}' needs a box [x0, y0, x1, y1], not {box}")
            objects.append(object_of({"category": name, "bbox": box}, size, source))
    return objects


def _is_box(box):
    """Whether it is four numbers that span an area."""
    if not isinstance(box, list) or len(box) != 4:
        return False
    if not all(isinstance(number, (int, float)) for number in box):
        return False
    return box[0] < box[2] and box[1] < box[3]


def _of_instances(source, photograph, size):
    """The objects of a photograph in a COCO instances file, but for crowds."""
    data = read_coco_json(source, "instances")
    names = {category["id"]: category["name"] for category in data["categories"]}
    images = [image for image in data["images"] if Path(image["file_name"]).name == photograph.name]
    if not images:
        raise UserError(f"{source} lists no image {photograph.name}")
    image = images[0]
    stated = (image.get("width", size[0]), image.get("height", size[1]))
    if stated != size:
        raise UserError(_other_size(f"{photograph.name} in {source}", stated, size))
    objects = []
    for annotation in data["annotations"]:
        if annotation["image_id"] != image["id"] or annotation.get("iscrowd"):
            continue
        x, y, width, height = annotation["bbox"]
        thing = {
            "category": names[annotation["category_id"]],
            "bbox": [x, y, x + width, y + height],
            "segmentation": annotation.get("segmentation"),
        }
        objects.append(object_of(thing, size, source))
    return objects
