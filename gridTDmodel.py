"""The grid-TD captioner: a top-down attention LSTM with a visual sentinel, adaptive attention over the grid of regions, and
a language LSTM (paper §3.1, Figure 2).

The shapes: B images, N captions (or beams) of each, L regions of D channels, E embedding and H hidden units. The parts of
the LSTM inputs that do not wait for the previous step - words, image - are projected once, outside the loop over steps.
"""

import torch
import torch.nn.functional as F
from torch import nn

from captioner import Captioner
from lrp_utils import TrueGradient


def lstm_cell(gates, cell, rules):
    """One LSTM update from pre-activations `gates` (..., 4H), in PyTorch's order i, f, g, o.

    Returns the new cell m (..., H), tanh(m) and the output gate. For LRP the gates are constants, the candidate g and the
    sum i*tanh(g) + f*m are epsilon-rule sites (Arras et al. 2017).
    """
    i, f, g, o = gates.chunk(4, dim=-1)
    i, f, o = (rules.constant(torch.sigmoid(gate)) for gate in (i, f, o))
    cell = rules.epsilon(i * rules.tanh(rules.epsilon(g)) + f * cell)
    return cell, rules.tanh(cell), o


class GridTDCaptioner(Captioner):
    """Grid-TD attention; x1_t = [h2_{t-1}; v_g; word], x2_t = [c_hat; h1_t], logits = fc(c_hat + h2_t)."""

    def __init__(self, config, vocabulary, encoder):
        super().__init__(config, vocabulary, encoder)
        embed, hidden = config.embed_dim, config.hidden_dim
        self.global_projection = nn.Linear(encoder.out_channels, embed)
        self.attention_lstm = nn.LSTMCell(hidden + 2 * embed, hidden)
        self.sentinel_input = nn.Linear(hidden + 2 * embed, hidden)
        self.sentinel_hidden = nn.Linear(hidden, hidden)
        self.attention_visual = nn.Linear(hidden, hidden)
        self.attention_hidden = nn.Linear(hidden, hidden, bias=False)
        self.attention_sentinel = nn.Linear(hidden, hidden)
        self.attention_score = nn.Linear(hidden, 1, bias=False)
        self.language_lstm = nn.LSTMCell(2 * hidden, hidden)

    def look(self, features, rules=TrueGradient):
        """What every step needs of the image, computed once: features (B, L, D) -> dict of tensors.

        regions (B, L, H), keys (B, L, H) their part of eq. 2, image_gates (B, 1, 5H) the global feature's and the biases'
        part of the attention LSTM's pre-activations, and the recurrent weights joined over [h2; h1] and [c_hat; h1; h2].
        """
        embed, hidden = self.config.embed_dim, self.config.hidden_dim
        top, language = self.attention_lstm, self.language_lstm
        regions = torch.relu(rules.epsilon(self.image_projection(features)))
        mean = rules.epsilon(features.mean(dim=1))
        global_feature = torch.relu(rules.epsilon(self.global_projection(mean)))  # v_g (B, E)
        weight = torch.cat([top.weight_ih, self.sentinel_input.weight])  # (5H, H+2E): gates i, f, g, o and the sentinel's
        bias = torch.cat([top.bias_ih + top.bias_hh, self.sentinel_input.bias + self.sentinel_hidden.bias])
        recurrent = torch.cat([top.weight_hh, self.sentinel_hidden.weight])
        return {
            "regions": regions,
            "keys": self.attention_visual(regions),
            "image_gates": F.linear(global_feature, weight[:, hidden : hidden + embed], bias).unsqueeze(1),
            "word_weight": weight[:, hidden + embed :],
            "attention_recurrent": torch.cat([weight[:, :hidden], recurrent], dim=1),
            "language_weight": torch.cat([language.weight_ih, language.weight_hh], dim=1),
            "language_bias": language.bias_ih + language.bias_hh,
        }

    def start(self, memory, captions=1):
        """The state (h1, m1, h2, m2) before the first word: zeros (B, N, H) each."""
        return (self.fc.weight.new_zeros(len(memory["regions"]), captions, self.config.hidden_dim),) * 4

    def word_inputs(self, embeddings, memory):
        """The words' part of the attention LSTM's pre-activations: (..., E) -> (..., 5H)."""
        return F.linear(embeddings, memory["word_weight"])

    def step(self, word_input, state, memory, rules=TrueGradient):
        """One word further: word_input (B, N, 5H) -> c_hat + h2 (B, N, H), the new state, alpha (B, N, 1, L), beta (B, N)."""
        h1, m1, h2, m2 = state
        gates = word_input + memory["image_gates"] + F.linear(torch.cat([h2, h1], dim=-1), memory["attention_recurrent"])
        gates, sentinel_gate = gates.split([4 * self.config.hidden_dim, self.config.hidden_dim], dim=-1)
        m1, squashed, output_gate = lstm_cell(gates, m1, rules)
        h1 = output_gate * squashed
        sentinel = rules.constant(torch.sigmoid(sentinel_gate)) * squashed  # eq. 1
        context, alpha, beta = self._attend(h1, sentinel, memory, rules)
        gates = F.linear(torch.cat([context, h1, h2], dim=-1), memory["language_weight"], memory["language_bias"])
        m2, squashed, output_gate = lstm_cell(gates, m2, rules)
        h2 = output_gate * squashed
        return rules.epsilon(context + h2), (h1, m1, h2, m2), alpha.unsqueeze(-2), beta.squeeze(-1)

    def _attend(self, hidden, sentinel, memory, rules):
        """Adaptive attention (eqs. 2-7): h1, s (B, N, H) -> c_hat (B, N, H), alpha (B, N, L), beta (B, N, 1)."""
        query = self.attention_hidden(hidden)
        keys = torch.tanh(memory["keys"].unsqueeze(1) + query.unsqueeze(2))  # (B, N, L, H)
        scores = self.attention_score(keys).squeeze(-1)
        sentinel_score = self.attention_score(torch.tanh(self.attention_sentinel(sentinel) + query))
        alpha = scores.softmax(dim=-1)
        beta = torch.cat([scores, sentinel_score], dim=-1).softmax(dim=-1)[..., -1:]
        alpha, beta = rules.constant(alpha), rules.constant(beta)
        context = rules.epsilon(alpha @ memory["regions"])
        return rules.epsilon((1 - beta) * context + beta * sentinel), alpha, beta
