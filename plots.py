"""The figures: heat maps over images, a figure of one explanation, several methods compared, the
curves of correctness, and those of a training.

In the heat maps red speaks for a word, blue against it, and white is zero.
"""

import math
import textwrap

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torchvision.transforms.v2.functional import gaussian_blur

from commandline import write_atomically

COLOURS = matplotlib.colormaps["seismic"]
# The pixel at this percentile of |relevance| has the full colour.
CLIP_PERCENTILE = 99.8
# The standard deviation of the Gaussian that joins single pixels into shapes, over the map's width.
BLUR = 0.012

DOTS_PER_INCH = 110
# All that follows is in inches.
PANEL = 2.3  # the side of a panel and the margins beside it
MARGIN = 0.06  # on each side of a panel
CAPTION = 0.45  # the height of the caption, at the top of a figure, if it has one line
CAPTION_LINE = 0.22  # the height of each further line
TITLE = 0.3  # the height of a panel's title
WORD_LINE = 0.24  # the height of a line of words
GAP = 0.1  # between a panel and the words below it
SMALL_PANEL = 0.6 * PANEL  # in a comparison of methods
SMALL_MARGIN = 0.03
METHOD = 1.35  # the width of the methods' names in a comparison

CHARACTERS_IN_A_PANEL = 22  # of the caption
PANELS_IN_A_ROW = 5
WORDS_IN_A_LINE = 5  # that the room below a panel is reckoned with


class Sheet:
    """A matplotlib Figure on which places are given in inches from its lower left corner."""

    def __init__(self, width, height):
        self.width = width
        self.height = height
        self.figure = Figure(figsize=(width, height))
        FigureCanvasAgg(self.figure)  # it can measure text

    def axes(self, left, bottom, width, height):
        """Axes of this place and size, without a frame."""
        place = (
            left / self.width,
            bottom / self.height,
            width / self.width,
            height / self.height,
        )
        axes = self.figure.add_axes(place)
        axes.set_axis_off()
        return axes

    def text(self, left, y, text, **style):
        """Write a text; y is its top, or its middle if `style` says so (va="center")."""
        self.figure.text(left / self.width, y / self.height, text, **style)


def heat_map(relevance):
    """Signed relevance (H, W) -> RGB (H, W, 3) in 0..1; all white if the relevance is all zero."""
    smooth = blurred(relevance)
    scale = np.percentile(np.abs(smooth), CLIP_PERCENTILE)
    if scale > 0:
        strength = 0.5 + 0.5 * np.clip(smooth / scale, -1, 1)
    else:
        strength = np.full_like(smooth, 0.5)
    return COLOURS(strength)[..., :3]


def blurred(relevance):
    """Relevance (H, W) smoothed by a Gaussian, which reaches as far as 3 sigma or the border."""
    height, width = relevance.shape
    sigma = BLUR * width
    reach_x = min(math.ceil(3 * sigma), width - 1)
    reach_y = min(math.ceil(3 * sigma), height - 1)
    kernel_size = [2 * reach_x + 1, 2 * reach_y + 1]
    return gaussian_blur(torch.from_numpy(relevance)[None], kernel_size, sigma)[0].numpy()


def overlay(image, relevance):
    """The heat map of relevance (H, W) over a pale grey version of a PIL image of any size.

    Returns RGB (H, W, 3) in 0..1.
    """
    height, width = relevance.shape
    grey = np.asarray(image.convert("L").resize((width, height)), dtype=np.float32) / 255
    return heat_map(relevance) * (0.55 + 0.45 * grey[..., None])


def paint_boxes(relevance, boxes, size):
    """Relevance of regions as maps of pixels.

    relevance (T, L), boxes (n, 4) of the first n of the L regions, x1 y1 x2 y2 in pixels, size
    (H, W) -> (T, H, W). Each region's relevance is spread evenly over its box; overlapping boxes
    add.
    """
    maps = torch.zeros(len(relevance), *size)
    for values, (x1, y1, x2, y2) in zip(relevance.T, boxes.round().int().tolist()):
        rows = slice(max(y1, 0), max(y2, y1 + 1))
        columns = slice(max(x1, 0), max(x2, x1 + 1))
        area = maps[:, rows, columns]
        area += values[:, None, None] / max(area[0].numel(), 1)
    return maps


def explanation_figure(image, explanation, positions=None):
    """A matplotlib Figure of an Explanation: the image, then a panel for every word.

    A word's panel has its heat map over the image, and below it the words before it. positions: of
    the words to draw, or None for all.
    """
    words = explanation.words
    if positions is None:
        positions = range(len(words))
    panels = len(positions) + 1
    columns = min(PANELS_IN_A_ROW, panels)
    rows = math.ceil(panels / columns)
    last = max(positions, default=-1)
    text_height = WORD_LINE * (1.5 + (last + 1) // WORDS_IN_A_LINE)
    row_height = PANEL + text_height + TITLE
    side = PANEL - 2 * MARGIN
    caption = textwrap.wrap(" ".join(words), CHARACTERS_IN_A_PANEL * columns)
    caption_height = CAPTION + CAPTION_LINE * (len(caption) - 1)
    sheet = Sheet(PANEL * columns, caption_height + rows * row_height)
    sheet.text(0.1, sheet.height - 0.12, "\n".join(caption), fontsize=13, va="top")
    for panel in range(panels):
        row, column = divmod(panel, columns)
        left = column * PANEL + MARGIN
        bottom = sheet.height - (caption_height + row * row_height + TITLE + side)
        picture = sheet.axes(left, bottom, side, side)
        below = sheet.axes(left, bottom - text_height, side, text_height - GAP)
        if panel == 0:
            draw_image(picture, below, image, explanation.image_relevance.shape[1:])
        else:
            draw_word(picture, below, image, explanation, positions[panel - 1])
    return sheet.figure


def draw_image(picture, below, image, size):
    """The first panel: the image at the size (H, W) of the heat maps, and how to read them."""
    height, width = size
    picture.imshow(image.resize((width, height)), interpolation="lanczos")
    legend = "red: for the word, blue: against it\nbelow: the words before it"
    below.text(0.02, 1, legend, fontsize=8.5, va="top", color="dimgrey")


def draw_word(picture, below, image, explanation, position):
    """The panel of one word: its heat map over the image, and the words before it."""
    draw_overlay(picture, image, explanation, position)
    title = f"{explanation.words[position]}  {explanation.probabilities[position]:.0%}"
    draw_title(picture, title)
    words = ["<start>", *explanation.words][: position + 1]
    draw_words(below, words, explanation.word_relevance[position, : position + 1].numpy())


def draw_overlay(axes, image, explanation, position):
    """The heat map of one word over the image."""
    relevance = explanation.image_relevance[position].numpy()
    axes.imshow(overlay(image, relevance), interpolation="lanczos")


def draw_title(axes, title):
    """The title of a panel."""
    axes.set_title(title, fontsize=11, fontweight="bold", pad=4)


def draw_words(axes, words, relevance):
    """Words as a text that wraps, each on a background coloured by its relevance (any unit)."""
    scale = np.abs(relevance).max() or 1.0
    renderer = axes.figure.canvas.get_renderer()
    to_axes = axes.transAxes.inverted()
    height = axes.get_window_extent().height / axes.figure.dpi  # inches
    margin = 0.02  # as all that follows in fractions of the axes
    space = 0.045
    x = margin
    y = 1.0
    for word, value in zip(words, relevance):
        background = COLOURS(0.5 + 0.3 * value / scale)
        box = {"facecolor": background, "edgecolor": "none", "boxstyle": "round,pad=0.2"}
        ink = "white" if value < -0.5 * scale else "black"
        text = axes.text(x, y, word, color=ink, fontsize=9, va="top", bbox=box)
        extent = text.get_window_extent(renderer).transformed(to_axes)
        if extent.x1 > 1 and x > margin:
            x = margin
            y -= WORD_LINE / height
            text.set_position((x, y))
        x += extent.width + space


def comparison_figure(image, explanations, positions=None):
    """A matplotlib Figure of several methods: a row of heat maps for each, a column for each word.

    explanations: {method: Explanation}, all of the same caption; positions: of the words to draw,
    or None for all.
    """
    words = next(iter(explanations.values())).words
    if positions is None:
        positions = range(len(words))
    side = SMALL_PANEL - 2 * SMALL_MARGIN
    width = METHOD + SMALL_PANEL * len(positions)
    sheet = Sheet(width, CAPTION + SMALL_PANEL * len(explanations))
    for row, (method, explanation) in enumerate(explanations.items()):
        bottom = (len(explanations) - 1 - row) * SMALL_PANEL
        name = method.replace("_", " ")
        sheet.text(0.08, bottom + SMALL_PANEL / 2, name, fontsize=10, va="center")
        for column, position in enumerate(positions):
            left = METHOD + column * SMALL_PANEL + SMALL_MARGIN
            axes = sheet.axes(left, bottom + SMALL_MARGIN, side, side)
            draw_overlay(axes, image, explanation, position)
            if row == 0:
                draw_title(axes, words[position])
    return sheet.figure


def correctness_figure(curves, thresholds):
    """Figure 3 of the paper: correctness over the threshold, dashed for negative relevance.

    curves: {method: {where correctness is measured: its value at each threshold}}; where a method
    is called "negative METHOD", it has the colour of METHOD. A panel for each place that all
    methods have.
    """
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    methods = list(curves)
    places = []
    for place in curves[methods[0]]:
        if all(place in found for found in curves.values()):
            places.append(place)
    panels = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
    for axes, place in zip(panels, places):
        for method, found in curves.items():
            colour = f"C{methods.index(method.removeprefix('negative '))}"
            style = "--" if method.startswith("negative ") else "-"
            axes.plot(thresholds, found[place], style, color=colour, label=method)
        axes.set(xlabel="threshold", ylabel="correctness", title=place, ylim=(0, 1))
    lines = panels[-1].get_legend_handles_labels()
    figure.legend(*lines, loc="outside right center", fontsize=8)
    return figure


def training_figure(history):
    """The curves of a training: losses on the left, metrics on the right.

    history: a row of figures, {name: value}, for each epoch.
    """
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, history, ("loss", "reward", "baseline"))
    draw_curves(right, history, ("CIDEr", "CIDEr-D", "BLEU-4"))
    return figure


def draw_curves(axes, history, names):
    """Draw the figures of these names, where there are some, over the steps."""
    for name in names:
        rows = [row for row in history if name in row]
        if rows:
            steps = [row["iterations"] for row in rows]
            values = [row[name] for row in rows]
            axes.plot(steps, values, marker=".", label=name)
    axes.set_xlabel("steps")
    axes.legend()


def save_figure(figure, path, dots_per_inch=DOTS_PER_INCH):
    """Write a figure to `path`, whole or not at all; returns the path."""
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=dots_per_inch)
    return path
