"""What the paper on object importance asks, and answers by one picture: what makes an object
important? And what it does not ask: which inpainter can be trusted, and does an explanation tell
which object matters?

Each function takes the records of `counterfactual.examine_objects` and returns rows with an
interval of 95 %, by drawing images with replacement.
"""

import numpy as np

from experiments.counterfactual import METHODS, objects_of
from experiments.ranks import drawn, partial_spearman, spearman, within_images
from experiments.statistics import auc_with_interval, draw_images, mean_with_interval
from importance import DISTANCES, EXACT

DRAWS = 1000
MOST_REFERENCES = 3  # of the five


def importances(objects, filler, distance):
    """The importance of each object by a filler and a distance (n,), NaN where there is none."""
    values = []
    for thing in objects:
        value = thing["removed"].get(filler, {}).get(distance)
        values.append(np.nan if value is None else value)
    return np.array(values)


def fillers_of(objects):
    """The names of the fillers that removed these objects."""
    return list(dict.fromkeys(name for thing in objects for name in thing["removed"]))


def trusted_fillers(objects):
    """The fillers whose importance is asked about: EXACT where it is known, else all."""
    fillers = fillers_of(objects)
    return [EXACT] if EXACT in fillers else fillers


def agreement(records):
    """Does an inpainter's importance agree with the exact one? Rows, see `correlation_row`.

    One for each filler but EXACT and each distance; x and y are the two importances.
    """
    objects, images = objects_of(records)
    rows = []
    for filler in fillers_of(objects):
        if filler == EXACT:
            continue
        for distance in DISTANCES:
            ours = importances(objects, filler, distance)
            exact = importances(objects, EXACT, distance)
            row = {"filler": filler, "distance": distance}
            rows.append(row | correlation_row(ours, exact, images, len(records)))
    return [row for row in rows if row["objects"]]


def correlation_row(x, y, images, count, given=None):
    """How two values of objects go together: a dict of

    objects             for how many both are there
    rho, ..low, ..high  Spearman's correlation over all objects
    within, ..low, ..high   the mean of its values within the images
    images              how many images have one: two objects at least that differ in both values
    partial, ..low, ..high  rho with the ranks of `given` held fixed, where that is given

    x, y (and given): arrays (n,), NaN where there is none; images: of each object's its number;
    count: of images.
    """
    there = np.isfinite(x) & np.isfinite(y)
    x = x[there]
    y = y[there]
    images = np.asarray(images)[there]
    counts = draw_images(count, DRAWS)
    row = {"objects": int(there.sum())}
    if not row["objects"]:
        return row
    row |= named("rho", drawn(spearman, (x, y), images, counts))
    inside, numbers = within_images(x, y, images)
    values = mean_with_interval(inside, numbers, counts) if inside else (None, None, None)
    row |= named("within", values)
    row["images"] = len(inside)
    if given is not None:
        values = drawn(partial_spearman, (x, y, given[there]), images, counts)
        row |= named("partial", values)
    return row


def named(name, values):
    """The fields of a value and its interval, floats; None where it is not defined."""
    numbers = []
    for value in values:
        defined = value is not None and np.isfinite(value)
        numbers.append(float(value) if defined else None)
    return dict(zip((name, f"{name} low", f"{name} high"), numbers))


# --------------------------------------------------------------------- what makes an object matter


def questions(records):
    """What makes an object important? Rows, one for each question, filler and distance:

    question           see `CORRELATES` and `CLASSES`
    filler, distance
    objects            how many the answer rests on
    measure            "rho", Spearman's correlation, 0 for none; or "AUC", 0.5 for none
    value, ..low, ..high
    answer             "yes", "the opposite", or "not seen" if the interval holds "none"
    """
    objects, images = objects_of(records)
    foremost = foremost_flags(objects, images)
    rows = []
    for filler in trusted_fillers(objects):
        for distance in DISTANCES:
            values = importances(objects, filler, distance)
            key = {"filler": filler, "distance": distance}
            for question, field in CORRELATES.items():
                asked = np.array([thing[field] for thing in objects], dtype=float)
                row = correlate(asked, values, images, len(records))
                rows.append({"question": question, **key, **row})
            for question, label in CLASSES.items():
                labels = [label(thing, front) for thing, front in zip(objects, foremost)]
                row = classify(labels, values, images, len(records))
                rows.append({"question": question, **key, **row})
    return [row for row in rows if row["objects"]]


CORRELATES = {
    "larger": "area",
    "named more often in training": "frequency",
}
# question: a function of (object, whether it is the foremost one) -> True, False or None (left out)
CLASSES = {
    "named by a reference": lambda thing, front: thing["references"] > 0,
    "named by most references": lambda thing, front: thing["references"] >= MOST_REFERENCES,
    "named by the caption": lambda thing, front: thing["said"],
    "in the foreground": lambda thing, front: front,
    "what the scene is about": lambda thing, front: thing["main"],
}


def foremost_flags(objects, images):
    """Whether each object is the nearest of its image; None where it is alone or that is not known.

    In scenes the drawing order says it. In photographs the object that ends lowest is taken for the
    nearest, which holds for what stands on level ground.
    """
    nearness = []
    for thing in objects:
        nearness.append(thing["bottom"] if thing["depth"] is None else thing["depth"])
    nearness = np.array(nearness)
    images = np.asarray(images)
    flags = []
    for value, number in zip(nearness, images):
        others = nearness[images == number]
        alone = len(others) < 2 or (others == others[0]).all()
        flags.append(None if alone else bool(value == others.max()))
    return flags


def correlate(asked, values, images, count):
    """The fields of an answer by Spearman's correlation; see `questions`."""
    there = np.isfinite(asked) & np.isfinite(values)
    row = {"objects": int(there.sum()), "measure": "rho"}
    if not there.any():
        return row
    counts = draw_images(count, DRAWS)
    found = drawn(spearman, (asked[there], values[there]), np.asarray(images)[there], counts)
    return row | named("value", found) | {"answer": answer(found, 0)}


def classify(labels, values, images, count):
    """The fields of an answer by the area under the ROC curve; see `questions`."""
    there = np.isfinite(values) & np.array([label is not None for label in labels], dtype=bool)
    classes = np.array([bool(label) for label in labels])[there]
    if len(set(classes.tolist())) < 2:
        return {"objects": 0, "measure": "AUC"}
    counts = draw_images(count, DRAWS)
    own = np.asarray(images)[there]
    found = auc_with_interval(values[there], classes.astype(int), own, counts)
    row = {"objects": int(there.sum()), "measure": "AUC"}
    return row | named("value", found) | {"answer": answer(found, 0.5)}


def answer(found, none):
    """What (value, low, high) says, where `none` is the value of no relation."""
    _, low, high = found
    if low is None or low <= none <= high:
        return "not seen"
    return "yes" if low > none else "the opposite"


# ------------------------------------------------------------------------ do explanations tell it?


def predictors(records):
    """Does an explanation tell which object matters? Rows, see `correlation_row`.

    One for each explanation ("area" stands for the object's area alone), filler and distance: x is
    the share of the explanation inside of the object, y its importance, and the partial correlation
    holds the area fixed.
    """
    objects, images = objects_of(records)
    areas = np.array([thing["area"] for thing in objects])
    rows = []
    for method in ("area", *METHODS):
        shares = areas
        if method != "area":
            found = [thing["explained"].get(method) for thing in objects]
            shares = np.array([np.nan if share is None else share for share in found])
        for filler in trusted_fillers(objects):
            for distance in DISTANCES:
                values = importances(objects, filler, distance)
                given = None if method == "area" else areas
                row = {"explanation": method, "filler": filler, "distance": distance}
                rows.append(row | correlation_row(shares, values, images, len(records), given))
    return [row for row in rows if row["objects"]]
