"""How to add a method, and how to add a captioner: each is done here, in under 25 lines."""

from contextlib import nullcontext

import torch
from helpers import random_captioner
from torch import nn

from basemodel import Captioner, Memory, StepOutput, lstm_cell
from captioner import METHODS, MODELS, load_captioner
from explanation import Method, explain_batch, methods_of
from gradient_utils import enlarge, input_x_gradient
from lrp_utils import LRP, TRUE_GRADIENT, AlphaOneBetaZero, TrueGradient
from objectives import CrossEntropy, LRPInference

# ------------------------------------------------------------------------------------- a method


def attention_x_gradient(leaves, gradients, attention, grid):
    """Attention weighted by its gradient, positive parts only (Chefer et al. 2021, eq. 5)."""
    weights = torch.stack(leaves["attention"], dim=1).squeeze(2)  # (B, T, heads, L)
    slopes = torch.stack(gradients["attention"], dim=2).squeeze(3)  # (K, B, T, heads, L)
    regions = (weights * slopes).clamp(min=0).mean(3).sum(2)  # (K, B, L)
    return {
        "image_relevance": enlarge(regions, grid, leaves["image"]),
        "region_relevance": regions,
        "word_relevance": gradients["words"].sum(-1),
        "attention_gradient": slopes.mean((3, 4)),
    }


ATTENTION_X_GRADIENT = Method(
    TrueGradient, nullcontext, attention_x_gradient, pixels=False, leaves=("attention",)
)


def test_a_method_is_added_as_a_row_of_the_table(monkeypatch):
    monkeypatch.setitem(METHODS, "attention_x_gradient", ATTENTION_X_GRADIENT)
    images = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    captions = [["w1", "w2", "w3"], ["w4"]]
    for model_type in MODELS:
        captioner = random_captioner(model_type=model_type)
        first, second = captioner.explain(images, captions, "attention_x_gradient")
        gradient, _ = captioner.explain(images, captions, "gradient")
        assert first.image_relevance.shape == (3, 128, 128)
        assert first.region_relevance.min() >= 0 and first.region_relevance.any()
        assert second.words == ["w4"] and second.region_relevance.shape == (1, 64)
        torch.testing.assert_close(first.word_relevance, gradient.word_relevance)
        # The first word cannot depend on the attention of the later steps.
        assert first.extra["attention_gradient"].shape == (3, 3)
        assert not first.extra["attention_gradient"].triu(1).any()


# ---------------------------------------------------------------------------------- a captioner


class MeanCaptioner(Captioner):
    """An LSTM that sees the mean region at every step; no attention, and one addend."""

    def __init__(self, config, vocabulary, encoder):
        super().__init__(config, vocabulary, encoder)
        self.gates = nn.Linear(config.embed_dim + 2 * config.hidden_dim, 4 * config.hidden_dim)

    def image_memory(self, features, rules=TRUE_GRADIENT):
        regions = torch.relu(rules.epsilon(self.image_projection(features)))
        return Memory({"regions": regions, "mean": rules.epsilon(regions.mean(1, keepdim=True))})

    def initial_state(self, memory, captions=1):
        return (self.zeros(memory, captions),) * 2

    def word_inputs(self, embeddings, memory):
        return embeddings

    def step(self, word_input, state, memory, rules=TRUE_GRADIENT):
        mean = memory["mean"].expand(-1, word_input.shape[1], -1)
        gates = self.gates(torch.cat([word_input, mean, state[0]], -1))
        cell, squashed, output_gate = lstm_cell(gates, state[1], rules)
        attention = mean.new_ones(*mean.shape[:2], 1, memory["regions"].shape[1])
        hidden = output_gate * squashed
        return StepOutput((hidden,), (hidden, cell), attention / attention.shape[-1], None)


def test_a_captioner_is_added_as_a_class_in_the_table(monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "mean", MeanCaptioner)
    captioner = random_captioner(model_type="mean")
    images = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    captions = captioner.caption(images, max_length=4)
    for method in methods_of(captioner):
        found = captioner.explain(images, [["w1", "w2"], ["w3"]], method)
        assert found[0].image_relevance.shape == (2, 128, 128)
    captioner.save(tmp_path / "mean.pt")
    assert load_captioner(tmp_path / "mean.pt").double().caption(images, max_length=4) == captions


def test_the_added_captioner_conserves_relevance(monkeypatch):
    monkeypatch.setitem(MODELS, "mean", MeanCaptioner)
    captioner = random_captioner(model_type="mean")
    for name, parameter in captioner.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
    method = Method(lambda: LRP(epsilon=0), AlphaOneBetaZero, input_x_gradient)
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    (found,) = explain_batch(captioner, images, [[3, 7, 12]], method)
    total = found.region_relevance.sum(1) + found.word_relevance.sum(1)
    torch.testing.assert_close(total, found.scores, rtol=1e-6, atol=1e-9)


def test_the_added_captioner_is_trained_by_the_objectives(monkeypatch):
    monkeypatch.setitem(MODELS, "mean", MeanCaptioner)
    captioner = random_captioner(model_type="mean").train()
    features = torch.rand(2, 9, 256, dtype=torch.float64)
    start, end = captioner.vocabulary.start, captioner.vocabulary.end
    captions = torch.tensor([[[start, 3, 7, end]] * 5, [[start, 4, end, 0]] * 5])
    for objective in (CrossEntropy(captioner), LRPInference(captioner)):
        captioner.zero_grad()
        loss, _ = objective(None, features, captions, None)
        loss.backward()
        assert captioner.gates.weight.grad.any()
