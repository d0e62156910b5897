"""Small datasets in the files that COCO, Karpathy and Flickr30k Entities give out: their keys,
their order, their punctuation.

Every image is 20 x 10 pixels.
"""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from commandline import run
from preparedataset import prepare
from scenes import write_scenes

REPOSITORY = Path(__file__).resolve().parent.parent
REAL = REPOSITORY.parent / "shared" / "data"  # a part of the originals, where it is
INFO = {
    "description": "COCO 2017 Dataset",
    "url": "http://cocodataset.org",
    "version": "1.0",
    "year": 2017,
    "contributor": "COCO Consortium",
    "date_created": "2017/09/01",
}
LICENSES = [
    {
        "url": "http://creativecommons.org/licenses/by-nc-sa/2.0/",
        "id": 1,
        "name": "Attribution-NonCommercial-ShareAlike License",
    }
]
CATEGORIES = [
    {"supercategory": "animal", "id": 3, "name": "dog"},
    {"supercategory": "vehicle", "id": 7, "name": "bus"},
]


def draw(path, size=(20, 10), seed=0):
    """Save an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(path)


def edit(path, change):
    """Let `change` do something to the JSON in `path`."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def write_coco(root, name, ids, categories=CATEGORIES, info=INFO, **more):
    """A split in COCO's layout, its images listed in reverse: each has a dog in x 2..10, y 1..7,
    the first also a crowd in x 4..10. more: further keys of the dogs' boxes."""
    images = [coco_image(name, i) for i in reversed(ids)]
    for image in images:
        draw(root / name / image["file_name"], seed=image["id"])
    sentences = []
    for i in ids:
        for k in range(5):
            sentences.append({"image_id": i, "id": 10 * i + k, "caption": f"A dog, no. {k} \n"})
    boxes = [coco_dog(i) | more for i in ids]
    boxes.append(coco_crowd(ids[0]))
    common = {"info": info, "licenses": LICENSES, "images": images}
    folder = root / "annotations"
    folder.mkdir(exist_ok=True)
    captions = {**common, "annotations": sentences}
    instances = {**common, "annotations": boxes, "categories": categories}
    for kind, content in (("captions", captions), ("instances", instances)):
        text = json.dumps(content, separators=(",", ": "))
        (folder / f"{kind}_{name}.json").write_text(text)
    return root


def coco_image(split, i):
    """COCO's record of an image."""
    return {
        "license": 1,
        "file_name": f"{i:012}.jpg",
        "coco_url": f"http://images.cocodataset.org/{split}/{i:012}.jpg",
        "height": 10,
        "width": 20,
        "date_captured": "2013-11-14 17:02:52",
        "flickr_url": f"http://farm7.staticflickr.com/1/{i}_z.jpg",
        "id": i,
    }


def coco_dog(image_id):
    """COCO's record of an object."""
    return {
        "segmentation": [[2, 1, 10, 1, 10, 7]],
        "area": 24.0,
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": [2, 1, 8, 6],
        "category_id": 3,
        "id": image_id,
    }


def coco_crowd(image_id):
    """COCO's record of a crowd, whose segmentation is run lengths."""
    return {
        "segmentation": {"counts": [40, 60, 100], "size": [10, 20]},
        "area": 60,
        "iscrowd": 1,
        "image_id": image_id,
        "bbox": [4, 0, 6, 10],
        "category_id": 7,
        "id": 900100000000 + image_id,
    }


def write_coco2017(root):
    """Both splits, four and two images."""
    write_coco(root, "train2017", [9, 4, 30, 2])
    return write_coco(root, "val2017", [5, 6])


def flickr_file(name, k):
    return f"100{k}_ab{k}.jpg" if name == "flickr8k" else f"100{k}.jpg"


def write_flickr(root, name="flickr8k", splits=("train", "restval", "val", "train")):
    """Karpathy's JSON and an image for each of the splits."""
    images = []
    for k, split in enumerate(splits):
        draw(root / "images" / flickr_file(name, k), seed=k)
        sentence_ids = list(range(5 * k, 5 * k + 5))
        sentences = []
        for sentence_id in sentence_ids:
            sentences.append(
                {
                    "tokens": ["two", "dogs", "ball", f"{k}"],
                    "raw": f"Two dogs' ball, {k}.",
                    "imgid": k,
                    "sentid": sentence_id,
                }
            )
        images.append(
            {
                "sentids": sentence_ids,
                "imgid": k,
                "sentences": sentences,
                "split": split,
                "filename": flickr_file(name, k),
            }
        )
    (root / f"dataset_{name}.json").write_text(json.dumps({"images": images, "dataset": name}))
    return root


ENTITY = """<annotation><filename>1001.jpg</filename>
<size><width>500</width><height>400</height><depth>3</depth></size>
<object><name>11</name>
<bndbox><xmin>100</xmin><ymin>40</ymin><xmax>250</xmax><ymax>400</ymax></bndbox></object>
<object><name>12</name><name>13</name>
<bndbox><xmin>0</xmin><ymin>0</ymin><xmax>500</xmax><ymax>200</ymax></bndbox></object>
<object><name>14</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>"""
SENTENCES = """[/EN#11/people A young man] throws [/EN#12/other a frisbee] .
[/EN#11/people A guy] with [/EN#13/other a gadget] on [/EN#14/scene the street] in front of \
[/EN#0/notvisual it] .
"""


def write_entities(root, name="1001"):
    """Flickr30k Entities of the second image that `write_flickr` writes."""
    annotations = root / "Flickr30kEntities" / "Annotations"
    sentences = root / "Flickr30kEntities" / "Sentences"
    annotations.mkdir(parents=True)
    sentences.mkdir()
    tree = ElementTree.ElementTree(ElementTree.fromstring(ENTITY))
    ElementTree.indent(tree, "\t")
    tree.write(annotations / f"{name}.xml")
    (sentences / f"{name}.txt").write_text(SENTENCES)
    return root


def prepared_scenes(folder, train, val, test):
    """Draw so many scenes into `folder` and make a dataset of them there; returns it."""
    write_scenes(folder, train, val, test, workers=1)
    prepare("scenes", folder, folder)
    return folder


WRITERS = {
    "coco2017": write_coco2017,
    "flickr8k": lambda root: write_entities(write_flickr(root, "flickr8k")),
    "flickr30k": lambda root: write_entities(write_flickr(root, "flickr30k")),
}


def command(monkeypatch, module, *arguments):
    """Set the command line as if the script `module` had been called."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])


def refused(module, arguments, monkeypatch, capsys, quiet=True):
    """Run a script in this process; returns what it says after its name, having checked that it is
    one line, and that nothing was printed before (unless it may: quiet=False)."""
    command(monkeypatch, module, *arguments)
    with pytest.raises(SystemExit) as caught:
        run(module.main)
    out, err = capsys.readouterr()
    last = err.removesuffix("\n").rpartition("\r")[2]  # a progress bar wipes itself out by \r
    name, _, message = last.partition(": error: ")
    assert caught.value.code == 2
    assert name == f"{module.__name__}.py"
    assert not (quiet and out)
    assert "\n" not in message
    return message
