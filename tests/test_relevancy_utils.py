"""Relevancy of attention against a slow version that is written from the equations."""

import numpy as np
import oracle_relevancy as oracle
import pytest
import torch

from relevancy_utils import (
    EQUAL,
    Relevancy,
    Weights,
    attention_grad_cam,
    average_heads,
    co_attention,
    gradient_weights,
    in_one_sequence,
    norm_weights,
    partial_lrp,
    raw_attention,
    rollout,
    transformer_attribution,
)

BATCH = (2, 3)  # explained words, images
HEADS = 3
WORDS = 4
PATCHES = 6
CHANNELS = 5


def drawn(*shape):
    return torch.randn(*BATCH, *shape, dtype=torch.float64)


def attention(asking, asked):
    """Random weights of heads, and a gradient: (..., heads, asking, asked) each."""
    return drawn(HEADS, asking, asked).softmax(-1), drawn(HEADS, asking, asked)


def cam(asking, asked):
    return average_heads(*attention(asking, asked))


def members(tensor):
    """The arrays of a batch, one by one."""
    return tensor.flatten(0, len(BATCH) - 1).numpy()


def assert_equal(ours, truths):
    for row, truth in zip(members(ours), truths, strict=True):
        np.testing.assert_allclose(row, truth, rtol=0, atol=1e-9)


def weights_of(reading, tokens):
    """Weights (..., S) of one of the readings."""
    if reading == "equal":
        ones = torch.ones(*BATCH, tokens, dtype=torch.float64)
        return Weights(ones, ones)
    if reading == "norms":
        return norm_weights(drawn(tokens, CHANNELS), drawn(tokens, CHANNELS))
    drawn_values = [drawn(tokens, CHANNELS) for _ in range(3)]
    return gradient_weights(*drawn_values)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_heads_are_averaged_after_the_negative_is_cut():
    weights, gradient = attention(WORDS, PATCHES)
    truths = map(oracle.average_heads, members(weights), members(gradient))
    assert_equal(average_heads(weights, gradient), list(truths))


def oracle_decoder(encoder, decoder, index):
    """What the oracle makes of one member of the batch; see the test below."""
    r_qq = np.eye(PATCHES)
    r_qs = np.zeros((PATCHES, WORDS))
    kept_q = np.ones(PATCHES)
    for layer, weights in encoder:
        before, after = (members(part)[index] for part in weights)
        r_qq, r_qs = oracle.self_attention(r_qq, r_qs, members(layer)[index], before, after)
        kept_q = kept_q * before
    r_ss = np.eye(WORDS)
    r_sq = np.zeros((WORDS, PATCHES))
    kept_s = np.ones(WORDS)
    for own, own_weights, cross, cross_weights in decoder:
        before, after = (members(part)[index] for part in own_weights)
        r_ss, r_sq = oracle.self_attention(r_ss, r_sq, members(own)[index], before, after)
        kept_s = kept_s * before
        before, after = (members(part)[index] for part in cross_weights)
        layer = members(cross)[index]
        r_ss, r_sq = oracle.cross_attention(
            r_ss, r_sq, r_qq, r_qs, layer, before, after, kept_s, kept_q
        )
        kept_s = kept_s * before
    return r_ss, r_sq


@pytest.mark.parametrize("reading", ["equal", "norms", "gradients"])
def test_an_encoder_and_a_decoder_equal_the_oracle(reading):
    encoder = []
    decoder = []
    for _ in range(2):
        encoder.append((cam(PATCHES, PATCHES), weights_of(reading, PATCHES)))
        own = cam(WORDS, WORDS), weights_of(reading, WORDS)
        decoder.append((*own, cam(WORDS, PATCHES), weights_of(reading, WORDS)))
    image = Relevancy.start(PATCHES, WORDS, encoder[0][0])
    for layer, weights in encoder:
        image = image.self_attention(layer, weights)
    text = Relevancy.start(WORDS, PATCHES, encoder[0][0])
    for own, own_weights, cross, cross_weights in decoder:
        text = text.self_attention(own, own_weights)
        text = text.cross_attention(cross, image, cross_weights)
    truths = [oracle_decoder(encoder, decoder, index) for index in range(np.prod(BATCH))]
    assert_equal(text.own, [truth[0] for truth in truths])
    assert_equal(text.other, [truth[1] for truth in truths])


def test_equal_weights_are_the_rule_of_chefer_to_the_last_bit():
    values = drawn(WORDS, CHANNELS)
    for weights in (norm_weights(values, values), gradient_weights(values, values, values)):
        start = Relevancy.start(WORDS, PATCHES, cam(WORDS, WORDS))
        image = Relevancy.start(PATCHES, WORDS, cam(PATCHES, PATCHES))
        image = image.self_attention(cam(PATCHES, PATCHES))
        own = cam(WORDS, WORDS)
        cross = cam(WORDS, PATCHES)
        weighted = start.self_attention(own, weights).cross_attention(cross, image, weights)
        plain = start.self_attention(own, EQUAL).cross_attention(cross, image, EQUAL)
        assert torch.equal(weighted.own, plain.own)
        assert torch.equal(weighted.other, plain.other)


def test_weights_equal_the_oracle_and_zeros_share_equally():
    residual = drawn(WORDS, CHANNELS)
    added = drawn(WORDS, CHANNELS)
    gradient = drawn(WORDS, CHANNELS)
    found = norm_weights(residual, added)
    truths = list(map(oracle.norm_weights, members(residual), members(added)))
    assert_equal(found.before, [truth[0] for truth in truths])
    assert_equal(found.after, [truth[1] for truth in truths])
    gradient[0, 0, 0] = 0
    found = gradient_weights(residual, added, gradient)
    values = zip(members(residual), members(added), members(gradient))
    truths = [oracle.gradient_weights(*value) for value in values]
    assert_equal(found.before, [truth[0] for truth in truths])
    assert_equal(found.after, [truth[1] for truth in truths])
    assert found.before[0, 0, 0] == found.after[0, 0, 0] == 1


def test_a_row_without_attention_is_normalized_to_the_identity():
    layer = cam(WORDS, WORDS)
    layer[..., 1, :] = 0
    found = Relevancy.start(WORDS, PATCHES, layer).self_attention(layer).normalized()
    identity = torch.eye(WORDS, dtype=torch.float64)
    assert torch.equal(found[..., 1, :], identity[1].expand(*BATCH, -1))
    others = found[..., [0, 2, 3], :].sum(-1)
    torch.testing.assert_close(others, torch.full_like(others, 2))


def assert_co_attention(ours, before, asked, layer):
    """`ours` is the oracle's: `before` attends to `asked`, both as they were before the layer."""
    of_tokens = np.ones(before.own.shape[-1])
    of_asked = np.ones(asked.own.shape[-1])
    states = [before.own, before.other, asked.own, asked.other, layer]
    truths = []
    for member in zip(*map(members, states)):
        truths.append(oracle.cross_attention(*member, of_tokens, of_tokens, of_tokens, of_asked))
    assert_equal(ours.own, [truth[0] for truth in truths])
    assert_equal(ours.other, [truth[1] for truth in truths])


def test_co_attention_reads_the_state_before_the_layer():
    words = Relevancy.start(WORDS, PATCHES, cam(WORDS, WORDS)).self_attention(cam(WORDS, WORDS))
    image = Relevancy.start(PATCHES, WORDS, cam(PATCHES, PATCHES))
    image = image.self_attention(cam(PATCHES, PATCHES))
    for _ in range(2):  # in the second layer R^sq and R^qs are no longer 0
        of_words = cam(WORDS, PATCHES)
        of_image = cam(PATCHES, WORDS)
        after_words, after_image = co_attention(words, image, of_words, of_image)
        assert_co_attention(after_words, words, image, of_words)
        assert_co_attention(after_image, image, words, of_image)
        words = after_words
        image = after_image


def test_the_ablations_of_the_cross_attention():
    words = Relevancy.start(WORDS, PATCHES, cam(WORDS, WORDS)).self_attention(cam(WORDS, WORDS))
    image = Relevancy.start(PATCHES, WORDS, cam(WORDS, WORDS))
    image = image.self_attention(cam(PATCHES, PATCHES))
    words = words.cross_attention(cam(WORDS, PATCHES), image)
    layer = cam(WORDS, PATCHES)
    found = words.cross_attention(layer, image, normalize=False).other
    torch.testing.assert_close(found, words.other + words.own.mT @ (layer @ image.own))
    found = words.cross_attention(layer, image, self_term=False).other
    torch.testing.assert_close(found, words.other + layer)
    found = words.cross_attention(layer, image, aggregate=False).other
    torch.testing.assert_close(found, words.normalized().mT @ (layer @ image.normalized()))


def test_a_row_leaves_the_token_itself_out():
    state = Relevancy(drawn(WORDS, WORDS), drawn(WORDS, PATCHES), drawn(WORDS))
    own, other = state.row(2)
    assert torch.equal(own[..., [0, 1, 3]], state.own[..., 2, [0, 1, 3]])
    assert not own[..., 2].any()
    assert torch.equal(other, state.other[..., 2, :])
    assert state.own[..., 2, 2].all()  # the state itself is as it was


def test_rollout_equals_the_oracle_and_goes_through_encoder_and_decoder():
    layers = [raw_attention(attention(WORDS, WORDS)[0]) for _ in range(3)]
    truths = [oracle.rollout(list(member)) for member in zip(*map(members, layers))]
    assert_equal(rollout(layers), truths)
    length = PATCHES + WORDS
    patches = slice(0, PATCHES)
    words = slice(PATCHES, length)
    encoder = raw_attention(attention(PATCHES, PATCHES)[0])
    cross = raw_attention(attention(WORDS, PATCHES)[0])
    found = rollout(
        [
            in_one_sequence(encoder, patches, patches, length),
            in_one_sequence(layers[0], words, words, length),
            in_one_sequence(cross, words, patches, length),
        ]
    )
    # By hand: half of a word's relevance stays with the words, the other half goes to the image.
    identity = torch.eye(PATCHES, dtype=torch.float64)
    to_patches = 0.5 * cross @ (0.5 * (encoder + identity))
    torch.testing.assert_close(found[..., words, patches], to_patches)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


def test_the_other_baselines_equal_the_oracle():
    weights, gradient = attention(WORDS, PATCHES)
    truths = list(map(oracle.attention_grad_cam, members(weights), members(gradient)))
    assert_equal(attention_grad_cam(weights, gradient), truths)
    assert_equal(partial_lrp(gradient), [member.mean(0) for member in members(gradient)])
    relevances = [drawn(HEADS, WORDS, WORDS) for _ in range(3)]
    gradients = [drawn(HEADS, WORDS, WORDS) for _ in range(3)]
    layers = zip(zip(*map(members, relevances)), zip(*map(members, gradients)))
    truths = [oracle.transformer_attribution(*layer) for layer in layers]
    assert_equal(transformer_attribution(relevances, gradients), truths)
