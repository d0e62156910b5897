"""Relevancy of attention: which tokens a transformer's answer relied on, told by its attention.

Chefer, Gur and Wolf (2021), "Generic Attention-model Explainability for Interpreting Bi-Modal and
Encoder-Decoder Transformers"; equation numbers are theirs. Huang, Jia, Zhang and Zhang (2023,
arXiv 2308.10240) weight what is accumulated. Of their paper only the abstract was at hand, so the
weights here are our reading of it.

A *modality* is a set of tokens, such as an image's patches or a caption's words. Shapes: s is the
modality that asks in an attention layer (S tokens), q is the one that is asked (Q tokens), D are
the channels of a token. "..." are dimensions of a batch, for instance words and images. An
attention is (..., heads, S, Q), and its rows sum to 1; its gradient is that of the explained logit.

    image = Relevancy.start(patches, words, cams[0])
    for cam in encoder_cams:                      # cam = average_heads(attention, gradient)
        image = image.self_attention(cam)
    text = Relevancy.start(words, patches, cams[0])
    for own, cross in decoder_cams:
        text = text.self_attention(own).cross_attention(cross, image)
    of_words, of_patches = text.row(position)

`AttentionRecorder` finds the attentions of any transformer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lrp_utils import AlphaOneBetaZero, attention_in_steps, safe_ratio


class Weights(NamedTuple):
    """How much of each token's relevance is from before an attention block, how much from after.

    before, after: (..., S) or numbers. They add up to 2, so that equal weights are 1 and 1.
    """

    before: torch.Tensor | float
    after: torch.Tensor | float


EQUAL = Weights(1.0, 1.0)  # Chefer et al.


def average_heads(attention, gradient):
    """The mean over heads of (gradient * attention)+, eq. 5: (..., heads, S, Q) -> (..., S, Q)."""
    return (gradient * attention).clamp(min=0).mean(dim=-3)


def norm_weights(residual, added):
    """Weights by the lengths of a token's values, our reading (A).

    residual and added, (..., S, D) each, are the two summands of the residual connection around an
    attention block: the tokens before it, and what the attention adds.
    w_x = |x| / (|x| + |o|), and w_a = 1 - w_x.
    """
    return _shares(residual.norm(dim=-1), added.norm(dim=-1))


def gradient_weights(residual, added, gradient):
    """Weights by what a token's values do for the answer, our reading (B).

    The lengths of reading (A) are replaced by (gradient * value)+, summed over channels. residual
    and added: as there; gradient (..., S, D): of the explained logit with respect to their sum,
    which is that of either summand.
    """
    before = (gradient * residual).clamp(min=0).sum(dim=-1)
    after = (gradient * added).clamp(min=0).sum(dim=-1)
    return _shares(before, after)


def _shares(before, after):
    """The shares of two amounts (..., S) as Weights; two zeros share equally."""
    total = before + after
    share = torch.where(total == 0, 0.5, safe_ratio(before, total))
    return Weights(2 * share, 2 * (1 - share))


@dataclass(frozen=True)
class Relevancy:
    """How relevant the tokens of both modalities are to each token of one of them.

    own    R^ss (..., S, S)
    other  R^sq (..., S, Q)
    kept   (..., S): what of R^ss came by the residual connections alone. It is 1 with equal
           weights, where R^ss begins as the identity and only grows.
    """

    own: torch.Tensor
    other: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def start(cls, tokens, others, like):
        """Before the first layer (eq. 1 and 2): each token is relevant to itself only.

        tokens, others: S and Q; like: an averaged attention (..., S, Q), whose batch dimensions,
        type and device are taken.
        """
        batch = like.shape[:-2]
        identity = torch.eye(tokens, dtype=like.dtype, device=like.device)
        own = identity.expand(*batch, tokens, tokens)
        return cls(own, like.new_zeros(*batch, tokens, others), like.new_ones(*batch, tokens))

    def self_attention(self, cam, weights=EQUAL):
        """After a layer of self-attention (eq. 6 and 7): R += cam R, for R^ss and R^sq.

        cam (..., S, S). Weighted, in our reading, R <- W_x R + W_a cam R.
        """
        cam = _scaled_rows(weights.after, cam)
        return Relevancy(
            _scaled_rows(weights.before, self.own) + cam @ self.own,
            _scaled_rows(weights.before, self.other) + cam @ self.other,
            weights.before * self.kept,
        )

    def cross_attention(
        self, cam, asked, weights=EQUAL, normalize=True, self_term=True, aggregate=True
    ):
        """After a layer in which these tokens attend to those of the other modality (eq. 10, 11):

            R^sq += normalized(R^ss)' cam normalized(R^qq)        R^ss += cam R^qs

        cam (..., S, Q); asked: the Relevancy of the other modality. Weighted, in our reading, the
        old R is W_x R and cam is W_a cam. The ablations of the paper: normalize=False takes R^ss
        and R^qq as they are; self_term=False adds cam alone to R^sq; aggregate=False forgets the
        R^sq of earlier layers.
        """
        cam = _scaled_rows(weights.after, cam)
        other = cam
        if self_term and normalize:
            other = self.normalized().mT @ cam @ asked.normalized()
        elif self_term:
            other = self.own.mT @ cam @ asked.own
        if aggregate:
            other = _scaled_rows(weights.before, self.other) + other
        own = _scaled_rows(weights.before, self.own) + cam @ asked.other
        return Relevancy(own, other, weights.before * self.kept)

    def normalized(self):
        """R^ss with rows that sum to 1, beside the identity of the residual path: (..., S, S).

        Eq. 8 and 9. A row that the attention has added nothing to stays the identity's. Weighted,
        what the residual connections alone have left of the identity is subtracted instead of 1.
        """
        added = self.own - torch.diag_embed(self.kept)
        shared = safe_ratio(added, added.sum(dim=-1, keepdim=True))
        return shared + torch.eye(shared.shape[-1], dtype=shared.dtype, device=shared.device)

    def row(self, position):
        """What is relevant to the token at `position`: (..., S) of its own modality, (..., Q).

        The token's relevance to itself is set to 0. For a class it is the class token's position,
        for a caption's word the position that predicts it.
        """
        own = self.own[..., position, :].clone()
        own[..., position] = 0
        return own, self.other[..., position, :]


def co_attention(first, second, cam_first, cam_second, weights=(EQUAL, EQUAL)):
    """Both modalities attend to one another in one layer: the two Relevancies after it.

    cam_first (..., S, Q): of the first modality's tokens to the second's, cam_second (..., Q, S)
    the other way; weights: of each. Both are computed from the state before the layer.
    """
    after_first = first.cross_attention(cam_first, second, weights[0])
    after_second = second.cross_attention(cam_second, first, weights[1])
    return after_first, after_second


def _scaled_rows(weights, matrix):
    """The rows of a matrix (..., S, Q) times weights (..., S) or a number."""
    if isinstance(weights, torch.Tensor):
        weights = weights.unsqueeze(-1)
    return weights * matrix


# ------------------------------------------------------------------------------------- baselines


def raw_attention(attention):
    """The mean of the heads of one layer, usually the last: (..., heads, S, Q) -> (..., S, Q)."""
    return attention.mean(dim=-3)


def rollout(attentions):
    """Attention rollout (Abnar and Zuidema 2020): the product over layers of A + I.

    attentions: of each layer the mean over heads (..., S, S), the first layer first. The rows of
    A + I are divided by their sums. Returns (..., S, S), whose rows sum to 1.
    """
    identity = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    result = identity
    for attention in attentions:
        layer = attention + identity
        result = layer / layer.sum(dim=-1, keepdim=True) @ result
    return result


def in_one_sequence(attention, asking, asked, length):
    """An attention (..., S, Q) between parts of a sequence, as one of the whole: (..., N, N).

    asking, asked: slices of the S tokens that attend and the Q that are attended to; length: N.
    All other tokens attend to themselves. So `rollout` can go through encoder and decoder.
    """
    whole = torch.eye(length).to(attention).expand(*attention.shape[:-2], -1, -1).clone()
    whole[..., asking, :] = 0
    whole[..., asking, asked] = attention
    return whole


def attention_grad_cam(attention, gradient):
    """Grad-CAM of one layer's attention: heads weighted by their mean gradient, then ReLU.

    Both are (..., heads, S, Q); the result is (..., S, Q). As Chefer et al. compare with.
    """
    weights = gradient.mean(dim=(-2, -1), keepdim=True)
    return (weights * attention).mean(dim=-3).clamp(min=0)


def partial_lrp(relevance):
    """Partial LRP (Voita et al. 2019): the mean over heads of the last attention's LRP relevance.

    relevance (..., heads, S, Q) -> (..., S, Q). LRP stops there, at the weights.
    """
    return relevance.mean(dim=-3)


def transformer_attribution(relevances, gradients):
    """Transformer attribution (Chefer, Gur and Wolf 2021, CVPR): the product over layers of

        I + the mean over heads of (gradient * relevance)+

    relevances: of each layer's attention weights, by LRP, (..., heads, S, S), first layer first;
    gradients: of the explained logit with respect to them. Returns (..., S, S).
    """
    result = torch.eye(relevances[0].shape[-1]).to(relevances[0])
    for relevance, gradient in zip(relevances, gradients):
        result = result + average_heads(relevance, gradient) @ result
    return result


# ---------------------------------------------------------------------- attention of a transformer


@dataclass
class AttentionBlock:
    """What is seen of an attention block of a transformer while it runs.

    weights   (B, heads, S, Q)
    residual  (B, S, D), the tokens before the block; None if no residual connection was found
    added     (B, S, D), what the attention adds to them
    total     (B, S, D), their sum
    """

    weights: torch.Tensor
    residual: torch.Tensor | None = None
    added: torch.Tensor | None = None
    total: torch.Tensor | None = None


class AttentionRecorder(TorchFunctionMode):
    """`with AttentionRecorder() as recorder:` keeps the attention blocks of a transformer.

    `recorder.blocks` holds them in the order in which they run. The network is not touched. Fused
    attention is taken apart. A softmax is an attention's weights. The first linear layer after it
    is the attention's output projection, and the first sum that has that as a part is the residual
    connection.
    """

    SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}
    PROJECTIONS = {F.linear, torch.addmm}
    SUMS = {*AlphaOneBetaZero.SUMS, torch.Tensor.add_}

    def __init__(self):
        super().__init__()
        self.blocks = []
        self._projected = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            with self:
                return attention_in_steps(*args, **kwargs)
        output = function(*args, **kwargs)
        if function in self.SOFTMAX:
            self.blocks.append(AttentionBlock(output))
            self._projected = None
        elif function in self.PROJECTIONS and self._projected is None:
            self._projected = output
        elif function in self.SUMS and self.blocks and self.blocks[-1].total is None:
            self._record_sum(args[:2], output)
        return output

    def _record_sum(self, parts, total):
        """Complete the last block if one of the two parts is what its attention adds."""
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        if self._projected is None or len(tensors) < 2:
            return
        # GPT-2 looks at the output of its layers in another shape, so the place in memory tells.
        place = self._projected.data_ptr()
        for added, residual in (parts, parts[::-1]):
            if added.data_ptr() == place and added.shape == residual.shape:
                block = self.blocks[-1]
                block.residual = residual
                block.added = added
                block.total = total
                return
