"""Does negative LRP relevance speak against a word? What is deleted has negative relevance only.

The paper says that the sign of relevance tells support from opposition (§4.1). Then deleting what
opposes a word should raise its probability, and should raise it more than deleting as much at
random does. A word without negative relevance says nothing about that, and is left out of it.

study.py runs this beside the paper's experiments; it is no row of EXPERIMENTS.
"""

import random

import torch

from experiments.case import Experiment
from experiments.correctness import correctness, object_masks
from experiments.image_ablation import (
    blanked,
    patch_count,
    patch_order,
    patch_sums,
    patches_mask,
    random_order,
)
from experiments.probabilities import last_word_probabilities
from experiments.statistics import draw_images, flattened, mean_with_interval
from experiments.word_ablation import DELETED_WORDS, random_words, without

METHOD = "lrp"


def opposing_patches(relevance):
    """The patches with the most negative sums of a map (H, W), at most 2.6 % of the image.

    They come most negative first; none has a sum of zero or more.
    """
    most = patch_count(*relevance.shape)
    sums = patch_sums(relevance)
    return [patch for patch in patch_order(-relevance)[:most] if sums[patch] < 0]


def opposing_words(relevance, position):
    """The preceding words with the most negative relevance, at most three, as sorted positions.

    relevance (T,): the word's row of Explanation.word_relevance; `<start>` is never chosen.
    """
    scores = relevance[1 : position + 1]
    order = scores.argsort(stable=True)[:DELETED_WORDS].tolist()
    return sorted(place for place in order if scores[place] < 0)


def run(cases, setting):
    """Delete what has negative relevance for each word that names an object.

    A record of a word, where None says that nothing has negative relevance:
        word     the word
        inside   the part of its negative relevance of the image in the boxes of its object, None
                 also where the image has no such box
        area     the part of the image that these boxes cover, or None
        patches  {"negative": by how much the probability of the word rises in the same caption
                 without these patches, "random": without as many others}, or None
        words    the same for preceding words, or None
    """
    return [_records_of(case, setting.captioner) for case in cases]


def _records_of(case, captioner):
    """The records of one image."""
    if METHOD not in case.explanations:
        return []
    generator = random.Random(f"sign {case.seed}")
    records = []
    for position, category in case.named.items():
        relevance = case.explanations[METHOD].image_relevance[position]
        inside, area = _inside(case, category, relevance)
        record = {
            "word": case.words[position],
            "inside": inside,
            "area": area,
            "patches": patches_rise(captioner, case, position, generator),
            "words": words_rise(captioner, case, position, generator),
        }
        records.append(record)
    return records


def _inside(case, category, relevance):
    """The part of the negative relevance in the boxes, or None, and their area, or None."""
    if category not in case.annotated:
        return None, None
    boxes, _ = object_masks(case, category)
    union = boxes.any(0)
    area = union.float().mean().item()
    if not (relevance < 0).any():
        return None, area
    return correctness(-relevance, union.unsqueeze(0), (0.0,)).item(), area


def patches_rise(captioner, case, position, generator):
    """`patches` of the record of the word at a position."""
    relevance = case.explanations[METHOD].image_relevance[position]
    opposing = opposing_patches(relevance)
    others = random_order(relevance.shape, generator)[: len(opposing)]
    if not opposing:
        return None
    images = [case.pixels]
    for patches in (opposing, others):
        images.append(blanked(case.pixels, patches_mask(patches, relevance.shape)))
    ids = captioner.vocabulary.encode(case.words)[: position + 1]
    features = captioner.encode(torch.stack(images))
    found = last_word_probabilities(captioner, features, [[ids]] * len(images))
    before, negative, chance = (row[0] for row in found)
    return {"negative": negative - before, "random": chance - before}


def words_rise(captioner, case, position, generator):
    """`words` of the record of the word at a position."""
    relevance = case.explanations[METHOD].word_relevance[position]
    opposing = opposing_words(relevance, position)
    others = random_words(position, generator, len(opposing))
    if not opposing:
        return None
    until = captioner.vocabulary.encode(case.words)[: position + 1]
    sequences = [until, without(until, opposing), without(until, others)]
    found = last_word_probabilities(captioner, case.features.unsqueeze(0), [sequences])
    before, negative, chance = found[0]
    return {"negative": negative - before, "random": chance - before}


def table(images, model_type):
    """Rows, for "patches" and "words" and for what was deleted of them:

    what, deleted
    words               how many words there are that something has negative relevance for
    rise, low, high     the mean rise of their probability, with its confidence interval
    """
    records, numbers = flattened(images)
    counts = draw_images(len(images))
    rows = []
    for what in ("patches", "words"):
        for deleted in ("negative", "random"):
            rises = []
            own_numbers = []
            for record, number in zip(records, numbers):
                if record[what] is not None:
                    rises.append(record[what][deleted])
                    own_numbers.append(number)
            if rises:
                value, low, high = mean_with_interval(rises, own_numbers, counts)
                row = {"what": what, "deleted": deleted, "words": len(rises)}
                rows.append(row | {"rise": value, "low": low, "high": high})
    return rows


EXPERIMENT = Experiment(run, table)
