"""Small random networks in PyTorch's own words, by which the oracles themselves are tested."""

import numpy as np
import torch
from torch import nn

# The sizes: embedding, hidden, feature channels, regions, vocabulary.
E, H, D, L, V = 5, 4, 6, 3, 9
TOKENS = [7, 2, 0, 5, 2]
TARGETS = [2, 0, 5, 2, 8]


def grid_td(biases=True, seed=0):
    """A small random grid-TD captioner and the features (L,D) of one image, in float64.

    The captioner is an nn.ModuleDict.
    """
    torch.manual_seed(seed)
    modules = {
        "embedding": nn.Embedding(V, E),
        "image_projection": nn.Linear(D, H),
        "global_projection": nn.Linear(D, E),
        "attention_lstm": nn.LSTMCell(H + 2 * E, H),
        "language_lstm": nn.LSTMCell(2 * H, H),
        "sentinel_input": nn.Linear(H + 2 * E, H),
        "sentinel_hidden": nn.Linear(H, H),
        "attention_visual": nn.Linear(H, H),
        "attention_hidden": nn.Linear(H, H, bias=False),
        "attention_sentinel": nn.Linear(H, H),
        "attention_score": nn.Linear(H, 1, bias=False),
        "fc": nn.Linear(H, V),
    }
    modules = scaled(modules, biases)
    return modules, torch.rand(L, D, dtype=torch.float64)


def scaled(modules, biases):
    """{name: module} as a frozen float64 nn.ModuleDict.

    The weights are doubled, so that the gates differ. biases: False sets all biases to zero.
    """
    modules = nn.ModuleDict(modules).double().requires_grad_(False)
    for name, parameter in modules.named_parameters():
        parameter.mul_(float(biases) if "bias" in name else 2.0)
    return modules


def kept(z, epsilon):
    """The part of its relevance that an epsilon-site passes on."""
    return z / (z + epsilon * np.where(z >= 0, 1, -1))


def frozen_relu(params, name, output, z, x, epsilon):
    """The linear map `name` and its ReLU, frozen where it gave z and output: linear in x."""
    return (output > 0) * (x @ params[f"{name}.weight"].T) * kept(z, epsilon)


def frozen_cell(params, name, cell, x, h, c, epsilon):
    """The LSTM step with its gates, tanh(g)/g and h/c frozen at `cell`: linear in x, h and c."""
    rows = slice(2 * H, 3 * H)  # of g; the gate order is i, f, g, o
    g = params[f"{name}.weight_ih"][rows] @ x + params[f"{name}.weight_hh"][rows] @ h
    g = g * kept(cell["g"], epsilon)
    c = (cell["i"] * np.tanh(cell["g"]) / cell["g"] * g + cell["f"] * c) * kept(cell["c"], epsilon)
    return cell["h"] / cell["c"] * c, c


def vgg_like(biases=True, seed=0):
    """A small convolutional network with max-pooling, and the same as the oracle's layers."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=biases),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=1, bias=biases),
        nn.ReLU(),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(5, 6, 3, padding=1, stride=2, bias=biases),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
    )
    model = model.double().requires_grad_(False)
    layers = []
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            layers.append(("conv", layer.weight, layer.bias, layer.stride, layer.padding))
        elif isinstance(layer, nn.MaxPool2d):
            layers.append(("maxpool", layer.kernel_size, layer.stride))
        else:
            layers.append(("relu",))
    return model, layers
