"""Image ablation (§4.1): the patches that matter most for an object word get the mean colour.

Is the word gone from the caption of what is left? In addition, deletion and insertion (Petsiuk et
al. 2018): the word's probability while more and more patches are deleted, or inserted, best first.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch

from experiments.case import Experiment
from experiments.probabilities import last_word_probabilities
from experiments.statistics import draw_images, flattened, mean, mean_with_interval

# The paper deletes the 20 best patches of 8x8 pixels of a 224x224 image.
PATCH = 8
PATCHES = 20
PATCH_IMAGE = 224
FRACTIONS = tuple(step / 10 for step in range(11))  # of the patches deleted or inserted
CAPTIONED_AT_ONCE = 64  # images with deleted patches


def patch_count(height, width):
    """How many patches are as large a part of an image of this size as 20 are of 224x224."""
    return max(1, round(PATCHES * height * width / PATCH_IMAGE**2))


def patch_sums(relevance):
    """The sums (patches,) of a map (H, W) over its patches of 8x8 pixels, numbered row by row.

    Pixels beyond the last whole patch belong to none.
    """
    rows, columns = (side // PATCH for side in relevance.shape)
    whole = relevance[: rows * PATCH, : columns * PATCH]
    return whole.reshape(rows, PATCH, columns, PATCH).sum(dim=(1, 3)).flatten()


def patch_order(relevance):
    """The patches of a map (H, W), numbered as in `patch_sums`, by falling sum."""
    return patch_sums(relevance).argsort(descending=True, stable=True).tolist()


def random_order(shape, generator):
    """All patches of a map of this shape (H, W) in random order."""
    patches = (shape[0] // PATCH) * (shape[1] // PATCH)
    return generator.sample(range(patches), patches)


def patches_mask(indices, shape):
    """These patches as a mask bool (H, W)."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for index in indices:
        row, column = divmod(index, shape[1] // PATCH)
        mask[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = True
    return mask


def blanked(image, mask):
    """An ImageNet-normalised image (3, H, W) with the pixels of a mask at the mean colour, 0."""
    return image.masked_fill(mask.to(image.device), 0)


@dataclass(frozen=True)
class Trial:
    """An image to caption again without the best patches of a method for a word.

    record: the word's record, where the result goes; before: the word's probability.
    """

    record: dict
    method: str
    before: float
    pixels: torch.Tensor


def run(cases, setting):
    """Delete the best patches of each word that names an object.

    A record of a word, where a method may also be "random":
        word        the word
        gone        {method: whether the new caption does not say the word}
        drop        {method: by how much its probability drops in the new caption, None if gone}
        deletion    {method: its mean probability in the old caption while patches are deleted}
        insertion   {method: likewise, while patches are inserted into an image of the mean colour}
    """
    records = []
    trials = []
    for case in cases:
        generator = random.Random(f"patches {case.seed}")
        image_records = []
        for position in case.named:
            orders = patch_orders(case, position, generator)
            record = {"word": case.words[position], "gone": {}, "drop": {}}
            record |= deletion_and_insertion(setting.captioner, case, position, orders)
            image_records.append(record)
            trials += trials_of(case, position, orders, record)
        records.append(image_records)
    for first in range(0, len(trials), CAPTIONED_AT_ONCE):
        caption_again(trials[first : first + CAPTIONED_AT_ONCE], setting)
    return records


def patch_orders(case, position, generator):
    """{method, or "random": all patches, the best for the word at a position first}."""
    orders = {}
    for method, explanation in case.explanations.items():
        orders[method] = patch_order(explanation.image_relevance[position])
    orders["random"] = random_order(case.pixels.shape[1:], generator)
    return orders


def trials_of(case, position, orders, record):
    """A Trial of each method's patch order."""
    shape = case.pixels.shape[1:]
    before = case.any_explanation.probabilities[position].item()
    trials = []
    for method, order in orders.items():
        mask = patches_mask(order[: patch_count(*shape)], shape)
        trials.append(Trial(record, method, before, blanked(case.pixels, mask)))
    return trials


def caption_again(trials, setting):
    """Caption the images of some trials, and write into their records whether the word is gone."""
    captioner = setting.captioner
    features = captioner.encode(torch.stack([trial.pixels for trial in trials]))
    captions = captioner.decode(features, **setting.decoding)
    sequences = []
    for trial, words in zip(trials, captions):
        word = trial.record["word"]
        said = words[: words.index(word) + 1] if word in words else None
        sequences.append([captioner.vocabulary.encode(said)] if said else [])
    probabilities = last_word_probabilities(captioner, features, sequences)
    for trial, found in zip(trials, probabilities):
        trial.record["gone"][trial.method] = not found
        trial.record["drop"][trial.method] = trial.before - found[0] if found else None


def deletion_and_insertion(captioner, case, position, orders):
    """The mean probability of a word of the same caption while patches are deleted or inserted.

    orders: {method: patches}. Returns {"deletion": {method: float}, "insertion": {method: float}}
    (Petsiuk et al. 2018).
    """
    shape = case.pixels.shape[1:]
    variants = []
    for order in orders.values():
        masks = []
        for fraction in FRACTIONS:
            masks.append(patches_mask(order[: round(fraction * len(order))], shape))
        variants += [blanked(case.pixels, mask) for mask in masks]
        variants += [blanked(case.pixels, ~mask) for mask in masks]
    ids = captioner.vocabulary.encode(case.words)[: position + 1]
    features = captioner.encode(torch.stack(variants))
    found = last_word_probabilities(captioner, features, [[ids]] * len(variants))
    means = np.array(found).reshape(len(orders), 2, len(FRACTIONS)).mean(axis=2).tolist()
    return {
        "deletion": {method: deletion for method, (deletion, _) in zip(orders, means)},
        "insertion": {method: insertion for method, (_, insertion) in zip(orders, means)},
    }


def table(images, model_type):
    """Rows, for each method:

    method
    words                   how many words that name an object there are
    gone, low, high         the proportion of them that are gone, with its confidence interval
    drops of the rest       the proportion of the other words whose probability drops
    mean drop               of the probability of the other words
    deletion                mean probability while patches are deleted; lower is better
    insertion               mean probability while patches are inserted; higher is better
    """
    records, numbers = flattened(images)
    if not records:
        return []
    counts = draw_images(len(images))
    rows = []
    for method in records[0]["gone"]:
        gone = [record["gone"][method] for record in records]
        value, low, high = mean_with_interval(gone, numbers, counts)
        drops = [record["drop"][method] for record in records if not record["gone"][method]]
        row = {
            "method": method,
            "words": len(records),
            "gone": value,
            "low": low,
            "high": high,
            "drops of the rest": mean([drop > 0 for drop in drops]),
            "mean drop": mean(drops),
            "deletion": mean([record["deletion"][method] for record in records]),
            "insertion": mean([record["insertion"][method] for record in records]),
        }
        rows.append(row)
    return rows


EXPERIMENT = Experiment(run, table)
