"""The embedded dataset: draws small pictures of everyday scenes and writes them in COCO's formats.

`write_scenes(folder)` makes `annotations/{captions,instances,scenes}_{train,val,test}.json` and the
JPEG images in `train/`, `val/` and `test/`; `draw_scenes` does so unless they are there, and
`preparedataset.py --dataset scenes` calls it. Everything that is said about an image is exact, for
captions and masks come from the same description as the picture. A language habit is planted: six
categories as main object nearly always bring a small companion in train (`bias`) and less often in
val and test (`test_bias`), so a captioner that guesses from habit says things that are not there.

Objects and backdrops are data: lines of `kind colour numbers` (see `parse`), one drawing for a
pose, 100 units high.
"""

import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageOps
from pycocotools import mask as rle
from tqdm import tqdm

from captiondata import remove_prepared
from commandline import UserError, read_json, write_json

SPLITS = ("train", "val", "test")
FIRST_ID = {"train": 1_000_000, "val": 2_000_000, "test": 3_000_000}  # unique over the splits
CAPTIONS = 5  # an image
LENGTHS = (5, 16)  # of a caption, in tokens
# The least visible part of a main object (True) and of another one; below it all are placed anew.
LEAST_VISIBLE = {True: 0.75, False: 0.45}
PATIENCE = 12  # attempts at placing before one object is left out
ATTEMPTS = 100 * PATIENCE
FINE = 3  # objects are drawn this many times larger, then reduced
QUALITY = 90  # of the JPEG files

# The version of the code that turns shapes into pixels and masks, for `fingerprint`, which does not
# see pixels: another release of Pillow shall not redraw a user's scenes. Raise it with any change
# of that code that changes an image; tests/test_scenes.py tells whether one did.
RENDERING = 1
# Until commit cad3b9d a folder recorded the hash of scenes.py itself; of that commit's file it is
# OLD_SOURCE, and what it drew has the fingerprint OLD_DRAWINGS.
OLD_SOURCE = "b0e19b85fbad889c"
OLD_DRAWINGS = "afc078ad8d64e64c"

# ------------------------------------------------------------------------------------------ drawing


def lines_of(text):
    """The lines of a drawing, stripped and not empty; a semicolon ends one too."""
    stripped = [line.strip() for line in re.split("[;\n]", text)]
    return [line for line in stripped if line]


def parse(text):
    """The shapes in `text` as a list of (kind, colour, width, points (n, 2)).

    A line reads `kind[width] colour x y x y ...`. Kinds: `ellipse`, `rect`, `round` (width: corner
    radius), `ring` (width: of its line), `dome` and `bowl` (upper and lower half of an ellipse)
    take the corners of a box; `poly` and `line` take points, `blob` and `curve` are these two made
    smooth; `hand`, `top` and `under` draw nothing: they mark where to put a companion.
    """
    shapes = []
    for line in lines_of(text):
        kind, colour, *numbers = line.split()
        kind, width = re.fullmatch(r"([a-z]+)([\d.]*)", kind).groups()
        points = np.array(numbers, float).reshape(-1, 2)
        if kind == "blob":
            kind = "poly"
            points = smooth(points, closed=True)
        elif kind == "curve":
            kind = "line"
            points = smooth(points, closed=False)
        shapes.append((kind, colour, float(width or 0), points))
    return shapes


def smooth(points, closed, steps=6):
    """A Catmull-Rom spline through `points` (n, 2), `steps` points for each stretch."""
    if closed:
        ring = np.concatenate([points[-1:], points, points[:2]])
    else:
        ring = np.concatenate([points[:1], points, points[-1:]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = []
    for a, b, c, d in zip(ring, ring[1:], ring[2:], ring[3:]):
        curvature = 2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)
        pieces.append(b + 0.5 * t * (c - a + t * curvature))
    if not closed:
        pieces.append(points[-1:])
    return np.concatenate(pieces)


def paint(draw, shapes, palette, scale, origin):
    """Draw parsed shapes: a point p goes to (p - origin) * scale, a colour is a key of `palette` or
    #rrggbb[aa]."""
    for kind, colour, width, points in shapes:
        if colour != "-":
            xy = ((points - origin) * scale).ravel().tolist()
            PAINTERS[kind](draw, xy, palette.get(colour, colour), width * scale)


def paint_line(draw, xy, fill, width):
    """Draw a line through points, with round ends if it is wide enough to show them."""
    draw.line(xy, fill, max(1, round(width)), joint="curve")
    r = width / 2
    if r > 1:
        for x, y in (xy[:2], xy[-2:]):
            draw.ellipse((x - r, y - r, x + r, y + r), fill)


PAINTERS = {
    "ellipse": lambda draw, xy, fill, width: draw.ellipse(xy, fill),
    "rect": lambda draw, xy, fill, width: draw.rectangle(xy, fill),
    "round": lambda draw, xy, fill, width: draw.rounded_rectangle(xy, width, fill),
    "ring": lambda draw, xy, fill, width: draw.ellipse(xy, None, fill, max(1, round(width))),
    "dome": lambda draw, xy, fill, width: draw.pieslice(xy, 180, 360, fill),
    "bowl": lambda draw, xy, fill, width: draw.pieslice(xy, 0, 180, fill),
    "poly": lambda draw, xy, fill, width: draw.polygon(xy, fill),
    "line": paint_line,
}


def mix(colour, other, amount):
    """`colour` with the fraction `amount` of `other` in it; both '#rrggbb'."""
    mixed = "#"
    for x, y in zip(ImageColor.getrgb(colour), ImageColor.getrgb(other)):
        mixed += f"{round(x + (y - x) * amount):02x}"
    return mixed


# ------------------------------------------------------------------------------ drawings of objects

COLOURS = {
    "red": "#d8392f", "blue": "#2f6fd6", "green": "#379c48", "yellow": "#f2c42b",
    "orange": "#ee8427", "purple": "#8a4cb8", "pink": "#ee7fb2", "white": "#f4f2ec",
    "black": "#33353c", "brown": "#8b5a32", "gray": "#8b929b", "golden": "#d9a247",
    "tan": "#cfa36c",
}  # fmt: skip
SKIN = ("#f3cba8", "#e3ac80", "#c68a5c", "#8d5a38")
HAIR = ("#2b2220", "#5a3820", "#8c5a2b")
TROUSERS = ("#2c3550", "#4a4a52", "#6a5740", "#39506e")

# pose: ((upper arm, forearm) of the far and the near arm, (thigh, shin) of the far and the near
# leg); degrees from hanging down, positive to the front
LIMBS = {
    "standing": (((-14, -6), (22, 75)), ((-5, -3), (6, 3))),
    "walking": (((-34, -8), (34, 70)), ((-26, -34), (27, 14))),
    "waving": (((-22, -8), (120, 165)), ((-7, -4), (8, 4))),
    "running": (((-52, 10), (48, 105)), ((-28, -80), (48, 8))),
    "jumping": (((-125, -150), (125, 150)), ((-30, -62), (30, 62))),
}


def limb(x, y, length, angles):
    """'x y x y x y' of a limb whose two parts of `length` hang from (x, y) at these angles in
    degrees."""
    points = [(x, y)]
    for angle in angles:
        x = x + length * math.sin(math.radians(angle))
        y = y + length * math.cos(math.radians(angle))
        points.append((x, y))
    return " ".join(f"{x:.1f} {y:.1f}" for x, y in points)


def end_of(points):
    """The last point (x, y) of a limb: its hand or foot."""
    x, y = points.split()[-2:]
    return float(x), float(y)


def person(pose, wide, shoulder, hip, arm, leg, bone, cloth, sleeve, trousers, middle):
    """Limbs round the text `middle` (torso and head): the far arm and the legs are behind it, the
    near arm is in front.

    wide: from the middle to a shoulder; shoulder, hip: their heights; arm, leg: lengths of half a
    limb; bone: thickness of an arm; cloth, sleeve, trousers: the colours of upper arm, arm and leg.
    """
    (far_arm, near_arm), leg_angles = LIMBS[pose]
    far = limb(-wide, shoulder, arm, far_arm)
    near = limb(wide, shoulder, arm, near_arm)
    text = f"line{bone} {sleeve} {far}\n"
    for side, angles in zip((-1, 1), leg_angles):
        points = limb(side * wide * 0.42, hip, leg, angles)
        x, y = end_of(points)
        text += f"line{bone * 1.3:.1f} {trousers} {points}\n"
        text += f"round2 d {x - bone * 0.7} {y - 1} {x + bone * 1.25} {y + bone * 0.6}\n"
    x, y = end_of(near)
    hand = f"{disc('s', x, y, bone * 0.55)}hand - {x} {y}"
    upper = " ".join(near.split()[:4])
    return f"{text}{middle}\nline{bone} {sleeve} {near}\nline{bone + 0.6} {cloth} {upper}\n{hand}"


def man(pose):
    """A man in a shirt and trousers."""
    middle = """
        round5 a -13.5 19 13.5 59 ; rect d -13 56 13 59 ; line6 s 0 13 0 20
        ellipse s -8.5 0 8.5 19 ; poly h -8.8 12 -9 5 -5 -1.5 3 -2.5 9 2 9 9 6 5 -4 5 -6 12
        bowl h -8 7 8 20 ; ellipse s -4.5 8 8 14.5 ; ellipse #222222 0 7 2.4 9.6
        ellipse #222222 5 7 7.4 9.6 ; line1.2 #b5594a 0 15 5 15"""
    return person(pose, 12, 25, 56, 15.5, 21, 6, "b", "s", "t", middle)


def woman(pose):
    """A woman with long hair in a dress."""
    hair = "blob h -9 2 0 -3 9 2 11 14 13 30 2 27 -14 34 -12 14\n"
    middle = """
        line5 s 0 15 0 23 ; poly a -9 21 9 21 11 28 7.5 42 20 73 -20 73 -7.5 42 -11 28
        poly b -20 73 -12 56 -6 73 ; rect c -7.6 41 7.6 44.5 ; ellipse s -8 1 8 19
        blob h -9.5 14 -9 3 0 -3.5 9 2 9.5 11 6 6 -1 5.5 -6 9 ; ellipse #222222 -.5 9 2 11.8
        ellipse #222222 4.2 9 6.7 11.8 ; line1.6 #d0454c 0 15.5 5 15.5"""
    return hair + person(pose, 9.5, 26, 62, 14, 18.5, 5, "a", "s", "s", middle)


def child(pose):
    """A child in a striped shirt and a cap, its head large."""
    middle = """
        round6 a -14 36 14 68 ; rect c -14 44 14 49 ; rect c -14 55 14 60
        round3 t -14.5 65 14.5 80 ; ellipse s -19 2 19 39 ; ellipse s -22 18 -15 27
        dome b -19.5 -3 19.5 34 ; round2 d 2 13 30 18 ; ellipse #222222 2 20 6.2 26
        ellipse #222222 11 20 15.2 26 ; ellipse #e98a8066 14 26 20 31
        curve1.8 #b5594a 4 31 8 33.5 12 31"""
    return person(pose, 12.5, 43, 70, 11.5, 12.5, 7, "a", "s", "s", middle)


SWING = {  # pose: how far (hind, fore) feet are from under the hip, near side then far side
    "standing": ((-1, 1), (7, -7)),
    "eating": ((-1, 5), (7, -3)),
    "walking": ((-10, 9), (13, -10)),
    "running": ((-26, 26), (-17, 15)),
}


def animal(pose, hind, fore, hip, width, hoof, body, front, tail, tones=("a", "b")):
    """A four-legged animal that faces +x: far legs, tail, body, near legs and then the head.

    hind, fore: where its legs begin; hip: at which height; width: of a leg; hoof: the hoofs'
    colour; body, front, tail: texts; tones: colours of the near and far legs. Feet stand on 100.
    """
    near_swing, far_swing = SWING[pose]
    foot = 90 if pose == "running" else 99
    near = legs(near_swing, hind, fore, hip, foot, width, hoof, tones[0])
    far = legs(far_swing, hind, fore, hip, foot, width, hoof, tones[1])
    return f"{far}{tail}\n{body}\n{near}{front}"


def legs(swings, hind, fore, hip, foot, width, hoof, tone):
    """The hind and the fore leg of one side of an animal, see `animal`."""
    text = ""
    for x, swing, bend in ((hind, swings[0], 3), (fore, swings[1], -1)):
        knee = f"{x + swing * 0.3 + bend} {(hip + foot) / 2}"
        end = x + swing
        text += f"line{width} {tone} {x} {hip} {knee} {end} {foot - 2}\n"
        text += f"round1 {hoof} {end - width * 0.5} {foot - 5} {end + width * 0.75} {foot}\n"
    return text


def moved(text, dx, dy):
    """The same shapes, moved by (dx, dy)."""
    lines = []
    for line in lines_of(text):
        kind, colour, *numbers = line.split()
        steps = itertools.cycle((dx, dy))
        places = [f"{float(number) + step:.1f}" for number, step in zip(numbers, steps)]
        lines.append(" ".join([kind, colour, *places]))
    return "\n".join(lines)


def disc(colour, x, y, r):
    """A filled circle of radius `r` round (x, y)."""
    return f"ellipse {colour} {x - r} {y - r} {x + r} {y + r}\n"


DOG_HEAD = """ellipse a 60 8 88 36 ; round6 c 76 20 104 36 ; ellipse #222222 97 17 106 26
    line1.6 d 84 31 100 31 ; ellipse #222222 78 14 83 20 ; blob d 62 8 71 8 74 24 68 38 59 30"""


def dog(pose):
    """A dog with hanging ears and a collar."""
    if pose == "sitting":
        return f"""curve7 a 14 94 -4 92 -13 78
            blob a 8 97 4 78 18 52 40 36 60 38 66 56 64 80 60 97
            blob b 10 98 8 80 24 72 40 84 42 99 ; line9 a 57 60 58 95 ; round3 a 53 92 71 99
            blob c 56 48 66 46 67 66 60 70 ; {moved(DOG_HEAD, -16, 1)} ; line5 r 46 40 62 42"""
    body = "blob a 0 54 8 46 36 49 58 40 74 46 75 62 62 74 36 69 12 73 2 66"
    front = f"line17 a 64 52 71 32 ; {DOG_HEAD} ; line5 r 60 39 78 45"
    return animal(pose, 12, 60, 66, 9, "c", body, front, "curve6.5 a 5 52 -10 42 -12 22")


CAT_HEAD = """poly a 58 34 58 8 71 22 ; poly a 79 22 92 8 92 34 ; poly #efa3a8 61 26 61 15 68 22
    poly #efa3a8 82 22 89 15 89 26 ; ellipse a 55 16 95 50 ; line2.4 d 75 17 75 25
    line2.4 d 68 19 69 26 ; line2.4 d 82 19 81 26 ; ellipse #d7e36a 62 27 71 36
    ellipse #d7e36a 79 27 88 36 ; ellipse #222222 65 27 68.5 36 ; ellipse #222222 82 27 85.5 36
    ellipse c 67 36 83 48 ; poly #d9707a 72 37 78 37 75 41 ; line1 #ffffff 52 36 66 40
    line1 #ffffff 84 40 98 36 ; line1 #ffffff 53 45 66 43 ; line1 #ffffff 84 43 97 45"""
STRIPES = "line3 d 18 52 19 65 ; line3 d 29 51 30 64 ; line3 d 40 52 41 65"


def cat(pose):
    """A striped cat whose face looks at us."""
    if pose == "sitting":
        return f"""curve7 a 62 95 96 96 108 82 102 64
            blob a 50 98 46 78 56 52 75 44 94 52 104 78 100 98
            blob c 66 52 75 48 84 52 80 76 70 76 ; line9 a 68 70 67 95 ; line9 a 82 70 83 95
            ellipse c 60 91 73 99 ; ellipse c 77 91 90 99 ; line3 d 51 68 59 70
            line3 d 50 78 58 79 ; line3 d 91 70 99 68 ; line3 d 92 79 100 78
            {moved(CAT_HEAD, 0, -1)}"""
    if pose == "lying":
        return f"""curve8 a 4 88 -14 94 -6 100 20 99
            blob a 2 96 -2 78 10 58 40 52 72 60 84 80 82 98 30 100 ; {moved(STRIPES, -2, 8)}
            round4 c 60 92 96 100 ; {moved(CAT_HEAD, 4, 33)}"""
    body = f"blob a -2 62 6 50 34 52 60 48 70 58 66 74 36 76 8 78 ; {STRIPES}"
    tail = "curve6.5 a 2 58 -16 48 -20 26 -10 10"
    return animal(pose, 8, 58, 70, 8, "c", body, moved(CAT_HEAD, 2, 4), tail)


def horse(pose):
    """A horse with a dark mane; eating, its head is down."""
    head = """poly a 56 46 72 10 86 14 76 50 ; blob a 72 8 84 5 104 24 101 33 90 31 78 22
        poly a 76 9 79 -3 84 7 ; ellipse #222222 86 13 89.5 17 ; ellipse d 98 25 101 28
        poly d 56 42 68 4 78 0 78 8 72 22 62 46"""
    if pose == "eating":
        head = """poly a 58 40 78 44 98 72 86 78 60 58
            blob a 84 66 98 66 104 84 100 97 92 97 86 80 ; poly a 92 66 97 57 100 68
            ellipse #222222 95 74 98 78 ; poly d 58 38 78 38 96 62 90 66 76 52"""
    body = "blob a 0 44 8 34 34 38 58 34 74 40 74 56 62 63 36 60 10 64 1 56 ; top - 34 37"
    return animal(pose, 10, 62, 56, 7.5, "#2d2620", body, head, "curve8 d 2 40 -10 48 -12 74")


def cow(pose):
    """A patched cow with horns; eating, its head is down."""
    head = """line3.5 #e8dcc0 70 22 66 12 ; line3.5 #e8dcc0 84 22 89 12 ; ellipse p 58 24 72 33
        ellipse p 84 24 97 33 ; round7 a 68 20 88 50 ; round5 #eeb0a4 66 42 90 57
        ellipse #7a4a45 71 47 74 51 ; ellipse #7a4a45 82 47 85 51 ; ellipse #222222 71 30 75 35
        ellipse #222222 82 30 86 35"""
    body = """ellipse #eeb0a4 20 62 36 77 ; round12 a 0 29 74 71
        blob p 8 32 24 30 26 48 14 54 6 46 ; blob p 38 31 56 31 58 44 48 50 40 44
        blob p 28 56 38 52 40 66 30 66 ; top - 34 31"""
    tail = "curve3.5 a 2 36 -7 48 -6 66 ; ellipse p -10 64 -3 74"
    head = moved(head, 2, 36 if pose == "eating" else 0)
    return animal(pose, 10, 62, 66, 10, "#3a302a", body, head, tail)


WOOL = (  # (x, y, radius) of the discs that a fleece is made of
    (8, 54, 14), (14, 38, 14), (32, 32, 15), (50, 33, 14), (64, 42, 13),
    (66, 57, 13), (50, 66, 14), (30, 67, 14), (13, 65, 12), (36, 50, 24),
)  # fmt: skip
CURLS = ((12, 42), (30, 38), (48, 44), (20, 58), (40, 60), (58, 56))  # where its curls begin


def sheep(pose):
    """A woolly sheep with a dark face; eating, its head is down."""
    wool = "".join(disc("a", x, y, r) for x, y, r in WOOL)
    curls = "\n".join(f"curve1.6 e {x} {y} {x + 4} {y + 5} {x + 9} {y + 1}" for x, y in CURLS)
    head = """ellipse #3c3836 54 30 72 38 ; ellipse #3c3836 80 30 97 38
        blob #3c3836 66 26 86 26 88 42 80 56 72 56 65 42 ; ellipse a 64 18 88 35
        ellipse #ffffff 69 36 74 41 ; ellipse #ffffff 79 36 84 41 ; ellipse #222222 71 37 74 41
        ellipse #222222 80 37 83 41"""
    head = moved(head, 0, 34 if pose == "eating" else 0)
    body = f"{wool}\n{curls}"
    tones = ("#3c3836", "#2e2b29")
    return animal(pose, 16, 58, 72, 7, "#221f1e", body, head, "ellipse a -10 42 2 58", tones)


SPOTS = (  # where a giraffe's spots begin
    (4, 52), (13, 50), (22, 52), (31, 50), (8, 60), (18, 60),
    (28, 59), (37, 42), (40, 33), (43, 24), (45, 15), (36, 56),
)  # fmt: skip


def giraffe(pose):
    """A spotted giraffe."""
    spots = ""
    for x, y in SPOTS:
        spots += f"blob p {x} {y} {x + 5} {y - 1} {x + 6} {y + 4} {x + 2} {y + 6}\n"
    body = "blob a 0 58 4 50 24 48 40 44 46 52 44 64 30 67 8 68 ; poly a 32 50 42 10 52 10 47 56"
    head = f"""{spots} ; line2.6 p 46 8 45 -1 ; line2.6 p 50 8 50 -1
        blob a 42 6 52 5 66 15 65 20 56 20 44 17 ; poly b 40 9 34 5 43 6
        ellipse #222222 51 8 54 11.5 ; ellipse c 60 14 67 21 ; line2 p 33 46 41 10"""
    tail = "curve2.6 a 1 54 -6 62 -6 72 ; ellipse p -8 71 -4 79"
    return animal(pose, 6, 36, 62, 5, "#5a4028", body, head, tail)


def elephant(pose):
    """An elephant with a tusk."""
    body = "blob a 0 60 4 30 26 16 56 16 78 26 82 52 72 76 40 78 10 80 ; top - 40 18"
    head = """ellipse a 62 12 100 54 ; curve11 a 92 38 103 56 101 78 108 88
        curve4 #f6f1e2 90 52 98 62 108 62 ; blob b 58 18 76 14 84 30 78 52 66 58 58 40
        ellipse #222222 89 26 93 31"""
    tail = "curve3 b 2 42 -7 54 -6 66"
    return animal(pose, 16, 64, 66, 17, "#5f656d", body, head, tail)


def bird(pose):
    """A bird with an orange beak, on its feet or in flight."""
    head = """ellipse a 60 14 88 42 ; poly #f2a01f 86 23 104 30 86 34 ; ellipse #ffffff 75 20 83 28
        ellipse #222222 78 21 83 27"""
    if pose == "flying":
        return f"""poly d -4 56 22 58 20 76 -10 74 ; blob b 38 56 30 20 36 2 54 30 62 54
            blob a 8 66 30 52 64 52 86 56 84 72 54 84 24 80 ; {moved(head, 2, 32)}
            blob d 30 62 8 30 2 6 34 24 58 62 ; blob c 40 78 62 68 78 72 66 83"""
    return f"""poly d -12 66 20 52 24 70 -6 82 ; line3 #d9861c 42 78 40 97
        line3 #d9861c 52 78 52 97 ; line3 #d9861c 36 98 48 98 ; line3 #d9861c 49 98 60 98
        blob a 10 58 30 42 62 26 84 34 82 58 66 78 40 84 18 76
        blob c 54 60 76 46 80 58 64 77 48 80 ; {head}
        blob d 10 62 26 46 52 50 58 62 40 74 16 76"""


def wheel(x, y, r):
    """A wheel of radius `r` round (x, y)."""
    return disc("#26282c", x, y, r) + disc("#c9ced4", x, y, r / 2)


def spokes(x):
    """A bicycle's wheel round x."""
    return f"""ring5 #24262a {x - 30} 38 {x + 30} 98 ; line1 #9aa0a6 {x} 40 {x} 96
        line1 #9aa0a6 {x - 28} 68 {x + 28} 68
        line1 #9aa0a6 {x - 20} 48 {x + 20} 88 ; line1 #9aa0a6 {x - 20} 88 {x + 20} 48"""


RIGID = {  # what has but one pose; the last six are the small companions
    "car": f"""poly b 38 40 58 8 118 8 144 40 ; poly #bfe3f2 46 40 62 14 86 14 86 40
        poly #bfe3f2 91 40 91 14 115 14 134 40 ; round14 a 0 36 184 82 ; rect c 4 52 180 57
        rect d 0 72 184 82 ; ellipse #fff3b0 170 46 184 58 ; round2 #c22f2a 0 46 8 58
        line2 d 88 42 88 72 ; round1 d 94 58 104 61 ; {wheel(40, 82, 18)} ; {wheel(144, 82, 18)}
        top - 90 9""",
    "bus": f"""round9 a 0 0 206 88 ; rect #ffffffcc 0 54 206 60 ; rect d 0 80 206 88
        round3 #c7e8f5 10 16 34 46 ; round3 #c7e8f5 39 16 63 46 ; round3 #c7e8f5 68 16 92 46
        round3 #c7e8f5 97 16 121 46 ; round3 #c7e8f5 126 16 150 46 ; round3 #c7e8f5 188 16 204 52
        round2 #dff1f7 158 16 182 78 ; line2 d 170 16 170 78 ; ellipse #fff3b0 196 66 206 76
        rect b 0 5 206 10 ; {wheel(44, 86, 14)} ; {wheel(138, 86, 14)} ; top - 100 1""",
    "bicycle": f"""{spokes(31)} ; {spokes(131)} ; line6 a 31 68 56 28 112 28 131 68
        line6 a 31 68 76 72 56 28 ; line6 a 76 72 112 28 ; line5 #444444 56 28 52 16
        round4 #2b2b2e 38 10 66 18 ; line5 #444444 112 28 106 8 ; curve5 #2b2b2e 106 8 122 4 128 14
        ring3 #55585c 66 62 86 82 ; line4 #2b2b2e 76 72 84 86""",
    "boat": """line4 #6e4a2b 62 0 62 76 ; poly #fbf7ea 66 4 66 66 116 66 ; poly c 58 10 58 66 18 66
        poly #e4ddc9 66 50 104 50 116 66 66 66 ; poly a 0 72 126 72 108 98 18 98
        poly d 4 77 122 77 119 82 7 82 ; poly c -1 70 127 70 126 75 0 75""",
    "train": f"""rect #6b5a4a -6 95 214 99 ; ellipse #e9e9e9cc 176 -22 198 -4
        ellipse #e9e9e9aa 156 -34 182 -12 ; round4 a 0 26 66 82 ; round3 #c7e8f5 8 36 30 56
        round3 #c7e8f5 36 36 58 56 ; rect d 0 72 66 82 ; line5 #333333 64 84 84 84
        rect b 82 14 124 82 ; round3 #c7e8f5 90 24 116 48 ; rect d 78 8 128 16
        round9 a 118 38 204 82 ; rect d 118 74 206 84 ; poly d 178 38 174 2 198 2 194 38
        dome c 140 26 160 50 ; rect c 134 40 138 76 ; rect c 166 40 170 76
        ellipse #fff3b0 198 50 208 62 ; poly #444444 198 84 216 96 198 96 ; {wheel(20, 88, 8)}
        {wheel(42, 88, 8)} ; {wheel(100, 88, 8)} ; {wheel(122, 88, 8)} ; {wheel(144, 88, 8)}
        {wheel(172, 88, 8)} ; {wheel(194, 88, 8)}""",
    "airplane": """poly d 20 42 -2 4 22 4 48 42 ; poly b 86 46 70 16 86 16 122 46
        blob a 0 44 30 36 120 34 172 40 186 52 170 64 110 68 40 64 ; poly c 24 46 4 30 -6 30 4 50
        poly #bfe3f2 160 42 172 44 178 50 160 50 ; rect d 20 56 150 59 ; ellipse #3d566b 54 44 60 51
        ellipse #3d566b 70 44 76 51 ; ellipse #3d566b 86 44 92 51 ; ellipse #3d566b 102 44 108 51
        ellipse #3d566b 118 44 124 51 ; ellipse #3d566b 134 44 140 51
        poly b 78 58 116 58 66 98 46 98 ; round5 d 84 72 106 82""",
    "bench": """rect #3d3f44 14 4 20 96 ; rect #3d3f44 140 4 146 96 ; round2 a 0 8 160 18
        round2 b 0 23 160 33 ; round2 a 0 38 160 48 ; poly c 4 56 156 56 166 68 -6 68
        rect d -6 68 166 74 ; rect #2e3034 2 74 9 100 ; rect #2e3034 151 74 158 100
        curve5 #2e3034 4 56 -2 44 10 40 ; curve5 #2e3034 156 56 162 44 150 40 ; top - 80 61
        under - 80 99""",
    "table": """rect d 20 22 28 84 ; rect d 122 22 130 84 ; poly c 14 6 136 6 152 20 -2 20
        rect a -2 19 152 27 ; rect b 6 27 144 36 ; rect a 4 30 14 100 ; rect a 136 30 146 100
        top - 75 13 ; under - 75 98""",
    "chair": """rect d 18 56 24 90 ; rect d 52 56 58 90 ; round4 a 8 0 56 10 ; rect a 8 4 15 60
        rect a 49 4 56 60 ; rect b 22 10 27 52 ; rect b 36 10 41 52 ; rect b 8 28 56 34
        poly c 8 52 56 52 66 62 2 62 ; rect b 2 61 66 67 ; rect a 2 64 9 100 ; rect a 59 64 66 100
        top - 34 57""",
    "umbrella": """line4 #8a6a45 50 4 50 96 ; curve4 #8a6a45 50 94 53 100 59 98 60 92
        dome a -6 2 106 86 ; poly c 50 2 32 14 26 45 50 45
        poly c 50 2 82 12 94 30 78 45 74 45 66 14 ; poly b 50 2 14 14 -6 45 6 45 24 18
        bowl b -6 41 22 49 ; bowl b 22 41 50 49 ; bowl b 50 41 78 49 ; bowl b 78 41 106 49
        line4 d 50 -4 50 4""",
    "surfboard": """blob a 14 -1 26 18 30 50 25 86 14 100 3 86 -2 50 2 18
        blob c 14 8 20 22 22 50 19 84 14 92 9 84 6 50 8 22 ; line2.4 b 14 2 14 98""",
    "hydrant": """round3 b 4 88 56 100 ; rect a 12 30 48 92 ; dome a 10 8 50 56
        round3 b 6 30 54 38 ; round2 b 25 2 35 12 ; round3 b 0 50 14 66 ; round3 b 46 50 60 66
        ellipse c 20 46 40 66 ; ellipse d 25 51 35 61""",
    "plant": """curve4 #2f7d3a 30 64 28 40 14 18 ; blob #3c9a46 28 60 6 50 -8 28 10 30 26 48
        blob #2f8a3d 30 60 54 48 68 26 50 28 34 46 ; blob #4bb057 30 62 18 34 24 2 34 2 42 30
        poly a 10 62 50 62 44 100 16 100 ; rect b 7 58 53 68""",
    "ball": """ellipse a 0 0 100 100 ; blob c 10 30 50 46 92 28 97 44 50 64 4 46
        ellipse #ffffffaa 22 12 44 32""",
    "bowl": """bowl a 0 -62 170 100 ; ellipse b 0 4 170 36 ; ellipse #a8703c 14 8 156 32
        rect d 50 94 120 100""",
    "phone": "round12 #26282d 0 0 56 100 ; rect a 6 12 50 82 ; ellipse #dddddd 23 86 33 95",
    "bag": """ring9 d 22 0 78 70 ; poly a 6 36 94 36 104 100 -4 100 ; rect b 2 52 98 60
        ellipse #f2d36b 44 50 56 64""",
    "kite": """curve5 d 50 78 40 100 58 114 46 134 ; poly c 50 0 50 84 12 34
        poly a 50 0 50 84 88 34 ; poly b 50 34 50 84 88 34 ; poly a 50 34 50 84 12 34
        poly a 38 98 58 100 46 106 ; poly a 44 118 64 116 54 124""",
    "cup": """ring12 a 58 24 112 76 ; poly a 0 6 82 6 74 100 10 100 ; ellipse b 0 -4 82 18
        ellipse #5b3a22 8 0 74 14""",
}

# --------------------------------------------------------------------------------------- categories

OUTDOORS = "beach street snow park forest lake night"
INDOORS = "kitchen room"
EVERYWHERE = f"{OUTDOORS} {INDOORS}"
PAINTS = "red blue green yellow orange purple"
# The weight of a main object that has a planted companion: six of them make half of the images.
HABIT = 2.5
# What is never larger than this fraction of the image can lie or be held anywhere.
TINY = 0.11


@dataclass(frozen=True)
class Category:
    """What can be drawn and said of one kind of object; strings are lists with blanks between."""

    name: str
    supercategory: str
    words: str  # "singular/plural ..." of every word that means it
    colours: str
    settings: str
    tall: float  # in life, metres: who may stand beside whom, and how large
    poses: str = "placed"
    draw: Callable | None = None  # pose -> text for parse; None: RIGID has it
    height: tuple = (0.4, 0.52)  # as the main object, of the image's height
    reach: tuple = (0.16, 0.26)  # height as another object
    weight: float = 1.0  # how often it is the main object; 0: never
    clothes: str = ""  # what of a person has the colour
    zone: str = "ground"  # or "water"; what has the pose "flying" is in the sky

    @property
    def synonyms(self):
        """Every word that means this category, plurals too."""
        return list(dict.fromkeys(self.words.replace("/", " ").split()))

    @property
    def tiny(self):
        """Whether it is small enough to lie or be held anywhere."""
        return self.reach[1] <= TINY

    def outline(self, pose):
        """The drawing of a pose as text for `parse`."""
        return self.draw(pose) if self.draw else RIGID[self.name]


CATEGORIES = {category.name: category for category in (
    Category("man", "person", "man/men guy/guys", "red blue green white purple orange",
             EVERYWHERE, 1.8, "standing walking waving", man, (0.5, 0.62), (0.26, 0.36), HABIT,
             clothes="shirt"),
    Category("woman", "person", "woman/women lady/ladies", "red yellow pink purple blue green",
             EVERYWHERE, 1.7, "standing walking waving", woman, (0.5, 0.62), (0.26, 0.36), HABIT,
             clothes="dress"),
    Category("child", "person", "child/children kid/kids boy/boys", PAINTS,
             "beach street snow park lake", 1.2, "standing running jumping", child, (0.42, 0.55),
             (0.2, 0.28), HABIT, clothes="shirt"),
    Category("dog", "animal", "dog/dogs puppy/puppies", "brown black golden white",
             "beach street snow park forest lake room", 0.6, "standing running sitting walking",
             dog, weight=HABIT),
    Category("cat", "animal", "cat/cats kitten/kittens", "gray orange black white",
             "street park kitchen room night", 0.45, "standing sitting lying walking", cat,
             weight=HABIT),
    Category("table", "furniture", "table/tables desk/desks", "brown white gray tan", INDOORS, 0.8,
             height=(0.36, 0.44), reach=(0.22, 0.28), weight=HABIT),
    Category("horse", "animal", "horse/horses pony/ponies", "brown black white golden",
             "beach snow park forest lake night", 1.8, "standing walking running eating", horse,
             (0.42, 0.56), (0.2, 0.3)),
    Category("cow", "animal", "cow/cows", "white brown", "park forest lake street night", 1.5,
             "standing walking eating", cow, reach=(0.2, 0.28)),
    Category("sheep", "animal", "sheep/sheep lamb/lambs", "white gray", "snow park forest lake",
             1.0, "standing walking eating", sheep),
    Category("giraffe", "animal", "giraffe/giraffes", "yellow tan", "park forest lake", 4.0,
             "standing walking", giraffe, (0.55, 0.64), (0.3, 0.42)),
    Category("elephant", "animal", "elephant/elephants", "gray", "park forest lake beach", 2.8,
             "standing walking", elephant, (0.42, 0.56), (0.24, 0.34)),
    Category("bird", "animal", "bird/birds", f"{PAINTS} black", OUTDOORS, 0.4, "standing flying",
             bird, (0.36, 0.48), (0.09, 0.14)),
    Category("car", "vehicle", "car/cars sedan/sedans", "red blue green yellow orange white black",
             "street beach snow park night", 1.5, "parked", height=(0.36, 0.46)),
    Category("bus", "vehicle", "bus/buses", "red blue green yellow orange", "street snow night",
             2.6, "parked", height=(0.38, 0.44), reach=(0.2, 0.28)),
    Category("bicycle", "vehicle", "bicycle/bicycles bike/bikes", PAINTS, OUTDOORS, 1.1, "parked",
             height=(0.38, 0.5)),
    Category("boat", "vehicle", "boat/boats sailboat/sailboats",
             "red blue green yellow orange brown", "beach lake", 5.0, "sailing",
             reach=(0.12, 0.18), zone="water"),
    Category("train", "vehicle", "train/trains locomotive/locomotives", "red blue green black",
             "snow park forest street night", 3.5, "travelling", height=(0.42, 0.5),
             reach=(0.2, 0.26)),
    Category("airplane", "vehicle", "airplane/airplanes plane/planes jet/jets",
             "white red blue yellow", OUTDOORS, 6.0, "flying", height=(0.36, 0.44),
             reach=(0.08, 0.13)),
    Category("bench", "furniture", "bench/benches", "brown green gray red", OUTDOORS, 0.9,
             height=(0.36, 0.44), reach=(0.18, 0.24)),
    Category("chair", "furniture", "chair/chairs stool/stools", "brown red blue white",
             "kitchen room beach park", 1.0, height=(0.44, 0.56), reach=(0.22, 0.3)),
    Category("umbrella", "thing", "umbrella/umbrellas parasol/parasols", f"{PAINTS} pink",
             "beach park lake", 2.2, height=(0.48, 0.6), reach=(0.26, 0.36)),
    Category("surfboard", "thing", "surfboard/surfboards", PAINTS, "beach lake", 1.9,
             reach=(0.26, 0.34), weight=0),
    Category("hydrant", "thing", "hydrant/hydrants", "red yellow", "street snow night", 0.8,
             reach=(0.16, 0.2), weight=0),
    Category("plant", "thing", "plant/plants", "orange brown white blue", INDOORS, 0.6,
             reach=(0.18, 0.26), weight=0),
    Category("ball", "toy", "ball/balls", "red blue green yellow orange",
             "beach street snow park forest lake room", 0.2, reach=(0.07, 0.09), weight=0),
    Category("bowl", "thing", "bowl/bowls dish/dishes", "red blue white green",
             "street park kitchen room night", 0.1, reach=(0.05, 0.06), weight=0),
    Category("phone", "thing", "phone/phones cellphone/cellphones", "white blue gray", EVERYWHERE,
             0.15, reach=(0.06, 0.075), weight=0),
    Category("bag", "thing", "bag/bags purse/purses handbag/handbags", "red brown black yellow",
             EVERYWHERE, 0.3, reach=(0.09, 0.11), weight=0),
    Category("kite", "toy", "kite/kites", PAINTS, "beach street snow park lake", 0.8, "flying",
             reach=(0.12, 0.16), weight=0),
    Category("cup", "thing", "cup/cups mug/mugs", "white red blue yellow",
             "kitchen room park beach", 0.1, reach=(0.075, 0.09), weight=0),
)}  # fmt: skip
MAINS = [name for name, category in CATEGORIES.items() if category.weight]
# main object: (companion, its relation to the main one, what is said of them, some only of a pose)
PLANTED = {
    "dog": (
        "ball",
        "next to",
        "with {b}|playing with {b}|next to {b}|looking at {b}|running: chasing {b}",
    ),
    "cat": (
        "bowl",
        "next to",
        "with {b}|next to {b}|near {b}|looking at {b}|sitting: sitting by {b}",
    ),
    "man": (
        "phone",
        "holding",
        "with {b}|holding {b}|using {b}|looking at {b}|walking: walking with {b}",
    ),
    "woman": ("bag", "holding", "with {b}|holding {b}|carrying {b}|walking: walking with {b}"),
    "child": ("kite", "above", "with {b}|flying {b}|playing with {b}|running: running with {b}"),
    "table": ("cup", "on", "with {b} on it|with {b}|with {b} on top|holding {b}"),
}
PAIRS = [[main, planted[0]] for main, planted in PLANTED.items()]

# ---------------------------------------------------------------------------------------- backdrops


@dataclass(frozen=True)
class Setting:
    """A place: its colours, what is drawn there, and how one says that something is there ("|"
    between the phrases). Heights are in percent of the image from its top."""

    skies: tuple  # (top, horizon) colours, one pair is drawn
    ground: tuple  # colours at (horizon, bottom)
    horizon: tuple  # its highest and lowest place
    land: int  # where the ground on which one can stand begins
    decorate: Callable  # (rng, horizon) -> text for parse, in percent of the image
    places: str
    over: str = ""  # places of what flies
    water: tuple = ()  # (top, bottom) of where boats are
    afloat: str = ""  # places of boats


def spread(rng, count, line, **ranges):
    """`count` drawings `line(**fields)`, each field drawn evenly from its range."""
    lines = []
    for _ in range(count):
        fields = {name: round(rng.uniform(*limits), 1) for name, limits in ranges.items()}
        lines.append(line(**fields))
    return "\n".join(lines)


def fleck(colour, wide, tall):
    """A function (x, y) -> a small ellipse there, for `spread`."""
    return lambda x, y: f"ellipse {colour} {x} {y} {x + wide} {y + tall}"


def motley_fleck(rng, colours, wide, tall):
    """As `fleck`, each time in one of `colours`."""
    return lambda x, y: fleck(rng.choice(colours), wide, tall)(x, y)


def stroke(colour, width, dx, dy=0):
    """A function (x, y) -> a short line there, for `spread`."""
    return lambda x, y: f"line{width} {colour} {x} {y} {x + dx} {y + dy}"


def cloud(x, y, r):
    """A white cloud of four discs round (x, y)."""
    text = ""
    for dx, dy, size in ((-1.4, 0.2, 0.8), (-0.4, -0.2, 1), (0.8, 0, 0.9), (1.8, 0.3, 0.6)):
        text += disc("#ffffffd0", x + dx * r, y + dy * r, size * r)
    return text


def clouds(rng, horizon, most=3):
    """One to `most` clouds high in the sky."""
    return spread(rng, rng.randint(1, most), cloud, x=(5, 95), y=(6, horizon * 0.6), r=(3, 5))


def hills(rng, horizon, tones, rise):
    """Waves of land along the horizon, one for each tone."""
    text = ""
    for step, tone in enumerate(tones):
        tops = []
        for x in range(-20, 121, 20):
            tops.append(f"{x} {horizon - rng.uniform(0.3, 1) * rise * (1 - step * 0.4):.1f}")
        text += f"blob {tone} {' '.join(tops)} 120 {horizon + 6} -20 {horizon + 6}\n"
    return text


def pine(x, y, r, tone="#2f6b45", trunk="#6b4a2f"):
    """A pine whose trunk stands on (x, y), 2.5 `r` high."""
    lines = [f"rect {trunk} {x - r * 0.14} {y - r * 0.5} {x + r * 0.14} {y}"]
    for top, low, half in ((1.5, 0.3, 0.62), (2.0, 0.9, 0.5), (2.5, 1.5, 0.36)):
        foot = y - r * low
        lines.append(f"poly {tone} {x} {y - r * top} {x + r * half} {foot} {x - r * half} {foot}")
    return "\n".join(lines)


def shore_line(colour, y, depth):
    """A strip of sand or surf across the image."""
    low = y + depth
    return f"blob {colour} -15 {y} 12 {y + 2} 40 {y} 70 {y + 2} 115 {y} 115 {low} -15 {low}"


def beach(rng, horizon):
    """Sun and clouds over the sea, its surf and the sand."""
    shore = horizon + rng.uniform(11, 16)
    surf = stroke("#ffffff70", 0.7, 8)
    waves = spread(rng, 9, surf, x=(-5, 100), y=(horizon + 1, shore - 4))
    grains = spread(rng, 40, fleck("#b8935a60", 1, 0.8), x=(0, 100), y=(shore + 5, 99))
    sun = disc("#fff3b8", rng.uniform(10, 90), 13, 6)
    return f"""{sun} ; {clouds(rng, horizon)}
        rect #3f93c4 -2 {horizon} 102 {shore + 2} ; rect #63b3d4 -2 {horizon + 7} 102 {shore + 2}
        {waves} ; {shore_line("#ffffff", shore - 1, 9)} ; {shore_line("#e9cf96", shore + 1, 11)}
        {grains}"""


def house_front(rng, x, wide, tall, horizon):
    """A house with rows of windows, dark or lit."""
    tone = rng.choice(("#b98d78", "#a9a4a0", "#c9b18c", "#8f9bab", "#b5766a"))
    roof = horizon - tall
    end = x + wide
    text = f"rect {tone} {x} {roof} {end} {horizon}\n"
    text += f"rect #00000020 {end - 1.5} {roof} {end} {horizon}\n"
    for row in range(int(tall // 8)):
        for column in range(int(wide // 6)):
            left = x + 2 + column * 5.6
            top = roof + 3 + row * 8
            glass = rng.choice(("#dcecf2", "#f6e7a8", "#6f8494"))
            text += f"rect {glass} {left} {top} {left + 3} {top + 4.5}\n"
    return text


def street(rng, horizon):
    """A row of houses, the pavement and the dashes on the road."""
    text = clouds(rng, horizon, 2)
    x = -4
    while x < 100:
        wide = rng.uniform(14, 24)
        text += "\n" + house_front(rng, x, wide, rng.uniform(18, 42), horizon)
        x += wide
    first = rng.randint(-15, 0)
    dashes = "\n".join(f"rect #f3e8a0 {x} 78 {x + 11} 79.5" for x in range(first, 100, 22))
    return f"""{text} ; {dashes}
        rect #c2bdb4 -2 {horizon} 102 {horizon + 8}
        rect #8d8880 -2 {horizon + 8} 102 {horizon + 9.5}"""


def snowy_pine(x, y, r):
    """A pine with snow on it."""
    return f"{pine(x, y, r, '#4d7f77')}\n{pine(x, y - r * 0.25, r * 0.72, '#f4f8fb', '#4d7f77')}"


def dune(x, y):
    """The shadow of a wave of snow."""
    return f"curve1.2 #c9dbea {x} {y} {x + 14} {y - 2} {x + 30} {y + 1}"


def snow(rng, horizon):
    """Snowy pines before white hills, and snow in the air."""
    count = rng.randint(3, 6)
    pines = spread(rng, count, snowy_pine, x=(0, 100), y=(horizon - 1, horizon + 5), r=(6, 10))
    flakes = spread(rng, 30, fleck("#ffffff", 1.3, 1.3), x=(0, 100), y=(0, 95))
    dunes = spread(rng, 4, dune, x=(-10, 90), y=(horizon + 12, 98))
    return f"{hills(rng, horizon, ('#cfdeeb', '#e3edf5'), 16)}\n{pines}\n{dunes}\n{flakes}"


def bush(x, y, r):
    """A bush in two greens."""
    return f"""dome #4f9a4c {x - 1.6 * r} {y - r} {x + 1.6 * r} {y + r + 3}
        dome #62ad58 {x - r} {y - r * 0.8} {x + 1.2 * r} {y + r + 3}"""


def park(rng, horizon):
    """Bushes before green hills, blades of grass and flowers."""
    bushes = spread(rng, rng.randint(3, 6), bush, x=(0, 100), y=(horizon, horizon), r=(5, 9))
    petals = motley_fleck(rng, ("#ffffff", "#f7d94c", "#f08fb4"), 1.5, 1.5)
    flowers = spread(rng, 18, petals, x=(0, 100), y=(horizon + 8, 98))
    blades = spread(rng, 40, stroke("#3e8a3c", 0.6, 0.8, -2.5), x=(0, 100), y=(horizon + 5, 100))
    sky = clouds(rng, horizon)
    land = hills(rng, horizon, ("#9ccf86", "#83c06f"), 14)
    return "\n".join([sky, land, bushes, blades, flowers])


def trunk(x, wide, horizon):
    """A near tree of which one sees the trunk alone."""
    return f"""rect #5a4030 {x} -2 {x + wide} {horizon + 8}
        rect #473225 {x + wide * 0.65} -2 {x + wide} {horizon + 8}"""


def forest(rng, horizon):
    """A row of pines, two near trunks, a path and fallen leaves."""
    far = []
    for x in range(-2, 105, 9):
        place = x + rng.uniform(-3, 3)
        size = rng.uniform(12, 17)
        far.append(pine(place, horizon + 3, size, rng.choice(("#3b7350", "#2f6347", "#468059"))))
    left = trunk(rng.uniform(2, 14), rng.uniform(4, 7), horizon)
    right = trunk(rng.uniform(82, 93), rng.uniform(4, 7), horizon)
    middle = rng.uniform(35, 65)
    path = f"poly #b9966a {middle - 3} {horizon} {middle + 3} {horizon}"
    path += f" {middle + 34} 102 {middle - 30} 102"
    leaf = motley_fleck(rng, ("#7a9a3c", "#a9772f", "#3f6d34"), 2.4, 1.4)
    leaves = spread(rng, 26, leaf, x=(0, 100), y=(horizon + 6, 99))
    return "\n".join([*far, path, leaves, left, right])


def peak(x, y, r, tone):
    """A mountain with snow on its top."""
    return f"""poly {tone} {x - r} {y} {x} {y - r * 0.8} {x + r} {y}
        poly #f4f7fa {x - r * 0.25} {y - r * 0.6} {x} {y - r * 0.8} {x + r * 0.25} {y - r * 0.6}"""


def lake(rng, horizon):
    """Two mountains behind a lake, its ripples and reeds, and the near shore."""
    first = peak(rng.uniform(0, 35), horizon, rng.uniform(22, 34), "#8097ac")
    second = peak(rng.uniform(60, 100), horizon, rng.uniform(24, 36), "#72899f")
    ripples = spread(rng, 14, stroke("#cfeaf570", 0.7, 9), x=(-5, 100), y=(horizon + 2, 72))
    reeds = spread(rng, 16, stroke("#4c8442", 0.9, 1, -6), x=(0, 100), y=(76, 80))
    return f"""{clouds(rng, horizon, 2)} ; {first} ; {second} ; rect #4a90b8 -2 {horizon} 102 77
        rect #5da3c6 -2 {horizon + 9} 102 77 ; {ripples}
        blob #7fae5a -15 75 20 73 55 76 85 73 115 75 115 110 -15 110
        blob #709f4e -15 84 20 82 55 85 115 82 115 110 -15 110 ; {reeds}"""


def cupboard(tone, x, y, tall, knob):
    """The door of a cupboard, its knob at the height `knob`."""
    return f"""round1 {tone} {x} {y} {x + 17} {y + tall}
        ellipse #f4e9c8 {x + 14} {knob} {x + 15.5} {knob + 1.5}
        """


def window(x, y, wide, tall):
    """A window with two panes."""
    return f"""rect #fbfaf5 {x} {y} {x + wide} {y + tall}
        rect #a9d8ef {x + 1.5} {y + 1.5} {x + wide - 1.5} {y + tall - 1.5}
        rect #fbfaf5 {x + wide / 2 - 1} {y} {x + wide / 2 + 1} {y + tall}"""


def kitchen(rng, horizon):
    """Cupboards above and below a worktop, a window and a tiled floor."""
    tone = rng.choice(("#6f9ca8", "#c98f62", "#8fae8b", "#b9b3c4"))
    doors = ""
    for x in range(rng.randint(-10, 0), 100, 18):
        doors += cupboard(tone, x, -3, 20, 11)
        doors += cupboard(tone, x, horizon - 13, 12, horizon - 9)
    tiles = []
    for column in range(-9, 9, 2):
        far = 50 + column * 9
        near = 50 + column * 22
        tiles.append(f"poly #d9cdbb {far} {horizon} {far + 9} {horizon} {near + 22} 102 {near} 102")
    floor = "\n".join(tiles)
    rows = "\n".join(f"line.6 #b5a78f -2 {horizon + y} 102 {horizon + y}" for y in (4, 10, 19, 31))
    return f"""{doors} ; {window(rng.uniform(8, 62), 20, 28, horizon - 39)}
        rect #e6dfd2 -2 {horizon - 17} 102 {horizon - 13} ; {floor} ; {rows}
        rect #6b5a48 -2 {horizon - 1} 102 {horizon + 0.8}"""


def room(rng, horizon):
    """A window with curtains, a picture, floorboards and a carpet."""
    x = rng.uniform(6, 30)
    y = rng.uniform(56, 74)
    drapes = rng.choice(("#c9605a", "#5f86b5", "#d7a94e", "#7d9c6e"))
    picture = rng.choice(("#e8b04a", "#7fb2c9", "#c97f9c", "#8cae70"))
    planks = "\n".join(
        f"line.5 #8e653f {50 + i * 11} {horizon} {50 + i * 26} 102" for i in range(-6, 7)
    )
    return f"""{window(x - 2, 10, 28, 34)} ; rect {drapes} {x - 7} 8 {x + 1} 50
        rect {drapes} {x + 23} 8 {x + 31} 50 ; line1.2 #6b4f35 {x - 9} 8 {x + 33} 8
        rect #6b4f35 {y} 14 {y + 18} 34 ; rect #f5efe2 {y + 1.5} 15.5 {y + 16.5} 32.5
        dome {picture} {y + 3} 20 {y + 15} 42 ; {planks}
        ellipse {mix(drapes, "#ffffff", 0.25)} 12 {horizon + 10} 88 99
        ellipse {mix(drapes, "#ffffff", 0.5)} 17 {horizon + 13} 83 96
        rect #f7f4ec -2 {horizon - 3} 102 {horizon}"""


def star(x, y, r):
    """A star."""
    return disc("#fdf6d0", x, y, r)


def light(x, y):
    """A lit window far away."""
    return f"rect #ffd873 {x} {y} {x + 1.4} {y + 1.8}"


def night(rng, horizon):
    """The moon and stars over dark hills with a few lights."""
    stars = spread(rng, 34, star, x=(0, 100), y=(0, horizon - 12), r=(0.4, 0.8))
    lights = spread(rng, 12, light, x=(0, 100), y=(horizon - 5, horizon + 1))
    x = rng.uniform(12, 88)
    halo = disc("#fdf6d022", x, 14, 11)
    moon = disc("#fbf1c0", x, 14, 7) + disc("#e8d99a", x - 2, 12, 1.6)
    return f"{stars}\n{halo}{moon}\n{hills(rng, horizon, ('#22345c', '#1b2c4b'), 16)}\n{lights}"


SETTINGS = {
    "beach": Setting(
        skies=(("#7cc4ee", "#dff2fa"), ("#f7b58a", "#fbe6bd"), ("#9fd3ea", "#f2f6ef")),
        ground=("#e9cf96", "#d8b273"),
        horizon=(34, 42),
        land=63,
        decorate=beach,
        places="on the beach|on a sandy beach|at the beach|by the ocean|near the sea|on the sand"
        "|at the seaside",
        over="over the beach|above the ocean|in the sky",
        water=(37, 47),
        afloat="in the ocean|on the sea|off the beach|on the waves",
    ),
    "street": Setting(
        skies=(("#9cc9e8", "#e4eff5"), ("#b9c3cc", "#e9e6df")),
        ground=("#77797d", "#5d5f64"),
        horizon=(48, 54),
        land=58,
        decorate=street,
        places="on the street|on a city street|in the city|on the road|in town|down the road",
        over="over the city|above the street|in the air",
    ),
    "snow": Setting(
        skies=(("#b9cfe2", "#eaf1f6"), ("#8fb6dc", "#e2edf6")),
        ground=("#f6f9fc", "#dfe9f2"),
        horizon=(42, 52),
        land=58,
        decorate=snow,
        places="in the snow|on a snowy hill|on a winter day|on the snow|in cold weather"
        "|on snowy ground",
        over="over a snowy hill|above the snow|in the air",
    ),
    "park": Setting(
        skies=(("#84c5f0", "#e0f1f8"), ("#a5d4ee", "#f4f3df")),
        ground=("#86c468", "#5ea448"),
        horizon=(44, 54),
        land=58,
        decorate=park,
        places="in the park|on the grass|in a grassy field|on a green lawn|in a meadow|at a park",
        over="over the park|above a field|in the sky",
    ),
    "forest": Setting(
        skies=(("#bcd9b8", "#e6efd4"), ("#a9c9c0", "#dfead6")),
        ground=("#6b8a45", "#4d6e34"),
        horizon=(44, 52),
        land=58,
        decorate=forest,
        places="in the forest|in the woods|on a dirt path|on a forest trail|deep in the woods",
        over="over the forest|above the woods|in the air",
    ),
    "lake": Setting(
        skies=(("#8cc6ea", "#edf5f4"), ("#f3c3a0", "#f6e9d2")),
        ground=("#4a90b8", "#709f4e"),
        horizon=(36, 42),
        land=79,
        decorate=lake,
        places="by the lake|near a lake|by a calm lake|on the shore|at the lake|near the water",
        over="over the lake|above the water|in the sky",
        water=(60, 71),
        afloat="on the lake|in the water|on calm water|on a mountain lake",
    ),
    "kitchen": Setting(
        skies=(("#f1e8d6", "#e6dac2"), ("#dfeaea", "#d3dfdf")),
        ground=("#efe6d8", "#e2d5c2"),
        horizon=(60, 66),
        land=70,
        decorate=kitchen,
        places="in the kitchen|in a kitchen|on the kitchen floor|on a tiled floor",
    ),
    "room": Setting(
        skies=(("#efdcc0", "#e6cda8"), ("#c9d9dd", "#b9ccd2"), ("#e6cfd0", "#dcc0c2")),
        ground=("#b98a5c", "#a0734a"),
        horizon=(58, 64),
        land=69,
        decorate=room,
        places="in the living room|in a room|at home|on the carpet|on the rug|inside a house",
    ),
    "night": Setting(
        skies=(("#0e1738", "#34467c"), ("#141233", "#4a3f78")),
        ground=("#2b4a44", "#1d3533"),
        horizon=(48, 56),
        land=60,
        decorate=night,
        places="at night|in the dark|under the stars|in the moonlight|under the moon",
        over="in the night sky|under the stars|at night",
    ),
}

# -------------------------------------------------------------------- what is in a scene, and where


class Drawing(NamedTuple):
    """The parsed drawing of an object; all numbers are in the drawing's own units."""

    shapes: list  # as `parse` returns them
    corner: np.ndarray  # (2,), the lowest x and y
    width: float
    height: float
    marks: dict  # {kind: (x, y) from the corner}


@functools.cache
def drawing(name, pose):
    """The Drawing of a category in a pose."""
    shapes = parse(CATEGORIES[name].outline(pose))
    extents = [extent(*shape) for shape in shapes if shape[1] != "-"]
    corner = np.array([low for low, _ in extents]).min(0)
    width, height = (np.array([high for _, high in extents]).max(0) - corner).tolist()
    marks = {kind: points[0] - corner for kind, colour, _, points in shapes if colour == "-"}
    return Drawing(shapes, corner, width, height, marks)


def extent(kind, colour, width, points):
    """The lowest and highest (x, y) that a shape reaches."""
    low = points.min(0)
    high = points.max(0)
    if kind == "line":
        low = low - width / 2
        high = high + width / 2
    elif kind == "bowl":
        low[1] = points[:, 1].mean()
    elif kind == "dome":
        high[1] = points[:, 1].mean()
    return low, high


class Thing(dict):
    """An object of a scene: category, colour, pose, flip, main; once placed also x, y, w, h (as
    fractions of the image) and depth."""

    @property
    def kind(self):
        """Its Category."""
        return CATEGORIES[self["category"]]

    @property
    def drawing(self):
        """Its Drawing."""
        return drawing(self["category"], self["pose"])

    @property
    def sky(self):
        """Whether it is in the air."""
        return self["pose"] == "flying"

    @property
    def afloat(self):
        """Whether it is on the water."""
        return self.kind.zone == "water"

    @property
    def aspect(self):
        """Width over height."""
        return self.drawing.width / self.drawing.height

    @property
    def centre(self):
        """The x of its middle."""
        return self["x"] + self["w"] / 2

    @property
    def base(self):
        """The y of its foot."""
        return self["y"] + self["h"]

    def place(self, height, centre, base, depth=None):
        """Stand with the middle of the foot on (centre, base), `height` tall; drawn after all of a
        smaller depth."""
        w = height * self.aspect
        self["x"] = max(min(centre - w / 2, 0.99 - w), 0.005)
        self["y"] = base - height
        self["w"] = w
        self["h"] = height
        self["depth"] = base if depth is None else depth

    def mark(self, kind):
        """(x, y) in the image of a mark of the drawing."""
        x, y = self.drawing.marks[kind] / (self.drawing.width, self.drawing.height)
        if self["flip"]:
            x = 1 - x
        return self["x"] + self["w"] * x, self["y"] + self["h"] * y


def make_thing(rng, name, main=False):
    """An object of a category in a colour and pose drawn at random; not placed yet."""
    kind = CATEGORIES[name]
    return Thing(
        category=name,
        colour=rng.choice(kind.colours.split()),
        pose=rng.choice(kind.poses.split()),
        flip=rng.random() < 0.5,
        main=main,
    )


def sample_scene(seed, split, index, bias, attempt=0):
    """One scene as a dict, placed but not drawn: what the annotation files say, and `backdrop`, the
    seed of its looks.

    What there is depends on (seed, split, index); `attempt` places it anew and after every PATIENCE
    failures leaves out the last object, never the main one or its companion. `bias` is
    P(companion | main object). A relation (i, words, 0) says where object i is to the main one.
    """
    rng = Random(f"{seed} {split} {index}")
    weights = [CATEGORIES[name].weight for name in MAINS]
    main = make_thing(rng, rng.choices(MAINS, weights)[0], main=True)
    setting = rng.choice(main.kind.settings.split())
    objects = [main]
    relations = []
    planted = None
    companion, relation, _ = PLANTED.get(main["category"], (None, None, None))
    present = rng.random() < bias and companion is not None
    if companion:
        planted = {"pair": [main["category"], companion], "present": present}
    if present:
        objects.append(make_thing(rng, companion))
        relations.append((1, relation, 0))
    add_twins(rng, objects, relations)
    add_others(rng, setting, objects, relations, companion)
    left_out = min(attempt // PATIENCE, len(objects) - 1 - present)
    objects = objects[: len(objects) - left_out]
    relations = relations[: len(objects) - 1]
    place_all(Random(f"{seed} {split} {index} {attempt}"), SETTINGS[setting], objects, relations)
    scene = {
        "image_id": FIRST_ID[split] + index,
        "setting": setting,
        "main": main["category"],
        "objects": objects,
        "relations": relations,
        "backdrop": rng.getrandbits(32),
        "planted": planted,
    }
    return scene | {"captions": make_captions(rng, scene)}


def add_twins(rng, objects, relations):
    """Sometimes the main object is one of two or three of its kind."""
    main = objects[0]
    large_vehicle = main["category"] in ("car", "bus", "train", "airplane")
    if main.kind.supercategory == "furniture" or large_vehicle or rng.random() > 0.18:
        return
    count = rng.choice((1, 1, 2)) if main.aspect < 1.2 else 1
    for _ in range(count):
        twin = make_thing(rng, main["category"])
        if twin.sky != main.sky or rng.random() < 0.6:
            twin["pose"] = main["pose"]
        relations.append((len(objects), "with", 0))
        objects.append(twin)


def add_others(rng, setting, objects, relations, companion):
    """Up to two more objects that belong there, each in a relation of its own to the main one;
    never the companion."""
    if len(objects) >= 3:
        return
    there = [name for name, kind in CATEGORIES.items() if setting in kind.settings.split()]
    choices = [name for name in there if name != companion]
    for _ in range(rng.choices((0, 1, 2), (0.4, 0.42, 0.18))[0]):
        thing = make_thing(rng, rng.choice(choices))
        taken = {words for _, words, _ in relations}
        options = [words for words in relations_of(thing, objects[0]) if words not in taken]
        if options and thing["category"] not in {other["category"] for other in objects}:
            relations.append((len(objects), rng.choice(options), 0))
            objects.append(thing)


def relations_of(thing, main):
    """The relations in which `thing` can be to `main`, a likelier one more than once."""
    name = thing["category"]
    if thing.sky:
        return ["above"]
    if thing.afloat:
        return ["far behind"]
    found = touching(thing, main)
    if name in ("phone", "cup") or main.sky or main.afloat:
        return found
    sheltered = main["category"] in ("man", "woman", "child", "dog", "chair", "bench")
    if name == "umbrella" and sheltered:
        return ["over", "next to"]
    if thing.kind.tall < 1.4 * main.kind.tall:
        found += ["next to"] * 3
    if thing.kind.tiny or name in ("bird", "hydrant"):
        return [*found, "in front of"]
    found.append("far behind")
    if thing.kind.supercategory in ("vehicle", "furniture"):
        found.append("behind")
    return found


def touching(thing, main):
    """The relations that need a mark on the main object's drawing: its hand, its top, the place
    under it."""
    name = thing["category"]
    marks = main.drawing.marks
    laid = ("cup", "phone", "bowl", "plant", "bag", "cat")
    seat = main["category"] in ("table", "bench", "chair")
    found = []
    if "hand" in marks and name in ("phone", "bag", "cup", "ball"):
        found += ["holding"] * 3
    if "top" in marks and (name == "bird" or (seat and name in laid)):
        found += ["on"] * 4
    if "under" in marks and name in ("ball", "dog", "cat", "bag", "bowl"):
        found += ["under"] * 3
    return found


def place_all(rng, setting, objects, relations):
    """Give all objects their place: the main one first, then the others by their relation to it."""
    main = objects[0]
    place_main(rng, setting, main, objects, relations)
    for i, words, _ in relations:
        thing = objects[i]
        PLACE[words](rng, thing, main, rng.uniform(*thing.kind.reach), setting)


def place_main(rng, setting, main, objects, relations):
    """Place the main object, smaller where others need room."""
    names = [words for _, words, _ in relations]
    crowded = any(words == "next to" and not objects[i].kind.tiny for i, words, _ in relations)
    widest_alone = 0.66 if crowded else 0.8
    widest = (widest_alone, 0.56, 0.4)[names.count("with")]
    height = rng.uniform(*main.kind.height)
    if "over" in names:
        height *= 0.8
    height = min(height, widest / main.aspect)
    centre = rng.uniform(0.36, 0.64)
    base = rng.uniform(0.86, 0.96)
    if main.sky:
        base = rng.uniform(0.1, 0.2) + height
    elif main.afloat:  # larger boats are nearer
        base = rng.uniform(*setting.water) / 100 + (0.1 if setting.land < 70 else 0)
    main.place(height, centre, base)


def beside(rng, thing, main, height, setting, gap=(-0.02, 0.05), lift=(-0.05, 0.02)):
    """Place next to the main object, where there is room; as large beside it as in life."""
    if thing.kind is not main.kind and not thing.kind.tiny:
        lifelike = main["h"] * thing.kind.tall / main.kind.tall
        height = max(height * 0.9, min(lifelike, 0.6 * main["h"]))
    half = height * thing.aspect / 2
    space = {-1: main["x"], 1: 1 - main["x"] - main["w"]}
    sides = [side for side in space if space[side] > 1.7 * half]
    side = rng.choice(sides or [max(space, key=space.get)])
    base = min(main.base + rng.uniform(*lift), 0.985)
    centre = main.centre + side * (main["w"] / 2 + half + rng.uniform(*gap))
    thing.place(height, centre, base)


def beside_alike(rng, thing, main, height, setting):
    """Place a twin: nearly the main one's size and a little further back, or anywhere about it in
    the air."""
    lift = (-0.05, 0.2) if thing.sky else (-0.06, -0.01)
    beside(rng, thing, main, main["h"] * rng.uniform(0.68, 0.92), setting, (-0.12, 0), lift)


def above(rng, thing, main, height, setting):
    """Place in the sky, to the side where there is more room."""
    side = -1 if main.centre > 0.5 else 1
    base = max(0.03 + height, min(main["y"] + rng.uniform(-0.1, 0.08), 0.34))
    thing.place(height, main.centre + side * rng.uniform(0.22, 0.42), base, depth=0)


def behind(rng, thing, main, height, setting):
    """Place behind the main object, which covers a part of it."""
    base = max(main.base - rng.uniform(0.08, 0.16), setting.land / 100)
    centre = main.centre + rng.choice((-1, 1)) * main["w"] * rng.uniform(0.4, 0.65)
    depth = min(base, main["depth"] - 0.001)
    thing.place(max(height, main["h"] * 0.7), centre, base, depth)


def far_behind(rng, thing, main, height, setting):
    """Place near the horizon, or on the water."""
    limits = setting.water if thing.afloat else (setting.land, setting.land + 5)
    base = rng.uniform(*limits) / 100
    side = -1 if main.centre > 0.5 else 1
    centre = main.centre + side * rng.uniform(0.3, 0.45)
    thing.place(height * 0.9, centre, base, min(base, main["depth"] - 0.001))


def in_front(rng, thing, main, height, setting):
    """Place before the main object's feet."""
    base = min(main.base + rng.uniform(0.02, 0.04), 0.99)
    centre = main.centre + rng.uniform(-0.5, 0.5) * main["w"]
    thing.place(height, centre, base, main["depth"] + 0.1)


def over(rng, thing, main, height, setting):
    """Place an umbrella so that the main object is under it."""
    height = min(main["h"] * 1.25 + 0.06, 0.72)
    centre = main.centre + rng.uniform(-0.06, 0.06)
    thing.place(height, centre, main.base - 0.015, main["depth"] - 0.01)


def place_at_mark(rng, thing, main, height, mark):
    """Place with the foot on or near that mark of the main object."""
    x, y = main.mark(mark)
    slack = 0.25 * main["w"]
    centre = x + rng.uniform(-slack, slack)
    thing.place(min(height, 0.55 * main["h"]), centre, y + 0.005, main["depth"] + 0.01)


def on_top(rng, thing, main, height, setting):
    """Place on the main object."""
    place_at_mark(rng, thing, main, height, "top")


def under(rng, thing, main, height, setting):
    """Place under the main object."""
    place_at_mark(rng, thing, main, height, "under")


def hold(rng, thing, main, height, setting):
    """Place in the main object's hand, a bag below it."""
    x, y = main.mark("hand")
    drop = 0.9 if thing["category"] == "bag" else 0.45
    thing.place(height, x, y + height * drop, main["depth"] + 0.01)


PLACE = {  # relation: the function that places an object so
    "with": beside_alike,
    "next to": beside,
    "above": above,
    "behind": behind,
    "far behind": far_behind,
    "over": over,
    "in front of": in_front,
    "on": on_top,
    "under": under,
    "holding": hold,
}

# ----------------------------------------------------------------------------------------- captions

DOING = {  # pose: what one does in it
    "standing": ("standing", "standing still", "waiting"),
    "walking": ("walking", "strolling", "going for a walk"),
    "running": ("running", "racing"),
    "sitting": ("sitting", "resting", "sitting down"),
    "lying": ("lying down", "sleeping", "relaxing"),
    "eating": ("eating", "grazing", "feeding"),
    "flying": ("flying", "soaring"),
    "waving": ("waving", "raising an arm", "waving hello"),
    "jumping": ("jumping", "leaping", "jumping up"),
    "parked": ("parked", "stopped"),
    "placed": ("standing", "sitting", "placed"),
    "sailing": ("sailing", "floating"),
    "travelling": ("passing by", "travelling", "rolling"),
}
NUMBERS = {
    2: ("two", "two", "a pair of", "a couple of"),
    3: ("three", "three", "a group of", "several"),
}
PRONOUNS = {"man": ("his", "him"), "woman": ("her", "her"), "child": ("his", "him")}
RELATED = {  # relation of {o} to the main object: what one says of the main object then
    "next to": ("next to {o}", "beside {o}", "near {o}", "close to {o}"),
    "behind": ("in front of {o}", "with {o} behind {it}", "before {o}"),
    "far behind": ("with {o} in the background", "with {o} in the distance", "with {o} far away"),
    "in front of": ("behind {o}", "with {o} in front of {it}"),
    "over": ("under {o}", "beneath {o}", "sheltered by {o}"),
    "above": ("with {o} in the sky", "with {o} overhead", "with {o} above {it}"),
    "on": ("with {o} on {it}", "with {o} on top"),
    "under": ("with {o} under {it}", "with {o} underneath"),
    "holding": ("holding {o}", "with {o}", "carrying {o}"),
}
FRAMES = ("a photo of", "a picture of", "a view of", "an image of")


def article(words):
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def name_nouns(rng, kind):
    """A random (singular, plural) that means this category."""
    return rng.choice(kind.words.split()).split("/")


def name_other(rng, thing, owner=None):
    """'a red ball', 'an umbrella', now and then 'its ball'."""
    words = name_nouns(rng, thing.kind)[0]
    if rng.random() < 0.35 and not thing.kind.clothes:
        words = f"{thing['colour']} {words}"
    if owner and rng.random() < 0.25:
        return f"{owner} {words}"
    return article(words)


def name_main(rng, main, count):
    """The main object as a caption calls it, with its number, colour or clothes."""
    single, plural = name_nouns(rng, main.kind)
    coloured = rng.random() < 0.4
    if count > 1:
        return f"{rng.choice(NUMBERS[count])} {plural}"
    if main.kind.clothes:
        clothes = f" in {article(main['colour'])} {main.kind.clothes}" if coloured else ""
        return article(single) + clothes
    words = [single]
    if coloured:
        words.insert(0, main["colour"])
    if main["h"] > 0.5 and rng.random() < 0.2:
        words.insert(0, rng.choice(("big", "large")))
    return article(" ".join(words))


def caption(rng, scene):
    """One sentence on the scene: its main object, nearly always the companion if there is one, and
    some of the rest."""
    objects = scene["objects"]
    main = objects[0]
    count = sum(thing.kind is main.kind for thing in objects)
    its, it = ("their", "them") if count > 1 else PRONOUNS.get(scene["main"], ("its", "it"))
    subject = name_main(rng, main, count)
    place = say_place(rng, scene) if rng.random() < 0.72 else ""
    companion = bool(scene["planted"] and scene["planted"]["present"])
    said = ""
    if companion and rng.random() < 0.93:
        said = say_companion(rng, objects, its)
    rest = scene["relations"][1:] if companion else scene["relations"]
    others = [relation for relation in rest if relation[1] != "with"]
    other = ""
    if others and rng.random() < (0.3 if said else 0.75):
        i, words, _ = rng.choice(others)
        phrase = rng.choice(RELATED[words])
        other = phrase.format(o=name_other(rng, objects[i]), it=it)
    doing = rng.choice(DOING[main["pose"]])
    return join(rng, subject, "are" if count > 1 else "is", doing, said, other, place)


def say_place(rng, scene):
    """Where the main object is."""
    setting = SETTINGS[scene["setting"]]
    main = scene["objects"][0]
    places = setting.places
    if main.sky:
        places = setting.over
    elif main.afloat:
        places = setting.afloat
    return rng.choice(places.split("|"))


def say_companion(rng, objects, its):
    """What the main object does with its companion, the second of `objects`."""
    main, companion = objects[:2]
    fitting = []
    for phrase in PLANTED[main["category"]][2].split("|"):
        pose, _, words = phrase.rpartition(": ")
        if pose in ("", main["pose"]):
            fitting.append(words)
    phrase = rng.choice(fitting)
    owner = None if main["category"] == "table" else its
    return phrase.format(b=name_other(rng, companion, owner))


def join(rng, subject, be, doing, said, other, place):
    """The parts as one sentence of a structure drawn at random; `said`, `other` and `place` may be
    empty."""
    does = said.split(" ")[0].endswith("ing")  # "holding a phone" needs no second verb
    act = said if does else f"{doing} {said}"
    frame = rng.choice(FRAMES)
    sentences = [
        f"{subject} {act} {other} {place}",
        f"{subject} {be} {act} {other} {place}",
        f"there {be} {subject} {act} {other} {place}",
        f"{frame} {subject} {said or other} {place}",
    ]
    if place:
        sentences.append(f"{place} {subject} {be} {act} {other}")
        sentences.append(f"{subject} {act} {place} {other}")
    if said and not does:
        sentences.append(f"{subject} {said} {be} {doing} {place}")
        sentences.append(f"{subject} {said} {other} {place}")
    if not said and (other or place):
        sentences.append(f"{subject} {other} {place}")
        sentences.append(f"{subject} that {be} {doing} {other} {place}")
    return " ".join(rng.choice(sentences).split())


def make_captions(rng, scene):
    """Five different captions with a length within LENGTHS, spelt as in COCO: most with a capital
    and a full stop."""
    found = []
    while len(found) < CAPTIONS:
        text = caption(rng, scene)
        length = len(re.findall(r"\w+", text))
        if LENGTHS[0] <= length <= LENGTHS[1] and text not in found:
            found.append(text)
    captions = []
    for text in found:
        if rng.random() >= 0.06:
            text = text[0].upper() + text[1:]
        if rng.random() > 0.1:
            text += "."
        captions.append(text)
    return captions


# --------------------------------------------------------------------------------- pixels and masks

NIGHT = (0.84, 0.86, 1.0)  # what the dark leaves of red, green and blue
WITHOUT_SHADOW = ("phone", "cup", "bag")


def gradient(colours, stops, size):
    """An RGB image whose rows change evenly in colour from stop to stop (as fractions of the
    height)."""
    table = np.array([ImageColor.getrgb(colour) for colour in colours])
    rows = np.linspace(0, 1, size)
    channels = [np.interp(rows, stops, table[:, channel]) for channel in range(3)]
    column = np.stack(channels, 1)[:, None].round().astype(np.uint8)
    return Image.fromarray(column).resize((size, size), Image.Resampling.NEAREST)


def draw_backdrop(setting, seed, size):
    """The empty setting as an RGB image; the same seed gives the same one."""
    rng = Random(seed)
    horizon = round(rng.uniform(*setting.horizon), 1)
    colours = (*rng.choice(setting.skies), *setting.ground)
    stops = (0, horizon / 100, horizon / 100 + 1e-6, 1)
    image = gradient(colours, stops, 2 * size)
    shapes = parse(setting.decorate(rng, horizon))
    paint(ImageDraw.Draw(image, "RGBA"), shapes, {}, 2 * size / 100, (0, 0))
    return image.reduce(2)


def make_palette(thing, rng):
    """The drawings' colours: a its own, e b d darker, c lighter; s skin, h hair, t trousers, p
    patches, r a collar."""
    shade = rng.choice(("#000000", "#ffffff"))
    base = mix(COLOURS[thing["colour"]], shade, rng.uniform(0, 0.1))
    if thing["colour"] == "white":
        patches = rng.choice(("#2f2c2c", "#7a4a28"))
    else:
        patches = mix(base, "#4a2a10", 0.6)
    return {
        "a": base,
        "e": mix(base, "#101018", 0.14),
        "b": mix(base, "#101018", 0.24),
        "d": mix(base, "#101018", 0.5),
        "c": mix(base, "#ffffff", 0.4),
        "s": rng.choice(SKIN),
        "h": rng.choice(HAIR),
        "t": rng.choice(TROUSERS),
        "p": patches,
        "r": rng.choice(("#d8392f", "#2f6fd6", "#379c48")),
    }


def draw_thing(thing, palette, size, tint):
    """A placed thing as an RGBA layer and the pixel (x, y) of its corner; `tint` multiplies its
    colours."""
    outline = thing.drawing
    scale = thing["h"] * size * FINE / outline.height
    wide = math.ceil(thing["w"] * size) + 1
    tall = math.ceil(thing["h"] * size) + 1
    transparent = palette["d"] + "00"  # edges fade to dark: a thin outline
    layer = Image.new("RGBA", (wide * FINE, tall * FINE), transparent)
    paint(ImageDraw.Draw(layer), outline.shapes, palette, scale, outline.corner)
    layer = layer.reduce(FINE)
    if thing["flip"]:
        layer = ImageOps.mirror(layer)
    pixels = np.asarray(layer).astype(np.float32)
    light_from_above = np.linspace(1.1, 0.86, tall, dtype=np.float32)[:, None, None]
    pixels[..., :3] *= light_from_above * np.float32(tint)
    corner = (round(thing["x"] * size), round(thing["y"] * size))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), corner


def render(scene, size):
    """Draw a scene -> (RGB image, visible masks bool (n, size, size) of its objects), or None if
    one is hidden."""
    rng = Random(scene["backdrop"] + 1)
    objects = scene["objects"]
    tint = NIGHT if scene["setting"] == "night" else (1, 1, 1)
    layers = [draw_thing(thing, make_palette(thing, rng), size, tint) for thing in objects]
    order = sorted(range(len(objects)), key=lambda i: objects[i]["depth"])
    whole = np.stack([alone(layer, corner, size) for layer, corner in layers])
    visible = whole.copy()
    covered = np.zeros((size, size), bool)
    for i in reversed(order):
        visible[i] &= ~covered
        covered |= whole[i]
    for thing, seen, own in zip(objects, visible, whole):
        if seen.sum() < LEAST_VISIBLE[thing["main"]] * own.sum():
            return None
    image = draw_backdrop(SETTINGS[scene["setting"]], scene["backdrop"], size)
    for i in order:
        cast_shadow(image, objects[i], size)
        layer, corner = layers[i]
        image.paste(layer, corner, layer)
    return image, visible


def alone(layer, corner, size):
    """Which pixels of the image a layer fills, bool (size, size)."""
    canvas = Image.new("L", (size, size))
    canvas.paste(layer.getchannel("A"), corner)
    return np.asarray(canvas) > 127


def cast_shadow(image, thing, size):
    """Darken the ground under a thing that stands on it."""
    if thing.sky or thing.afloat or thing["category"] in WITHOUT_SHADOW:
        return
    left = thing["x"] * size
    right = left + thing["w"] * size
    y = thing.base * size
    r = max(1.5, thing["h"] * size * 0.05)
    ImageDraw.Draw(image, "RGBA").ellipse((left, y - r, right, y + r), (10, 15, 30, 60))


# -------------------------------------------------------------------------------------------- files


def draw_scene(job):
    """Sample, draw and save the image of a job (seed, split, index, bias, size, folder) -> the
    scene, annotated."""
    seed, split, index, bias, size, folder = job
    for attempt in range(ATTEMPTS):
        scene = sample_scene(seed, split, index, bias, attempt)
        drawn = render(scene, size)
        if drawn:
            break
    image, masks = drawn
    scene["file_name"] = f"{scene['image_id']:012d}.jpg"
    image.save(Path(folder) / split / scene["file_name"], quality=QUALITY)
    for thing, mask in zip(scene["objects"], masks):
        code = rle.encode(np.asfortranarray(mask, np.uint8))
        thing["segmentation"] = {"size": [size, size], "counts": code["counts"].decode()}
        thing["area"] = int(rle.area(code))
        thing["bbox"] = rle.toBbox(code).tolist()
        thing["size"] = round(thing["h"], 3)
    return scene


def measure(scenes):
    """How often each planted companion is there with its main object, as a list of rows."""
    planted = [scene["planted"] for scene in scenes if scene["planted"]]
    rows = []
    for pair in PAIRS:
        there = [record["present"] for record in planted if record["pair"] == pair]
        rate = round(sum(there) / len(there), 4) if there else None
        rows.append({"pair": pair, "main": len(there), "both": sum(there), "share": rate})
    return rows


def annotate(scenes, info, size):
    """The three annotation files of one split, as {kind: content}."""
    images = []
    captions = []
    for scene in scenes:
        key = scene["image_id"]
        images.append({"id": key, "file_name": scene["file_name"], "width": size, "height": size})
        for k, text in enumerate(scene["captions"]):
            captions.append({"id": key * 10 + k, "image_id": key, "caption": text})
    boxes = {
        "info": info,
        "images": images,
        "annotations": instances(scenes),
        "categories": category_records(),
    }
    return {
        "captions": {"info": info, "images": images, "annotations": captions},
        "instances": boxes,
        "scenes": {"info": info, "scenes": [truth(scene) for scene in scenes]},
    }


def category_records():
    """The categories as COCO's instances files list them, with a list "synonyms" of our own."""
    records = []
    for number, (name, kind) in enumerate(CATEGORIES.items(), 1):
        record = {"id": number, "name": name, "supercategory": kind.supercategory}
        records.append(record | {"synonyms": kind.synonyms})
    return records


def instances(scenes):
    """COCO's annotations of all objects of these scenes."""
    ids = {name: number for number, name in enumerate(CATEGORIES, 1)}
    rows = []
    for scene in scenes:
        for k, thing in enumerate(scene["objects"]):
            row = {
                "id": scene["image_id"] * 10 + k,
                "image_id": scene["image_id"],
                "category_id": ids[thing["category"]],
                "iscrowd": 0,
                "main": int(thing["main"]),
            }
            rows.append(row | {key: thing[key] for key in ("bbox", "area", "segmentation")})
    return rows


def truth(scene):
    """The record of a scene in scenes_*.json; a relation is [object, words, object] by their
    indices."""
    of_scene = ("image_id", "file_name", "setting", "main", "relations", "planted")
    of_thing = ("category", "colour", "size", "pose", "flip", "bbox", "main")
    record = {key: scene[key] for key in of_scene}
    record["objects"] = []
    for thing in scene["objects"]:
        record["objects"].append({key: thing[key] for key in of_thing})
    return record


def check(counts, size, biases, workers=None):
    """Raise UserError for what makes no sense as arguments of `write_scenes`."""
    for name, count in counts.items():
        if not isinstance(count, int) or count < 0:
            raise UserError(f"{name} must be a whole number of images, 0 or more, not {count}")
    if not isinstance(size, int) or size < 64:
        raise UserError(f"size must be a whole number of pixels, 64 or more, not {size}")
    for name, bias in biases.items():
        if not 0 <= bias <= 1:
            raise UserError(f"the bias of {name} is a probability, from 0 to 1, not {bias}")
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise UserError(f"workers must be a whole number, 1 or more, not {workers}")


def write_scenes(
    folder, train=5000, val=500, test=500, size=128, bias=0.9, test_bias=0.6, seed=0, workers=None
):
    """Draw `train` + `val` + `test` images of `size` x `size` pixels into `folder` with their COCO
    annotation files.

    In train a main object of a planted pair has its companion with probability `bias`, in val and
    test with `test_bias`. The same arguments give the same bytes, however many processes
    (`workers`, default: one a core) draw. Annotation files are written last and older ones removed
    first: a set that has them is whole. UserError for nonsense.
    """
    folder = Path(folder)
    counts = {"train": train, "val": val, "test": test}
    biases = {"train": bias, "val": test_bias, "test": test_bias}
    check(counts, size, biases, workers)
    for old in (folder / "annotations").glob("*_*.json"):
        old.unlink()
    jobs = []
    for split, count in counts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        jobs += [(seed, split, k, biases[split], size, str(folder)) for k in range(count)]
    scenes = iter(draw_all(jobs, workers or os.cpu_count()))
    for split, count in counts.items():
        chosen = list(itertools.islice(scenes, count))
        info = {
            "description": f"embedded scenes, {split}",
            "planted_pairs": PAIRS,
            "bias": biases,
            "measured": measure(chosen),
            "seed": seed,
            "size": size,
        }
        for kind, content in annotate(chosen, info, size).items():
            write_json(folder / "annotations" / f"{kind}_{split}.json", content, indent=None)


def draw_all(jobs, workers):
    """`draw_scene` of every job, in order, by so many processes, with a progress bar."""
    progress = {"total": len(jobs), "desc": "drawing scenes", "unit": "image", "mininterval": 0.5}
    if workers == 1:
        return list(tqdm(map(draw_scene, jobs), **progress))
    with multiprocessing.Pool(workers) as pool:
        return list(tqdm(pool.imap(draw_scene, jobs, chunksize=16), **progress))


# ---------------------------------------------------------------------- what was drawn, and by what


def draw_scenes(root, output, **parameters):
    """`write_scenes(root, **parameters)`, unless these very scenes are in `root`.

    What was prepared in `output` from other drawings, feature caches included, is removed.
    UserError for a folder with the annotations of another dataset: drawing replaces them.
    """
    record = root / "drawn.json"
    wanted = {**parameters, "drawings": fingerprint()}
    if record.exists() and recorded(record) == wanted:
        if shows_other_scenes(output, root):
            remove_prepared(output)
        return
    if not record.exists() and (root / "annotations").exists():
        raise UserError(
            f"{root} holds another dataset; prepare it by its own name, "
            "or give the scenes a folder of their own"
        )
    counts = {split: parameters[split] for split in SPLITS}
    biases = {"train": parameters["bias"], "test": parameters["test_bias"]}
    check(counts, parameters["size"], biases)  # before anything is removed
    remove_prepared(output)
    write_json(record, {})  # begun
    write_scenes(root, **parameters)
    write_json(record, wanted)


def shows_other_scenes(output, root):
    """Whether a folder was prepared from scenes in another folder than `root`. Scenes of one number
    have one name, whatever they show."""
    if not (output / "info.json").exists():
        return False
    info = read_json(output / "info.json")
    if info.get("name") != "scenes":
        return False
    return (output / info["images_root"]).resolve() != root.resolve()


def recorded(path):
    """What a drawn.json says of the scenes beside it, an older one in today's terms."""
    record = read_json(path)
    if isinstance(record, dict) and record.get("scenes.py") == OLD_SOURCE:
        del record["scenes.py"]
        record["drawings"] = OLD_DRAWINGS
    return record


def fingerprint():
    """16 hex digits that stand for what is drawn and said, however this file is written.

    They are a hash of the shapes of all categories in all poses, of backdrops of all settings, of
    the words that captions are made of, and of 45 scenes with their captions. So older drawings are
    told from today's. Pixels are not in it, see RENDERING.
    """
    kinds = {name: described_category(kind) for name, kind in CATEGORIES.items()}
    places = {name: described_setting(setting) for name, setting in SETTINGS.items()}
    words = [DOING, NUMBERS, PRONOUNS, RELATED, PLANTED, FRAMES]
    scenes = []
    for split in SPLITS:
        scenes += [sample_scene(0, split, index, bias=0.9) for index in range(10)]
        scenes += [sample_scene(1, split, index, bias=0.5, attempt=PATIENCE) for index in range(5)]
    palettes = []
    for scene in scenes:
        rng = Random(scene["backdrop"])
        palettes += [make_palette(thing, rng) for thing in scene["objects"]]
    drawn = [RENDERING, LEAST_VISIBLE[True], LEAST_VISIBLE[False], PATIENCE, FINE, QUALITY, NIGHT]
    content = json.dumps([kinds, places, words, scenes, palettes, COLOURS, drawn])
    rounded = json.loads(content, parse_float=rounded_number)  # so that no last bit counts
    return hashlib.sha256(json.dumps(rounded).encode()).hexdigest()[:16]


def rounded_number(text):
    """A number of a JSON text with four decimals."""
    return round(float(text), 4)


def described_category(kind):
    """What `fingerprint` takes of a category: its properties and its shapes in every pose."""
    words = [kind.supercategory, kind.words, kind.colours, kind.settings, kind.clothes, kind.zone]
    sizes = [kind.tall, kind.height, kind.reach, kind.weight]
    shapes = {}
    for pose in kind.poses.split():
        shapes[pose] = described_shapes(kind.outline(pose))
    return [words, sizes, shapes]


def described_setting(setting):
    """What `fingerprint` takes of a setting: its properties and two backdrops."""
    words = [setting.places, setting.over, setting.afloat]
    colours = [setting.skies, setting.ground]
    heights = [setting.horizon, setting.land, setting.water]
    shapes = []
    for seed in range(2):
        shapes.append(described_shapes(setting.decorate(Random(seed), 50)))
    return [words, colours, heights, shapes]


def described_shapes(text):
    """The shapes of a drawing as JSON can hold them."""
    return [[*shape[:3], shape[3].tolist()] for shape in parse(text)]
