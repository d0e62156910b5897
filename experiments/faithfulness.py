"""How faithful maps are: what becomes of a word's probability while patches are removed.

Patches go most relevant first (MoRF) or least relevant first (LeRF). What is left in their place is
the mean colour, a blur, or ROAD's guess (Rong et al. 2022; fills.py). A faithful map makes the
probability fall early in the first case and late in the second, so LeRF less MoRF is the measure.
Maps that look at no word are beside the methods: the centre, the edges, chance. A map that is *of
this word* removes it faster than the map of another word of the caption. And over random sets of
patches, the relevance that goes should correlate with the probability that goes (Bhatt et al.
2020).
"""

import random

import numpy as np
import torch
import torch.nn.functional as F

from experiments.case import Experiment
from experiments.fills import FILLS
from experiments.image_ablation import patch_order, patch_sums, patches_mask
from experiments.probabilities import last_word_probabilities
from experiments.statistics import draw_images, flattened, mean_with_interval
from gradient_utils import SIZE

FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # of the patches that are removed
WORDS_AN_IMAGE = 2  # object words
ROAD = "linear"  # the fill of what is compared of one fill only
SUBSETS = 32  # random sets of patches, whose relevance is correlated with the drop
SUBSET_SHARE = 0.2  # of the patches
ENCODED_AT_ONCE = 128


def chosen_positions(case):
    """The positions of the words that are examined: the first object words of a caption."""
    return sorted(case.named)[:WORDS_AN_IMAGE]


def run(cases, setting):
    """A record of each examined word, where a method may also be a name of `plain_maps`:

    word          the word
    morf, lerf    {fill: {method: mean probability over FRACTIONS}}
    other         {method: the mean MoRF probability by the map of another word of the caption}, of
                  the fill ROAD; None if the caption has one word only
    correlation   {method: of random sets of patches, the correlation of their relevance with the
                  drop}; None for a map that says the same of every patch
    """
    records = []
    for case in cases:
        found = [examined(case, position, setting) for position in chosen_positions(case)]
        records.append(found)
    return records


def examined(case, position, setting):
    """The record of one word."""
    generator = random.Random(f"faithfulness {case.seed} {position}")
    maps = maps_of(case, position, generator)
    measure = Measure(case, position, setting.captioner)
    record = {"word": case.words[position], "morf": {}, "lerf": {}}
    orders = {method: patch_order(values) for method, values in maps.items()}
    reversed_orders = {method: order[::-1] for method, order in orders.items()}
    for fill in FILLS:
        record["morf"][fill] = measure.while_removed(orders, fill)
        record["lerf"][fill] = measure.while_removed(reversed_orders, fill)
    record["other"] = by_other_word(case, position, measure, generator)
    record["correlation"] = correlations(maps, measure, generator)
    return record


def maps_of(case, position, generator):
    """{method or name of `plain_maps`: the map (H, W) of a word}."""
    maps = {method: word_map(one, position) for method, one in case.explanations.items()}
    return maps | plain_maps(case.pixels, generator)


def word_map(explanation, position):
    """The map (H, W) of a word; of a method whose sign says nothing the sizes."""
    values = explanation.image_relevance[position]
    return values.abs() if explanation.kind == SIZE else values


def plain_maps(pixels, generator):
    """Maps (H, W) that no captioner made: of the distance to the centre, of edges, of chance."""
    height, width = pixels.shape[1:]
    rows = torch.linspace(-1, 1, height)[:, None]
    columns = torch.linspace(-1, 1, width)[None]
    grey = pixels.mean(dim=0).cpu().float()
    noise = torch.Generator().manual_seed(generator.getrandbits(32))
    return {
        "centre": -(rows**2 + columns**2),
        "edges": edges(grey),
        "random": torch.rand(height, width, generator=noise),
    }


def edges(grey):
    """The size of the gradient of a grey image (H, W), by Sobel's filters."""
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    filters = torch.stack([across, across.T])[:, None]
    padded = F.pad(grey[None, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, filters).norm(dim=1)[0]


class Measure:
    """The probability of one word of a case, after the same words, while patches are removed."""

    def __init__(self, case, position, captioner):
        self.case = case
        self.captioner = captioner
        self.ids = captioner.vocabulary.encode(case.words)[: position + 1]
        self.before = case.any_explanation.probabilities[position].item()
        self.shape = case.pixels.shape[1:]
        self.patches = len(patch_sums(torch.zeros(self.shape)))

    def while_removed(self, orders, fill):
        """{method: the mean probability over FRACTIONS, with the first patches of its order
        removed}."""
        sets = []
        for order in orders.values():
            sets += [order[: round(fraction * len(order))] for fraction in FRACTIONS]
        found = self.without(sets, fill).reshape(len(orders), len(FRACTIONS)).mean(axis=1)
        return dict(zip(orders, found.tolist()))

    def without(self, sets, fill):
        """The probabilities (N,) with each of N lists of patches removed, a float64 array."""
        found = []
        for start in range(0, len(sets), ENCODED_AT_ONCE):
            part = sets[start : start + ENCODED_AT_ONCE]
            masks = torch.stack([patches_mask(patches, self.shape) for patches in part])
            images = FILLS[fill](self.case.pixels, masks.to(self.case.pixels.device))
            features = self.captioner.encode(images)
            rows = last_word_probabilities(self.captioner, features, [[self.ids]] * len(part))
            found += [row[0] for row in rows]
        return np.array(found)


def by_other_word(case, position, measure, generator):
    """{method: the mean MoRF probability by the map of another word}, None without such a word."""
    word = case.words[position]
    others = [place for place, other in enumerate(case.words) if other != word]
    if not others:
        return None
    other = generator.choice(others)
    orders = {}
    for method, explanation in case.explanations.items():
        orders[method] = patch_order(word_map(explanation, other))
    return measure.while_removed(orders, ROAD)


def correlations(maps, measure, generator):
    """{method: the correlation, over random sets of patches, of their relevance with the drop}."""
    size = round(SUBSET_SHARE * measure.patches)
    sets = [generator.sample(range(measure.patches), size) for _ in range(SUBSETS)]
    drops = measure.before - measure.without(sets, ROAD)
    found = {}
    for method, values in maps.items():
        sums = patch_sums(values).double().numpy()
        found[method] = correlation(np.array([sums[patches].sum() for patches in sets]), drops)
    return found


def correlation(first, second):
    """Pearson's correlation of two arrays; None if one of them is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def table(images, model_type):
    """Rows, for each method:

    method
    words           how many object words there are
    FILL            LeRF less MoRF with this fill, a mean; higher is better
    low, high       of ROAD's, its confidence interval
    behind FIRST    by how much the first method's is higher, word by word, and its interval
    own map         by how much earlier the word goes by its own map than by another word's: the
    own low, high   mean difference of MoRF, and its interval; None for maps that know no word
    correlation     of the relevance of random sets of patches with the drop, mean and interval
    """
    records, numbers = flattened(images)
    if not records:
        return []
    counts = draw_images(len(images))
    rows = []
    methods = list(records[0]["morf"][ROAD])
    first = methods[0]
    firsts = gaps_of(records, first, ROAD)
    for method in methods:
        row = {"method": method, "words": len(records)}
        for fill in FILLS:
            gaps = gaps_of(records, method, fill)
            row[fill], low, high = mean_with_interval(gaps.tolist(), numbers, counts)
        row |= {"low": low, "high": high}  # of the last fill, ROAD's
        behind = (None, None, None)
        if method != first:
            behind = mean_with_interval((firsts - gaps).tolist(), numbers, counts)
        row |= dict(zip((f"behind {first}", "behind low", "behind high"), behind))
        row |= own_columns(records, numbers, counts, method)
        row |= correlation_columns(records, numbers, counts, method)
        rows.append(row)
    return rows


def gaps_of(records, method, fill):
    """LeRF less MoRF of each record, (N,)."""
    most_first = [found["morf"][fill][method] for found in records]
    least_first = [found["lerf"][fill][method] for found in records]
    return np.array(least_first) - np.array(most_first)


def own_columns(records, numbers, counts, method):
    """The columns of a row about the map of another word."""
    values = []
    places = []
    for record, number in zip(records, numbers):
        if record["other"] is not None and method in record["other"]:
            values.append(record["other"][method] - record["morf"][ROAD][method])
            places.append(number)
    found = mean_with_interval(values, places, counts) if values else (None, None, None)
    return dict(zip(("own map", "own low", "own high"), found))


def correlation_columns(records, numbers, counts, method):
    """The columns of a row about random sets of patches."""
    values = []
    places = []
    for record, number in zip(records, numbers):
        if record["correlation"][method] is not None:
            values.append(record["correlation"][method])
            places.append(number)
    found = mean_with_interval(values, places, counts) if values else (None, None, None)
    return dict(zip(("correlation", "correlation low", "correlation high"), found))


EXPERIMENT = Experiment(run, table)
