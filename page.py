"""One HTML page of explanations: no server, no other file, and no address in it is asked for.

    html = page([Entry("camera.jpg", photograph, {"lrp": explanation})])

The page holds the photograph as a JPEG, and of each word's heat map one signed byte a pixel. The
script of page_template.html draws them. Everything it shows of an image is in `entry_data`.
"""

import base64
import html
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex
from PIL import Image

from commandline import write_atomically
from plots import CLIP_PERCENTILE, DIVERGING, SEQUENTIAL, drawable_maps

TEMPLATE = Path(__file__).with_name("page_template.html")
PHOTOGRAPH = 900  # pixels of the longer side of a photograph
QUALITY = 85  # of its JPEG
# Bytes that all maps of an image may have; they are base64 in the page, which adds a third.
MAP_BYTES = 350_000
LARGEST_MAP = 128  # pixels of the longer side of a map
SMALLEST_MAP = 24
LEVELS = 127  # that a byte has on each side of zero
STOPS = 9  # colours between which the page interpolates


@dataclass(frozen=True)
class Entry:
    """An image on the page.

    name          what it is called
    photograph    a PIL image
    explanations  {name: Explanation of T words}, such as {"lrp": ...}; an Explanation is anything
                  that has the fields of explanation.Explanation
    boxes         a list of (label, x0, y0, x1, y1) in pixels of the photograph
    """

    name: str
    photograph: Image.Image
    explanations: dict
    boxes: list = field(default_factory=list)


def page(entries, title="Explained captions"):
    """The page of Entries, or of what `entry_data` says of them, as text."""
    data = {
        "entries": [entry_data(entry) if isinstance(entry, Entry) else entry for entry in entries],
        "colours": {"signed": stops(DIVERGING), "sequential": stops(SEQUENTIAL)},
    }
    # In a script only "</" and "<!--" could end it early.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    before, after = template.replace("@TITLE@", html.escape(title)).split("@DATA@")
    return before + text + after


def write_page(path, entries, title="Explained captions"):
    """Write what `page` returns into a file, whole or not at all; returns the path."""
    with write_atomically(path) as temporary:
        temporary.write_text(page(entries, title), encoding="utf-8", errors="replace")
    return path


def entry_data(entry):
    """What the page knows of an Entry:

    name, width, height   of the photograph, in its own pixels
    photograph            a data URI
    layers                for each explanation what `layer_data` says
    boxes                 [label, x0, y0, x1, y1] in parts of the photograph's width and height
    """
    width, height = entry.photograph.size
    count = sum(len(explanation.words) for explanation in entry.explanations.values())
    side = math.isqrt(MAP_BYTES // max(count, 1))
    side = max(SMALLEST_MAP, min(side, LARGEST_MAP))
    boxes = []
    for label, left, top, right, bottom in entry.boxes:
        boxes.append([label, left / width, top / height, right / width, bottom / height])
    return {
        "name": entry.name,
        "width": width,
        "height": height,
        "photograph": photograph_uri(entry.photograph),
        "layers": [layer_data(name, found, side) for name, found in entry.explanations.items()],
        "boxes": boxes,
    }


def photograph_uri(photograph):
    """A PIL image as a data URI of a JPEG, made smaller if need be."""
    smaller = photograph.convert("RGB")
    smaller.thumbnail((PHOTOGRAPH, PHOTOGRAPH), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    smaller.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def layer_data(name, explanation, side):
    """What the page knows of an Explanation of T words. side: the most pixels of a map's side.

    name, words, kind     its name, its words, and how the maps are to be read (gradient_utils.py)
    scores, probabilities T numbers each
    shares                for each word [image, preceding words] of its score; null if relevance is
                          no share of it
    preceding             for each word the relevance of the words before it
    maps                  {"width", "height", "scales": for each word the value of a full byte,
                          "full": for each word the value of the full colour, "bytes": base64 of
                          T x height x width signed bytes}
    heads                 the same of the attention weights, T x heads maps, or null
    """
    words = list(explanation.words)
    preceding = []
    for position in range(len(words)):
        row = explanation.word_relevance[position, 1 : position + 1]
        preceding.append(rounded(row))
    return {
        "name": name,
        "words": words,
        "kind": explanation.kind,
        "scores": rounded(explanation.scores),
        "probabilities": rounded(explanation.probabilities),
        "shares": rounded(explanation.score_shares()) if explanation.additive else None,
        "preceding": preceding,
        "maps": quantised(smaller_maps(drawable_maps(explanation), side)),
        "heads": head_maps(explanation.attention),
    }


def smaller_maps(maps, side):
    """Maps (T, H, W) whose longer side has at most so many pixels, by averaging."""
    height, width = maps.shape[1:]
    factor = min(1, side / max(height, width))
    size = (max(1, round(factor * height)), max(1, round(factor * width)))
    return F.adaptive_avg_pool2d(torch.as_tensor(maps)[None], size)[0].numpy()


def quantised(maps):
    """Maps (N, h, w) as signed bytes, each map by its own largest value; see `layer_data`."""
    # As the page has them, so that rounding does not move a map.
    scales = np.array(rounded(np.abs(maps).max(axis=(1, 2), initial=0)))
    full = [np.percentile(np.abs(values), CLIP_PERCENTILE) for values in maps]
    shares = maps / np.where(scales > 0, scales, 1)[:, None, None]
    levels = np.rint(LEVELS * shares).astype(np.int8)
    return {
        "width": maps.shape[2],
        "height": maps.shape[1],
        "scales": scales.tolist(),
        "full": rounded(np.array(full)),
        "bytes": base64.b64encode(levels.tobytes()).decode(),
    }


def head_maps(attention):
    """The attention weights (T, heads, L) of a square grid of regions as maps, or None.

    "count" says how many heads there are; the maps of a word follow one another.
    """
    count, heads, regions = attention.shape
    side = math.isqrt(regions)
    if not count or side * side != regions:
        return None
    maps = attention.float().reshape(count * heads, side, side).numpy()
    return {"count": heads, **quantised(maps)}


def rounded(values):
    """Numbers of an array as nested lists, in five digits, which keeps the page small."""
    if isinstance(values, np.ndarray | torch.Tensor):
        values = values.tolist()
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.5g}")


def stops(colours):
    """Colours of a matplotlib colour map at equal distances, as hexadecimal texts."""
    return [to_hex(colours(share)) for share in np.linspace(0, 1, STOPS)]
