"""Random holes to train and to measure inpainters with: boxes and strokes of a brush.

All of a hole follows from its random generator, so a resumed training draws the same ones.
"""

import cv2
import numpy as np

BOX_SIDES = (0.2, 0.5)  # of the image's shorter side
STROKES = (1, 4)
CORNERS = (4, 12)  # of a stroke
LENGTHS = (0.05, 0.2)  # from one corner to the next, of the shorter side
WIDTHS = (0.05, 0.15)
TURN = 2 * np.pi / 5  # the mean angle between two parts of a stroke, which zigzags
TURN_SPREAD = 2 * np.pi / 15


def random_holes(count, size, generator):
    """Masks (count, size, size), bool, True in the hole; every second one is a box.

    generator: a numpy Generator.
    """
    masks = [random_box(size, generator) for _ in range((count + 1) // 2)]
    masks += [random_brush(size, generator) for _ in range(count // 2)]
    return np.stack(masks)[generator.permutation(count)]


def random_box(size, generator):
    """A mask (size, size) with one box, each of whose sides is a fifth to half of the image's."""
    height, width = np.round(size * generator.uniform(*BOX_SIDES, 2)).astype(int)
    top = generator.integers(size - height + 1)
    left = generator.integers(size - width + 1)
    mask = np.zeros((size, size), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def random_brush(size, generator):
    """A mask (size, size) with strokes of a brush that zigzags (Yu et al. 2019, algorithm 1)."""
    mask = np.zeros((size, size), np.uint8)
    for _ in range(generator.integers(STROKES[0], STROKES[1] + 1)):
        width = int(round(size * generator.uniform(*WIDTHS)))
        corners = stroke(size, generator)
        cv2.polylines(mask, [corners], False, 1, width)
        for corner in corners:
            cv2.circle(mask, corner.tolist(), width // 2, 1, -1)
    return mask.astype(bool)


def stroke(size, generator):
    """The corners of one stroke, (N, 2) whole pixels within the image."""
    place = generator.uniform(0, size, 2)
    corners = [place]
    angle = generator.uniform(0, 2 * np.pi)
    for turn in range(generator.integers(*CORNERS)):
        side = 1 if turn % 2 else -1
        angle += np.pi - side * generator.normal(TURN, TURN_SPREAD)
        step = size * generator.uniform(*LENGTHS)
        place = np.clip(place + step * np.array([np.cos(angle), np.sin(angle)]), 0, size - 1)
        corners.append(place)
    return np.round(corners).astype(np.int32).clip(0, size - 1)
