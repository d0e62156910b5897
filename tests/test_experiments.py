"""The experiments' functions on maps made by hand, with hand-computed answers, and all of them on a batch."""

import random

import numpy as np
import pytest
import torch
from helpers import random_captioner
from pycocotools import mask as rle

from captioner import MODELS
from experiments import (
    SUMMARIES,
    Case,
    Examiner,
    auc,
    blanked,
    bootstrap,
    box_masks,
    correctness,
    hits,
    last_word_probabilities,
    patch_count,
    patch_order,
    patches_mask,
    random_order,
    random_words,
    rank_accuracy,
    related_words,
    segmentation_mask,
    statistics_of,
    summarise_correctness,
    summarise_hallucination,
    summarise_image_ablation,
    summarise_word_ablation,
    without,
)  # fmt: skip
from pycocoevalcap.chair.chair import object_phrases


def test_related_words_by_sign_or_size_and_never_the_start():
    row = torch.tensor([9.0, 0.1, -5.0, 2.0, 0.3, 1.0, 7.0])  # of <start>, words 0..5
    assert related_words(row, 5, signed=True) == [
        2,
        3,
        4,
    ]  # the word at 5 itself is not before itself
    assert related_words(row, 5, signed=False) == [1, 2, 4]
    assert related_words(row, 2, signed=True) == [0, 1]  # fewer than three before it
    assert without("a b c d e".split(), [1, 3]) == ["a", "c", "e"]


def test_random_words_come_from_the_same_candidates():
    drawn = [random_words(5, random.Random(seed)) for seed in range(200)]
    assert all(len(set(places)) == 3 and set(places) <= set(range(5)) for places in drawn)
    assert {place for places in drawn for place in places} == set(range(5))
    assert random_words(2, random.Random(0)) == [0, 1]


def test_patches_by_hand():
    relevance = torch.zeros(20, 26)  # 2 x 3 whole patches
    relevance[3, 12], relevance[9, 1], relevance[19, 25] = (
        5.0,
        3.0,
        99.0,
    )  # the last pixel lies in no whole patch
    relevance[8:16, 16:24] = -1.0
    mask = patches_mask(patch_order(relevance)[:2], relevance.shape)
    assert mask.sum() == 2 * 64 and mask[0:8, 8:16].all() and mask[8:16, 0:8].all()
    assert patch_count(224, 224) == 20 and patch_count(128, 128) == 7 and patch_count(8, 8) == 1
    assert (
        sorted(random_order((20, 26), random.Random(0)))
        == sorted(patch_order(relevance))
        == list(range(6))
    )
    image = torch.ones(3, 20, 26)
    assert blanked(image, mask).sum() == 3 * (20 * 26 - 128) and image.min() == 1


def test_correctness_by_hand():
    relevance = torch.tensor([[4.0, 2.0, -8.0], [1.0, 0.0, 3.0]])
    left = torch.tensor([[True, False, False], [True, False, False]])
    right = torch.tensor([[False, False, True], [False, False, True]])
    before = relevance.clone()
    found = correctness(
        relevance, torch.stack([left, right, left | right]), thresholds=(0.0, 0.25, 0.6, 0.9)
    )
    # above 0: 4 2 1 3; above 0.25 of the maximum: 4 2 3; above 0.6: 4 3; above 0.9: 4
    expected = [[5 / 10, 4 / 9, 4 / 7, 1.0], [3 / 10, 3 / 9, 3 / 7, 0.0], [8 / 10, 7 / 9, 1.0, 1.0]]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(relevance, before)
    assert (
        correctness(-relevance, right.unsqueeze(0), (0.0,)).item() == 1.0
    )  # of the negative part, all lies right


@pytest.mark.parametrize("relevance", (torch.zeros(2, 3), -torch.ones(2, 3)))
def test_a_map_without_positive_relevance_is_correct_nowhere(relevance):
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    assert correctness(relevance, mask).eq(0).all() and not hits(relevance, mask[0])


def test_boxes_overlapping_or_not():
    masks = box_masks(
        [(0, 0, 4, 4), (2, 0, 6, 4), (0, 0, 1, 1)], (8, 8), (4, 4)
    )  # a map half as large as its image
    assert (
        masks[0].sum() == 4 and masks[1].sum() == 4 and masks[:2].any(0).sum() == 6
    )  # one column is in both
    assert masks[2].sum() == 0  # smaller than a pixel, and no centre inside
    assert box_masks([], (8, 8), (4, 4)).any(0).sum() == 0


def test_segmentations_of_all_three_kinds():
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 0:4] = 1
    code = rle.encode(np.asfortranarray(mask))
    counts = [2, 4, 4, 4, 4, 4, 4, 4, 34]  # column by column
    for segmentation in (
        [[0, 2, 4, 2, 4, 6, 0, 6]],
        {"size": [8, 8], "counts": code["counts"].decode()},
        {"size": [8, 8], "counts": counts},
    ):
        found = segmentation_mask(segmentation, (8, 8), (4, 4))
        assert found.tolist() == [
            [False] * 4,
            [True, True, False, False],
            [True, True, False, False],
            [False] * 4,
        ]


def test_pointing_game_and_rank_accuracy_by_hand():
    relevance = torch.tensor([[4.0, 2.0], [1.0, 3.0]])
    assert hits(relevance, torch.tensor([[True, False], [False, False]])) and not hits(
        relevance, torch.tensor([[False, True], [True, True]])
    )
    assert (
        rank_accuracy(relevance, torch.tensor([[True, True], [False, False]])) == 0.5
    )  # the two highest are 4 and 3
    assert rank_accuracy(relevance, torch.zeros(2, 2, dtype=torch.bool)) == 0.0


def test_statistics_auc_and_bootstrap_by_hand():
    values = statistics_of(torch.tensor([[-1.0, 3.0], [1.0, 0.0]]))
    assert (
        values["max"] == 3
        and values["mean"] == 0.75
        and values["mean positive"] == 2
        and values["mean size"] == 1.25
    )
    assert values["quantile 0.5"] == 0.5 and statistics_of(-torch.ones(2, 2))["mean positive"] == 0
    assert auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75 and auc([1, 2], [1, 1]) is None
    groups = [[1.0, 1.0], [0.0], [1.0], [0.0, 0.0], []] * 20
    value, low, high = bootstrap(lambda rows: sum(rows) / len(rows), groups)
    assert value == 0.5 and 0.3 < low < 0.45 and 0.55 < high < 0.7


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
            assert value == pytest.approx(
                captioner(features[:1], inputs)[0, 0, -1].softmax(-1)[ids[-1]].item(), abs=1e-12
            )


WORDS = "a man and a hot dog on two dogs by a man".split()


@pytest.fixture
def examiner():
    captioner = random_captioner(words=20).float()
    for place, word in enumerate(dict.fromkeys([*WORDS, "bench"]), start=1):
        captioner.vocabulary.words[place] = word
    captioner.vocabulary = type(captioner.vocabulary)(captioner.vocabulary.words)
    phrases = object_phrases({"person": ["man"], "hot dog": ["hot dog"], "dog": ["dog", "dogs"]})
    wanted = ("word_ablation", "image_ablation", "correctness", "hallucination")
    return Examiner(
        captioner,
        ("lrp", "gradcam", "attention"),
        phrases,
        ["man", "dogs"],
        wanted,
        {"method": "greedy", "max_length": 6},
    )


ENTRY = {
    "width": 32, "height": 32, "captions": ["A man sits.", "two men"],
    "objects": [{"category": "person", "bbox": [0, 0, 16, 32]}, {"category": "person", "bbox": [8, 0, 32, 32]}, {"category": "bench", "bbox": [0, 0, 4, 4]}],
}  # fmt: skip


def test_all_experiments_on_a_batch(examiner, monkeypatch):
    """The second image has no caption. Word twice, plural and compound; two overlapping boxes."""
    captioner, images = examiner.captioner, torch.randn(2, 3, 128, 128)
    features = captioner.encode(images)
    decode = captioner.decode
    monkeypatch.setattr(
        captioner,
        "decode",
        lambda found, **options: (
            [WORDS, []] if torch.equal(found, features) else decode(found, **options)
        ),
    )
    one, other = examiner(images, [7, 8], [ENTRY, ENTRY])
    assert other == {"index": 8, "caption": []}
    # from the sixth word on: dog (of "hot dog"), on, dogs, by, a, man
    assert [(row["word"], row["kind"]) for row in one["word_ablation"]] == [("dog", "object"), ("on", "stop"), ("dogs", "object"),
                                                                             ("by", "stop"), ("a", "stop"), ("man", "object")]  # fmt: skip
    explained = captioner.explain(images[:1], [WORDS], "lrp")[0]
    ids = captioner.vocabulary.encode(WORDS)
    kept = without(ids[:9], related_words(explained.word_relevance[8], 8, signed=True))
    before, after = last_word_probabilities(captioner, features[:1], [[ids[:9], kept]])[0]
    assert one["word_ablation"][2]["drop"]["lrp"] == pytest.approx(before - after, abs=1e-6)
    assert one["word_ablation"][0]["drop"].keys() == {"random", "lrp", "gradcam"}
    assert [row["word"] for row in one["image_ablation"]] == ["man", "dog", "dogs", "man"]
    for row in one["image_ablation"]:
        assert row["gone"].keys() == {"lrp", "gradcam", "attention", "random"}
        assert all((row["drop"][method] is None) == gone for method, gone in row["gone"].items())
        assert row["deletion"].keys() == row["insertion"].keys() == row["gone"].keys()
    assert [row["word"] for row in one["correctness"]] == ["man", "man"]
    found = one["correctness"][0]["methods"]
    assert found.keys() == {"lrp", "gradcam", "attention", "negative lrp"}
    assert (
        found["attention"]["union"] == pytest.approx([1.0] * 10)
        and one["correctness"][0]["area"] == 1.0
    )
    assert all(0 <= best <= 1 for best in found["lrp"]["best box"])
    assert [(row["word"], row["supported"], row["shown"]) for row in one["hallucination"]] == [
        ("man", True, True),
        ("dogs", False, False),
        ("man", True, True),
    ]
    assert one["hallucination"][0]["scores"].keys() == {"lrp", "gradcam", "attention", "1 - beta"}


def test_the_best_of_several_heads_is_reported_beside_their_mean(examiner, monkeypatch):
    captioner = random_captioner(words=20, model_type="aoa").float()
    captioner.vocabulary = examiner.captioner.vocabulary
    monkeypatch.setattr(captioner, "decode", lambda found, **options: [["a", "man"]])
    images = torch.randn(1, 3, 128, 128)
    entry = {**ENTRY, "objects": [{"category": "person", "bbox": [0, 0, 10, 20]}]}
    (record,) = Examiner(captioner, ("attention",), examiner.phrases, [], ("correctness",), {})(
        images, [0], [entry]
    )
    found = record["correctness"][0]["methods"]
    heads = captioner.explain(images, [["a", "man"]], "attention")[0].attention[1]
    mask = box_masks([(0, 0, 10, 20)], (32, 32), (128, 128))
    grids = torch.nn.functional.interpolate(
        heads.view(len(heads), 1, 8, 8), size=128, mode="bilinear"
    )[:, 0]
    each = torch.stack([correctness(grid, mask)[0] for grid in grids])
    assert len(heads) > 1 and found["attention, best head"]["union"] == pytest.approx(
        each.amax(0).tolist()
    )
    assert found["attention"]["union"] == pytest.approx(
        correctness(grids.mean(0), mask)[0].tolist()
    )


def test_the_random_baselines_depend_on_seed_and_image_only(examiner, monkeypatch):
    captioner, images = examiner.captioner, torch.randn(2, 3, 128, 128)
    monkeypatch.setattr(captioner, "decode", lambda found, **options: [WORDS] * len(found))
    both = examiner(images, [7, 8], [ENTRY, ENTRY])
    monkeypatch.setattr(
        examiner, "wanted", ["image_ablation", "word_ablation"]
    )  # nor on which experiments there are, or their order
    alone = examiner(images[1:], [8], [ENTRY])[0]
    for row, other in zip(both[1]["word_ablation"], alone["word_ablation"]):
        assert row["drop"]["random"] == pytest.approx(other["drop"]["random"], abs=1e-6)
    for row, other in zip(both[1]["image_ablation"], alone["image_ablation"]):
        assert row["deletion"]["random"] == pytest.approx(other["deletion"]["random"], abs=1e-6)


def test_deletion_and_insertion_by_hand(examiner):
    captioner, image = examiner.captioner, torch.randn(3, 128, 128)
    case = Case(image, captioner.encode(image[None])[0], WORDS, {}, ENTRY, "0 7", [])
    order = random_order((128, 128), random.Random(1))
    found = examiner._deletion_and_insertion(case, 1, {"lrp": order, "random": order[::-1]})
    ids = captioner.vocabulary.encode(WORDS)[:2]
    expected = {"deletion": [], "insertion": []}
    for step in range(11):
        mask = patches_mask(order[: round(step / 10 * 256)], (128, 128))
        for name, pixels in (
            ("deletion", image.masked_fill(mask, 0)),
            ("insertion", image.masked_fill(~mask, 0)),
        ):
            expected[name].append(
                last_word_probabilities(captioner, captioner.encode(pixels[None]), [[ids]])[0][0]
            )
    for name, values in expected.items():
        assert found[name]["lrp"] == pytest.approx(sum(values) / 11, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------- tables


def test_the_word_table_by_hand():
    drops = [[("stop", 0.5, -0.1), ("object", -0.2, 0.1)], [("stop", -0.1, -0.2)], []]
    records = [
        {
            "word_ablation": [
                {"kind": kind, "drop": {"lrp": lrp, "random": other}} for kind, lrp, other in image
            ]
        }
        for image in drops
    ]
    rows = {
        (row["kind"], row["method"]): row
        for row in summarise_word_ablation([*records, {}], "gridtd")
    }
    assert (
        rows["stop", "lrp"]["drops"] == 0.5
        and rows["stop", "lrp"]["mean drop"] == pytest.approx(0.2)
        and rows["stop", "lrp"]["words"] == 2
    )
    assert rows["object", "random"]["drops"] == 1.0 and rows["stop", "random"]["drops"] == 0.0
    assert (
        rows["stop", "lrp"]["paper"] == 0.7121
        and rows["stop", "lrp"]["low"] <= 0.5 <= rows["stop", "lrp"]["high"]
    )


def test_the_image_table_by_hand():
    words = [
        {
            "gone": {"lrp": gone},
            "drop": {"lrp": drop},
            "deletion": {"lrp": 0.2},
            "insertion": {"lrp": 0.4},
        }
        for gone, drop in ((True, None), (False, 0.3), (False, -0.1))
    ]
    (row,) = summarise_image_ablation(
        [{"image_ablation": words[:2]}, {"image_ablation": words[2:]}], "aoa"
    )
    assert (
        row["gone"] == pytest.approx(1 / 3)
        and row["drops of the rest"] == 0.5
        and row["mean drop"] == pytest.approx(0.1)
    )
    assert row["deletion"] == pytest.approx(0.2) and row["insertion"] == pytest.approx(0.4)


def test_the_correctness_table_by_hand():
    def word(value, hit):
        curve = [value, value / 2]
        return {
            "area": 0.1,
            "methods": {
                "lrp": {
                    "union": curve,
                    "best box": curve,
                    "pointing game": hit,
                    "rank accuracy": value,
                }
            },
        }

    area, lrp = summarise_correctness(
        [{"correctness": [word(0.4, True), word(0.8, False)]}, {"correctness": []}], "aoa"
    )
    assert (
        area["union"] == pytest.approx(0.1)
        and lrp["union"] == pytest.approx(0.6)
        and lrp["curves"]["union"] == pytest.approx([0.6, 0.3])
    )
    assert (
        lrp["pointing game"] == 0.5
        and lrp["rank accuracy"] == pytest.approx(0.6)
        and "segmentation" not in lrp
    )


def test_the_hallucination_table_by_hand():
    words = [(0.9, True, True), (0.2, False, None), (0.4, True, False), (0.6, False, False)]
    records = [
        {"hallucination": [{"supported": a, "shown": b, "scores": {"lrp": {"max": score}}}]}
        for score, a, b in words
    ]
    (row,) = summarise_hallucination(records, "gridtd")
    assert (
        row["AUC supported"] == 0.75
        and row["AUC shown"] == 1.0
        and row["supported yes/no"] == "2/2"
        and row["shown yes/no"] == "1/2"
    )
    assert row["paper"] == 0.61


def test_tables_of_nothing_are_empty():
    assert all(summary([{}, {}], "aoa") == [] for summary in SUMMARIES.values())
