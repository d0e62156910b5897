"""One's own captions: a file of rows, each with an image and one caption of it.

    image,caption                        {"image": "beach/1.jpg", "caption": "A dog runs."}
    beach/1.jpg,A dog runs.              {"image": "beach/1.jpg", "caption": "A wet dog."}
    beach/1.jpg,"A dog, wet."

The first line of a .csv or .tsv file names its columns; a .jsonl file has an object a line. Images
are named relative to the root folder. Where there is a column "split", it says train, val or test;
else the images are divided by a seed. Other columns are not read.
"""

import csv
import io
import json
import random
from pathlib import Path

from commandline import UserError
from pycocoevalcap.chair.chair import FLICKR_SYNONYMS, read_synonyms
from readers.records import FILE, TEXT, Raw, make_entry

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = ".jsonl"
SPLITS = ("train", "val", "test")
HELD_OUT = 0.1  # the share of the images in val, and in test, where the file names no splits
FEWEST_IMAGES = 3  # one for each split


def read_pairs(root, captions, seed):
    """The Raw of the images in the folder `root` and the file `captions`.

    Each image is an entry, in the order of the file, and is called by its file's name, for it has
    no number. Without a column "split" a tenth of the images, drawn by `seed`, is val and another
    tenth test, at least one each. UserError, with the line, for a file of another kind, a missing
    or empty value, an image outside of the folder, or an image in two splits.
    """
    captions = Path(captions)
    sentences = {}  # {image: its captions}
    places = {}  # {image: (its split or None, the line that says so)}
    for line, row in _rows(captions):
        image = _image_of(row, root, captions, line)
        split = row.get("split")
        known, where = places.setdefault(image, (split, line))
        if split != known:
            raise UserError(
                f"{captions}, line {line}: {image} is in the split '{split}', "
                f"and in '{known}' on line {where}"
            )
        sentences.setdefault(image, []).append(row["caption"].strip())
    if not sentences:
        raise UserError(f"{captions} has no rows")
    named = {image: split for image, (split, _) in places.items()}
    chosen = divided(list(sentences), seed) if None in named.values() else named
    splits = {split: [] for split in SPLITS}
    for image, texts in sentences.items():
        splits[chosen[image]].append(make_entry(image, image, {}, texts))
    filled = {split: entries for split, entries in splits.items() if entries}
    return Raw(filled, root, read_synonyms(FLICKR_SYNONYMS))


def divided(images, seed):
    """{image: its split}: a tenth of the images, drawn by the seed, is val and a tenth test.

    The order of the images does not matter. UserError if there are not enough of them.
    """
    if len(images) < FEWEST_IMAGES:
        raise UserError(
            f"{len(images)} images are too few; train, val and test need at least one each"
        )
    shuffled = sorted(images)
    random.Random(seed).shuffle(shuffled)
    held_out = max(1, round(HELD_OUT * len(images)))
    splits = dict.fromkeys(images, "train")
    splits |= dict.fromkeys(shuffled[:held_out], "val")
    splits |= dict.fromkeys(shuffled[held_out : 2 * held_out], "test")
    return splits


def _image_of(row, root, captions, line):
    """The image of a row, relative to the folder `root`, so that each has one spelling only."""
    path = Path(row["image"])
    top = root.resolve()
    if path.is_absolute() and path.is_relative_to(top):
        path = path.relative_to(top)
    if not row["image"] or not FILE.holds(str(path)):
        raise UserError(
            f"{captions}, line {line}: the image is {row['image'][:80]!r}, not {FILE.description}"
        )
    return path.as_posix()


# --------------------------------------------------------------------------------------------- rows


def _rows(path):
    """Yields (line, row) of a file, a row being a dict of image, caption and, in all rows or in
    none, split."""
    kind = path.suffix.lower()
    if kind not in DELIMITERS and kind != JSON_LINES:
        kinds = ", ".join([*DELIMITERS, JSON_LINES])
        raise UserError(f"{path} is not of a kind that is read: {kinds}")
    text = _text_of(path)
    if kind == JSON_LINES:
        rows = _json_rows(path, text)
    else:
        rows = _table_rows(path, text, DELIMITERS[kind])
    has_split = None
    for line, row in rows:
        for name in ("image", "caption"):
            _require_text(row, name, path, line)
        if has_split is None:
            has_split = "split" in row
        if has_split:
            _require_text(row, "split", path, line)
        if ("split" in row) != has_split:
            raise UserError(
                f"{path}, line {line}: there is a 'split', and the lines before have none"
            )
        if has_split and row["split"] not in SPLITS:
            known = ", ".join(SPLITS)
            raise UserError(f"{path}, line {line}: the split is {row['split']!r}, not of {known}")
        yield line, row


def _require_text(row, name, path, line):
    """UserError unless a row has that value, and it is a text that is not empty."""
    if name not in row:
        raise UserError(f"{path}, line {line}: there is no '{name}'")
    value = row[name]
    if not TEXT.holds(value):
        raise UserError(
            f"{path}, line {line}: the {name} is {repr(value)[:80]}, not {TEXT.description}"
        )
    if not value.strip():
        raise UserError(f"{path}, line {line}: the {name} is empty")


def _text_of(path):
    """The text in a UTF-8 file, without the mark that some programs put first."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text in UTF-8; save it as that") from None


def _json_rows(path, text):
    """Yields (line, dict) of JSON lines; empty lines are passed over."""
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {line}: this is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line}: this is not an object with image and caption")
        yield line, row


def _table_rows(path, text, delimiter):
    """Yields (line, dict) of a table whose first line names the columns."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = _columns(next(reader, []), path)
        for values in reader:
            if not values:
                continue  # an empty line
            if len(values) != len(columns):
                raise UserError(
                    f"{path}, line {reader.line_num}: there are {len(values)} values for "
                    f"{len(columns)} columns; a value that has {delimiter!r} in it stands in quotes"
                )
            yield reader.line_num, dict(zip(columns, values))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _columns(names, path):
    """The names of the columns. UserError unless image and caption are among them, once."""
    names = [name.strip().lower() for name in names]
    for name in ("image", "caption"):
        if name not in names:
            there = ", ".join(names)[:80] or "nothing"
            raise UserError(
                f"{path} has no column '{name}'; its first line has to name the columns, "
                f"and names {there}"
            )
    for name in ("image", "caption", "split"):
        if names.count(name) > 1:
            raise UserError(f"{path} has more than one column '{name}'; each caption has a row")
    return names
