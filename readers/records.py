"""The form into which every reader puts its dataset, and the checks that all readers share."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from commandline import UserError

ARCHIVES = (".zip", ".tar", ".gz", ".tgz")


@dataclass
class Raw:
    """A dataset as a reader returns it.

    splits: {split: entries}, see `make_entry`; images_root: the folder that the entries' files are
    in; categories: {category: words and phrases that name it}; planted_pairs: [main object,
    companion] of the scenes; images_unused: how many images are in no split.
    """

    splits: dict
    images_root: Path
    categories: dict = field(default_factory=dict)
    planted_pairs: list = field(default_factory=list)
    images_unused: int = 0


def make_entry(image_id, file, image, captions, objects=()):
    """What is kept of an image: a dict of image_id, file, width, height (None where the record
    `image` does not say), captions (texts) and objects.

    An object is a dict of at least its category and its bbox, x1 y1 x2 y2 in pixels.
    """
    return {
        "image_id": image_id,
        "file": file,
        "width": image.get("width"),
        "height": image.get("height"),
        "captions": captions,
        "objects": list(objects),
    }


# ------------------------------------------------------------------------------------------ records


class FieldType(NamedTuple):
    """What a field of a record has to be: in words, and as a test of its value."""

    description: str
    holds: Callable


def _is_whole_number(value):
    return isinstance(value, int)


def _is_list(value):
    return isinstance(value, list)


def _is_text(value):
    """Whether it can be written as UTF-8. Half a surrogate pair, the end of a caption that was cut
    in an emoji, cannot."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_inside(value):
    """Whether it is a path that cannot lead out of the folder that it is looked for in."""
    if not _is_text(value) or value == "" or os.path.isabs(value):
        return False
    return ".." not in Path(value).parts


def _is_box(value):
    if not isinstance(value, list) or len(value) != 4:
        return False
    return all(isinstance(number, (int, float)) and math.isfinite(number) for number in value)


WHOLE_NUMBER = FieldType("a whole number", _is_whole_number)
TEXT = FieldType("a text", _is_text)
FILE = FieldType("a file name inside the images folder", _is_inside)
BOX = FieldType("four numbers", _is_box)
LIST = FieldType("a list", _is_list)
FIELDS = {  # what is read of the records in the datasets' own files
    "id": WHOLE_NUMBER,
    "image_id": WHOLE_NUMBER,
    "category_id": WHOLE_NUMBER,
    "imgid": WHOLE_NUMBER,
    "file_name": FILE,
    "filename": FILE,
    "filepath": FILE,
    "cocoid": WHOLE_NUMBER,
    "caption": TEXT,
    "raw": TEXT,
    "name": TEXT,
    "split": TEXT,
    "bbox": BOX,
    "sentences": LIST,
}


def require_records(records, names, part, complaint):
    """UserError, `complaint` and the reason, unless `records`, the list `part` of a file, is a list
    of dicts whose fields `names` are as FIELDS wants them."""
    if not isinstance(records, list):
        raise UserError(f"{complaint}: it has no list '{part}'")
    fields = [(name, FIELDS[name]) for name in sorted(names)]
    for number, record in enumerate(records):
        for name, wanted in fields:
            if not isinstance(record, dict) or name not in record:
                raise UserError(f"{complaint}: {part}[{number}] has no '{name}'")
            if not wanted.holds(record[name]):
                shown = repr(record[name])[:80]
                raise UserError(
                    f"{complaint}, or is damaged: '{name}' of {part}[{number}] is {shown}, "
                    f"not {wanted.description}"
                )


def require_unique(ids, path):
    """UserError if the file `path` lists an image id more than once."""
    doubled = [key for key, count in Counter(ids).items() if count > 1]
    if doubled:
        raise UserError(
            f"{path} lists the image id {doubled[0]} more than once ({len(doubled)} such ids)"
        )


def valid_text(text):
    """The text with a question mark for each half of a character (a lone surrogate), which JSON
    allows and UTF-8 does not."""
    return text.encode(errors="replace").decode()


# ------------------------------------------------------------------------------------------ folders


def require_folder(path, what):
    """UserError unless `path` is a folder; `what` says what it is for."""
    if path.is_file():
        hint = "a file, not a folder"
        if path.suffix in ARCHIVES:
            hint = "an archive; unpack it and give the folder"
        raise UserError(f"{path} ({what}) is {hint}")
    if not path.is_dir():
        raise UserError(f"there is no folder {path} ({what}){archives_in(path.parent, path.name)}")


def archives_in(folder, word=""):
    """What to do about archives in a folder that were not unpacked and have that word in their
    names; "" if there are none."""
    names = []
    for path in sorted(folder.glob("*")):
        if path.suffix in ARCHIVES and word.lower() in path.name.lower():
            names.append(path.name)
    return f"; unpack {', '.join(names)} in {folder}" if names else ""
