"""Explain every word of an image's caption: which pixels and which preceding words spoke for it, and which against.

    python explain.py photo.jpg
    python explain.py a.jpg b.jpg --checkpoint checkpoints/flickr8k-gridtd.pt --output explanations
    python explain.py photo.jpg --caption "a dog on the grass"          # explain this caption instead of the captioner's own

For each image and method it writes NAME-METHOD.png (a figure), .npz (the relevance maps, not normalised) and .json.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageFilter

from captiondata import image_transform, load_image, tokenize
from captioner import METHODS, load_captioner
from commandline import UserError, add_common_flags, choose_device, provenance, run, set_seed, write_atomically, write_json

COLUMNS = 5
CLIP_PERCENTILE = 99.8  # in the figure, a pixel of this percentile of |relevance| has the full colour
BLUR = 0.008  # in the figure, a Gaussian of this share of the width joins single pixels into shapes
COLOURS = matplotlib.colormaps["seismic"]  # blue against, white zero, red for


def heat_map(relevance):
    """Signed relevance (H, W) -> RGB (H, W, 3) in 0..1: white at zero, red for, blue against; all white if all zero."""
    image = Image.fromarray(relevance.astype(np.float32), mode="F")
    smooth = np.asarray(image.filter(ImageFilter.GaussianBlur(BLUR * relevance.shape[1])))
    scale = np.percentile(np.abs(smooth), CLIP_PERCENTILE)
    return COLOURS(0.5 + 0.5 * np.clip(smooth / scale, -1, 1) if scale > 0 else np.full_like(smooth, 0.5))[..., :3]


def overlay(image, relevance):
    """The heat map laid over a pale grey version of a PIL image of any size -> RGB (H, W, 3) in 0..1."""
    height, width = relevance.shape
    grey = np.asarray(image.convert("L").resize((width, height)), dtype=np.float32) / 255
    return heat_map(relevance) * (0.55 + 0.45 * grey[..., None])


def draw_words(axes, words, relevance):
    """Preceding words as a line of text that wraps, each on a background coloured by its relevance (any unit)."""
    scale = np.abs(relevance).max() or 1.0
    renderer = axes.figure.canvas.get_renderer()
    x, y, line = 0.0, 0.9, 0.2
    for word, value in zip(words, relevance):
        colour = COLOURS(0.5 + 0.42 * value / scale)
        ink = "white" if abs(value) > 0.6 * scale else "black"
        box = {"facecolor": colour, "edgecolor": "none", "boxstyle": "round,pad=0.22"}
        text = axes.text(x, y, word, color=ink, fontsize=9, va="center", bbox=box)
        extent = text.get_window_extent(renderer).transformed(axes.transAxes.inverted())
        if extent.x1 > 1 and x > 0:
            x, y = 0.0, y - line
            text.set_position((x, y))
        x += extent.width + 0.045


def explanation_figure(image, explanation, title=""):
    """A matplotlib Figure: the image, then for every word its heat map over the image, with the words before it."""
    words = explanation.words
    columns = min(COLUMNS, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    figure = Figure(figsize=(2.3 * columns, 3.35 * rows + 0.5))
    figure.suptitle(title or " ".join(words), fontsize=13, x=0.012, ha="left")
    cells = figure.add_gridspec(
        2 * rows, columns, height_ratios=[2.3, 0.85] * rows,
        left=0.012, right=0.988, top=1 - 0.55 / (3.35 * rows + 0.5), bottom=0.01, wspace=0.06, hspace=0.1,
    )  # fmt: skip
    inputs = ["<start>", *words]
    for cell in range(len(words) + 1):
        row, column = divmod(cell, columns)
        picture, text = (figure.add_subplot(cells[2 * row + part, column]) for part in (0, 1))
        picture.set_axis_off(), text.set_axis_off()
        if cell == 0:
            picture.imshow(image.resize(explanation.image_relevance.shape[:0:-1]), interpolation="lanczos")
            picture.set_title("image", fontsize=11)
            text.text(0, 0.9, "red: for the word\nblue: against it\nbelow: the words before it", fontsize=8.5, va="top", color="dimgrey")
            continue
        t = cell - 1
        picture.imshow(overlay(image, explanation.image_relevance[t].numpy()), interpolation="lanczos")
        picture.set_title(f"{words[t]}  {explanation.probabilities[t]:.0%}", fontsize=11, fontweight="bold")
        draw_words(text, inputs[: t + 1], explanation.word_relevance[t, : t + 1].numpy())
    return figure


def write_explanation(stem, image, explanation, about):
    """Write stem.png, stem.npz and stem.json; returns the path of the figure."""
    arrays = {name: value.numpy() for name, value in vars(explanation).items() if isinstance(value, torch.Tensor)}
    with write_atomically(stem.with_suffix(".npz")) as temporary:
        np.savez_compressed(temporary, words=np.array(explanation.words), **arrays)
    numbers = {name: arrays[name].tolist() for name in ("scores", "probabilities", "word_relevance", "beta") if name in arrays}
    sums = arrays["image_relevance"].sum(axis=(1, 2)).tolist()
    write_json(stem.with_suffix(".json"), {**about, "words": explanation.words, **numbers, "image_relevance_sum": sums})
    figure = explanation_figure(image, explanation)
    with write_atomically(stem.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=110)
    return stem.with_suffix(".png")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--checkpoint", default="checkpoints/scenes-gridtd.pt", help="the captioner (default: %(default)s)")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["lrp"], help="how to explain (default: lrp)")
    parser.add_argument("--caption", help="explain this caption instead of the captioner's own")
    parser.add_argument("--beam_size", type=int, default=3, help="beams when captioning (default: %(default)s)")
    parser.add_argument("--output", default="explanations", help="folder for what is written (default: %(default)s)")
    add_common_flags(parser)
    return parser


def main():
    args = build_parser().parse_args()
    if args.beam_size < 1:
        raise UserError("--beam_size must be at least 1")
    set_seed(args.seed)
    captioner = load_captioner(args.checkpoint, choose_device(args.device))
    images = [load_image(path) for path in args.images]
    pixels = torch.stack([image_transform(captioner.encoder.image_size)(image) for image in images])
    if args.caption is None:
        captions = captioner.caption(pixels, beam_size=args.beam_size)
    else:
        captions = [tokenize(args.caption)] * len(images)
    for method in args.method:
        explanations = captioner.explain(pixels, captions, method=method)
        for path, image, explanation in zip(args.images, images, explanations):
            about = {**provenance(args.seed, args.checkpoint), "image": str(path), "method": method}
            figure = write_explanation(Path(args.output) / f"{Path(path).stem}-{method}", image, explanation, about)
            print(f"{path}: {' '.join(explanation.words)}\n  explained in {figure}")


if __name__ == "__main__":
    run(main)
