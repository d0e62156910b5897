"""The statistics of the experiments' tables: means, areas under ROC curves, and their intervals.

A confidence interval is a percentile bootstrap (Efron & Tibshirani 1993) that draws images with
replacement, because the words of one image depend on each other. A draw is kept as the number of
times that it holds each image. The statistic of a draw is then one of weighted words, and all draws
are computed together: a word counts as often as its image was drawn.
"""

import numpy as np
from sklearn.metrics import roc_auc_score

DRAWS = 1000
AUC_DRAWS = 200
CONFIDENCE = 0.95


def mean(values):
    """The mean of numbers, or the proportion of flags that are true; None if there is no value."""
    return sum(values) / len(values) if values else None


def auc(scores, labels):
    """The area under the ROC curve of telling labels 1 from 0 by score; None for one class only."""
    return float(roc_auc_score(labels, scores)) if len(set(labels)) == 2 else None


def draw_images(images, draws=DRAWS, seed=0):
    """Draw as many images as there are, with replacement, in every draw.

    Returns an int array (images, draws): how often each draw holds each image.
    """
    generator = np.random.default_rng(seed)
    counts = np.empty((images, draws), dtype=int)
    for draw in range(draws):
        chosen = generator.integers(images, size=images)
        counts[:, draw] = np.bincount(chosen, minlength=images)
    return counts


def mean_with_interval(values, images, counts):
    """The mean of numbers or flags and its confidence interval: (mean, low, high), None of nothing.

    values and images: two lists, of each word its value and the number of its image; counts: as of
    `draw_images`.
    """
    sums = np.bincount(images, weights=values, minlength=len(counts))
    sizes = np.bincount(images, minlength=len(counts))
    drawn_sizes = sizes @ counts
    some = drawn_sizes > 0  # draws that hold a word
    drawn_means = (sums @ counts)[some] / drawn_sizes[some]
    return mean(values), *interval(drawn_means)


def auc_with_interval(scores, labels, images, counts):
    """The AUC of all words and its confidence interval: (AUC, low, high), None for one class only.

    scores, labels (0 or 1) and images: three lists, of each word its score, its label and the
    number of its image; counts: as of `draw_images`.
    """
    weights = counts[np.array(images, dtype=int)]
    drawn_aucs = weighted_aucs(np.array(scores), np.array(labels, dtype=bool), weights)
    return auc(scores, labels), *interval(drawn_aucs)


def weighted_aucs(scores, labels, weights):
    """The AUC of each draw, without the draws that hold one class only.

    scores (N,); labels (N,), True for the positives; weights int (N, draws): how often a draw holds
    each of the N words. The AUC is the probability that a positive scores higher than a negative,
    where a tie counts half (Hanley & McNeil 1982). With the negatives' weights added up in the
    order of their scores, it takes two look-ups for each positive: the weight of the negatives
    below it, and the weight of those that are not above it. Their sum counts each win twice and
    each tie once. All sums are of integers and therefore exact.
    """
    positives = scores[labels]
    negatives = scores[~labels]
    order = negatives.argsort()
    cumulated = np.zeros((len(negatives) + 1, weights.shape[1]), dtype=int)
    np.cumsum(weights[~labels][order], axis=0, out=cumulated[1:])
    below = np.searchsorted(negatives, positives, side="left", sorter=order)
    not_above = np.searchsorted(negatives, positives, side="right", sorter=order)
    positive_weights = weights[labels]
    half_wins = ((cumulated[below] + cumulated[not_above]) * positive_weights).sum(axis=0)
    pairs = cumulated[-1] * positive_weights.sum(axis=0)
    both = pairs > 0
    return half_wins[both] / (2 * pairs[both])


def interval(values, confidence=CONFIDENCE):
    """The quantiles between which this part of the values lies: (low, high), None without any."""
    if not len(values):
        return None, None
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return low, high


def flattened(images):
    """The records of all images in one list, and a list of the number of each record's image.

    images: for each image a list of records.
    """
    records = []
    numbers = []
    for number, image in enumerate(images):
        records += image
        numbers += [number] * len(image)
    return records, numbers
