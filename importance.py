"""Object importance by counterfactual images (Fosado, Zhang and Levy): how much an image's caption
changes when an object is taken out of the picture.

    x_k = inpaint(x, m_k),   c_k = caption(x_k),   importance of object k = distance(c, c_k)

where m_k is the mask of object k, dilated. `importance` does this for all objects of an image, and
for null controls, which the paper lacks: the same masks at places without an object, and a mask of
nothing. DISTANCES says how two captions are compared.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from scipy.signal import fftconvolve

from commandline import UserError
from names import DILATION, MAX_AREA, NULLS
from pretrainedmodel import PretrainedCaptioner
from vocabulary import padded

DISTANCES = {
    "sentence": "1 - cosine of the captions' embeddings by a BERT model: 0 the same, 1 unrelated",
    "bertscore": "1 - F of BERTScore of the captions",
    "probability": "mean drop of the probability of the original caption's words",
    "attention": "mean total variation of the attention of the words that both captions have",
    "attention_sum": "total variation of the attention of all words of a caption together",
}
OBJECT = "object"
NULL = "null"
NOTHING = "nothing"
EXACT = "exact"  # the filler that draws a scene again; see redrawing.py


@dataclass(frozen=True)
class Removal:
    """How objects are taken out.

    dilation  how far a mask grows, as a share of the square root of its area
    max_area  objects whose mask covers a larger share of the image stay
    nulls     at most so many places without an object are tried with the mask of each object
    seed      of these places
    """

    dilation: float = DILATION
    max_area: float = MAX_AREA
    nulls: int = NULLS
    seed: int = 0


class SaysNothing(UserError):
    """The captioner has no word for an image."""


class Area(NamedTuple):
    """What is taken out of an image.

    kind    OBJECT, NULL (its mask, where no object is) or NOTHING (no pixel)
    number  index of the object whose mask it is; None for NOTHING
    mask    bool (H, W), dilated
    """

    kind: str
    number: int | None
    mask: np.ndarray


class Spoken(NamedTuple):
    """What a captioner says of an image.

    caption        a list of words
    attention      (T, L) of its words, mean of the heads
    probabilities  (T',) of the words of the original image's caption, teacher-forced
    """

    caption: list
    attention: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class Effect:
    """What changes when an Area is filled.

    caption    the words said then
    distances  {name of DISTANCES: float, or None where it cannot be computed}
    drops      for each word of the original caption how far its probability falls
    attention  [(word, change of its attention)] of the words that both captions have
    """

    caption: list
    distances: dict
    drops: list
    attention: list


@dataclass(frozen=True)
class Importance:
    """What `importance` finds of one image.

    original  Spoken of the image itself
    areas     the Areas that were filled
    removed   indices of the objects that were removed, those that are not too large
    images    {filler: for each area its image uint8 (H, W, 3), or None}
    spoken    {filler: for each area its Spoken, or None}
    effects   {filler: for each area its Effect, or None}
    """

    original: Spoken
    areas: list
    removed: list
    images: dict
    spoken: dict
    effects: dict

    def effect(self, filler, number):
        """The Effect of removing the object of this index."""
        for area, effect in zip(self.areas, self.effects[filler]):
            if area.kind == OBJECT and area.number == number:
                return effect
        raise KeyError(number)


# ------------------------------------------------------------------------------------------- masks


def dilated(mask, share):
    """A mask bool (H, W), grown by a disc whose radius is `share` times the square root of its
    area.

    A pixel belongs to it if it is at most the radius away from a pixel of the mask, from centre to
    centre. An empty mask stays empty.
    """
    if not mask.any():
        return mask.copy()
    radius = share * np.sqrt(mask.sum())
    return distance_transform_edt(~mask) <= radius


def null_masks(mask, occupied, count, generator):
    """The same shape at places without an object: at most `count` masks bool (H, W).

    occupied: bool (H, W), the pixels of all objects, which no mask touches; nor do they touch each
    other. Each place is drawn from all that fit; `generator` is a NumPy one. There are fewer masks
    where no more fit.
    """
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return []
    shape = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    occupied = occupied.copy()
    found = []
    for _ in range(count):
        # Every overlap is a whole number; the transform leaves it within a tiny error.
        overlap = fftconvolve(occupied.astype(float), shape[::-1, ::-1].astype(float), mode="valid")
        free = np.argwhere(overlap < 0.5)
        if not len(free):
            break
        top, left = free[generator.integers(len(free))]
        moved = np.zeros_like(mask)
        moved[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
        found.append(moved)
        occupied |= moved
    return found


def areas_of(objects, removal, key=0):
    """What is to be taken out of an image: (Areas, the indices of the objects among them).

    objects: ImageObjects of one image; removal: a Removal; key: an int that stands for the image
    in the random places. First comes the Area of NOTHING, then of each object that is not too large
    its own Area and its null controls.
    """
    masks = [dilated(thing.mask, removal.dilation) for thing in objects]
    occupied = np.any(masks, axis=0)
    areas = [Area(NOTHING, None, np.zeros_like(occupied))]
    removed = []
    for number, (thing, mask) in enumerate(zip(objects, masks)):
        if thing.mask.mean() > removal.max_area:
            continue
        removed.append(number)
        areas.append(Area(OBJECT, number, mask))
        generator = np.random.default_rng([removal.seed, key, number])
        for moved in null_masks(mask, occupied, removal.nulls, generator):
            areas.append(Area(NULL, number, moved))
    return areas, removed


def filler_of(inpainter):
    """A filler, a function of (image, Area), of an inpainter, a function of (image, mask)."""

    def fill(image, area):
        return inpainter(image, area.mask)

    return fill


# ----------------------------------------------------------------------------------- what is said


def observe(captioner, images, decoding):
    """What a captioner says of images: a Spoken of each; the first is the original.

    images: uint8 arrays (H, W, 3); decoding: what `captioner.caption` takes besides images.
    UserError if it says nothing of the first.
    """
    photographs = [Image.fromarray(image) for image in images]
    if isinstance(captioner, PretrainedCaptioner):
        seen = photographs
        captions = captioner.caption(photographs, **decoding)
        say = _explained
    else:
        seen = captioner.encode(captioner.pixels_of(photographs))
        captions = captioner.decode(seen, **decoding)
        say = teacher_forced
    original = captions[0]
    if not original:
        raise SaysNothing("the captioner says nothing of the image, so no object matters to it")
    own = say(captioner, seen, captions)
    forced = say(captioner, seen, [original] * len(images))
    spoken = []
    for caption, (_, attention), (probabilities, _) in zip(captions, own, forced):
        spoken.append(Spoken(caption, attention, probabilities))
    return spoken


@torch.no_grad()
def teacher_forced(captioner, features, captions):
    """How probable the words of captions are, and where the captioner looks for them.

    features (B, L, D); captions: B lists of words. Returns for each caption of T words its
    probabilities (T,) and its attention (T, L), the mean of the heads, as float64 arrays.
    """
    vocabulary = captioner.vocabulary
    rows = []
    for words in captions:
        rows.append([vocabulary.start, *vocabulary.encode(words), vocabulary.end])
    tokens = padded(rows).to(captioner.device)
    captioner = captioner.eval_view()
    unrolled = captioner.teacher_forced(features, tokens[:, None, :-1])
    probabilities = captioner.last_layer(unrolled.addends)[:, 0].double().softmax(dim=-1)
    chosen = probabilities.gather(-1, tokens[:, 1:, None])[..., 0].cpu().numpy()
    attention = unrolled.attention[:, 0].double().mean(dim=2).cpu().numpy()
    found = []
    for row, words in enumerate(captions):
        found.append((chosen[row, : len(words)], attention[row, : len(words)]))
    return found


def _explained(captioner, photographs, captions):
    """What `teacher_forced` returns, of a captioner of transformers and PIL images."""
    found = []
    for row, words in enumerate(captions):
        if not words:
            found.append((np.zeros(0), np.zeros((0, 1))))
            continue
        explained = captioner.explain([photographs[row]], [words], method="attention")[0]
        attention = explained.attention.double().mean(dim=1).numpy()
        found.append((explained.probabilities.double().numpy(), attention))
    return found


# --------------------------------------------------------------------------------------- distances


def total_variation(one, other):
    """½‖one - other‖₁ of two distributions (L,): 0 if they are equal, 1 if they have no place in
    common."""
    return float(np.abs(one - other).sum() / 2)


def normalised_sum(attention):
    """The attention (T, L) of all words of a caption together, as a distribution (L,)."""
    summed = attention.sum(axis=0)
    return summed / summed.sum()


def common_words(words, others):
    """The words of two captions that both have: [(word, position, position in the other)].

    The n-th time that a word occurs in the one belongs to the n-th time in the other.
    """
    places = defaultdict(list)
    for position, word in enumerate(others):
        places[word].append(position)
    found = []
    for position, word in enumerate(words):
        if places[word]:
            found.append((word, position, places[word].pop(0)))
    return found


def effect_of(original, changed, text_distances):
    """The Effect of a changed image, of the Spoken of the original and of the changed one.

    text_distances: {"sentence": float, "bertscore": float}, or {} without a BERT model.
    """
    changes = []
    for word, position, other in common_words(original.caption, changed.caption):
        change = total_variation(original.attention[position], changed.attention[other])
        changes.append((word, change))
    drops = original.probabilities - changed.probabilities
    distances = dict.fromkeys(DISTANCES)
    distances |= text_distances
    distances["probability"] = float(drops.mean())
    if changes:
        distances["attention"] = float(np.mean([change for _, change in changes]))
    if changed.caption:
        distances["attention_sum"] = total_variation(
            normalised_sum(original.attention), normalised_sum(changed.attention)
        )
    return Effect(changed.caption, distances, drops.tolist(), changes)


def effects_of(spoken, sentences=None):
    """The Effect of each Spoken against the first; sentences: a SentenceModel, or None."""
    original = spoken[0]
    texts = [" ".join(found.caption) for found in spoken]
    by_text = {} if sentences is None else sentences.distances(texts[0], texts)
    effects = []
    for row, changed in enumerate(spoken):
        own = {name: values[row] for name, values in by_text.items()}
        effects.append(effect_of(original, changed, own))
    return effects


# ------------------------------------------------------------------------------------ of one image


def importance(
    captioner, image, objects, fillers, removal=None, sentences=None, decoding=None, key=0
):
    """How important each object of an image is to its caption: an Importance.

    captioner: one that looks at pixels; image: uint8 (H, W, 3); objects: its ImageObjects;
    fillers: {name: function of (image, Area) that returns the image without the area, or None if
    it cannot}; removal: a Removal; sentences: a SentenceModel, or None to leave out the two
    distances that need one; decoding: what `captioner.caption` takes; key: as of `areas_of`.

    An image that comes about twice is looked at once. UserError for a captioner of bottom-up
    features, without objects, or if the captioner says nothing of the image.
    """
    if captioner.encoder.given:
        raise UserError("bottom-up features come without pixels, so no object can be removed")
    if not objects:
        raise UserError("there is no object to remove")
    areas, removed = areas_of(objects, removal or Removal(), key)
    images = {}
    for name, fill in fillers.items():
        images[name] = [fill(image, area) for area in areas]
    distinct = {image.tobytes(): image}
    for filled in images.values():
        distinct |= {one.tobytes(): one for one in filled if one is not None}
    spoken = observe(captioner, list(distinct.values()), decoding or {})
    effects = dict(zip(distinct, effects_of(spoken, sentences)))
    said = dict(zip(distinct, spoken))
    return Importance(
        original=spoken[0],
        areas=areas,
        removed=removed,
        images=images,
        spoken={name: _looked_up(said, filled) for name, filled in images.items()},
        effects={name: _looked_up(effects, filled) for name, filled in images.items()},
    )


def _looked_up(values, images):
    """What a dict holds of images by their bytes; None of no image."""
    return [None if image is None else values[image.tobytes()] for image in images]


def described(found, objects, filler):
    """What one filler found of an image, as JSON can hold it: a dict of

    caption, probabilities   of the image itself
    nothing                  the effect of filling no pixel
    objects                  of each object a dict of name, area (share of the image), removed (its
                             effect; None for an object that is too large) and nulls (effects)

    An effect is a dict of caption, the DISTANCES, drops [[word, drop of its probability]] and
    attention_changes [[word, change]]. found: an Importance; objects: the ImageObjects.
    """
    by_area = defaultdict(list)
    for area, effect in zip(found.areas, found.effects[filler]):
        by_area[area.kind, area.number].append(_described_effect(effect, found.original.caption))
    things = []
    for number, thing in enumerate(objects):
        own = by_area[OBJECT, number]
        things.append(
            {
                "name": thing.name,
                "area": float(thing.mask.mean()),
                "removed": own[0] if own else None,
                "nulls": by_area[NULL, number],
            }
        )
    return {
        "caption": " ".join(found.original.caption),
        "probabilities": found.original.probabilities.tolist(),
        "nothing": by_area[NOTHING, None][0],
        "objects": things,
    }


def _described_effect(effect, words):
    """An Effect as JSON can hold it; words: of the original caption."""
    return {
        "caption": " ".join(effect.caption),
        **effect.distances,
        "drops": list(map(list, zip(words, effect.drops))),
        "attention_changes": list(map(list, effect.attention)),
    }


def importance_map(masks, values):
    """The importance of objects as a map (H, W): the mean over the objects that cover a pixel.

    masks: bool (n, H, W); values (n,). NaN where no object is.
    """
    masks = np.asarray(masks)
    covered = masks.sum(axis=0)
    total = np.tensordot(np.asarray(values, dtype=float), masks, axes=1)
    return np.where(covered > 0, total / np.maximum(covered, 1), np.nan)


def shares_inside(explanation, masks):
    """How much of an explanation lies in each object: the share of the positive relevance.

    explanation: an Explanation of a whole caption, whose maps (T, H, W) are summed over the words
    before the negative part is cut off; masks: bool (H', W') each, which are stretched to the maps'
    size. Returns floats, None where nothing is positive.
    """
    positive = explanation.image_relevance.double().sum(dim=0).clamp(min=0).numpy()
    total = positive.sum()
    if not total:
        return [None] * len(masks)
    return [float(positive[resized(mask, positive.shape)].sum() / total) for mask in masks]


def resized(mask, shape):
    """A mask bool (H, W) at another size: each new pixel has the value at its centre."""
    picked = []
    for new, old in zip(shape, mask.shape):
        centres = (np.arange(new) + 0.5) * old / new
        picked.append(centres.astype(int))
    return mask[np.ix_(*picked)]
