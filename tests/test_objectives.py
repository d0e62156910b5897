"""Objectives: LRP-inference's weights against the definition with a (V, H) matrix of relevances,
its losses by hand, and SCST's reward, baseline and gradient by hand.
"""

import json

import pytest
import torch
from fixtures import command, prepared_scenes
from helpers import random_captioner
from oracle_metrics import slow_cider_d

import train
from basemodel import read_checkpoint
from captiondata import CaptionDataset
from captioner import METHODS, MODELS, load_captioner
from commandline import UserError
from explanation import propagate
from lrp_utils import EPSILON, inference_weights, summed
from names import DROPOUTS
from objectives import (
    LRP_CONTROLS,
    SCST,
    CrossEntropy,
    ImageLRPInference,
    LRPInference,
    ObjectiveConfig,
    build_objective,
    doubly_stochastic_loss,
    magnitude_weights,
    quiet_words,
    random_weights,
    shuffled_weights,
    temperature_weights,
)
from pycocoevalcap.bleu.bleu import Bleu
from vocabulary import STOP_WORDS

SMALL = ["--batch_size", 8, "--workers", 0, "--device", "cpu"]


def without_dropout(captioner):
    for name in DROPOUTS:
        captioner.get_submodule(name).p = 0.0


def stabilised(z):
    return z + EPSILON * (1.0 if z >= 0 else -1.0)


def slow_weights(addends, fc, predicted):
    """omega of every addend (H,) for one token id, by the definition.

    The relevance of the logit goes to every (word, unit), then to every unit of the sum, then to
    its addends, each by the epsilon-rule; all words but the predicted one carry none.
    """
    total = summed(addends)
    logits = fc.weight @ total + fc.bias
    units = range(len(total))
    relevance = torch.zeros_like(fc.weight)
    for i in units:
        logit = logits[predicted].item()
        part = fc.weight[predicted, i].item() * total[i].item()
        relevance[predicted, i] = part * logit / stabilised(logit)
    of_total = relevance.sum(0)
    omegas = []
    for addend in addends:
        R = torch.zeros_like(addend)
        for i in units:
            R[i] = addend[i].item() * of_total[i].item() / stabilised(total[i].item())
        largest = R.abs().max()
        omegas.append(1 + R / largest if largest > 0 else torch.ones_like(R))
    return omegas


def addends_of(captioner, features, inputs):
    memory = captioner.image_memory(features)
    return captioner.unroll(captioner.embedding(inputs), memory).addends


def assert_same_gradients(captioner, loss, expected, tolerance):
    parameters = captioner.decoder_parameters()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for one, other in zip(found, wanted):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.allclose(one, other, atol=tolerance)


@pytest.fixture(params=MODELS)
def setting(request):
    """A random captioner in float64, features of 3 images, inputs and targets (3, 2, 5), padded."""
    captioner = random_captioner(words=20, model_type=request.param).train()
    without_dropout(captioner)
    # Some of the words are stop words, and likely ones.
    captioner.vocabulary.words[1:5] = ["a", "the", "on", "of"]
    with torch.no_grad():
        captioner.fc.weight[1:5] *= 2
    features = torch.randn(3, 9, captioner.encoder.out_channels, dtype=torch.float64) * 3
    inputs = torch.randint(1, 21, (3, 2, 5))
    targets = torch.randint(1, 21, (3, 2, 5))
    targets[0, 0, 3:] = 0
    return captioner, features, inputs, targets


def test_the_weights_equal_their_definition(setting):
    captioner, features, inputs, _ = setting
    addends = addends_of(captioner, features, inputs)
    addends = [addend.flatten(0, 2).detach() for addend in addends]
    check_weights(addends, captioner.fc)


@pytest.mark.parametrize("number", [1, 3])
def test_the_weights_of_any_number_of_addends_equal_their_definition(number):
    torch.manual_seed(0)
    fc = torch.nn.Linear(4, 7).double()
    check_weights(list(torch.randn(number, 6, 4, dtype=torch.float64)), fc)


def check_weights(addends, fc):
    scores, predicted = fc(summed(addends)).max(-1)
    omegas = inference_weights(addends, fc.weight[predicted], scores)
    for row, token_id in enumerate(predicted):
        expected = slow_weights([addend[row] for addend in addends], fc, token_id)
        for omega, wanted in zip(omegas, expected, strict=True):
            torch.testing.assert_close(omega[row], wanted, rtol=0, atol=1e-9)
            assert omega[row].min() >= 0
            assert omega[row].max() <= 2


def test_nothing_arrives_nothing_is_weighted():
    zero = torch.zeros(1, 4, dtype=torch.float64)
    rows = torch.randn(1, 4, dtype=torch.float64)
    for omega in inference_weights((zero, zero), rows, torch.zeros(1, dtype=torch.float64)):
        assert torch.equal(omega, torch.ones_like(omega))


def slow_lrp_loss(captioner, features, inputs, targets, lrp_lambda):
    """lambda CE(p) + (1 - lambda) CE(p_hat), word by word; its gradient takes omega as constant."""
    addends = addends_of(captioner, features, inputs)
    losses = []
    for index in (targets != 0).nonzero().tolist():
        parts = [addend[tuple(index)] for addend in addends]
        target = targets[tuple(index)]
        p = captioner.fc(summed(parts))
        predicted = p.argmax().item()
        word = captioner.vocabulary.words[predicted]
        p_hat = p
        if word not in STOP_WORDS and not word.startswith("<"):
            omegas = slow_weights([part.detach() for part in parts], captioner.fc, predicted)
            p_hat = captioner.fc(summed([omega * part for omega, part in zip(omegas, parts)]))
        plain = -p.log_softmax(-1)[target]
        inferred = -p_hat.log_softmax(-1)[target]
        losses.append(lrp_lambda * plain + (1 - lrp_lambda) * inferred)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("lrp_lambda", (0.5, 0.0))
def test_lrp_inference_loss_and_gradient_by_hand(setting, lrp_lambda):
    captioner, features, inputs, targets = setting
    objective = LRPInference(captioner, lrp_lambda=lrp_lambda)
    loss, _ = objective.loss(features, inputs, targets)
    expected = slow_lrp_loss(captioner, features, inputs, targets, lrp_lambda)
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(captioner, loss, expected, 1e-10)


def word_parts(number=2, words=6, units=4):
    """Addends (words, units), a last layer, the predicted words and their logits, in float64."""
    torch.manual_seed(3)
    fc = torch.nn.Linear(units, 7).double()
    addends = list(torch.randn(number, words, units, dtype=torch.float64))
    scores, predicted = fc(summed(addends)).max(-1)
    return addends, fc, scores, predicted


def test_random_weights_are_the_same_ones_in_another_order():
    addends, fc, scores, predicted = word_parts(units=50)
    found = random_weights(addends, fc.weight[predicted], scores)
    orders = []
    for row, token_id in enumerate(predicted):
        own = slow_weights([addend[row] for addend in addends], fc, token_id)
        for weights, omega in zip(found, own, strict=True):
            torch.testing.assert_close(weights[row].sort().values, omega.sort().values)
            assert not torch.allclose(weights[row], omega)
            orders.append(weights[row].argsort().argsort()[omega.argsort()].tolist())
    assert len({tuple(order) for order in orders}) == len(orders)  # every word and addend its own


@pytest.mark.parametrize("words", (1, 2, 7))
def test_shuffled_weights_are_another_words(words):
    addends, fc, scores, predicted = word_parts(words=words)
    found = shuffled_weights(addends, fc.weight[predicted], scores)
    givers = []
    for row in range(words):
        for other, token_id in enumerate(predicted):
            own = slow_weights([addend[other] for addend in addends], fc, token_id)
            if all(torch.allclose(part[row], omega) for part, omega in zip(found, own)):
                givers.append(other)
    assert sorted(givers) == list(range(words))  # each word's weights are used once
    if words > 1:
        assert all(giver != row for row, giver in enumerate(givers))


def test_magnitude_weights_by_hand():
    addends = [torch.tensor([[1.0, -4.0, 0.0]]), torch.zeros(1, 3)]
    found = magnitude_weights(addends, None, None)
    assert found[0].tolist() == [[1.25, 2.0, 1.0]]
    assert found[1].tolist() == [[1.0, 1.0, 1.0]]  # where nothing arrives nothing is weighted


def test_a_temperature_raises_the_predicted_logit_as_relevance_does():
    addends, fc, scores, predicted = word_parts()
    found = temperature_weights(addends, fc.weight[predicted], scores)
    compared = 0
    for row, token_id in enumerate(predicted):
        parts = [addend[row] for addend in addends]
        omegas = slow_weights(parts, fc, token_id)
        weighted = fc(summed([omega * part for omega, part in zip(omegas, parts)]))[token_id]
        factor = found[0][row, 0]
        for weights in found:
            assert torch.equal(weights[row], factor.expand(4))
        assert 0 <= factor <= 2
        if 0 < factor < 2:
            torch.testing.assert_close(fc(factor * summed(parts))[token_id], weighted)
            compared += 1
    assert compared > 2


@pytest.mark.parametrize("control", LRP_CONTROLS)
def test_only_the_weights_differ_between_the_controls(setting, control):
    """The loss by hand from the control's own weights, in the order of the words of the batch."""
    captioner, features, inputs, targets = setting
    addends = addends_of(captioner, features, inputs)
    counted = targets != 0
    flat = [addend[counted].detach() for addend in addends]
    logits = captioner.fc(summed(flat))
    scores, predicted = logits.max(-1)
    loud = (~quiet_words(captioner.vocabulary)[predicted]).nonzero().flatten()
    rows = captioner.fc.weight[predicted[loud]].detach()
    torch.manual_seed(4)
    weights = LRP_CONTROLS[control]([part[loud] for part in flat], rows, scores[loud].detach())
    weighted = summed([omega * part[loud] for omega, part in zip(weights, flat)])
    p_hat = logits.index_copy(0, loud, captioner.fc(weighted))
    expected = torch.tensor(0.0, dtype=torch.float64)
    for place, target in enumerate(targets[counted].tolist()):
        expected = expected - 0.5 * logits[place].log_softmax(-1)[target]
        expected = expected - 0.5 * p_hat[place].log_softmax(-1)[target]
    torch.manual_seed(4)
    loss, _ = LRPInference(captioner, control=control).loss(features, inputs, targets)
    torch.testing.assert_close(loss, expected / counted.sum())


def test_without_lrp_it_is_cross_entropy(setting):
    captioner, features, inputs, targets = setting
    inference, _ = LRPInference(captioner, lrp_lambda=1.0).loss(features, inputs, targets)
    plain, _ = CrossEntropy(captioner).loss(features, inputs, targets)
    torch.testing.assert_close(inference, plain)


def test_the_weighted_last_layer_is_that_of_the_loss(setting):
    captioner, features, inputs, _ = setting
    objective = LRPInference(captioner)
    addends = addends_of(captioner, features, inputs)
    p_hat = objective.last_layer(addends)
    logits = captioner.fc(summed(addends))
    quiet = quiet_words(captioner.vocabulary)[logits.argmax(-1)]
    assert quiet.any()
    assert not quiet.all()
    assert torch.allclose(p_hat[quiet], logits[quiet])
    assert not torch.allclose(p_hat[~quiet], logits[~quiet])


def heat_map(captioner, image, inputs, position, predicted):
    """LRP's map of the word predicted at a position after inputs (T,)."""
    targets = torch.cat([inputs[1 : position + 1], torch.tensor([predicted])])[None]
    start = torch.full((1, 1), captioner.vocabulary.start)
    inputs = torch.cat([start, targets[:, :-1]], dim=1)
    positions = torch.tensor([[position]])
    found = propagate(captioner, image[None], inputs, targets, positions, METHODS["lrp"])
    return found["image_relevance"][0, 0]


@pytest.mark.parametrize("model_type", MODELS)
def test_image_factors_by_hand(model_type):
    """m = 1 + mean(E) of the predicted word's own LRP map, one word at a time.

    The logit of that word alone is multiplied.
    """
    captioner = random_captioner(words=20, model_type=model_type).train()
    without_dropout(captioner)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    starts = torch.full((2, 2, 1), captioner.vocabulary.start)
    inputs = torch.cat([starts, torch.randint(1, 21, (2, 2, 2))], dim=-1)
    targets = torch.randint(1, 21, (2, 2, 3))
    targets[1, 1, 2] = 0
    features = captioner.encoder.eval()(images)
    objective = ImageLRPInference(captioner, lrp_lambda=0.3)
    loss, _ = objective.loss(features, inputs, targets, images)
    logits = captioner(features, inputs)
    losses = []
    for image, caption, position in (targets != 0).nonzero().tolist():
        p = logits[image, caption, position]
        target = targets[image, caption, position]
        predicted = p.argmax().item()
        heat = heat_map(captioner, images[image], inputs[image, caption], position, predicted)
        p_hat = p.clone()
        p_hat[predicted] = p[predicted] * (1 + (heat / heat.abs().max()).mean())
        plain = -p.log_softmax(-1)[target]
        inferred = -p_hat.log_softmax(-1)[target]
        losses.append(0.3 * plain + 0.7 * inferred)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert captioner.training


def test_image_factors_stay_float32_where_training_is_bfloat16():
    captioner = random_captioner(words=20).float().train()
    objective = ImageLRPInference(captioner)
    images = torch.randn(2, 3, 16, 16)
    inputs = torch.full((2, 1, 3), captioner.vocabulary.start)
    predicted = torch.randint(1, 21, (2, 1, 3))
    wanted = torch.ones(2, 1, 3, dtype=torch.bool)
    factors = objective.image_factors(images, inputs, predicted, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        again = objective.image_factors(images, inputs, predicted, wanted)
    assert torch.equal(again, factors)


def test_cross_entropy_is_the_mean_over_words_that_are_not_padding(setting):
    """The captions are of very different lengths.

    So packing and the shrinking batch of a stepped captioner are at work.
    """
    captioner, features, inputs, targets = setting
    targets[0, 1, 2:] = 0
    targets[1, 0, 1:] = 0
    targets[2, 1, 4:] = 0
    loss, figures = CrossEntropy(captioner).loss(features, inputs, targets)
    logits = captioner(features, inputs)
    losses = []
    for index in (targets != 0).nonzero().tolist():
        losses.append(-logits[tuple(index)].log_softmax(-1)[targets[tuple(index)]])
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected)
    assert figures["words"] == len(losses)
    assert_same_gradients(captioner, loss, expected, 1e-12)


def test_doubly_stochastic_loss_by_hand():
    """Two steps count of three; the two heads' mean counts; the last region is padding."""
    heads = [[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]] * 2, [[0.0, 1.0, 0.0]] * 2]
    attention = torch.tensor(heads, dtype=torch.float64).expand(1, 1, 3, 2, 3)
    counted = torch.tensor([[[True, True, False]]])
    regions = torch.tensor([[True, True, False]])
    # The regions are looked at 0.25 + 1 and 0.75 + 0 times.
    found = doubly_stochastic_loss(attention, counted, regions)
    assert found.item() == pytest.approx(0.25**2 + 0.25**2)
    assert doubly_stochastic_loss(attention, counted).item() == pytest.approx(0.125 + 1)


def test_cross_entropy_with_the_doubly_stochastic_loss(setting):
    """The captions are of different lengths, so what follows their ends must not count."""
    captioner, features, inputs, targets = setting
    targets[0, 1, 2:] = 0
    targets[2, 1, 4:] = 0
    objective = CrossEntropy(captioner, attention_penalty=0.7)
    loss, figures = objective.loss(features, inputs, targets)
    plain, _ = CrossEntropy(captioner).loss(features, inputs, targets)
    memory = captioner.image_memory(features)
    attention = captioner.unroll(captioner.embedding(inputs), memory).attention.mean(3)
    penalty = 0
    for image in range(3):
        for caption in range(2):
            length = int((targets[image, caption] != 0).sum())
            for region in range(9):
                total = attention[image, caption, :length, region].sum()
                penalty = penalty + (1 - total) ** 2
    penalty = 0.7 * penalty / (targets != 0).sum()
    torch.testing.assert_close(loss, plain + penalty)
    torch.testing.assert_close(figures["attention_loss"], penalty.detach())
    assert not figures["attention_loss"].requires_grad
    assert_same_gradients(captioner, loss, plain + penalty, 1e-12)


def test_the_doubly_stochastic_loss_of_a_batch_is_that_of_its_parts_by_words(setting):
    """As several processes divide a batch among them."""
    captioner, features, inputs, targets = setting
    targets[1, 0, 2:] = 0
    targets[1, 1, 1:] = 0
    objective = CrossEntropy(captioner, attention_penalty=1.0)
    whole, figures = objective.loss(features, inputs, targets)
    total = 0
    for part in (slice(0, 1), slice(1, 3)):
        loss, of_part = objective.loss(features[part], inputs[part], targets[part])
        total = total + loss * of_part["words"] / figures["words"]
    torch.testing.assert_close(whole, total)
    assert_same_gradients(captioner, whole, total, 1e-10)


def test_padded_regions_have_no_part_in_the_doubly_stochastic_loss():
    captioner = random_captioner("bottom_up", model_type="soft")
    features = torch.rand(2, 5, 2048, dtype=torch.float64)
    padded = torch.nn.functional.pad(features, (0, 0, 0, 3))
    captions = torch.tensor([[[3, 7, 9]], [[4, 5, 0]]])
    objective = CrossEntropy(captioner, attention_penalty=1.0)
    losses = [objective.loss(x, captions, captions)[0] for x in (features, padded)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("model_type", MODELS)
def test_only_cross_entropy_of_soft_attention_is_doubly_stochastic(model_type):
    """And not the cross-entropy that LRP-inference is compared with."""
    captioner = random_captioner(words=20, model_type=model_type)
    trained = build_objective("cross_entropy", captioner, [], ObjectiveConfig())
    assert trained.attention_penalty == (1.0 if model_type == "soft" else 0.0)
    for weight in (0.5, 1.0):
        tuned = build_objective("lrp_tune", captioner, [], ObjectiveConfig(lrp_lambda=weight))
        assert tuned.attention_penalty == 0


def test_a_call_is_the_loss_of_captions_that_it_draws(setting):
    captioner, features, inputs, targets = setting
    start = torch.full((3, 1, 1), captioner.vocabulary.start)
    captions = torch.cat([start, targets[:, :1]], dim=-1)
    loss, figures = CrossEntropy(captioner)(None, features, captions, None)
    expected, _ = CrossEntropy(captioner).loss(features, captions[..., :-1], captions[..., 1:])
    assert torch.equal(loss, expected)
    assert figures["words"] == 13


def test_stop_words_are_nltks():
    assert len(STOP_WORDS) == 179
    assert {"a", "the", "wouldn't", "between"} <= STOP_WORDS
    assert "dog" not in STOP_WORDS
    quiet = quiet_words(random_captioner(words=5).vocabulary)
    assert quiet.tolist() == [True, *[False] * 5, True, True, True]


# -------------------------------------------------------------------------------------------- SCST

REFERENCES = [["w1 w2 w3", "w1 w3 w3 w4"], ["w5 w2"], ["w9 w1 w2 unheard", "w5 w6 w7 w8 w2"]]
CORPUS = [
    ["w1 w2 w3 <end>", "w1 w3 w3 w4 <end>"],
    ["w5 w2 <end>"],
    ["w9 w1 w2 <unk> <end>", "w5 w6 w7 w8 w2 <end>"],
]


@pytest.fixture
def speaker():
    captioner = random_captioner(words=12)
    words = captioner.vocabulary.words
    words[1:13] = [f"w{index}" for index in range(1, 13)]
    captioner.vocabulary = type(captioner.vocabulary)(words)
    without_dropout(captioner)
    captioner.config.max_length = 6
    features = torch.randn(2, 9, captioner.encoder.out_channels, dtype=torch.float64) * 3
    return captioner.train(), features


def slow_reward(vocabulary, token_ids, image, bleu_weight):
    sentence = " ".join(vocabulary.words[token_id] for token_id in token_ids)
    cider = slow_cider_d(sentence, CORPUS[image], CORPUS)
    _, scores = Bleu(4).compute_score({0: CORPUS[image]}, {0: [sentence]}, verbose=0)
    return cider + bleu_weight * scores[3][0]


BASELINES = [("greedy", 0.0), ("others", 0.0), ("greedy", 0.7)]


@pytest.mark.parametrize("baseline, bleu_weight", BASELINES)
def test_scst_by_hand(speaker, baseline, bleu_weight):
    captioner, features = speaker
    vocabulary = captioner.vocabulary
    indices = torch.tensor([2, 0])
    objective = SCST(captioner, REFERENCES, samples=4, baseline=baseline, bleu_weight=bleu_weight)
    torch.manual_seed(8)
    sampled, rewards, _ = objective.draw(features, indices.tolist())
    torch.manual_seed(8)
    loss, figures = objective(None, features, None, indices)
    expected = 0.0
    count = 0
    for row, image in enumerate(indices.tolist()):
        own = [slow_reward(vocabulary, ids, image, bleu_weight) for ids in sampled[row]]
        assert rewards[row].tolist() == pytest.approx(own, abs=1e-5)
        greedy = vocabulary.encode(captioner.decode(features[row : row + 1], "greedy")[0])
        if len(greedy) < 6:
            greedy.append(vocabulary.end)
        for sample, token_ids in enumerate(sampled[row]):
            base = (sum(own) - own[sample]) / 3
            if baseline == "greedy":
                base = slow_reward(vocabulary, greedy, image, bleu_weight)
            inputs = torch.tensor([[[vocabulary.start, *token_ids[:-1]]]])
            logits = captioner(features[row : row + 1], inputs)[0, 0] + captioner.silence
            said = logits.log_softmax(-1)[range(len(token_ids)), token_ids]
            expected -= said.sum() * (own[sample] - base)
            count += len(token_ids)
    torch.testing.assert_close(loss, expected / count, rtol=1e-5, atol=1e-6)
    assert figures["reward"] == pytest.approx(rewards.mean().item())
    assert torch.autograd.grad(loss, captioner.fc.weight)[0].isfinite().all()


def test_samples_end_as_they_should(speaker):
    captioner, features = speaker
    end = captioner.vocabulary.end
    torch.manual_seed(0)
    sampled, _, _ = SCST(captioner, REFERENCES, samples=40).draw(features, [0, 1])
    for token_ids in [*sampled[0], *sampled[1]]:
        ended = token_ids[-1] == end
        assert token_ids.count(end) == ended
        assert ended or len(token_ids) == 6
    assert captioner.training


def next_word_probabilities(captioner, features, last_layer=None):
    inputs = torch.full((1, 1, 1), captioner.vocabulary.start)
    logits = captioner(features, inputs, last_layer=last_layer) + captioner.silence
    return logits.softmax(-1)[0, 0, 0]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_scst_of_lrp_inference_samples_from_the_weighted_logits(speaker, dropout):
    """The first words of many samples follow softmax(p_hat), not softmax(p); without dropout."""
    captioner, features = speaker
    # So that the likeliest token is a word, and has relevance.
    with torch.no_grad():
        captioner.fc.bias += captioner.silence.clamp(min=-1e3)
    inference = LRPInference(captioner)
    p_hat = next_word_probabilities(captioner, features[:1], inference.last_layer)
    p = next_word_probabilities(captioner, features[:1])
    captioner.dropout.p = dropout
    torch.manual_seed(0)
    objective = SCST(captioner, REFERENCES, samples=4000, inference=inference)
    sampled, _, _ = objective.draw(features[:1], [0])
    first = torch.tensor([token_ids[0] for token_ids in sampled[0]])
    frequencies = torch.bincount(first, minlength=len(captioner.vocabulary)) / 4000
    assert (frequencies - p_hat).abs().max() < 0.04
    assert (p - p_hat).abs().max() > 0.04


@pytest.mark.parametrize("baseline", ["greedy", "others"])
def test_scst_raises_the_reward(speaker, baseline):
    """Forty steps on two images: sampled captions come nearer to their references.

    With fewer samples or longer steps it depends on the seed whether they do.
    """
    captioner, features = speaker
    objective = SCST(captioner, REFERENCES, samples=32, baseline=baseline)
    optimizer = torch.optim.Adam(captioner.decoder_parameters(), lr=0.01)
    torch.manual_seed(0)
    rewards = []
    for _ in range(40):
        loss, figures = objective(None, features, None, torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(figures["reward"])
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])


# --------------------------------------------------------------------------- from the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of few scenes, and a captioner of each model_type trained on them."""
    folder = prepared_scenes(tmp_path_factory.mktemp("tune") / "scenes", 24, 6, 6)
    flags = ["--dataset", folder, *SMALL, "--embed_dim", 12, "--hidden_dim", 16]
    flags += ["--epochs", 1, "--pretrain_epochs", 0]
    with pytest.MonkeyPatch.context() as patch:
        for model in MODELS:
            output = folder / f"{model}.pt"
            command(patch, train, *flags, "--model_type", model, "--output", output)
            train.main()
    return folder


def tune(monkeypatch, folder, output, *arguments, model="gridtd"):
    flags = ["--dataset", folder, "--resume", folder / f"{model}.pt", *SMALL]
    command(monkeypatch, train, *flags, "--output", output, *arguments)
    train.main()
    return [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]


TUNINGS = [
    ["--cider_tune", "--samples", 3],
    ["--lrp_tune", "--decoder_lr", 1e-3],
    ["--lrp_cider_tune", "--scst_baseline", "others"],
    ["--lrp_tune", "--lrp_form", "image", "--captions_per_image", 1, "--decoder_lr", 1e-3],
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("flags", TUNINGS)
def test_every_tuning_of_every_captioner(trained, tmp_path, monkeypatch, model, flags):
    before, after = trained / f"{model}.pt", tmp_path / "it.pt"
    rows = tune(monkeypatch, trained, after, *flags, "--max_iterations", 4, model=model)
    assert [row["iterations"] for row in rows] == [0, 3, 4]
    assert ("reward" in rows[1]) == ("CIDEr-D" in rows[1]) == ("cider" in flags[0])
    assert load_captioner(after).config == load_captioner(before).config
    before = read_checkpoint(before)["state_dict"]
    after = read_checkpoint(after)["state_dict"]
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    for name, value in before.items():
        assert torch.equal(value, after[name]) or not name.startswith("encoder.")


def test_the_baseline_without_lrp_is_one_flag_away(trained, tmp_path, monkeypatch):
    """--lrp_lambda 1 is cross-entropy on the same batches, and differs from the other by that."""
    objectives = []
    original = train.build_objective

    def noting(*arguments):
        objectives.append(original(*arguments))
        return objectives[-1]

    monkeypatch.setattr(train, "build_objective", noting)
    flags = ["--lrp_tune", "--max_iterations", 2]
    tune(monkeypatch, trained, tmp_path / "plain.pt", *flags, "--lrp_lambda", 1)
    tune(monkeypatch, trained, tmp_path / "lrp.pt", *flags)
    assert [type(objective) for objective in objectives] == [CrossEntropy, LRPInference]


MISTAKES = [
    ("--lrp_tune --lrp_lambda 2", "--lrp_lambda must be"),
    ("--cider_tune --samples 1 --scst_baseline others", "at least 2"),
    ("--cider_tune --samples 0", "--samples must be"),
    ("--lrp_cider_tune --lrp_lambda 0.1", "--lrp_lambda goes with --lrp_tune only"),
    (
        "--lrp_tune --bleu_weight 1",
        "--bleu_weight goes with --cider_tune or --lrp_cider_tune only",
    ),
    ("--cider_tune --resume nowhere.pt", "there is no checkpoint"),
    ("--lrp_tune --model_type aoa", "is not of --model_type aoa, but gridtd"),
]


@pytest.mark.parametrize("flags, complaint", MISTAKES)
def test_mistakes_are_told_in_one_line(trained, tmp_path, monkeypatch, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        tune(monkeypatch, trained, tmp_path / "it.pt", *flags.split())
    assert not list(tmp_path.iterdir())


def test_a_captioner_of_another_vocabulary_is_refused(trained, tmp_path, monkeypatch):
    other = tmp_path / "other.pt"
    random_captioner().float().save(other)
    with pytest.raises(UserError, match="its vocabulary is another"):
        tune(monkeypatch, trained, tmp_path / "it.pt", "--cider_tune", "--resume", other)


def test_the_references_of_the_reward_are_all_raw_captions(trained):
    dataset = CaptionDataset(trained, "train")
    captioner = load_captioner(trained / "gridtd.pt")
    objective = SCST(captioner, [entry["captions"] for entry in dataset.entries])
    assert len(objective.references) == len(dataset)
    for entry, captions in zip(dataset.entries, objective.references):
        assert len(captions) == len(entry["captions"])
        assert {caption[-1] for caption in captions} == {captioner.vocabulary.end}


BFLOAT16_TUNINGS = [["--cider_tune"], ["--lrp_tune", "--decoder_lr", 1e-3], ["--lrp_cider_tune"]]


@pytest.mark.parametrize("flags", BFLOAT16_TUNINGS)
def test_tuning_in_bfloat16(trained, tmp_path, monkeypatch, flags):
    output = tmp_path / "it.pt"
    rows = tune(monkeypatch, trained, output, *flags, "--max_iterations", 2, "--bfloat16")
    for name, value in read_checkpoint(output)["state_dict"].items():
        assert value.dtype == torch.float32 or "num_batches" in name
    assert rows[-1]["loss"] == rows[-1]["loss"]


def test_a_share_of_the_start_is_kept_also_when_resumed(trained, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    flags = ["--lrp_tune", "--decoder_lr", 1e-2, "--start_share", 0.25, "--ema_decay", 0.5]
    tune(monkeypatch, trained, whole, *flags, "--max_iterations", 6)
    tune(monkeypatch, trained, parts, *flags, "--max_iterations", 3)  # an epoch
    resumed = ["--max_iterations", 6, "--resume", tmp_path / "parts.last.pt"]
    tune(monkeypatch, trained, parts, *flags, *resumed)
    average = read_checkpoint(tmp_path / "whole.last.pt")["training"]["average"]["average"]
    whole = read_checkpoint(whole)["state_dict"]
    parts = read_checkpoint(parts)["state_dict"]
    start = read_checkpoint(trained / "gridtd.pt")["state_dict"]
    for name, value in whole.items():
        assert torch.equal(value, parts[name])
    expected = 0.75 * average["fc.weight"] + 0.25 * start["fc.weight"]
    torch.testing.assert_close(whole["fc.weight"], expected)
    assert not torch.allclose(average["fc.weight"], start["fc.weight"])
