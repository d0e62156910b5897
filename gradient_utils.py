"""Explanations from gradients: gradient, gradient x input, guided backpropagation, Grad-CAM, Guided Grad-CAM, attention.

Each function takes what one backward pass gave and returns relevance of pixels (T, B, H, W), regions (T, B, L) and
preceding words (T, B, T), for T words of B images. Its arguments, alike for all:

    leaves      images (B, 3, H, W) or None for features without images, features A (B, L, D), embeddings of the inputs (B, T, E)
    gradients   of the explained logits with respect to these, the explained word first: (T, B, ...)
    attention   (T, B, heads, L)
    grid        (h, w) of the regions
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class GuidedReLU(TorchFunctionMode):
    """`with GuidedReLU():` every ReLU called inside lets back only positive gradients (Springenberg et al. 2015)."""

    FUNCTIONS = {F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.FUNCTIONS:
            return _GuidedReLU.apply(args[0])
        return function(*args, **(kwargs or {}))


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.clamp(min=0)
        ctx.save_for_backward(y > 0)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0) * ctx.saved_tensors[0]


def gradient(leaves, gradients, attention, grid):
    """The gradient itself, summed over channels and embedding dimensions (Simonyan et al. 2014)."""
    pixels, regions, words = gradients
    return None if pixels is None else pixels.sum(2), regions.sum(-1), words.sum(-1)


def input_x_gradient(leaves, gradients, attention, grid):
    """Gradient x input, summed likewise; under the rules of LRP this is relevance (lrp_utils.py)."""
    products = [None if slope is None else leaf * slope for leaf, slope in zip(leaves, gradients)]
    return gradient(leaves, products, attention, grid)


def grad_cam(leaves, gradients, attention, grid):
    """ReLU(sum_k w_k A_k), w_k the mean gradient of feature map k (Selvaraju et al. 2017); words: their gradient."""
    images, features, _ = leaves
    weights = gradients[1].mean(dim=2, keepdim=True)  # (T, B, 1, D)
    regions = (features * weights).sum(-1).clamp(min=0)
    return enlarge(regions, grid, images), regions, gradients[2].sum(-1)


def guided_grad_cam(leaves, gradients, attention, grid):
    """Guided backpropagation times enlarged Grad-CAM, pixel by pixel; regions and words as in Grad-CAM."""
    cam, regions, words = grad_cam(leaves, gradients, attention, grid)
    return gradients[0].sum(2) * cam, regions, words


def attention_map(leaves, gradients, attention, grid):
    """The attention weights, the mean over heads, enlarged; attention says nothing of words, theirs is zero."""
    images, _, embeddings = leaves
    regions = attention.mean(dim=2)
    words = embeddings.new_zeros(len(regions), *embeddings.shape[:2])
    return enlarge(regions, grid, images), regions, words


def enlarge(regions, grid, images):
    """Values of regions (T, B, L) as maps (T, B, H, W) of the images' size, interpolated bilinearly between the centres of the
    regions; None without images."""
    if images is None:
        return None
    return F.interpolate(
        regions.unflatten(-1, grid),
        size=tuple(images.shape[-2:]),
        mode="bilinear",
        align_corners=False,
    )
