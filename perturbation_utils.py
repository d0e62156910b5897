"""Explanations from changed inputs, which need no gradients: occlusion and RISE.

Each function takes images (B, 3, H, W), the embeddings of the input words (B, T, E), and `score`, a
function of both that returns the explained logits of K words (B, K). It returns {"image": maps
(K, B, H, W), "words": (K, B, T)}, the latter by how much a logit falls without an input word.
"""

import torch
import torch.nn.functional as F

OCCLUDED = 12  # squares along the longer side of an image
MASKS = 500  # of RISE
CELLS = 7  # of a mask of RISE along each side, before it is enlarged
KEPT = 0.5  # the share of an image that a mask of RISE keeps


def occlusion(images, embeddings, score):
    """By how much a logit falls when a square of the image gets the mean colour, which is 0.

    Zeiler and Fergus (2014), with squares that do not overlap.
    """
    before = score(images, embeddings)
    height, width = images.shape[2:]
    side = -(-max(height, width) // OCCLUDED)  # pixels, rounded up
    falls = images.new_zeros(before.shape[1], len(images), height, width)
    for top in range(0, height, side):
        for left in range(0, width, side):
            square = (..., slice(top, top + side), slice(left, left + side))
            hidden = images.clone()
            hidden[square] = 0
            fall = before - score(hidden, embeddings)
            falls[square] = fall.T[..., None, None]
    return {"image": falls, "words": word_falls(images, embeddings, score, before)}


def word_falls(images, embeddings, score, before):
    """By how much the logits `before` (B, K) fall when the embedding of an input word is 0."""
    falls = []
    for position in range(embeddings.shape[1]):
        silent = embeddings.clone()
        silent[:, position] = 0
        falls.append((before - score(images, silent)).T)
    return torch.stack(falls, dim=-1)


def rise(images, embeddings, score):
    """RISE (Petsiuk et al. 2018): the logit of images that a random mask keeps a half of, less the
    mean over all masks, averaged over the masks by how much they keep of a pixel.

    RISE itself does not take the mean off, which adds nearly the same number to every pixel.
    """
    before = score(images, embeddings)
    masks = list(random_masks(images.shape[2:]))
    logits = []
    for mask in masks:
        logits.append(score(images * mask.to(images), embeddings).T)
    mean = torch.stack(logits).mean(dim=0)
    total = images.new_zeros(before.shape[1], len(images), *images.shape[2:])
    for mask, found in zip(masks, logits):
        total += (found - mean)[..., None, None] * mask.to(images)
    maps = total / (len(masks) * KEPT)
    return {"image": maps, "words": word_falls(images, embeddings, score, before)}


def random_masks(size, seed=0):
    """The MASKS masks of RISE (H, W) in 0..1, always the same.

    Each is a grid of CELLS x CELLS random cells, kept with probability KEPT, enlarged bilinearly by
    a cell more than the image, and cut out at a random place.
    """
    generator = torch.Generator().manual_seed(seed)
    cell = [-(-side // CELLS) for side in size]
    enlarged = [(CELLS + 1) * side for side in cell]
    for _ in range(MASKS):
        kept = (torch.rand(1, 1, CELLS, CELLS, generator=generator) < KEPT).float()
        mask = F.interpolate(kept, size=enlarged, mode="bilinear", align_corners=False)[0, 0]
        places = []
        for step, side in zip(cell, size):
            start = int(torch.randint(step + 1, (), generator=generator))
            places.append(slice(start, start + side))
        yield mask[tuple(places)]


def as_measured(leaves, found, attention, grid):
    """The fields of `Explanation` of what `occlusion` or `rise` found; see gradient_utils.py.

    A region's relevance is the mean of the pixels under it.
    """
    maps = found["image"]
    regions = F.adaptive_avg_pool2d(maps.flatten(0, 1), grid).flatten(1)
    return {
        "image_relevance": maps,
        "region_relevance": regions.unflatten(0, maps.shape[:2]),
        "word_relevance": found["words"],
    }
