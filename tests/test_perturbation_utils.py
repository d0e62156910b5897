"""Occlusion and RISE, against slow versions and against scores whose explanation is known."""

import pytest
import torch
from helpers import random_captioner

import perturbation_utils
from explanation import explain
from perturbation_utils import as_measured, occlusion, random_masks, rise

CAPTION = ["w3", "w7", "w8"]
SIDE = 11  # of an occluded square: a twelfth of 128 pixels, rounded up


def score_of_a_corner(images, embeddings):
    """Two words: the sum over the left upper corner, and that of an input word."""
    corner = images[:, :, :32, :32].sum((1, 2, 3))
    return torch.stack([corner, embeddings[:, 1].sum(1)], dim=1)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(1, 3, 128, 128, dtype=torch.float64, generator=generator)


def test_occlusion_is_the_fall_of_the_logit_square_by_square(images):
    captioner = random_captioner()
    (found,) = explain(captioner, images, [CAPTION], "occlusion")
    (plain,) = explain(captioner, images, [CAPTION], "gradient")
    for top in (0, SIDE, 11 * SIDE):
        for left in (0, 11 * SIDE):
            hidden = captioner.encoder.own_pixels(images).clone()
            hidden[..., top : top + SIDE, left : left + SIDE] = 0
            (other,) = explain(captioner, hidden, [CAPTION], "gradient")
            fall = plain.scores - other.scores
            square = found.image_relevance[:, top : top + SIDE, left : left + SIDE]
            torch.testing.assert_close(square, fall[:, None, None].expand_as(square))
    assert torch.equal(found.scores, plain.scores)


def test_a_word_that_follows_does_not_matter(images, monkeypatch):
    monkeypatch.setattr(perturbation_utils, "OCCLUDED", 2)
    (found,) = explain(random_captioner(), images, [CAPTION], "occlusion")
    assert found.word_relevance.triu(1).abs().max() < 1e-12
    before = torch.ones(3, 3, dtype=torch.bool).tril()
    assert found.word_relevance[before].abs().min() > 0


def test_the_words_are_those_whose_embedding_is_missed(images):
    embeddings = torch.tensor([[[1.0, 2.0], [5.0, -1.0], [3.0, 3.0]]], dtype=torch.float64)
    for method in (occlusion, rise):
        words = method(images, embeddings, score_of_a_corner)["words"]
        assert words.tolist() == [[[0, 0, 0]], [[0, 4, 0]]]


def test_both_find_the_corner_that_counts(images):
    embeddings = torch.ones(1, 2, 4, dtype=torch.float64)
    for method in (occlusion, rise):
        maps = method(images, embeddings, score_of_a_corner)["image"]
        assert maps.shape == (2, 1, 128, 128)
        assert maps[0, 0, :22, :22].mean() > 0
        assert maps[0, 0, :22, :22].mean() > 5 * maps[0, 0, 60:, 60:].abs().mean()
        assert maps[1].abs().max() < 1e-9  # the second word does not look at the image


def test_rise_by_its_formula(images, monkeypatch):
    monkeypatch.setattr(perturbation_utils, "MASKS", 30)
    masks = [mask.double() for mask in random_masks((128, 128))]
    logits = [score_of_a_corner(images * mask, images[:, 0, :2])[0, 0] for mask in masks]
    total = 0
    for mask, logit in zip(masks, logits):
        total = total + (logit - sum(logits) / 30) * mask
    found = rise(images, images[:, 0, :2], score_of_a_corner)["image"][0, 0]
    torch.testing.assert_close(found, total / (30 * 0.5))


def test_masks_keep_half_and_are_always_the_same():
    masks = torch.stack(list(random_masks((96, 128))))
    assert masks.shape == (perturbation_utils.MASKS, 96, 128)
    assert masks.min() >= 0 and masks.max() <= 1
    assert masks.mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(masks[:3], torch.stack(list(random_masks((96, 128)))[:3]))


def test_a_region_is_the_mean_of_its_pixels():
    maps = torch.arange(64.0).view(1, 1, 8, 8)
    found = as_measured({}, {"image": maps, "words": None}, None, (2, 2))
    assert found["region_relevance"][0, 0].tolist() == [
        maps[0, 0, rows, columns].mean().item()
        for rows in (slice(0, 4), slice(4, 8))
        for columns in (slice(0, 4), slice(4, 8))
    ]
