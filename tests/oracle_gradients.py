"""The slow, obvious gradient explanations that fast ones are tested against.

One image, one word and one backward at a time: `explain_words` gives, for every method by its
definition, the relevance of pixels, regions and words. The decoders are written here once more from
their equations, in plain float64 PyTorch on a state dict; only the encoder is the module under
test, since it is torchvision's own layers. Sizes: T words, L regions, D feature channels,
E embedding, H hidden, V vocabulary, N heads, t the word explained. Use it from a test:
`from oracle_gradients import explain_words`.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.inception import BasicConv2d


def affine(params, name, x):
    """The nn.Linear `name` of x (..., in), which may have no bias: (..., out)."""
    return F.linear(x, params[f"{name}.weight"], params.get(f"{name}.bias"))


def lstm_step(params, name, x, h, m):
    """One LSTM step: the next h and m, both (H,).

    `name` is a pattern such as "lstm.{}_l0" or "attention_lstm.{}".
    """
    weight_ih = params[name.format("weight_ih")]
    weight_hh = params[name.format("weight_hh")]
    bias_ih = params[name.format("bias_ih")]
    bias_hh = params[name.format("bias_hh")]
    i, f, g, o = (weight_ih @ x + bias_ih + weight_hh @ h + bias_hh).chunk(4)
    m = torch.sigmoid(f) * m + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(m), m


def sentinel(params, x, h_previous, m):
    """The visual sentinel s_t (H,): what the cell m_t knows, behind a gate of x_t and h_{t-1}."""
    gate = torch.sigmoid(
        affine(params, "sentinel_input", x) + affine(params, "sentinel_hidden", h_previous)
    )
    return gate * torch.tanh(m)


def adaptive_attention(params, v, s, h):
    """The context c_hat = (1 - beta) sum alpha v + beta s (H,) and alpha (1, L).

    From the regions v (L, H), the sentinel s (H,) and the state h (H,).
    """
    query = affine(params, "attention_hidden", h)
    keys = affine(params, "attention_visual", v)
    sentinel_key = affine(params, "attention_sentinel", s)
    a = affine(params, "attention_score", torch.tanh(keys + query))[:, 0]
    b = affine(params, "attention_score", torch.tanh(sentinel_key + query))
    alpha = torch.softmax(a, 0)
    beta = torch.softmax(torch.cat([a, b]), 0)[-1]
    return (1 - beta) * (alpha @ v) + beta * s, alpha[None]


def projections(params, features):
    """The regions v (L, H) and the global v_g (E,) of the captioners with a sentinel.

    From the features (L, D).
    """
    v = torch.relu(affine(params, "image_projection", features))
    return v, torch.relu(affine(params, "global_projection", features.mean(0)))


def adaptive_logits(params, features, embeddings, heads):
    """The adaptive captioner: the last word's logits (V,) and alpha (1, L).

    From the features (L, D) and the embeddings (t+1, E).
    """
    v, v_g = projections(params, features)
    h = m = torch.zeros_like(v[0])
    for embedding in embeddings:
        x = torch.cat([embedding, v_g])
        h_previous = h
        h, m = lstm_step(params, "lstm.{}_l0", x, h, m)
    c_hat, alpha = adaptive_attention(params, v, sentinel(params, x, h_previous, m), h)
    return affine(params, "fc", c_hat + h), alpha


def gridtd_logits(params, features, embeddings, heads):
    """The grid-TD captioner, whose second LSTM reads the attended context.

    Arguments and results are those of `adaptive_logits`.
    """
    v, v_g = projections(params, features)
    h1 = m1 = h2 = m2 = torch.zeros_like(v[0])
    for embedding in embeddings:
        x = torch.cat([h2, v_g, embedding])
        h_previous = h1
        h1, m1 = lstm_step(params, "attention_lstm.{}", x, h1, m1)
        c_hat, alpha = adaptive_attention(params, v, sentinel(params, x, h_previous, m1), h1)
        h2, m2 = lstm_step(params, "language_lstm.{}", torch.cat([c_hat, h1]), h2, m2)
    return affine(params, "fc", c_hat + h2), alpha


def aoa_logits(params, features, embeddings, heads):
    """The captioner with N attention heads.

    Arguments and results are those of `adaptive_logits`, but alpha is (N, L).
    """
    v = torch.relu(affine(params, "image_projection", features))
    h = m = torch.zeros_like(v[0])
    for embedding in embeddings:
        h, m = lstm_step(params, "lstm.{}_l0", torch.cat([embedding, v.mean(0)]), h, m)
    query = affine(params, "query", h)
    keys = affine(params, "key", v)
    values = affine(params, "value", v)
    d = len(query) // heads
    alpha = []
    context = []
    for n in range(heads):
        own = slice(n * d, (n + 1) * d)
        alpha.append(torch.softmax(keys[:, own] @ query[own] / math.sqrt(d), 0))
        context.append(alpha[n] @ values[:, own])
    gate = torch.sigmoid(affine(params, "context_gate", h))
    c = gate * affine(params, "context_projection", torch.cat(context))
    return affine(params, "fc", c + h), torch.stack(alpha)


def soft_logits(params, features, embeddings, heads):
    """The captioner with soft attention.

    Arguments and results are those of `adaptive_logits`.
    """
    mean = features.mean(0)
    h = torch.tanh(affine(params, "initial_hidden", mean))
    m = torch.tanh(affine(params, "initial_cell", mean))
    keys = affine(params, "image_projection", features)
    for embedding in embeddings:
        query = affine(params, "attention_hidden", h)
        alpha = torch.softmax(affine(params, "attention_score", torch.tanh(keys + query))[:, 0], 0)
        z = torch.sigmoid(affine(params, "context_gate", h)) * (alpha @ features)
        h, m = lstm_step(params, "lstm.{}", torch.cat([embedding, z]), h, m)
    output = affine(params, "hidden_output", h) + affine(params, "context_output", z)
    return affine(params, "fc", embedding + output), alpha[None]


DECODERS = {
    "adaptive": adaptive_logits,
    "gridtd": gridtd_logits,
    "aoa": aoa_logits,
    "soft": soft_logits,
}


class _GuidedReLU(torch.autograd.Function):
    """ReLU whose gradient passes only where it and the output are positive.

    Springenberg et al. (2015).
    """

    @staticmethod
    def forward(ctx, x):
        y = x.clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return torch.where((y > 0) & (gradient > 0), gradient, 0)


class GuidedReLU(nn.Module):
    """The same as a layer."""

    def forward(self, x):
        """x of any shape."""
        return _GuidedReLU.apply(x)


def with_relus(module, make):
    """A copy of the encoder with make() in place of every ReLU.

    This includes the ReLUs that are hidden in Inception's BasicConv2d.
    """
    if isinstance(module, nn.ReLU):
        return make()
    if isinstance(module, BasicConv2d):
        return nn.Sequential(copy.deepcopy(module.conv), copy.deepcopy(module.bn), make())
    replaced = copy.copy(module)
    replaced._modules = {name: with_relus(child, make) for name, child in module.named_children()}
    return replaced


def word_gradients(decode, params, encoder, heads, image, tokens, target):
    """All that the methods need, for the logit `target` that follows the t+1 input ids `tokens`.

    image (3, H, W). Returns "score", "image", "pixel_gradient" and "guided_gradient" (3, H, W),
    "features" and "feature_gradient" (L, D), "embeddings" and "embedding_gradient" (t+1, E), and
    "attention" (N, L).
    """
    image = image.clone().requires_grad_()
    features = encoder(image[None])[0]
    embeddings = params["embedding.weight"][tokens].clone().requires_grad_()
    logits, alpha = decode(params, features, embeddings, heads)
    pixel, feature, embedding = torch.autograd.grad(logits[target], [image, features, embeddings])
    guided_features = with_relus(encoder, GuidedReLU)(image[None])[0]
    # A copy that computes something else would explain something else.
    torch.testing.assert_close(guided_features, features)
    (guided,) = torch.autograd.grad(guided_features, image, feature)
    found = {
        "score": logits[target],
        "image": image,
        "pixel_gradient": pixel,
        "guided_gradient": guided,
        "features": features,
        "feature_gradient": feature,
        "embeddings": embeddings,
        "embedding_gradient": embedding,
        "attention": alpha,
    }
    return {name: value.detach() for name, value in found.items()}


def enlarged(regions, grid, size):
    """A map of the regions (L,), row by row, bilinearly enlarged to size (H, W).

    Corners are not aligned.
    """
    return F.interpolate(
        regions.reshape(1, 1, *grid), size=size, mode="bilinear", align_corners=False
    )[0, 0]


def words_gradient(word):
    """The gradient of each embedding, summed over its E dimensions: (t+1,)."""
    return word["embedding_gradient"].sum(1)


def gradient(word, grid):
    """The gradient itself, summed over channels."""
    return word["pixel_gradient"].sum(0), word["feature_gradient"].sum(1), words_gradient(word)


def input_x_gradient(word, grid):
    """The gradient times what it is the gradient to, summed over channels."""
    return (
        (word["image"] * word["pixel_gradient"]).sum(0),
        (word["features"] * word["feature_gradient"]).sum(1),
        (word["embeddings"] * word["embedding_gradient"]).sum(1),
    )


def class_activation(word):
    """Grad-CAM (Selvaraju et al. 2017): (L,).

    With w_k the mean gradient of channel k it is ReLU(sum_k w_k A_pk) for region p.
    """
    features = word["features"]
    weights = [word["feature_gradient"][:, k].mean() for k in range(features.shape[1])]
    return sum(weight * features[:, k] for k, weight in enumerate(weights)).clamp(min=0)


def gradcam(word, grid):
    """Grad-CAM, enlarged to the image."""
    cam = class_activation(word)
    return enlarged(cam, grid, word["image"].shape[1:]), cam, words_gradient(word)


def guided_backprop(word, grid):
    """The decoder's gradient, sent through the encoder with guided ReLUs."""
    return word["guided_gradient"].sum(0), word["feature_gradient"].sum(1), words_gradient(word)


def guided_gradcam(word, grid):
    """Guided backpropagation times enlarged Grad-CAM."""
    cam = class_activation(word)
    return (
        word["guided_gradient"].sum(0) * enlarged(cam, grid, word["image"].shape[1:]),
        cam,
        words_gradient(word),
    )


def attention(word, grid):
    """The attention, mean over heads; it says nothing of words."""
    alpha = sum(word["attention"]) / len(word["attention"])
    return (
        enlarged(alpha, grid, word["image"].shape[1:]),
        alpha,
        torch.zeros(len(word["embeddings"])),
    )


REFERENCES = {
    "gradient": gradient,
    "input_x_gradient": input_x_gradient,
    "gradcam": gradcam,
    "guided_backprop": guided_backprop,
    "guided_gradcam": guided_gradcam,
    "attention": attention,
}


def all_word_gradients(model_type, params, encoder, heads, image, ids, start):
    """`word_gradients` of every word of the caption `ids` of one image, a list of T."""
    inputs = [start, *ids[:-1]]
    return [
        word_gradients(DECODERS[model_type], params, encoder, heads, image, inputs[: t + 1], target)
        for t, target in enumerate(ids)
    ]


def explain_words(method, words, grid):
    """The relevance of pixels (T, H, W), regions (T, L) and input words (T, T).

    words: the T results of `word_gradients`.
    """
    images = []
    regions = []
    inputs = torch.zeros(len(words), len(words), dtype=torch.float64)
    for t, word in enumerate(words):
        image, region, inputs[t, : t + 1] = REFERENCES[method](word, grid)
        images.append(image)
        regions.append(region)
    return torch.stack(images), torch.stack(regions), inputs
