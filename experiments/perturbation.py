"""Perturbation tests: what becomes of an answer, or a caption, while tokens are removed?

The tokens of the image, and apart from them those of the text, go in the order of their relevance
(Chefer, Gur and Wolf 2021, as in the field): most relevant first, the *positive* test, in which an
explanation is good if the measure falls early; or least relevant first, the *negative* one, in
which it is good if the measure stays. An area is that under the curve of the measure over the share
that is removed, and the *gap* is the negative area less the positive one: higher is better, and
what knows nothing has 0.

What is tested is a subject of perturbed.py. It has

    name, images             what it is called; how many images its items are of
    measures                 {side: what is measured}, of the sides whose tokens are removed
    __len__, image_of(item)  items, and the number of an item's image
    explained(item, method)  {side: relevance (L,) of the tokens that can be removed, or None}
    baselines(item)          {side: {name: relevance (L,)}} that nothing has to be explained for
    measured(item, side, kept)   S values with the tokens kept, long (S, k), rising
    finished(records)        values in place of what only all items together tell, such as CIDEr
"""

from functools import partial
from itertools import combinations

import numpy as np
import torch

import distributed
from experiments.records import resumed_records
from experiments.statistics import draw_images, mean_with_interval

SHARES = (0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1)
ORDERS = ("positive", "negative")
RANDOM = "random"
COMPARED_WITH = ("relevancy", "lrp")  # the first that there is: the others' gaps are, with its gap
DRAWS = 1000


def order_of(relevance, order, generator):
    """Numbers of tokens (L,), those that are removed last at the end.

    relevance (L,); order: of ORDERS. Of equal ones chance decides.
    """
    ties = torch.rand(len(relevance), generator=generator, dtype=torch.float64)
    keys = relevance.double().numpy()
    if order == "positive":
        keys = -keys
    return torch.from_numpy(np.lexsort((ties.numpy(), keys)))


def kept_after(order, share):
    """What is kept of an order (L,) when a share is removed: numbers of tokens, rising."""
    removed = round(share * len(order))
    return order[removed:].sort().values


def curves_of(orders, measured):
    """The curves of some orders of tokens: S lists of a value for each of SHARES.

    orders: S of `order_of`; measured: kept (S, k) -> S values. Shares that keep equally many tokens
    are measured once.
    """
    of_count = {}
    columns = []
    for share in SHARES:
        kept = torch.stack([kept_after(order, share) for order in orders])
        count = kept.shape[1]
        if count not in of_count:
            alike = count in (0, len(orders[0]))  # all orders keep the same
            values = measured(kept[:1] if alike else kept)
            of_count[count] = values * len(orders) if alike else values
        columns.append(of_count[count])
    return [list(row) for row in zip(*columns)]


def examined(subject, item, methods, seed):
    """The record of an item: "index", "image", its image's number, and

    curves  {side: {method, or RANDOM: {order: values of SHARES}}}
    """
    relevances = {side: {} for side in subject.measures}
    for method in methods:
        for side, relevance in subject.explained(item, method).items():
            if relevance is not None and len(relevance):
                relevances[side][method] = relevance
    for side, found in subject.baselines(item).items():
        if relevances[side]:
            relevances[side] |= found
    generator = torch.Generator().manual_seed(seed * 1_000_003 + item)
    record = {"index": item, "image": subject.image_of(item), "curves": {}}
    for side, of_side in relevances.items():
        if of_side:
            measured = partial(subject.measured, item, side)
            record["curves"][side] = curves_of_side(of_side, measured, generator)
    return record


def curves_of_side(relevances, measured, generator):
    """{method, or RANDOM: {order: values of SHARES}} of {method: relevance (L,)}.

    measured: kept (S, k) -> S values.
    """
    length = len(next(iter(relevances.values())))
    relevances = {**relevances, RANDOM: torch.rand(length, generator=generator)}
    names = [(method, order) for method in relevances for order in ORDERS]
    orders = [order_of(relevances[method], order, generator) for method, order in names]
    curves = {method: {} for method in relevances}
    for (method, order), row in zip(names, curves_of(orders, measured)):
        curves[method][order] = row
    return curves


def examine(subject, methods, path, header, seed=0):
    """The records of all items of a subject; those that the .jsonl `path` keeps are not made again.

    Several processes share the items. header: what the records depend on. UserError as of
    `resumed_records`.
    """

    def find(missing):
        for item in distributed.shared(missing):
            yield [examined(subject, item, methods, seed)]

    records = resumed_records(len(subject), path, header, find, "perturbing")
    return subject.finished(records)


# ------------------------------------------------------------------------------------------- tables


def area(curve):
    """The area under a curve over SHARES, by trapezoids: the mean of the measure."""
    return float(np.trapezoid(curve, SHARES))


def areas_of(records, side, method):
    """{order: areas (N,)} of the records that have this side, and their images (N,)."""
    areas = {order: [] for order in ORDERS}
    images = []
    for record in records:
        curves = record["curves"].get(side, {}).get(method)
        if curves:
            images.append(record["image"])
            for order in ORDERS:
                areas[order].append(area(curves[order]))
    return {order: np.array(values) for order, values in areas.items()}, images


def table(records, subject):
    """Rows of each side and method: the areas and the gap, with intervals over drawn images.

    Another column compares the gap with that of unweighted relevancy, or of LRP where there is
    none, in pairs, item by item.
    """
    counts = draw_images(subject.images, DRAWS)
    rows = []
    for side, measure in subject.measures.items():
        methods = {}
        for record in records:
            methods |= dict.fromkeys(record["curves"].get(side, {}))
        compared = next((name for name in COMPARED_WITH if name in methods), None)
        base, _ = areas_of(records, side, compared)
        for method in methods:
            areas, images = areas_of(records, side, method)
            values = {order: areas[order] for order in ORDERS}
            values["gap"] = gaps(areas)
            if method != compared and len(base["negative"]) == len(images):
                difference = values["gap"] - gaps(base)
                values[f"gap, less that of {compared}"] = difference
            row = {"removed": side, "measure": measure, "method": method, "items": len(images)}
            for name, each in values.items():
                mean, low, high = mean_with_interval(each.tolist(), images, counts)
                row |= {name: mean, f"{name} low": low, f"{name} high": high}
            rows.append(row)
    return rows


def pairs(areas, images):
    """Rows of each side and pair of methods: the first's gap less the second's, item by item.

    areas: as of `areas_of_all`; images: how many there are. Pairs of methods that are of different
    items are left out.
    """
    counts = draw_images(images, DRAWS)
    rows = []
    for side, methods in areas.items():
        for first, second in combinations(methods, 2):
            one = methods[first]
            other = methods[second]
            if one["images"] != other["images"]:
                continue
            difference = gaps(one) - gaps(other)
            found = mean_with_interval(difference.tolist(), one["images"], counts)
            row = {"removed": side, "first": first, "second": second}
            rows.append(row | dict(zip(("difference", "low", "high"), found)))
    return rows


def gaps(areas):
    """The gaps (N,) of items; areas: {order: N areas}."""
    return np.array(areas["negative"]) - np.array(areas["positive"])


def mean_curves(records):
    """{side: {method: {order: mean values of SHARES}}}."""
    collected = {}
    for record in records:
        for side, methods in record["curves"].items():
            for method, orders in methods.items():
                place = collected.setdefault(side, {}).setdefault(method, {})
                for order, curve in orders.items():
                    place.setdefault(order, []).append(curve)
    for methods in collected.values():
        for orders in methods.values():
            for order, curves in orders.items():
                orders[order] = np.mean(curves, axis=0).round(5).tolist()
    return collected


def areas_of_all(records):
    """{side: {method: {order: areas, "images": the numbers of their images}}}, by item."""
    found = {}
    for record in records:
        for side, methods in record["curves"].items():
            for method, orders in methods.items():
                place = found.setdefault(side, {}).setdefault(method, {"images": []})
                place["images"].append(record["image"])
                for order, curve in orders.items():
                    place.setdefault(order, []).append(round(area(curve), 4))
    return found
