"""How a transformer's words are explained: `METHODS` for the captioners of pretrainedmodel.py.

A method looks at one forward pass of one image, a `ForwardPass`, and at gradients of the logits in
it. Shapes: n image tokens, of which the last L = h * w are patches, K inputs, M = prefix + K text
tokens, V logits, P of them explained at a time, D and E channels of an image and a word token.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from explanation import NON_NEGATIVE, SIGNED, needs_any_captioner, word_gradients
from gradient_utils import gradient, input_x_gradient
from lrp_utils import TransformerLRP
from relevancy_utils import (
    EQUAL,
    Relevancy,
    Weights,
    attention_grad_cam,
    average_heads,
    gradient_weights,
    in_one_sequence,
    norm_weights,
    partial_lrp,
    raw_attention,
    rollout,
)

OCCLUDED = 12  # squares along each side of the image, at most


class Block(NamedTuple):
    """An attention block: its kind, and what the recorder has seen of it.

    kind   which tokens attend to which
        "image"   image tokens to one another
        "words"   the inputs to one another, before the prefix is there
        "text"    text tokens to one another
        "cross"   text to image
        "mutual"  image to text, from the same state as the "cross" before it (co-attention)
        "joint"   both are one sequence, the image first
    """

    kind: str
    seen: object


@dataclass
class ForwardPass:
    """What the forward pass of an explanation leaves, of one image.

    pixels    (1, 3, S, S), as the model wants them
    ids       (1, K), the inputs: of a caption the start and all sub-words but the last
    targets   (1, T), what is explained: of a caption the K sub-words
    features  (1, n, D), the image tokens that the decoder is given
    words     (1, K, E), the embeddings of the inputs
    logits    (1, T, V)
    blocks    the attention blocks, in the order in which they run
    rows      (T,): the text token from whose state each target is predicted
    prefix    text tokens that the decoder has before the inputs
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor
    features: torch.Tensor
    words: torch.Tensor
    logits: torch.Tensor
    blocks: list
    rows: torch.Tensor
    prefix: int = 0

    @property
    def scores(self):
        """The explained logits (1, T)."""
        return self.logits.gather(-1, self.targets.unsqueeze(-1)).squeeze(-1)

    @property
    def image_tokens(self):
        """n."""
        return self.features.shape[1]

    @property
    def text_tokens(self):
        """M."""
        return self.prefix + self.ids.shape[1]

    def last(self, *kinds):
        """The number of the last block of these kinds."""
        return max(i for i, block in enumerate(self.blocks) if block.kind in kinds)

    def last_attention(self):
        """The last layer's weights from where the targets are predicted to the image:
        (heads, T, n)."""
        weights = self.blocks[self.last("cross", "joint")].seen.weights[0].to(self.logits)
        others = weights.shape[1] - self.text_tokens  # image tokens of one sequence
        return weights[:, others + self.rows, : self.image_tokens]


# ------------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class TransformerMethod:
    """A way to explain a pretrained captioner, as explanation.Method is for the others.

    relevance  a function of (captioner, forward, gradients, positions) for P of the sub-words.
               It returns {"tokens": (P, n) of the image tokens, "words": (P, K) of the inputs,
               "image": (P, H, W)}; without "image", the patches are enlarged
    leaves     a function of the ForwardPass: {name: tensor or list of them} that gradients of the
               explained logits are wanted of, (P, 1, ...) each
    rules      () -> a context manager in which the model runs
    check      a function of a captioner that raises a UserError if the method is not for it
    kind, additive   as those of explanation.Method
    """

    relevance: Callable
    leaves: Callable = lambda forward: {}
    rules: Callable = nullcontext
    check: Callable = needs_any_captioner
    kind: str = SIGNED
    additive: bool = False


def input_leaves(forward):
    """Pixels, image tokens and word embeddings."""
    return {"image": forward.pixels, "regions": forward.features, "words": forward.words}


def attention_leaves(forward):
    """All attention weights."""
    return {"attention": [block.seen.weights for block in forward.blocks]}


def weighted_leaves(forward):
    """All attention weights, and the sums of the residual connections around them."""
    totals = [block.seen.total for block in forward.blocks]
    return {**attention_leaves(forward), "total": totals}


def gradient_relevance(captioner, forward, gradients, positions):
    """The gradient itself, summed over channels and embedding dimensions."""
    return _of_the_first_image(gradient(input_leaves(forward), gradients, None, None))


def input_relevance(captioner, forward, gradients, positions):
    """Gradient x input, summed likewise; under `TransformerLRP` this is relevance."""
    return _of_the_first_image(input_x_gradient(input_leaves(forward), gradients, None, None))


def _of_the_first_image(found):
    """Fields of gradient_utils.py, (P, 1, ...) each, by the names of TransformerMethod."""
    return {
        "image": found["image_relevance"][:, 0],
        "tokens": found["region_relevance"][:, 0],
        "words": found["word_relevance"][:, 0],
    }


def relevancy(captioner, forward, gradients, positions):
    """Relevancy of attention (Chefer et al. 2021), all parts weighing alike."""
    return _relevancy(forward, gradients, positions, lambda seen, slope: EQUAL)


def norm_weighted_relevancy(captioner, forward, gradients, positions):
    """Weighted relevancy, our reading (A): by the lengths of the tokens' values."""
    return _relevancy(
        forward,
        gradients,
        positions,
        lambda seen, slope: norm_weights(seen.residual, seen.added),
    )


def gradient_weighted_relevancy(captioner, forward, gradients, positions):
    """Weighted relevancy, our reading (B): by what the tokens' values do for the word."""
    return _relevancy(
        forward,
        gradients,
        positions,
        lambda seen, slope: gradient_weights(seen.residual, seen.added, slope),
    )


def _relevancy(forward, gradients, positions, weigh):
    """Accumulate the attention of all blocks; weigh: (AttentionBlock, gradient) -> Weights."""
    slopes = gradients.get("total", [None] * len(forward.blocks))
    steps = []
    for block, attention, slope in zip(forward.blocks, gradients["attention"], slopes):
        cam = average_heads(block.seen.weights, attention).to(forward.logits)
        steps.append((block.kind, cam, weigh(block.seen, slope)))
    if any(kind == "joint" for kind, *_ in steps):
        return _rows(*_relevancy_of_one_sequence(steps, forward), forward, positions)
    return _rows(*_relevancy_of_two(steps, forward), forward, positions)


def _relevancy_of_two(steps, forward):
    """The relevancy of image and text as two modalities, to the text: (P, 1, M, n + M), and what
    residual connections alone have left of each token in itself: (P, 1, M)."""
    first = steps[0][1]
    image = Relevancy.start(forward.image_tokens, forward.text_tokens, first)
    text = Relevancy.start(forward.text_tokens, forward.image_tokens, first)
    before = text
    for kind, cam, weights in steps:
        if kind == "image":
            image = image.self_attention(cam, weights)
        elif kind == "words":
            cam = F.pad(cam, (forward.prefix, 0, forward.prefix, 0))
            text = text.self_attention(cam, _padded(weights, forward.prefix, 0))
        elif kind == "text":
            text = text.self_attention(cam, weights)
        elif kind == "cross":
            before = text
            text = text.cross_attention(cam, image, weights)
        else:
            image = image.cross_attention(cam, before, weights)
    return torch.cat([text.other, text.own], dim=-1), text.kept


def _relevancy_of_one_sequence(steps, forward):
    """As `_relevancy_of_two`, of image and text as one sequence.

    What attends within the image only leaves the text as it is.
    """
    text = forward.text_tokens
    state = Relevancy.start(forward.image_tokens + text, 0, steps[0][1])
    for kind, cam, weights in steps:
        if kind == "image":
            cam = F.pad(cam, (0, text, 0, text))
            weights = _padded(weights, 0, text)
        state = state.self_attention(cam, weights)
    first = forward.image_tokens
    return state.own[..., first:, :], state.kept[..., first:]


def _padded(weights, before, after):
    """Weights (..., S) with so many ones before and after them; numbers stay as they are."""
    padded = []
    for weight in weights:
        if isinstance(weight, torch.Tensor):
            weight = F.pad(weight, (before, after), value=1.0)
        padded.append(weight)
    return Weights(*padded)


def _rows(matrix, kept, forward, positions):
    """What of (P, 1, M, n + M) belongs to the explained logits, by the names of a method.

    kept: what of a token's relevance to itself came by the residual connections alone, (P, 1, M) or
    a number. It is taken off. What attention has added stays, for the token from whose state a word
    is predicted is the word just before.
    """
    chosen = torch.arange(len(positions), device=positions.device)
    own = forward.rows[positions]
    rows = matrix[chosen, 0, own].clone()
    if isinstance(kept, torch.Tensor):
        kept = kept.expand(len(positions), 1, -1)[chosen, 0, own]
    rows[chosen, forward.image_tokens + own] -= kept
    return {
        "tokens": rows[:, : forward.image_tokens],
        "words": rows[:, forward.image_tokens + forward.prefix :],
    }


def _ends(forward):
    """{kind of a block: (who attends, who is attended to)}, slices of the n + M tokens."""
    length = forward.image_tokens + forward.text_tokens
    image = slice(0, forward.image_tokens)
    text = slice(forward.image_tokens, length)
    inputs = slice(forward.image_tokens + forward.prefix, length)
    both = slice(0, length)
    return {
        "image": (image, image),
        "words": (inputs, inputs),
        "text": (text, text),
        "cross": (text, image),
        "mutual": (image, text),
        "joint": (both, both),
    }


def rollout_relevance(captioner, forward, gradients, positions):
    """Attention rollout (Abnar and Zuidema 2020) through encoder and decoder."""
    length = forward.image_tokens + forward.text_tokens
    ends = _ends(forward)
    layers = []
    for block in forward.blocks:
        attention = raw_attention(block.seen.weights).to(forward.logits)
        layer = in_one_sequence(attention, *ends[block.kind], length)
        if block.kind == "mutual":
            attending = ends["mutual"][0]
            layers[-1][..., attending, :] = layer[..., attending, :]
        else:
            layers.append(layer)
    matrix = rollout(layers)[..., forward.image_tokens :, :]
    attending = [block.kind in ("words", "text", "cross", "joint") for block in forward.blocks]
    kept = 0.5 ** sum(attending)  # of an input, each layer's residual connection is half
    return _rows(matrix.expand(len(positions), -1, -1, -1), kept, forward, positions)


def transformer_attribution_relevance(captioner, forward, gradients, positions):
    """Transformer attribution (Chefer, Gur and Wolf 2021, CVPR), image and text as one sequence.

    The forward pass is under AttnLRP's rules, so these gradients give the relevance of attention
    weights; the true gradients are of a second pass.
    """
    with torch.enable_grad():
        plain = captioner.recorded(forward.pixels, forward.ids, forward.targets)
        leaves = attention_leaves(plain)
        slopes = word_gradients(plain.scores, positions[None], leaves, retain_graph=True)
    length = forward.image_tokens + forward.text_tokens
    ends = _ends(forward)
    result = torch.eye(length).to(forward.logits)
    waiting = None
    for number, block in enumerate(forward.blocks):
        weights = block.seen.weights
        relevance = gradients["attention"][number] * weights
        cam = average_heads(relevance, slopes["attention"][number]).to(forward.logits)
        asking, asked = ends[block.kind]
        added = cam @ (waiting if block.kind == "mutual" else result)[..., asked, :]
        waiting = result
        result = result.expand(*added.shape[:-2], -1, -1).clone()
        result[..., asking, :] += added
    return _rows(result[..., forward.image_tokens :, :], 1.0, forward, positions)


def attention_relevance(captioner, forward, gradients, positions):
    """The mean over heads of the last layer's attention weights."""

    def mean(number):
        weights = raw_attention(forward.blocks[number].seen.weights)
        return weights.expand(len(positions), -1, -1, -1)

    return _last_layer(forward, mean, positions)


def attention_grad_cam_relevance(captioner, forward, gradients, positions):
    """Grad-CAM of the last layer's attention."""

    def weighted(number):
        weights = forward.blocks[number].seen.weights
        return attention_grad_cam(weights, gradients["attention"][number])

    return _last_layer(forward, weighted, positions)


def partial_lrp_relevance(captioner, forward, gradients, positions):
    """Partial LRP (Voita et al. 2019): the relevance of the last layer's attention weights."""

    def relevance(number):
        return partial_lrp(gradients["attention"][number] * forward.blocks[number].seen.weights)

    return _last_layer(forward, relevance, positions)


def _last_layer(forward, value_of, positions):
    """What one number for each weight of the last layer's attention says, by a method's names.

    value_of: number of a block -> (P, 1, S, Q). The image's tokens have those of the last block
    that attends to them, the words those of the last one in which text attends to text.
    """
    chosen = torch.arange(len(positions), device=positions.device)
    own = forward.rows[positions]
    of_image = value_of(forward.last("cross", "joint")).to(forward.logits)
    others = of_image.shape[2] - forward.text_tokens  # image tokens of one sequence
    tokens = of_image[chosen, 0, others + own, : forward.image_tokens]
    of_text = value_of(forward.last("text", "joint")).to(forward.logits)
    words = of_text[chosen, 0, others + own, others + forward.prefix :]
    return {"tokens": tokens, "words": words}


def occlusion(captioner, forward, gradients, positions):
    """By how much a logit falls when a square of the image, or an input sub-word, is taken away.

    A square is set to the mean pixel, and counts for each patch in it; there are at most 12 of them
    along a side. A sub-word is replaced by padding. Words do not depend on later inputs.
    """
    before = forward.scores[0, positions]
    height, width = captioner.encoder.grid
    drops = before.new_zeros(len(positions), height, width)
    side = -(-max(height, width) // OCCLUDED)  # patches, rounded up
    pixels_of_a_patch = forward.pixels.shape[-2] // height
    for top in range(0, height, side):
        for left in range(0, width, side):
            pixels = forward.pixels.clone()
            rows = slice(top * pixels_of_a_patch, (top + side) * pixels_of_a_patch)
            columns = slice(left * pixels_of_a_patch, (left + side) * pixels_of_a_patch)
            pixels[..., rows, columns] = 0
            after = captioner.scores(pixels, forward.ids, forward.targets)[0, positions]
            fall = (before - after)[:, None, None]
            drops[:, top : top + side, left : left + side] = fall
    words = before.new_zeros(len(positions), forward.ids.shape[1])
    for position in range(forward.ids.shape[1]):
        ids = forward.ids.clone()
        ids[0, position] = captioner.padding
        after = captioner.scores(forward.pixels, ids, forward.targets)[0, positions]
        words[:, position] = before - after
    others = forward.image_tokens - height * width
    return {"tokens": F.pad(drops.flatten(1), (others, 0)), "words": words}


ATTNLRP = TransformerMethod(input_relevance, input_leaves, TransformerLRP, additive=True)
METHODS = {
    "attnlrp": ATTNLRP,
    "lrp": ATTNLRP,  # of a transformer, LRP is AttnLRP
    "gradient": TransformerMethod(gradient_relevance, input_leaves),
    "input_x_gradient": TransformerMethod(input_relevance, input_leaves),
    "relevancy": TransformerMethod(relevancy, attention_leaves, kind=NON_NEGATIVE),
    "weighted_relevancy": TransformerMethod(
        norm_weighted_relevancy, attention_leaves, kind=NON_NEGATIVE
    ),
    "gradient_weighted_relevancy": TransformerMethod(
        gradient_weighted_relevancy, weighted_leaves, kind=NON_NEGATIVE
    ),
    "rollout": TransformerMethod(rollout_relevance, kind=NON_NEGATIVE),
    "transformer_attribution": TransformerMethod(
        transformer_attribution_relevance, attention_leaves, TransformerLRP, kind=NON_NEGATIVE
    ),
    "partial_lrp": TransformerMethod(partial_lrp_relevance, attention_leaves, TransformerLRP),
    "attention_gradcam": TransformerMethod(
        attention_grad_cam_relevance, attention_leaves, kind=NON_NEGATIVE
    ),
    "attention": TransformerMethod(attention_relevance, kind=NON_NEGATIVE),
    "occlusion": TransformerMethod(occlusion),
}
