"""Correctness (§4.2, eq. 9, Figure 3): does the relevance lie on the object that the word names?

The pointing game (Zhang et al. 2018) and rank accuracy (Arras et al. 2022) ask the same in other
ways. No function changes a map that it is given.
"""

import numpy as np
import torch
from pycocotools import mask as rle

from experiments.case import Experiment
from experiments.statistics import draw_images, flattened, mean, mean_with_interval
from gradient_utils import enlarge
from plots import correctness_figure

THRESHOLDS = tuple(step / 10 for step in range(10))  # Figure 3
NEVER_NEGATIVE = ("attention", "gradcam")  # methods whose maps have no negative part
CURVES = ("union", "best box", "segmentation")


def box_masks(boxes, size, shape):
    """Boxes as masks bool (N, H, W) of a map of `shape` (H, W): the pixels whose centre is inside.

    boxes: N of (x1, y1, x2, y2) in the pixels of an image of `size` (width, height).
    """
    height, width = shape
    x = (torch.arange(width) + 0.5) * size[0] / width
    y = (torch.arange(height) + 0.5) * size[1] / height
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        rows = (y >= y1) & (y < y2)
        columns = (x >= x1) & (x < x2)
        mask[:] = rows.unsqueeze(1) & columns.unsqueeze(0)
    return masks


def segmentation_mask(segmentation, size, shape):
    """A COCO segmentation as a mask bool (H, W) of `shape`.

    segmentation: polygons or a run-length code of an image of `size` (width, height).
    """
    if isinstance(segmentation, list):
        segmentation = rle.merge(rle.frPyObjects(segmentation, size[1], size[0]))
    elif isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, *segmentation["size"])
    mask = torch.from_numpy(rle.decode(segmentation).astype(bool))
    rows, columns = ((torch.arange(new) + 0.5) * old / new for new, old in zip(shape, mask.shape))
    return mask[rows.long()][:, columns.long()]


def correctness(relevance, masks, thresholds=THRESHOLDS):
    """The proportion of a map's positive relevance that lies inside (eq. 9).

    relevance (H, W); masks bool (N, H, W); thresholds: on the map divided by its maximum. Returns
    (N, thresholds), 0 where nothing is above a threshold.
    """
    tiny = torch.finfo(relevance.dtype).tiny
    positive = relevance.clamp(min=0)
    positive = positive / positive.max().clamp(min=tiny)
    results = []
    for threshold in thresholds:
        kept = torch.where(positive > threshold, positive, 0)
        results.append((kept * masks).sum(dim=(1, 2)) / kept.sum().clamp(min=tiny))
    return torch.stack(results, dim=1)


def hits(relevance, mask):
    """The pointing game: whether the highest point of a map (H, W) lies in a mask.

    False for a map without any positive relevance.
    """
    return bool(relevance.max() > 0 and mask.flatten()[relevance.argmax()])


def rank_accuracy(relevance, mask):
    """The proportion of the K highest pixels of a map (H, W) that lie in a mask of K pixels."""
    count = int(mask.sum())
    if not count:
        return 0.0
    highest = relevance.flatten().argsort(descending=True, stable=True)[:count]
    return mask.flatten()[highest].float().mean().item()


def localisation(relevance, boxes, outline):
    """How well a map (H, W) finds an object: a dict, see `run`.

    boxes: masks (N, H, W); outline: a mask (H, W), or None.
    """
    union = boxes.any(0)
    found = {
        "union": correctness(relevance, union.unsqueeze(0))[0].tolist(),
        "best box": correctness(relevance, boxes).amax(0).tolist(),
    }
    if outline is not None:
        found["segmentation"] = correctness(relevance, outline.unsqueeze(0))[0].tolist()
    found["pointing game"] = hits(relevance, union)
    found["rank accuracy"] = rank_accuracy(relevance, union)
    return found


def run(cases, setting):
    """Localise the relevance of each word that names an annotated object.

    A record of a word:
        word      the word
        area      the part of the image that the union of the object's boxes covers
        methods   {method: what `localisation` returns}, where "negative METHOD" is the negative
                  relevance and "attention, best head" has the best head's value of each figure:
            union, best box, segmentation   correctness at each of THRESHOLDS; segmentation only
                                            where all these objects have an outline
            pointing game                   whether the highest point lies in the union
            rank accuracy                   see `rank_accuracy`, of the union
    """
    grid = setting.captioner.encoder.grid
    records = []
    for case in cases:
        image_records = []
        for position, category in case.named.items():
            if category in case.annotated:
                image_records.append(localise(case, position, category, grid))
        records.append(image_records)
    return records


def localise(case, position, category, grid):
    """The record of the word at a position; grid: rows and columns of the encoder's regions."""
    boxes, outline = object_masks(case, category)
    maps = {}
    for method, explanation in case.explanations.items():
        maps[method] = explanation.image_relevance[position]
    for method in case.explanations:
        if method not in NEVER_NEGATIVE:
            maps[f"negative {method}"] = -maps[method]
    methods = {}
    for method, relevance in maps.items():
        methods[method] = localisation(relevance, boxes, outline)
    if "attention" in maps:
        heads = case.explanations["attention"].attention[position]  # (heads, L)
        if len(heads) > 1:
            head_maps = enlarge(heads.unsqueeze(1), grid, case.pixels)[:, 0]  # (heads, H, W)
            methods["attention, best head"] = best_head(head_maps, boxes, outline)
    area = boxes.any(0).float().mean().item()
    return {"word": case.words[position], "area": area, "methods": methods}


def object_masks(case, category):
    """The boxes (N, H, W) of the annotated objects of a category, and their outline (H, W).

    The outline is None unless all these objects have a segmentation.
    """
    things = [thing for thing in case.entry["objects"] if thing["category"] == category]
    size = (case.entry["width"], case.entry["height"])
    shape = case.pixels.shape[1:]
    boxes = box_masks([thing["bbox"] for thing in things], size, shape)
    if not all(thing.get("segmentation") for thing in things):
        return boxes, None
    outlines = [segmentation_mask(thing["segmentation"], size, shape) for thing in things]
    return boxes, torch.stack(outlines).any(0)


def best_head(maps, boxes, outline):
    """The best value of each figure of `localisation` over several maps (heads, H, W)."""
    found = [localisation(relevance, boxes, outline) for relevance in maps]
    best = {}
    for name in found[0]:
        best[name] = np.max([one[name] for one in found], axis=0).tolist()
    return best


def table(images, model_type):
    """Rows: first "area", what a map of one value would get, and then of each method:

    method
    words                   how many words that name an annotated object there are
    union, low, high        mean correctness without a threshold in the union of the boxes, with
                            its confidence interval
    best box, segmentation  likewise in the best box, and in the outline if there always is one
    pointing game           the proportion of hits
    rank accuracy           its mean
    curves                  {union, best box, segmentation: the mean at each of THRESHOLDS}
    """
    records, numbers = flattened(images)
    if not records:
        return []
    counts = draw_images(len(images))
    area = mean([record["area"] for record in records])
    rows = [{"method": "area", "words": len(records), "union": area}]
    for method in records[0]["methods"]:
        found = [record["methods"][method] for record in records]
        rows.append({"method": method, **_columns(found, numbers, counts)})
    return rows


def _columns(words, numbers, counts):
    """The columns of a row about words' localisations; numbers: of their images."""
    without_threshold = [found["union"][0] for found in words]
    value, low, high = mean_with_interval(without_threshold, numbers, counts)
    curves = {}
    for name in CURVES:
        if all(name in found for found in words):
            curves[name] = np.mean([found[name] for found in words], axis=0).tolist()
    columns = {"words": len(words), "union": value, "low": low, "high": high}
    for name in CURVES[1:]:
        if name in curves:
            columns[name] = curves[name][0]
    columns["pointing game"] = mean([found["pointing game"] for found in words])
    columns["rank accuracy"] = mean([found["rank accuracy"] for found in words])
    columns["curves"] = curves
    return columns


def figure(rows):
    """Figure 3 of the paper, of a table; None if the table has no curve."""
    curves = {row["method"]: row["curves"] for row in rows if "curves" in row}
    return correctness_figure(curves, THRESHOLDS) if curves else None


EXPERIMENT = Experiment(run, table, figure)
