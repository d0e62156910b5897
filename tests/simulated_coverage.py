"""How often intervals of 95 % hold the truth, simulated, for designs as in docs/PROTOCOL.md.

python tests/simulated_coverage.py 1000        # so many simulated studies a row; a few minutes
"""

import sys

import numpy as np
from scipy.stats import norm

from experiments.inference import (
    added_auc,
    auc_difference,
    crossed_draws,
    crossed_estimate,
    mean_estimate,
    ratio,
)
from experiments.statistics import draw_images, interval

EFFECT = 0.02  # the true difference of two captioners' shares
DIFFERING = 0.15  # of the images, for which the two outcomes differ
WITHIN_IMAGES = 0.5  # the deviation of what all scores of an image share
DRAWS = 500


def holds(low, high, truth):
    """Whether an interval holds the truth."""
    return low <= truth <= high


def simulated_units(generator, units, images, spread):
    """Differences (units, images) of binary outcomes, -1, 0 or 1, whose mean is EFFECT on average.

    spread: the standard deviation of the units' own means. Images have means of their own too.
    """
    of_units = generator.normal(0, spread, (units, 1))
    of_images = generator.normal(0, 0.03, images)
    means = np.clip(EFFECT + of_units + of_images, -DIFFERING, DIFFERING)
    uniform = generator.random((units, images))
    better = uniform < (DIFFERING + means) / 2
    worse = uniform > 1 - (DIFFERING - means) / 2
    return better.astype(float) - worse


def crossed_coverage(studies, units, images, spread, seed=0, bootstrap=True):
    """The shares of studies whose intervals hold EFFECT: of t, of the crossed bootstrap's
    percentiles (None without `bootstrap`), and of images alone."""
    generator = np.random.default_rng(seed)
    found = []
    for study in range(studies):
        values = simulated_units(generator, units, images, spread)
        crossed = crossed_estimate([values])
        alone = crossed_estimate([values.mean(axis=0, keepdims=True)])
        row = [holds(crossed.low, crossed.high, EFFECT), np.nan]
        if bootstrap:
            draws = crossed_draws([pairs_of(values)], ratio, draws=DRAWS, seed=study * 100)
            row[1] = holds(*interval(draws), EFFECT)
        row.append(holds(alone.low, alone.high, EFFECT))
        found.append(row)
    return np.mean(found, axis=0)


def pairs_of(values):
    """Differences (units, images) as pairs of columns: themselves, and zeros."""
    ones = np.ones(values.shape[1])
    pairs = []
    for unit in values:
        pairs.append((np.stack([unit, ones], axis=1), np.stack([0 * ones, ones], axis=1)))
    return pairs


def words_of_images(generator, images):
    """The numbers of the images of words, of which an image has zero to four."""
    return np.repeat(np.arange(images), generator.integers(0, 5, images))


def share_coverage(studies, images=200, seed=0, draws=DRAWS):
    """The share of studies whose interval holds a proportion of words that depend within images."""
    generator = np.random.default_rng(seed)
    found = []
    for study in range(studies):
        numbers = words_of_images(generator, images)
        of_images = generator.beta(4, 6, images)  # mean 0.4
        values = generator.random(len(numbers)) < of_images[numbers]
        estimate = mean_estimate(values, numbers, draw_images(images, draws, study))
        found.append(holds(estimate.low, estimate.high, 0.4))
    return np.mean(found)


def true_auc(shift, noise):
    """The AUC of scores of `simulated_scores`: two normals, `shift` apart, of these variances."""
    variance = 1 + WITHIN_IMAGES**2 + noise**2
    return norm.cdf(shift / np.sqrt(2 * variance))


def simulated_scores(generator, numbers, shift, noise):
    """Labels and two scores of words; numbers (N,): of their images, which the scores depend on."""
    of_images = generator.normal(0, WITHIN_IMAGES, numbers.max() + 1)
    labels = generator.random(len(numbers)) < 0.6
    shared = generator.normal(0, 1, len(numbers)) + shift * labels + of_images[numbers]
    first = shared + generator.normal(0, noise, len(numbers))
    second = shared + generator.normal(0, 2 * noise, len(numbers))
    return labels, first, second


def auc_coverage(studies, images=200, seed=0, draws=DRAWS, shift=1.0, noise=0.7):
    """The share of studies whose interval holds the true difference of two AUCs."""
    truth = true_auc(shift, noise) - true_auc(shift, 2 * noise)
    generator = np.random.default_rng(seed)
    found = []
    for study in range(studies):
        numbers = words_of_images(generator, images)
        labels, first, second = simulated_scores(generator, numbers, shift, noise)
        counts = draw_images(images, draws, study)
        estimate = auc_difference(first, second, labels, numbers, counts)
        found.append(holds(estimate.low, estimate.high, truth))
    return np.mean(found)


def false_increments(studies, images=300, seed=0):
    """The share of studies in which a feature that says nothing is found to add to the AUC, and the
    share in which it is found to take from it."""
    generator = np.random.default_rng(seed)
    found = []
    for study in range(studies):
        numbers = words_of_images(generator, images)
        labels, first, _ = simulated_scores(generator, numbers, 1.0, 0.7)
        idle = generator.normal(0, 1, (len(numbers), 1))
        counts = draw_images(images, DRAWS, study)
        estimate = added_auc(first[:, None], idle, labels, numbers, counts)
        found.append([estimate.low > 0, estimate.high < 0])
    return np.mean(found, axis=0)


def main():
    """Print the tables."""
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print("units  spread  t      bootstrap  images only")
    for units in (3, 5):
        for spread in (0.0, 0.005, 0.01, 0.02, 0.03):
            shares = crossed_coverage(studies, units, 1000, spread)
            print(
                f"{units:5d}  {spread:6.3f}  {shares[0]:.3f}  {shares[1]:.3f}      {shares[2]:.3f}"
            )
    print(f"a share of words, 200 images: {share_coverage(studies):.3f}")
    print(f"a difference of AUCs, 200 images: {auc_coverage(studies):.3f}")
    up, down = false_increments(studies)
    print(f"an idle feature is found to add to / take from the AUC: {up:.3f} / {down:.3f}")


if __name__ == "__main__":
    main()
