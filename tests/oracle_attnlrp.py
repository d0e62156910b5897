"""The slow, obvious AttnLRP of transformers that the fast one is tested against, in float64.

The relevance R itself is carried, operation by operation, as Achtibat et al. (2024) publish the
rules and their library LXT writes them; there is no autograd. A `Tape` remembers the operations of
a forward pass of one input, without a batch. Four transformers are written here once more, from
their weights. Sizes: T tokens, D channels. Use it from a test: `import oracle_attnlrp`.
"""

import math

import torch


class Node:
    """A value and, later, its relevance."""

    def __init__(self, value):
        self.value = value
        self.relevance = torch.zeros_like(value)


class Tape:
    """Operations in the order of the forward pass; `explain` takes them in reverse."""

    def __init__(self, epsilon):
        self.epsilon = epsilon
        self.backward = []

    def over(self, relevance, z):
        """R / (z + epsilon * sign z), with sign 0 = +1."""
        sign = torch.where(z < 0, -1.0, 1.0).to(z)
        return relevance / (z + self.epsilon * sign)

    def record(self, value, backward):
        """A new node; backward: a function that hands its relevance on."""
        node = Node(value)
        self.backward.append(lambda: backward(node.relevance))
        return node

    def explain(self, node, index):
        """The relevance of one entry of `node` is its value; the leaves have theirs afterwards."""
        node.relevance[index] = node.value[index]
        for step in reversed(self.backward):
            step()

    def linear(self, x, weight, bias):
        """Epsilon-rule: R_i = sum_j x_i W_ji R_j / z_j."""
        z = x.value @ weight.T
        z = z if bias is None else z + bias

        def backward(relevance):
            x.relevance += x.value * (self.over(relevance, z) @ weight)

        return self.record(z, backward)

    def add(self, a, b):
        """Epsilon-rule of a sum."""
        z = a.value + b.value

        def backward(relevance):
            a.relevance += a.value * self.over(relevance, z)
            b.relevance += b.value * self.over(relevance, z)

        return self.record(z, backward)

    def add_constant(self, x, constant):
        """The constant keeps its share, and nobody asks for it."""
        z = x.value + constant

        def backward(relevance):
            x.relevance += x.value * relevance / z

        return self.record(z, backward)

    def product(self, a, b):
        """a @ b; each factor gets half: R_ik = sum_j a_ik b_kj R_ij / (2 z_ij)."""
        z = a.value @ b.value

        def backward(relevance):
            shared = self.over(relevance, z) / 2
            a.relevance += a.value * (shared @ b.value.mT)
            b.relevance += b.value * (a.value.mT @ shared)

        return self.record(z, backward)

    def scale(self, x, factor):
        """Relevance does not see a constant factor."""

        def backward(relevance):
            x.relevance += relevance

        return self.record(x.value * factor, backward)

    def softmax(self, x, allowed):
        """Proposition 3.1: R_i = x_i (R_i - s_i sum_j R_j). allowed: which entries take part."""
        s = x.value.masked_fill(~allowed, -torch.inf).softmax(-1)

        def backward(relevance):
            x.relevance += x.value * (relevance - s * relevance.sum(-1, keepdim=True))

        return self.record(s, backward)

    def layer_norm(self, x, weight, bias, eps):
        """y = (x - mean x) / deviation * w + b is linear in x: R_i = x_i sum_j dy_j/dx_i R_j / y_j.

        dy_j/dx_i = (1[i = j] - 1/D) w_j / deviation.
        """
        centred = x.value - x.value.mean(-1, keepdim=True)
        deviation = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        y = centred / deviation * weight + bias
        channels = x.value.shape[-1]
        jacobian = torch.eye(channels, dtype=y.dtype) - 1 / channels

        def backward(relevance):
            x.relevance += x.value * ((self.over(relevance, y) * weight / deviation) @ jacobian)

        return self.record(y, backward)

    def identity(self, x, function):
        """Elementwise functions hand relevance on as it is."""

        def backward(relevance):
            x.relevance += relevance

        return self.record(function(x.value), backward)

    def move(self, x, there, back):
        """Entries change places, or some are picked; back: the way of the relevance."""

        def backward(relevance):
            x.relevance += back(relevance)

        return self.record(there(x.value), backward)

    def heads(self, x, count):
        """(T, D) -> (heads, T, D / heads)."""
        return self.move(
            x,
            lambda value: value.reshape(len(value), count, -1).transpose(0, 1),
            lambda relevance: relevance.transpose(0, 1).reshape(x.value.shape),
        )

    def attention(self, query, key, value, count, causal=False):
        """Multi-head attention of projected tokens: (T, D), (S, D), (S, D) -> (T, D)."""
        key = self.heads(key, count)
        transposed = self.move(key, lambda x: x.mT, lambda relevance: relevance.mT)
        scores = self.product(self.heads(query, count), transposed)
        scores = self.scale(scores, 1 / math.sqrt(key.value.shape[-1]))
        allowed = torch.ones(scores.value.shape[-2:], dtype=torch.bool)
        weights = self.softmax(scores, allowed.tril() if causal else allowed)
        context = self.product(weights, self.heads(value, count))
        return self.move(
            context,
            lambda x: x.transpose(0, 1).flatten(1),
            lambda relevance: relevance.reshape(len(relevance), count, -1).transpose(0, 1),
        )

    def columns(self, x, part, parts):
        """One of so many equal parts of the channels: (T, D) -> (T, D / parts)."""

        def back(relevance):
            whole = torch.zeros_like(x.value)
            whole.chunk(parts, dim=1)[part].copy_(relevance)
            return whole

        return self.move(x, lambda value: value.chunk(parts, dim=1)[part], back)

    def first(self, x):
        """The first token only: (T, D) -> (1, D)."""

        def back(relevance):
            rest = torch.zeros_like(x.value[1:])
            return torch.cat([relevance, rest])

        return self.move(x, lambda value: value[:1], back)


class Layers:
    """A state dict's layers, by name, on a tape."""

    def __init__(self, tape, weights, eps):
        self.tape = tape
        self.weights = weights
        self.eps = eps

    def linear(self, name, x):
        """A torch.nn.Linear."""
        weight = self.weights[f"{name}.weight"]
        return self.tape.linear(x, weight, self.weights.get(f"{name}.bias"))

    def conv1d(self, name, x):
        """A linear layer as GPT-2 keeps it, transposed."""
        weight = self.weights[f"{name}.weight"].T
        return self.tape.linear(x, weight, self.weights[f"{name}.bias"])

    def norm(self, name, x):
        """A torch.nn.LayerNorm."""
        weight = self.weights[f"{name}.weight"]
        return self.tape.layer_norm(x, weight, self.weights[f"{name}.bias"], self.eps)

    def bert_attention(self, name, x, memory, heads, causal=False):
        """Attention, residual connection and norm of BERT."""
        query = self.linear(f"{name}.self.query", x)
        key = self.linear(f"{name}.self.key", memory)
        value = self.linear(f"{name}.self.value", memory)
        context = self.tape.attention(query, key, value, heads, causal)
        added = self.linear(f"{name}.output.dense", context)
        return self.norm(f"{name}.output.LayerNorm", self.tape.add(added, x))

    def bert_feed_forward(self, name, x):
        """The other half of a layer of BERT."""
        hidden = self.linear(f"{name}.intermediate.dense", x)
        hidden = self.tape.identity(hidden, torch.nn.functional.gelu)
        added = self.linear(f"{name}.output.dense", hidden)
        return self.norm(f"{name}.output.LayerNorm", self.tape.add(added, x))


def bert(layers, embeddings, depth, heads):
    """BertForSequenceClassification: word embeddings (T, D), a Node -> logits (1, classes)."""
    tape = layers.tape
    name = "bert.embeddings"
    kinds = layers.weights[f"{name}.token_type_embeddings.weight"][0]
    places = layers.weights[f"{name}.position_embeddings.weight"][: len(embeddings.value)]
    x = layers.norm(f"{name}.LayerNorm", tape.add_constant(embeddings, kinds + places))
    for layer in range(depth):
        name = f"bert.encoder.layer.{layer}"
        x = layers.bert_attention(f"{name}.attention", x, x, heads)
        x = layers.bert_feed_forward(name, x)
    pooled = layers.linear("bert.pooler.dense", tape.first(x))
    return layers.linear("classifier", tape.identity(pooled, torch.tanh))


def vit(layers, image, depth, heads):
    """ViTForImageClassification: an image (3, S, S), a Node -> logits (1, classes)."""
    tape = layers.tape
    name = "vit.embeddings"
    weight = layers.weights[f"{name}.patch_embeddings.projection.weight"]
    side = weight.shape[-1]
    size = image.value.shape[1:]
    unfolded = tape.move(
        image,
        lambda x: torch.nn.functional.unfold(x[None], side, stride=side)[0].T,
        lambda x: torch.nn.functional.fold(x.T[None], size, side, stride=side)[0],
    )
    bias = layers.weights[f"{name}.patch_embeddings.projection.bias"]
    patches = tape.linear(unfolded, weight.flatten(1), bias)
    class_token = layers.weights[f"{name}.cls_token"][0]
    tokens = tape.move(patches, lambda x: torch.cat([class_token, x]), lambda x: x[1:])
    x = tape.add_constant(tokens, layers.weights[f"{name}.position_embeddings"][0])
    for layer in range(depth):
        name = f"vit.encoder.layer.{layer}"
        normed = layers.norm(f"{name}.layernorm_before", x)
        parts = []
        for part in ("query", "key", "value"):
            parts.append(layers.linear(f"{name}.attention.attention.{part}", normed))
        added = layers.linear(f"{name}.attention.output.dense", tape.attention(*parts, heads))
        x = tape.add(added, x)
        hidden = layers.linear(
            f"{name}.intermediate.dense", layers.norm(f"{name}.layernorm_after", x)
        )
        hidden = tape.identity(hidden, torch.nn.functional.gelu)
        x = tape.add(layers.linear(f"{name}.output.dense", hidden), x)
    return layers.linear("classifier", tape.first(layers.norm("vit.layernorm", x)))


def gpt2(layers, embeddings, depth, heads):
    """GPT2LMHeadModel: word embeddings (T, D), a Node -> logits (T, V)."""
    tape = layers.tape
    places = layers.weights["transformer.wpe.weight"][: len(embeddings.value)]
    x = tape.add_constant(embeddings, places)
    for layer in range(depth):
        name = f"transformer.h.{layer}"
        joint = layers.conv1d(f"{name}.attn.c_attn", layers.norm(f"{name}.ln_1", x))
        parts = [tape.columns(joint, part, 3) for part in range(3)]
        context = tape.attention(*parts, heads, causal=True)
        x = tape.add(layers.conv1d(f"{name}.attn.c_proj", context), x)
        hidden = layers.conv1d(f"{name}.mlp.c_fc", layers.norm(f"{name}.ln_2", x))
        hidden = tape.identity(
            hidden, lambda value: torch.nn.functional.gelu(value, approximate="tanh")
        )
        x = tape.add(layers.conv1d(f"{name}.mlp.c_proj", hidden), x)
    return layers.linear("lm_head", layers.norm("transformer.ln_f", x))


def blip(layers, embeddings, memory, depth, heads):
    """BlipTextLMHeadModel: word embeddings (T, D), image tokens (L, D), Nodes -> logits (T, V)."""
    tape = layers.tape
    name = "bert.embeddings"
    places = layers.weights[f"{name}.position_embeddings.weight"][: len(embeddings.value)]
    x = layers.norm(f"{name}.LayerNorm", tape.add_constant(embeddings, places))
    for layer in range(depth):
        name = f"bert.encoder.layer.{layer}"
        x = layers.bert_attention(f"{name}.attention", x, x, heads, causal=True)
        x = layers.bert_attention(f"{name}.crossattention", x, memory, heads)
        x = layers.bert_feed_forward(name, x)
    x = layers.linear("cls.predictions.transform.dense", x)
    x = tape.identity(x, torch.nn.functional.gelu)
    x = layers.norm("cls.predictions.transform.LayerNorm", x)
    return layers.linear("cls.predictions.decoder", x)
