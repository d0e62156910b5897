"""Removing a part of an image: what is under a mask is filled from what is around it.

    inpainter = load_inpainter("telea")
    filled = inpainter(image, mask)     # uint8 (H, W, 3), bool (H, W) -> uint8 (H, W, 3)

No inpainter touches a pixel outside of the mask, so with an empty mask the image comes back.
"""

import cv2
import numpy as np

from commandline import UserError

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


INPAINTERS = {
    "mean": mean_filled,
    "blur": blurred,
    "telea": telea,
    "navier_stokes": navier_stokes,
}


def load_inpainter(name):
    """The inpainter called `name`: a function of (image uint8 (H, W, 3), mask bool (H, W), True
    where it is to be filled) that returns the filled image, uint8.

    UserError if there is no such inpainter.
    """
    if name not in INPAINTERS:
        raise UserError(f"there is no inpainter '{name}'; choose from {', '.join(INPAINTERS)}")

    def inpaint(image, mask):
        if image.shape[:2] != mask.shape:
            raise ValueError(f"the mask {mask.shape} is not of the image's size {image.shape[:2]}")
        if mask.all():
            raise UserError("nothing is left of the image to fill the mask from")
        filled = image.copy()
        if mask.any():
            found = INPAINTERS[name](image, mask)
            filled[mask] = np.clip(np.round(found[mask]), 0, 255).astype(np.uint8)
        return filled

    return inpaint
