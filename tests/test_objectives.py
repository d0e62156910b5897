"""Objectives: LRP-inference's weights against the definition with a (V, H) matrix of relevances, its losses by hand, and SCST's
reward, baseline and gradient by hand."""

import json
import sys

import pytest
import torch
from fixtures import prepared_scenes
from helpers import random_captioner
from oracle_metrics import slow_cider_d

import train
from basemodel import DROPOUTS, read_checkpoint
from captiondata import CaptionDataset
from captioner import METHODS, MODELS, load_captioner
from commandline import UserError
from explanation import propagate
from lrp_utils import EPSILON, inference_weights
from objectives import SCST, CrossEntropy, ImageLRPInference, LRPInference, quiet_words
from vocabulary import STOP_WORDS

SMALL = ["--workers", "0", "--device", "cpu"]


def without_dropout(captioner):
    for name in DROPOUTS:
        getattr(captioner, name).p = 0.0


def stabilised(z):
    return z + EPSILON * (1.0 if z >= 0 else -1.0)


def slow_weights(context, hidden, fc, word):
    """omega_c and omega_h of one word by the definition: relevance of the logit to every (word, unit), then to every unit of the
    sum, then to its two parts, each by the epsilon-rule; all words but the predicted one carry none."""
    total = context + hidden
    logits = fc.weight @ total + fc.bias
    carried = [logits[v].item() if v == word else 0.0 for v in range(len(logits))]
    shares = torch.tensor([[fc.weight[v, i].item() * total[i].item() * carried[v] / stabilised(logits[v].item())
                            for i in range(len(total))] for v in range(len(logits))], dtype=torch.float64)  # fmt: skip
    R_total = shares.sum(0)
    omegas = []
    for part in (context, hidden):
        R = torch.tensor(
            [
                part[i].item() * R_total[i].item() / stabilised(total[i].item())
                for i in range(len(total))
            ],
            dtype=torch.float64,
        )
        omegas.append(1 + R / R.abs().max() if R.abs().max() > 0 else torch.ones_like(R))
    return omegas


def parts_of(captioner, features, inputs):
    return captioner.unroll(captioner.embedding(inputs), captioner.image_memory(features)).addends


@pytest.fixture(params=MODELS)
def setting(request):
    """A random captioner in float64, features of 3 images, inputs and targets (3, 2, 5) with padding."""
    captioner = random_captioner(words=20, model_type=request.param).train()
    without_dropout(captioner)
    words = captioner.vocabulary.words
    words[1], words[2], words[3], words[4] = (
        "a",
        "the",
        "on",
        "of",
    )  # some stop words, and likely ones
    with torch.no_grad():
        captioner.fc.weight[1:5] *= 2
    features = torch.randn(3, 9, captioner.encoder.out_channels, dtype=torch.float64) * 3
    inputs, targets = torch.randint(1, 21, (3, 2, 5)), torch.randint(1, 21, (3, 2, 5))
    targets[0, 0, 3:] = 0
    return captioner, features, inputs, targets


def test_the_weights_equal_their_definition(setting):
    captioner, features, inputs, _ = setting
    context, hidden = (
        part.flatten(0, 2).detach() for part in parts_of(captioner, features, inputs)
    )
    logits = captioner.fc(context + hidden)
    scores, words = logits.max(-1)
    found = inference_weights((context, hidden), captioner.fc.weight[words], scores)
    for row in range(len(words)):
        for omega, expected in zip(
            found, slow_weights(context[row], hidden[row], captioner.fc, words[row])
        ):
            torch.testing.assert_close(omega[row], expected, rtol=0, atol=1e-9)
            assert 0 <= omega[row].min() and omega[row].max() <= 2


def test_nothing_arrives_nothing_is_weighted():
    zero = torch.zeros(1, 4, dtype=torch.float64)
    for omega in inference_weights(
        (zero, zero), torch.randn(1, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    ):
        assert torch.equal(omega, torch.ones_like(omega))


def slow_lrp_loss(captioner, features, inputs, targets, share):
    """lambda CE(p) + (1 - lambda) CE(p_hat), word by word; its gradient takes the weights as constants."""
    contexts, hiddens = parts_of(captioner, features, inputs)
    total, count = 0.0, 0
    for index in (targets != 0).nonzero().tolist():
        context, hidden, target = (
            contexts[tuple(index)],
            hiddens[tuple(index)],
            targets[tuple(index)],
        )
        p = captioner.fc(context + hidden)
        word = p.argmax().item()
        weight_c, weight_h = slow_weights(context.detach(), hidden.detach(), captioner.fc, word)
        name = captioner.vocabulary.words[word]
        p_hat = (
            p
            if name in STOP_WORDS or name.startswith("<")
            else captioner.fc(weight_c * context + weight_h * hidden)
        )
        total = (
            total - share * p.log_softmax(-1)[target] - (1 - share) * p_hat.log_softmax(-1)[target]
        )
        count += 1
    return total / count


@pytest.mark.parametrize("share", (0.5, 0.0))
def test_lrp_inference_loss_and_gradient_by_hand(setting, share):
    captioner, features, inputs, targets = setting
    objective = LRPInference(captioner, share=share)
    objective.words = lambda captions: (inputs, targets)
    loss, _ = objective(None, features, None, None)
    expected = slow_lrp_loss(captioner, features, inputs, targets, share)
    parameters = captioner.decoder_parameters()
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(
        *(torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected))
    ):
        assert (found is None) == (wanted is None) and (
            found is None or torch.allclose(found, wanted, atol=1e-10)
        )


def test_without_lrp_it_is_cross_entropy(setting):
    captioner, features, inputs, targets = setting
    losses = []
    for objective in (LRPInference(captioner, share=1.0), CrossEntropy(captioner)):
        objective.words = lambda captions: (inputs, targets)
        losses.append(objective(None, features, None, None)[0])
    torch.testing.assert_close(*losses)


def test_the_weighted_last_layer_is_that_of_the_loss(setting):
    captioner, features, inputs, _ = setting
    objective = LRPInference(captioner)
    context, hidden = parts_of(captioner, features, inputs)
    p_hat = objective.last_layer((context, hidden))
    logits = captioner.fc(context + hidden)
    quiet = quiet_words(captioner.vocabulary)[logits.argmax(-1)]
    assert quiet.any() and not quiet.all()
    assert torch.allclose(p_hat[quiet], logits[quiet]) and not torch.allclose(
        p_hat[~quiet], logits[~quiet]
    )


@pytest.mark.parametrize("model_type", MODELS)
def test_image_weights_by_hand(model_type):
    """m = 1 + mean(E) of the predicted word's own LRP map, one word at a time; the logit of that word alone is multiplied."""
    captioner = random_captioner(words=20, model_type=model_type).train()
    without_dropout(captioner)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    inputs = torch.cat(
        [torch.full((2, 2, 1), captioner.vocabulary.start), torch.randint(1, 21, (2, 2, 2))], dim=-1
    )
    targets = torch.randint(1, 21, (2, 2, 3))
    targets[1, 1, 2] = 0
    objective = ImageLRPInference(captioner, share=0.3)
    objective.words = lambda captions: (inputs, targets)
    features = captioner.encoder.eval()(images)
    loss, _ = objective(images, features, None, None)
    logits = captioner(features, inputs)
    expected = 0.0
    for image, caption, word in (targets != 0).nonzero().tolist():
        p = logits[image, caption, word]
        said = p.argmax().item()
        row = torch.cat([inputs[image, caption, 1 : word + 1], torch.tensor([said])])[None]
        start = torch.full((1, 1), captioner.vocabulary.start)
        found = propagate(
            captioner,
            images[image : image + 1],
            torch.cat([start, row[:, :-1]], 1),
            row,
            torch.tensor([[word]]),
            METHODS["lrp"],
        )
        heat = found["image_relevance"][0, 0]
        p_hat = p.clone()
        p_hat[said] = p[said] * (1 + (heat / heat.abs().max()).mean())
        target = targets[image, caption, word]
        expected -= 0.3 * p.log_softmax(-1)[target] + 0.7 * p_hat.log_softmax(-1)[target]
    torch.testing.assert_close(loss, expected / (targets != 0).sum())


def test_image_weights_stay_float32_where_training_is_bfloat16():
    captioner = random_captioner(words=20).float().train()
    objective, images = ImageLRPInference(captioner), torch.randn(2, 3, 16, 16)
    inputs, words, wanted = (
        torch.full((2, 1, 3), captioner.vocabulary.start),
        torch.randint(1, 21, (2, 1, 3)),
        torch.ones(2, 1, 3, dtype=torch.bool),
    )
    weights = objective.image_weights(images, inputs, words, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective.image_weights(images, inputs, words, wanted), weights)


# ---------------------------------------------------------------------------------------------------------------- SCST

REFERENCES = [["w1 w2 w3", "w1 w3 w3 w4"], ["w5 w2"], ["w9 w1 w2 unheard", "w5 w6 w7 w8 w2"]]


@pytest.fixture
def speaker():
    captioner = random_captioner(words=12)
    for index in range(1, 13):
        captioner.vocabulary.words[index] = f"w{index}"
    captioner.vocabulary = type(captioner.vocabulary)(captioner.vocabulary.words)
    without_dropout(captioner)
    captioner.config.max_length = 6
    return captioner.train(), torch.randn(
        2, 9, captioner.encoder.out_channels, dtype=torch.float64
    ) * 3


def sentence(ids, vocabulary):
    return " ".join(vocabulary.words[word] for word in ids)


@pytest.mark.parametrize(
    "baseline, bleu_weight", (("greedy", 0.0), ("others", 0.0), ("greedy", 0.7))
)
def test_scst_by_hand(speaker, baseline, bleu_weight):
    from pycocoevalcap.bleu.bleu import Bleu

    captioner, features = speaker
    vocabulary, indices = captioner.vocabulary, torch.tensor([2, 0])
    objective = SCST(captioner, REFERENCES, samples=4, baseline=baseline, bleu_weight=bleu_weight)
    torch.manual_seed(8)
    sampled, rewards, beaten = objective.draw(features, indices.tolist())
    torch.manual_seed(8)
    loss, figures = objective(None, features, None, indices)
    corpus = [[f"{raw.replace('unheard', '<unk>')} <end>" for raw in image] for image in REFERENCES]

    def reward(words, image):
        value = slow_cider_d(sentence(words, vocabulary), corpus[image], corpus)
        return (
            value
            + bleu_weight
            * Bleu(4).compute_score(
                {0: corpus[image]}, {0: [sentence(words, vocabulary)]}, verbose=0
            )[1][3][0]
        )

    expected, count = 0.0, 0
    for row, image in enumerate(indices.tolist()):
        own = [reward(words, image) for words in sampled[row]]
        assert rewards[row].tolist() == pytest.approx(own, abs=1e-5)
        greedy_words = captioner.decode(features[row : row + 1], "greedy")[0]
        ids = vocabulary.encode(greedy_words) + [vocabulary.end] * (len(greedy_words) < 6)
        for place, words in enumerate(sampled[row]):
            base = reward(ids, image) if baseline == "greedy" else (sum(own) - own[place]) / 3
            inputs = torch.tensor([[[vocabulary.start, *words[:-1]]]])
            logits = captioner(features[row : row + 1], inputs)[0, 0] + captioner.silence
            expected -= logits.log_softmax(-1)[range(len(words)), words].sum() * (own[place] - base)
            count += len(words)
    torch.testing.assert_close(loss, expected / count, rtol=1e-5, atol=1e-6)
    assert figures["reward"] == pytest.approx(rewards.mean().item())
    assert torch.autograd.grad(loss, captioner.fc.weight)[0].isfinite().all()


def test_samples_end_as_they_should(speaker):
    captioner, features = speaker
    torch.manual_seed(0)
    sampled, _, _ = SCST(captioner, REFERENCES, samples=40).draw(features, [0, 1])
    for words in (words for image in sampled for words in image):
        assert words.count(captioner.vocabulary.end) == (
            words[-1] == captioner.vocabulary.end
        ) and (len(words) == 6 or words[-1] == captioner.vocabulary.end)
    assert captioner.training


def test_scst_of_lrp_inference_samples_from_the_weighted_logits(speaker):
    """The first words of many samples follow softmax(p_hat), not softmax(p)."""
    captioner, features = speaker
    with torch.no_grad():
        captioner.fc.bias += captioner.silence.clamp(
            min=-1e3
        )  # so that the likeliest is a word, and has relevance
    inference = LRPInference(captioner)
    torch.manual_seed(0)
    sampled, _, _ = SCST(captioner, REFERENCES, samples=4000, inference=inference).draw(
        features[:1], [0]
    )
    counts = (
        torch.bincount(
            torch.tensor([words[0] for words in sampled[0]]), minlength=len(captioner.vocabulary)
        )
        / 4000
    )
    inputs = torch.full((1, 1, 1), captioner.vocabulary.start)
    p_hat, p = (
        (
            (captioner(features[:1], inputs, last_layer=layer) + captioner.silence).softmax(-1)[
                0, 0, 0
            ]
        )
        for layer in (inference.last_layer, None)
    )
    assert (counts - p_hat).abs().max() < 0.04 < (p - p_hat).abs().max()


def test_scst_raises_the_reward(speaker):
    """Thirty steps on two images: sampled captions come nearer to their references."""
    captioner, features = speaker
    objective = SCST(captioner, REFERENCES, samples=8)
    optimizer = torch.optim.Adam(captioner.decoder_parameters(), lr=0.02)
    torch.manual_seed(0)
    rewards = []
    for _ in range(30):
        loss, figures = objective(None, features, None, torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(figures["reward"])
    assert sum(rewards[-5:]) > 1.3 * sum(rewards[:5])


# ------------------------------------------------------------------------------------------------------ from the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of few scenes, and a captioner trained on them by cross-entropy for each model_type."""
    folder = prepared_scenes(tmp_path_factory.mktemp("tune") / "scenes", 24, 6, 6)
    with pytest.MonkeyPatch.context() as patch:
        for model in MODELS:
            sizes = [
                "--embed_dim",
                "12",
                "--hidden_dim",
                "16",
                "--batch_size",
                "8",
                "--epochs",
                "1",
                "--pretrain_epochs",
                "0",
            ]
            patch.setattr(
                sys,
                "argv",
                [
                    "train.py",
                    "--dataset",
                    str(folder),
                    "--model_type",
                    model,
                    *sizes,
                    *SMALL,
                    "--output",
                    str(folder / f"{model}.pt"),
                ],
            )
            train.main()
    return folder


def tune(monkeypatch, folder, output, *arguments, model="gridtd"):
    flags = [
        "--dataset",
        folder,
        "--resume",
        folder / f"{model}.pt",
        "--batch_size",
        8,
        *SMALL,
        "--output",
        output,
        *arguments,
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    train.main()
    return [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("flags", [
    ["--cider_tune", "--samples", 3], ["--lrp_tune", "--decoder_lr", 1e-3], ["--lrp_cider_tune", "--scst_baseline", "others"],
    ["--lrp_tune", "--lrp_form", "image", "--captions_per_image", 1, "--decoder_lr", 1e-3],
])  # fmt: skip
def test_every_tuning_of_every_captioner(trained, tmp_path, monkeypatch, model, flags):
    rows = tune(
        monkeypatch, trained, tmp_path / "it.pt", *flags, "--max_iterations", 4, model=model
    )
    assert [row["iterations"] for row in rows] == [0, 3, 4]
    assert ("reward" in rows[1]) == ("CIDEr-D" in rows[1]) == ("cider" in flags[0])
    before, after = (
        read_checkpoint(path)["state_dict"]
        for path in (trained / f"{model}.pt", tmp_path / "it.pt")
    )
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("encoder."))
    assert (
        load_captioner(tmp_path / "it.pt").config == load_captioner(trained / f"{model}.pt").config
    )


def test_the_baseline_without_lrp_is_one_flag_away(trained, tmp_path, monkeypatch):
    """--lrp_lambda 1 is cross-entropy on the same batches, and differs from LRP-inference by that alone."""
    objectives = []
    original = train.build_objective
    monkeypatch.setattr(
        train,
        "build_objective",
        lambda *arguments: objectives.append(original(*arguments)) or objectives[-1],
    )
    tune(
        monkeypatch,
        trained,
        tmp_path / "plain.pt",
        "--lrp_tune",
        "--lrp_lambda",
        1,
        "--max_iterations",
        2,
    )
    tune(monkeypatch, trained, tmp_path / "lrp.pt", "--lrp_tune", "--max_iterations", 2)
    assert [type(objective) for objective in objectives] == [CrossEntropy, LRPInference]


@pytest.mark.parametrize("flags, told", [
    (["--lrp_tune", "--lrp_lambda", 2], "--lrp_lambda must be"), (["--cider_tune", "--samples", 1, "--scst_baseline", "others"], "at least 2"),
    (["--cider_tune", "--samples", 0], "--samples must be"), (["--lrp_cider_tune", "--lrp_lambda", 0.1], "--lrp_lambda goes with --lrp_tune only"),
    (["--lrp_tune", "--bleu_weight", 1], "--bleu_weight goes with --cider_tune or --lrp_cider_tune only"), (["--cider_tune", "--resume", "nowhere.pt"], "there is no checkpoint"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(trained, tmp_path, monkeypatch, flags, told):
    with pytest.raises(UserError, match=told):
        tune(monkeypatch, trained, tmp_path / "it.pt", *flags)
    assert not list(tmp_path.iterdir())


def test_a_captioner_of_another_vocabulary_is_refused(trained, tmp_path, monkeypatch):
    random_captioner().float().save(tmp_path / "other.pt")
    with pytest.raises(UserError, match="its vocabulary is another"):
        tune(
            monkeypatch,
            trained,
            tmp_path / "it.pt",
            "--cider_tune",
            "--resume",
            tmp_path / "other.pt",
        )


def test_the_references_of_the_reward_are_all_raw_captions(trained):
    dataset, captioner = CaptionDataset(trained, "train"), load_captioner(trained / "gridtd.pt")
    objective = SCST(captioner, [entry["captions"] for entry in dataset.entries])
    assert len(objective.references) == len(dataset) and all(
        caption[-1] == captioner.vocabulary.end
        for image in objective.references
        for caption in image
    )


def test_stop_words_are_nltks():
    assert (
        len(STOP_WORDS) == 179
        and {"a", "the", "wouldn't", "between"} <= STOP_WORDS
        and "dog" not in STOP_WORDS
    )
    quiet = quiet_words(random_captioner(words=5).vocabulary)
    assert quiet.tolist() == [True, *[False] * 5, True, True, True]


def test_cross_entropy_is_the_mean_over_words_that_are_not_padding(setting):
    """Captions of very different lengths, so that packing and the shrinking batch of a stepped captioner are at work."""
    captioner, features, inputs, targets = setting
    targets[0, 1, 2:], targets[1, 0, 1:], targets[2, 1, 4:] = 0, 0, 0
    objective = CrossEntropy(captioner)
    objective.words = lambda captions: (inputs, targets)
    loss, figures = objective(None, features, None, None)
    logits = captioner(features, inputs)
    losses = [
        -logits[tuple(at)].log_softmax(-1)[targets[tuple(at)]]
        for at in (targets != 0).nonzero().tolist()
    ]
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert figures["words"] == len(losses)
    gradients = (
        torch.autograd.grad(value, captioner.decoder_parameters(), allow_unused=True)
        for value in (loss, torch.stack(losses).mean())
    )
    for found, wanted in zip(*gradients):
        assert (found is None) == (wanted is None) and (
            found is None or torch.allclose(found, wanted, atol=1e-12)
        )


@pytest.mark.parametrize(
    "flags", [["--cider_tune"], ["--lrp_tune", "--decoder_lr", 1e-3], ["--lrp_cider_tune"]]
)
def test_tuning_in_bfloat16(trained, tmp_path, monkeypatch, flags):
    rows = tune(
        monkeypatch, trained, tmp_path / "it.pt", *flags, "--max_iterations", 2, "--bfloat16"
    )
    assert all(
        value.dtype == torch.float32
        for key, value in read_checkpoint(tmp_path / "it.pt")["state_dict"].items()
        if "num_batches" not in key
    )
    assert rows[-1]["loss"] == rows[-1]["loss"]


def test_a_share_of_the_start_is_kept_also_when_resumed(trained, tmp_path, monkeypatch):
    flags = ["--lrp_tune", "--decoder_lr", 1e-2, "--start_share", 0.25, "--ema_decay", 0.5]
    tune(monkeypatch, trained, tmp_path / "whole.pt", *flags, "--max_iterations", 6)
    tune(monkeypatch, trained, tmp_path / "parts.pt", *flags, "--max_iterations", 3)  # an epoch
    tune(
        monkeypatch,
        trained,
        tmp_path / "parts.pt",
        *flags,
        "--max_iterations",
        6,
        "--resume",
        tmp_path / "parts.last.pt",
    )
    whole, parts, start = (
        read_checkpoint(path)["state_dict"]
        for path in (tmp_path / "whole.pt", tmp_path / "parts.pt", trained / "gridtd.pt")
    )
    average = read_checkpoint(tmp_path / "whole.last.pt")["training"]["average"]["average"]
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    torch.testing.assert_close(
        whole["fc.weight"], 0.75 * average["fc.weight"] + 0.25 * start["fc.weight"]
    )
    assert not torch.allclose(average["fc.weight"], start["fc.weight"])
