"""The captioners with adaptive attention: the adaptive captioner of Lu et al. (2017), and grid-TD,
which adds a language LSTM on top (paper §3.1, Figure 2).

The parts of the LSTM inputs that do not wait for the previous step - words, image - are projected
once, outside the loop over steps. Shapes are named in basemodel.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from basemodel import (
    Captioner,
    Memory,
    StepOutput,
    StepWeight,
    Unrolled,
    additive_scores,
    lstm_cell,
    run_lstm,
    widened,
)
from lrp_utils import TRUE_GRADIENT


class AdaptiveAttention(Captioner):
    """What both captioners share: global feature, visual sentinel, attention to regions and
    sentinel.
    """

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

    def _regions_and_global(self, features, rules):
        """features (B, L, D) -> what attention needs of the image, and the global feature (B, E).

        The former is a dict: regions V (B, L, H), mask (B, L) or None, and keys (B, L, H), twice
        the regions' part of eq. 2.
        """
        regions = torch.relu(rules.epsilon(self.image_projection(features)))
        mask = self.encoder.region_mask(features)
        mean = rules.epsilon(self.mean_region(features, mask))
        global_feature = torch.relu(rules.epsilon(self.global_projection(mean)))
        keys = 2 * self.attention_visual(regions)
        return {"regions": regions, "mask": mask, "keys": keys}, global_feature

    def _gate_weights(self, weight_ih, weight_hh, bias):
        """The LSTM's and the sentinel gate's weights as one.

        Returns the weights over the input (5H, input), over h (5H, H), and the biases (5H,).
        """
        weight_input = torch.cat([weight_ih, self.sentinel_input.weight])
        weight_hidden = torch.cat([weight_hh, self.sentinel_hidden.weight])
        sentinel_bias = self.sentinel_input.bias + self.sentinel_hidden.bias
        return weight_input, weight_hidden, torch.cat([bias, sentinel_bias])

    def _sentinel_lstm(self, gates, cell, rules):
        """gates (B, N, 5H) -> h, the cell and the sentinel s, (B, N, H) each.

        The sentinel is sigma(...) * tanh(cell) (eq. 1).
        """
        hidden_dim = self.config.hidden_dim
        lstm_gates, sentinel_gate = gates.split([4 * hidden_dim, hidden_dim], dim=-1)
        cell, squashed, output_gate = lstm_cell(lstm_gates, cell, rules)
        sentinel = rules.constant(torch.sigmoid(sentinel_gate)) * squashed
        return output_gate * squashed, cell, sentinel

    def _attend(self, hidden, sentinel, memory, rules):
        """Adaptive attention (eqs. 2-7): h1, s (B, N, H) -> c_hat (B, N, H), alpha (B, N, L) and
        beta (B, N, 1). The sentinel's score is made as `additive_scores` makes those of regions.
        """
        query = 2 * self.attention_hidden(hidden)
        scores = additive_scores(memory["keys"], query, self.attention_score, memory["mask"])
        sentinel_key = torch.sigmoid(2 * self.attention_sentinel(sentinel) + query)
        sentinel_score = 2 * self.attention_score(sentinel_key)
        alpha = rules.leaf("attention", scores.softmax(dim=-1).unsqueeze(-2)).squeeze(-2)
        beta = torch.cat([scores, sentinel_score], dim=-1).softmax(dim=-1)[..., -1:]
        alpha = rules.constant(alpha)
        beta = rules.constant(beta)
        context = rules.epsilon(alpha @ memory["regions"])
        return rules.epsilon((1 - beta) * context + beta * sentinel), alpha, beta

    def word_inputs(self, embeddings, memory):
        """The words' part of LSTM's and sentinel gate's pre-activations: (..., E) -> (..., 5H)."""
        return F.linear(embeddings, memory.weights["word"])


class AdaptiveCaptioner(AdaptiveAttention):
    """Adaptive attention; x_t = [word; v_g], logits = fc(c_hat + h_t)."""

    def __init__(self, config, vocabulary, encoder):
        super().__init__(config, vocabulary, encoder, input_dim=2 * config.embed_dim)
        self.lstm = nn.LSTM(2 * config.embed_dim, config.hidden_dim, batch_first=True)

    def image_memory(self, features, rules=TRUE_GRADIENT):
        """features (B, L, D) -> a Memory of regions, mask, keys, the global feature (B, E) and
        image_gates (B, 1, 5H), its and the biases' part of the pre-activations.
        """
        of_image, global_feature = self._regions_and_global(features, rules)
        bias = self.lstm.bias_ih_l0 + self.lstm.bias_hh_l0
        weight, recurrent, bias = self._gate_weights(
            self.lstm.weight_ih_l0, self.lstm.weight_hh_l0, bias
        )
        word_weight, image_weight = weight.split(self.config.embed_dim, dim=1)
        of_image["global"] = global_feature
        of_image["image_gates"] = F.linear(global_feature, image_weight, bias).unsqueeze(1)
        return Memory(of_image, {"word": word_weight, "recurrent": recurrent})

    def initial_state(self, memory, captions=1):
        """The state (h, m) before the first word: zeros (B, N, H) each."""
        return (self.zeros(memory, captions),) * 2

    def step(self, word_input, state, memory, rules=TRUE_GRADIENT):
        """One word further: word_input (B, N, 5H) -> a StepOutput with the addends c_hat and h."""
        hidden, cell = state
        gates = word_input + memory["image_gates"] + F.linear(hidden, memory.weights["recurrent"])
        hidden, cell, sentinel = self._sentinel_lstm(gates, cell, rules)
        context, alpha, beta = self._attend(hidden, sentinel, memory, rules)
        return StepOutput((context, hidden), (hidden, cell), alpha.unsqueeze(-2), beta.squeeze(-1))

    def unroll(self, embeddings, memory, rules=TRUE_GRADIENT, lengths=None):
        """As Captioner.unroll. No attention goes back into the LSTM, so all steps of a caption can
        be taken at once.
        """
        if not self.all_at_once(rules):
            return super().unroll(embeddings, memory, rules, lengths)
        hidden, sentinel = self._all_hidden_states(embeddings, memory, lengths)
        captions, steps = embeddings.shape[1:3]
        longest = [steps] * captions if lengths is None else lengths.amax(dim=0).tolist()
        attended = []
        for n, length in enumerate(longest):
            of_caption = (hidden[:, n, :length], sentinel[:, n, :length])
            attended.append(self._attend(*of_caption, memory, rules))
        of_all_captions = []
        for parts in zip(*attended):
            of_all_captions.append(torch.stack(widened(parts, steps), dim=1))  # (B, N, T, ...)
        context, alpha, beta = of_all_captions
        return Unrolled((context, hidden), alpha.unsqueeze(-2), beta.squeeze(-1))

    def _all_hidden_states(self, embeddings, memory, lengths):
        """The LSTM's h and the sentinel of all steps, (B, N, T, H) each.

        nn.LSTM keeps tanh of the cell to itself; it is h over the output gate.
        """
        batch, captions, steps, _ = embeddings.shape
        image = memory["global"].reshape(batch, 1, 1, -1).expand(-1, captions, steps, -1)
        inputs = torch.cat([embeddings, image], dim=-1).flatten(0, 1)  # (B*N, T, 2E)
        hidden = run_lstm(self.lstm, inputs, lengths)  # (B*N, T, H)
        before = F.pad(hidden[:, :-1], (0, 0, 1, 0))
        hidden = hidden.unflatten(0, (batch, captions))  # (B, N, T, H)
        before = before.unflatten(0, (batch, captions))
        word_gates = self.word_inputs(embeddings, memory)
        recurrent_gates = F.linear(before, memory.weights["recurrent"])
        gates = word_gates + memory["image_gates"].unsqueeze(1) + recurrent_gates  # (B, N, T, 5H)
        last_two = torch.sigmoid(gates[..., -2 * self.config.hidden_dim :])
        output_gate, sentinel_gate = last_two.chunk(2, dim=-1)
        return hidden, sentinel_gate * hidden / output_gate


class GridTDCaptioner(AdaptiveAttention):
    """Grid-TD attention; x1_t = [h2_{t-1}; v_g; word], x2_t = [c_hat; h1_t],
    logits = fc(c_hat + h2_t).
    """

    def __init__(self, config, vocabulary, encoder):
        embed = config.embed_dim
        hidden = config.hidden_dim
        super().__init__(config, vocabulary, encoder, input_dim=hidden + 2 * embed)
        self.attention_lstm = nn.LSTMCell(hidden + 2 * embed, hidden)
        self.language_lstm = nn.LSTMCell(2 * hidden, hidden)

    def image_memory(self, features, rules=TRUE_GRADIENT):
        """features (B, L, D) -> a Memory of regions, mask, keys and image_gates (B, 1, 5H).

        These are the global feature's and the biases' part of the attention LSTM's pre-activations.
        The LSTMs' weights are joined over [h2; h1] and [c_hat; h1; h2].
        """
        of_image, global_feature = self._regions_and_global(features, rules)
        top = self.attention_lstm
        language = self.language_lstm
        weight, recurrent, bias = self._gate_weights(
            top.weight_ih, top.weight_hh, top.bias_ih + top.bias_hh
        )
        sizes = [self.config.hidden_dim, self.config.embed_dim, self.config.embed_dim]
        language_weight, image_weight, word_weight = weight.split(sizes, dim=1)
        of_image["image_gates"] = F.linear(global_feature, image_weight, bias).unsqueeze(1)
        attention_weight = torch.cat([language_weight, recurrent], dim=1)
        joined = torch.cat([language.weight_ih, language.weight_hh], dim=1)
        weights = {
            "word": word_weight,
            "attention": StepWeight(attention_weight, self.training),
            "language": StepWeight(joined, self.training),
            "language_bias": language.bias_ih + language.bias_hh,
        }
        return Memory(of_image, weights)

    def initial_state(self, memory, captions=1):
        """The state (h1, m1, h2, m2) before the first word: zeros (B, N, H) each."""
        return (self.zeros(memory, captions),) * 4

    def step(self, word_input, state, memory, rules=TRUE_GRADIENT):
        """One word further: word_input (B, N, 5H) -> a StepOutput with the addends c_hat and h2."""
        h1, m1, h2, m2 = state
        weights = memory.weights
        recurrent_gates = weights["attention"](torch.cat([h2, h1], dim=-1))
        gates = word_input + memory["image_gates"] + recurrent_gates
        h1, m1, sentinel = self._sentinel_lstm(gates, m1, rules)
        context, alpha, beta = self._attend(h1, sentinel, memory, rules)
        joined = torch.cat([context, h1, h2], dim=-1)
        gates = weights["language"](joined) + weights["language_bias"]
        m2, squashed, output_gate = lstm_cell(gates, m2, rules)
        h2 = output_gate * squashed
        state = (h1, m1, h2, m2)
        return StepOutput((context, h2), state, alpha.unsqueeze(-2), beta.squeeze(-1))
