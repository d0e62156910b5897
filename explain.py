"""Explain every word of an image's caption: which pixels and which preceding words spoke for it, and which against.

    python explain.py photo.jpg
    python explain.py a.jpg b.jpg --checkpoint checkpoints/flickr8k-gridtd.pt --output explanations
    python explain.py photo.jpg --caption "a dog on the grass"          # explain this caption instead of the captioner's own

    python explain.py photo.jpg --method lrp gradcam attention          # and lay several methods side by side
    torchrun --nproc_per_node=4 explain.py *.jpg                        # the images shared by 4 processes

For each image and method it writes NAME-METHOD.png (a figure), .npz (the relevance maps, not normalised) and .json; for
several methods also NAME-methods.png.
"""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torchvision.transforms.v2.functional import gaussian_blur

import distributed
from captiondata import load_regions
from captioner import METHODS, load_captioner
from commandline import (
    CommandLine,
    UserError,
    add_common_flags,
    extended,
    provenance,
    run,
    set_seed,
    write_atomically,
    write_json,
)
from decoding import add_decoding_flags, decoding_options
from images import image_transform, load_image
from vocabulary import tokenize

EXPLAINED_AT_ONCE = 8  # images
COLUMNS = 5  # panels in a row of the figure
PANEL, TITLE, LABEL, WORD_LINE = (
    2.3,
    0.45,
    0.3,
    0.24,
)  # inches: a panel's side, the caption, a panel's title, a line of words
CLIP_PERCENTILE = (
    99.8  # in the figure, a pixel of this percentile of |relevance| has the full colour
)
BLUR = 0.012  # in the figure, a Gaussian of this share of the width joins single pixels into shapes
COLOURS = matplotlib.colormaps["seismic"]  # blue against, white zero, red for


def heat_map(relevance):
    """Signed relevance (H, W) -> RGB (H, W, 3) in 0..1: white at zero, red for, blue against; all white if all zero."""
    sigma = BLUR * relevance.shape[1]
    reach = [min(math.ceil(3 * sigma), side - 1) for side in relevance.shape[::-1]]
    smooth = gaussian_blur(
        torch.from_numpy(relevance)[None], [2 * pixels + 1 for pixels in reach], sigma
    )[0].numpy()
    scale = np.percentile(np.abs(smooth), CLIP_PERCENTILE)
    return COLOURS(
        0.5 + 0.5 * np.clip(smooth / scale, -1, 1) if scale > 0 else np.full_like(smooth, 0.5)
    )[..., :3]


def overlay(image, relevance):
    """The heat map laid over a pale grey version of a PIL image of any size -> RGB (H, W, 3) in 0..1."""
    height, width = relevance.shape
    grey = np.asarray(image.convert("L").resize((width, height)), dtype=np.float32) / 255
    return heat_map(relevance) * (0.55 + 0.45 * grey[..., None])


def draw_words(axes, words, relevance):
    """Preceding words as a line of text that wraps, each on a background coloured by its relevance (any unit)."""
    scale = np.abs(relevance).max() or 1.0
    renderer, inverse = axes.figure.canvas.get_renderer(), axes.transAxes.inverted()
    x, y = 0.02, 1.0
    for word, value in zip(words, relevance):
        box = {
            "facecolor": COLOURS(0.5 + 0.3 * value / scale),
            "edgecolor": "none",
            "boxstyle": "round,pad=0.2",
        }
        ink = "white" if value < -0.5 * scale else "black"
        text = axes.text(x, y, word, color=ink, fontsize=9, va="top", bbox=box)
        extent = text.get_window_extent(renderer).transformed(inverse)
        if extent.x1 > 1 and x > 0.02:
            x, y = 0.02, y - WORD_LINE / axes.get_window_extent().height * axes.figure.dpi
            text.set_position((x, y))
        x += extent.width + 0.045


def explanation_figure(image, explanation):
    """A matplotlib Figure: the image, then for every word its heat map over the image, with the words before it."""
    words = explanation.words
    columns = min(COLUMNS, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    text_height = WORD_LINE * (1.5 + len(words) // 5)
    width, height = PANEL * columns, TITLE + rows * (PANEL + text_height + LABEL)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)  # measures text
    figure.text(0.1 / width, 1 - 0.12 / height, " ".join(words), fontsize=13, va="top")
    for cell in range(len(words) + 1):
        row, column = divmod(cell, columns)
        left, top = column * PANEL + 0.06, TITLE + LABEL + row * (PANEL + text_height + LABEL)
        size = PANEL - 0.12
        picture = figure.add_axes(
            (left / width, 1 - (top + size) / height, size / width, size / height)
        )
        below = figure.add_axes(
            (
                left / width,
                1 - (top + size + text_height) / height,
                size / width,
                (text_height - 0.1) / height,
            )
        )
        picture.set_axis_off(), below.set_axis_off()
        if cell == 0:
            picture.imshow(
                image.resize(explanation.image_relevance.shape[:0:-1]), interpolation="lanczos"
            )
            below.text(
                0.02,
                1,
                "red: for the word, blue: against it\nbelow: the words before it",
                fontsize=8.5,
                va="top",
                color="dimgrey",
            )
        else:
            draw_word(picture, below, image, explanation, cell - 1)
    return figure


def draw_word(picture, below, image, explanation, t):
    """The two panels of word t: its heat map over the image, and the words before it."""
    picture.imshow(overlay(image, explanation.image_relevance[t].numpy()), interpolation="lanczos")
    picture.set_title(
        f"{explanation.words[t]}  {explanation.probabilities[t]:.0%}",
        fontsize=11,
        fontweight="bold",
        pad=4,
    )
    draw_words(
        below,
        ["<start>", *explanation.words][: t + 1],
        explanation.word_relevance[t, : t + 1].numpy(),
    )


def comparison_figure(image, explanations):
    """A matplotlib Figure of {method: Explanation of the same caption}: a row of heat maps for each method, a column a word."""
    words = next(iter(explanations.values())).words
    size, label = 0.6 * PANEL, 1.35
    width, height = label + size * len(words), TITLE + size * len(explanations)
    figure = Figure(figsize=(width, height))
    for row, (method, explanation) in enumerate(explanations.items()):
        bottom = (len(explanations) - 1 - row) * size
        figure.text(
            0.08 / width,
            (bottom + size / 2) / height,
            method.replace("_", " "),
            fontsize=10,
            va="center",
        )
        for t, word in enumerate(words):
            axes = figure.add_axes(
                (
                    (label + t * size + 0.03) / width,
                    (bottom + 0.03) / height,
                    (size - 0.06) / width,
                    (size - 0.06) / height,
                )
            )
            axes.imshow(
                overlay(image, explanation.image_relevance[t].numpy()), interpolation="lanczos"
            )
            axes.set_axis_off()
            if row == 0:
                axes.set_title(word, fontsize=11, fontweight="bold", pad=4)
    return figure


def save_figure(figure, path):
    """Write a figure to `path`, whole or not at all; returns the path."""
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return path


def paint_boxes(relevance, boxes, size):
    """Relevance of regions (T, L), of which the first n have boxes (n, 4) x1 y1 x2 y2 in pixels, as maps (T, H, W): each
    region's relevance is spread evenly over its box, overlapping boxes add. size: (H, W)."""
    maps = torch.zeros(len(relevance), *size)
    for values, (x1, y1, x2, y2) in zip(relevance.T, boxes.round().int().tolist()):
        area = maps[:, max(y1, 0) : max(y2, y1 + 1), max(x1, 0) : max(x2, x1 + 1)]
        area += values[:, None, None] / max(area[0].numel(), 1)
    return maps


def write_explanation(stem, image, explanation, about):
    """Write stem.png, stem.npz and stem.json; returns the path of the figure."""
    arrays = {
        name: value.numpy()
        for name, value in vars(explanation).items()
        if isinstance(value, torch.Tensor)
    }
    with write_atomically(extended(stem, ".npz")) as temporary:
        np.savez_compressed(temporary, words=np.array(explanation.words), **arrays)
    numbers = {
        name: arrays[name].tolist()
        for name in ("scores", "probabilities", "word_relevance", "beta")
        if name in arrays
    }
    sums = arrays["image_relevance"].sum(axis=(1, 2)).tolist()
    write_json(
        extended(stem, ".json"),
        {**about, "words": explanation.words, **numbers, "image_relevance_sum": sums},
    )
    return save_figure(explanation_figure(image, explanation), extended(stem, ".png"))


def build_parser():
    """The command line."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument(
        "--checkpoint",
        default="checkpoints/scenes-gridtd.pt",
        help="the captioner (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        default=["lrp"],
        help="how to explain (default: lrp)",
    )
    parser.add_argument(
        "--regions",
        nargs="+",
        metavar="HDF5",
        help="bottom-up features of each image, for a captioner that wants them",
    )
    parser.add_argument(
        "--through_attention",
        action="store_true",
        help="LRP of a multi-head captioner: go through the attention scores too (AttnLRP)",
    )
    parser.add_argument("--caption", help="explain this caption instead of the captioner's own")
    parser.add_argument(
        "--output", default="explanations", help="folder for what is written (default: %(default)s)"
    )
    add_decoding_flags(parser)
    add_common_flags(parser)
    return parser


def read_inputs(regions, encoder, images):
    """What the encoder looks at, (B, 3, S, S) or (B, L, D), and for bottom-up features each image's boxes, else None."""
    if not regions:
        return torch.stack([image_transform(encoder.image_size)(image) for image in images]), None
    features, boxes = zip(*map(load_regions, regions))
    return torch.stack(features), boxes


def main():
    """Caption the images if need be, explain, and write."""
    args = build_parser().parse_args()
    options = decoding_options(args)
    if args.caption is not None and options != {"method": "beam"}:
        raise UserError(
            "the flags of decoding are for the captioner's own caption, and --caption gives another"
        )
    if args.through_attention and "lrp" not in args.method:
        raise UserError("--through_attention goes with --method lrp")
    set_seed(args.seed)
    device = distributed.own_device(args.device)
    captioner = load_captioner(args.checkpoint, device)
    if (
        captioner.encoder.given != bool(args.regions)
        or args.regions
        and len(args.regions) != len(args.images)
    ):
        raise UserError(
            "a captioner of bottom-up features, and only such a one, needs --regions with one HDF5 file for each image"
        )
    for path in args.images:
        load_image(path)  # nothing is written if one of them is damaged
    names = [Path(path).stem for path in args.images]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice:
        raise UserError(
            f"two of the images are called {twice}, and their explanations would be too; explain them into two --output folders"
        )
    groups = [
        slice(first, first + EXPLAINED_AT_ONCE)
        for first in range(0, len(args.images), EXPLAINED_AT_ONCE)
    ]
    for group in distributed.shared(groups):
        explain(captioner, args.images[group], args.regions and args.regions[group], args, options)


def explain(captioner, paths, regions, args, options):
    """Caption a few images if need be, explain, and write."""
    images = [load_image(path) for path in paths]
    pixels, boxes = read_inputs(regions, captioner.encoder, images)
    captions = (
        captioner.caption(pixels, **options)
        if args.caption is None
        else [tokenize(args.caption)] * len(images)
    )
    told = [index for index, words in enumerate(captions) if words or args.caption is not None]
    for index in set(range(len(paths))).difference(told):
        print(f"{paths[index]}: the captioner says nothing of it, so there is nothing to explain")
    spoken = [captions[index] for index in told]
    explained = {
        method: captioner.explain(
            pixels[told],
            spoken,
            "attnlrp" if args.through_attention and method == "lrp" else method,
        )
        for method in args.method
    }
    for row, index in enumerate(told):
        path, image = paths[index], images[index]
        print(f"{path}: {' '.join(captions[index])}")
        stem, about = (
            Path(args.output) / Path(path).stem,
            {**provenance(args.seed, args.checkpoint), "image": str(path)},
        )
        explanations = {method: found[row] for method, found in explained.items()}
        if boxes:
            for explanation in explanations.values():
                explanation.image_relevance = paint_boxes(
                    explanation.region_relevance, boxes[index], image.size[::-1]
                )
        for method, explanation in explanations.items():
            figure = write_explanation(
                extended(stem, f"-{method}"), image, explanation, {**about, "method": method}
            )
            print(f"  explained in {figure}")
        if len(explanations) > 1:
            print(
                f"  side by side in {save_figure(comparison_figure(image, explanations), extended(stem, '-methods.png'))}"
            )


if __name__ == "__main__":
    run(main)
