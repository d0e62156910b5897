"""Object importance over a split: what is kept of each image, and how robust the captions are.

records = examine_objects(dataset, count, study, path, header)
rows = robustness(records)
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

import distributed
from commandline import file_hash, find_checkpoint
from experiments.inference import mean_estimate
from experiments.records import resumed_records
from experiments.statistics import draw_images, mean_with_interval
from importance import (
    DISTANCES,
    EXACT,
    NOTHING,
    NULL,
    OBJECT,
    Removal,
    SaysNothing,
    importance,
    shares_inside,
)
from readers.objects import object_of
from vocabulary import tokenize

METHODS = ("lrp", "gradcam", "attention")  # the explanations that are compared with importance


@dataclass(frozen=True)
class Study:
    """What the importance of a split's objects is measured by.

    captioner   the captioner
    fillers     {name: filler}, as of `importance.importance`
    removal     a Removal
    sentences   a SentenceModel, or None
    decoding    arguments of the captioner's `caption`
    methods     explanations whose share inside each object is kept, names of explanation.METHODS
    frequency   a function of the words of an object: how many captions of train name it
    scenes      a redrawing.Redrawer for the filler EXACT, or None
    """

    captioner: object
    fillers: dict
    removal: Removal = field(default_factory=Removal)
    sentences: object = None
    decoding: dict = field(default_factory=dict)
    methods: tuple = ()
    frequency: Callable = len
    scenes: object = None


def header_of(checkpoint, dataset, study):
    """What the records of a split depend on; they are kept under it."""
    files = [dataset.folder / f"{name}.json" for name in (dataset.split, "info")]
    fillers = [*study.fillers] + ([EXACT] if study.scenes else [])
    return {
        "checkpoint": file_hash(find_checkpoint(checkpoint)),
        "dataset": [file_hash(file) for file in files],
        "fillers": fillers,
        "removal": vars(study.removal),
        "bert_model": study.sentences.name if study.sentences else None,
        "decoding": study.decoding,
        "methods": list(study.methods),
    }


def examine_objects(dataset, count, study, path, header):
    """The records of the first `count` images of a CaptionDataset; those in `path` are not made
    again. A record is as of `record_of`."""

    def find(missing):
        for index in distributed.shared(missing):
            yield [record_of(dataset, index, study)]

    return resumed_records(count, path, header, find, "removing objects")


def record_of(dataset, index, study):
    """What is kept of an image: a dict of

    index     its number in the dataset
    caption   its words
    too_large how many objects cover too much of it to be removed
    nothing   {filler: distances} when no pixel is removed
    objects   for each object that was removed what `_object_record` says
    """
    entry = dataset.entries[index]
    photograph = dataset.image(index)
    numbers, objects = _objects_of(entry, photograph.size, dataset.info["categories"])
    record = {"index": index, "caption": [], "too_large": 0, "nothing": {}, "objects": []}
    if not objects:
        return record
    try:
        found = _importance(study, index, photograph, numbers, objects)
    except SaysNothing:
        return record
    record["caption"] = found.original.caption
    record["too_large"] = len(objects) - len(found.removed)
    record["nothing"] = _distances(found, NOTHING, None, first=True)
    explained = _explained(study, photograph, found, objects)
    scene = study.scenes.scene(index) if study.scenes else None
    for number in found.removed:
        one = _object_record(found, number, objects[number], entry, study.frequency)
        one |= _looks(entry["objects"][numbers[number]], scene, numbers[number])
        one["explained"] = {name: shares[number] for name, shares in explained.items()}
        record["objects"].append(one)
    return record


def _importance(study, index, photograph, numbers, objects):
    """The Importance of an image's objects; numbers: their indices in the dataset's entry."""
    fillers = dict(study.fillers)
    if study.scenes:
        fillers[EXACT] = _exact_filler(study.scenes, index, numbers)
    return importance(
        study.captioner,
        np.asarray(photograph),
        objects,
        fillers,
        study.removal,
        study.sentences,
        study.decoding,
        index,
    )


def _object_record(found, number, thing, entry, frequency):
    """What is kept of an object: a dict of

    name, words, area   as annotated; its share of the image
    bottom      where it ends, as a share of the image's height: of things that stand on the ground,
                those that are nearer end lower
    frequency   how many captions of train name it
    references  how many of the image's own captions name it
    said        whether the captioner's caption names it
    removed     {filler: its "caption" and distances}
    nulls       {filler: the same of each null control}
    depth       in which order it was drawn, in scenes; a larger one is nearer; else None
    main        whether the scene is about it; else None
    explained   {method: share of its positive relevance inside of the object}

    found: the image's Importance; number, thing: the object's index and ImageObject.
    """
    rows = np.nonzero(thing.mask.any(axis=1))[0]
    references = [tokenize(text) for text in entry["captions"]]
    return {
        "name": thing.name,
        "words": list(thing.words),
        "area": float(thing.mask.mean()),
        "bottom": float((rows[-1] + 1) / len(thing.mask)),
        "frequency": frequency(thing.words),
        "references": sum(names(words, thing.words) for words in references),
        "said": names(found.original.caption, thing.words),
        "removed": _distances(found, OBJECT, number, first=True),
        "nulls": _distances(found, NULL, number),
    }


def _objects_of(entry, size, phrases):
    """The objects of a dataset's entry that can be removed, but for crowds.

    Returns their indices in the entry and the ImageObjects.
    """
    numbers = []
    objects = []
    for number, thing in enumerate(entry["objects"]):
        x0, y0, x1, y1 = thing["bbox"]
        # Some annotated boxes are empty, or end before the first pixel.
        inside = min(x1, size[0]) - max(x0, 0) >= 1 and min(y1, size[1]) - max(y0, 0) >= 1
        if inside and not thing.get("iscrowd"):
            numbers.append(number)
            objects.append(object_of(thing, size, entry["file"], phrases))
    return numbers, objects


def _exact_filler(scenes, index, numbers):
    """The filler that draws an image without an object; it knows no null controls."""

    def fill(image, area):
        if area.kind == NULL:
            return None
        return scenes.without(index, None if area.number is None else numbers[area.number])

    return fill


def _distances(found, kind, number, first=False):
    """{filler: the caption and distances of each Area of this kind}; first: of the first only.

    found: an Importance; number: of the object. A filler that has none is left out.
    """
    by_filler = {}
    for filler, effects in found.effects.items():
        own = []
        for area, effect in zip(found.areas, effects):
            if area.kind == kind and area.number == number and effect is not None:
                own.append({"caption": " ".join(effect.caption), **effect.distances})
        if own:
            by_filler[filler] = own[0] if first else own
    return by_filler


def _explained(study, photograph, found, objects):
    """{method: the share of its positive relevance in each object} of an image's caption."""
    shares = {}
    masks = [thing.mask for thing in objects]
    for method in study.methods:
        explanation = study.captioner.explain([photograph], [found.original.caption], method)[0]
        shares[method] = shares_inside(explanation, masks)
    return shares


def _looks(annotated, scene, number):
    """What only a drawn scene says of an object; None elsewhere."""
    if scene is None:
        return {"depth": None, "main": None}
    return {"depth": scene["objects"][number]["depth"], "main": annotated["main"]}


def names(words, phrases):
    """Whether one of several words or phrases is in a sentence, a list of words."""
    text = f" {' '.join(words)} "
    return any(f" {phrase} " in text for phrase in phrases)


def caption_counter(entries):
    """A function of words or phrases: how many captions of these entries have one of them."""
    texts = []
    with_word = defaultdict(set)
    for entry in entries:
        for caption in entry["captions"]:
            words = tokenize(caption)
            for word in words:
                with_word[word].add(len(texts))
            texts.append(words)

    def count(phrases):
        found = set()
        for phrase in phrases:
            first, *rest = phrase.split()
            candidates = with_word.get(first, set())
            if rest:
                candidates = {number for number in candidates if names(texts[number], [phrase])}
            found |= candidates
        return len(found)

    return count


# ------------------------------------------------------------------------------------- how robust


def objects_of(records):
    """The removed objects of all images in one list, and the number of each one's image."""
    objects = []
    images = []
    for number, record in enumerate(records):
        objects += record["objects"]
        images += [number] * len(record["objects"])
    return objects, images


def robustness(records):
    """Rows, one for each filler and distance:

    filler, distance
    objects                 how many were removed
    unchanged, ..low, ..high   the share of them whose removal leaves the caption as it is
    importance, ..low, ..high  the mean distance when an object is removed
    paired                  how many of the objects have a null control
    null, ..low, ..high     the mean distance of their null controls
    difference, ..low, ..high  of these objects, importance less null
    p                       two-sided, of the difference being zero
    null unchanged          the share of null controls that leave the caption as it is

    Intervals are of 95 %, by drawing images. Without a null control its fields are None.
    """
    objects, images = objects_of(records)
    counts = draw_images(len(records))
    fillers = dict.fromkeys(name for thing in objects for name in thing["removed"])
    rows = []
    for filler in fillers:
        for distance in DISTANCES:
            rows.append(_robustness(records, objects, images, counts, filler, distance))
    return [row for row in rows if row["objects"]]


def _robustness(records, objects, images, counts, filler, distance):
    """One row of `robustness`."""
    captions = {number: " ".join(record["caption"]) for number, record in enumerate(records)}
    values = []
    unchanged = []
    owners = []
    nulls = []
    null_unchanged = []
    paired = []
    null_owners = []
    for thing, number in zip(objects, images):
        effect = thing["removed"][filler]
        if effect[distance] is None:
            continue
        values.append(effect[distance])
        unchanged.append(effect["caption"] == captions[number])
        owners.append(number)
        controls = [one for one in thing["nulls"].get(filler, []) if one[distance] is not None]
        if controls:
            nulls.append(float(np.mean([one[distance] for one in controls])))
            paired.append(effect[distance] - nulls[-1])
            null_owners.append(number)
            null_unchanged += [one["caption"] == captions[number] for one in controls]
    row = {"filler": filler, "distance": distance, "objects": len(values)}
    row |= _with_interval("unchanged", unchanged, owners, counts)
    row |= _with_interval("importance", values, owners, counts)
    row["paired"] = len(nulls)
    row |= _with_interval("null", nulls, null_owners, counts)
    row |= _with_interval("difference", paired, null_owners, counts)
    row["p"] = mean_estimate(paired, null_owners, counts).p if paired else None
    row["null unchanged"] = float(np.mean(null_unchanged)) if null_unchanged else None
    return row


def _with_interval(name, values, images, counts):
    """The fields of a mean and its interval; None without values."""
    found = (None, None, None)
    if values:
        found = [float(number) for number in mean_with_interval(values, images, counts)]
    return dict(zip((name, f"{name} low", f"{name} high"), found))


def nothing_changes(records):
    """The largest distance of an image from itself with nothing removed, of all fillers."""
    largest = 0.0
    for record in records:
        for effect in record["nothing"].values():
            numbers = [abs(effect[name]) for name in DISTANCES if effect[name] is not None]
            largest = max(largest, *numbers)
    return largest
