"""The boxes of Flickr30k Entities (Plummer et al. 2015): Annotations/<image>.xml holds the boxes of
chains of phrases, Sentences/<image>.txt the captions in which these phrases are marked."""

import re
from collections import defaultdict
from xml.etree import ElementTree

from commandline import UserError
from images import image_size
from pycocoevalcap.chair.chair import mentioned_objects
from readers.records import require_folder
from vocabulary import tokenize

FOLDERS = ("Flickr30kEntities", "flickr30k_entities")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
# What reading a damaged file raises.
DAMAGES = (ElementTree.ParseError, TypeError, ValueError, ZeroDivisionError)


def find_entities(root):
    """The folder of Flickr30k Entities in `root`, None if there is none. UserError if a part of it
    is missing."""
    for name in FOLDERS:
        folder = root / name
        if folder.exists():
            for part in ("Annotations", "Sentences"):
                require_folder(folder / part, f"the {part} of Flickr30k Entities")
            return folder
    return None


def read_entities(folder, image, phrases):
    """The objects of one image file in Flickr30k Entities, [] if the image is not in there.

    A box belongs to a chain of phrases in the sentences: "words" are their last words, its
    "category" is what these name, or the first of them where they name no category. Boxes are
    scaled from the annotated picture to the size of the file. UserError for damaged files.
    """
    name = image.stem.split("_")[0]  # Flickr8k adds a second number
    annotation = folder / "Annotations" / f"{name}.xml"
    sentences = folder / "Sentences" / f"{name}.txt"
    if not annotation.is_file() or not image.is_file():
        return []
    try:
        tree = ElementTree.parse(annotation)
        chains = _words_of_chains(sentences.read_text(encoding="utf-8"))
        things = _scaled_boxes(tree, image)
    except (OSError, *DAMAGES) as error:
        raise UserError(
            f"{annotation} or {sentences} is missing, damaged or not of Flickr30k Entities "
            f"({error})"
        ) from None
    objects = []
    for chain, boxes in things:
        words = chains.get(chain)
        if words:
            category = next(iter(mentioned_objects(words, phrases)), words[0])
            for box in boxes:
                objects.append({"category": category, "bbox": box, "words": words})
    return objects


def read_entities_file(annotation, image):
    """The objects in one Annotations file, for the image file that it is of, dicts as above.

    The words come from ../Sentences/<its name>.txt. Without that file an object is called by the
    number of its chain. UserError for a damaged file.
    """
    sentences = annotation.parent.parent / "Sentences" / f"{annotation.stem}.txt"
    try:
        things = _scaled_boxes(ElementTree.parse(annotation), image)
        chains = {}
        if sentences.is_file():
            chains = _words_of_chains(sentences.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {annotation}") from None
    except DAMAGES as error:
        raise UserError(
            f"{annotation} or {sentences} is damaged or not of Flickr30k Entities ({error})"
        ) from None
    objects = []
    for chain, boxes in things:
        words = chains.get(chain) or [chain]
        for box in boxes:
            objects.append({"category": words[0], "bbox": box, "words": words})
    return objects


def _words_of_chains(text):
    """{chain: the different last words of its phrases} of a Sentences file, whose phrases read
    [/EN#<chain>/<types> <words>]."""
    chains = defaultdict(list)
    for chain, phrase in re.findall(r"\[/EN#(\d+)/\S+ ([^\]]+)\]", text):
        chains[chain] += tokenize(phrase)[-1:]
    return {chain: list(dict.fromkeys(words)) for chain, words in chains.items()}


def _scaled_boxes(tree, image):
    """[(chain, its boxes x1 y1 x2 y2 in pixels of the image file)] of an Annotations file."""
    scale = []
    for side, true_length in zip(("width", "height"), image_size(image)):
        scale.append(true_length / int(tree.findtext(f"size/{side}")))
    things = []
    for thing in tree.iter("object"):
        boxes = []
        for box in thing.iter("bndbox"):
            numbers = [int(box.findtext(corner)) for corner in CORNERS]
            boxes.append([number * factor for number, factor in zip(numbers, scale * 2)])
        things += [(element.text, boxes) for element in thing.iter("name")]
    return things
