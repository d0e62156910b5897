"""The generative inpainter against slow versions written from Yu et al. 2018 and 2019."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from commandline import UserError
from gatedconv import (
    Critic,
    GatedConv,
    Inpainter,
    contextual_attention,
    critic_loss,
    filled,
    inpainter_loss,
    read_inpainter,
    save_inpainter,
)


def random_like(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def test_a_gated_convolution_is_elu_times_sigmoid():
    layer = GatedConv(2, 3, size=3, stride=2, dilation=2).double()
    nn.init.normal_(layer.both.bias)
    x = random_like((1, 2, 9, 8))
    weight, bias = layer.both.weight, layer.both.bias
    padded = F.pad(x, (2, 2, 2, 2))
    found = layer(x)
    assert found.shape == (1, 3, 5, 4)
    for row in range(5):
        for column in range(4):
            sums = []
            for channel in range(6):
                total = bias[channel].clone()
                for i in range(3):
                    for j in range(3):
                        pixels = padded[0, :, 2 * row + 2 * i, 2 * column + 2 * j]
                        total = total + (weight[channel, :, i, j] * pixels).sum()
                sums.append(total)
            for channel in range(3):
                feature = sums[channel]
                elu = feature if feature > 0 else feature.exp() - 1
                gate = 1 / (1 + (-sums[channel + 3]).exp())
                assert found[0, channel, row, column].item() == pytest.approx((elu * gate).item())


def patch(features, row, column, size):
    """A patch (C, size, size) whose middle, or upper left middle, is at a place; zeros outside."""
    before = (size - 1) // 2
    padded = F.pad(features, (before, size, before, size))
    return padded[:, row : row + size, column : column + size]


def slow_attention(features, missing):
    """Contextual attention of features (C, h, w) with loops; missing (h / 2, w / 2) bool."""
    small = features[:, ::2, ::2]
    _, height, width = small.shape
    places = [(row, column) for row in range(height) for column in range(width)]

    def cosine(one, other):
        return (one * other).sum() / (one.norm() * other.norm())

    scores = {}
    for b in places:
        for f in places:
            scores[b, f] = cosine(patch(small, *b, 3), patch(small, *f, 3))
    scores = fused_slowly(scores, places)
    by_columns = sorted(places, key=lambda place: place[::-1])
    scores = fused_slowly(scores, by_columns)
    known = []
    for row, column in places:
        rows = slice(max(0, row - 1), row + 2)
        columns = slice(max(0, column - 1), column + 2)
        known.append(not missing[rows, columns].any())
    total = torch.zeros_like(F.pad(features, (1, 1, 1, 1)))
    overlap = torch.zeros_like(total[0])
    for f in places:
        weights = torch.stack([10 * scores[b, f] for b in places])
        weights[~torch.tensor(known)] = -torch.inf
        weights = weights.softmax(0)
        pasted = 0
        for weight, (row, column) in zip(weights, places):
            pasted = pasted + weight * patch(features, 2 * row, 2 * column, 4)
        rows = slice(2 * f[0], 2 * f[0] + 4)
        columns = slice(2 * f[1], 2 * f[1] + 4)
        total[:, rows, columns] += pasted
        overlap[rows, columns] += 1
    return (total / overlap)[:, 1:-1, 1:-1]


def fused_slowly(scores, order):
    """Each score with those of the next pairs of patches before and after, in an order."""
    found = {}
    for i, b in enumerate(order):
        for j, f in enumerate(order):
            value = scores[b, f]
            if i and j:
                value = value + scores[order[i - 1], order[j - 1]]
            if i + 1 < len(order) and j + 1 < len(order):
                value = value + scores[order[i + 1], order[j + 1]]
            found[b, f] = value
    return found


def test_contextual_attention_copies_from_known_patches():
    features = random_like((2, 3, 12, 8))
    masks = torch.zeros(2, 1, 48, 32)
    masks[0, :, 5:12, 9:15] = 1
    masks[1, :, 40:, :3] = 1
    found = contextual_attention(features, masks)
    for one, mask, own in zip(features, masks, found):
        missing = mask[0].unfold(0, 8, 8).unfold(1, 8, 8).amax((2, 3)) > 0
        truth = slow_attention(one.float(), missing)
        torch.testing.assert_close(own, truth.double(), atol=1e-4, rtol=1e-3)


def test_what_is_unknown_is_not_copied():
    features = random_like((1, 2, 16, 16)).float()
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 16:40, 16:40] = 1
    changed = features.clone()
    changed[..., 5:9, 5:9] = 100
    _, hidden = contextual_attention(features, masks), contextual_attention(changed, masks)
    assert hidden.abs().max() < 10
    assert torch.isfinite(contextual_attention(features, torch.ones_like(masks))).all()


def test_the_hinge_losses_and_the_distance_by_hand():
    real = torch.tensor([2.0, 0.5])
    made = torch.tensor([-3.0, 0.5])
    assert critic_loss(real, made).item() == pytest.approx((0 + 0.5) / 2 + (0 + 1.5) / 2)
    images = torch.zeros(1, 3, 2, 2)
    assert inpainter_loss(images, images + 0.5, images - 1).item() == pytest.approx(1.5)


def test_the_critic_has_six_layers_of_spectral_norm_one():
    critic = Critic(4)
    critic(torch.randn(2, 3, 128, 128), torch.zeros(2, 1, 128, 128))
    layers = [layer for layer in critic.modules() if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 6
    for _ in range(30):
        critic(torch.randn(1, 3, 128, 128), torch.zeros(1, 1, 128, 128))
    for layer in layers:
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item()
        assert largest == pytest.approx(1, abs=0.02)
    assert critic.eval()(torch.randn(2, 3, 128, 128), torch.zeros(2, 1, 128, 128)).shape[2:] == (
        2,
        2,
    )


def test_what_is_under_the_mask_is_not_looked_at():
    torch.manual_seed(0)
    inpainter = Inpainter(4).eval()
    images = torch.rand(1, 3, 64, 48) * 2 - 1
    masks = torch.zeros(1, 1, 64, 48)
    masks[..., 10:30, 20:40] = 1
    coarse, refined = inpainter(images, masks)
    assert coarse.shape == refined.shape == images.shape
    assert refined.abs().max() <= 1
    others = torch.where(masks > 0, -images, images)
    assert torch.equal(inpainter(others, masks)[1], refined)
    whole = filled(images, masks, refined)
    assert torch.equal(whole[..., :10, :], images[..., :10, :])
    assert torch.equal(whole[..., 10:30, 20:40], refined[..., 10:30, 20:40])


def test_weights_come_back_from_their_file(tmp_path):
    path = tmp_path / "inpainter.pt"
    inpainter = Inpainter(4)
    save_inpainter(path, inpainter)
    found = read_inpainter(path)
    assert found.width == 4 and not found.training
    for name, weight in inpainter.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight.half().float())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda held: held.pop("inpainter"), "no weights of an inpainter that"),
        (lambda held: held["inpainter"].update(width=10**9), "no weights of an inpainter that"),
        (lambda held: held["inpainter"].update(width=6), "no weights of an inpainter that"),
        (lambda held: held["state_dict"].popitem(), "no weights of an inpainter that"),
        (lambda held: held["state_dict"]["refined.0.both.bias"].fill_(np.nan), "not finite"),
    ],
)
def test_other_files_are_told_in_one_line(change, message, tmp_path):
    path = tmp_path / "inpainter.pt"
    save_inpainter(path, Inpainter(4))
    held = torch.load(path, weights_only=True)
    change(held)
    torch.save(held, path)
    with pytest.raises(UserError, match=message):
        read_inpainter(path)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="holds no weights of an inpainter, or is cut off"):
        read_inpainter(path)
    with pytest.raises(UserError, match="there is no inpainter"):
        read_inpainter(tmp_path / "missing.pt")
