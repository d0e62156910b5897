"""What each image contributes to the metrics of its split's captions, so that images can be drawn.

BLEU is made anew of the drawn images' n-gram counts. CIDEr is the mean of the images' scores: the
document frequencies stay those of all images' references.
"""

import numpy as np

from captionmetrics import chosen_object_words
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.chair.chair import chair, mentioned_objects, true_objects
from pycocoevalcap.cider.cider import Cider

BLEU_ORDER = 4
TINY = 1e-15  # as of pycocoevalcap: what keeps BLEU's logarithms and ratios finite
SMALL = 1e-9


def image_records(captions):
    """What each image of a `Captions` contributes: {key: record}. The record of an image:

    bleu            10 integers: of 1..4-grams how many match a reference, and how many there are;
                    the caption's words, and those of the reference of the closest length
    cider           its score
    objects         how many objects the caption names
    wrong objects   how many of them are neither annotated nor named by a reference
    right           the frequent object words that it and a reference say
    wrong           the frequent object words that it says, and no reference
    missed          how many of them a reference says, and it does not
    """
    keys = list(captions.predictions)
    annotated = captions.annotated or {key: set() for key in keys}
    truth = true_objects(captions.reference_words, annotated, captions.phrases)
    _, _, hallucinated = chair(captions.words, truth, captions.phrases)
    frequent = set(chosen_object_words(captions))
    bleu_rows = bleu_columns(captions.tokens, keys)
    tokens = captions.tokens
    _, ciders = Cider().compute_score(tokens.references, tokens.predictions)
    records = {}
    for row, key in enumerate(keys):
        said = frequent.intersection(captions.words[key])
        true = frequent & captions.words_of_references[key]
        right = said & true
        records[key] = {
            "bleu": bleu_rows[row].tolist(),
            "cider": round(float(ciders[row]), 6),
            "objects": len(mentioned_objects(captions.words[key], captions.phrases)),
            "wrong objects": len(hallucinated[key]),
            "right": sorted(right),
            "wrong": sorted(said - right),
            "missed": len(true - said),
        }
    return records


def bleu_columns(tokens, keys):
    """The counts that BLEU is made of: int (images, 10), as of `image_records`.

    tokens: a captionmetrics.Tokens; keys: of the images, in order.
    """
    rows = []
    for key in keys:
        scorer = BleuScorer(n=BLEU_ORDER)
        scorer += (tokens.predictions[key][0], tokens.references[key])
        counts = scorer.ctest[0]
        lengths = counts["reflen"]
        closest = scorer._single_reflen(lengths, "closest", counts["testlen"])
        rows.append([*counts["correct"], *counts["guess"], counts["testlen"], closest])
    return np.array(rows)


def bleu_4(totals):
    """The statistic BLEU-4 (Papineni et al. 2002) of sums of `bleu_columns`: (..., 10) -> (...)."""
    correct = totals[..., :BLEU_ORDER] + TINY
    guessed = totals[..., BLEU_ORDER : 2 * BLEU_ORDER] + SMALL
    precision = np.prod(correct / guessed, axis=-1) ** (1 / BLEU_ORDER)
    shortness = (totals[..., -2] + TINY) / (totals[..., -1] + SMALL)
    return precision * np.exp(np.minimum(0, 1 - 1 / shortness))


def bleu_of(records):
    """The columns of `bleu_4` of a list of image records."""
    return np.array([record["bleu"] for record in records], dtype=float)


def cider_of(records):
    """The columns of `ratio` for CIDEr in points, of a list of image records."""
    return np.array([[100 * record["cider"], 1] for record in records], dtype=float)


def chair_s_of(records):
    """The columns of `ratio` for CHAIR-s in points, of a list of image records."""
    return np.array([[100 * (record["wrong objects"] > 0), 1] for record in records], dtype=float)


def chair_i_of(records):
    """The columns of `ratio` for CHAIR-i in points, of a list of image records."""
    rows = [[100 * record["wrong objects"], record["objects"]] for record in records]
    return np.array(rows, dtype=float)


def precision_of(records):
    """The columns of `ratio` for the micro precision of object words in points."""
    rows = []
    for record in records:
        right = len(record["right"])
        rows.append([100 * right, right + len(record["wrong"])])
    return np.array(rows, dtype=float)


def f1_of(records):
    """The columns of `ratio` for the micro F1 of object words in points."""
    rows = []
    for record in records:
        right = len(record["right"])
        both = 2 * right + len(record["wrong"]) + record["missed"]
        rows.append([200 * right, both])
    return np.array(rows, dtype=float)


def word_counts(records):
    """{word: [captions that say it rightly, captions that say it]} of a list of image records."""
    counts = {}
    for record in records:
        for word in [*record["right"], *record["wrong"]]:
            right_and_said = counts.setdefault(word, [0, 0])
            right_and_said[0] += word in record["right"]
            right_and_said[1] += 1
    return counts
