"""The experiments on maps made by hand, with hand-computed answers, and all of them on a batch."""

import random

import numpy as np
import pytest
import torch
from helpers import random_captioner
from pycocotools import mask as rle

from captioner import MODELS
from experiments import PAPER_EXPERIMENTS as EXPERIMENTS
from experiments import sign
from experiments.case import Case, Experiment, Setting, examine
from experiments.correctness import (
    box_masks,
    correctness,
    hits,
    rank_accuracy,
    segmentation_mask,
)
from experiments.hallucination import statistics_of
from experiments.image_ablation import (
    blanked,
    deletion_and_insertion,
    patch_count,
    patch_order,
    patches_mask,
    random_order,
)
from experiments.probabilities import last_word_probabilities
from experiments.statistics import (
    auc,
    auc_with_interval,
    draw_images,
    flattened,
    mean_with_interval,
)
from experiments.tables import markdown_table, tables_of
from experiments.word_ablation import random_words, recent_words, related_words, without
from pycocoevalcap.chair.chair import object_phrases

# ----------------------------------------------------------------------------------- word ablation


def test_related_words_by_sign_or_size_and_never_the_start():
    row = torch.tensor([9.0, 0.1, -5.0, 2.0, 0.3, 1.0, 7.0])  # of <start>, words 0..5
    assert related_words(row, 5, signed=True) == [2, 3, 4]  # the word at 5 is not before itself
    assert related_words(row, 5, signed=False) == [1, 2, 4]
    assert related_words(row, 2, signed=True) == [0, 1]  # fewer than three before it
    assert without(["a", "b", "c", "d", "e"], [1, 3]) == ["a", "c", "e"]


def test_recent_words_are_the_last_ones():
    assert recent_words(7) == [4, 5, 6]
    assert recent_words(2) == [0, 1]
    assert recent_words(0) == []


def test_random_words_come_from_the_same_candidates():
    candidates = set(range(5))
    drawn = [random_words(5, random.Random(seed)) for seed in range(200)]
    for positions in drawn:
        assert len(set(positions)) == 3
        assert set(positions) <= candidates
    assert set().union(*drawn) == candidates
    assert random_words(2, random.Random(0)) == [0, 1]


@pytest.mark.parametrize("model_type", MODELS)
def test_last_word_probabilities_one_by_one(model_type):
    captioner = random_captioner(model_type=model_type)
    features = torch.randn(2, 9, captioner.encoder.out_channels, dtype=torch.float64)
    sequences = [[[3, 4, 5], [7]], []]
    assert last_word_probabilities(captioner, features, [[], []]) == [[], []]
    found = last_word_probabilities(captioner, features, sequences)
    assert found[1] == []
    for ids, value in zip(sequences[0], found[0]):
        inputs = torch.tensor([[[captioner.vocabulary.start, *ids[:-1]]]])
        with torch.no_grad():
            logits = captioner(features[:1], inputs)[0, 0, -1]
        assert value == pytest.approx(logits.softmax(-1)[ids[-1]].item(), abs=1e-12)


# ---------------------------------------------------------------------------------- image ablation


def test_patches_by_hand():
    relevance = torch.zeros(20, 26)  # 2 x 3 whole patches
    relevance[3, 12] = 5.0
    relevance[9, 1] = 3.0
    relevance[19, 25] = 99.0  # this pixel lies in no whole patch
    relevance[8:16, 16:24] = -1.0
    order = patch_order(relevance)
    mask = patches_mask(order[:2], relevance.shape)
    assert mask.sum() == 2 * 64
    assert mask[0:8, 8:16].all()
    assert mask[8:16, 0:8].all()
    assert sorted(order) == list(range(6))
    assert sorted(random_order((20, 26), random.Random(0))) == list(range(6))
    image = torch.ones(3, 20, 26)
    assert blanked(image, mask).sum() == 3 * (20 * 26 - 128)
    assert image.min() == 1


def test_as_large_a_part_of_an_image_as_in_the_paper():
    assert patch_count(224, 224) == 20
    assert patch_count(128, 128) == 7
    assert patch_count(8, 8) == 1


def test_deletion_and_insertion_by_hand(setting):
    captioner = setting.captioner
    image = torch.randn(3, 128, 128)
    case = Case(image, captioner.encode(image[None])[0], WORDS, {}, ENTRY, "0 7", [])
    order = random_order((128, 128), random.Random(1))
    orders = {"lrp": order, "random": order[::-1]}
    found = deletion_and_insertion(captioner, case, 1, orders)
    ids = captioner.vocabulary.encode(WORDS)[:2]

    def probability(pixels):
        features = captioner.encode(pixels[None])
        return last_word_probabilities(captioner, features, [[ids]])[0][0]

    deletion = 0
    insertion = 0
    for step in range(11):
        mask = patches_mask(order[: round(step / 10 * 256)], (128, 128))
        deletion += probability(image.masked_fill(mask, 0)) / 11
        insertion += probability(image.masked_fill(~mask, 0)) / 11
    assert found["deletion"]["lrp"] == pytest.approx(deletion, abs=1e-5)
    assert found["insertion"]["lrp"] == pytest.approx(insertion, abs=1e-5)


# ------------------------------------------------------------------------------------- correctness


def test_correctness_by_hand():
    relevance = torch.tensor([[4.0, 2.0, -8.0], [1.0, 0.0, 3.0]])
    left = torch.tensor([[True, False, False], [True, False, False]])
    right = torch.tensor([[False, False, True], [False, False, True]])
    before = relevance.clone()
    masks = torch.stack([left, right, left | right])
    found = correctness(relevance, masks, thresholds=(0.0, 0.25, 0.6, 0.9))
    # above 0: 4 2 1 3; above 0.25 of the maximum: 4 2 3; above 0.6: 4 3; above 0.9: 4
    expected = [
        [5 / 10, 4 / 9, 4 / 7, 1.0],
        [3 / 10, 3 / 9, 3 / 7, 0.0],
        [8 / 10, 7 / 9, 1.0, 1.0],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(relevance, before)
    # All of the negative relevance lies right.
    assert correctness(-relevance, right.unsqueeze(0), (0.0,)).item() == 1.0


@pytest.mark.parametrize("relevance", (torch.zeros(2, 3), -torch.ones(2, 3)))
def test_a_map_without_positive_relevance_is_correct_nowhere(relevance):
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    assert correctness(relevance, mask).eq(0).all()
    assert not hits(relevance, mask[0])


def test_boxes_overlapping_or_not():
    boxes = [(0, 0, 4, 4), (2, 0, 6, 4), (0, 0, 1, 1)]
    masks = box_masks(boxes, (8, 8), (4, 4))  # a map half as large as its image
    assert masks[0].sum() == 4
    assert masks[1].sum() == 4
    assert masks[:2].any(0).sum() == 6  # one column is in both
    assert masks[2].sum() == 0  # smaller than a pixel, and no centre inside
    assert box_masks([], (8, 8), (4, 4)).any(0).sum() == 0


def test_segmentations_of_all_three_kinds():
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 0:4] = 1
    code = rle.encode(np.asfortranarray(mask))
    counts = [2, 4, 4, 4, 4, 4, 4, 4, 34]  # column by column
    polygons = [[0, 2, 4, 2, 4, 6, 0, 6]]
    compressed = {"size": [8, 8], "counts": code["counts"].decode()}
    plain = {"size": [8, 8], "counts": counts}
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1:3, 0:2] = True
    for segmentation in (polygons, compressed, plain):
        found = segmentation_mask(segmentation, (8, 8), (4, 4))
        assert torch.equal(found, expected)


def test_pointing_game_and_rank_accuracy_by_hand():
    relevance = torch.tensor([[4.0, 2.0], [1.0, 3.0]])
    highest = torch.tensor([[True, False], [False, False]])
    upper = torch.tensor([[True, True], [False, False]])
    assert hits(relevance, highest)
    assert not hits(relevance, ~highest)
    assert rank_accuracy(relevance, upper) == 0.5  # the two highest are 4 and 3
    assert rank_accuracy(relevance, torch.zeros(2, 2, dtype=torch.bool)) == 0.0


# -------------------------------------------------------------------------------------- statistics


def test_statistics_of_a_map_by_hand():
    values = statistics_of(torch.tensor([[-1.0, 3.0], [1.0, 0.0]]))
    assert values["max"] == 3
    assert values["mean"] == 0.75
    assert values["mean positive"] == 2
    assert values["mean size"] == 1.25
    assert values["quantile 0.5"] == 0.5
    assert statistics_of(-torch.ones(2, 2))["mean positive"] == 0


def test_auc_by_hand():
    assert auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert auc([1, 2], [1, 1]) is None


def test_the_interval_of_a_mean_by_hand():
    values, numbers = flattened([[1.0, 1.0], [0.0], [1.0], [0.0, 0.0], []] * 20)
    value, low, high = mean_with_interval(values, numbers, draw_images(100))
    assert value == 0.5
    assert 0.3 < low < 0.45
    assert 0.55 < high < 0.7


def slow_bootstrap(statistic, groups, draws):
    """The interval of a statistic of a list of rows, whose rows are collected in every draw."""
    generator = np.random.default_rng(0)
    values = []
    for _ in range(draws):
        rows = []
        for index in generator.integers(len(groups), size=len(groups)):
            rows += groups[index]
        value = statistic(rows) if rows else None
        if value is not None:
            values.append(value)
    return np.quantile(values, [0.025, 0.975]), len(values)


def random_groups(images, distinct, positive, seed=0):
    """For each image none to three (score, label); scores of so many distinct values."""
    generator = np.random.default_rng(seed)
    groups = []
    for _ in range(images):
        group = []
        for _ in range(generator.integers(4)):
            label = int(generator.random() < positive)
            group.append((int(generator.integers(distinct)) / distinct + 0.2 * label, label))
        groups.append(group)
    return groups


@pytest.mark.parametrize(
    "images, distinct, positive",
    (
        (200, 10**9, 0.7),  # no ties
        (200, 5, 0.7),  # many ties, also between the classes
        (12, 3, 0.9),  # draws that hold one class only
        (3, 2, 0.5),  # draws that hold no word
    ),
)
def test_the_interval_of_an_auc_is_that_of_the_collected_draws(images, distinct, positive):
    groups = random_groups(images, distinct, positive)
    pairs, numbers = flattened(groups)
    scores, labels = zip(*pairs)
    counts = draw_images(images, draws=200)
    value, low, high = auc_with_interval(scores, labels, numbers, counts)

    def slow_auc(rows):
        return auc(*zip(*rows))

    (slow_low, slow_high), left = slow_bootstrap(slow_auc, groups, draws=200)
    assert value == auc(scores, labels)
    assert low == pytest.approx(slow_low, abs=1e-12)
    assert high == pytest.approx(slow_high, abs=1e-12)
    assert (left < 200) == (images < 200)  # draws were left out


def test_the_interval_of_a_mean_is_that_of_the_collected_draws():
    groups = [[score for score, _ in group] for group in random_groups(40, 10**9, 0.5)]
    _, low, high = mean_with_interval(*flattened(groups), draw_images(40, draws=300))

    def slow_mean(rows):
        return sum(rows) / len(rows)

    slow, _ = slow_bootstrap(slow_mean, groups, draws=300)
    assert [low, high] == pytest.approx(slow, abs=1e-12)


def test_there_is_no_interval_of_nothing():
    assert mean_with_interval([], [], draw_images(2)) == (None, None, None)
    assert auc_with_interval([], [], [], draw_images(2)) == (None, None, None)
    assert auc_with_interval([1.0, 2.0], [1, 1], [0, 1], draw_images(2)) == (None, None, None)


# -------------------------------------------------------------------------------------- on a batch

WORDS = ["a", "man", "and", "a", "hot", "dog", "on", "two", "dogs", "by", "a", "man"]
ENTRY = {
    "width": 32,
    "height": 32,
    "captions": ["A man sits.", "two men"],
    "objects": [
        {"category": "person", "bbox": [0, 0, 16, 32]},
        {"category": "person", "bbox": [8, 0, 32, 32]},
        {"category": "bench", "bbox": [0, 0, 4, 4]},
    ],
}


@pytest.fixture
def setting():
    """A random captioner that knows WORDS, three methods and two object words."""
    captioner = random_captioner(words=20).float()
    for place, word in enumerate(dict.fromkeys([*WORDS, "bench"]), start=1):
        captioner.vocabulary.words[place] = word
    captioner.vocabulary = type(captioner.vocabulary)(captioner.vocabulary.words)
    categories = {"person": ["man"], "hot dog": ["hot dog"], "dog": ["dog", "dogs"]}
    return Setting(
        captioner,
        methods=["lrp", "gradcam", "attention"],
        phrases=object_phrases(categories),
        object_words=["man", "dogs"],
        decoding={"method": "greedy", "max_length": 6},
    )


@pytest.fixture
def records(setting, monkeypatch):
    """The records of two images; the second has no caption."""
    captioner = setting.captioner
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    features = captioner.encode(images)
    original = captioner.decode

    def decode(found, **options):
        if torch.equal(found, features):
            return [WORDS, []]
        return original(found, **options)

    monkeypatch.setattr(captioner, "decode", decode)
    found = examine(images, [7, 8], [ENTRY, ENTRY], EXPERIMENTS, setting)
    assert found[1] == {"index": 8, "caption": []}
    assert list(found[0]) == ["index", "caption", *EXPERIMENTS]
    return images, features, found[0]


def test_word_ablation_on_a_batch(setting, records):
    images, features, record = records
    words = record["word_ablation"]
    # from the sixth word on
    assert [(word["word"], word["kind"]) for word in words] == [
        ("dog", "object"),  # of "hot dog"
        ("on", "stop"),
        ("dogs", "object"),
        ("by", "stop"),
        ("a", "stop"),
        ("man", "object"),
    ]
    assert list(words[0]["drop"]) == ["random", "recent", "lrp", "gradcam"]
    captioner = setting.captioner
    explanation = captioner.explain(images[:1], [WORDS], "lrp")[0]
    ids = captioner.vocabulary.encode(WORDS)
    kept = without(ids[:9], related_words(explanation.word_relevance[8], 8, signed=True))
    before, after = last_word_probabilities(captioner, features[:1], [[ids[:9], kept]])[0]
    assert words[2]["drop"]["lrp"] == pytest.approx(before - after, abs=1e-6)


def test_image_ablation_on_a_batch(records):
    words = records[2]["image_ablation"]
    assert [word["word"] for word in words] == ["man", "dog", "dogs", "man"]
    for word in words:
        assert list(word["gone"]) == ["lrp", "gradcam", "attention", "random"]
        assert word["deletion"].keys() == word["insertion"].keys() == word["gone"].keys()
        for method, gone in word["gone"].items():
            assert (word["drop"][method] is None) == gone


def test_correctness_on_a_batch(records):
    """Two overlapping boxes cover the image."""
    words = records[2]["correctness"]
    assert [word["word"] for word in words] == ["man", "man"]
    assert words[0]["area"] == 1.0
    found = words[0]["methods"]
    assert found.keys() == {"lrp", "gradcam", "attention", "negative lrp"}
    assert found["attention"]["union"] == pytest.approx([1.0] * 10)
    assert all(0 <= best <= 1 for best in found["lrp"]["best box"])


def test_hallucination_on_a_batch(records):
    words = records[2]["hallucination"]
    assert [(word["word"], word["supported"], word["shown"]) for word in words] == [
        ("man", True, True),
        ("dogs", False, False),
        ("man", True, True),
    ]
    of_the_output = {"1 - beta", "- position", "probability", "logit"}
    assert words[0]["scores"].keys() == {"lrp", "gradcam", "attention"} | of_the_output


def test_the_best_of_several_heads_is_reported_beside_their_mean(setting, monkeypatch):
    captioner = random_captioner(words=20, model_type="aoa").float()
    captioner.vocabulary = setting.captioner.vocabulary
    monkeypatch.setattr(captioner, "decode", lambda found: [["a", "man"]])
    images = torch.randn(1, 3, 128, 128)
    entry = {**ENTRY, "objects": [{"category": "person", "bbox": [0, 0, 10, 20]}]}
    other = Setting(captioner, ["attention"], setting.phrases, [])
    chosen = {"correctness": EXPERIMENTS["correctness"]}
    (record,) = examine(images, [0], [entry], chosen, other)
    found = record["correctness"][0]["methods"]
    heads = captioner.explain(images, [["a", "man"]], "attention")[0].attention[1]
    assert len(heads) > 1
    mask = box_masks([(0, 0, 10, 20)], (32, 32), (128, 128))
    grids = heads.view(len(heads), 1, 8, 8)
    grids = torch.nn.functional.interpolate(grids, size=128, mode="bilinear")[:, 0]
    each = torch.stack([correctness(grid, mask)[0] for grid in grids])
    mean = correctness(grids.mean(0), mask)[0]
    assert found["attention, best head"]["union"] == pytest.approx(each.amax(0).tolist())
    assert found["attention"]["union"] == pytest.approx(mean.tolist())


def test_the_random_baselines_depend_on_seed_and_image_only(setting, monkeypatch):
    """Neither on the other images of the batch nor on which experiments there are."""
    captioner = setting.captioner
    images = torch.randn(2, 3, 128, 128)
    monkeypatch.setattr(captioner, "decode", lambda found, **options: [WORDS] * len(found))
    both = examine(images, [7, 8], [ENTRY, ENTRY], EXPERIMENTS, setting)
    fewer = {name: EXPERIMENTS[name] for name in ("image_ablation", "word_ablation")}
    alone = examine(images[1:], [8], [ENTRY], fewer, setting)
    for word, other in zip(both[1]["word_ablation"], alone[0]["word_ablation"]):
        assert word["drop"]["random"] == pytest.approx(other["drop"]["random"], abs=1e-6)
    for word, other in zip(both[1]["image_ablation"], alone[0]["image_ablation"]):
        expected = other["deletion"]["random"]
        assert word["deletion"]["random"] == pytest.approx(expected, abs=1e-6)


def test_another_experiment_needs_no_more_than_two_functions(setting, monkeypatch):
    def run(cases, setting):
        return [[{"length": len(case.words)}] for case in cases]

    def table(images, model_type):
        return [{"words": sum(word["length"] for image in images for word in image)}]

    experiments = {"length": Experiment(run, table)}
    monkeypatch.setattr(setting.captioner, "decode", lambda found, **options: [WORDS, []])
    images = torch.randn(2, 3, 128, 128)
    found = examine(images, [0, 1], [ENTRY, ENTRY], experiments, setting)
    assert tables_of(found, experiments, "gridtd") == {"length": [{"words": 12}]}


# -------------------------------------------------------------------------------------------- sign


def test_what_opposes_has_negative_relevance_only():
    row = torch.tensor([-9.0, 0.1, -5.0, 2.0, -0.3, -1.0, -7.0])  # of <start>, words 0..5
    assert sign.opposing_words(row, 6) == [1, 4, 5]
    assert sign.opposing_words(row, 3) == [1]
    assert sign.opposing_words(row, 1) == []
    relevance = torch.ones(32, 32)
    relevance[8:16, 16:24] = -1  # patch 6 of 4 x 4
    assert sign.opposing_patches(relevance) == [6]  # 2.6 % are one patch
    assert sign.opposing_patches(relevance.abs()) == []


def test_the_sign_experiment_on_a_batch(setting, records):
    """The rises are those of the images and captions that are made by hand."""
    images, features, _ = records
    captioner = setting.captioner
    (found, _) = examine(images, [7, 8], [ENTRY, ENTRY], {"sign": sign.EXPERIMENT}, setting)
    words = found["sign"]
    assert [word["word"] for word in words] == ["man", "dog", "dogs", "man"]
    assert words[1]["inside"] is None  # no annotated hot dog
    assert words[0]["area"] == 1.0
    explanation = captioner.explain(images[:1], [WORDS], "lrp")[0]
    ids = captioner.vocabulary.encode(WORDS)
    opposing = sign.opposing_words(explanation.word_relevance[8], 8)
    kept = without(ids[:9], opposing)
    before, after = last_word_probabilities(captioner, features[:1], [[ids[:9], kept]])[0]
    assert words[2]["words"]["negative"] == pytest.approx(after - before, abs=1e-6)
    relevance = explanation.image_relevance[8]
    patches = sign.opposing_patches(relevance)
    blank = blanked(images[0], patches_mask(patches, relevance.shape))
    blank_features = captioner.encode(blank[None])
    ((after,),) = last_word_probabilities(captioner, blank_features, [[ids[:9]]])
    assert words[2]["patches"]["negative"] == pytest.approx(after - before, abs=1e-6)


def test_the_sign_table_by_hand():
    patches = {"negative": 0.2, "random": -0.1}
    images = [[{"patches": patches, "words": None}], [{"patches": None, "words": None}]]
    rows = sign.table(images, "gridtd")
    assert [(row["what"], row["deleted"], row["words"], row["rise"]) for row in rows] == [
        ("patches", "negative", 1, 0.2),
        ("patches", "random", 1, -0.1),
    ]


# ------------------------------------------------------------------------------------------ tables


def test_the_word_table_by_hand():
    def word(kind, lrp, other):
        return {"kind": kind, "drop": {"lrp": lrp, "random": other}}

    images = [
        [word("stop", 0.5, -0.1), word("object", -0.2, 0.1)],
        [word("stop", -0.1, -0.2)],
        [],
        [],
    ]
    rows = {}
    for row in EXPERIMENTS["word_ablation"].table(images, "gridtd"):
        rows[row["kind"], row["method"]] = row
    stop = rows["stop", "lrp"]
    assert stop["words"] == 2
    assert stop["drops"] == 0.5
    assert stop["mean drop"] == pytest.approx(0.2)
    assert stop["low"] <= 0.5 <= stop["high"]
    assert stop["paper"] == 0.7121
    assert rows["object", "random"]["drops"] == 1.0
    assert rows["stop", "random"]["drops"] == 0.0


def test_records_of_earlier_versions_are_read_beside_new_ones():
    """Old records have no "recent" words and no scores of the captioner's output."""
    images = [
        [{"kind": "stop", "drop": {"random": 0.1}}],
        [{"kind": "stop", "drop": {"random": 0.3, "recent": -0.2}}],
    ]
    rows = {row["method"]: row for row in EXPERIMENTS["word_ablation"].table(images, "aoa")}
    assert (rows["random"]["words"], rows["recent"]["words"]) == (2, 1)
    assert rows["recent"]["drops"] == 0
    words = []
    for score, supported in ((1.0, True), (0.0, False)):
        old = {"lrp": {"max": score}}
        new = old | {"logit": {"value": -score}}
        words += [
            {"supported": supported, "shown": None, "scores": old},
            {"supported": supported, "shown": None, "scores": new},
        ]
    rows = {row["method"]: row for row in EXPERIMENTS["hallucination"].table([words], "aoa")}
    assert (rows["lrp"]["supported yes/no"], rows["lrp"]["AUC supported"]) == ("2/2", 1.0)
    assert (rows["logit"]["supported yes/no"], rows["logit"]["AUC supported"]) == ("1/1", 0.0)


def test_the_image_table_by_hand():
    words = []
    for gone, drop in ((True, None), (False, 0.3), (False, -0.1)):
        words.append(
            {
                "gone": {"lrp": gone},
                "drop": {"lrp": drop},
                "deletion": {"lrp": 0.2},
                "insertion": {"lrp": 0.4},
            }
        )
    (row,) = EXPERIMENTS["image_ablation"].table([words[:2], words[2:]], "aoa")
    assert row["gone"] == pytest.approx(1 / 3)
    assert row["drops of the rest"] == 0.5
    assert row["mean drop"] == pytest.approx(0.1)
    assert row["deletion"] == pytest.approx(0.2)
    assert row["insertion"] == pytest.approx(0.4)


def localised(value, hit):
    curve = [value, value / 2]
    found = {"union": curve, "best box": curve, "pointing game": hit, "rank accuracy": value}
    return {"area": 0.1, "methods": {"lrp": found}}


def test_the_correctness_table_by_hand():
    images = [[localised(0.4, True), localised(0.8, False)], []]
    area, lrp = EXPERIMENTS["correctness"].table(images, "aoa")
    assert area["union"] == pytest.approx(0.1)
    assert lrp["union"] == pytest.approx(0.6)
    assert lrp["curves"]["union"] == pytest.approx([0.6, 0.3])
    assert lrp["pointing game"] == 0.5
    assert lrp["rank accuracy"] == pytest.approx(0.6)
    assert "segmentation" not in lrp


def test_the_figure_of_correctness_has_a_panel_a_curve():
    word = localised(0.4, True)
    for name in ("union", "best box"):
        word["methods"]["lrp"][name] = [0.4] * 10
    word["methods"]["negative lrp"] = word["methods"]["lrp"]
    experiment = EXPERIMENTS["correctness"]
    figure = experiment.figure(experiment.table([[word]], "aoa"))
    assert [axes.get_title() for axes in figure.axes] == ["union", "best box"]
    one, other = figure.axes[0].lines
    assert (one.get_linestyle(), other.get_linestyle()) == ("-", "--")
    assert one.get_color() == other.get_color()
    assert experiment.figure([]) is None


def test_the_hallucination_table_by_hand():
    images = []
    for score, supported, shown in (
        (0.9, True, True),
        (0.2, False, None),
        (0.4, True, False),
        (0.6, False, False),
    ):
        scores = {"lrp": {"max": score}}
        images.append([{"supported": supported, "shown": shown, "scores": scores}])
    (row,) = EXPERIMENTS["hallucination"].table(images, "gridtd")
    assert row["AUC supported"] == 0.75
    assert row["AUC shown"] == 1.0
    assert row["supported yes/no"] == "2/2"
    assert row["shown yes/no"] == "1/2"
    assert row["paper"] == 0.61


def test_tables_of_nothing_are_empty():
    for records in ([{}, {}], []):
        tables = tables_of(records, EXPERIMENTS, "aoa")
        assert tables == dict.fromkeys(EXPERIMENTS, [])


def test_a_table_in_markdown():
    rows = [{"method": "lrp", "n": 2}, {"method": "area", "mean": 0.25, "curves": {"union": 1}}]
    assert markdown_table(rows).split("\n") == [
        "| method | n | mean  |",
        "|--------|---|-------|",
        "| lrp    | 2 |       |",
        "| area   |   | 0.250 |",
    ]
    assert markdown_table([]) == "nothing to measure"
