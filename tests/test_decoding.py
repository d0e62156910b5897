"""Decoding: beam 1 is greedy, beams find what an exhaustive search finds, and batches equal one image at a time."""

import itertools

import pytest
import torch

from decoding import beam_search, greedy, reorder
from test_lrp_utils import random_captioner


@pytest.fixture(scope="module")
def captioner():
    captioner = random_captioner(words=6)
    with torch.no_grad():
        captioner.fc.bias[captioner.vocabulary.end] -= 2  # or every caption is empty
    return captioner


@pytest.fixture(scope="module")
def features(captioner):
    return torch.randn(5, 9, captioner.encoder.out_channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0xF00D)) * 3


def log_probability(captioner, features, words):
    """The log-probability of a sequence of word ids after `<start>`, one step at a time."""
    memory = captioner.look(features)
    state, previous, total = captioner.start(memory), captioner.vocabulary.start, 0.0
    for word in words:
        step, state = captioner.next_words(torch.tensor([[previous]]), state, memory)
        total, previous = total + step[0, 0, word].item(), word
    return total


def test_beam_one_is_greedy(captioner, features):
    for length in (1, 4, 12):
        assert beam_search(captioner, features, 1, length) == greedy(captioner, features, length)


def test_a_wide_beam_finds_the_best_finished_caption(captioner, features):
    end, words = captioner.vocabulary.end, range(1, 7)
    with torch.no_grad():
        for image in features[:2].split(1):
            captions = [list(start) for n in range(4) for start in itertools.product(words, repeat=n)]
            best = max(captions, key=lambda caption: log_probability(captioner, image, [*caption, end]))
            assert beam_search(captioner, image, 200, 4) == [best]


def test_a_batch_is_decoded_as_its_images_one_by_one(captioner, features):
    for beam in (2, 3):
        alone = [beam_search(captioner, image, beam, 10)[0] for image in features.split(1)]
        assert beam_search(captioner, features, beam, 10) == alone
        assert len({tuple(caption) for caption in alone}) > 1
    assert greedy(captioner, features, 10) == [greedy(captioner, image, 10)[0] for image in features.split(1)]


def test_the_silent_tokens_are_never_said_and_the_length_is_kept(captioner, features):
    vocabulary = captioner.vocabulary
    for caption in beam_search(captioner, features, 3, 7) + greedy(captioner, features, 7):
        assert len(caption) <= 7
        assert not {vocabulary.pad, vocabulary.start, vocabulary.unk, vocabulary.end} & set(caption)


def test_reorder_picks_beams_in_every_part_of_a_state():
    state = (torch.arange(6).reshape(2, 3, 1), torch.arange(12).reshape(2, 3, 2))
    first, second = reorder(state, torch.tensor([[2, 2, 0], [1, 0, 1]]))
    assert first.flatten().tolist() == [2, 2, 0, 4, 3, 4]
    assert second[1].tolist() == [[8, 9], [6, 7], [8, 9]]
