"""Pixels: reading an image file of any kind, and making of it what an encoder takes."""

import os
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from commandline import UserError
from names import IMAGE_ENDINGS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_SHAPES = (0.8, 1.25)  # width by height of a random part of an image
EXIF_ORIENTATION = 0x0112
# The last bytes of a file of these formats that was not cut short.
FILE_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def image_files(folder):
    """The image files of a folder, told by their endings, sorted by name.

    UserError if there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} of images")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_ENDINGS)
    if not files:
        raise UserError(f"there is no image in {folder}; known are {', '.join(IMAGE_ENDINGS)}")
    return files


def is_photograph(image):
    """Whether this is one photograph: the name of its file, or a PIL image."""
    return isinstance(image, (str, os.PathLike, Image.Image))


def photographs_of(images):
    """The RGB PIL images of one photograph or of a list of them; None for anything else.

    A photograph is the name of its file, or a PIL image. UserError for a file that cannot be read,
    and for a list that holds something else.
    """
    if is_photograph(images):
        images = [images]
    if not isinstance(images, (list, tuple)):
        return None
    found = []
    for image in images:
        if not is_photograph(image):
            kind = type(image).__name__
            raise UserError(f"a photograph is the name of a file or a PIL image, not a {kind}")
        found.append(_to_rgb(image) if isinstance(image, Image.Image) else load_image(image))
    return found


def load_image(path):
    """The image in `path` as an 8-bit RGB PIL image, upright as its EXIF tag says, transparency
    laid on white.

    UserError naming the file if it is missing, truncated or not an image.
    """
    with opened_image(path) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


def image_size(path):
    """(width, height) in pixels as `load_image` returns it; reads the header only. UserError as
    there."""
    with opened_image(path) as image:
        sideways = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
        return image.size[::-1] if sideways else image.size


def require_whole(path):
    """UserError naming the file if it was cut short, as by a download that broke off.

    A JPEG or PNG file that ends as it should is taken for whole: to decode every image of a large
    dataset would take minutes. Any other file is decoded.
    """
    with opened_image(path) as image:
        end = FILE_ENDS.get(image.format)
        if end is None or not _ends_with(path, end):
            image.load()


def _ends_with(path, end):
    """Whether these are the last bytes of a file that has more of them."""
    with open(path, "rb") as file:
        file.seek(-len(end), os.SEEK_END)
        return file.read() == end


@contextmanager
def opened_image(path):
    """The image in `path` as PIL opens it; whatever goes wrong with it is a UserError naming the
    file."""
    if os.path.exists(path) and not os.path.isfile(path):  # to read a pipe could take for ever
        raise UserError(f"{path} cannot be read as an image, for it is no file")
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image, it may be damaged ({error})") from None


def _to_rgb(image):
    """An 8-bit RGB copy of a PIL image of any mode; ValueError for floating-point numbers."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, and nothing says which is white")
    if image.mode.startswith("I"):  # 16 bits a pixel: PIL would clip them to 255 instead of scaling
        grey = (np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def image_transform(size, augment=False, smallest_crop=1.0):
    """A function: PIL RGB image -> float (3, size, size), stretched to a square (as the paper
    does), ImageNet-normalised.

    `augment` adds the original's training augmentation: brightness and contrast by up to 20 %,
    mirroring. With a smallest_crop it first takes a random part of the image, of at least that
    share of its area.
    """
    if augment and smallest_crop < 1:
        steps = [v2.RandomResizedCrop((size, size), (smallest_crop, 1.0), CROP_SHAPES)]
    else:
        steps = [v2.Resize((size, size))]
    if augment:
        steps += [v2.ColorJitter(brightness=0.2, contrast=0.2), v2.RandomHorizontalFlip()]
    steps += [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        v2.ToPureTensor(),
    ]
    return v2.Compose(steps)


def renormalized(images, mean, std):
    """ImageNet-normalised images (B, 3, H, W), normalised by another mean and deviation instead."""
    if tuple(mean) == IMAGENET_MEAN and tuple(std) == IMAGENET_STD:
        return images
    imagenet_mean, imagenet_std, mean, std = (
        images.new_tensor(values).view(3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
    )
    return (images * imagenet_std + imagenet_mean - mean) / std
