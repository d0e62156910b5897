"""What is asked of the records of importance, against slow versions."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from experiments import importance_questions as asked
from experiments.counterfactual import caption_counter, names, nothing_changes, robustness
from experiments.ranks import drawn, partial_spearman, spearman, within_images
from experiments.statistics import draw_images
from importance import DISTANCES, EXACT


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(asked, "DRAWS", 60)


def some_records(images=12, seed=0):
    """Records of images with one to four objects, whose fields are drawn at random."""
    generator = np.random.default_rng(seed)

    def effect(caption, scale=1.0):
        numbers = {name: float(scale * generator.random()) for name in DISTANCES}
        return {"caption": caption, **numbers}

    records = []
    for index in range(images):
        objects = []
        for _ in range(1 + index % 4):
            exact = effect("a dog" if generator.random() < 0.3 else "a cat")
            near = {name: exact[name] + 0.1 * generator.random() for name in DISTANCES}
            thing = {
                "area": float(generator.random()),
                "bottom": float(generator.random()),
                "depth": float(generator.random()),
                "main": bool(generator.random() < 0.5),
                "frequency": int(generator.integers(100)),
                "references": int(generator.integers(6)),
                "said": bool(generator.random() < 0.5),
                "explained": {name: float(generator.random()) for name in asked.METHODS},
                "removed": {"mean": {"caption": exact["caption"], **near}, EXACT: exact},
                "nulls": {},
            }
            if generator.random() < 0.7:
                thing["nulls"] = {"mean": [effect("a dog", 0.2), effect("a cow", 0.2)]}
            objects.append(thing)
        nothing = {"mean": {"caption": "a dog", **dict.fromkeys(DISTANCES, 0.0)}}
        records.append(
            {
                "index": index,
                "caption": ["a", "dog"],
                "too_large": 0,
                "nothing": nothing,
                "objects": objects,
            }
        )
    return records


def flat(records):
    return [(thing, record["index"]) for record in records for thing in record["objects"]]


# ------------------------------------------------------------------------------------------- ranks


def slow_ranks(values):
    """Mean ranks, by counting."""
    ranks = []
    for value in values:
        below = sum(other < value for other in values)
        equal = sum(other == value for other in values)
        ranks.append(below + (equal + 1) / 2)
    return ranks


def slow_residuals(values, given):
    """What a straight line through the points leaves."""
    mean_value = sum(values) / len(values)
    mean_given = sum(given) / len(given)
    slope = sum((g - mean_given) * (v - mean_value) for g, v in zip(given, values))
    slope /= sum((g - mean_given) ** 2 for g in given)
    return [v - mean_value - slope * (g - mean_given) for g, v in zip(given, values)]


def test_rank_correlations():
    generator = np.random.default_rng(1)
    x = generator.integers(0, 8, 40).astype(float)  # with ties
    y = x + generator.integers(0, 8, 40)
    z = y + generator.integers(0, 8, 40)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert math.isnan(spearman(x, np.ones(40)))
    ranks = [slow_ranks(list(values)) for values in (x, y, z)]
    rest = [slow_residuals(values, ranks[2]) for values in ranks[:2]]
    expected = sum(a * b for a, b in zip(*rest))
    expected /= math.sqrt(sum(a * a for a in rest[0]) * sum(b * b for b in rest[1]))
    assert partial_spearman(x, y, z) == pytest.approx(expected, abs=1e-12)


def test_draws_repeat_images_as_often_as_they_were_drawn():
    generator = np.random.default_rng(2)
    x = generator.random(9)
    y = generator.random(9)
    images = [0, 0, 1, 1, 1, 2, 3, 3, 3]
    counts = draw_images(4, 50)
    slow = []
    for times in counts.T:
        chosen = [k for k in range(9) for _ in range(times[images[k]])]
        slow.append(spearman(x[chosen], y[chosen]))
    slow = [value for value in slow if not math.isnan(value)]
    value, low, high = drawn(spearman, (x, y), images, counts)
    assert value == spearman(x, y)
    assert (low, high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    found, numbers = within_images(x, y, images)
    assert numbers == [0, 1, 3]  # the third image has one object
    assert found[1] == pytest.approx(spearmanr(x[2:5], y[2:5]).statistic)


# ---------------------------------------------------------------------------------------- the rows


def test_robustness_is_the_means():
    records = some_records()
    rows = {(row["filler"], row["distance"]): row for row in robustness(records)}
    row = rows["mean", "sentence"]
    things = [thing for thing, _ in flat(records)]
    values = [thing["removed"]["mean"]["sentence"] for thing in things]
    assert row["objects"] == len(things)
    assert row["importance"] == pytest.approx(sum(values) / len(values))
    same = [thing["removed"]["mean"]["caption"] == "a dog" for thing in things]
    assert row["unchanged"] == pytest.approx(sum(same) / len(same))
    differences = []
    for thing in things:
        if thing["nulls"]:
            controls = [one["sentence"] for one in thing["nulls"]["mean"]]
            differences.append(thing["removed"]["mean"]["sentence"] - sum(controls) / 2)
    assert row["paired"] == len(differences)
    assert row["difference"] == pytest.approx(sum(differences) / len(differences))
    assert row["difference low"] <= row["difference"] <= row["difference high"]
    assert row["difference low"] > 0 and row["p"] < 0.05
    assert row["null unchanged"] == 0.5
    assert rows[EXACT, "sentence"]["null"] is None
    assert nothing_changes(records) == 0
    records[3]["nothing"]["mean"]["attention"] = -0.25
    assert nothing_changes(records) == 0.25


def test_agreement_with_the_exact_importance():
    records = some_records()
    rows = asked.agreement(records)
    assert {row["filler"] for row in rows} == {"mean"}
    for row in rows:
        ours = [thing["removed"]["mean"][row["distance"]] for thing, _ in flat(records)]
        exact = [thing["removed"][EXACT][row["distance"]] for thing, _ in flat(records)]
        assert row["rho"] == pytest.approx(spearmanr(ours, exact).statistic)
        assert row["rho low"] <= row["rho"] <= row["rho high"]
        assert row["rho"] > 0.8
        assert row["images"] == 9  # of 12, three have one object


def test_questions():
    records = some_records()
    rows = asked.questions(records)
    assert {row["filler"] for row in rows} == {EXACT}
    by_name = {(row["question"], row["distance"]): row for row in rows}
    pairs = flat(records)
    values = [thing["removed"][EXACT]["sentence"] for thing, _ in pairs]
    areas = [thing["area"] for thing, _ in pairs]
    larger = by_name["larger", "sentence"]
    assert larger["value"] == pytest.approx(spearmanr(areas, values).statistic)
    said = by_name["named by the caption", "sentence"]
    wins = total = 0
    for value, (thing, _) in zip(values, pairs):
        for other, (another, _) in zip(values, pairs):
            if thing["said"] and not another["said"]:
                wins += (value > other) + (value == other) / 2
                total += 1
    assert said["value"] == pytest.approx(wins / total)
    front = by_name["in the foreground", "sentence"]
    assert front["objects"] == sum(
        len(record["objects"]) > 1 for record in records for _ in record["objects"]
    )


def test_an_answer_is_yes_only_off_its_none():
    assert asked.answer((0.3, 0.1, 0.5), 0) == "yes"
    assert asked.answer((-0.3, -0.5, -0.1), 0) == "the opposite"
    assert asked.answer((0.3, -0.1, 0.5), 0) == "not seen"
    assert asked.answer((0.6, 0.45, 0.7), 0.5) == "not seen"


def test_the_foremost_object():
    things = [{"depth": None, "bottom": bottom} for bottom in (0.5, 0.9, 0.3, 0.4, 0.4)]
    assert asked.foremost_flags(things, [0, 0, 1, 2, 2]) == [False, True, None, None, None]
    things[0]["depth"] = 0.95
    assert asked.foremost_flags(things, [0, 0, 1, 2, 2])[:2] == [True, False]


def test_predictors():
    records = some_records()
    rows = asked.predictors(records)
    assert {row["explanation"] for row in rows} == {"area", *asked.METHODS}
    pairs = flat(records)
    values = np.array([thing["removed"][EXACT]["attention"] for thing, _ in pairs])
    areas = np.array([thing["area"] for thing, _ in pairs])
    shares = np.array([thing["explained"]["lrp"] for thing, _ in pairs])
    for row in rows:
        if (row["explanation"], row["distance"]) == ("lrp", "attention"):
            assert row["rho"] == pytest.approx(spearmanr(shares, values).statistic)
            assert row["partial"] == pytest.approx(partial_spearman(shares, values, areas))


def test_how_many_captions_name_an_object():
    captions = ["A dog and a hot dog.", "Two dogs", "A hot day for a dog", "A cat"]
    entries = [{"captions": captions[:2]}, {"captions": captions[2:]}]
    count = caption_counter(entries)
    assert count(["dog"]) == 2
    assert count(["dog", "dogs"]) == 3
    assert count(["hot dog"]) == 1
    assert count(["cow"]) == 0
    assert names(["a", "hot", "dog"], ["hot dog"])
    assert not names(["a", "hot", "doggy"], ["hot dog"])
