"""The slow, obvious CLIPmapper that the fast one is tested against: one image, one text, float64.

Attention is computed for each head and each token that attends, one after the other. Everything can
be differentiated. `relevancy` accumulates attention by the rules of oracle_relevancy.py.
"""

import math

import numpy as np
import oracle_relevancy as rules
import torch
from torch.nn.functional import gelu


class Seen:
    """An attention block: kind, weights (heads, S, Q), residual, added, total (S, D)."""

    def __init__(self, kind, weights, residual, added):
        self.kind = kind
        self.weights = weights
        self.residual = residual
        self.added = added
        self.total = residual + added


def layer_norm(norm, tokens):
    """Token by token."""
    rows = []
    for token in tokens:
        centred = token - token.mean()
        deviation = ((centred**2).mean() + norm.eps).sqrt()
        rows.append(centred / deviation * norm.weight + norm.bias)
    return torch.stack(rows)


def attend(query, key, value, heads, seen):
    """(S, D), (Q, D), (Q, D) -> context (S, D) and weights (heads, S, Q).

    seen: (s, q) -> whether token s attends to token q.
    """
    size = query.shape[1] // heads
    parts = [slice(head * size, (head + 1) * size) for head in range(heads)]
    weights = []
    for part in parts:
        rows = []
        for s in range(len(query)):
            row = []
            for q in range(len(key)):
                similarity = (query[s, part] * key[q, part]).sum() / math.sqrt(size)
                row.append(similarity.exp() if seen(s, q) else similarity * 0)
            row = torch.stack(row)
            rows.append(row / row.sum())
        weights.append(torch.stack(rows))
    weights = torch.stack(weights)
    contexts = [own @ value[:, part] for own, part in zip(weights, parts)]
    return torch.cat(contexts, dim=1), weights


def everything(s, q):
    """All is seen."""
    return True


def clip_layers(encoder, tokens, kind, seen):
    """The layers of one of CLIP's transformers: the tokens behind them, and their Seen."""
    blocks = []
    for layer in encoder.layers:
        own = layer.self_attn
        normed = layer_norm(layer.layer_norm1, tokens)
        context, weights = attend(
            own.q_proj(normed), own.k_proj(normed), own.v_proj(normed), own.num_heads, seen
        )
        blocks.append(Seen(kind, weights, tokens, own.out_proj(context)))
        tokens = blocks[-1].total
        inner = layer.mlp.fc1(layer_norm(layer.layer_norm2, tokens))
        tokens = tokens + layer.mlp.fc2(inner * torch.sigmoid(1.702 * inner))
    return tokens, blocks


def block_of(attention, kind, tokens, asked, seen):
    """A Seen of the mapper's Attention; asked: already normalised, None for the tokens."""
    normed = layer_norm(attention.norm, tokens)
    asked = normed if asked is None else asked
    key_value = attention.key_value(asked)
    width = tokens.shape[1]
    context, weights = attend(
        attention.query(normed),
        key_value[:, :width],
        key_value[:, width:],
        attention.heads,
        seen,
    )
    return Seen(kind, weights, tokens, attention.output(context))


def mlp(layers, tokens):
    """Tokens and what the MLP adds to them."""
    norm, first, _, second, _ = layers
    return tokens + second(gelu(first(layer_norm(norm, tokens))))


def entrance(layers, tokens):
    """From stage one to stage two."""
    norm, linear = layers
    return linear(layer_norm(norm, tokens))


def place_of_each(side, channels):
    """The code of the class token, which has none, and of side * side patches."""
    code = torch.zeros(1 + side * side, channels)
    pairs = channels // 4
    for row in range(side):
        for column in range(side):
            for pair in range(pairs):
                period = 8 ** (pair / max(1, pairs - 1))
                for first, place in ((0, row), (2 * pairs, column)):
                    angle = 2 * math.pi * (place + 0.5) / side / period
                    code[1 + row * side + column, first + pair] = math.sin(angle)
                    code[1 + row * side + column, first + pairs + pair] = math.cos(angle)
    return code


def forward(model, pixels, ids):
    """Pixels (3, 8, 8) and token ids (K,) without padding -> the logits, and all Seen in order.

    The logits are (1, V) of a question, or (K, V) of a caption.
    """
    pixels = pixels.detach().requires_grad_()
    vision = model.clip.vision_model
    image = vision.pre_layrnorm(vision.embeddings(pixels[None]))[0]
    image, blocks = clip_layers(vision.encoder, image, "image", everything)
    if model.config.places:
        image = image + place_of_each(2, image.shape[1])
    text = model.clip.text_model
    words = text.embeddings(input_ids=ids[None])[0].detach().requires_grad_()
    words, more = clip_layers(text.encoder, words, "words", lambda s, q: q <= s)
    blocks += more
    words = layer_norm(text.final_layer_norm, words)
    image = entrance(model.image_in, image)
    prefix = model.config.prefix
    state = torch.cat([model.prefix, entrance(model.text_in, words)])
    of_question = model.config.task == "vqa"

    def seen(s, q):
        return of_question or q <= s or q < prefix

    for layer in model.layers:
        blocks.append(block_of(layer.image_self, "image", image, None, everything))
        image = blocks[-1].total
        blocks.append(block_of(layer.text_self, "text", state, None, seen))
        state = before = blocks[-1].total
        asked = layer_norm(layer.image_norm, image)
        blocks.append(block_of(layer.text_to_image, "cross", state, asked, everything))
        state = blocks[-1].total
        if layer.image_to_text is not None:
            asked = layer_norm(layer.text_norm, before)
            blocks.append(block_of(layer.image_to_text, "mutual", image, asked, everything))
            image = blocks[-1].total
        if layer.image_mlp is not None:
            image = mlp(layer.image_mlp, image)
        state = mlp(layer.text_mlp, state)
    norm, linear = model.head
    said = state[:1] if of_question else state[prefix:]
    return linear(layer_norm(norm, said)), blocks


def padded(cam, before):
    """A square matrix with so many rows and columns of zeros before it."""
    return np.pad(cam, ((before, 0), (before, 0)))


def relevancy(steps, image_tokens, text_tokens, prefix):
    """What is relevant to each text token: of the image (M, n), of the text (M, M).

    What residual connections alone leave of a token in itself is taken off.

    steps: (kind, averaged attention (S, Q), before (S,), after (S,)) in order.
    """
    image = [np.eye(image_tokens), np.zeros((image_tokens, text_tokens)), np.ones(image_tokens)]
    text = [np.eye(text_tokens), np.zeros((text_tokens, image_tokens)), np.ones(text_tokens)]
    earlier = text
    for kind, cam, before, after in steps:
        if kind == "words":
            cam = padded(cam, prefix)
            before = np.concatenate([np.ones(prefix), before])
            after = np.concatenate([np.ones(prefix), after])
        if kind == "image":
            new = rules.self_attention(image[0], image[1], cam, before, after)
            image = [*new, image[2] * before]
        elif kind in ("text", "words"):
            new = rules.self_attention(text[0], text[1], cam, before, after)
            text = [*new, text[2] * before]
        else:
            own, asked = (text, image) if kind == "cross" else (image, earlier)
            other, attending = rules.cross_attention(
                own[0], own[1], asked[0], asked[1], cam, before, after, own[2], asked[2]
            )[::-1]
            if kind == "cross":
                earlier = text
                text = [attending, other, own[2] * before]
            else:
                image = [attending, other, own[2] * before]
    return text[1], text[0] - np.diag(text[2])


def one_sequence(steps, image_tokens, text_tokens, prefix, combine):
    """As `relevancy`, of image and text as one sequence.

    steps: (kind, attention (S, Q)); combine: (a token's row, its attention, the rows of those that
    are attended to) -> its new row.
    """
    length = image_tokens + text_tokens
    image = list(range(image_tokens))
    text = list(range(image_tokens, length))
    ends = {
        "image": (image, image),
        "words": (text[prefix:], text[prefix:]),
        "text": (text, text),
        "cross": (text, image),
        "mutual": (image, text),
    }
    result = np.eye(length)
    earlier = result
    kept = np.ones(length)
    nothing = np.zeros(length)
    for kind, attention in steps:
        asking, asked = ends[kind]
        source = earlier if kind == "mutual" else result
        new = result.copy()
        for i, row in enumerate(asking):
            new[row] = combine(result[row], attention[i], source[asked])
            alone = np.eye(length)[row] * kept[row]
            kept[row] = combine(alone, attention[i], np.tile(nothing, (len(asked), 1)))[row]
        if kind == "cross":
            earlier = result
        result = new
    result = result - np.diag(kept)
    return result[image_tokens:, :image_tokens], result[image_tokens:, image_tokens:]


def rollout_row(own, attention, asked):
    """(A + I) / 2: the rows of an attention sum to 1."""
    return (own + attention @ asked) / 2


def attribution_row(own, attention, asked):
    """I + A."""
    return own + attention @ asked
