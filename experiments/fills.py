"""What stands in an image where pixels are removed: the mean colour, a blur, or a guess that tells
nothing of the mask's shape.

Images are (3, H, W), ImageNet-normalised; masks (N, H, W) bool, True where pixels are removed.
"""

import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from explanation import exact_convolutions

BLUR = 0.1  # the standard deviation of the blur, as a share of the image's longer side
# Neighbours of a pixel and their weights (Rong et al. 2022): 1/6 beside, 1/12 across.
NEIGHBOURS = ((1 / 12, 1 / 6, 1 / 12), (1 / 6, 0, 1 / 6), (1 / 12, 1 / 6, 1 / 12))
NOISE = 0.01  # the standard deviation of what is added to a guess
RESIDUAL = 3e-4  # of the linear equations, relative; the error stays below the noise
MOST_STEPS = 1000
SOLVED_AT_ONCE = {"cpu": 3}  # images; more do not fit a CPU's cache, and take seven times as long
SMALLEST = 8  # pixels a side of an image that is solved at half its size


def mean_fill(image, masks):
    """(N, 3, H, W): the image with the mean colour, which is 0, under each mask."""
    return image.masked_fill(masks[:, None], 0)


def blur_fill(image, masks):
    """(N, 3, H, W): the image, blurred under each mask."""
    sigma = BLUR * max(image.shape[1:])
    size = 2 * min(round(2 * sigma), min(image.shape[1:]) - 1) + 1
    blurred = gaussian_blur(image, [size, size], [sigma, sigma])
    return torch.where(masks[:, None], blurred, image)


def linear_fill(image, masks, seed=0):
    """(N, 3, H, W): under each mask a noisy linear imputation (ROAD, Rong et al. 2022).

    Every removed pixel is the weighted mean of its eight neighbours, known or removed, which is a
    system of linear equations. It is solved by conjugate gradients; noise follows. seed: of it.
    """
    missing = masks[:, None].to(image)
    with exact_convolutions():  # TF32 has too few digits to solve equations
        found = imputed_in_parts(image * (1 - missing), missing)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator).to(image)
    return found + missing * NOISE * noise


def imputed_in_parts(known, missing):
    """As `imputed`, of images that miss about as much together: they take as many steps."""
    at_once = SOLVED_AT_ONCE.get(known.device.type, len(known))
    found = torch.empty_like(known)
    by_size = missing.sum((1, 2, 3)).argsort(stable=True)
    for part in by_size.split(at_once):
        found[part] = imputed(known[part], missing[part])
    return found


def imputed(known, missing):
    """Images (N, C, H, W) whose missing pixels solve the equations, but for RESIDUAL.

    known: the images, 0 where `missing` (N, 1, H, W) is 1. They are solved at half the size first,
    which tells where to start and saves a third of the time or more.
    """
    total = sum_of_neighbours(torch.ones_like(missing[:1]))

    def left_side(values):
        return missing * (total * values - sum_of_neighbours(values))

    start = missing * first_guess(known, missing)
    return known + solved(left_side, missing * sum_of_neighbours(known), start)


def first_guess(known, missing):
    """Where to start: the solution at half the size, enlarged; the mean of a small image."""
    if min(known.shape[2:]) < SMALLEST:
        stays = (1 - missing).sum((2, 3), keepdim=True)
        return known.sum((2, 3), keepdim=True) / stays.clamp(min=1)
    stays = F.avg_pool2d(1 - missing, 2, ceil_mode=True)
    smaller = F.avg_pool2d(known, 2, ceil_mode=True) / stays.clamp(min=0.1)
    found = imputed(smaller, (stays == 0).to(known))
    return F.interpolate(found, size=known.shape[2:], mode="bilinear")


def sum_of_neighbours(images):
    """(N, C, H, W): of each pixel the weighted sum of its neighbours within the image."""
    channels = images.shape[1]
    kernel = torch.tensor(NEIGHBOURS).to(images).expand(channels, 1, 3, 3)
    return F.conv2d(images, kernel, padding=1, groups=channels)


def solved(left_side, right_side, start):
    """The x (N, C, H, W) with left_side(x) = right_side, by conjugate gradients from `start`.

    left_side: a symmetric, positive linear map of each channel of each image by itself.
    """
    values = start
    rest = right_side - left_side(values)
    direction = rest
    size = products(rest, rest)
    enough = RESIDUAL**2 * products(right_side, right_side)
    least = torch.finfo(size.dtype).tiny  # where the residual is exactly zero
    for _ in range(MOST_STEPS):
        if not (size > enough).any():
            break
        along = left_side(direction)
        step = size / products(direction, along).clamp(min=least)
        values = values + step * direction
        rest = rest - step * along
        before = size
        size = products(rest, rest)
        direction = rest + size / before.clamp(min=least) * direction
    return values


def products(first, second):
    """The scalar product of each channel with the same one of others, (N, C, 1, 1)."""
    return (first * second).sum((2, 3), keepdim=True)


FILLS = {"mean": mean_fill, "blur": blur_fill, "linear": linear_fill}
