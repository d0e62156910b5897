"""Decoding: a beam of 1 is greedy, beams find what an exhaustive search finds, groups differ,
samples follow their distribution, and a batch is decoded as its images one by one."""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_captioner
from scipy.stats import chisquare

from captioner import load_captioner
from commandline import UserError
from decoding import (
    DECODERS,
    beam_search,
    decode,
    decode_split,
    diverse_beam_search,
    draw,
    greedy,
    keep_nucleus,
    keep_top_k,
    of_rows,
    reorder,
    strip_bad_endings,
    strip_repeats,
)
from decodingflags import OPTIONS, add_decoding_flags, decoding_options
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
    generator = torch.Generator().manual_seed(0xF00D)
    shape = (5, 9, captioner.encoder.out_channels)
    return 3 * torch.randn(shape, dtype=torch.float64, generator=generator)


@torch.no_grad()
def next_log_probabilities(captioner, features, token_ids):
    """The log-probabilities (V,) of the word after `<start>` and these, one step at a time."""
    memory = captioner.image_memory(features)
    state = captioner.initial_state(memory)
    for token_id in [captioner.vocabulary.start, *token_ids]:
        step, state = captioner.next_words(torch.tensor([[token_id]]), state, memory)
    return step[0, 0]


def log_probability(captioner, features, token_ids):
    """The log-probability of a sequence of token ids after `<start>`."""
    total = 0
    for position, token_id in enumerate(token_ids):
        step = next_log_probabilities(captioner, features, token_ids[:position])
        total += step[token_id].item()
    return total


def score_of(hypothesis):
    _, score = hypothesis
    return score


def slow_diverse_beam(captioner, features, max_length, beam_size, groups, diversity):
    """Vijayakumar et al. (2016) for one image, hypothesis by hypothesis.

    Returns the best finished caption of every group. A hypothesis is (token ids, score).
    """
    end = captioner.vocabulary.end
    alive = [[((), 0.0)] for _ in range(groups)]
    finished = [[] for _ in range(groups)]
    for _ in range(max_length):
        said = []  # the token ids that earlier groups chose at this step
        for group in range(groups):
            candidates = []
            for token_ids, score in alive[group]:
                step = next_log_probabilities(captioner, features, token_ids)
                for token_id, value in enumerate(step.tolist()):
                    if value > -np.inf:
                        total = score + value - diversity * said.count(token_id)
                        candidates.append(((*token_ids, token_id), total))
            width = beam_size - len(finished[group])
            chosen = sorted(candidates, key=score_of, reverse=True)[:width]
            alive[group] = []
            for hypothesis in chosen:
                last = hypothesis[0][-1]
                (finished if last == end else alive)[group].append(hypothesis)
                said.append(last)
    best = [max(done or left, key=score_of) for done, left in zip(finished, alive)]
    best.sort(key=score_of, reverse=True)
    return [[token_id for token_id in token_ids if token_id != end] for token_ids, _ in best]


def plain_beam(captioner, features, max_length, beam_size, length_normalisation=0.0):
    return beam_search(captioner, features, max_length, beam_size, length_normalisation)


def diverse_beam(captioner, features, max_length, beam_size, groups, diversity):
    return diverse_beam_search(captioner, features, max_length, beam_size, groups, diversity, 0.0)


def test_beam_one_is_greedy(captioner, features):
    for length in (1, 4, 12):
        assert plain_beam(captioner, features, length, 1) == greedy(captioner, features, length)


@pytest.mark.parametrize("normalisation", (0.0, 1.0))
def test_a_wide_beam_finds_the_best_finished_caption(captioner, features, normalisation):
    end = captioner.vocabulary.end
    captions = []
    for length in range(4):
        captions += map(list, itertools.product(range(1, 7), repeat=length))
    for image in features[:2].split(1):

        def rank(caption, image=image):
            total = log_probability(captioner, image, [*caption, end])
            return total / (len(caption) + 1) ** normalisation

        best = max(captions, key=rank)
        assert plain_beam(captioner, image, 4, 400, normalisation) == [[best]]


def test_length_normalisation_prefers_longer_captions(captioner, features):
    plain = plain_beam(captioner, features, 12, 3, 0.0)
    normalised = plain_beam(captioner, features, 12, 3, 2.0)
    assert sum(len(caption) for [caption] in normalised) > sum(len(caption) for [caption] in plain)


def one_by_one(decoder, captioner, features, *options):
    """What a decoder finds for each image by itself."""
    return [decoder(captioner, image, *options)[0] for image in features.split(1)]


def test_a_batch_is_decoded_as_its_images_one_by_one(captioner, features):
    for options in ((10, 2), (10, 3), (10, 3, 0.7)):
        alone = one_by_one(plain_beam, captioner, features, *options)
        assert plain_beam(captioner, features, *options) == alone
        assert len({tuple(caption) for [caption] in alone}) > 1
    options = (10, 2, 3, 0.7)
    alone = one_by_one(diverse_beam, captioner, features, *options)
    assert diverse_beam(captioner, features, *options) == alone
    assert greedy(captioner, features, 10) == one_by_one(greedy, captioner, features, 10)


@pytest.mark.parametrize("diversity", (0.3, 1.5))
def test_diverse_beam_equals_a_slow_one(captioner, features, diversity):
    for image in features[:3].split(1):
        slow = slow_diverse_beam(captioner, image, 6, 2, 3, diversity)
        assert diverse_beam(captioner, image, 6, 2, 3, diversity) == [slow]


def test_one_group_is_a_beam_search_and_several_without_diversity_agree(captioner, features):
    beam = plain_beam(captioner, features, 10, 3)
    assert diverse_beam(captioner, features, 10, 3, 1, 0.5) == beam
    twice = [captions * 2 for captions in beam]
    assert diverse_beam(captioner, features, 10, 3, 2, 0.0) == twice


@pytest.mark.parametrize("diversity, different", [(0.0, 1), (0.5, 3)])
def test_the_groups_of_a_trained_captioner_differ(diversity, different):
    captioner = load_captioner(ROOT / "checkpoints/scenes-gridtd.pt")
    transform = image_transform(128)
    paths = sorted((ROOT / "data/demo").glob("*.jpg"))
    images = torch.stack([transform(load_image(path)) for path in paths])
    beam = captioner.caption(images)
    found = captioner.caption(images, "diverse_beam", every=True, groups=3, diversity=diversity)
    for words, captions in zip(beam, found, strict=True):
        assert len({tuple(caption) for caption in captions}) == different
        assert words in captions  # the first group is a plain beam search


def test_the_silent_tokens_are_never_said_and_the_length_is_kept(captioner, features):
    vocabulary = captioner.vocabulary
    silent = {vocabulary.pad, vocabulary.start, vocabulary.unk, vocabulary.end}
    torch.manual_seed(0)
    for method in DECODERS:
        for captions in decode(captioner, features, method, 7):
            for caption in captions:
                assert len(caption) <= 7
                assert not silent & set(caption)


@pytest.mark.parametrize(
    "method, options",
    [
        ("multinomial", {}),
        ("multinomial", {"temperature": 0.6}),
        ("gumbel", {}),
        ("gumbel", {"temperature": 1.7}),
        ("top_k", {"top_k": 3}),
        ("top_k", {"top_k": 4, "temperature": 2.0}),
        ("nucleus", {"top_p": 0.95}),
        ("nucleus", {"top_p": 0.9, "temperature": 1.5}),
    ],
)
def test_samples_follow_the_renormalised_probabilities(captioner, features, method, options):
    """First words of 20,000 captions against p computed by hand; what is not kept is not drawn."""
    end = captioner.vocabulary.end
    image = features[:1]
    logits = next_log_probabilities(captioner, image, []).numpy()
    p = np.exp(logits) ** (1 / options.get("temperature", 1.0))
    p /= p.sum()
    order = np.argsort(-p)
    kept = options.get("top_k", len(p))
    if "top_p" in options:
        kept = 1 + int((p[order].cumsum() < options["top_p"]).sum())
    p[order[kept:]] = 0
    p /= p.sum()
    torch.manual_seed(0xD1CE)
    [captions] = decode(captioner, image, method, 1, num_captions=DRAWS, **options)
    first = [token_ids[0] if token_ids else end for token_ids in captions]
    counts = np.bincount(first, minlength=len(p))
    assert (p > 0).sum() > 1
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0], p[p > 0] * DRAWS).pvalue > 1e-3


def test_a_captioner_that_diverged_is_told():
    with pytest.raises(UserError, match="not numbers"):
        draw(torch.full((1, 2, 3), torch.nan))


def test_several_samples_of_an_image_differ_and_belong_to_it(captioner, features):
    torch.manual_seed(1)
    captions = decode(captioner, features, "multinomial", 8, num_captions=20)
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
    assert stripped == [strip_repeats(words) for words in plain]
    assert stripped != plain
    explained = [explanation.words for explanation in captioner.explain(images, stripped)]
    assert explained == stripped


@pytest.mark.parametrize("method", DECODERS)
def test_a_captioner_takes_every_decoder(method):
    captioner = random_captioner(words=6).float()
    images = torch.randn(3, 3, 128, 128)
    torch.manual_seed(3)
    first = captioner.caption(images, method, max_length=6)
    torch.manual_seed(3)
    every = captioner.caption(images, method, max_length=6, every=True)
    assert [len(captions) for captions in every] == [3 if method == "diverse_beam" else 1] * 3
    assert first == [captions[0] for captions in every]


@pytest.mark.parametrize("method", DECODERS)
def test_options_that_are_not_given_have_their_defaults(captioner, features, method):
    defaults = {}
    for name, option in OPTIONS.items():
        if method in option.modes:
            defaults[name] = option.default
    torch.manual_seed(4)
    plain = decode(captioner, features, method, 6)
    torch.manual_seed(4)
    assert decode(captioner, features, method, 6, **defaults) == plain


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("best", {}, "there is no decoding 'best'"),
        ("greedy", {"groups": 3}, "'greedy' has no option 'groups'.*option of diverse_beam"),
        ("greedy", {"top_p": 0.5}, "'greedy' has no option 'top_p'.*option of nucleus"),
        ("nucleus", {"top_p": 0.0}, "^top_p must be from 0.001 to 1, not 0.0"),
        ("beam", {"beam_size": 0}, "^beam_size must be from 1"),
        ("beam", {"magic": 1}, "no option 'magic'"),
    ],
)
def test_the_library_speaks_of_methods_and_options(method, options, message):
    captioner = random_captioner(words=6).float()
    with pytest.raises(UserError, match=message):
        captioner.caption(torch.randn(3, 3, 128, 128), method, **options)


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_decoding_flags(parser)
    return parser


def test_the_flags_become_options(parser):
    assert decoding_options(parser.parse_args([])) == {"method": "beam"}
    line = "--decoding nucleus --top_p 0.8 --max_length 9 --strip repeats"
    assert decoding_options(parser.parse_args(line.split())) == {
        "method": "nucleus",
        "top_p": 0.8,
        "max_length": 9,
        "strip": ["repeats"],
    }
    assert "nucleus" in parser.format_help()
    assert "default: 0.9" in parser.format_help()


@pytest.mark.parametrize(
    "wrong",
    [
        "--decoding greedy --beam_size 3",
        "--beam_size 0",
        "--max_length 0",
        "--top_p 0.5",
        "--decoding gumbel --temperature 0",
    ],
)
def test_flags_that_make_no_sense_are_refused(parser, wrong):
    with pytest.raises(UserError):
        decoding_options(parser.parse_args(wrong.split()))


class Pictures(torch.utils.data.Dataset):
    """Seven images of noise as a CaptionDataset gives them, or rows of features."""

    split = "test"
    stage = None

    def __init__(self, inputs, features):
        self.inputs = inputs
        self.features = features

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], torch.zeros(5, 2), index


def test_a_split_is_captioned_from_images_or_from_their_features():
    captioner = random_captioner(words=6).float()
    images = torch.randn(7, 3, 128, 128)
    expected = dict(enumerate(captioner.caption(images, "greedy")))
    pixels = Pictures(images, features=None)
    cached = Pictures(captioner.encode(images), features="scenes_vgg")
    for dataset in (pixels, cached):
        found = decode_split(captioner, dataset, batch_size=3, workers=0, method="greedy")
        assert found == expected


def test_reorder_picks_sequences_and_of_rows_indexes_every_tensor():
    sequences = torch.arange(12).reshape(2, 3, 2)
    picked = reorder(sequences, torch.tensor([[2, 2, 0], [1, 0, 1]]))
    assert picked[1].tolist() == [[8, 9], [6, 7], [8, 9]]
    [state] = of_rows((torch.arange(3),), torch.tensor([True, False, True]))
    assert state.tolist() == [0, 2]
