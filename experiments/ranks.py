"""Rank correlations, over all objects and within each image, with bootstrap intervals over images.

Spearman's rho is Pearson's correlation of ranks, where equal values share their mean rank.
"""

import numpy as np
from scipy.stats import rankdata

from experiments.statistics import interval


def pearson(x, y):
    """Pearson's correlation of two arrays (n,); NaN where one of them has one value only."""
    x = x - x.mean()
    y = y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else np.nan


def spearman(x, y):
    """Spearman's rank correlation of two arrays (n,), NaN where one has one value only."""
    if len(x) < 2:
        return np.nan
    return pearson(rankdata(x), rankdata(y))


def partial_spearman(x, y, given):
    """Spearman's correlation of x and y (n,), with the ranks of a third (n,) held fixed.

    r_xy.z = (r_xy - r_xz r_yz) / sqrt((1 - r_xz²)(1 - r_yz²)) of rank correlations (Kendall 1942).
    NaN where it is not defined.
    """
    both = spearman(x, y)
    first = spearman(x, given)
    second = spearman(y, given)
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
