"""The captioners with adaptive attention: the adaptive captioner of Lu et al. (2017), and grid-TD, which adds a language
LSTM on top (paper §3.1, Figure 2).

The shapes: B images, N captions (or beams) of each, L regions of D channels, E embedding and H hidden units. The parts of
the LSTM inputs that do not wait for the previous step - words, image - are projected once, outside the loop over steps.
"""

import torch
import torch.nn.functional as F
from torch import nn

from captioner import Captioner, StepWeight, lstm_cell, run_lstm, widened
from lrp_utils import TrueGradient


class AdaptiveAttention(Captioner):
    """What both share: the global feature, the visual sentinel of an LSTM, and attention to regions and sentinel."""

    def __init__(self, config, vocabulary, encoder, input_dim):
        super().__init__(config, vocabulary, encoder)
        hidden = config.hidden_dim
        self.global_projection = nn.Linear(encoder.out_channels, config.embed_dim)
        self.sentinel_input = nn.Linear(input_dim, hidden)
        self.sentinel_hidden = nn.Linear(hidden, hidden)
        self.attention_visual = nn.Linear(hidden, hidden)
        self.attention_hidden = nn.Linear(hidden, hidden, bias=False)
        self.attention_sentinel = nn.Linear(hidden, hidden)
        self.attention_score = nn.Linear(hidden, 1, bias=False)

    def _see(self, features, rules):
        """features (B, L, D) -> regions V (B, L, H), twice their part of eq. 2 (B, L, H), and the global feature v_g (B, E)."""
        regions = torch.relu(rules.epsilon(self.image_projection(features)))
        mask = self.encoder.region_mask(features)
        mean = rules.epsilon(self.mean_region(features, mask))
        global_feature = torch.relu(rules.epsilon(self.global_projection(mean)))
        return {
            "regions": regions,
            "mask": mask,
            "keys": 2 * self.attention_visual(regions),
        }, global_feature

    def _gate_weights(self, weight_ih, weight_hh, bias):
        """The LSTM's and the sentinel gate's weights as one: over its input (5H, input), over h (5H, H), biases (5H)."""
        weight_input = torch.cat([weight_ih, self.sentinel_input.weight])
        weight_hidden = torch.cat([weight_hh, self.sentinel_hidden.weight])
        return (
            weight_input,
            weight_hidden,
            torch.cat([bias, self.sentinel_input.bias + self.sentinel_hidden.bias]),
        )

    def _sentinel_lstm(self, gates, cell, rules):
        """gates (B, N, 5H) -> h, the cell, and the sentinel s = sigma(...) * tanh(cell) (eq. 1), (B, N, H) each."""
        gates, sentinel_gate = gates.split(
            [4 * self.config.hidden_dim, self.config.hidden_dim], dim=-1
        )
        cell, squashed, output_gate = lstm_cell(gates, cell, rules)
        return output_gate * squashed, cell, rules.constant(torch.sigmoid(sentinel_gate)) * squashed

    def _attend(self, hidden, sentinel, memory, rules):
        """Adaptive attention (eqs. 2-7): h1, s (B, N, H) -> c_hat (B, N, H), alpha (B, N, L), beta (B, N, 1).

        tanh(x) = 2 sigmoid(2x) - 1, and a CPU takes the sigmoid six times faster; the -1 is the same for all scores, which no
        softmax notices."""
        query = 2 * self.attention_hidden(hidden)
        keys = (
            memory["keys"].unsqueeze(1) + query.unsqueeze(2)
        ).sigmoid_()  # (B, N, L, H); in place, for it is the largest
        scores = 2 * self.attention_score(keys).squeeze(-1)
        if memory["mask"] is not None:
            scores = scores.masked_fill(~memory["mask"].unsqueeze(1), -torch.inf)
        sentinel_score = 2 * self.attention_score(
            torch.sigmoid(2 * self.attention_sentinel(sentinel) + query)
        )
        alpha = scores.softmax(dim=-1)
        beta = torch.cat([scores, sentinel_score], dim=-1).softmax(dim=-1)[..., -1:]
        alpha, beta = rules.constant(alpha), rules.constant(beta)
        context = rules.epsilon(alpha @ memory["regions"])
        return rules.epsilon((1 - beta) * context + beta * sentinel), alpha, beta

    def word_inputs(self, embeddings, memory):
        """The words' part of the pre-activations of LSTM and sentinel gate: (..., E) -> (..., 5H)."""
        return F.linear(embeddings, memory["weights"]["word"])


class AdaptiveCaptioner(AdaptiveAttention):
    """Adaptive attention; x_t = [word; v_g], logits = fc(c_hat + h_t)."""

    def __init__(self, config, vocabulary, encoder):
        super().__init__(config, vocabulary, encoder, input_dim=2 * config.embed_dim)
        self.lstm = nn.LSTM(2 * config.embed_dim, config.hidden_dim, batch_first=True)

    def look(self, features, rules=TrueGradient):
        """What every step needs of the image, computed once: features (B, L, D) -> dict of tensors."""
        memory, global_feature = self._see(features, rules)
        bias = self.lstm.bias_ih_l0 + self.lstm.bias_hh_l0
        weight, recurrent, bias = self._gate_weights(
            self.lstm.weight_ih_l0, self.lstm.weight_hh_l0, bias
        )
        word_weight, image_weight = weight.split(self.config.embed_dim, dim=1)
        image_gates = F.linear(global_feature, image_weight, bias).unsqueeze(1)
        weights = {"word": word_weight, "recurrent": recurrent}
        return {**memory, "global": global_feature, "image_gates": image_gates, "weights": weights}

    def start(self, memory, captions=1):
        """The state (h, m) before the first word: zeros (B, N, H) each."""
        return (self.zeros(memory, captions),) * 2

    def step(self, word_input, state, memory, rules=TrueGradient):
        """One word further: word_input (B, N, 5H) -> c_hat, h (B, N, H), the new state, alpha (B, N, 1, L), beta (B, N)."""
        hidden, cell = state
        gates = (
            word_input + memory["image_gates"] + F.linear(hidden, memory["weights"]["recurrent"])
        )
        hidden, cell, sentinel = self._sentinel_lstm(gates, cell, rules)
        context, alpha, beta = self._attend(hidden, sentinel, memory, rules)
        return context, hidden, (hidden, cell), alpha.unsqueeze(-2), beta.squeeze(-1)

    def unroll(self, embeddings, memory, rules=TrueGradient, lengths=None):
        """As Captioner.unroll. Nothing of the attention goes back into the LSTM, so all steps of a caption can be taken at once; tanh
        of the cell, which nn.LSTM keeps to itself, is h over the output gate."""
        if not self.all_at_once(rules):
            return super().unroll(embeddings, memory, rules, lengths)
        batch, captions, steps, _ = embeddings.shape
        image = memory["global"].reshape(batch, 1, 1, -1).expand(-1, captions, steps, -1)
        hidden = run_lstm(
            self.lstm, torch.cat([embeddings, image], dim=-1).flatten(0, 1), lengths
        )  # (B*N, T, H)
        before = F.pad(hidden[:, :-1], (0, 0, 1, 0))
        hidden, before = (part.unflatten(0, (batch, captions)) for part in (hidden, before))
        gates = (
            self.word_inputs(embeddings, memory)
            + memory["image_gates"].unsqueeze(1)
            + F.linear(before, memory["weights"]["recurrent"])
        )
        output_gate, sentinel_gate = torch.sigmoid(gates[..., -2 * self.config.hidden_dim :]).chunk(
            2, dim=-1
        )
        sentinel = sentinel_gate * hidden / output_gate
        longest = [steps] * captions if lengths is None else lengths.amax(dim=0).tolist()
        attended = [
            self._attend(hidden[:, n, :length], sentinel[:, n, :length], memory, rules)
            for n, length in enumerate(longest)
        ]
        context, alpha, beta = (
            torch.stack(widened(parts, steps), dim=1) for parts in zip(*attended)
        )
        return context, hidden, alpha.unsqueeze(-2), beta.squeeze(-1)


class GridTDCaptioner(AdaptiveAttention):
    """Grid-TD attention; x1_t = [h2_{t-1}; v_g; word], x2_t = [c_hat; h1_t], logits = fc(c_hat + h2_t)."""

    def __init__(self, config, vocabulary, encoder):
        embed, hidden = config.embed_dim, config.hidden_dim
        super().__init__(config, vocabulary, encoder, input_dim=hidden + 2 * embed)
        self.attention_lstm = nn.LSTMCell(hidden + 2 * embed, hidden)
        self.language_lstm = nn.LSTMCell(2 * hidden, hidden)

    def look(self, features, rules=TrueGradient):
        """What every step needs of the image, computed once: features (B, L, D) -> dict of tensors.

        regions and keys (B, L, H), image_gates (B, 1, 5H) the global feature's and the biases' part of the attention LSTM's
        pre-activations, and the weights joined over [h2; h1] and [c_hat; h1; h2].
        """
        memory, global_feature = self._see(features, rules)
        top, language = self.attention_lstm, self.language_lstm
        weight, recurrent, bias = self._gate_weights(
            top.weight_ih, top.weight_hh, top.bias_ih + top.bias_hh
        )
        language_weight, image_weight, word_weight = weight.split(
            [self.config.hidden_dim] + [self.config.embed_dim] * 2, dim=1
        )
        return {
            **memory,
            "image_gates": F.linear(global_feature, image_weight, bias).unsqueeze(1),
            "weights": {
                "word": word_weight,
                "attention": StepWeight(
                    torch.cat([language_weight, recurrent], dim=1), self.training
                ),
                "language": StepWeight(
                    torch.cat([language.weight_ih, language.weight_hh], dim=1), self.training
                ),
                "language_bias": language.bias_ih + language.bias_hh,
            },
        }

    def start(self, memory, captions=1):
        """The state (h1, m1, h2, m2) before the first word: zeros (B, N, H) each."""
        return (self.zeros(memory, captions),) * 4

    def step(self, word_input, state, memory, rules=TrueGradient):
        """One word further: word_input (B, N, 5H) -> c_hat, h2 (B, N, H), the new state, alpha (B, N, 1, L), beta (B, N)."""
        (h1, m1, h2, m2), weights = state, memory["weights"]
        gates = (
            word_input + memory["image_gates"] + weights["attention"](torch.cat([h2, h1], dim=-1))
        )
        h1, m1, sentinel = self._sentinel_lstm(gates, m1, rules)
        context, alpha, beta = self._attend(h1, sentinel, memory, rules)
        gates = weights["language"](torch.cat([context, h1, h2], dim=-1)) + weights["language_bias"]
        m2, squashed, output_gate = lstm_cell(gates, m2, rules)
        h2 = output_gate * squashed
        return context, h2, (h1, m1, h2, m2), alpha.unsqueeze(-2), beta.squeeze(-1)
