"""Word ablation (§4.1, Table 2): the preceding words that matter most for a word are deleted.

Does the word become less probable, and less than without random words?
"""

import random

import torch

from experiments.case import Experiment
from experiments.probabilities import last_word_probabilities
from experiments.statistics import draw_images, flattened, mean, mean_with_interval
from vocabulary import STOP_WORDS

FIRST_TARGET = 5  # the first five words of a caption are left out (§4.1)
DELETED_WORDS = 3
# Methods whose largest word relevance counts; of the others it is the largest size.
SIGNED_WORDS = ("lrp", "attnlrp", "occlusion", "rise")
# Methods that differ in the encoder only: one word relevance, which the paper calls "gradient".
WORD_GRADIENTS = ("gradient", "gradcam", "guided_gradcam", "guided_backprop")

# The paper's earlier version (Flickr30k and COCO, VGG16): how often a word's probability drops.
PAPER = {
    "gridtd": {
        ("stop", "lrp"): 0.7121,
        ("stop", "gradient"): 0.7365,
        ("stop", "random"): 0.1749,
        ("object", "lrp"): 0.5487,
        ("object", "gradient"): 0.4804,
        ("object", "random"): 0.1176,
    },
    "adaptive": {
        ("stop", "lrp"): 0.9032,
        ("stop", "gradient"): 0.9025,
        ("stop", "random"): 0.7832,
        ("object", "lrp"): 0.9206,
        ("object", "gradient"): 0.9297,
        ("object", "random"): 0.8430,
    },
}


def related_words(relevance, position, signed, count=DELETED_WORDS):
    """The `count` preceding words that matter most for a word, as sorted positions.

    relevance (T,): the word's row of Explanation.word_relevance, that is of `<start>`, word 0, word
    1 ...; `<start>` is never chosen. signed: the highest relevance counts (LRP), else the highest
    absolute relevance (gradients).
    """
    scores = relevance[1 : position + 1]
    if not signed:
        scores = scores.abs()
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def random_words(position, generator, count=DELETED_WORDS):
    """As many of the same candidates, drawn without replacement, as sorted positions."""
    return sorted(generator.sample(range(position), min(count, position)))


def recent_words(position, count=DELETED_WORDS):
    """The last words before a position, as sorted positions."""
    return list(range(max(0, position - count), position))


def without(words, positions):
    """The words, or their token ids, but for those at `positions`."""
    return [word for place, word in enumerate(words) if place not in set(positions)]


def run(cases, setting):
    """Delete words before each stop word and each object word, from the sixth word on.

    A record of a word:
        word    the word
        kind    "stop" or "object"
        drop    {method, "random", or "recent" for the last words: by how much the word's
                probability drops}. Records of earlier versions have no "recent"
    """
    vocabulary = setting.captioner.vocabulary
    records = []
    sequences = []
    for case in cases:
        generator = random.Random(f"words {case.seed}")
        ids = vocabulary.encode(case.words)
        image_records = []
        image_sequences = []
        for position, kind in targets(case):
            deleted = deleted_words(case, position, generator)
            image_records.append(
                {"word": case.words[position], "kind": kind, "drop": dict.fromkeys(deleted)}
            )
            until = ids[: position + 1]
            image_sequences.append(until)
            image_sequences += [without(until, places) for places in deleted.values()]
        records.append(image_records)
        sequences.append(image_sequences)
    features = torch.stack([case.features for case in cases])
    probabilities = last_word_probabilities(setting.captioner, features, sequences)
    for image_records, found in zip(records, probabilities):
        found = iter(found)  # as many as image_sequences had
        for record in image_records:
            before = next(found)
            for method in record["drop"]:
                record["drop"][method] = before - next(found)
    return records


def targets(case):
    """The words to ask about: (position, "stop" or "object"), in the caption's order."""
    found = []
    for position, word in enumerate(case.words):
        if position < FIRST_TARGET:
            continue
        if position in case.named:
            found.append((position, "object"))
        elif word in STOP_WORDS:
            found.append((position, "stop"))
    return found


def deleted_words(case, position, generator):
    """{"random", "recent" or method: positions of the words to delete before a position}."""
    deleted = {"random": random_words(position, generator), "recent": recent_words(position)}
    for method, explanation in case.explanations.items():
        if method != "attention":  # it says nothing of words
            relevance = explanation.word_relevance[position]
            deleted[method] = related_words(relevance, position, method in SIGNED_WORDS)
    return deleted


def table(images, model_type):
    """Rows of Table 2, for each kind of word and each method:

    kind, method
    words           how many words of this kind there are
    drops           the proportion of them whose probability drops
    low, high       its confidence interval
    mean drop       of the probability
    paper           what the paper reports for `drops`, on other data, or None
    """
    records, numbers = flattened(images)
    if not records:
        return []
    counts = draw_images(len(images))
    rows = []
    for kind in ("stop", "object"):
        methods = {}
        for record in records:
            if record["kind"] == kind:
                methods |= record["drop"]
        for method in methods:
            drops, own_numbers = _drops_of(kind, method, records, numbers)
            row = {"kind": kind, "method": method, **_columns(drops, own_numbers, counts)}
            name = "gradient" if method in WORD_GRADIENTS else method
            row["paper"] = PAPER.get(model_type, {}).get((kind, name))
            rows.append(row)
    return rows


def _drops_of(kind, method, records, numbers):
    """The drops of the words of a kind for which a method was tried, and their images' numbers."""
    drops = []
    own_numbers = []
    for record, number in zip(records, numbers):
        if record["kind"] == kind and method in record["drop"]:
            drops.append(record["drop"][method])
            own_numbers.append(number)
    return drops, own_numbers


def _columns(drops, numbers, counts):
    """The columns of a row about the drops of words; numbers: of their images."""
    value, low, high = mean_with_interval([drop > 0 for drop in drops], numbers, counts)
    return {
        "words": len(drops),
        "drops": value,
        "low": low,
        "high": high,
        "mean drop": mean(drops),
    }


EXPERIMENT = Experiment(run, table)
