"""Captions in Karpathy's JSON, and the datasets that are read from it: Flickr8k, Flickr30k, and any
other of this form."""

from collections import defaultdict
from pathlib import Path

from commandline import UserError, read_json
from pycocoevalcap.chair.chair import FLICKR_SYNONYMS, object_phrases, read_synonyms
from readers.entities import find_entities, read_entities
from readers.records import Raw, archives_in, make_entry, require_records, require_unique

SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
IMAGE_FOLDERS = (
    "images",
    "Images",
    "flickr30k_images",
    "flickr30k-images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
)


# What an image may have besides: of COCO, whose images lie in two folders and have numbers.
OPTIONAL = ("filepath", "cocoid")


def read_karpathy(root, captions=None):
    """Any dataset in Karpathy's JSON, in the folder `root`.

    captions: the JSON file; None: the one file of `root` whose name is dataset_*.json. The images
    are in a folder of `root` or, where the JSON has a "filepath" for each, in these folders of
    `root` or of its folder of images. An image is called by its "cocoid", if it has one, as in
    COCO's own files. UserError for what is missing.
    """
    if captions is None:
        captions = _find_json(root)
    images = _read_images(captions)
    if images and "filepath" in images[0] and (root / images[0]["filepath"]).is_dir():
        return _raw_of(images, captions, root)
    return _raw_of(images, captions, _find_images(root))


def _find_json(root):
    """The one file dataset_*.json in `root`; UserError if there is none, or several."""
    found = sorted(root.glob("dataset_*.json"))
    if not found:
        raise UserError(f"there is no dataset_*.json in {root}; name the file as captions")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{root} has {names}; name one of them as captions")
    return found[0]


def _read_images(json_file, name=None):
    """The records of the images in Karpathy's JSON, checked. UserError for other JSON, or for
    that of another dataset than `name`."""
    complaint = f"{json_file} is not in Karpathy's format"
    data = read_json(json_file)
    images = data.get("images") if isinstance(data, dict) else None
    names = {"filename", "imgid", "split", "sentences"}
    require_records(images, names, "images", complaint)
    if name and data.get("dataset", name) != name:
        raise UserError(f"{json_file} is of the dataset '{data['dataset']}', not {name}")
    # What the first image has, all of them need.
    also = [field for field in OPTIONAL if images and field in images[0]]
    require_records(images, also, "images", complaint)
    require_unique([_number_of(image) for image in images], json_file)
    return images


def _number_of(image):
    return image.get("cocoid", image["imgid"])


def _raw_of(images, json_file, images_root):
    """The Raw of records, with their own splits ("restval" counts as train)."""
    complaint = f"{json_file} is not in Karpathy's format"
    splits = defaultdict(list)
    for number, image in enumerate(images):
        require_records(image["sentences"], {"raw"}, f"images[{number}].sentences", complaint)
        if image["split"] not in SPLITS:
            known = ", ".join(SPLITS)
            raise UserError(f"{json_file} has a split '{image['split']}'; known are {known}")
        captions = [sentence["raw"].strip() for sentence in image["sentences"]]
        file = (Path(image.get("filepath", "")) / image["filename"]).as_posix()
        entry = make_entry(_number_of(image), file, image, captions)
        splits[SPLITS[image["split"]]].append(entry)
    return Raw(dict(splits), images_root, read_synonyms(FLICKR_SYNONYMS))


def read_flickr8k(root):
    """Flickr8k: dataset_flickr8k.json, a folder of images and, if it is there, Flickr30k
    Entities."""
    return _read_flickr("flickr8k", root)


def read_flickr30k(root):
    """Flickr30k: dataset_flickr30k.json, a folder of images and, if it is there, Flickr30k
    Entities."""
    return _read_flickr("flickr30k", root)


def _read_flickr(name, root):
    images_root = _find_images(root)
    json_file = root / f"dataset_{name}.json"
    raw = _raw_of(_read_images(json_file, name), json_file, images_root)
    entities = find_entities(root)
    if entities:
        phrases = object_phrases(raw.categories)
        for entries in raw.splits.values():
            for entry in entries:
                image = images_root / entry["file"]
                entry["objects"] = read_entities(entities, image, phrases)
    return raw


def _find_images(root):
    """The folder of images in `root`; UserError if there is none."""
    for name in IMAGE_FOLDERS:
        if (root / name).is_dir():
            return root / name
    names = ", ".join(IMAGE_FOLDERS)
    raise UserError(
        f"there is no images folder in {root}; it may be called {names}{archives_in(root)}"
    )
