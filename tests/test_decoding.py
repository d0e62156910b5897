"""Decoding: beam 1 is greedy, beams find what an exhaustive search finds, groups differ, samples follow their distribution,
and batches equal one image at a time."""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_captioner
from scipy.stats import chisquare

import decoding
from captioner import load_captioner
from commandline import UserError
from decoding import (
    DECODERS,
    add_decoding_flags,
    beam_search,
    decoding_options,
    diverse_beam_search,
    draw,
    greedy,
    keep_nucleus,
    keep_top_k,
    reorder,
    strip_bad_endings,
    strip_repeats,
)  # fmt: skip
from images import image_transform, load_image

ROOT = Path(__file__).resolve().parent.parent
DRAWS = 20_000


@pytest.fixture(scope="module")
def captioner():
    captioner = random_captioner(words=6)
    with torch.no_grad():
        captioner.fc.bias[captioner.vocabulary.end] -= 2  # or every caption is empty
    return captioner


@pytest.fixture(scope="module")
def features(captioner):
    return (
        torch.randn(
            5,
            9,
            captioner.encoder.out_channels,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(0xF00D),
        )
        * 3
    )


@torch.no_grad()
def next_log_probabilities(captioner, features, words):
    """The log-probabilities (V,) of the word after `<start>` and these words, one step at a time."""
    memory = captioner.image_memory(features)
    state, previous = captioner.initial_state(memory), captioner.vocabulary.start
    for word in [*words, None]:
        step, state = captioner.next_words(torch.tensor([[previous]]), state, memory)
        previous = word
    return step[0, 0]


def log_probability(captioner, features, words):
    """The log-probability of a sequence of word ids after `<start>`."""
    return sum(
        next_log_probabilities(captioner, features, words[:t])[word].item()
        for t, word in enumerate(words)
    )


def slow_diverse_beam(captioner, features, max_length, beam_size, groups, diversity):
    """Vijayakumar et al. (2016) for one image, hypothesis by hypothesis: the best finished caption of every group."""
    end = captioner.vocabulary.end
    alive, finished = [[((), 0.0)] for _ in range(groups)], [[] for _ in range(groups)]
    for _ in range(max_length):
        said = []  # the words that earlier groups chose at this step
        for group in range(groups):
            candidates = []
            for words, score in alive[group]:
                values = next_log_probabilities(captioner, features, words)
                candidates += [
                    ((*words, word), score + value - diversity * said.count(word))
                    for word, value in enumerate(values.tolist())
                    if value > -np.inf
                ]
            width = beam_size - len(finished[group])
            chosen = sorted(candidates, key=lambda candidate: -candidate[1])[:width]
            finished[group] += [candidate for candidate in chosen if candidate[0][-1] == end]
            alive[group] = [candidate for candidate in chosen if candidate[0][-1] != end]
            said += [words[-1] for words, _ in chosen]
    best = [
        max(done or left, key=lambda candidate: candidate[1]) for done, left in zip(finished, alive)
    ]
    return [
        [word for word in words if word != end]
        for words, _ in sorted(best, key=lambda candidate: -candidate[1])
    ]


def test_beam_one_is_greedy(captioner, features):
    for length in (1, 4, 12):
        assert beam_search(captioner, features, length, 1) == greedy(captioner, features, length)


@pytest.mark.parametrize("normalisation", (0.0, 1.0))
def test_a_wide_beam_finds_the_best_finished_caption(captioner, features, normalisation):
    end, words = captioner.vocabulary.end, range(1, 7)

    def rank(caption):
        return (
            log_probability(captioner, image, [*caption, end]) / (len(caption) + 1) ** normalisation
        )

    for image in features[:2].split(1):
        captions = [list(start) for n in range(4) for start in itertools.product(words, repeat=n)]
        best = max(captions, key=rank)
        assert beam_search(captioner, image, 4, 400, normalisation) == [[best]]


def test_length_normalisation_prefers_longer_captions(captioner, features):
    plain, normalised = (beam_search(captioner, features, 12, 3, alpha) for alpha in (0.0, 2.0))
    assert sum(len(c) for [c] in normalised) > sum(len(c) for [c] in plain)


def test_a_batch_is_decoded_as_its_images_one_by_one(captioner, features):
    for options in (
        {"beam_size": 2},
        {"beam_size": 3},
        {"beam_size": 3, "length_normalisation": 0.7},
    ):
        alone = [beam_search(captioner, image, 10, **options)[0] for image in features.split(1)]
        assert beam_search(captioner, features, 10, **options) == alone
        assert len({tuple(caption) for [caption] in alone}) > 1
    alone = [diverse_beam_search(captioner, image, 10, 2, 3, 0.7)[0] for image in features.split(1)]
    assert diverse_beam_search(captioner, features, 10, 2, 3, 0.7) == alone
    assert greedy(captioner, features, 10) == [
        greedy(captioner, image, 10)[0] for image in features.split(1)
    ]


def test_diverse_beam_equals_a_slow_one(captioner, features):
    for image in features[:3].split(1):
        for diversity in (0.3, 1.5):
            assert diverse_beam_search(captioner, image, 6, 2, 3, diversity) == [
                slow_diverse_beam(captioner, image, 6, 2, 3, diversity)
            ]


def test_one_group_is_a_beam_search_and_several_without_diversity_agree(captioner, features):
    beam = beam_search(captioner, features, 10, 3)
    assert diverse_beam_search(captioner, features, 10, 3, 1, 0.5) == beam
    assert diverse_beam_search(captioner, features, 10, 3, 2, 0.0) == [
        captions * 2 for captions in beam
    ]


def test_the_groups_of_a_trained_captioner_differ():
    captioner = load_captioner(ROOT / "checkpoints/scenes-gridtd.pt")
    images = torch.stack(
        [
            image_transform(128)(load_image(path))
            for path in sorted((ROOT / "data/demo").glob("*.jpg"))
        ]
    )
    beam = captioner.caption(images)
    for diversity, different in ((0.0, 1), (0.5, 3)):
        found = captioner.caption(images, "diverse_beam", every=True, groups=3, diversity=diversity)
        assert [len({tuple(words) for words in captions}) for captions in found] == [
            different
        ] * len(images)
        assert all(
            words in captions for words, captions in zip(beam, found)
        )  # the first group is a plain beam search


def test_the_silent_tokens_are_never_said_and_the_length_is_kept(captioner, features):
    vocabulary = captioner.vocabulary
    torch.manual_seed(0)
    for decoder in DECODERS.values():
        for captions in decoder(captioner, features, 7):
            for caption in captions:
                assert len(caption) <= 7
                assert not {vocabulary.pad, vocabulary.start, vocabulary.unk, vocabulary.end} & set(
                    caption
                )


@pytest.mark.parametrize("method, options", [
    ("multinomial", {}), ("multinomial", {"temperature": 0.6}), ("gumbel", {}), ("gumbel", {"temperature": 1.7}),
    ("top_k", {"top_k": 3}), ("top_k", {"top_k": 4, "temperature": 2.0}), ("nucleus", {"top_p": 0.95}), ("nucleus", {"top_p": 0.9, "temperature": 1.5}),
])  # fmt: skip
def test_samples_follow_the_renormalised_probabilities(captioner, features, method, options):
    """First words of 20,000 captions against p computed by hand; the rest of the vocabulary is never drawn."""
    end = captioner.vocabulary.end
    p = np.exp(next_log_probabilities(captioner, features[:1], []).numpy()) ** (
        1 / options.get("temperature", 1.0)
    )
    p /= p.sum()
    order = np.argsort(-p)
    kept = len(p)
    if "top_k" in options:
        kept = options["top_k"]
    if "top_p" in options:
        kept = 1 + next(n for n in range(len(p)) if p[order[: n + 1]].sum() >= options["top_p"])
    p[order[kept:]] = 0
    p /= p.sum()
    torch.manual_seed(0xD1CE)
    [captions] = DECODERS[method](captioner, features[:1], 1, num_captions=DRAWS, **options)
    counts = np.bincount([words[0] if words else end for words in captions], minlength=len(p))
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0], p[p > 0] * DRAWS).pvalue > 1e-3
    assert (p > 0).sum() > 1


def test_a_captioner_that_diverged_is_told():
    with pytest.raises(UserError, match="not numbers"):
        draw(torch.full((1, 2, 3), torch.nan))


def test_several_samples_of_an_image_differ_and_belong_to_it(captioner, features):
    torch.manual_seed(1)
    captions = DECODERS["multinomial"](captioner, features, 8, num_captions=20)
    assert [len(image) for image in captions] == [20] * 5
    assert len({tuple(caption) for caption in captions[0]}) > 5


def test_the_filters_keep_what_they_should():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert keep_top_k(logits, 2).isfinite().tolist() == [True, True, False, False]
    assert keep_top_k(logits, 9).isfinite().all()
    for p, kept in ((1e-9, 1), (0.49, 1), (0.51, 2), (0.76, 3), (0.95, 4), (1.0, 4)):
        assert keep_nucleus(logits, p).isfinite().sum() == kept
    assert keep_nucleus(logits.flip(0), 0.6).isfinite().tolist() == [False, False, True, True]


def test_bad_endings_and_repeats_are_removed():
    assert strip_bad_endings("a dog on a".split()) == ["a", "dog"]
    assert strip_bad_endings("with a".split()) == ["with", "a"]  # nothing would be left
    assert strip_bad_endings("a dog".split()) == ["a", "dog"]
    assert strip_repeats("a a dog dog and a dog".split()) == "a dog and a dog".split()


def test_captions_are_stripped_before_they_are_explained():
    captioner = random_captioner(words=6).float()
    images = torch.randn(2, 3, 128, 128)
    plain = captioner.caption(images, "greedy", max_length=9)
    stripped = captioner.caption(images, "greedy", max_length=9, strip=["repeats"])
    assert stripped == [strip_repeats(words) for words in plain] and stripped != plain
    assert [explanation.words for explanation in captioner.explain(images, stripped)] == stripped


def test_a_captioner_takes_every_decoder_with_its_options(captioner):
    captioner, images = random_captioner(words=6).float(), torch.randn(3, 3, 16, 16)
    for method in DECODERS:
        captions = captioner.caption(images, method, max_length=6, every=True)
        assert [len(found) for found in captions] == [3 if method == "diverse_beam" else 1] * 3
        torch.manual_seed(3)
        first = captioner.caption(images, method, max_length=6)
        torch.manual_seed(3)
        assert first == [
            found[0] for found in captioner.caption(images, method, max_length=6, every=True)
        ]
    for method, options in (
        ("best", {}),
        ("greedy", {"top_p": 0.5}),
        ("nucleus", {"top_p": 0.0}),
        ("beam", {"beam_size": 0}),
    ):
        with pytest.raises(UserError):
            captioner.caption(images, method, **options)


def test_the_flags_become_options(captioner):
    parser = argparse.ArgumentParser()
    add_decoding_flags(parser)
    assert decoding_options(parser.parse_args([])) == {"method": "beam"}
    args = parser.parse_args(
        "--decoding nucleus --top_p 0.8 --max_length 9 --strip repeats".split()
    )
    assert decoding_options(args) == {
        "method": "nucleus",
        "top_p": 0.8,
        "max_length": 9,
        "strip": ["repeats"],
    }
    assert "nucleus" in parser.format_help() and "default: 0.9" in parser.format_help()
    for wrong in (
        "--decoding greedy --beam_size 3",
        "--beam_size 0",
        "--max_length 0",
        "--top_p 0.5",
        "--decoding gumbel --temperature 0",
    ):
        with pytest.raises(UserError):
            decoding_options(parser.parse_args(wrong.split()))


def test_reorder_and_of_rows_index_every_tensor():
    sequences = torch.arange(12).reshape(2, 3, 2)
    assert reorder(sequences, torch.tensor([[2, 2, 0], [1, 0, 1]]))[1].tolist() == [
        [8, 9],
        [6, 7],
        [8, 9],
    ]
    picked = decoding.of_rows((torch.arange(3),), torch.tensor([True, False, True]))
    assert picked[0].tolist() == [0, 2]
