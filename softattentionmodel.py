"""The captioner of Show, Attend and Tell with soft attention (Xu et al. 2015).

Its attention is over the encoder's own features a_i, without a projection, and steers the LSTM: the
context z_t is a part of the LSTM's input, and the hidden state before it decides where to look.
Shapes are named in basemodel.py.

The last layer is the deep output of eq. 7, L_o (E y_{t-1} + L_h h_t + L_z z_t), without the tanh
that the authors' code has around the sum, so that the logit is linear in its three addends.

In LRP alpha and beta are constants. Sites of the epsilon-rule are, beside those of the LSTM and of
the last layer: the mean region, both layers of the initial state, the weighted sum of regions, L_h
and L_z.
"""

import torch
import torch.nn.functional as F
from torch import nn

from basemodel import Captioner, Memory, StepOutput, StepWeight, additive_scores, lstm_cell
from lrp_utils import TRUE_GRADIENT


class SoftAttentionCaptioner(Captioner):
    """Soft attention; x_t = [word; z_t], z_t = beta_t * sum of alpha_ti a_i,
    logits = fc(word + L_h h_t + L_z z_t).

    `image_projection` is the regions' part of the attention's scores, and `fc` is L_o.
    """

    attention_penalty = 1.0  # lambda of eq. 14

    def __init__(self, config, vocabulary, encoder):
        embed = config.embed_dim
        hidden = config.hidden_dim
        channels = encoder.out_channels
        super().__init__(config, vocabulary, encoder, output_dim=embed)
        self.initial_hidden = nn.Linear(channels, hidden)
        self.initial_cell = nn.Linear(channels, hidden)
        self.attention_hidden = nn.Linear(hidden, hidden, bias=False)
        self.attention_score = nn.Linear(hidden, 1, bias=False)
        self.context_gate = nn.Linear(hidden, 1)
        self.lstm = nn.LSTMCell(embed + channels, hidden)
        self.hidden_output = nn.Linear(hidden, embed, bias=False)
        self.context_output = nn.Linear(channels, embed, bias=False)

    def image_memory(self, features, rules=TRUE_GRADIENT):
        """features (B, L, D) -> a Memory of regions (B, L, D), mask (B, L) or None, keys (B, L, H),
        twice the regions' part of the scores, and the first hidden state and cell (B, 1, H).

        The LSTM's weights are joined over [z; h].
        """
        mask = self.encoder.region_mask(features)
        mean = rules.epsilon(self.mean_region(features, mask))
        hidden = rules.tanh(rules.epsilon(self.initial_hidden(mean)))
        cell = rules.tanh(rules.epsilon(self.initial_cell(mean)))
        of_image = {
            "regions": features,
            "mask": mask,
            "keys": 2 * self.image_projection(features),
            "hidden": hidden.unsqueeze(1),
            # The cell adds up over all steps, so autocast must not begin it in half precision.
            "cell": cell.unsqueeze(1).to(self.fc.weight.dtype),
        }
        sizes = [self.config.embed_dim, features.shape[-1]]
        word_weight, context_weight = self.lstm.weight_ih.split(sizes, dim=1)
        recurrent = torch.cat([context_weight, self.lstm.weight_hh], dim=1)
        weights = {
            "word": word_weight,
            "recurrent": StepWeight(recurrent, self.training),
            "hidden_output": StepWeight(self.hidden_output.weight, self.training),
            "context_output": StepWeight(self.context_output.weight, self.training),
        }
        return Memory(of_image, weights)

    def initial_state(self, memory, captions=1):
        """The state (h, m) before the first word, which the mean region decides: (B, N, H) each."""
        hidden = memory["hidden"].expand(-1, captions, -1)
        cell = memory["cell"].expand(-1, captions, -1)
        return hidden, cell

    def word_inputs(self, embeddings, memory):
        """The words' part of the LSTM's pre-activations, and the words: (..., E) -> (..., 4H+E)."""
        bias = self.lstm.bias_ih + self.lstm.bias_hh
        gates = F.linear(embeddings, memory.weights["word"], bias)
        return torch.cat([gates, embeddings], dim=-1)

    def step(self, word_input, state, memory, rules=TRUE_GRADIENT):
        """One word further: word_input (B, N, 4H+E) -> a StepOutput with the addends word, L_h h
        and L_z z, (B, N, E) each.
        """
        hidden, cell = state
        weights = memory.weights
        sizes = [4 * self.config.hidden_dim, self.config.embed_dim]
        word_gates, word = word_input.split(sizes, dim=-1)
        context, alpha = self._attend(hidden, memory, rules)
        recurrent_gates = weights["recurrent"](torch.cat([context, hidden], dim=-1))
        cell, squashed, output_gate = lstm_cell(word_gates + recurrent_gates, cell, rules)
        hidden = output_gate * squashed
        from_hidden = rules.epsilon(weights["hidden_output"](hidden))
        from_context = rules.epsilon(weights["context_output"](context))
        addends = (word, from_hidden, from_context)
        return StepOutput(addends, (hidden, cell), alpha.unsqueeze(-2), None)

    def _attend(self, hidden, memory, rules):
        """h of the step before (B, N, H) -> z (B, N, D) and alpha (B, N, L) (eqs. 4-5, §4.2).

        beta, one number a step, says how much the image counts (§4.2.1). It is no sentinel's
        weight, so it is not the `beta` of an explanation.
        """
        query = 2 * self.attention_hidden(hidden)
        scores = additive_scores(memory["keys"], query, self.attention_score, memory["mask"])
        alpha = rules.leaf("attention", scores.softmax(dim=-1).unsqueeze(-2)).squeeze(-2)
        alpha = rules.constant(alpha)
        beta = rules.constant(torch.sigmoid(self.context_gate(hidden)))  # (B, N, 1)
        context = rules.epsilon(alpha @ memory["regions"])
        return beta * context, alpha
