"""Captions in Karpathy's JSON, and the datasets that are read from it: Flickr8k and Flickr30k."""

from collections import defaultdict

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


def read_karpathy(name, json_file, images_root):
    """The dataset `name` in Karpathy's JSON, with its own splits ("restval" counts as train).
    UserError for other JSON."""
    complaint = f"{json_file} is not in Karpathy's format"
    data = read_json(json_file)
    images = data.get("images") if isinstance(data, dict) else None
    require_records(images, {"filename", "imgid", "split", "sentences"}, "images", complaint)
    if data.get("dataset", name) != name:
        raise UserError(f"{json_file} is of the dataset '{data['dataset']}', not {name}")
    require_unique([image["imgid"] for image in images], json_file)
    splits = defaultdict(list)
    for number, image in enumerate(images):
        require_records(image["sentences"], {"raw"}, f"images[{number}].sentences", complaint)
        if image["split"] not in SPLITS:
            known = ", ".join(SPLITS)
            raise UserError(f"{json_file} has a split '{image['split']}'; known are {known}")
        captions = [sentence["raw"].strip() for sentence in image["sentences"]]
        entry = make_entry(image["imgid"], image["filename"], image, captions)
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
    raw = read_karpathy(name, root / f"dataset_{name}.json", images_root)
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
