"""Files in COCO's formats (captions, instances, results), and the datasets that come in them: COCO
2017 and the embedded scenes."""

from collections import defaultdict
from pathlib import Path

from commandline import UserError, read_json
from pycocoevalcap.chair.chair import COCO_SYNONYMS, forms, read_synonyms
from readers.records import (
    Raw,
    make_entry,
    require_folder,
    require_records,
    require_unique,
    valid_text,
)
from vocabulary import tokenize

COCO_TRAIN = 110_000  # of train2017, by ascending id, are the split train ...
COCO_VAL = 5000  # ... and so many after them are the split val
FIELDS = {  # what is read of the records in the lists of a file
    "captions": {
        "images": {"id", "file_name"},
        "annotations": {"image_id", "caption"},
    },
    "instances": {
        "images": {"id", "file_name"},
        "annotations": {"image_id", "category_id", "bbox"},
        "categories": {"id", "name"},
    },
}


def read_coco_json(path, kind):
    """The parsed file of a kind, "captions" or "instances".

    UserError unless it is of that kind, with images of different ids and annotations of images and
    categories that it lists.
    """
    data = read_json(path)
    for part, names in FIELDS[kind].items():
        records = data.get(part) if isinstance(data, dict) else None
        require_records(records, names, part, f"{path} is not a COCO {kind} file")
    require_unique([image["id"] for image in data["images"]], path)
    _require_listed(data, "image", data["images"], path)
    if kind == "instances":
        _require_listed(data, "category", data["categories"], path)
    return data


def _require_listed(data, what, records, path):
    """UserError if an annotation is of an image, or a category, that is not among the records."""
    mentioned = {annotation[f"{what}_id"] for annotation in data["annotations"]}
    stray = mentioned - {record["id"] for record in records}
    if stray:
        raise UserError(
            f"{path} has an annotation of the {what} {min(stray)}, which it does not list"
        )


def coco_categories(instances):
    """{category: all words and phrases that name it} of a parsed instances file.

    These are its own "synonyms" (as the scenes have them), or those of COCO's 80 categories, or the
    name and its plural.
    """
    known = read_synonyms(COCO_SYNONYMS)
    categories = {}
    for category in instances["categories"]:
        name = category["name"]
        categories[name] = category.get("synonyms") or known.get(name) or forms(name)
    return categories


# ------------------------------------------------------------------------------------------- splits


def read_coco_split(root, name):
    """One split in COCO's layout: annotations/{captions,instances}_<name>.json and the images in
    <name>/.

    Returns (entries sorted by image id, {category: words that mean it}, planted pairs). UserError
    if a file or folder is missing or of another kind.
    """
    folder = root / "annotations"
    require_folder(folder, "the COCO annotations")
    captions_file = folder / f"captions_{name}.json"
    instances_file = folder / f"instances_{name}.json"
    captions = read_coco_json(captions_file, "captions")
    instances = read_coco_json(instances_file, "instances")
    require_folder(root / name, "the images folder")
    images = {image["id"]: image for image in captions["images"]}
    if images and images.keys().isdisjoint(image["id"] for image in instances["images"]):
        raise UserError(
            f"{captions_file} and {instances_file} have no image in common; "
            "one of them is of another split"
        )
    sentences = defaultdict(list)
    for annotation in captions["annotations"]:
        sentences[annotation["image_id"]].append(annotation["caption"].strip())
    objects = _objects_of(instances)
    entries = []
    for key, image in sorted(images.items()):
        file = f"{name}/{image['file_name']}"
        entries.append(make_entry(key, file, image, sentences[key], objects[key]))
    info = captions.get("info")
    pairs = info.get("planted_pairs", []) if isinstance(info, dict) else []
    return entries, coco_categories(instances), pairs


def _objects_of(instances):
    """{image id: its objects} of a parsed instances file."""
    names = {category["id"]: category["name"] for category in instances["categories"]}
    objects = defaultdict(list)
    for annotation in instances["annotations"]:
        x, y, width, height = annotation["bbox"]
        objects[annotation["image_id"]].append(
            {
                "category": names[annotation["category_id"]],
                "bbox": [x, y, x + width, y + height],
                "segmentation": annotation.get("segmentation", []),
                "iscrowd": annotation.get("iscrowd", 0),
                "main": bool(annotation.get("main", False)),
            }
        )
    return objects


def read_coco2017(root):
    """COCO 2017: train2017 by ascending id, 110,000 to train and the next 5,000 to val; val2017 is
    the test split.

    A smaller train2017 is divided in the same proportion, 22:1, with at least one image in val.
    """
    pool, categories, _ = read_coco_split(root, "train2017")
    test, _, _ = read_coco_split(root, "val2017")
    train = COCO_TRAIN
    val = COCO_VAL
    if len(pool) < train + val:
        val = max(1, round(len(pool) * COCO_VAL / (COCO_TRAIN + COCO_VAL)))
        train = len(pool) - val
    splits = {"train": pool[:train], "val": pool[train : train + val], "test": test}
    return Raw(splits, root, categories, images_unused=len(pool) - train - val)


def read_scenes(root):
    """The scenes that scenes.py drew into `root`."""
    train, categories, pairs = read_coco_split(root, "train")
    val, _, _ = read_coco_split(root, "val")
    test, _, _ = read_coco_split(root, "test")
    return Raw({"train": train, "val": val, "test": test}, root, categories, pairs)


# ------------------------------------------------- references, predictions and objects by image id


def read_references(path):
    """{image id: its raw captions} of a COCO captions file, without those that have no word.

    UserError if it is none.
    """
    references = defaultdict(list)
    for annotation in read_coco_json(Path(path), "captions")["annotations"]:
        if tokenize(annotation["caption"]):
            references[annotation["image_id"]].append(valid_text(annotation["caption"]))
    return dict(references)


def read_predictions(path):
    """{image id: caption} of a file in COCO's results format, a list of {"image_id", "caption"}, or
    of a JSON result of evaluation.py, whose "captions" are such a list.

    UserError if it is neither, or has more than one caption of an image.
    """
    rows = read_json(path)
    if isinstance(rows, dict):
        rows = rows.get("captions")
    if not isinstance(rows, list) or not rows or not all(map(_is_result, rows)):
        raise UserError(
            f"{path} is not in COCO's results format: "
            "it needs a list of objects with image_id and caption, a text"
        )
    predictions = {row["image_id"]: valid_text(row["caption"]) for row in rows}
    if len(predictions) < len(rows):
        raise UserError(f"{path} has more than one caption of an image")
    return predictions


def _is_result(row):
    """Whether it is one image's caption in COCO's results format."""
    if not isinstance(row, dict) or not isinstance(row.get("image_id"), (int, str)):
        return False
    return isinstance(row.get("caption"), str)


def read_instances(path, image_ids=()):
    """({image id: set of the categories of its objects}, {category: words and phrases that name
    it}) of a COCO instances file.

    UserError if it is none, or does not list one of `image_ids`.
    """
    data = read_coco_json(Path(path), "instances")
    names = {category["id"]: category["name"] for category in data["categories"]}
    annotated = {image["id"]: set() for image in data["images"]}
    for annotation in data["annotations"]:
        annotated[annotation["image_id"]].add(names[annotation["category_id"]])
    missing = [key for key in image_ids if key not in annotated]
    if missing:
        raise UserError(
            f"{path} does not list image {missing[0]} ({len(missing)} such); "
            "its objects are needed for CHAIR"
        )
    return annotated, coco_categories(data)
