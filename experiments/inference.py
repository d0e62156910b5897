"""The tests of docs/PROTOCOL.md: estimates with intervals and p-values, of one captioner over its
images, or of several trainings that share their images.

A *statistic* is a function of totals over images: `ratio` of two of them, BLEU of n-gram counts,
and so on. Each image contributes a row of *columns*, so that a resampled set of images is a sum of
rows, and every draw is computed at once. All differences are paired: both sides see the same
images and, where there are several, the same trainings.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.statistics import auc, draw_images, interval, weighted_aucs

TEST_DRAWS = 10_000
LEVEL = 0.05
FOLDS = 5
DRAWS_AT_ONCE = 500  # of an AUC, whose memory grows with words x draws


@dataclass(frozen=True)
class Estimate:
    """An estimated difference.

    value         the estimate
    low, high     its interval of 95 %
    inner         its interval of 90 %, (low, high), for tests of equivalence
    p             two-sided, of the difference being zero; None if there is no test
    """

    value: float
    low: float
    high: float
    inner: tuple
    p: float | None

    def within(self, margin):
        """Whether two one-sided tests at 5 % say that the difference is smaller than a margin.

        Schuirmann (1987): they do if the interval of 90 % lies within -margin and +margin.
        """
        low, high = self.inner
        return -margin < low and high < margin


# ------------------------------------------------------------------------------ of one captioner


def bootstrap_p(draws):
    """The two-sided p of zero from bootstrap draws, 2 (1 + k) / (B + 1) and at most 1.

    k of the B draws lie on the rarer side of zero, zero itself counting to both (Davison and
    Hinkley 1997, §4.2.5). It belongs to the percentile interval, which holds zero where p is large.
    """
    rarer = min(np.sum(draws <= 0), np.sum(draws >= 0))
    return min(1.0, 2 * (1 + int(rarer)) / (len(draws) + 1))


def estimate_of_draws(value, draws):
    """The Estimate of a value and its bootstrap draws: percentile intervals.

    Draws in which the statistic is not defined, NaN, are left out; without any other p is None.
    """
    draws = draws[np.isfinite(draws)]
    low, high = interval(draws)
    p = bootstrap_p(draws) if len(draws) else None
    return Estimate(value, low, high, interval(draws, 1 - 2 * LEVEL), p)


def ratio(totals):
    """The statistic of columns (numerator, denominator): (..., 2) -> (...), NaN of nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return totals[..., 0] / totals[..., 1]


def paired_difference(first, second, statistic, counts):
    """The Estimate of statistic(first) - statistic(second), by drawing images.

    first, second: columns (images, k); statistic: (..., k) -> (...); counts: int (images, draws) as
    of `draw_images`. Draws in which the statistic is not defined are left out.
    """
    value = statistic(first.sum(axis=0)) - statistic(second.sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = statistic(counts.T @ first) - statistic(counts.T @ second)
    return estimate_of_draws(float(value), draws[np.isfinite(draws)])


def word_columns(values, images, count):
    """The columns (images, 2) of a mean over words: sums of their values, and their numbers.

    values, images: two lists, of each word its value and the number of its image; count: of images.
    """
    sums = np.bincount(images, weights=values, minlength=count)
    sizes = np.bincount(images, minlength=count)
    return np.stack([sums, sizes], axis=1).astype(float)


def mean_estimate(values, images, counts):
    """The Estimate of the mean of words' values against zero, by drawing images.

    values, images: as of `word_columns`; counts: as of `draw_images`. With paired differences as
    values it is the paired test of two means.
    """
    columns = word_columns(values, images, len(counts))
    zeros = np.stack([np.zeros(len(columns)), np.ones(len(columns))], axis=1)
    return paired_difference(columns, zeros, ratio, counts)


def auc_difference(first, second, labels, images, counts):
    """The Estimate of the AUC of scores less that of other scores of the same words.

    first, second: (N,) scores; labels (N,) of 0 and 1; images (N,): the numbers of the words'
    images; counts: as of `draw_images`.
    """
    truth = np.asarray(labels, dtype=bool)
    value = auc(first, truth) - auc(second, truth)
    draws = []
    for start in range(0, counts.shape[1], DRAWS_AT_ONCE):
        weights = counts[np.asarray(images), start : start + DRAWS_AT_ONCE]
        # Both leave out the same draws, those with one class only.
        part = weighted_aucs(first, truth, weights) - weighted_aucs(second, truth, weights)
        draws.append(part)
    return estimate_of_draws(float(value), np.concatenate(draws))


def out_of_fold(features, labels, images, folds=FOLDS):
    """How probable label 1 is for each word, by logistic regressions that have not seen its image.

    features (N, K); labels (N,); images (N,): numbers of the words' images, which are never divided
    between folds. Returns (N,). Features are standardised on the words of the training folds.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000))
    splits = GroupKFold(folds)
    found = cross_val_predict(
        model, features, labels, groups=images, cv=splits, method="predict_proba"
    )
    return found[:, 1]


def added_auc(baseline, further, labels, images, counts):
    """The Estimate of what further features add to the AUC of a baseline, both out of fold.

    baseline (N, K) and further (N, J): features of the words; the rest: as of `auc_difference`.
    The predictions are resampled; the regressions are not fitted anew.
    """
    without = out_of_fold(baseline, labels, images)
    together = np.concatenate([baseline, further], axis=1)
    return auc_difference(out_of_fold(together, labels, images), without, labels, images, counts)


# ---------------------------------------------------------------------------- of several trainings


def pseudo_values(columns, statistic):
    """The jackknife's pseudo-values (images,) of a statistic, moved to have it as their mean.

    columns (images, k); statistic: (..., k) -> (...). The value of an image is how much the
    statistic owes to it, times the number of images (Efron and Tibshirani 1993, ch. 11). Of a plain
    mean they are the images' own values.
    """
    total = columns.sum(axis=0)
    value = statistic(total)
    count = len(columns)
    values = count * value - (count - 1) * statistic(total - columns)
    return values - values.mean() + value


def crossed_parts(values):
    """The three parts of the variance of the mean of a captioner's trainings over their images.

    values (units, images), of at least two units. Returns the units' part, the images' part and the
    rest: mean squares over units x images, of which each of the first two holds the third once.
    """
    units, images = values.shape
    of_units = values.mean(axis=1)
    of_images = values.mean(axis=0)
    residual = values - of_units[:, None] - of_images[None] + values.mean()
    rest = (residual**2).sum() / ((units - 1) * (images - 1))
    return (
        of_units.var(ddof=1) / units,
        of_images.var(ddof=1) / images,
        rest / (units * images),
    )


def crossed_estimate(groups):
    """The Estimate of a mean over captioners of means over trainings, all on the same images.

    groups: for each captioner values (units, images), such as differences of pseudo-values. Units
    and images are both taken as random: V = V(units) + V(images) - V(rest), at least V(images), and
    t with Satterthwaite's degrees of freedom (the quasi-F of Clark 1973). V(images) is that of the
    images' means over all captioners. With one unit of a captioner there is no V(units): the
    interval is over images only, and p is None.
    """
    count = len(groups)
    value = float(np.mean([values.mean() for values in groups]))
    image_means = np.mean([values.mean(axis=0) for values in groups], axis=0)
    images = len(image_means)
    of_images = image_means.var(ddof=1) / images
    squares = of_images**2 / (images - 1)
    if min(len(values) for values in groups) < 2:
        return _t_estimate(value, of_images, images - 1, tested=False)
    variance = of_images
    for values in groups:
        of_units, _, rest = (part / count**2 for part in crossed_parts(values))
        variance += of_units - rest
        squares += of_units**2 / (len(values) - 1)
        squares += rest**2 / ((len(values) - 1) * (images - 1))
    variance = max(variance, of_images)
    freedom = variance**2 / squares if squares else images - 1
    return _t_estimate(value, variance, freedom)


def crossed_contrast(first, second):
    """The Estimate of one captioner's mean less another's, as `crossed_estimate` has it.

    first, second: values (units, images) of the two captioners, on the same images.
    """
    half = crossed_estimate([first, -second])
    parts = (half.value, half.low, half.high, *half.inner)
    value, low, high, inner_low, inner_high = (2 * part for part in parts)
    return Estimate(value, low, high, (inner_low, inner_high), half.p)


def _t_estimate(value, variance, freedom, tested=True):
    """The Estimate of a normal value with this variance and its degrees of freedom."""
    from scipy.stats import t as student_t  # slow to import, and for the replication only

    error = float(np.sqrt(variance))
    half = student_t.ppf(1 - LEVEL / 2, freedom) * error
    inner = student_t.ppf(1 - LEVEL, freedom) * error
    p = None
    if tested and np.isfinite(error):
        p = float(2 * student_t.sf(abs(value) / error, freedom)) if error else float(value == 0)
    return Estimate(value, value - half, value + half, (value - inner, value + inner), p)


def crossed_draws(groups, statistic, draws=TEST_DRAWS, seed=0):
    """Bootstrap draws (draws,) of the mean over captioners of the mean over trainings of
    statistic(first) - statistic(second), images and trainings both drawn with replacement.

    groups: for each captioner a list of trainings, each a pair of columns (images, k). The images
    of a draw are the same for all. With few trainings the percentiles of these draws do not hold
    their level: see docs/PROTOCOL.md.
    """
    images = len(groups[0][0][0])
    counts = draw_images(images, draws, seed)
    total = np.zeros(draws)
    for number, pairs in enumerate(groups, start=1):
        unit_counts = draw_images(len(pairs), draws, seed + number)
        for (first, second), times in zip(pairs, unit_counts):
            difference = statistic(counts.T @ first) - statistic(counts.T @ second)
            total += times * difference / len(pairs)
    return total / len(groups)


# ---------------------------------------------------------------------------------- several tests


def holm(p_values):
    """Holm's step-down adjusted p-values, in the order given (Holm 1979).

    The smallest of m is multiplied by m, the next by m - 1, and so on; none is smaller than the one
    before it in that order, and none is above 1.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def p_for(components):
    """The p of a claim that needs all its components (Estimates) to be positive.

    It is the largest two-sided p of theirs, 1 if one of them is not positive.
    """
    if any(component.value <= 0 for component in components):
        return 1.0
    return max(component.p for component in components)


def p_against(components):
    """The p of the opposite: one of the k components is negative.

    It is k times the smallest p of those that are negative (Bonferroni), 1 if none is.
    """
    negative = [component.p for component in components if component.value < 0]
    return min([1.0, *(len(components) * p for p in negative)])


def verdicts(hypotheses):
    """What the tests say: {name: {"p", "adjusted p", "verdict"}}; None p where nothing was tested.

    hypotheses: {name: (components, margins)}, Estimates and for each its margin or None. Components
    without a p, or none at all, are not tested, and do not count in Holm's family.
    """
    tested = {}
    for name, (components, _) in hypotheses.items():
        if components and all(component.p is not None for component in components):
            tested[name] = min(p_for(components), p_against(components))
    adjusted = dict(zip(tested, holm(list(tested.values()))))
    found = {}
    for name, (components, margins) in hypotheses.items():
        verdict = "not tested"
        if name in tested:
            verdict = _verdict(components, margins, adjusted[name])
        found[name] = {"p": tested.get(name), "adjusted p": adjusted.get(name), "verdict": verdict}
    return found


def _verdict(components, margins, adjusted):
    """The verdict of a tested hypothesis with this adjusted p."""
    if adjusted < LEVEL:
        return "supports" if p_for(components) <= p_against(components) else "contradicts"
    for component, margin in zip(components, margins):
        if margin is not None and component.within(margin):
            return "no effect of this size"
    return "undecided"
