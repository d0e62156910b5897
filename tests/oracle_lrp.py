"""The slow, obvious LRP that fast implementations are tested against, in float64 NumPy.

The relevance R is carried from layer to layer. `gridtd_lrp` explains words of the grid-TD captioner
down to its region features and input words (Algorithm 1 of Sun et al., arXiv 2001.01037v3);
`encoder_lrp` goes on from the features to the pixels (Bach et al. 2015, alpha1-beta0). There is no
autograd here: each formula is written as one reads it. Sizes: T words, L regions, D feature
channels, E embedding, H hidden, V vocabulary. Use it from a test:
`from oracle_lrp import gridtd_lrp, encoder_lrp`.
"""

import numpy as np


def ratio(relevance, z, epsilon):
    """R / (z + epsilon * sign z) with sign 0 = +1.

    It is 0 where that denominator is 0, which is only possible with epsilon = 0.
    """
    denominator = z + epsilon * np.where(z >= 0, 1.0, -1.0)
    return np.divide(relevance, denominator, out=np.zeros_like(denominator), where=denominator != 0)


def share(relevance, part, total, epsilon):
    """Epsilon-rule of an elementwise sum: what the addend `part` gets of the total's relevance."""
    return part * ratio(relevance, total, epsilon)


def linear(relevance, x, weight, z, epsilon):
    """Epsilon-rule of z = weight x + bias: R_k = sum_j x_k W_jk R_j / stabilised z_j.

    The bias keeps its share.
    """
    return x * (weight.T @ ratio(relevance, z, epsilon))


def sigmoid(x):
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


def softmax(x):
    """Softmax of a vector."""
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def in_float64(params):
    """The state_dict (tensors or arrays) as float64 arrays."""
    return {name: np.asarray(value, dtype=np.float64) for name, value in params.items()}


def lstm_step(params, name, x, h_previous, c_previous):
    """One nn.LSTMCell step.

    Returns its inputs, its gates i, f, o (after their sigmoid), g (before its tanh), c and h.
    """
    z = (
        params[f"{name}.weight_ih"] @ x
        + params[f"{name}.bias_ih"]
        + params[f"{name}.weight_hh"] @ h_previous
        + params[f"{name}.bias_hh"]
    )
    i, f, g, o = np.split(z, 4)
    i = sigmoid(i)
    f = sigmoid(f)
    o = sigmoid(o)
    c = f * c_previous + i * np.tanh(g)
    return {
        "x": x,
        "h_previous": h_previous,
        "c_previous": c_previous,
        "i": i,
        "f": f,
        "g": g,
        "o": o,
        "c": c,
        "h": o * np.tanh(c),
    }


def attend(params, v, h1, s):
    """Attention over regions v (L,H) and sentinel s (H,), eq. 2-7.

    Returns alpha (L,), beta, and the contexts c and c_hat (H,).
    """
    query = params["attention_hidden.weight"] @ h1
    score = params["attention_score.weight"][0]
    a = np.zeros(len(v))
    for i, v_i in enumerate(v):
        key = params["attention_visual.weight"] @ v_i + params["attention_visual.bias"]
        a[i] = score @ np.tanh(key + query)
    sentinel_key = params["attention_sentinel.weight"] @ s + params["attention_sentinel.bias"]
    b = score @ np.tanh(sentinel_key + query)
    alpha = softmax(a)
    beta = softmax(np.append(a, b))[-1]
    c = sum(alpha[i] * v_i for i, v_i in enumerate(v))
    return {"alpha": alpha, "beta": beta, "c": c, "c_hat": (1 - beta) * c + beta * s}


def word_step(params, v, v_g, token, cell1, cell2):
    """One time step, from what `lstm_step` returned for both cells at the previous one.

    Returns what it returns now, what `attend` returns, s, its gate, z and the logits.
    """
    x1 = np.concatenate([cell2["h"], v_g, params["embedding.weight"][token]])
    sentinel_gate = sigmoid(
        params["sentinel_input.weight"] @ x1
        + params["sentinel_input.bias"]
        + params["sentinel_hidden.weight"] @ cell1["h"]
        + params["sentinel_hidden.bias"]
    )
    cell1 = lstm_step(params, "attention_lstm", x1, cell1["h"], cell1["c"])
    s = sentinel_gate * np.tanh(cell1["c"])
    attention = attend(params, v, cell1["h"], s)
    x2 = np.concatenate([attention["c_hat"], cell1["h"]])
    cell2 = lstm_step(params, "language_lstm", x2, cell2["h"], cell2["c"])
    z = attention["c_hat"] + cell2["h"]
    return {
        "attention_lstm": cell1,
        "language_lstm": cell2,
        "s": s,
        "sentinel_gate": sentinel_gate,
        **attention,
        "z": z,
        "logits": params["fc.weight"] @ z + params["fc.bias"],
    }


def gridtd_forward(params, features, tokens):
    """Teacher-forced forward of one image: features (L,D), tokens the T input ids from <start> on.

    Returns of the image "a" (L,D), "mean" (D,), "v_before" its ReLU and "v" (L,H), "v_g_before" and
    "v_g" (E,); "steps", for each step a dictionary of all intermediates (see `word_step`); and of
    those, stacked, "logits" (T,V), "alpha" (T,L) and "beta" (T,).
    """
    params = in_float64(params)
    a = np.asarray(features, dtype=np.float64)
    mean = sum(a) / len(a)
    v_before = np.stack(
        [params["image_projection.weight"] @ a_i + params["image_projection.bias"] for a_i in a]
    )
    v_g_before = params["global_projection.weight"] @ mean + params["global_projection.bias"]
    v = np.maximum(v_before, 0)
    v_g = np.maximum(v_g_before, 0)
    zero = np.zeros(v.shape[1])
    cell1 = cell2 = {"h": zero, "c": zero}
    steps = []
    for token in tokens:
        steps.append(word_step(params, v, v_g, int(token), cell1, cell2))
        cell1 = steps[-1]["attention_lstm"]
        cell2 = steps[-1]["language_lstm"]
    stacked = {
        name: np.stack([step[name] for step in steps]) for name in ("logits", "alpha", "beta")
    }
    return {
        "a": a,
        "mean": mean,
        "v_before": v_before,
        "v": v,
        "v_g_before": v_g_before,
        "v_g": v_g,
        "steps": steps,
        **stacked,
    }


def lstm_lrp(params, name, cell, R_c, epsilon):
    """One step of LRP-LSTM (Arras et al. 2017): R(c_t) (H,) -> R(x_t), R(h_{t-1}), R(c_{t-1}).

    The gates get nothing.
    """
    # R(tanh g) passes to g as it is.
    R_g = share(R_c, cell["i"] * np.tanh(cell["g"]), cell["c"], epsilon)
    R_c_previous = share(R_c, cell["f"] * cell["c_previous"], cell["c"], epsilon)
    rows = slice(2 * len(R_c), 3 * len(R_c))  # gate order i, f, g, o
    R_x = linear(R_g, cell["x"], params[f"{name}.weight_ih"][rows], cell["g"], epsilon)
    R_h_previous = linear(
        R_g, cell["h_previous"], params[f"{name}.weight_hh"][rows], cell["g"], epsilon
    )
    return R_x, R_h_previous, R_c_previous


def context_lrp(v, step, R_c_hat, epsilon):
    """The adaptive module: R(c_hat_t) -> R(s_t) (H,), R(v) (L,H).

    First comes c_hat = (1-beta) c + beta s, then the sum c.
    """
    R_s = share(R_c_hat, step["beta"] * step["s"], step["c_hat"], epsilon)
    R_c = share(R_c_hat, (1 - step["beta"]) * step["c"], step["c_hat"], epsilon)
    R_v = np.stack(
        [share(R_c, step["alpha"][i] * v_i, step["c"], epsilon) for i, v_i in enumerate(v)]
    )
    return R_s, R_v


def image_lrp(params, forward, R_v, R_v_g, epsilon):
    """R(v) (L,H) and R(v_g) (E,) -> R(a) (L,D); both ReLUs pass."""
    R_mean = linear(
        R_v_g, forward["mean"], params["global_projection.weight"], forward["v_g_before"], epsilon
    )
    R_a = np.zeros_like(forward["a"])
    for i, a_i in enumerate(forward["a"]):
        R_a[i] += share(R_mean, a_i / len(R_a), forward["mean"], epsilon)
        R_a[i] += linear(
            R_v[i], a_i, params["image_projection.weight"], forward["v_before"][i], epsilon
        )
    return R_a


def word_lrp(params, forward, last, target, epsilon):
    """Algorithm 1 for logit `target` of step `last`: R(a) (L,D) and R of the inputs 0..last."""
    steps = forward["steps"]
    H = forward["v"].shape[1]
    E = len(forward["v_g"])
    # One row a step; every source adds.
    R_h1, R_c1, R_h2, R_c2, R_c_hat = np.zeros((5, last + 1, H))
    R_v = np.zeros_like(forward["v"])
    R_v_g = np.zeros(E)
    R_word = np.zeros(last + 1)

    R_c_hat_last, R_h2_last = logit_lrp(params, steps[last], target, epsilon)
    R_c_hat[last] += R_c_hat_last
    R_h2[last] += R_h2_last

    for t in range(last, -1, -1):
        R_c2[t] += R_h2[t]
        language_cell = steps[t]["language_lstm"]
        R_x2, R_h2_back, R_c2_back = lstm_lrp(
            params, "language_lstm", language_cell, R_c2[t], epsilon
        )
        R_c_hat[t] += R_x2[:H]
        R_h1[t] += R_x2[H:]

        R_s, R_v_t = context_lrp(forward["v"], steps[t], R_c_hat[t], epsilon)
        R_v += R_v_t

        R_c1[t] += R_h1[t] + R_s
        attention_cell = steps[t]["attention_lstm"]
        R_x1, R_h1_back, R_c1_back = lstm_lrp(
            params, "attention_lstm", attention_cell, R_c1[t], epsilon
        )
        R_v_g += R_x1[H : H + E]
        R_word[t] = R_x1[H + E :].sum()
        if t > 0:  # the states before <start> are zero, so is their relevance
            R_h2[t - 1] += R_h2_back + R_x1[:H]
            R_c2[t - 1] += R_c2_back
            R_h1[t - 1] += R_h1_back
            R_c1[t - 1] += R_c1_back
    return image_lrp(params, forward, R_v, R_v_g, epsilon), R_word


def logit_lrp(params, step, target, epsilon):
    """The logit `target` of one step -> R(c_hat), R(h2) (H,), through fc and z = c_hat + h2."""
    logits = step["logits"]
    z = step["z"]
    R_logits = np.where(np.arange(len(logits)) == target, logits, 0)
    R_z = linear(R_logits, z, params["fc.weight"], logits, epsilon)
    R_c_hat = share(R_z, step["c_hat"], z, epsilon)
    R_h2 = share(R_z, step["language_lstm"]["h"], z, epsilon)
    return R_c_hat, R_h2


def gridtd_lrp(params, features, tokens, targets, epsilon=0.01):
    """LRP of the logits `targets` (T ids), one for each of the T input ids `tokens` of one image.

    features (L,D). Returns feature_relevance (T,L,D), word_relevance (T,T) (row t: inputs 0..t,
    <start> first, zeros above the diagonal) and scores (T,), the explained logits.
    """
    params = in_float64(params)
    forward = gridtd_forward(params, features, tokens)
    feature_relevance = np.zeros((len(tokens), *forward["a"].shape))
    word_relevance = np.zeros((len(tokens), len(tokens)))
    scores = np.zeros(len(tokens))
    for t, target in enumerate(targets):
        scores[t] = forward["logits"][t, int(target)]
        feature_relevance[t], word_relevance[t, : t + 1] = word_lrp(
            params, forward, t, int(target), epsilon
        )
    return feature_relevance, word_relevance, scores


def windows(shape, kernel, stride):
    """For each kernel offset (i, j): i, j and the slices of a (C,H,W) array that it touches.

    They hold one element for each output pixel.
    """
    kh, kw = np.broadcast_to(kernel, 2)
    sh, sw = np.broadcast_to(stride, 2)
    h = (shape[1] - kh) // sh + 1
    w = (shape[2] - kw) // sw + 1
    for i in range(kh):
        rows = slice(i, i + sh * (h - 1) + 1, sh)
        for j in range(kw):
            columns = slice(j, j + sw * (w - 1) + 1, sw)
            yield i, j, (slice(None), rows, columns)


def pad(x, padding):
    """x (C,H,W) with zeros around it."""
    ph, pw = np.broadcast_to(padding, 2)
    return np.pad(x, ((0, 0), (ph, ph), (pw, pw)))


def conv(x, weight, stride, padding):
    """Convolution without bias: x (C,H,W), weight (O,C,kh,kw) -> (O,h,w)."""
    x = pad(x, padding)
    return sum(
        np.tensordot(weight[:, :, i, j], x[at], 1)
        for i, j, at in windows(x.shape, weight.shape[2:], stride)
    )


def conv_transposed(y, weight, stride, padding, shape):
    """The transpose of `conv`: y (O,h,w) -> (C,H,W) = shape."""
    x = pad(np.zeros(shape), padding)
    for i, j, at in windows(x.shape, weight.shape[2:], stride):
        x[at] += np.tensordot(weight[:, :, i, j].T, y, 1)
    ph, pw = np.broadcast_to(padding, 2)
    return x[:, ph : ph + shape[1], pw : pw + shape[2]]


def conv_lrp(x, R, weight, stride, padding):
    """alpha1-beta0: only positive products x w count, those of negative x and negative w too.

    There is no bias in z.
    """
    positive = (np.maximum(x, 0), np.maximum(weight, 0))
    negative = (np.minimum(x, 0), np.minimum(weight, 0))
    parts = [positive, negative]
    z = sum(conv(x_part, w_part, stride, padding) for x_part, w_part in parts)
    quotient = np.divide(R, z, out=np.zeros_like(z), where=z != 0)
    return sum(
        x_part * conv_transposed(quotient, w_part, stride, padding, x.shape)
        for x_part, w_part in parts
    )


def maxpool(x, kernel, stride):
    """Max-pooling without padding: x (C,H,W) -> (C,h,w)."""
    return np.max([x[at] for _, _, at in windows(x.shape, kernel, stride)], axis=0)


def maxpool_lrp(x, R, kernel, stride):
    """Winner takes all; of equal values the first in reading order wins, as in PyTorch."""
    R_x = np.zeros_like(x)
    best = maxpool(x, kernel, stride)
    left = np.ones(R.shape, dtype=bool)
    for _, _, at in windows(x.shape, kernel, stride):
        wins = left & (x[at] == best)
        R_x[at] += np.where(wins, R, 0)
        left &= ~wins
    return R_x


def encoder_forward(layers, image):
    """The input of every layer and, last, the output.

    `encoder_lrp` says what layers are. ValueError for a layer of unknown kind.
    """
    values = [np.asarray(image, dtype=np.float64)]
    for kind, *settings in layers:
        if kind == "conv":
            weight, bias, stride, padding = settings
            y = conv(values[-1], np.asarray(weight, dtype=np.float64), stride, padding)
            if bias is not None:
                y = y + np.asarray(bias, dtype=np.float64)[:, None, None]
            values.append(y)
        elif kind == "relu":
            values.append(np.maximum(values[-1], 0))
        elif kind == "maxpool":
            values.append(maxpool(values[-1], *settings))
        else:
            raise ValueError(f"unknown layer {kind!r}")
    return values


def encoder_lrp(layers, image, R_out):
    """R_out (C,h,w) at the output of a VGG-like chain -> R_image, shaped like image (3,H,W).

    layers: ("conv", weight (O,C,kh,kw), bias (O,) or None, stride, padding), ("relu",) or
    ("maxpool", kernel, stride). The first layer has no rule of its own.
    """
    R = np.asarray(R_out, dtype=np.float64)
    inputs = encoder_forward(layers, image)
    for (kind, *settings), x in reversed(list(zip(layers, inputs))):
        if kind == "conv":
            weight, _, stride, padding = settings
            R = conv_lrp(x, R, np.asarray(weight, dtype=np.float64), stride, padding)
        elif kind == "maxpool":
            R = maxpool_lrp(x, R, *settings)  # ReLU passes R as it is
    return R
