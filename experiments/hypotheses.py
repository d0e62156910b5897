"""The hypotheses of docs/PROTOCOL.md, from the records that study.py keeps.

H1 to H4 take what was found of the images of one captioner (`explained_record`). H5 to H8 take the
caption records (`captionscores.image_records`) of several trainings of several captioners.
"""

import numpy as np

from experiments.captionscores import (
    bleu_4,
    bleu_of,
    chair_i_of,
    chair_s_of,
    cider_of,
    f1_of,
    precision_of,
    word_counts,
)
from experiments.inference import (
    TEST_DRAWS,
    added_auc,
    crossed_contrast,
    crossed_draws,
    crossed_estimate,
    estimate_of_draws,
    mean_estimate,
    pseudo_values,
    ratio,
)
from experiments.statistics import draw_images

# What is measured of captions: the columns of a list of records, and the statistic of their sums.
METRICS = {
    "CIDEr": (cider_of, ratio),
    "BLEU-4": (bleu_of, bleu_4),
    "CHAIR-s": (chair_s_of, ratio),
    "CHAIR-i": (chair_i_of, ratio),
    "micro precision": (precision_of, ratio),
    "micro F1": (f1_of, ratio),
}
CLAIMS = {
    "H1": "words by LRP beat the last words and random ones",
    "H2": "LRP localises better than attention",
    "H2b": "Grad-CAM localises better than attention",
    "H2c": "Guided Grad-CAM localises better than LRP",
    "H3": "negative LRP lies off the object and opposes the word",
    "H4": "LRP adds to position, probability and logit",
    "H5": "LRP-inference lowers CHAIR-s, because of relevance",
    "H6": "LRP-inference raises micro precision",
    "H7": "LRP-inference costs less than 1 point of CIDEr",
    "H8": "the adaptive captioner gains more than grid-TD",
}
# What the components of a hypothesis are, in their order, if there are several.
COMPONENTS = {
    "H1": (
        "object words, LRP's words less the last",
        "object words, LRP's words less random ones",
        "stop words, LRP's words less the last",
        "stop words, LRP's words less random ones",
    ),
    "H3": (
        "boxes' area less what lies in them",
        "rise without the most negative patches",
        "that rise less the one without random patches",
    ),
    "H5": ("continued training less LRP-inference", "random weights less LRP-inference"),
}
# The unit of each component; points are hundredths.
UNITS = {
    "H1": ("probability",) * 4,
    "H2": ("points",),
    "H2b": ("points",),
    "H2c": ("points",),
    "H3": ("points", "probability", "probability"),
    "H4": ("AUC",),
    "H5": ("points", "points"),
    "H6": ("points",),
    "H7": ("points",),
    "H8": ("points",),
}
CIDER_MARGIN = 1.0  # points
NEEDED_ARMS = {"continued", "lrp", "random"}
LEAST_SEEDS = 3  # of a captioner, to test anything of its trainings
LEAST_SAID = 20  # captions of every arm that say a word, for macro precision
DIGITS = 6  # of a kept number


# -------------------------------------------------------------------------- of one captioner: H1-H4


def explained_record(record):
    """What is kept of an image's record (`experiments.case.examine`), for H1 to H4:

    drops      of each stop or object word: {"kind", and by how much its probability drops: "lrp",
               "recent", "random"}
    inside     of each word with an annotated object: {method: correctness in the union of boxes}
    sign       the records of experiments/sign.py
    frequent   of each frequent object word: {"word", "supported", "lrp": mean of the map,
               "position", "probability", "logit"}
    """
    drops = []
    for found in record.get("word_ablation", []):
        kept = {name: round(found["drop"][name], DIGITS) for name in ("lrp", "recent", "random")}
        drops.append({"kind": found["kind"], **kept})
    inside = []
    for found in record.get("correctness", []):
        union = {}
        for method in ("lrp", "gradcam", "guided_gradcam", "attention"):
            union[method] = round(found["methods"][method]["union"][0], DIGITS)
        inside.append(union)
    frequent = []
    for found in record.get("hallucination", []):
        scores = found["scores"]
        words = {"word": found["word"], "supported": found["supported"]}
        words["lrp"] = scores["lrp"]["mean"]
        words["position"] = -scores["- position"]["value"]
        words["probability"] = round(scores["probability"]["value"], DIGITS)
        words["logit"] = round(scores["logit"]["value"], DIGITS)
        frequent.append(words)
    return {
        "drops": drops,
        "inside": inside,
        "sign": record.get("sign", []),
        "frequent": frequent,
    }


def explanation_hypotheses(images, draws=TEST_DRAWS, seed=0):
    """{name: (components, margins)} of H1 to H4, for `inference.verdicts`.

    images: of each image its `explained_record`. A hypothesis without any word has no components.
    """
    if not images:
        return {name: ([], []) for name in ("H1", "H2", "H2b", "H2c", "H3", "H4")}
    counts = draw_images(len(images), draws, seed)
    return {
        "H1": (word_components(images, counts), [0.01] * 4),
        "H2": (inside_component(images, "lrp", "attention", counts), [2]),
        "H2b": (inside_component(images, "gradcam", "attention", counts), [2]),
        "H2c": (inside_component(images, "guided_gradcam", "lrp", counts), [2]),
        "H3": (sign_components(images, counts), [2, 0.002, 0.002]),
        "H4": (added_component(images, counts), [0.01]),
    }


def component(values, numbers, counts):
    """The Estimate of the words' mean in a list, which is empty if there is no word."""
    return [mean_estimate(values, numbers, counts)] if values else []


def word_components(images, counts):
    """H1: LRP's drop less that of the last words and of random ones, object words, stop words."""
    found = []
    for kind in ("object", "stop"):
        for baseline in ("recent", "random"):
            values = []
            numbers = []
            for number, image in enumerate(images):
                for word in image["drops"]:
                    if word["kind"] == kind:
                        values.append(word["lrp"] - word[baseline])
                        numbers.append(number)
            found += component(values, numbers, counts)
    return found


def inside_component(images, better, worse, counts):
    """H2: the correctness of a method less that of another, in points."""
    values = []
    numbers = []
    for number, image in enumerate(images):
        for word in image["inside"]:
            values.append(100 * (word[better] - word[worse]))
            numbers.append(number)
    return component(values, numbers, counts)


def sign_components(images, counts, what="patches"):
    """H3: how far negative relevance lies off the object, in points, and the rise of the word's
    probability without it, as it is and less that without others.

    what: "patches", or "words" for the secondary result, which has no first component.
    """
    off = []
    rises = []
    beyond_chance = []
    off_numbers = []
    numbers = []
    for number, image in enumerate(images):
        for word in image["sign"]:
            if word["inside"] is not None:
                off.append(100 * (word["area"] - word["inside"]))
                off_numbers.append(number)
            if word[what] is not None:
                rises.append(word[what]["negative"])
                beyond_chance.append(word[what]["negative"] - word[what]["random"])
                numbers.append(number)
    found = component(off, off_numbers, counts) if what == "patches" else []
    return found + component(rises, numbers, counts) + component(beyond_chance, numbers, counts)


def added_component(images, counts, with_word=False):
    """H4: what the mean of LRP's map adds to the AUC of position, probability and logit.

    with_word: also to the identity of the word, the secondary result. Empty for one class only.
    """
    baseline = []
    further = []
    labels = []
    numbers = []
    names = []
    for number, image in enumerate(images):
        for word in image["frequent"]:
            baseline.append([word["position"], word["probability"], word["logit"]])
            further.append([word["lrp"]])
            labels.append(word["supported"])
            numbers.append(number)
            names.append(word["word"])
    if len(set(labels)) < 2:
        return []
    baseline = np.array(baseline)
    if with_word:
        vocabulary = sorted(set(names))
        identity = np.array(names)[:, None] == np.array(vocabulary)[None]
        baseline = np.concatenate([baseline, identity.astype(float)], axis=1)
    labels = np.array(labels, dtype=int)
    return [added_auc(baseline, np.array(further), labels, np.array(numbers), counts)]


# ------------------------------------------------------------------------ of many trainings: H5-H8


def crossed_values(units, metric, first, second):
    """Differences (units, images) of pseudo-values of a captioner's trainings.

    units: for each seed {arm: list of the images' records}; metric: of METRICS; first, second:
    arms.
    """
    columns, statistic = METRICS[metric]
    rows = []
    for arms in units:
        one = pseudo_values(columns(arms[first]), statistic)
        rows.append(one - pseudo_values(columns(arms[second]), statistic))
    return np.array(rows)


def arm_difference(captioners, metric, first, second):
    """The Estimate of an arm's metric less another's, the mean over captioners.

    captioners: {name: for each seed {arm: list of records}}.
    """
    groups = [crossed_values(units, metric, first, second) for units in captioners.values()]
    return crossed_estimate(groups)


def bootstrap_difference(captioners, metric, first, second, draws=TEST_DRAWS):
    """The same by the crossed bootstrap, reported beside it: see docs/PROTOCOL.md."""
    columns, statistic = METRICS[metric]
    groups = []
    for units in captioners.values():
        groups.append([(columns(arms[first]), columns(arms[second])) for arms in units])
    value = arm_difference(captioners, metric, first, second).value
    return estimate_of_draws(value, crossed_draws(groups, statistic, draws))


def tuning_hypotheses(captioners):
    """{name: (components, margins)} of H5 to H8, for `inference.verdicts`.

    captioners: {name: for each seed {arm: list of the images' records}}, with the arms "continued",
    "lrp" and "random". Without one of them, or with fewer than three seeds of a captioner, nothing
    is tested; H8 needs the captioners "adaptive" and "gridtd".
    """
    if not captioners or not all(map(_is_enough, captioners.values())):
        return {name: ([], []) for name in ("H5", "H6", "H7", "H8")}
    lowered = [arm_difference(captioners, "CHAIR-s", arm, "lrp") for arm in ("continued", "random")]
    cider = []
    for units in captioners.values():
        cider.append(crossed_values(units, "CIDEr", "lrp", "continued") + CIDER_MARGIN)
    found = {
        "H5": (lowered, [1, 1]),
        "H6": ([arm_difference(captioners, "micro precision", "lrp", "continued")], [1]),
        "H7": ([crossed_estimate(cider)], [None]),
        "H8": ([], []),
    }
    if {"adaptive", "gridtd"} <= captioners.keys():
        gains = {}
        for name in ("adaptive", "gridtd"):
            gains[name] = crossed_values(captioners[name], "micro precision", "lrp", "continued")
        found["H8"] = ([crossed_contrast(gains["adaptive"], gains["gridtd"])], [1])
    return found


def _is_enough(units):
    """Whether a captioner has the seeds and the arms that the tests need."""
    return len(units) >= LEAST_SEEDS and all(arms.keys() >= NEEDED_ARMS for arms in units)


def macro_precision(captioners, arms):
    """Macro precision over the words that every arm says often, and the table of single words.

    captioners: as of `tuning_hypotheses`; arms: those to compare. Returns {arm: points, or None}
    and rows {"word", arm: [rightly said, said]} of all words, all captioners and seeds together.
    """
    counts = {}
    for arm in arms:
        records = []
        for units in captioners.values():
            for unit in units:
                records += unit[arm]
        counts[arm] = word_counts(records)
    words = set()
    for of_words in counts.values():
        words.update(of_words)
    rows = []
    often = []
    for word in sorted(words):
        row = {"word": word}
        for arm in arms:
            row[arm] = counts[arm].get(word, [0, 0])
        rows.append(row)
        if all(row[arm][1] >= LEAST_SAID for arm in arms):
            often.append(row)
    means = dict.fromkeys(arms)
    for arm in arms:
        if often:
            means[arm] = 100 * float(np.mean([row[arm][0] / row[arm][1] for row in often]))
    return means, rows
