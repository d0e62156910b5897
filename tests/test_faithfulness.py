"""Faithfulness and the quality of maps, against slow versions written from their papers."""

import copy
import random

import numpy as np
import pytest
import torch
from helpers import random_captioner

from experiments import faithfulness, fills, map_quality
from experiments.case import Setting, examine
from experiments.faithfulness import correlation, plain_maps
from experiments.image_ablation import PATCH
from experiments.map_quality import (
    complexity,
    randomised,
    rise,
    sensitivity,
    similarity,
    sparseness,
    with_noise,
)
from pycocoevalcap.chair.chair import object_phrases

METHODS = ["lrp", "gradcam"]
CAPTION = ["w1", "w9", "w5"]
FRACTIONS = (0.2, 0.6)
ENTRY = {"captions": ["w1"], "width": 128, "height": 128, "objects": []}


def slow_imputation(image, mask):
    """The removed pixels of one channel (H, W), each the weighted mean of its neighbours."""
    height, width = image.shape
    places = [tuple(place) for place in np.argwhere(mask)]
    matrix = np.zeros((len(places), len(places)))
    right = np.zeros(len(places))
    for row, (y, x) in enumerate(places):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                weight = 1 / 6 if dy == 0 or dx == 0 else 1 / 12
                other = (y + dy, x + dx)
                inside = 0 <= other[0] < height and 0 <= other[1] < width
                if (dy == 0 and dx == 0) or not inside:
                    continue
                matrix[row, row] += weight
                if mask[other]:
                    matrix[row, places.index(other)] -= weight
                else:
                    right[row] += weight * image[other]
    filled = image.copy()
    for place, value in zip(places, np.linalg.solve(matrix, right)):
        filled[place] = value
    return filled


def test_the_linear_fill_solves_roads_equations(monkeypatch):
    monkeypatch.setattr(fills, "NOISE", 0)
    monkeypatch.setattr(fills, "RESIDUAL", 1e-12)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 9, 8, dtype=torch.float64, generator=generator)
    masks = (
        torch.rand(4, 9, 8, generator=generator) < torch.tensor([0.1, 0.4, 0.7, 0.9])[:, None, None]
    )
    found = fills.linear_fill(image, masks)
    for mask, filled in zip(masks, found):
        for channel in range(3):
            truth = slow_imputation(image[channel].numpy(), mask.numpy())
            np.testing.assert_allclose(filled[channel].numpy(), truth, atol=1e-9)


def test_no_fill_touches_a_pixel_that_stays():
    image = torch.randn(3, 16, 24)
    masks = torch.rand(3, 16, 24) < 0.5
    masks[2] = False
    for fill in fills.FILLS.values():
        found = fill(image, masks)
        stays = ~masks[:, None].expand(-1, 3, -1, -1)
        assert torch.equal(found[stays], image.expand(3, -1, -1, -1)[stays])
    assert (fills.mean_fill(image, masks)[0][:, masks[0]] == 0).all()
    noise = fills.linear_fill(image, masks) - fills.linear_fill(image, masks, seed=1)
    assert 0 < noise.std() < 2 * fills.NOISE


@pytest.fixture(scope="module")
def setting():
    phrases = object_phrases({"dog": ["w1"], "bus": ["w5"]})
    return Setting(random_captioner(words=12).float(), METHODS, phrases, [])


@pytest.fixture
def images(setting, monkeypatch):
    """Two images with given captions; the second one names no object."""
    monkeypatch.setattr(setting.captioner, "decode", lambda features: [CAPTION, ["w2", "w2"]])
    return torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(2))


def examined(images, setting, experiment):
    return examine(images, [4, 5], [ENTRY, ENTRY], {"it": experiment}, setting)


def probability(captioner, image, words, position):
    """How probable a word is after the words before it."""
    ids = captioner.vocabulary.encode(words)
    inputs = torch.tensor([[[captioner.vocabulary.start, *ids[:position]]]])
    logits = captioner.eval_view()(captioner.encode(image[None]), inputs)
    return logits[0, 0, position].softmax(-1)[ids[position]].item()


def slow_order(values):
    """The patches of a map (H, W) by falling sum of their pixels, as rows and columns."""
    sums = {}
    for row in range(values.shape[0] // PATCH):
        for column in range(values.shape[1] // PATCH):
            part = values[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            sums[row, column] = part.sum().item()
    return sorted(sums, key=lambda patch: -sums[patch])


def slow_curve(setting, image, order):
    """The mean probability of the first word of CAPTION with more and more of the patches of an
    order at the mean colour."""
    found = []
    for fraction in FRACTIONS:
        changed = image.clone()
        for row, column in order[: round(fraction * len(order))]:
            changed[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 0
        found.append(probability(setting.captioner, changed, CAPTION, 0))
    return np.mean(found)


def test_the_curves_are_those_of_removing_patch_after_patch(images, setting, monkeypatch):
    monkeypatch.setattr(faithfulness, "FRACTIONS", FRACTIONS)
    monkeypatch.setattr(faithfulness, "SUBSETS", 4)
    monkeypatch.setattr(faithfulness, "WORDS_AN_IMAGE", 1)
    records = examined(images, setting, faithfulness.EXPERIMENT)
    (found,) = records[0]["it"]
    assert found["word"] == "w1" and records[1]["it"] == []
    (explanation,) = setting.captioner.explain(images[:1], [CAPTION], "lrp")
    order = slow_order(explanation.image_relevance[0])
    truth = slow_curve(setting, images[0], order)
    assert found["morf"]["mean"]["lrp"] == pytest.approx(truth, rel=1e-3)
    truth = slow_curve(setting, images[0], order[::-1])
    assert found["lerf"]["mean"]["lrp"] == pytest.approx(truth, rel=1e-3)
    assert set(found["morf"]["linear"]) == {*METHODS, "centre", "edges", "random"}
    assert set(found["other"]) == set(METHODS)
    assert -1 <= found["correlation"]["lrp"] <= 1


def test_where_the_sign_says_nothing_the_size_counts(images, setting):
    for method, signed in (("lrp", True), ("guided_gradcam", False)):
        (explanation,) = setting.captioner.explain(images[:1], [CAPTION], method)
        values = explanation.image_relevance[1]
        assert values.min() < 0
        assert torch.equal(faithfulness.word_map(explanation, 1), values) == signed
        assert signed or faithfulness.word_map(explanation, 1).min() >= 0


def test_the_table_takes_means_over_words():
    def record(gap, own, correlation):
        both = {"lrp": 0.5, "random": 0.5}
        found = {"word": "dog", "morf": dict.fromkeys(fills.FILLS, both), "lerf": {}}
        for fill in fills.FILLS:
            found["lerf"][fill] = {"lrp": 0.5 + gap, "random": 0.5}
        found["other"] = own and {"lrp": 0.5 + own}
        return found | {"correlation": {"lrp": correlation, "random": None}}

    images = [[record(0.1, 0.2, 0.5), record(0.3, None, 0.1)], [], [record(0.2, 0.4, None)]]
    lrp, chance = faithfulness.table(images, "gridtd")
    assert lrp["words"] == 3 and lrp["linear"] == pytest.approx(0.2)
    assert lrp["low"] <= lrp["linear"] <= lrp["high"]
    assert lrp["own map"] == pytest.approx(0.3) and lrp["correlation"] == pytest.approx(0.3)
    assert chance["method"] == "random" and chance["linear"] == 0
    assert lrp["behind lrp"] is None and chance["behind lrp"] == pytest.approx(0.2)
    assert chance["behind low"] == pytest.approx(lrp["low"])
    assert chance["own map"] is None and chance["correlation"] is None


def test_plain_maps_know_the_centre_and_the_edges():
    image = torch.zeros(3, 32, 48)
    image[:, :, 24:] = 1
    maps = plain_maps(image, random.Random(0))
    height, width = np.unravel_index(maps["centre"].numpy().argmax(), (32, 48))
    assert abs(height - 15.5) < 1 and abs(width - 23.5) < 1
    assert maps["edges"][:, 23:25].min() > 0
    assert maps["edges"][:, :22].max() == maps["edges"][:, 26:].max() == 0


def test_correlation_of_what_is_proportional_and_of_what_is_constant():
    values = np.arange(5.0)
    assert correlation(values, 3 * values + 1) == pytest.approx(1)
    assert correlation(values, -values) == pytest.approx(-1)
    assert correlation(values, np.ones(5)) is None


def test_sparseness_and_complexity_by_their_definitions():
    values = np.array([[0.5, -2.0], [0.0, 1.0]])
    sizes = np.abs(values).ravel()
    differences = sum(abs(one - other) for one in sizes for other in sizes)
    assert sparseness(values) == pytest.approx(differences / (2 * 4 * sizes.sum()))
    shares = [0.5 / 3.5, 2 / 3.5, 1 / 3.5]
    assert complexity(values) == pytest.approx(-sum(s * np.log(s) for s in shares))
    assert sparseness(np.ones(7)) == pytest.approx(0)
    assert complexity(np.ones(7)) == pytest.approx(np.log(7))
    assert sparseness(np.zeros(3)) is None and complexity(np.zeros(3)) is None


def test_sensitivity_similarity_and_rise_by_hand():
    plain = np.array([3.0, 4.0])
    assert sensitivity(plain, [plain + [0, 1], plain - [3, 0]]) == pytest.approx(3 / 5)
    assert sensitivity(np.zeros(2), [plain]) is None
    noise = np.random.default_rng(0).normal(size=(16, 16))
    assert similarity(noise, 5 * noise) == pytest.approx(1)
    assert abs(similarity(noise, np.random.default_rng(1).normal(size=(16, 16)))) < 0.2
    assert similarity(noise, np.zeros((16, 16))) is None
    assert rise(2.0, 3.0) == 0.5
    assert rise(None, 3.0) is None and rise(2.0, None) is None


def test_only_what_is_asked_for_becomes_random(setting):
    before = copy.deepcopy(setting.captioner.state_dict())
    decoder = randomised(setting.captioner, "decoder", 0)
    everything = randomised(setting.captioner, "everything", 0)
    for name, weight in before.items():
        assert torch.equal(setting.captioner.state_dict()[name], weight)
        if name.startswith("encoder."):
            assert torch.equal(decoder.state_dict()[name], weight)
        elif weight.dim() > 1:
            assert not torch.equal(decoder.state_dict()[name], weight)
            assert not torch.equal(everything.state_dict()[name], weight)
    changed = dict(everything.named_parameters())
    assert not torch.equal(changed["fc.weight"], before["fc.weight"])


def test_the_quality_of_maps_is_measured_of_each_word(images, setting, monkeypatch):
    monkeypatch.setattr(map_quality, "NOISY", 2)
    records = examined(images, setting, map_quality.EXPERIMENT)
    assert [found["word"] for found in records[0]["it"]] == ["w1", "w5"]
    assert records[1]["it"] == []
    found = records[0]["it"][1]

    def word_map(captioner, pixels):
        (explanation,) = captioner.explain(pixels, [CAPTION], "lrp")
        return explanation.image_relevance[2].double().numpy()

    plain = word_map(setting.captioner, images[:1])
    noisy = [word_map(setting.captioner, with_noise(images[:1], 0, draw)) for draw in range(2)]
    largest = max(np.linalg.norm(other - plain) for other in noisy) / np.linalg.norm(plain)
    assert found["sensitivity"]["lrp"] == pytest.approx(largest, rel=1e-3)
    assert found["sparseness"]["lrp"] == pytest.approx(sparseness(plain), rel=1e-4)
    after = complexity(word_map(randomised(setting.captioner, "everything", 0), images[:1]))
    risen = after / complexity(plain) - 1
    assert found["complexity rise"]["lrp"] == pytest.approx(risen, abs=1e-4)
    rows = map_quality.table([found["it"] for found in records], "gridtd")
    assert [row["method"] for row in rows] == METHODS
    for row in rows:
        assert row["SSIM decoder low"] <= row["SSIM decoder"] <= row["SSIM decoder high"]


def test_quantus_agrees_where_it_computes_the_same(monkeypatch):
    reason = "quantus is not installed: pip install --no-deps quantus==0.6.0"
    quantus = pytest.importorskip("quantus", reason=reason)
    generator = np.random.default_rng(4)
    values = generator.normal(size=(12, 10))
    batch = {"x_batch": values[None], "a_batch": np.abs(values)[None]}
    options = {"abs": True, "normalise": False, "disable_warnings": True}
    (found,) = quantus.Sparseness(**options).evaluate_batch(**batch)
    assert found == pytest.approx(sparseness(values))
    (found,) = quantus.Complexity(**options).evaluate_batch(**batch)
    assert found == pytest.approx(complexity(values))
    monkeypatch.setattr(fills, "NOISE", 0)
    monkeypatch.setattr(fills, "RESIDUAL", 1e-10)
    image = torch.from_numpy(generator.normal(size=(3, 12, 10)))
    mask = torch.from_numpy(generator.random((12, 10)) < 0.5)
    removed = np.flatnonzero(mask.numpy())
    theirs = quantus.functions.perturb_func.noisy_linear_imputation(image.numpy(), removed, noise=0)
    ours = fills.linear_fill(image, mask[None])[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
