"""Explanations from gradients: gradient, gradient x input, guided backpropagation, Grad-CAM,
Guided Grad-CAM, attention.

Each function takes what one backward pass gave for T words of B images, and returns fields of
`Explanation` (explanation.py): "image_relevance" (T, B, H, W) or None, "region_relevance" (T, B, L)
and "word_relevance" (T, B, T). All of them have the same arguments:

    leaves      {"image": images (B, 3, H, W), or None where there are only features;
                 "regions": features A (B, L, D); "words": embeddings of the inputs (B, T, E)},
                and, by name, the further leaves that the method asked for
    gradients   of the explained logits with respect to these, by the same names: (T, B, ...)
    attention   (T, B, heads, L)
    grid        (h, w) of the regions
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lrp_utils import is_relu6

# What the values of a method's image maps are: they speak for a word and against it; their sign
# says nothing, only their size does; or none is below zero.
SIGNED = "signed"
SIZE = "size"
NON_NEGATIVE = "non-negative"


class GuidedReLU(TorchFunctionMode):
    """`with GuidedReLU():` makes every ReLU called inside let back only positive gradients.

    Springenberg et al. (2015). So does ReLU6, where it is not cut off.
    """

    FUNCTIONS = {F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.FUNCTIONS:
            return _GuidedReLU.apply(kwargs["input"] if "input" in kwargs else args[0])
        if is_relu6(function, args, kwargs):
            return _GuidedReLU.apply(kwargs["input"] if "input" in kwargs else args[0], 6)
        return function(*args, **kwargs)


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, greatest=torch.inf):
        y = x.clamp(0, greatest)
        ctx.save_for_backward((x > 0) & (x < greatest))
        return y

    @staticmethod
    def backward(ctx, gradient):
        (active,) = ctx.saved_tensors
        return gradient.clamp(min=0) * active, None


def gradient(leaves, gradients, attention, grid):
    """The gradient itself, summed over channels and embedding dimensions (Simonyan et al. 2014)."""
    pixels = gradients["image"]
    return {
        "image_relevance": None if pixels is None else pixels.sum(2),
        "region_relevance": gradients["regions"].sum(-1),
        "word_relevance": gradients["words"].sum(-1),
    }


def layer_cam(leaves, gradients, attention, grid):
    """LayerCAM of the last feature map (Jiang et al. 2021): each region has weights of its own,
    which are the positive gradients."""
    maps = (gradients["regions"].clamp(min=0) * leaves["regions"]).sum(-1).clamp(min=0)
    return {
        "image_relevance": enlarge(maps, grid, leaves["image"]),
        "region_relevance": maps,
        "word_relevance": gradients["words"].sum(-1),
    }


STEPS = 32  # of integrated gradients
NOISY_COPIES = 16  # of SmoothGrad
NOISE = 0.1  # SmoothGrad's standard deviation, in parts of the range of an image's values


def path_from_nothing():
    """Integrated gradients (Sundararajan et al. 2017): functions that scale images and embeddings.

    The path begins at the mean colour, which is 0 once an image is normalised, and at embeddings of
    0. Its points are in the middle of STEPS equal parts.
    """
    for step in range(STEPS):
        share = (step + 0.5) / STEPS
        yield lambda images, words, share=share: (share * images, share * words)


def noisy_copies():
    """SmoothGrad (Smilkov et al. 2017): functions that add Gaussian noise to images, always the
    same."""
    for copy in range(NOISY_COPIES):
        yield lambda images, words, copy=copy: (_with_noise(images, copy), words)


def _with_noise(images, seed):
    """Images (B, 3, H, W) with noise in parts of each one's range of values.

    The noise is the same for each image, so that it does not depend on the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape[1:], generator=generator).to(images)
    everything = (1, 2, 3)
    span = images.amax(everything, keepdim=True) - images.amin(everything, keepdim=True)
    return images + NOISE * span * noise


def input_x_gradient(leaves, gradients, attention, grid):
    """Gradient x input, summed likewise; under the rules of LRP this is relevance."""
    products = {"image": None}
    for name in ("image", "regions", "words"):
        if gradients[name] is not None:
            products[name] = leaves[name] * gradients[name]
    return gradient(leaves, products, attention, grid)


def grad_cam(leaves, gradients, attention, grid):
    """ReLU(sum_k w_k A_k), where w_k is the mean gradient of feature map k (Selvaraju et al. 2017).

    The preceding words get their gradient.
    """
    weights = gradients["regions"].mean(dim=2, keepdim=True)  # (T, B, 1, D)
    regions = (leaves["regions"] * weights).sum(-1).clamp(min=0)
    return {
        "image_relevance": enlarge(regions, grid, leaves["image"]),
        "region_relevance": regions,
        "word_relevance": gradients["words"].sum(-1),
    }


def guided_grad_cam(leaves, gradients, attention, grid):
    """Guided backpropagation times enlarged Grad-CAM, pixel by pixel; the rest as in Grad-CAM."""
    found = grad_cam(leaves, gradients, attention, grid)
    found["image_relevance"] = gradients["image"].sum(2) * found["image_relevance"]
    return found


def attention_map(leaves, gradients, attention, grid):
    """The mean of the heads' attention weights, enlarged.

    Attention says nothing of the preceding words; theirs is zero.
    """
    embeddings = leaves["words"]
    regions = attention.mean(dim=2)
    return {
        "image_relevance": enlarge(regions, grid, leaves["image"]),
        "region_relevance": regions,
        "word_relevance": embeddings.new_zeros(len(regions), *embeddings.shape[:2]),
    }


def enlarge(regions, grid, images):
    """Values of regions (T, B, L) as maps (T, B, H, W) of the images' size; None without images.

    Between the centres of the regions the values are interpolated bilinearly.
    """
    if images is None:
        return None
    maps = regions.unflatten(-1, grid)
    size = tuple(images.shape[-2:])
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
