"""Raw images and captions -> data/<name>/: vocabulary, encoded captions, splits, boxes and, on demand, cached features.

    python preparedataset.py                                               # draws the embedded scenes and prepares them
    python preparedataset.py --dataset coco2017 --root ~/coco2017          # annotations/, train2017/, val2017/
    python preparedataset.py --dataset flickr30k --root ~/flickr30k --features vgg16      # also caches VGG16's features

The datasets differ in their reader and nowhere else: a reader takes the root folder and returns a `Raw`.
"""

import argparse
import math
import os
import random
import re
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable
from xml.etree import ElementTree

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import scenes
from captiondata import CaptionDataset, files_hash, regions_path
from commandline import (
    CommandLine,
    UserError,
    add_common_flags,
    choose_device,
    file_hash,
    provenance,
    read_json,
    run,
    set_seed,
    write_atomically,
    write_json,
    write_tensors,
)  # fmt: skip
from encoder import build_encoder
from featurecache import encoder_path, features_path, lay_out, missing_rows, write_rows
from images import image_size, image_transform
from pycocoevalcap.chair.chair import (
    COCO_SYNONYMS,
    FLICKR_SYNONYMS,
    forms,
    mentioned_objects,
    object_phrases,
    read_synonyms,
)
from vocabulary import Vocabulary, tokenize

CAPTIONS_PER_IMAGE = 5
COCO_TRAIN, COCO_VAL = 110000, 5000
PREPROCESSING = "stretched to a square, bilinear with antialiasing, ImageNet's mean and deviation"
ENTITIES_FOLDERS = ("Flickr30kEntities", "flickr30k_entities")
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
IMAGE_FOLDERS = (
    "images",
    "Images",
    "flickr30k_images",
    "flickr30k-images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
)
ARCHIVES = (".zip", ".tar", ".gz", ".tgz")
DROPPED = {  # the counts of what is left out, and why
    "captions_dropped_empty": "captions without a word",
    "captions_dropped_too_long": "captions longer than --max_length",
    "images_dropped_without_caption": "images left without a caption",
}


def _is_text(value):
    """Whether it can be written as UTF-8, which half a surrogate pair, the end of a caption cut in an emoji, cannot."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_inside(value):
    """Whether it is a path that cannot lead out of the folder that it is looked for in."""
    return (
        _is_text(value)
        and value != ""
        and not os.path.isabs(value)
        and ".." not in Path(value).parts
    )


def _is_box(value):
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)
    )


WHOLE_NUMBER = "a whole number", lambda value: isinstance(value, int)
TEXT = "a text", _is_text
FILE = "a file name inside the images folder", _is_inside
FIELDS = {  # what is read of the records in the datasets' own files
    "id": WHOLE_NUMBER, "image_id": WHOLE_NUMBER, "category_id": WHOLE_NUMBER, "imgid": WHOLE_NUMBER, "file_name": FILE, "filename": FILE,
    "caption": TEXT, "raw": TEXT, "name": TEXT, "split": TEXT, "bbox": ("four numbers", _is_box),
    "sentences": ("a list", lambda value: isinstance(value, list)),
}  # fmt: skip
COCO_FIELDS = {  # of the files' lists
    "captions": {"images": {"id", "file_name"}, "annotations": {"image_id", "caption"}},
    "instances": {
        "images": {"id", "file_name"}, "annotations": {"image_id", "category_id", "bbox"}, "categories": {"id", "name"},
    },
}  # fmt: skip


@dataclass
class Raw:
    """What a reader returns: {split: entries as in <split>.json but without "encoded"} and what belongs to them."""

    splits: dict
    images_root: Path
    categories: dict = field(default_factory=dict)
    planted_pairs: list = field(default_factory=list)
    images_unused: int = 0


def read_coco_split(root, name):
    """One split in COCO's layout: annotations/{captions,instances}_<name>.json and the images in <name>/.

    Returns (entries sorted by image id, {category: words that mean it}, planted pairs). UserError for other JSON.
    """
    _require_folder(root / "annotations", "the COCO annotations")
    captions_file, instances_file = (
        root / "annotations" / f"{kind}_{name}.json" for kind in ("captions", "instances")
    )
    captions, instances = (
        read_coco_json(captions_file, "captions"),
        read_coco_json(instances_file, "instances"),
    )
    _require_folder(root / name, "the images folder")
    categories = {category["id"]: category for category in instances["categories"]}
    objects = defaultdict(list)
    for annotation in instances["annotations"]:
        objects[annotation["image_id"]].append(_coco_object(annotation, categories))
    sentences = defaultdict(list)
    for annotation in captions["annotations"]:
        sentences[annotation["image_id"]].append(annotation["caption"].strip())
    images = {image["id"]: image for image in captions["images"]}
    if images and images.keys().isdisjoint(image["id"] for image in instances["images"]):
        raise UserError(
            f"{captions_file} and {instances_file} have no image in common; one of them is of another split"
        )
    entries = [
        _entry(key, f"{name}/{image['file_name']}", image, sentences[key], objects[key])
        for key, image in sorted(images.items())
    ]
    info = captions.get("info")
    return (
        entries,
        coco_categories(instances),
        info.get("planted_pairs", []) if isinstance(info, dict) else [],
    )


def read_coco_json(path, kind):
    """The parsed file; UserError unless it is of this kind, with images of different ids and annotations of what it lists."""
    data = read_json(path)
    for part, names in COCO_FIELDS[kind].items():
        require_records(
            data.get(part) if isinstance(data, dict) else None,
            names,
            part,
            f"{path} is not a COCO {kind} file",
        )
    _require_unique([image["id"] for image in data["images"]], path)
    for what, part in (("image", "images"), ("category", "categories")):
        if part in COCO_FIELDS[kind]:
            stray = {annotation[f"{what}_id"] for annotation in data["annotations"]} - {
                record["id"] for record in data[part]
            }
            if stray:
                raise UserError(
                    f"{path} has an annotation of the {what} {min(stray)}, which it does not list"
                )
    return data


def require_records(records, names, part, complaint):
    """UserError, `complaint` and why, unless `records` is a list of dicts whose fields `names` are as FIELDS wants them."""
    if not isinstance(records, list):
        raise UserError(f"{complaint}: it has no list '{part}'")
    fields = [(name, *FIELDS[name]) for name in sorted(names)]
    for number, record in enumerate(records):
        for name, wanted, test in fields:
            if not isinstance(record, dict) or name not in record:
                raise UserError(f"{complaint}: {part}[{number}] has no '{name}'")
            if not test(record[name]):
                raise UserError(
                    f"{complaint}, or is damaged: '{name}' of {part}[{number}] is {repr(record[name])[:80]}, not {wanted}"
                )


def _coco_object(annotation, categories):
    x, y, width, height = annotation["bbox"]
    return {
        "category": categories[annotation["category_id"]]["name"],
        "bbox": [x, y, x + width, y + height],
        "segmentation": annotation.get("segmentation", []),
        "iscrowd": annotation.get("iscrowd", 0),
        "main": bool(annotation.get("main", False)),
    }


def _entry(image_id, file, image, captions, objects=()):
    size = {"width": image.get("width"), "height": image.get("height")}
    return {
        "image_id": image_id,
        "file": file,
        **size,
        "captions": captions,
        "objects": list(objects),
    }


def coco_categories(instances):
    """{category: all words and phrases that name it} of a COCO instances file: its own "synonyms" (as the scenes have them), those
    of COCO's 80 categories, or the name and its plural."""
    known = read_synonyms(COCO_SYNONYMS)
    return {
        c["name"]: c.get("synonyms") or known.get(c["name"]) or forms(c["name"])
        for c in instances["categories"]
    }


def read_scenes(root):
    """The scenes that scenes.py drew into `root`."""
    entries, categories, pairs = zip(
        *(read_coco_split(root, split) for split in ("train", "val", "test"))
    )
    return Raw(dict(zip(("train", "val", "test"), entries)), root, categories[0], pairs[0])


def read_coco2017(root):
    """COCO 2017: train2017 by ascending id, 110,000 to train and the next 5,000 to val; val2017 is the test split.

    A smaller train2017 is divided in the same proportion, 22:1, with at least one image in val.
    """
    pool, categories, _ = read_coco_split(root, "train2017")
    test, _, _ = read_coco_split(root, "val2017")
    n_train, n_val = COCO_TRAIN, COCO_VAL
    if len(pool) < COCO_TRAIN + COCO_VAL:
        n_val = max(1, round(len(pool) * COCO_VAL / (COCO_TRAIN + COCO_VAL)))
        n_train = len(pool) - n_val
    splits = {"train": pool[:n_train], "val": pool[n_train : n_train + n_val], "test": test}
    return Raw(splits, root, categories, images_unused=len(pool) - n_train - n_val)


def read_karpathy(name, json_file, images_root):
    """The dataset `name` in Karpathy's JSON, with its own splits ("restval" counts as train). UserError for other JSON."""
    data, complaint = read_json(json_file), f"{json_file} is not in Karpathy's format"
    images = data.get("images") if isinstance(data, dict) else None
    require_records(images, {"filename", "imgid", "split", "sentences"}, "images", complaint)
    if data.get("dataset", name) != name:
        raise UserError(f"{json_file} is of the dataset '{data['dataset']}', not {name}")
    _require_unique([image["imgid"] for image in images], json_file)
    splits = defaultdict(list)
    for number, image in enumerate(images):
        require_records(image["sentences"], {"raw"}, f"images[{number}].sentences", complaint)
        if image["split"] not in KARPATHY_SPLITS:
            raise UserError(
                f"{json_file} has a split '{image['split']}'; known are {', '.join(KARPATHY_SPLITS)}"
            )
        captions = [sentence["raw"].strip() for sentence in image["sentences"]]
        splits[KARPATHY_SPLITS[image["split"]]].append(
            _entry(image["imgid"], image["filename"], image, captions)
        )
    return Raw(dict(splits), images_root, read_synonyms(FLICKR_SYNONYMS))


def read_flickr(name, root):
    """Flickr8k or Flickr30k: dataset_<name>.json and a folder of images in `root`."""
    folder = next((root / folder for folder in IMAGE_FOLDERS if (root / folder).is_dir()), None)
    if folder is None:
        raise UserError(
            f"there is no images folder in {root}; it may be called {', '.join(IMAGE_FOLDERS)}{_archives_in(root)}"
        )
    raw = read_karpathy(name, root / f"dataset_{name}.json", folder)
    entities = next(
        (root / folder for folder in ENTITIES_FOLDERS if (root / folder).exists()), None
    )
    if entities:
        for part in ("Annotations", "Sentences"):
            _require_folder(entities / part, f"the {part} of Flickr30k Entities")
        phrases = object_phrases(raw.categories)
        for entry in (entry for entries in raw.splits.values() for entry in entries):
            entry["objects"] = read_entities(entities, folder / entry["file"], phrases)
    return raw


def read_entities(folder, image, phrases):
    """The boxes of one image in Flickr30k Entities (Plummer et al. 2015), [] if it has none there.

    A box belongs to a chain of phrases in the sentences: "words" are their last words, its "category" is what these name, or
    the first of them where that is no category. Boxes are scaled from the annotated picture to the size of the file.
    """
    name = image.stem.split("_")[0]  # Flickr8k adds a second number
    annotation, sentences = (
        folder / "Annotations" / f"{name}.xml",
        folder / "Sentences" / f"{name}.txt",
    )
    if not annotation.is_file() or not image.is_file():
        return []
    try:
        tree, text = ElementTree.parse(annotation), sentences.read_text(encoding="utf-8")
        annotated = [int(tree.findtext(f"size/{side}")) for side in ("width", "height")]
        scale = [true / side for true, side in zip(image_size(image), annotated)] * 2
        boxes = [
            ([element.text for element in thing.iter("name")], _boxes(thing, scale))
            for thing in tree.iter("object")
        ]
    except (OSError, ElementTree.ParseError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{annotation} or {sentences} is missing, damaged or not of Flickr30k Entities ({error})"
        ) from None
    chains = defaultdict(list)
    for chain, phrase in re.findall(r"\[/EN#(\d+)/\S+ ([^\]]+)\]", text):
        chains[chain] += tokenize(phrase)[-1:]
    objects = []
    for chain, box in (
        (chain, box)
        for names, of_one in boxes
        for chain in names
        if chains[chain]
        for box in of_one
    ):
        words = sorted(set(chains[chain]), key=chains[chain].index)
        objects.append(
            {
                "category": next(iter(mentioned_objects(words, phrases)), words[0]),
                "bbox": box,
                "words": words,
            }
        )
    return objects


def _boxes(thing, scale):
    """The boxes x1 y1 x2 y2 of one <object>."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [
        [int(box.findtext(corner)) * factor for corner, factor in zip(corners, scale)]
        for box in thing.iter("bndbox")
    ]


@dataclass(frozen=True)
class Source:
    """A dataset: its reader, its limits (words seen less often are <unk>), what its root must hold."""

    read: Callable
    min_word_freq: int
    max_length: int
    layout: str


SOURCES = {
    "scenes": Source(read_scenes, 3, 30, "nothing, it is drawn"),
    "coco2017": Source(read_coco2017, 4, 30, "annotations/, train2017/ and val2017/"),
    "flickr30k": Source(
        lambda root: read_flickr("flickr30k", root), 3, 50, "dataset_flickr30k.json and images/"
    ),
    "flickr8k": Source(
        lambda root: read_flickr("flickr8k", root), 3, 50, "dataset_flickr8k.json and images/"
    ),
}


def encode_captions(splits, min_word_freq, max_length, seed):
    """Build the vocabulary on all training captions and encode five captions an image (sampled, or some repeated).

    Returns (vocabulary, {split: entries with "encoded"}, {split: counts of what was read and dropped}). A caption that
    is empty or longer than `max_length` words is not encoded; the long ones remain among the raw references. UserError if a split
    or the vocabulary is left empty.
    """
    vocabulary = Vocabulary.build(
        (tokenize(c) for entry in splits["train"] for c in entry["captions"]), min_word_freq
    )
    generator, kept, summary = random.Random(seed), {}, {}
    for split, entries in splits.items():
        counts = Counter(
            images_read=len(entries), captions_read=sum(len(entry["captions"]) for entry in entries)
        )
        kept[split] = [
            e for e in (_encode(e, vocabulary, max_length, generator, counts) for e in entries) if e
        ]
        if not kept[split]:
            raise UserError(
                f"split '{split}' is empty: {len(entries)} images, no caption of 1 to {max_length} words (--max_length)"
            )
        summary[split] = dict(counts)
    if not vocabulary.kept:
        raise UserError(
            f"no word occurs {min_word_freq} times in the captions of train; give a lower --min_word_freq"
        )
    return vocabulary, kept, summary


def _encode(entry, vocabulary, max_length, generator, counts):
    """`entry` with its encoded captions, or None if no caption is left; adds to `counts` what is dropped."""
    tokens = {caption: tokenize(caption) for caption in entry["captions"]}
    raw = [caption for caption in entry["captions"] if tokens[caption]]
    usable = [tokens[caption] for caption in raw if len(tokens[caption]) <= max_length]
    counts["captions_dropped_empty"] += len(entry["captions"]) - len(raw)
    counts["captions_dropped_too_long"] += len(raw) - len(usable)
    counts["images_dropped_without_caption"] += not usable
    if not usable:
        return None
    if len(usable) > CAPTIONS_PER_IMAGE:
        usable = generator.sample(usable, CAPTIONS_PER_IMAGE)
    repeats = generator.choices(usable, k=CAPTIONS_PER_IMAGE - len(usable))
    counts["images_without_boxes"] += not entry["objects"]
    counts["words"] += sum(map(len, usable))
    counts["words_unknown"] += sum(word not in vocabulary for words in usable for word in words)
    return {
        **entry,
        "captions": raw,
        "encoded": [vocabulary.encode(words) for words in usable + repeats],
    }


def require_images(images_root, splits):
    """UserError unless the file of every entry is an image, by its header; sets the width and height that an entry lacks."""
    entries = [entry for split in splits.values() for entry in split]
    _require_files([images_root / entry["file"] for entry in entries], "images")
    for entry in entries:
        size = image_size(images_root / entry["file"])
        if not all(
            isinstance(entry[side], int) and entry[side] > 0 for side in ("width", "height")
        ):
            entry["width"], entry["height"] = size


def _require_files(paths, what):
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} {what} are missing, the first is {missing[0]}"
        )


def prepare(name, root, output, min_word_freq=None, max_length=None, seed=0, regions=None):
    """Read the dataset `name` in the folder `root` and write all but the feature cache into `output`; returns its info.

    Everything is checked before anything is written, that the folder `regions` has a file for every image too. Raises UserError.
    """
    source, root, output = SOURCES[name], Path(root), Path(output)
    min_word_freq, max_length = (
        min_word_freq or source.min_word_freq,
        max_length or source.max_length,
    )
    _require_folder(root, f"the root of {name}, which holds {source.layout}")
    if output.exists():
        _require_folder(output, "the folder to write")
    raw = source.read(root)
    for split in ("train", "val"):
        if not raw.splits.get(split):
            raise UserError(f"split '{split}' is empty: {root} lists no images for it")
    vocabulary, splits, summary = encode_captions(raw.splits, min_word_freq, max_length, seed)
    require_images(raw.images_root, splits)
    if regions:
        _require_files(
            [regions_path(regions, split, e["file"]) for split in splits for e in splits[split]],
            "files of regions",
        )
    inside = raw.images_root.resolve().is_relative_to(output.resolve())
    images_root = (
        os.path.relpath(raw.images_root, output) if inside else str(raw.images_root.resolve())
    )
    info = {
        "name": name,
        "images_root": images_root,
        "min_word_freq": min_word_freq,
        "max_length": max(
            len(ids) for entries in splits.values() for entry in entries for ids in entry["encoded"]
        ),
        "splits": {split: len(entries) for split, entries in splits.items()},
        "categories": raw.categories,
        "planted_pairs": raw.planted_pairs,
        "summary": {
            **summary,
            "images_unused": raw.images_unused,
            "vocabulary": len(vocabulary.kept),
        },
        "command": provenance()["command"],
        "seed": seed,
    }
    _write(output, vocabulary, splits, info)
    return info


def _write(output, vocabulary, splits, info):
    """Write all files and only then put them in their places, info.json last: it stands for a complete dataset. A failure leaves
    an earlier dataset as it was."""
    contents = {"info": info, "vocabulary": vocabulary.words, **splits}
    with ExitStack() as stack:  # leaves what it entered from the last to the first
        stack.callback(_remove_if_empty, output)
        temporaries = {
            name: stack.enter_context(write_atomically(output / f"{name}.json"))
            for name in contents
        }
        for name, content in contents.items():
            write_json(temporaries[name], content, indent=None if name in splits else 1)
        for stale in {"info", "train", "val", "test"} - splits.keys():
            (output / f"{stale}.json").unlink(missing_ok=True)


def _remove_if_empty(folder):
    with suppress(OSError):
        folder.rmdir()


def draw_scenes(root, output, **parameters):
    """Draw the scenes into `root`, unless they are there, drawn by this very scenes.py with the same parameters.

    What was prepared in `output` from other drawings, feature caches included, is removed. UserError for a folder with the
    annotations of another dataset: drawing replaces them.
    """
    if root.exists():
        _require_folder(root, "where the scenes are drawn")
    record, wanted = root / "drawn.json", {**parameters, "scenes.py": file_hash(scenes.__file__)}
    if record.exists() and read_json(record) == wanted:
        earlier = read_json(output / "info.json") if (output / "info.json").exists() else {}
        if (
            earlier.get("name") == "scenes"
            and (output / earlier["images_root"]).resolve() != root.resolve()
        ):
            _remove_prepared(output)
        return
    if not record.exists() and (root / "annotations").exists():
        raise UserError(
            f"{root} holds another dataset; name it with --dataset, or give the scenes a --root of their own"
        )
    scenes.check(
        {split: parameters[split] for split in scenes.SPLITS},
        parameters["size"],
        {"train": parameters["bias"], "test": parameters["test_bias"]},
        workers=None,
    )  # before anything goes
    _remove_prepared(output)
    write_json(record, {})  # begun
    scenes.write_scenes(root, **parameters)
    write_json(record, wanted)


def _remove_prepared(output):
    """Remove what was prepared of other drawings: scenes of one number have one name, whatever they show."""
    for stale in (output / "info.json", *output.glob("features-*.h5")):
        stale.unlink(missing_ok=True)


def _require_folder(path, what):
    if path.is_file():
        hint = (
            "an archive; unpack it and give the folder"
            if path.suffix in ARCHIVES
            else "a file, not a folder"
        )
        raise UserError(f"{path} ({what}) is {hint}")
    if not path.is_dir():
        raise UserError(f"there is no folder {path} ({what}){_archives_in(path.parent, path.name)}")


def _archives_in(folder, word=""):
    """What to do about archives with that word in their names that were not unpacked in a folder, "" without any."""
    names = sorted(
        path.name
        for path in folder.glob("*")
        if path.suffix in ARCHIVES and word.lower() in path.name.lower()
    )
    return f"; unpack {', '.join(names)} in {folder}" if names else ""


def _require_unique(ids, path):
    doubled = [key for key, count in Counter(ids).items() if count > 1]
    if doubled:
        raise UserError(
            f"{path} lists the image id {doubled[0]} more than once ({len(doubled)} such ids)"
        )


def cache_features(
    folder, encoder, batch_size=32, workers=2, device="cpu", regions=None, augment=0, seed=0
):
    """Write the features of all images to features-<encoder.name>.h5 in `folder` (featurecache.py), and the encoder's weights
    beside them, so that training knows them. regions: the folder of bottom-up features, for that encoder; augment: so many more
    versions of the train split, of images jittered and mirrored by `seed`, each in a file of its own.

    Goes on where an interrupted run stopped. UserError if a file was made with other weights or for other images.
    """
    encoder = encoder.to(device, memory_format=torch.channels_last)  # twice as fast on CPUs
    for version in range(augment + 1):
        splits = ["train"] if version else read_json(Path(folder) / "info.json")["splits"]
        transform = None if regions else image_transform(encoder.image_size, augment=version > 0)
        datasets = [CaptionDataset(folder, split, transform, regions=regions) for split in splits]
        path = features_path(folder, encoder.name, version)
        room = {dataset.split: (len(dataset), files_hash(dataset.entries)) for dataset in datasets}
        preprocessing = PREPROCESSING + f"; augmented, seed {seed}" * (version > 0)
        lay_out(
            path,
            _stamp(encoder, preprocessing),
            room,
            (encoder.grid[0] * encoder.grid[1], encoder.out_channels),
        )
        if not version:  # not before the file has said that these are its weights
            write_tensors(encoder_path(folder, encoder.name), encoder.state_dict())
        for dataset in datasets:
            if version:
                dataset.augmentation_seed, dataset.epoch = seed, version
            todo = Subset(dataset, missing_rows(path, dataset.split))
            loader = DataLoader(todo, batch_size, num_workers=min(workers, len(todo)))
            for indices, features in _encode_batches(
                encoder, loader, device, dataset.split + f", augmented {version}" * (version > 0)
            ):
                write_rows(path, dataset.split, indices, features)


def _stamp(encoder, preprocessing):
    return {
        "encoder": encoder.name, "weights_hash": encoder.weights_hash(), "image_size": encoder.image_size or 0, "grid": encoder.grid,
        "preprocessing": preprocessing,
    }  # fmt: skip


def _encode_batches(encoder, loader, device, title):
    """Yield (indices (B,), features (B, L, D) float16), NumPy arrays, with a progress bar."""
    with tqdm(total=len(loader.dataset), desc=title, unit="image") as bar:
        for images, _, indices in loader:
            with torch.inference_mode():
                features = encoder(images.to(device)).half().cpu().numpy()
            yield indices.numpy(), features
            bar.update(len(indices))


def describe(info):
    """The lines that tell what was read, what was dropped and why, and what became of the words."""
    summary = info["summary"]
    for split, kept in info["splits"].items():
        counts = summary[split]
        dropped = ", ".join(
            f"{reason} {counts[name]}" for name, reason in DROPPED.items() if counts[name]
        )
        yield f"{split}: read images {counts['images_read']}, captions {counts['captions_read']}; dropped {dropped or 'nothing'}"
        unknown = f"words {counts['words']}, of them <unk> {counts['words_unknown']} ({counts['words_unknown'] / counts['words']:.1%})"
        yield f"    kept images {kept}, of them without boxes of objects {counts['images_without_boxes']}; {unknown}"
    if summary["images_unused"]:
        yield f"in no split: images {summary['images_unused']}, more than train and val take"
    often = f"{info['min_word_freq']} times or more"
    yield f"vocabulary: {summary['vocabulary']} words that occur in train {often}, and <pad>, <unk>, <start>, <end>"


def count(text, least=1):
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is less than {least}")
    return value


def count_or_0(text):
    return count(text, 0)


def parse_arguments(argv=None):
    """The command line, see --help."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "--dataset",
        choices=SOURCES,
        default="scenes",
        help="what to prepare (default: %(default)s)",
    )
    parser.add_argument(
        "--root",
        type=Path,
        help="folder of the raw dataset (default for scenes: the output folder)",
    )
    parser.add_argument("--output", type=Path, help="folder to write (default: data/DATASET)")
    parser.add_argument(
        "--min_word_freq",
        type=count,
        metavar="N",
        help="occurrences in the train captions that a word needs (default: 3, coco2017 4)",
    )
    parser.add_argument(
        "--max_length",
        type=count,
        metavar="N",
        help="words of the longest caption that is kept (default: Flickr 50, coco2017 and scenes 30)",
    )
    parser.add_argument(
        "--features",
        metavar="ENCODER",
        help="also cache the features of this encoder, e.g. vgg16 (default: none)",
    )
    parser.add_argument(
        "--encoder_weights",
        metavar="FILE",
        help="torchvision state dict for --features, or 'random' (default: ImageNet's, downloaded)",
    )
    parser.add_argument(
        "--augment",
        type=count_or_0,
        default=0,
        metavar="K",
        help="also cache K jittered and mirrored versions of the train images (default: %(default)s)",
    )
    parser.add_argument(
        "--regions",
        type=Path,
        metavar="FOLDER",
        help="for --features bottom_up: its SPLIT/IMAGE.hdf5 hold image_features and image_boxes",
    )
    parser.add_argument(
        "--batch_size", type=count, default=32, help="images a step of --features (default: 32)"
    )
    parser.add_argument(
        "--workers",
        type=count_or_0,
        default=2,
        help="processes that decode images, 0 for none beside this one (default: %(default)s)",
    )
    group = parser.add_argument_group("scenes only")
    group.add_argument(
        "--train", type=count, default=5000, help="images to draw for train (default: %(default)s)"
    )
    group.add_argument(
        "--val", type=count, default=500, help="images to draw for val (default: %(default)s)"
    )
    group.add_argument(
        "--test", type=count, default=500, help="images to draw for test (default: %(default)s)"
    )
    group.add_argument(
        "--image_size", type=count, default=128, help="side of a scene in pixels (default: 128)"
    )
    group.add_argument(
        "--bias",
        type=float,
        default=0.9,
        help="probability in train that a planted pair's second object joins the first (default: %(default)s)",
    )
    group.add_argument(
        "--test_bias",
        type=float,
        default=0.6,
        help="the same in val and test (default: %(default)s)",
    )
    add_common_flags(parser)
    return parser.parse_args(argv)


def wanted_encoder(args):
    """The encoder of --features, None without; UserError for flags that do not go together."""
    if (args.features == "bottom_up") != bool(args.regions):
        raise UserError("--features bottom_up and --regions FOLDER belong together")
    for name in ("encoder_weights", "augment"):
        if getattr(args, name) and not args.features:
            raise UserError(f"--{name} goes with --features ENCODER")
    if args.augment and args.regions:
        raise UserError("--augment needs images to jitter, and bottom_up features come without")
    set_seed(args.seed)
    return build_encoder(args.features, args.encoder_weights) if args.features else None


def main():
    """Draw if need be, prepare, and cache features if asked to."""
    args = parse_arguments()
    if args.dataset != "scenes" and not args.root:
        raise UserError(
            f"--dataset {args.dataset} needs --root, the folder with {SOURCES[args.dataset].layout}"
        )
    encoder, device = (
        wanted_encoder(args),
        choose_device(args.device),
    )  # what is wrong with them is told before anything is written
    output = args.output or Path("data") / args.dataset
    root = args.root or output
    if args.dataset == "scenes":
        draw_scenes(
            root,
            output,
            train=args.train,
            val=args.val,
            test=args.test,
            size=args.image_size,
            bias=args.bias,
            test_bias=args.test_bias,
            seed=args.seed,
        )
    info = prepare(
        args.dataset, root, output, args.min_word_freq, args.max_length, args.seed, args.regions
    )
    print(*describe(info), sep="\n")
    print(
        f"{output} is ready: {', '.join(f'{split} {n}' for split, n in info['splits'].items())} images"
    )
    if encoder:
        cache_features(
            output,
            encoder,
            args.batch_size,
            args.workers,
            device,
            args.regions,
            args.augment,
            args.seed,
        )


if __name__ == "__main__":
    run(main)
