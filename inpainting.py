"""Removing a part of an image: what is under a mask is filled from what is around it.

    inpainter = load_inpainter("telea")            # or "generative", whose network is trained
    filled = inpainter(image, mask)     # uint8 (H, W, 3), bool (H, W) -> uint8 (H, W, 3)

No inpainter touches a pixel outside of the mask, so with an empty mask the image comes back.
"""

import cv2
import numpy as np
import torch

from commandline import UserError
from gatedconv import read_inpainter

SIDE = 128  # pixels a side of the images that the generative inpainter is trained on
CONTEXT = 2.0  # the window that it sees, by the hole's longer side
RADIUS = 3  # pixels around the mask that the two of OpenCV look at
BLUR = 0.125  # the standard deviation of the blur, as a share of the image's longer side


def mean_filled(image, mask):
    """The mean colour of all known pixels."""
    return np.broadcast_to(image[~mask].mean(axis=0), image.shape)


def blurred(image, mask):
    """A Gaussian mean of the known pixels around, each pixel's weights normalised (Knutsson and
    Westin 1993)."""
    sigma = BLUR * max(mask.shape)
    known = (~mask).astype(np.float32)
    weight = cv2.GaussianBlur(known, (0, 0), sigma)[..., None]
    colours = cv2.GaussianBlur(image.astype(np.float32) * known[..., None], (0, 0), sigma)
    return colours / np.maximum(weight, 1e-6)


def telea(image, mask):
    """The fast marching method of Telea (2004)."""
    return cv2.inpaint(
        np.ascontiguousarray(image), mask.astype(np.uint8), RADIUS, cv2.INPAINT_TELEA
    )


def navier_stokes(image, mask):
    """The Navier-Stokes method of Bertalmio, Bertozzi and Sapiro (2001)."""
    return cv2.inpaint(np.ascontiguousarray(image), mask.astype(np.uint8), RADIUS, cv2.INPAINT_NS)


class Generative:
    """The network of gatedconv.py, of the file `weights`.

    It sees a square window around the hole, twice as long as the hole, or what of it lies in the
    image, at the size at which it was trained.
    """

    def __init__(self, weights, device):
        self.network = read_inpainter(weights, device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, image, mask):
        """An image (H, W, 3) and a mask (H, W) with a hole -> the image filled, (H, W, 3) float."""
        rows, columns = window(mask)
        part = image[rows, columns]
        hole = mask[rows, columns].astype(np.uint8)
        size = (SIDE, SIDE)
        seen = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
        # A pixel that the hole touches is not known.
        missing = cv2.resize(hole.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
        made = self.fill(seen, missing)
        height, width = hole.shape
        result = image.astype(np.float32)
        result[rows, columns] = cv2.resize(made, (width, height), interpolation=cv2.INTER_CUBIC)
        return result

    def fill(self, image, mask):
        """The refined guess of an image (SIDE, SIDE, 3), 0..255, without a mask's pixels; float."""
        pixels = torch.from_numpy(np.ascontiguousarray(image)).to(self.device)
        pixels = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
        masks = torch.from_numpy(mask).to(self.device)[None, None].float()
        _, refined = self.network(pixels, masks)
        return ((refined[0].permute(1, 2, 0) + 1) * 127.5).cpu().numpy()


def window(mask):
    """The slices (rows, columns) of the window around the hole of a mask (H, W).

    It is moved into the image where it would stand out of it.
    """
    places = np.nonzero(mask)
    longest = max(int(np.ptp(place)) + 1 for place in places)
    slices = []
    for place, size in zip(places, mask.shape):
        length = min(size, max(SIDE, round(CONTEXT * longest)))
        middle = (int(place.min()) + int(place.max()) + 1) // 2
        start = min(max(0, middle - length // 2), size - length)
        slices.append(slice(start, start + length))
    return tuple(slices)


INPAINTERS = {
    "mean": mean_filled,
    "blur": blurred,
    "telea": telea,
    "navier_stokes": navier_stokes,
    "generative": Generative,
}


def load_inpainter(name, weights=None, device="cpu"):
    """The inpainter called `name`: a function of (image uint8 (H, W, 3), mask bool (H, W), True
    where it is to be filled) that returns the filled image, uint8.

    weights: the file of the generative inpainter's network, which computes on `device`. UserError
    if there is no such inpainter, or no such file.
    """
    if name not in INPAINTERS:
        raise UserError(f"there is no inpainter '{name}'; choose from {', '.join(INPAINTERS)}")
    fill = INPAINTERS[name]
    if fill is Generative:
        fill = Generative(weights, torch.device(device))

    def inpaint(image, mask):
        if image.shape[:2] != mask.shape:
            raise ValueError(f"the mask {mask.shape} is not of the image's size {image.shape[:2]}")
        if mask.all():
            raise UserError("nothing is left of the image to fill the mask from")
        filled = image.copy()
        if mask.any():
            found = fill(image, mask)
            filled[mask] = np.clip(np.round(found[mask]), 0, 255).astype(np.uint8)
        return filled

    return inpaint
