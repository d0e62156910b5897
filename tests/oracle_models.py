"""The slow, obvious LRP of `oracle_lrp` for the other captioners and for branched encoders.

`adaptive_lrp`, `aoa_lrp` and `soft_lrp` explain words down to region features and input words as
`gridtd_lrp` does; here that function takes a mask of real regions too. `graph_lrp` goes on to the
pixels through chains, concatenations and residual sums (SqueezeNet, ResNet, Inception). All is
float64 NumPy without autograd. Sizes: T words, L regions, D feature channels, E embedding,
H hidden, V vocabulary, N heads. Use it from a test: `from oracle_models import aoa_lrp, graph_lrp`.
"""

import math

import numpy as np
import oracle_lrp
from oracle_lrp import (
    attend,
    context_lrp,
    conv,
    conv_lrp,
    image_lrp,
    in_float64,
    linear,
    lstm_lrp,
    lstm_step,
    maxpool,
    maxpool_lrp,
    ratio,
    share,
    sigmoid,
    softmax,
    windows,
)


def as_cell(params):
    """The state_dict in float64, nn.LSTM's `lstm.*_l0` renamed as an nn.LSTMCell's, `lstm.*`."""
    return {name.removesuffix("_l0"): value for name, value in in_float64(params).items()}


def affine(params, name, x):
    """The nn.Linear `name` of x (..., in): (..., out)."""
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def real_regions(features, mask):
    """Features (L,D) in float64 without the rows where mask (L,) is False.

    ValueError for a mask of wrong shape or type, or one that leaves nothing.
    """
    features = np.asarray(features, dtype=np.float64)
    mask = np.ones(len(features), dtype=bool) if mask is None else np.asarray(mask)
    if mask.dtype != bool or mask.shape != (len(features),) or not mask.any():
        raise ValueError("the mask needs one boolean a region, at least one of them True")
    return features[mask]


def put_back(values, mask, axis):
    """Zeros at the padded regions of an array that has the real ones along `axis`."""
    if mask is None:
        return values
    mask = np.asarray(mask)
    full = np.zeros((*values.shape[:axis], len(mask), *values.shape[axis + 1 :]))
    full[(slice(None),) * axis + (mask,)] = values
    return full


def gridtd_forward(params, features, tokens, *, mask=None):
    """`oracle_lrp.gridtd_forward` of the real regions.

    "alpha" is (T,L) with zeros at padded regions; the other values lack them. mask: (L,) booleans,
    True = a real region; None = all are.
    """
    forward = oracle_lrp.gridtd_forward(params, real_regions(features, mask), tokens)
    return {**forward, "alpha": put_back(forward["alpha"], mask, 1)}


def gridtd_lrp(params, features, tokens, targets, epsilon=0.01, *, mask=None):
    """`oracle_lrp.gridtd_lrp` of the real regions (mask (L,)); padded ones get relevance 0."""
    R_a, R_word, scores = oracle_lrp.gridtd_lrp(
        params, real_regions(features, mask), tokens, targets, epsilon
    )
    return put_back(R_a, mask, 1), R_word, scores


def lstm_words(params, v_g, tokens):
    """One `lstm_step` a token of the LSTM over x_t = [embedding; v_g], from zero states."""
    cells = []
    h = c = np.zeros(params["lstm.weight_hh"].shape[1])
    for token in tokens:
        x = np.concatenate([params["embedding.weight"][int(token)], v_g])
        cells.append(lstm_step(params, "lstm", x, h, c))
        h = cells[-1]["h"]
        c = cells[-1]["c"]
    return cells


def lstm_words_lrp(params, cells, R_h, R_c, epsilon):
    """R(h), R(c) (H,) of the last of the T cells -> R(v_g) and R of each input word (T,).

    R(v_g) is summed over all steps.
    """
    E = params["embedding.weight"].shape[1]
    R_v_g = 0
    R_word = np.zeros(len(cells))
    for t in reversed(range(len(cells))):
        # R(h) goes to its cell in full and is added there.
        R_x, R_h, R_c = lstm_lrp(params, "lstm", cells[t], R_c + R_h, epsilon)
        R_word[t] = R_x[:E].sum()
        R_v_g = R_v_g + R_x[E:]
    return R_v_g, R_word


def output_lrp(params, step, target, context, epsilon):
    """The logit `target` of one step -> R(context), R(h) (H,), through fc and z = context + h."""
    logits = step["logits"]
    R_logits = np.where(np.arange(len(logits)) == target, logits, 0)
    R_z = linear(R_logits, step["z"], params["fc.weight"], logits, epsilon)
    R_context = share(R_z, step[context], step["z"], epsilon)
    R_h = share(R_z, step["lstm"]["h"], step["z"], epsilon)
    return R_context, R_h


def stacked(steps, *names):
    """The named values of all steps, one row a step."""
    return {name: np.stack([step[name] for step in steps]) for name in names}


def all_words(params, forward, targets, word_lrp, epsilon):
    """word_lrp(params, forward, last, target, epsilon) for every word.

    Returns R(a) (T,L,D), R(words) (T,T) and the scores (T,).
    """
    T = len(forward["steps"])
    R_a = np.zeros((T, *forward["a"].shape))
    R_word = np.zeros((T, T))
    scores = np.zeros(T)
    for t, target in enumerate(targets):
        scores[t] = forward["logits"][t, int(target)]
        R_a[t], R_word[t, : t + 1] = word_lrp(params, forward, t, int(target), epsilon)
    return R_a, R_word, scores


def adaptive_step(params, v, cell):
    """What follows the LSTM in one step of the adaptive captioner.

    Returns s, its gate, what `attend` returns, z and the logits.
    """
    gate = sigmoid(
        affine(params, "sentinel_input", cell["x"])
        + affine(params, "sentinel_hidden", cell["h_previous"])
    )
    s = gate * np.tanh(cell["c"])
    attention = attend(params, v, cell["h"], s)
    z = attention["c_hat"] + cell["h"]
    return {
        "lstm": cell,
        "sentinel_gate": gate,
        "s": s,
        **attention,
        "z": z,
        "logits": affine(params, "fc", z),
    }


def adaptive_forward(params, features, tokens, *, mask=None):
    """Teacher-forced forward of the adaptive captioner on one image.

    features (L,D); tokens: the T input ids from <start> on; mask: (L,) booleans, True = a real
    region; None = all are. Returns of the real regions what `gridtd_forward` does: "a", "mean",
    "v_before", "v", "v_g_before", "v_g" and "steps" (see `adaptive_step`); and stacked "logits"
    (T,V), "alpha" (T,L), zero at padded regions, and "beta" (T,).
    """
    params = as_cell(params)
    a = real_regions(features, mask)
    mean = a.mean(axis=0)
    v_before = affine(params, "image_projection", a)
    v_g_before = affine(params, "global_projection", mean)
    v = np.maximum(v_before, 0)
    v_g = np.maximum(v_g_before, 0)
    steps = [adaptive_step(params, v, cell) for cell in lstm_words(params, v_g, tokens)]
    forward = {
        "a": a,
        "mean": mean,
        "v_before": v_before,
        "v": v,
        "v_g_before": v_g_before,
        "v_g": v_g,
        "steps": steps,
        **stacked(steps, "logits", "alpha", "beta"),
    }
    return {**forward, "alpha": put_back(forward["alpha"], mask, 1)}


def adaptive_word_lrp(params, forward, last, target, epsilon):
    """Logit `target` of step `last` -> R(a) (L,D), R(words) (last+1,).

    Only that step's context reaches the logit.
    """
    step = forward["steps"][last]
    R_c_hat, R_h = output_lrp(params, step, target, "c_hat", epsilon)
    R_s, R_v = context_lrp(forward["v"], step, R_c_hat, epsilon)
    cells = [step["lstm"] for step in forward["steps"][: last + 1]]
    # The sentinel's relevance goes to its cell c_t in full.
    R_v_g, R_word = lstm_words_lrp(params, cells, R_h, R_s, epsilon)
    return image_lrp(params, forward, R_v, R_v_g, epsilon), R_word


def adaptive_lrp(params, features, tokens, targets, epsilon=0.01, *, mask=None):
    """LRP of the logits `targets` (T ids) of the adaptive captioner.

    There is one logit for each of the T input ids `tokens`. features (L,D); mask: (L,) booleans,
    True = a real region. Returns, as `gridtd_lrp`, feature_relevance (T,L,D), word_relevance (T,T)
    and scores (T,).
    """
    forward = adaptive_forward(params, real_regions(features, mask), tokens)
    R_a, R_word, scores = all_words(as_cell(params), forward, targets, adaptive_word_lrp, epsilon)
    return put_back(R_a, mask, 1), R_word, scores


def attend_heads(query, keys, values, heads):
    """Each head attends with its own H/N dimensions.

    query (H,), keys and values (L,H) -> alpha (N,L), context (H,).
    """
    queries = np.split(query, heads)
    keys = np.split(keys, heads, axis=1)
    values = np.split(values, heads, axis=1)
    alpha = []
    context = []
    for q, k, value in zip(queries, keys, values):
        alpha.append(softmax(k @ q / np.sqrt(len(q))))
        context.append(sum(alpha[-1][p] * value_p for p, value_p in enumerate(value)))
    return np.stack(alpha), np.concatenate(context)


def aoa_step(params, keys, values, cell, heads):
    """What follows the LSTM in one step of the multi-head captioner.

    Returns alpha (N,L), ctx, the context before and after its gate, "c_before" and "c", z (all
    (H,)) and the logits (V,).
    """
    alpha, ctx = attend_heads(affine(params, "query", cell["h"]), keys, values, heads)
    c_before = affine(params, "context_projection", ctx)
    c = sigmoid(affine(params, "context_gate", cell["h"])) * c_before
    z = c + cell["h"]
    return {
        "lstm": cell,
        "alpha": alpha,
        "ctx": ctx,
        "c_before": c_before,
        "c": c,
        "z": z,
        "logits": affine(params, "fc", z),
    }


def aoa_forward(params, features, tokens, *, heads, mask=None):
    """Teacher-forced forward of the multi-head captioner on one image.

    features (L,D); tokens: the T input ids from <start> on; mask: (L,) booleans, True = a real
    region; None = all are. Returns of the real regions "a", "v_before", "v" and "value" (L,H),
    "v_g" (H,) the mean of v, "steps" (see `aoa_step`); and stacked "logits" (T,V) and "alpha"
    (T,N,L), zero at padded regions. ValueError if H is no multiple of heads.
    """
    params = as_cell(params)
    a = real_regions(features, mask)
    v_before = affine(params, "image_projection", a)
    v = np.maximum(v_before, 0)
    v_g = v.mean(axis=0)
    keys = affine(params, "key", v)
    values = affine(params, "value", v)
    cells = lstm_words(params, v_g, tokens)
    steps = [aoa_step(params, keys, values, cell, heads) for cell in cells]
    forward = {
        "a": a,
        "v_before": v_before,
        "v": v,
        "v_g": v_g,
        "value": values,
        "steps": steps,
        **stacked(steps, "logits", "alpha"),
    }
    return {**forward, "alpha": put_back(forward["alpha"], mask, 2)}


def heads_lrp(step, values, R_ctx, epsilon):
    """R(ctx) (H,), the sum of alpha value of all heads -> R(values) (L,H)."""
    R_values = np.zeros_like(values)
    for p, value in enumerate(values):
        # The weight of each head at its own dimensions.
        alpha = np.repeat(step["alpha"][:, p], len(value) // len(step["alpha"]))
        R_values[p] = share(R_ctx, alpha * value, step["ctx"], epsilon)
    return R_values


def aoa_image_lrp(params, forward, R_values, R_v_g, epsilon):
    """R(values) (L,H) and R(v_g) (H,) -> R(a) (L,D): both come together at v, whose ReLU passes."""
    R_a = np.zeros_like(forward["a"])
    for p, (a, v) in enumerate(zip(forward["a"], forward["v"])):
        R_v = share(R_v_g, v / len(R_a), forward["v_g"], epsilon)
        R_v = R_v + linear(R_values[p], v, params["value.weight"], forward["value"][p], epsilon)
        R_a[p] = linear(R_v, a, params["image_projection.weight"], forward["v_before"][p], epsilon)
    return R_a


def aoa_word_lrp(params, forward, last, target, epsilon):
    """Logit `target` of step `last` -> R(a) (L,D), R(words) (last+1,).

    Query, key and gate get nothing.
    """
    step = forward["steps"][last]
    R_c, R_h = output_lrp(params, step, target, "c", epsilon)
    R_ctx = linear(R_c, step["ctx"], params["context_projection.weight"], step["c_before"], epsilon)
    R_values = heads_lrp(step, forward["value"], R_ctx, epsilon)
    cells = [step["lstm"] for step in forward["steps"][: last + 1]]
    R_v_g, R_word = lstm_words_lrp(params, cells, R_h, np.zeros_like(R_h), epsilon)
    return aoa_image_lrp(params, forward, R_values, R_v_g, epsilon), R_word


def aoa_lrp(params, features, tokens, targets, epsilon=0.01, *, heads, mask=None):
    """LRP of the logits `targets` (T ids) of the multi-head captioner.

    There is one logit for each of the T input ids `tokens`. features (L,D); mask: (L,) booleans,
    True = a real region. Returns, as `gridtd_lrp`, feature_relevance (T,L,D), word_relevance (T,T)
    and scores (T,).
    """
    forward = aoa_forward(params, real_regions(features, mask), tokens, heads=heads)
    R_a, R_word, scores = all_words(as_cell(params), forward, targets, aoa_word_lrp, epsilon)
    return put_back(R_a, mask, 1), R_word, scores


def soft_step(params, a, token, h_previous, c_previous):
    """One step of the captioner with soft attention, from the h and c (H,) of the step before.

    Returns the embedding "word" (E,), alpha (L,), beta, the weighted sum of regions "c" and the
    context "z_t" (D,), what `lstm_step` returns, the addends "from_h" and "from_z", their sum with
    the word "z" (all (E,)), and the logits (V,).
    """
    word = params["embedding.weight"][int(token)]
    query = params["attention_hidden.weight"] @ h_previous
    scores = np.zeros(len(a))
    for i, a_i in enumerate(a):
        key = affine(params, "image_projection", a_i)
        scores[i] = params["attention_score.weight"][0] @ np.tanh(key + query)
    alpha = softmax(scores)
    beta = sigmoid(affine(params, "context_gate", h_previous))[0]
    c = sum(alpha[i] * a_i for i, a_i in enumerate(a))
    z_t = beta * c
    cell = lstm_step(params, "lstm", np.concatenate([word, z_t]), h_previous, c_previous)
    from_h = params["hidden_output.weight"] @ cell["h"]
    from_z = params["context_output.weight"] @ z_t
    z = word + from_h + from_z
    return {
        "word": word,
        "alpha": alpha,
        "beta": beta,
        "c": c,
        "z_t": z_t,
        "lstm": cell,
        "from_h": from_h,
        "from_z": from_z,
        "z": z,
        "logits": affine(params, "fc", z),
    }


def soft_forward(params, features, tokens, *, mask=None):
    """Teacher-forced forward of the captioner with soft attention on one image.

    features (L,D); tokens: the T input ids from <start> on; mask: (L,) booleans, True = a real
    region; None = all are. Returns of the real regions "a" (L,D), "mean" (D,), the pre-activations
    "h_before" and "c_before" of the initial state (H,), "steps" (see `soft_step`); and stacked
    "logits" (T,V) and "alpha" (T,L), zero at padded regions.
    """
    params = in_float64(params)
    a = real_regions(features, mask)
    mean = a.mean(axis=0)
    h_before = affine(params, "initial_hidden", mean)
    c_before = affine(params, "initial_cell", mean)
    h = np.tanh(h_before)
    c = np.tanh(c_before)
    steps = []
    for token in tokens:
        steps.append(soft_step(params, a, token, h, c))
        h = steps[-1]["lstm"]["h"]
        c = steps[-1]["lstm"]["c"]
    forward = {
        "a": a,
        "mean": mean,
        "h_before": h_before,
        "c_before": c_before,
        "steps": steps,
        **stacked(steps, "logits", "alpha"),
    }
    return {**forward, "alpha": put_back(forward["alpha"], mask, 1)}


def soft_output_lrp(params, step, target, epsilon):
    """The logit `target` of one step -> R(word) (E,), R(h) (H,) and R(z_t) (D,)."""
    logits = step["logits"]
    R_logits = np.where(np.arange(len(logits)) == target, logits, 0)
    R_z = linear(R_logits, step["z"], params["fc.weight"], logits, epsilon)
    R_word = share(R_z, step["word"], step["z"], epsilon)
    R_from_h = share(R_z, step["from_h"], step["z"], epsilon)
    R_from_z = share(R_z, step["from_z"], step["z"], epsilon)
    h = step["lstm"]["h"]
    R_h = linear(R_from_h, h, params["hidden_output.weight"], step["from_h"], epsilon)
    R_z_t = linear(R_from_z, step["z_t"], params["context_output.weight"], step["from_z"], epsilon)
    return R_word, R_h, R_z_t


def soft_start_lrp(params, forward, R_h, R_c, epsilon):
    """R of the initial h and c (H,) -> R(a) (L,D); both tanh pass, and the regions share a mean."""
    mean = forward["mean"]
    R_mean = linear(R_h, mean, params["initial_hidden.weight"], forward["h_before"], epsilon)
    R_mean = R_mean + linear(R_c, mean, params["initial_cell.weight"], forward["c_before"], epsilon)
    a = forward["a"]
    return np.stack([share(R_mean, a_i / len(a), mean, epsilon) for a_i in a])


def soft_word_lrp(params, forward, last, target, epsilon):
    """Logit `target` of step `last` -> R(a) (L,D), R(words) (last+1,).

    The attention's scores and beta get nothing.
    """
    E = params["embedding.weight"].shape[1]
    a = forward["a"]
    R_a = np.zeros_like(a)
    R_words = np.zeros(last + 1)
    R_word, R_h, R_z_t = soft_output_lrp(params, forward["steps"][last], target, epsilon)
    R_words[last] = R_word.sum()
    R_c = np.zeros_like(R_h)
    for t in range(last, -1, -1):
        step = forward["steps"][t]
        # R(h) goes to its cell in full and is added there.
        R_x, R_h, R_c = lstm_lrp(params, "lstm", step["lstm"], R_c + R_h, epsilon)
        R_words[t] += R_x[:E].sum()
        R_z_t = R_z_t + R_x[E:]
        # z_t = beta * c hands its relevance to c in full.
        for i, a_i in enumerate(a):
            R_a[i] += share(R_z_t, step["alpha"][i] * a_i, step["c"], epsilon)
        R_z_t = 0  # an earlier context reaches the logit through the LSTM only
    return R_a + soft_start_lrp(params, forward, R_h, R_c, epsilon), R_words


def soft_lrp(params, features, tokens, targets, epsilon=0.01, *, mask=None):
    """LRP of the logits `targets` (T ids) of the captioner with soft attention.

    There is one logit for each of the T input ids `tokens`. features (L,D); mask: (L,) booleans,
    True = a real region. Returns, as `gridtd_lrp`, feature_relevance (T,L,D), word_relevance (T,T)
    and scores (T,).
    """
    forward = soft_forward(params, real_regions(features, mask), tokens)
    R_a, R_word, scores = all_words(in_float64(params), forward, targets, soft_word_lrp, epsilon)
    return put_back(R_a, mask, 1), R_word, scores


def pad_for_pool(x, kernel, stride, padding, ceil_mode, value):
    """x (C,H,W) with `value` around it.

    With ceil_mode there is also as much below and right as one more window needs, unless that
    window would start beyond the image (PyTorch's rule).
    """
    kernel = np.broadcast_to(kernel, 2)
    stride = np.broadcast_to(stride, 2)
    padding = np.broadcast_to(padding, 2)
    rounded = math.ceil if ceil_mode else math.floor
    widths = [(0, 0)]
    for size, k, s, p in zip(x.shape[1:], kernel, stride, padding):
        last = rounded((size + 2 * p - k) / s)
        if last * s >= size + p:
            last -= 1
        widths.append((p, p + max(0, last * s + k - size - 2 * p)))
    return np.pad(x, widths, constant_values=value)


def unpad(x, padding, shape):
    """The (C,H,W) = shape inside a padded array."""
    ph, pw = np.broadcast_to(padding, 2)
    return x[:, ph : ph + shape[1], pw : pw + shape[2]]


def padded_maxpool_lrp(x, R, kernel, stride, padding=0, ceil_mode=False):
    """Winner takes all; padding is -inf and never wins."""
    padded = pad_for_pool(x, kernel, stride, padding, ceil_mode, -np.inf)
    return unpad(maxpool_lrp(padded, R, kernel, stride), padding, x.shape)


def avgpool(x, kernel, stride, padding):
    """Mean over windows of x (C,H,W), zeros of the padding counted as elements."""
    padded = pad_for_pool(x, kernel, stride, padding, False, 0)
    total = sum(padded[at] for _, _, at in windows(padded.shape, kernel, stride))
    return total / np.prod(np.broadcast_to(kernel, 2))


def avgpool_lrp(x, R, kernel, stride, padding):
    """R is shared in proportion to the inputs of each window, without epsilon.

    It ends where the mean is 0.
    """
    padded = pad_for_pool(x, kernel, stride, padding, False, 0)
    total = avgpool(x, kernel, stride, padding) * np.prod(np.broadcast_to(kernel, 2))
    quotient = ratio(R, total, 0)
    R_padded = np.zeros_like(padded)
    for _, _, at in windows(padded.shape, kernel, stride):
        R_padded[at] += padded[at] * quotient
    return unpad(R_padded, padding, x.shape)


def graph_forward(node, x):
    """The output (O,h,w) of a node for x (C,H,W).

    `graph_lrp` says which nodes there are. ValueError for an unknown one.
    """
    x = np.asarray(x, dtype=np.float64)
    match node:
        case ("sequence", nodes):
            for child in nodes:
                x = graph_forward(child, x)
            return x
        case ("concat", branches):
            return np.concatenate([graph_forward(branch, x) for branch in branches])
        case ("residual", main, shortcut):
            return graph_forward(main, x) + graph_forward(shortcut, x)
        case ("conv", weight, bias, stride, padding):
            y = conv(x, np.asarray(weight, dtype=np.float64), stride, padding)
            return y if bias is None else y + np.asarray(bias, dtype=np.float64)[:, None, None]
        case ("grouped_conv", weight, bias, stride, padding, groups):
            return grouped(x, weight, bias, stride, padding, groups)
        case ("same_conv", weight, bias, stride, groups):
            padded = np.pad(x, same_padding(x, weight, stride))
            return grouped(padded, weight, bias, stride, 0, groups)
        case ("relu",):
            return np.maximum(x, 0)
        case ("relu6",):
            return np.clip(x, 0, 6)
        case ("maxpool", kernel, stride):
            return maxpool(x, kernel, stride)
        case ("maxpool", kernel, stride, padding, ceil_mode):
            padded = pad_for_pool(x, kernel, stride, padding, ceil_mode, -np.inf)
            return maxpool(padded, kernel, stride)
        case ("avgpool", kernel, stride, padding):
            return avgpool(x, kernel, stride, padding)
    raise ValueError(f"unknown node {node[0]!r} with {len(node) - 1} settings")


def grouped(x, weight, bias, stride, padding, groups):
    """A convolution in groups: each takes channels of x, and makes channels of the output."""
    biases = np.zeros(len(weight)) if bias is None else bias
    parts = zip(np.split(x, groups), np.split(weight, groups), np.split(biases, groups))
    nodes = []
    for part, own_weight, own_bias in parts:
        nodes.append(graph_forward(("conv", own_weight, own_bias, stride, padding), part))
    return np.concatenate(nodes)


def grouped_lrp(x, R, weight, stride, padding, groups):
    """Every group takes back the relevance of the channels that it made."""
    weights = np.split(np.asarray(weight, dtype=np.float64), groups)
    parts = zip(np.split(x, groups), np.split(R, groups), weights)
    return np.concatenate([conv_lrp(own, own_R, w, stride, padding) for own, own_R, w in parts])


def same_padding(x, weight, stride):
    """TensorFlow's padding, as np.pad has it: the output has a side of ceil(side / stride).

    What cannot be split evenly goes to the right and to the bottom.
    """
    padding = [(0, 0)]
    for side, kernel, step in zip(x.shape[1:], weight.shape[2:], stride):
        total = max((-(-side // step) - 1) * step + kernel - side, 0)
        padding.append((total // 2, total - total // 2))
    return padding


def same_conv_lrp(x, R, weight, stride, groups):
    """What falls on the padding is nothing, for its pixels are zero."""
    padding = same_padding(x, weight, stride)
    found = grouped_lrp(np.pad(x, padding), R, weight, stride, 0, groups)
    (_, (top, _), (left, _)) = padding
    return found[:, top : top + x.shape[1], left : left + x.shape[2]]


def sequence_lrp(nodes, x, R, epsilon):
    """From the last node of a chain back to its input."""
    inputs = [x]
    for node in nodes:
        inputs.append(graph_forward(node, inputs[-1]))
    for node, node_input in reversed(list(zip(nodes, inputs))):
        R = graph_lrp(node, node_input, R, epsilon)
    return R


def concat_lrp(branches, x, R, epsilon):
    """Every branch takes back the channels that it made; at their common input they add."""
    ends = np.cumsum([len(graph_forward(branch, x)) for branch in branches])
    parts = np.split(R, ends[:-1])
    return sum(graph_lrp(branch, x, part, epsilon) for branch, part in zip(branches, parts))


def residual_lrp(main, shortcut, x, R, epsilon):
    """Each addend y gets R y / (sum + epsilon sign sum); at their common input they add."""
    main_output = graph_forward(main, x)
    shortcut_output = graph_forward(shortcut, x)
    total = main_output + shortcut_output
    R_main = share(R, main_output, total, epsilon)
    R_shortcut = share(R, shortcut_output, total, epsilon)
    return graph_lrp(main, x, R_main, epsilon) + graph_lrp(shortcut, x, R_shortcut, epsilon)


def graph_lrp(node, x, R_out, epsilon=0.01):
    """R_out (O,h,w) at the output of a node -> R (C,H,W) at its input x.

    Nodes: ("sequence", [nodes]), empty for the identity; ("concat", [nodes]), the channels of
    branches over one input; ("residual", main, shortcut); ("conv", weight (O,C,kh,kw), bias (O,) or
    None, stride, padding); ("grouped_conv", the same, groups); ("same_conv", weight, bias, stride,
    groups), padded as TensorFlow does; ("relu",); ("relu6",), which passes relevance where it is
    cut off too; ("maxpool", kernel, stride[, padding, ceil_mode]);
    ("avgpool", kernel, stride, padding). Kernels, strides and paddings are numbers or pairs
    (vertical, horizontal). Convolutions follow alpha1-beta0; epsilon is that of residual sums only.
    ValueError for an unknown node.
    """
    x = np.asarray(x, dtype=np.float64)
    R = np.asarray(R_out, dtype=np.float64)
    match node:
        case ("sequence", nodes):
            return sequence_lrp(nodes, x, R, epsilon)
        case ("concat", branches):
            return concat_lrp(branches, x, R, epsilon)
        case ("residual", main, shortcut):
            return residual_lrp(main, shortcut, x, R, epsilon)
        case ("conv", weight, _, stride, padding):
            return conv_lrp(x, R, np.asarray(weight, dtype=np.float64), stride, padding)
        case ("grouped_conv", weight, _, stride, padding, groups):
            return grouped_lrp(x, R, weight, stride, padding, groups)
        case ("same_conv", weight, _, stride, groups):
            return same_conv_lrp(x, R, weight, stride, groups)
        case ("relu",) | ("relu6",):
            return R
        case ("maxpool", *settings) if len(settings) in (2, 4):
            return padded_maxpool_lrp(x, R, *settings)
        case ("avgpool", kernel, stride, padding):
            return avgpool_lrp(x, R, kernel, stride, padding)
    raise ValueError(f"unknown node {node[0]!r} with {len(node) - 1} settings")
