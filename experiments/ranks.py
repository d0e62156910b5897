"""Rank correlations, over all objects and within each image, with bootstrap intervals over images.

Spearman's rho is Pearson's correlation of ranks, where equal values share their mean rank.
"""

import numpy as np

from experiments.statistics import interval


def pearson(x, y):
    """Pearson's correlation of two arrays (n,); NaN where one of them has one value only."""
    x = x - x.mean()
    y = y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else np.nan


def mean_ranks(values):
    """The ranks (n,) of an array (n,), from 1; equal values share the mean of theirs.

    As scipy.stats.rankdata, but several times as fast for the short arrays of a bootstrap.
    """
    order = values.argsort()
    ordered = values[order]
    is_first = np.ones(len(values), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    starts = np.append(np.flatnonzero(is_first), len(values))
    shared = (starts[:-1] + 1 + starts[1:]) / 2  # of each group of equal values
    ranks = np.empty(len(values))
    ranks[order] = shared[is_first.cumsum() - 1]
    return ranks


def spearman(x, y):
    """Spearman's rank correlation of two arrays (n,), NaN where one has one value only."""
    if len(x) < 2:
        return np.nan
    return pearson(mean_ranks(x), mean_ranks(y))


def partial_spearman(x, y, given):
    """Spearman's correlation of x and y (n,), with the ranks of a third (n,) held fixed.

    r_xy.z = (r_xy - r_xz r_yz) / sqrt((1 - r_xz²)(1 - r_yz²)) of rank correlations (Kendall 1942).
    NaN where it is not defined.
    """
    if len(x) < 2:
        return np.nan
    x = mean_ranks(x)
    y = mean_ranks(y)
    given = mean_ranks(given)
    both = pearson(x, y)
    first = pearson(x, given)
    second = pearson(y, given)
    rest = (1 - first**2) * (1 - second**2)
    return (both - first * second) / np.sqrt(rest) if rest > 1e-12 else np.nan


def drawn(statistic, columns, images, counts):
    """A statistic of objects, and its interval by drawing images: (value, low, high).

    statistic: a function of arrays (n,), one for each of `columns`; images (n,): the number of each
    object's image; counts: as of `statistics.draw_images`. NaN and None where it is not defined.
    """
    columns = [np.asarray(column, dtype=float) for column in columns]
    images = np.asarray(images, dtype=int)
    values = []
    for times in counts.T:
        chosen = np.repeat(np.arange(len(images)), times[images])
        values.append(statistic(*(column[chosen] for column in columns)))
    values = np.array(values)
    return (statistic(*columns), *interval(values[np.isfinite(values)]))


def within_images(x, y, images):
    """Spearman's correlation within each image: ([correlations], [numbers of their images]).

    x, y, images: three lists, of each object its values and the number of its image. Images in
    which x or y has one value only say nothing and are left out.
    """
    x = np.asarray(x, dtype=float)
    y = np.asarray(y, dtype=float)
    images = np.asarray(images, dtype=int)
    found = []
    numbers = []
    for number in np.unique(images):
        own = images == number
        correlation = spearman(x[own], y[own])
        if np.isfinite(correlation):
            found.append(correlation)
            numbers.append(int(number))
    return found, numbers
