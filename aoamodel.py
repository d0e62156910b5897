"""The captioner with multi-head attention: an LSTM, scaled dot-product attention over the regions,
and a sigmoid gate.

Its LSTM does not wait for the attention, so teacher forcing needs no loop over steps: one LSTM, one
attention, one last layer. ("AoA" is the authors' name. Of AoANet it has the gate, which here sees h
only, and neither refiner nor GLU.) Shapes are named in basemodel.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from basemodel import Captioner, Memory, StepOutput, Unrolled, lstm_cell, run_lstm
from commandline import UserError
from lrp_utils import TRUE_GRADIENT


class AoACaptioner(Captioner):
    """Multi-head attention; x_t = [word; mean of V], c = sigma(W_g h) * (W_c ctx),
    logits = fc(c + h_t).
    """

    dot_product_attention = True

    def __init__(self, config, vocabulary, encoder):
        super().__init__(config, vocabulary, encoder)
        embed = config.embed_dim
        hidden = config.hidden_dim
        if hidden % config.num_head:
            raise UserError(
                f"hidden_dim {hidden} cannot be divided among num_head {config.num_head} heads"
            )
        self.lstm = nn.LSTM(embed + hidden, hidden, batch_first=True)
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.context_projection = nn.Linear(hidden, hidden)
        self.context_gate = nn.Linear(hidden, hidden)

    def image_memory(self, features, rules=TRUE_GRADIENT):
        """features (B, L, D) -> a Memory of regions (B, L, H), mask, mean (B, H), keys and values
        by head (B, heads, L, H/heads), and image_gates (B, 1, 4H).

        The latter are the mean's and the biases' part of the LSTM's pre-activations.
        """
        regions = torch.relu(rules.epsilon(self.image_projection(features)))
        mask = self.encoder.region_mask(features)
        mean = rules.epsilon(self.mean_region(regions, mask))
        image_weight = self.lstm.weight_ih_l0[:, self.config.embed_dim :]
        bias = self.lstm.bias_ih_l0 + self.lstm.bias_hh_l0
        return Memory(
            {
                "regions": regions,
                "mask": mask,
                "mean": mean,
                "keys": rules.factor(self._by_head(rules.epsilon(self.key(regions)))),
                "values": rules.factor(self._by_head(rules.epsilon(self.value(regions)))),
                "image_gates": F.linear(mean, image_weight, bias).unsqueeze(1),
            }
        )

    def initial_state(self, memory, captions=1):
        """The state (h, m) before the first word: zeros (B, N, H) each."""
        return (self.zeros(memory, captions),) * 2

    def word_inputs(self, embeddings, memory):
        """The words' part of the LSTM's pre-activations: (..., E) -> (..., 4H)."""
        return F.linear(embeddings, self.lstm.weight_ih_l0[:, : self.config.embed_dim])

    def step(self, word_input, state, memory, rules=TRUE_GRADIENT):
        """One word further: word_input (B, N, 4H) -> a StepOutput with the addends c and h."""
        hidden, cell = state
        gates = word_input + memory["image_gates"] + F.linear(hidden, self.lstm.weight_hh_l0)
        cell, squashed, output_gate = lstm_cell(gates, cell, rules)
        hidden = output_gate * squashed
        context, alpha = self._attend(hidden, memory, rules)
        return StepOutput((context, hidden), (hidden, cell), alpha, None)

    def unroll(self, embeddings, memory, rules=TRUE_GRADIENT, lengths=None):
        """As Captioner.unroll, all steps at once where that can be."""
        if not self.all_at_once(rules):
            return super().unroll(embeddings, memory, rules, lengths)
        batch, captions, steps, _ = embeddings.shape
        mean = memory["mean"].reshape(batch, 1, 1, -1).expand(-1, captions, steps, -1)
        inputs = torch.cat([embeddings, mean], dim=-1).flatten(0, 1)  # (B*N, T, E+H)
        hidden = run_lstm(self.lstm, inputs, lengths).reshape(batch, captions * steps, -1)
        context, alpha = self._attend(hidden, memory, rules)
        context = context.unflatten(1, (captions, steps))
        hidden = hidden.unflatten(1, (captions, steps))
        return Unrolled((context, hidden), alpha.unflatten(1, (captions, steps)), None)

    def _attend(self, hidden, memory, rules):
        """hidden (B, M, H) of M captions or steps -> c (B, M, H) and alpha (B, M, heads, L)."""
        query = rules.factor(self._by_head(rules.epsilon(self.query(hidden))))
        scale = query.shape[-1] ** -0.5
        products = query @ memory["keys"].transpose(-1, -2)  # (B, heads, M, L)
        scores = rules.epsilon(products * scale)
        if memory["mask"] is not None:
            scores = scores.masked_fill(~memory["mask"][:, None, None], -torch.inf)
        alpha = rules.leaf("attention", scores.softmax(dim=-1).transpose(1, 2))
        weights = rules.weights(self.attention_dropout(alpha.transpose(1, 2)))
        context = rules.epsilon((weights @ memory["values"]).transpose(1, 2).flatten(2))
        gate = rules.constant(torch.sigmoid(self.context_gate(hidden)))
        return gate * rules.epsilon(self.context_projection(context)), alpha

    def _by_head(self, x):
        """(B, M, H) -> (B, heads, M, H/heads)."""
        return x.unflatten(-1, (self.config.num_head, -1)).transpose(1, 2)
