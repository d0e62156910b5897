"""The slow, obvious relevancy of attention that the fast one is tested against, in float64 NumPy.

Each rule is written entry by entry, from the equations of Chefer, Gur and Wolf (2021). There is no
batch. Use it from a test: `import oracle_relevancy`.
"""

import numpy as np


def average_heads(attention, gradient):
    """Eq. 5: (heads, S, Q) each -> (S, Q)."""
    heads, asking, asked = attention.shape
    result = np.zeros((asking, asked))
    for i in range(asking):
        for j in range(asked):
            for h in range(heads):
                result[i, j] += max(0.0, attention[h, i, j] * gradient[h, i, j]) / heads
    return result


def product(a, b):
    """The matrix product, entry by entry."""
    result = np.zeros((a.shape[0], b.shape[1]))
    for i in range(a.shape[0]):
        for j in range(b.shape[1]):
            result[i, j] = sum(a[i, k] * b[k, j] for k in range(a.shape[1]))
    return result


def self_attention(r_ss, r_sq, cam, before, after):
    """Eq. 6 and 7 with weights (S,) of each token; all ones are the paper's rule."""
    w_x = np.diag(before)
    w_a = np.diag(after)
    new_ss = product(w_x, r_ss) + product(w_a, product(cam, r_ss))
    new_sq = product(w_x, r_sq) + product(w_a, product(cam, r_sq))
    return new_ss, new_sq


def normalized(r, kept):
    """Eq. 8 and 9. kept (S,): what residual connections left of the identity."""
    result = np.eye(len(r))
    for i in range(len(r)):
        row = r[i].copy()
        row[i] -= kept[i]
        if row.sum() != 0:
            result[i] += row / row.sum()
    return result


def cross_attention(r_ss, r_sq, r_qq, r_qs, cam, before, after, kept_s, kept_q):
    """Eq. 10 and 11 with weights (S,); all ones are the paper's rule."""
    w_x = np.diag(before)
    weighted = product(np.diag(after), cam)
    left = normalized(r_ss, kept_s).T
    new_sq = product(w_x, r_sq) + product(left, product(weighted, normalized(r_qq, kept_q)))
    new_ss = product(w_x, r_ss) + product(weighted, r_qs)
    return new_ss, new_sq


def norm_weights(residual, added):
    """Reading (A), token by token: (S, D) each -> two (S,)."""
    before = np.zeros(len(residual))
    for i in range(len(residual)):
        x = np.sqrt((residual[i] ** 2).sum())
        o = np.sqrt((added[i] ** 2).sum())
        before[i] = x / (x + o)
    return 2 * before, 2 * (1 - before)


def gradient_weights(residual, added, gradient):
    """Reading (B), token by token: (S, D) each -> two (S,)."""
    before = np.zeros(len(residual))
    for i in range(len(residual)):
        x = 0.0
        o = 0.0
        for d in range(residual.shape[1]):
            x += max(0.0, gradient[i, d] * residual[i, d])
            o += max(0.0, gradient[i, d] * added[i, d])
        before[i] = x / (x + o) if x + o else 0.5
    return 2 * before, 2 * (1 - before)


def rollout(attentions):
    """Abnar and Zuidema: the last layer's matrix comes first in the product."""
    result = np.eye(len(attentions[0]))
    for attention in attentions:
        layer = attention + np.eye(len(attention))
        for i in range(len(layer)):
            layer[i] /= layer[i].sum()
        result = product(layer, result)
    return result


def attention_grad_cam(attention, gradient):
    """Heads weighted by their mean gradient."""
    total = np.zeros(attention.shape[1:])
    for head, slope in zip(attention, gradient):
        total += head * slope.mean() / len(attention)
    return np.maximum(total, 0)


def transformer_attribution(relevances, gradients):
    """The product of I + (gradient * relevance)+, the last layer first."""
    result = np.eye(relevances[0].shape[1])
    for relevance, gradient in zip(relevances, gradients):
        layer = np.eye(len(result)) + average_heads(relevance, gradient)
        result = product(layer, result)
    return result
