"""The generative inpainter: gated convolutions and contextual attention, in two stages.

Yu et al., Generative Image Inpainting with Contextual Attention (2018), and Free-Form Image
Inpainting with Gated Convolution (2019). A coarse network fills the hole; a second one refines what
it made, in two branches, one of which copies from where the image is known.

Images are (B, 3, H, W) in -1..1, masks (B, 1, H, W) of 0 and 1, 1 where the image is to be filled.
H and W are multiples of 8.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from commandline import UserError, write_tensors

DILATIONS = (2, 4, 8, 16)
SHARPNESS = 10.0  # what cosines are multiplied by before the softmax
COARSER = 2  # the attention compares features of this part of their size
GAIN = 1.6  # of new weights, by the root of a layer's inputs
LEAK = 0.2  # of the discriminator's LeakyReLU
CRITIC_WIDTH = 64


class GatedConv(nn.Module):
    """A convolution whose outputs are gated: ELU(W_f * x) sigmoid(W_g * x) (Yu et al. 2019).

    inputs, outputs: channels; the output is as large as the input, or as 1 / stride of it.
    """

    def __init__(self, inputs, outputs, size=3, stride=1, dilation=1):
        super().__init__()
        padding = dilation * (size - 1) // 2
        self.both = nn.Conv2d(inputs, 2 * outputs, size, stride, padding, dilation)
        # An open gate halves what goes through. Weights of this size make up for it, so that an
        # image comes through seventeen layers, and learning starts at once.
        nn.init.normal_(self.both.weight, std=GAIN * self.both.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.both.bias)

    def forward(self, x):
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        feature, gate = self.both(x).chunk(2, dim=1)
        return F.elu(feature) * torch.sigmoid(gate)


class Enlarged(nn.Module):
    """A gated convolution of a map of twice the height and width, by its nearest values."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = GatedConv(inputs, outputs)

    def forward(self, x):
        """(B, inputs, H, W) -> (B, outputs, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def encoding_layers(width):
    """Layers that make 4 width channels of a quarter of the size out of an image, its mask and
    ones."""
    return [
        GatedConv(5, width, 5),
        GatedConv(width, 2 * width, stride=2),
        GatedConv(2 * width, 2 * width),
        GatedConv(2 * width, 4 * width, stride=2),
        GatedConv(4 * width, 4 * width),
        GatedConv(4 * width, 4 * width),
    ]


def dilated_layers(width):
    """Layers of 4 width channels that look farther and farther."""
    return [GatedConv(4 * width, 4 * width, dilation=dilation) for dilation in DILATIONS]


def decoding_layers(inputs, width):
    """Layers that make an image of features of a quarter of its size."""
    return [
        GatedConv(inputs, 4 * width),
        GatedConv(4 * width, 4 * width),
        Enlarged(4 * width, 2 * width),
        GatedConv(2 * width, 2 * width),
        Enlarged(2 * width, width),
        GatedConv(width, width // 2),
        nn.Conv2d(width // 2, 3, 3, padding=1),
    ]


class Inpainter(nn.Module):
    """The two networks. width: channels of the first layer, an even number (published: 24)."""

    def __init__(self, width=24):
        super().__init__()
        self.width = width
        self.coarse = nn.Sequential(
            *encoding_layers(width), *dilated_layers(width), *decoding_layers(4 * width, width)
        )
        self.dilated = nn.Sequential(*encoding_layers(width), *dilated_layers(width))
        self.attentive = nn.Sequential(*encoding_layers(width))
        self.after_attention = nn.Sequential(
            GatedConv(4 * width, 4 * width), GatedConv(4 * width, 4 * width)
        )
        self.refined = nn.Sequential(*decoding_layers(8 * width, width))

    def forward(self, images, masks):
        """Two guesses of the whole images, the coarse and the refined one, (B, 3, H, W) each.

        What is under the masks is not looked at.
        """
        coarse = self.coarse(with_mask(images * (1 - masks), masks)).clamp(-1, 1)
        given = with_mask(filled(images, masks, coarse), masks)
        copied = contextual_attention(self.attentive(given), masks)
        both = torch.cat([self.dilated(given), self.after_attention(copied)], dim=1)
        return coarse, self.refined(both).clamp(-1, 1)


def with_mask(images, masks):
    """Images (B, 3, H, W) with two channels more: ones, and the mask."""
    return torch.cat([images, torch.ones_like(masks), masks], dim=1)


def filled(images, masks, guesses):
    """The images with the guesses under the masks, all (B, 3, H, W)."""
    return images * (1 - masks) + guesses * masks


def contextual_attention(features, masks):
    """Features (B, C, h, w) put together from their own patches of where the image is known.

    masks: (B, 1, 4 h, 4 w) of the image. Every 3 x 3 patch f of features of half the size is
    compared with every such patch b by the cosine. The cosines are fused with those of the patches
    beside (`fused`), times 10 they go through a softmax over the patches of which every pixel is
    known, and the 4 x 4 patches of `features` at those places are averaged by it. Where patches
    overlap they are averaged (Yu et al. 2018, section 4). An image of which no patch is known
    averages all of them.
    """
    precision = features.dtype
    features = features.float()
    height, width = features.shape[2] // COARSER, features.shape[3] // COARSER
    with torch.autocast(features.device.type, enabled=False):
        patches = F.unfold(F.interpolate(features, size=(height, width)), 3, padding=1)
        patches = F.normalize(patches, dim=1, eps=1e-4)
        cosines = patches.transpose(1, 2) @ patches  # (B, of b, of f)
        scores = SHARPNESS * fused(cosines, height, width)
        known = known_patches(masks, height, width)
        scores = scores.masked_fill(~known[:, :, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=1)
        pasted = F.unfold(features, 2 * COARSER, stride=COARSER, padding=COARSER // 2) @ weights
        return pasted_together(pasted, features.shape[2:]).to(precision)


def fused(scores, height, width):
    """Scores (B, of b, of f) of patches on a grid, each the sum of its own and of those of the
    patches that are shifted likewise: by one to the left and right, and above and below.

    Both b and f are shifted, so coherent patches support each other.
    """
    scores = shifted_sum(scores)
    scores = by_columns(scores, height, width)
    scores = shifted_sum(scores)
    return by_columns(scores, width, height)


def shifted_sum(scores):
    """Every score (b, f) with those of (b - 1, f - 1) and (b + 1, f + 1); (B, N, N)."""
    total = scores.clone()
    total[:, 1:, 1:] += scores[:, :-1, :-1]
    total[:, :-1, :-1] += scores[:, 1:, 1:]
    return total


def by_columns(scores, height, width):
    """Scores (B, N, N) of a grid that was numbered row by row, numbered column by column."""
    split = scores.unflatten(2, (height, width)).unflatten(1, (height, width))
    return split.permute(0, 2, 1, 4, 3).flatten(3).flatten(1, 2)


def known_patches(masks, height, width):
    """Which 3 x 3 patches of a grid lie where every pixel is known: (B, height * width) bool.

    All of them of an image that has none.
    """
    missing = F.adaptive_max_pool2d(masks.float(), (height, width))
    missing = F.max_pool2d(missing, 3, stride=1, padding=1).flatten(1) > 0
    return ~missing | missing.all(dim=1, keepdim=True)


def pasted_together(patches, size):
    """The mean of overlapping patches (B, 16 C, N), 4 x 4 at every second pixel, as `size`."""
    options = {"kernel_size": 2 * COARSER, "stride": COARSER, "padding": COARSER // 2}
    overlap = F.fold(torch.ones_like(patches[:1, : 4 * COARSER**2]), size, **options)
    return F.fold(patches, size, **options) / overlap


class Critic(nn.Module):
    """The discriminator of patches: six convolutions whose spectral norm is one.

    Every value of its last map judges one part of the image (Yu et al. 2019, section 3.3).
    """

    def __init__(self, width=CRITIC_WIDTH):
        super().__init__()
        layers = []
        inputs = 5
        for outputs in (width, 2 * width, *[4 * width] * 4):
            layers.append(spectral_norm(nn.Conv2d(inputs, outputs, 5, stride=2, padding=2)))
            layers.append(nn.LeakyReLU(LEAK))
            inputs = outputs
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, images, masks):
        """(B, 3, H, W) and the masks of what was filled -> (B, 4 width, H / 64, W / 64)."""
        return self.layers(with_mask(images, masks))


def critic_loss(real, made):
    """The hinge loss of the critic: E[(1 - D(x))+] + E[(1 + D(x̂))+]."""
    return F.relu(1 - real).mean() + F.relu(1 + made).mean()


def inpainter_loss(images, coarse, refined):
    """The L1 distance of both guesses to the images, which are in -1..1."""
    return F.l1_loss(coarse, images) + F.l1_loss(refined, images)


def save_inpainter(path, inpainter):
    """Write an Inpainter's weights, in half precision, from whatever device it is on."""
    state = {name: weight.half().cpu() for name, weight in inpainter.state_dict().items()}
    write_tensors(path, {"inpainter": {"width": inpainter.width}, "state_dict": state})


def read_inpainter(path, device="cpu"):
    """The Inpainter in a file of `save_inpainter`, in eval mode, its weights in float32.

    UserError if there is no such file, or if it holds something else.
    """
    try:
        held = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"there is no inpainter {path}; train one: python train_inpainter.py"
        ) from None
    except Exception:  # whatever PyTorch makes of bytes that are not its own
        raise UserError(f"{path} holds no weights of an inpainter, or is cut off") from None
    return _built(held, path).to(device).eval().requires_grad_(False)


def _built(held, path):
    """The Inpainter that a file's content describes; UserError if it describes none."""
    wrong = UserError(f"{path} holds no weights of an inpainter that train_inpainter.py trained")
    if not isinstance(held, dict) or not isinstance(held.get("inpainter"), dict):
        raise wrong
    width = held["inpainter"].get("width")
    state = held.get("state_dict")
    if not isinstance(width, int) or not 2 <= width <= 256 or not isinstance(state, dict):
        raise wrong
    inpainter = Inpainter(width)
    wanted = inpainter.state_dict()
    if {name: value.shape for name, value in wanted.items()} != shapes_of(state):
        raise wrong
    if not all(torch.isfinite(weight).all() for weight in state.values()):
        raise UserError(f"{path} has weights that are not finite")
    inpainter.load_state_dict(state)
    return inpainter


def shapes_of(state):
    """{name: shape} of the tensors of a state dict."""
    return {name: value.shape for name, value in state.items() if torch.is_tensor(value)}
