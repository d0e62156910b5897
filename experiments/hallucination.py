"""Hallucination (§4.3): does a word's map tell whether any reference says the word?

Each statistic of the map is a score, judged by its area under the ROC curve (AUC).
"""

import torch

from experiments.case import Experiment
from experiments.statistics import AUC_DRAWS, auc_with_interval, draw_images, flattened
from vocabulary import tokenize

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
LABELS = ("supported", "shown")

# The paper's earlier version (Flickr30k and COCO, VGG16): the AUC of telling supported words.
PAPER = {
    "gridtd": {
        ("lrp", "max"): 0.61,
        ("lrp", "mean"): 0.64,
        ("guided_gradcam", "mean size"): 0.54,
        ("1 - beta", "value"): 0.54,
        ("guided_gradcam", "mean"): 0.45,
    },
    "adaptive": {
        ("lrp", "max"): 0.66,
        ("lrp", "mean"): 0.64,
        ("guided_gradcam", "mean size"): 0.58,
        ("1 - beta", "value"): 0.53,
        ("guided_gradcam", "mean"): 0.42,
    },
}


def statistics_of(relevance, method="lrp"):
    """What a method's map may say about whether its word is supported: {name: float}.

    They are max, mean, mean of the positive values, mean of the sizes, and quantiles; no means of
    attention, which sums to 1 for every word. relevance: any tensor, not normalised.
    """
    values = relevance.flatten().double()
    found = {"max": values.max()}
    if method != "attention":
        positive = values[values > 0]
        found["mean"] = values.mean()
        found["mean positive"] = positive.mean() if len(positive) else torch.zeros(())
        found["mean size"] = values.abs().mean()
    for q in QUANTILES:
        found[f"quantile {q}"] = values.quantile(q)
    return {name: value.item() for name, value in found.items()}


def run(cases, setting):
    """Take the statistics of the maps of each occurrence of a frequent object word.

    A record of a word:
        word        the word
        supported   whether a reference says it
        shown       whether the object that it names is annotated; None where the image has no
                    annotated object or the word names none
        scores      {method: statistics_of its map}, and {"1 - beta": {"value": float}} for a
                    captioner with a visual sentinel, whose share of the attention beta is. So
                    are "- position", "probability" and "logit", which need no explanation, but
                    in records of earlier versions
    """
    records = []
    for case in cases:
        said = set()
        for sentence in case.entry["captions"]:
            said.update(tokenize(sentence))
        image_records = []
        for position, word in enumerate(case.words):
            if word in setting.object_words:
                record = {
                    "word": word,
                    "supported": word in said,
                    "shown": is_shown(case, position),
                    "scores": scores_of(case, position),
                }
                image_records.append(record)
        records.append(image_records)
    return records


def is_shown(case, position):
    """Whether the image shows what the word at a position names; None where nobody knows."""
    if not case.annotated or position not in case.named:
        return None
    return case.named[position] in case.annotated


def scores_of(case, position):
    """The scores of the word at a position, as of `run`."""
    scores = {}
    for method, explanation in case.explanations.items():
        scores[method] = statistics_of(explanation.image_relevance[position], method)
    any_explanation = case.any_explanation
    if any_explanation.beta is not None:
        scores["1 - beta"] = {"value": 1 - any_explanation.beta[position].item()}
    scores["- position"] = {"value": -float(position)}
    scores["probability"] = {"value": any_explanation.probabilities[position].item()}
    scores["logit"] = {"value": any_explanation.scores[position].item()}
    return scores


def table(images, model_type):
    """Rows, for each method and each statistic of its map:

    method, statistic
    AUC supported           of telling words that a reference says from words that none says
    low, high supported     its confidence interval
    supported yes/no        how many words of either kind there are
    AUC shown, ...          the same for words that name what the image shows, or does not
    paper                   what the paper reports for `AUC supported`, on other data, or None
    """
    records, numbers = flattened(images)
    if not records:
        return []
    statistics = {}
    for record in records:
        statistics |= record["scores"]
    counts = draw_images(len(images), AUC_DRAWS)
    rows = []
    for method, names in statistics.items():
        for statistic in names:
            row = {"method": method, "statistic": statistic}
            for label in LABELS:
                row |= _columns(label, method, statistic, records, numbers, counts)
            row["paper"] = PAPER.get(model_type, {}).get((method, statistic))
            rows.append(row)
    return rows


def _columns(name, method, statistic, records, numbers, counts):
    """The columns of a row about one label, of the words whose label and score are known.

    numbers: of the words' images.
    """
    scores = []
    labels = []
    own_numbers = []
    for record, number in zip(records, numbers):
        if record[name] is not None and method in record["scores"]:
            scores.append(record["scores"][method][statistic])
            labels.append(int(record[name]))
            own_numbers.append(number)
    value, low, high = auc_with_interval(scores, labels, own_numbers, counts)
    return {
        f"AUC {name}": value,
        f"low {name}": low,
        f"high {name}": high,
        f"{name} yes/no": f"{sum(labels)}/{len(labels) - sum(labels)}",
    }


EXPERIMENT = Experiment(run, table)
