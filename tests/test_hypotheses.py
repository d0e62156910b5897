"""The statistics of the hypotheses, from records made by hand, and a report of made-up units."""

import numpy as np
import pytest
from helpers import unpadded

from experiments.hypotheses import (
    METRICS,
    arm_difference,
    bootstrap_difference,
    explained_record,
    explanation_hypotheses,
    macro_precision,
    sign_components,
    tuning_hypotheses,
)
from experiments.inference import verdicts
from experiments.report import counted, report
from experiments.statistics import draw_images

IMAGES = 60
ARMS = ("cross_entropy", "continued", "lrp", "random")


def caption_record(generator, hallucinates, cider):
    """A caption's record that says one of two words, and hallucinates with this probability."""
    wrong = bool(generator.random() < hallucinates)
    word = "dog" if generator.random() < 0.5 else "cat"
    return {
        "bleu": [6, 4, 2, 1, 8, 7, 6, 5, 8, int(generator.integers(7, 10))],
        "cider": cider + generator.normal(0, 0.01),
        "objects": 1,
        "wrong objects": int(wrong),
        "right": [] if wrong else [word],
        "wrong": [word] if wrong else [],
        "missed": 1,
    }


def made_up_units(captioners, seeds, shares, cider=0.5):
    """{captioner: for each seed {arm: records}}; shares: {arm: how many captions hallucinate}."""
    units = {}
    generator = np.random.default_rng(1)
    for captioner in captioners:
        units[captioner] = []
        for _ in range(seeds):
            arms = {}
            for arm in ARMS:
                share = shares.get(arm, 0.6)
                arms[arm] = [caption_record(generator, share, cider) for _ in range(IMAGES)]
            units[captioner].append(arms)
    return units


def explained_image(generator):
    """What is kept of an image, of which every claim of H1 to H4 holds."""
    supported = bool(generator.random() < 0.6)
    drop = {"lrp": 0.5, "recent": 0.3 + generator.normal(0, 0.05), "random": 0.1}
    rise = {"negative": 0.02 + generator.normal(0, 0.005), "random": -0.02}
    inside = {"lrp": 0.6, "gradcam": 0.5 + generator.normal(0, 0.02), "attention": 0.3}
    return {
        "drops": [{"kind": "object", **drop}, {"kind": "stop", **drop}],
        "inside": [inside | {"guided_gradcam": 0.8}],
        "sign": [{"word": "dog", "inside": 0.05, "area": 0.4, "patches": rise, "words": None}],
        "frequent": [
            {
                "word": "dog",
                "supported": supported,
                "lrp": supported + generator.normal(0, 0.5),
                "position": int(generator.integers(9)),
                "probability": generator.random(),
                "logit": generator.normal(),
            }
        ],
    }


GENERATOR = np.random.default_rng(0)
EXPLAINED = [explained_image(GENERATOR) for _ in range(200)]


def test_what_is_kept_of_an_explained_image():
    record = {
        "index": 0,
        "word_ablation": [
            {"word": "on", "kind": "stop", "drop": {"random": 0.1, "recent": 0.2, "lrp": 0.3}}
        ],
        "correctness": [
            {
                "methods": {
                    method: {"union": [0.5, 0.6]}
                    for method in ("lrp", "gradcam", "guided_gradcam", "attention", "negative lrp")
                }
            }
        ],
        "hallucination": [
            {
                "word": "dog",
                "supported": True,
                "scores": {
                    "lrp": {"mean": 1e-9, "max": 2},
                    "- position": {"value": -4.0},
                    "probability": {"value": 0.25},
                    "logit": {"value": 3.5},
                },
            }
        ],
    }
    assert explained_record(record) == {
        "drops": [{"kind": "stop", "lrp": 0.3, "recent": 0.2, "random": 0.1}],
        "inside": [{"lrp": 0.5, "gradcam": 0.5, "guided_gradcam": 0.5, "attention": 0.5}],
        "sign": [],
        "frequent": [
            {
                "word": "dog",
                "supported": True,
                "lrp": 1e-9,
                "position": 4.0,
                "probability": 0.25,
                "logit": 3.5,
            }
        ],
    }
    assert explained_record({"index": 1}) == {
        "drops": [],
        "inside": [],
        "sign": [],
        "frequent": [],
    }


def test_the_components_of_the_explanations_are_plain_means():
    found = explanation_hypotheses(EXPLAINED, draws=300)
    object_words = [image["drops"][0] for image in EXPLAINED]
    recent = [word["lrp"] - word["recent"] for word in object_words]
    words, _ = found["H1"]
    assert words[0].value == pytest.approx(np.mean(recent))
    assert words[3].value == pytest.approx(0.4)  # stop words against random ones
    assert found["H2"][0][0].value == pytest.approx(30)
    assert found["H2c"][0][0].value == pytest.approx(20)
    off, rise, beyond = found["H3"][0]
    assert off.value == pytest.approx(35)
    rises = [image["sign"][0]["patches"]["negative"] for image in EXPLAINED]
    assert rise.value == pytest.approx(np.mean(rises))
    assert beyond.value == pytest.approx(np.mean(rises) + 0.02)
    assert found["H4"][0][0].low > 0.1
    results = verdicts(found)
    assert {result["verdict"] for result in results.values()} == {"supports"}


def test_nothing_explained_is_not_tested():
    assert all(parts == ([], []) for parts in explanation_hypotheses([]).values())
    empty = [{"drops": [], "inside": [], "sign": [], "frequent": []}] * 3
    assert all(parts == [] for parts, _ in explanation_hypotheses(empty, draws=10).values())
    assert sign_components(EXPLAINED, draw_images(200, 10), "words") == []


@pytest.mark.parametrize("metric", METRICS)
def test_a_difference_of_arms_is_the_mean_of_the_seeds_differences(metric):
    units = made_up_units(["aoa", "gridtd"], 2, {"lrp": 0.3})
    columns, statistic = METRICS[metric]
    means = []
    for captioner in ("aoa", "gridtd"):
        seeds = []
        for arms in units[captioner]:
            one = statistic(columns(arms["lrp"]).sum(axis=0))
            seeds.append(one - statistic(columns(arms["continued"]).sum(axis=0)))
        means.append(np.mean(seeds))
    found = arm_difference(units, metric, "lrp", "continued")
    assert found.value == pytest.approx(np.mean(means))
    drawn = bootstrap_difference(units, metric, "lrp", "continued", draws=200)
    assert drawn.value == found.value
    assert drawn.low < found.value < drawn.high


def test_a_real_effect_is_found_and_no_effect_is_not():
    units = made_up_units(["aoa", "gridtd", "adaptive"], 4, {"lrp": 0.2})
    found = verdicts(tuning_hypotheses(units))
    assert found["H5"]["verdict"] == "supports"
    assert found["H6"]["verdict"] == "supports"
    assert found["H7"]["verdict"] == "supports"  # CIDEr differs by a hundredth of a point
    assert found["H8"]["verdict"] == "undecided"
    # As good against continued cross-entropy, but so are random weights: H5 is not supported.
    units = made_up_units(["aoa", "gridtd"], 3, {"lrp": 0.2, "random": 0.2})
    found = verdicts(tuning_hypotheses(units))
    assert found["H5"]["verdict"] != "supports"
    assert found["H8"]["verdict"] == "not tested"  # without the adaptive captioner


def test_without_a_control_nothing_is_tested():
    units = made_up_units(["aoa"], 3, {})
    for arms in units["aoa"]:
        del arms["random"]
    assert all(parts == ([], []) for parts in tuning_hypotheses(units).values())


def test_fewer_than_three_seeds_are_a_pilot():
    units = made_up_units(["aoa"], 2, {})
    assert all(parts == ([], []) for parts in tuning_hypotheses(units).values())
    assert all(parts == ([], []) for parts in tuning_hypotheses({}).values())


def test_macro_precision_is_of_words_that_every_arm_says_often():
    def record(word, right):
        return {"right": [word] * right, "wrong": [word] * (1 - right)}

    often = [record("dog", 1)] * 15 + [record("dog", 0)] * 5
    rare = [record("cat", 1)] * 19
    units = {"aoa": [{"lrp": often + rare, "continued": often + rare + [record("cat", 0)]}]}
    means, rows = macro_precision(units, ["lrp", "continued"])
    assert means == {"lrp": 75, "continued": 75}
    assert rows == [
        {"word": "cat", "lrp": [19, 19], "continued": [19, 20]},
        {"word": "dog", "lrp": [15, 20], "continued": [15, 20]},
    ]
    assert macro_precision({}, []) == ({}, [])


def test_the_report_of_a_made_up_study():
    units = made_up_units(["gridtd", "aoa"], 3, {"lrp": 0.2})
    units["aoa"] = units["aoa"] + units["aoa"][:1]  # a seed that the other one lacks
    text, words, figure = report(units, {"aoa": EXPLAINED}, {"gridtd, lrp": "1e-5"}, draws=100)
    text = unpadded(text)
    assert "Seeds: {'gridtd': 3, 'aoa': 4}. Explained: aoa." in text
    assert "| H1 | words by LRP beat the last words and random ones |" in text
    assert "| H5a | " in text
    assert "| all | lrp - continued | CHAIR-s |" in text
    assert text.index("## Verdicts\n") < text.index("## Verdicts of the replication\n")
    replication = text[text.index("## Components of the replication") :]
    assert "| H5a | " in replication and "| H1a | " not in replication
    assert "| gridtd, lrp | 1e-5 |" in text
    row = counted("aoa", EXPLAINED)
    assert (row["images"], row["H1, stop words"], row["H2"]) == (200, 200, 200)
    assert row["H3, with negative patches"] == 200
    assert row["H4, hallucinated"] == sum(not i["frequent"][0]["supported"] for i in EXPLAINED)
    assert row["correctness of lrp"] == pytest.approx(60)
    assert words.splitlines()[0].startswith("word,cross_entropy: right,cross_entropy: said")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == "H1a  object words, LRP's words less the last"
    assert labels[-1] == "H7  LRP-inference costs less than 1 point of CIDEr"
    text, words, figure = report({}, {}, {})
    assert figure is None
    assert text.count("not tested") == 10
    assert words == "word\n"
