"""The figures: heat maps over images, a figure of one explanation, several methods compared, the
curves of correctness, and those of a training.

An *Explanation* here is anything that has the fields of explanation.Explanation.

In a heat map of a method whose sign means something, red speaks for a word and blue against it. The
maps of other methods go from white to purple. White is always zero.
"""

import functools
import io
import math
import textwrap
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_blur

from commandline import UserError, write_atomically
from gradient_utils import NON_NEGATIVE, SIGNED, SIZE
from names import SCALES

# From ColorBrewer (Harrower and Brewer 2003): RdBu without its darkest ends, and Purples. People
# who confuse red with green tell these colours apart. The odd number keeps a white in the middle.
AGAINST = "#2166ac"
FOR = "#b2182b"
DIVERGING = LinearSegmentedColormap.from_list(
    "against and for",
    [(0, AGAINST), (0.2, "#4393c3"), (0.34, "#92c5de"), (0.5, "#ffffff")]
    + [(0.66, "#f4a582"), (0.8, "#d6604d"), (1, FOR)],
    N=257,
)
SEQUENTIAL = LinearSegmentedColormap.from_list(
    "size", [(0, "#ffffff"), (0.3, "#bcbddc"), (0.65, "#756bb1"), (1, "#54278f")], N=257
)
NOTE = "#4d4d4d"  # the colour of small print
PALEST = 0.65  # what is left of the white of a heat map over a black pixel
# The pixel at this percentile of |relevance| has the full colour.
CLIP_PERCENTILE = 99.8
# The standard deviation of the Gaussian that joins single pixels into shapes, over the map's width.
BLUR = 0.012
LARGEST = 640  # pixels of the longer side of an image in a figure

DOTS_PER_INCH = 120
PRINTED_DOTS_PER_INCH = 300
TEXT_AS_TEXT = {"pdf.fonttype": 42, "svg.fonttype": "none"}  # by default it becomes outlines
# All that follows is in inches.
PANEL = 2.3  # the width of a panel and the margins beside it
MARGIN = 0.06  # on each side of a panel
CAPTION = 0.45  # the height of the caption, at the top of a figure, if it has one line
CAPTION_LINE = 0.22  # the height of each further line
TITLE = 0.3  # the height of a panel's title
WORD_LINE = 0.24  # the height of a line of words
WORD_PADDING = 0.03  # between a word and the edge of its background
WORD_SPACE = 0.1  # between two words
GAP = 0.1  # between what stands one below the other in a panel
BAR = 0.15  # the height of a bar and the space around it
BAR_SIDES = 0.45  # the room for the name of a bar, and for its number
NOTE_LINE = 0.16  # the height of a line of small print
NOTE_CHARACTER = 0.063  # the mean width of its character
COLOUR_BAR = 0.1  # the height of a colour bar
SMALL_PANEL = 0.6 * PANEL  # in a comparison of methods
SMALL_MARGIN = 0.03
METHOD = 1.6  # the width of the methods' names in a comparison
METHOD_LINE = 0.19  # the height of a line of such a name
SMALL_ROW = 0.95  # the least height of a row of a comparison, where its method's legend fits in

WORD_SIZE = 9  # points
SMALL_PRINT = 7.5  # points
SMALLEST_PRINT = 5.5  # points, in a figure that is made to fit a column
SMALLEST_ZOOM = 0.55  # at which this print still has room
CHARACTER = 0.1  # the mean width of a caption's character, in inches
# An image of another shape is drawn smaller, so that it does not leave these (height by width).
FLATTEST = 0.35
TALLEST = 1.4
METHOD_CHARACTERS = 20  # that a line of a method's name may have
COLUMNS = (5, 4, 6)  # how many panels may stand in a row, the best first
SMALL_COLUMNS = 12  # the most words in a row of a comparison


class ShownFigure(Figure):
    """A Figure that a notebook shows without pyplot."""

    def _repr_png_(self):
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


class Sheet:
    """A matplotlib Figure on which places are given in inches from its upper left corner."""

    def __init__(self, width, height):
        self.width = width
        self.height = height
        self.figure = ShownFigure(figsize=(width, height))
        FigureCanvasAgg(self.figure)

    def axes(self, left, top, width, height):
        """Axes of this place and size, without a frame."""
        place = (
            left / self.width,
            1 - (top + height) / self.height,
            width / self.width,
            height / self.height,
        )
        axes = self.figure.add_axes(place)
        axes.set_axis_off()
        return axes

    def text(self, left, top, text, **style):
        """Write a text; `top` is its top, or its middle if `style` says so (va="center")."""
        style = {"va": "top", "parse_math": False, **style}
        self.figure.text(left / self.width, 1 - top / self.height, text, **style)

    def note(self, left, top, text, **style):
        """Write a line of small print."""
        self.text(left, top, text, fontsize=SMALL_PRINT, color=NOTE, **style)


# --------------------------------------------------------------------------------------- heat maps


def heat_map(values, scale, kind=SIGNED):
    """Values of a heat map (H, W) -> RGB (H, W, 3) in 0..1; white is zero.

    scale: the value of the full colour; where it is 0, all is white. kind: one of explanation.py.
    """
    shares = values / scale if scale > 0 else np.zeros_like(values)
    if kind == SIGNED:
        return DIVERGING(0.5 + 0.5 * np.clip(shares, -1, 1))[..., :3]
    return SEQUENTIAL(np.clip(shares, 0, 1))[..., :3]


def overlay(photograph, values, scale, kind=SIGNED):
    """A heat map over a pale grey version of a PIL image.

    The values (H, W) are enlarged to the image's size: returns RGB (height, width, 3) in 0..1.
    """
    enlarged = Image.fromarray(values).resize(photograph.size, Image.Resampling.BILINEAR)
    grey = np.asarray(photograph.convert("L"), dtype=np.float32) / 255
    shade = PALEST + (1 - PALEST) * grey[..., None]
    return heat_map(np.asarray(enlarged), scale, kind) * shade


def blurred(maps):
    """Maps (T, H, W) smoothed by a Gaussian, which reaches as far as 3 sigma or the border."""
    height, width = maps.shape[1:]
    sigma = BLUR * width
    reach_x = min(math.ceil(3 * sigma), width - 1)
    reach_y = min(math.ceil(3 * sigma), height - 1)
    kernel_size = [2 * reach_x + 1, 2 * reach_y + 1]
    return gaussian_blur(maps, kernel_size, sigma)


def drawable_maps(explanation):
    """The image maps of an Explanation as they are drawn: float32 array (T, H, W).

    They are without sign if the sign says nothing, not larger than the images of figures, and
    slightly blurred.
    """
    maps = explanation.image_relevance.float()
    if explanation.kind == SIZE:
        maps = maps.abs()
    size = drawn_size(*maps.shape[1:])
    if size != tuple(maps.shape[1:]):
        maps = F.interpolate(maps[None], size=size, mode="bilinear", antialias=True)[0]
    return blurred(maps).numpy()


def drawn_size(height, width):
    """The size (height, width) at which an image or map of this size is drawn."""
    factor = min(1, LARGEST / max(height, width))
    return max(1, round(factor * height)), max(1, round(factor * width))


@dataclass(frozen=True)
class Drawing:
    """What the panels of a figure draw of an Explanation of T words.

    photograph   a PIL image
    explanation  the Explanation
    maps         float32 array (T, H, W)
    map_scales   (T,) the value that has the full colour in each word's map
    word_scales  (T,) the same for the relevance of the preceding words
    shared       whether all words have the same scale
    """

    photograph: Image.Image
    explanation: Any
    maps: np.ndarray
    map_scales: np.ndarray
    word_scales: np.ndarray
    shared: bool

    def draw_map(self, axes, position):
        """The heat map of one word over the photograph."""
        values = self.maps[position]
        picture = overlay(self.photograph, values, self.map_scales[position], self.explanation.kind)
        axes.imshow(picture, interpolation="lanczos")


def drawing_of(image, explanation, scale="caption"):
    """The Drawing of an Explanation over a PIL image; scale: one of SCALES.

    A scale that the words share is that of the word with the strongest map, be it drawn or not.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {' or '.join(SCALES)}, not '{scale}'")
    height, width = drawn_size(image.height, image.width)
    photograph = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    maps = drawable_maps(explanation)
    words = explanation.word_relevance.float().abs().numpy()
    map_scales = np.array([np.percentile(np.abs(values), CLIP_PERCENTILE) for values in maps])
    word_scales = words.max(axis=1, initial=0)
    shared = scale == "caption"
    if shared:
        map_scales = np.full_like(map_scales, map_scales.max(initial=0))
        word_scales = np.full_like(word_scales, word_scales.max(initial=0))
    return Drawing(photograph, explanation, maps, map_scales, word_scales, shared)


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


# ----------------------------------------------------------------------------------------- colours


def luminance(colour):
    """The relative luminance of an RGB colour in 0..1, as WCAG 2.1 defines it."""
    channels = np.asarray(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def contrast(one, other):
    """The contrast of two colours, 1 to 21, as WCAG 2.1 defines it."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def ink_on(background):
    """Black or white, whichever reads better on a background; the contrast is 4.5 at least."""
    return max(("black", "white"), key=lambda ink: contrast(ink, background))


# ---------------------------------------------------------------------- a figure of one explanation


def explanation_figure(image, explanation, positions=None, scale="caption"):
    """A matplotlib Figure of an Explanation: the image, then a panel for every word.

    A word's panel has its heat map over the image. Below it are, where relevance is a share of the
    score, two bars: how much of it the image and the preceding words have; then these words.
    positions: of the words to draw, or None for all; scale: one of SCALES.
    """
    if positions is None:
        positions = explanation.positions_of(None)
    drawing = drawing_of(image, explanation, scale)
    side = PANEL - 2 * MARGIN
    height = side * panel_shape(image)
    panels = [LegendPanel(drawing)]
    panels += [WordPanel(drawing, position, side) for position in positions]
    rows = panel_rows(panels)
    columns = len(rows[0])
    caption = textwrap.wrap(explanation.title(), int(PANEL * columns / CHARACTER))
    sheet = panel_sheet(rows, CAPTION + CAPTION_LINE * (len(caption) - 1), height)
    sheet.text(MARGIN, 0.12, "\n".join(caption), fontsize=13)
    return sheet.figure


def panel_sheet(rows, top, height):
    """A Sheet with rows of panels, each a picture of this height with something below it.

    top: of the first row's titles.
    """
    side = PANEL - 2 * MARGIN
    tops = []
    for row in rows:
        tops.append(top + TITLE)
        top += TITLE + height + max(panel.height for panel in row) + GAP
    sheet = Sheet(PANEL * len(rows[0]), top)
    for row, row_top in zip(rows, tops):
        for column, panel in enumerate(row):
            left = column * PANEL + MARGIN
            panel.draw_picture(sheet.axes(left, row_top, side, height))
            panel.draw_below(sheet, left, row_top + height + GAP, side)
    return sheet


def panel_shape(image):
    """Height by width of the place for an image."""
    return min(max(image.height / image.width, FLATTEST), TALLEST)


def panel_rows(panels):
    """Panels in rows; as many in a row as leave the fewest places empty."""
    columns = len(panels)
    if columns > COLUMNS[0]:
        columns = min(COLUMNS, key=lambda number: -len(panels) % number)
    return [panels[first : first + columns] for first in range(0, len(panels), columns)]


class LegendPanel:
    """The first panel: the photograph, and how to read the others."""

    def __init__(self, drawing):
        self.drawing = drawing
        self.notes = legend_of(drawing)
        self.height = GAP + COLOUR_BAR + NOTE_LINE * (1 + len(self.notes))

    def draw_picture(self, axes):
        """The photograph."""
        axes.imshow(self.drawing.photograph, interpolation="lanczos")

    def draw_below(self, sheet, left, top, width):
        """The colour bar and the small print."""
        draw_colour_bar(sheet, left, top, width, self.drawing)
        top += COLOUR_BAR + NOTE_LINE
        for note in self.notes:
            sheet.note(left, top, note)
            top += NOTE_LINE


def legend_of(drawing):
    """How to read a figure, in lines of small print."""
    notes = [meaning(drawing.explanation.kind)]
    if drawing.shared:
        notes.append("at each pixel; one scale for all words")
    else:
        notes.append("at each pixel; each word its own scale")
    if drawing.explanation.additive:
        notes.append("bars: image's, words' share of the score")
    strongest = drawing.word_scales.max(initial=0)
    if strongest > 0:
        ends = f", up to ±{number(strongest)}" if drawing.shared else ""
        notes.append(f"below: words before it{ends}")
    if strongest > 0 and drawing.explanation.kind != SIGNED:
        notes.append(f"({meaning(SIGNED)})")
    return notes


def meaning(kind):
    """What the colours of a kind of method mean."""
    meanings = {
        SIGNED: "red: for the word, blue: against it",
        SIZE: "size; the sign means nothing",
        NON_NEGATIVE: "from zero, never negative",
    }
    return meanings[kind]


def number(value):
    """A number in two digits, with a true minus sign."""
    return f"{value:.2g}".replace("-", "−")


def draw_colour_bar(sheet, left, top, width, drawing):
    """The colour bar of a Drawing, COLOUR_BAR high, and below it the values at its ends, NOTE_LINE.

    Where each map has a scale of its own, the ends are called "max".
    """
    kind = drawing.explanation.kind
    end = number(drawing.map_scales.max(initial=0)) if drawing.shared else "max"
    lowest = -1 if kind == SIGNED else 0
    axes = sheet.axes(left, top, width, COLOUR_BAR)
    ramp = np.linspace(lowest, 1, 257, dtype=np.float32)[None]
    axes.imshow(heat_map(ramp, 1.0, kind), aspect="auto")
    below = top + COLOUR_BAR + 0.02
    sheet.note(left, below, f"−{end}" if kind == SIGNED else "0", ha="left")
    if kind == SIGNED:
        sheet.note(left + width / 2, below, "0", ha="center")
    sheet.note(left + width, below, end, ha="right")


class WordPanel:
    """The panel of one word."""

    def __init__(self, drawing, position, width):
        self.drawing = drawing
        self.position = position
        relevance = drawing.explanation.word_relevance[position, : position + 1]
        words = ["<start>", *drawing.explanation.words][: position + 1]
        # A method that says nothing of the preceding words has no relevance but zero.
        self.lines = []
        if drawing.word_scales[position] > 0:
            self.lines = lines_of(words, relevance.tolist(), width)
        self.bars = 2 * BAR + GAP if drawing.explanation.additive else 0
        self.height = GAP + self.bars + WORD_LINE * len(self.lines)

    def draw_picture(self, axes):
        """The heat map, and above it the word and its probability."""
        self.drawing.draw_map(axes, self.position)
        explanation = self.drawing.explanation
        probability = explanation.probabilities[self.position]
        draw_title(axes, f"{explanation.words[self.position]}  {probability:.0%}")

    def draw_below(self, sheet, left, top, width):
        """The bars and the words before it, where the method says something of them."""
        drawing = self.drawing
        if self.bars:
            draw_bars(sheet, left, top, width, drawing.explanation, self.position)
        scale = drawing.word_scales[self.position]
        draw_words(sheet, left, top + self.bars, self.lines, scale)


def draw_title(axes, title):
    """The title of a panel."""
    axes.set_title(title, fontsize=11, fontweight="bold", pad=4, parse_math=False)


def draw_bars(sheet, left, top, width, explanation, position):
    """Two bars: the shares of a word's score that the image and the words before it have.

    All words of a caption have the same scale.
    """
    shares = explanation.score_shares().numpy()
    own = shares[position]
    axes = sheet.axes(left + BAR_SIDES, top, width - 2 * BAR_SIDES, 2 * BAR)
    colours = [FOR if share > 0 else AGAINST for share in own]
    axes.barh([1, 0], own, height=0.7, color=colours)
    axes.axvline(0, color=NOTE, linewidth=0.8)
    axes.set_xlim(min(shares.min(), 0), max(shares.max(), 0) or 1)
    axes.set_ylim(-0.5, 1.5)
    for row, name in enumerate(("image", "words")):
        middle = top + (row + 0.5) * BAR
        sheet.note(left, middle, name, va="center")
        value = f"{own[row]:.1f}".replace("-", "−")
        sheet.note(left + width, middle, value, va="center", ha="right")


def lines_of(words, values, width):
    """Words in lines that are at most so many inches wide.

    Returns for each line its [word, value, distance from the left in inches].
    """
    lines = []
    x = math.inf
    for word, value in zip(words, values):
        own_width = text_width(word) + 2 * WORD_PADDING
        if x + own_width > width:
            lines.append([])
            x = WORD_PADDING
        lines[-1].append((word, value, x))
        x += own_width + WORD_SPACE - 2 * WORD_PADDING
    return lines


@functools.cache
def text_width(text):
    """The width of a word as `draw_words` writes it, in inches."""
    figure = Figure()
    renderer = FigureCanvasAgg(figure).get_renderer()
    font = FontProperties(size=WORD_SIZE)
    return renderer.get_text_width_height_descent(text, font, ismath=False)[0] / figure.dpi


def draw_words(sheet, left, top, lines, scale):
    """Lines of words, each on a background coloured by its value; scale: that of full colour."""
    padding = WORD_PADDING * 72 / WORD_SIZE  # in units of the letters' size
    for line in lines:
        for word, value, x in line:
            background = tuple(heat_map(np.array([[value]]), scale)[0, 0])
            box = {
                "facecolor": background,
                "edgecolor": "none",
                "boxstyle": f"round,pad={padding:.3f}",
            }
            ink = ink_on(background)
            sheet.text(left + x, top, word, color=ink, fontsize=WORD_SIZE, bbox=box)
        top += WORD_LINE


# -------------------------------------------------------------------------- a comparison of methods


def comparison_figure(image, explanations, positions=None, scale="caption"):
    """A matplotlib Figure of several methods: a row of heat maps for each, a column for each word.

    explanations: {method: Explanation}, all of the same caption; positions: of the words to draw,
    or None for all; scale: one of SCALES, for each method by itself. Many words stand in several
    blocks, one below the other.
    """
    first = next(iter(explanations.values()))
    positions = list(first.positions_of(None) if positions is None else positions)
    drawings = {}
    for method, explanation in explanations.items():
        drawings[method] = drawing_of(image, explanation, scale)
    count = math.ceil(len(positions) / SMALL_COLUMNS) or 1
    columns = math.ceil(len(positions) / count) or 1
    blocks = [positions[first : first + columns] for first in range(0, len(positions), columns)]
    row_height = max(
        (SMALL_PANEL - 2 * SMALL_MARGIN) * panel_shape(image) + 2 * SMALL_MARGIN, SMALL_ROW
    )
    block_height = TITLE + row_height * len(drawings)
    width = METHOD + SMALL_PANEL * columns
    caption = textwrap.wrap(first.title(), int(SMALL_PANEL * columns / CHARACTER))
    note = "each map has a scale of its own"
    if next(iter(drawings.values())).shared:
        note = "each row has one scale for all words"
    notes = textwrap.wrap(note, int(SMALL_PANEL * columns / NOTE_CHARACTER))
    header = CAPTION + CAPTION_LINE * len(caption) + NOTE_LINE * (len(notes) - 1)
    sheet = Sheet(width, header + block_height * len(blocks))
    draw_header(sheet, header + TITLE, next(iter(drawings.values())), caption, notes)
    for index, block in enumerate(blocks):
        draw_block(sheet, header + index * block_height, row_height, drawings, block)
    return sheet.figure


def fit_width(figure, width):
    """Make a figure as wide as a column of a paper, in inches, if it is wider; its print too.

    The print does not get smaller than SMALLEST_PRINT. UserError if there is no room for it then.
    """
    zoom = width / figure.get_figwidth()
    if zoom >= 1:
        return
    if zoom < SMALLEST_ZOOM:
        least = math.ceil(25.4 * SMALLEST_ZOOM * figure.get_figwidth())
        raise UserError(f"the figure needs {least} mm at least; draw fewer words")
    figure.set_size_inches(zoom * figure.get_size_inches())
    for text in figure.findobj(Text):
        text.set_fontsize(max(zoom * text.get_fontsize(), SMALLEST_PRINT))


def draw_header(sheet, height, drawing, caption, notes):
    """The top of a comparison: the photograph, and the lines of caption and small print."""
    axes = sheet.axes(0.08, 0.08, METHOD - 0.25, height - 0.1)
    axes.imshow(drawing.photograph, interpolation="lanczos")
    axes.set_anchor("NW")
    left = METHOD + SMALL_MARGIN
    sheet.text(left, 0.12, "\n".join(caption), fontsize=13)
    sheet.note(left, 0.2 + CAPTION_LINE * len(caption), "\n".join(notes))


def draw_block(sheet, top, row_height, drawings, positions):
    """A row of heat maps for each method; top: of the titles."""
    side = SMALL_PANEL - 2 * SMALL_MARGIN
    for row, (method, drawing) in enumerate(drawings.items()):
        row_top = top + TITLE + row * row_height
        draw_method(sheet, row_top, row_height, method, drawing)
        for column, position in enumerate(positions):
            left = METHOD + column * SMALL_PANEL + SMALL_MARGIN
            axes = sheet.axes(left, row_top + SMALL_MARGIN, side, row_height - 2 * SMALL_MARGIN)
            drawing.draw_map(axes, position)
            if row == 0:
                draw_title(axes, drawing.explanation.words[position])


def draw_method(sheet, top, row_height, method, drawing):
    """The name of a method, its colours and what they mean, in the middle of its row."""
    name = textwrap.wrap(method.replace("_", " "), METHOD_CHARACTERS)
    notes = textwrap.wrap(meaning(drawing.explanation.kind), METHOD_CHARACTERS + 2)
    name_height = METHOD_LINE * len(name)
    height = name_height + COLOUR_BAR + NOTE_LINE * (1 + len(notes))
    y = top + (row_height - height) / 2
    sheet.text(0.08, y, "\n".join(name), fontsize=10)
    y += name_height
    draw_colour_bar(sheet, 0.08, y, METHOD - 0.25, drawing)
    sheet.note(0.08, y + COLOUR_BAR + NOTE_LINE, "\n".join(notes))


# ------------------------------------------------------------------------------------------ curves


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


def differences_figure(rows):
    """Differences with their intervals, each in multiples of the largest that counts as none.

    rows: dicts with "component", "what", "difference", "low", "high" (its interval), "margin" (None
    stands for 1) and "unit". The band is the margin. Red speaks for what is claimed, blue against
    it; a grey interval contains zero.
    """
    figure = Figure(figsize=(10, 0.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-1, 1, color="0.9", linewidth=0)
    axes.axvline(0, color="0.3", linewidth=0.8)
    values_beside = axes.get_yaxis_transform()  # x in parts of the axes, y as the rows
    for place, row in enumerate(rows):
        margin = row["margin"] or 1
        colour = NOTE
        if row["low"] > 0 or row["high"] < 0:
            colour = FOR if row["low"] > 0 else AGAINST
        axes.plot([row["low"] / margin, row["high"] / margin], [place, place], color=colour)
        axes.plot(row["difference"] / margin, place, "o", color=colour, markersize=5)
        text = f"{number(row['difference'])} [{number(row['low'])}, {number(row['high'])}]"
        text = f"{text} {row['unit']}"
        axes.text(1.01, place, text, transform=values_beside, va="center", fontsize=SMALL_PRINT)
    labels = [f"{row['component']}  {row['what']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=SMALL_PRINT)
    axes.invert_yaxis()
    axes.set_xlabel("difference with its 95 % interval, in multiples of the margin", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def gaps_figure(rows):
    """The gaps of perturbation tests with their intervals: a panel for each side, best on top.

    rows: dicts with "removed", "measure", "method", "gap", "gap low" and "gap high".
    """
    panels = {}  # by side
    for row in rows:
        panels.setdefault((row["removed"], row["measure"]), []).append(row)
    longest = max(map(len, panels.values()))
    size = (1 + 3.4 * len(panels), 1 + 0.24 * longest)
    figure = Figure(figsize=size, layout="constrained")
    every_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, ((side, measure), found) in zip(every_axes, panels.items()):
        found = sorted(found, key=lambda row: row["gap"])
        axes.axvline(0, color="0.3", linewidth=0.8)
        for place, row in enumerate(found):
            axes.plot([row["gap low"], row["gap high"]], [place, place], color=NOTE)
            axes.plot(row["gap"], place, "o", color=NOTE, markersize=5)
        names = [row["method"].replace("_", " ") for row in found]
        axes.set_yticks(range(len(found)), names, fontsize=SMALL_PRINT)
        axes.set_title(f"removed: {side}", fontsize=9)
        axes.set_xlabel(f"gap in {measure}", fontsize=8)
        axes.tick_params(axis="x", labelsize=SMALL_PRINT)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
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
    """Write a figure to `path`, whole or not at all; returns the path.

    In a PDF or SVG file text stays text.
    """
    with write_atomically(path) as temporary, matplotlib.rc_context(TEXT_AS_TEXT):
        figure.savefig(temporary, dpi=dots_per_inch)
    return path


# ------------------------------------------------------------------- objects that were removed


@dataclass(frozen=True)
class Removed:
    """An object of a photograph, and what is without it.

    name     what it is called
    mask     bool (H, W), its pixels
    value    its importance, or None
    area     bool (H, W), what was filled
    image    uint8 (H, W, 3), the photograph without it
    caption  the words that the captioner then says
    """

    name: str
    mask: np.ndarray
    value: float | None
    area: np.ndarray
    image: np.ndarray
    caption: list


def importance_figure(photograph, caption, removed, distance):
    """A matplotlib Figure: the photograph, its objects shaded by importance, and then the picture
    and the caption without each object, the most important one first.

    photograph: a PIL image; caption: its words; removed: a list of Removed; distance: what the
    importance is, in a few words. Words that the caption had not before are marked.
    """
    removed = sorted(removed, key=lambda thing: -(thing.value or 0))
    side = PANEL - 2 * MARGIN
    height = side * panel_shape(photograph)
    panels = [PicturePanel(photograph, "the photograph", caption, caption, side)]
    panels.append(ShadedPanel(photograph, removed, distance))
    for thing in removed:
        title = f"without {thing.name}"
        picture = Image.fromarray(thing.image)
        panels.append(PicturePanel(picture, title, thing.caption, caption, side, thing.value))
    return panel_sheet(panel_rows(panels), 0.05, height).figure


class PicturePanel:
    """A picture, and below it its caption and its importance."""

    def __init__(self, picture, title, words, original, width, value=None):
        self.picture = picture
        self.title = title
        self.value = value
        marks = [0.0 if word in original else 0.45 for word in words]
        self.lines = lines_of(words or ["(no word)"], marks or [0.0], width)
        self.height = GAP + WORD_LINE * len(self.lines) + NOTE_LINE

    def draw_picture(self, axes):
        """The picture and its title."""
        axes.imshow(self.picture, interpolation="lanczos")
        draw_title(axes, self.title)

    def draw_below(self, sheet, left, top, width):
        """The caption, new words marked, and the importance."""
        draw_words(sheet, left, top, self.lines, 1.0)
        if self.value is not None:
            below = top + WORD_LINE * len(self.lines)
            sheet.note(left + WORD_PADDING, below, f"the caption changes by {decimals(self.value)}")


class ShadedPanel:
    """The objects of a photograph, shaded by their importance, with a colour bar."""

    height = GAP + COLOUR_BAR + 2 * NOTE_LINE

    def __init__(self, photograph, removed, distance):
        self.photograph = photograph
        self.removed = [thing for thing in removed if thing.value is not None]
        self.distance = distance
        self.scale = max([thing.value for thing in self.removed], default=0)

    def draw_picture(self, axes):
        """The shaded objects, with an outline and their values; white is no importance."""
        axes.imshow(shaded(self.photograph, self.removed, self.scale), interpolation="lanczos")
        halo = [withStroke(linewidth=2, foreground="white")]
        for thing in self.removed:
            axes.contour(thing.mask, [0.5], colors=NOTE, linewidths=0.8)
            rows, columns = np.nonzero(thing.mask)
            text = f"{thing.name}\n{decimals(thing.value)}"
            place = (columns.mean(), rows.mean())
            style = {"ha": "center", "va": "center", "parse_math": False, "path_effects": halo}
            axes.text(*place, text, fontsize=8, fontweight="bold", **style)
        draw_title(axes, "importance")

    def draw_below(self, sheet, left, top, width):
        """The colour bar, and what it measures."""
        axes = sheet.axes(left, top, width, COLOUR_BAR)
        ramp = np.linspace(0, 1, 257, dtype=np.float32)[None]
        axes.imshow(heat_map(ramp, 1.0, NON_NEGATIVE), aspect="auto")
        below = top + COLOUR_BAR + 0.02
        sheet.note(left, below, "0")
        sheet.note(left + width, below, decimals(self.scale), ha="right")
        sheet.note(left, below + NOTE_LINE, self.distance)


def decimals(value):
    """A distance with two decimals, with a true minus sign."""
    return f"{value:.2f}".replace("-", "−")


def shaded(photograph, removed, scale):
    """A pale grey photograph whose objects have the colour of their importance: RGB (H, W, 3).

    Where objects overlap, the smaller one is seen. Importance below zero is drawn as zero.
    """
    grey = np.asarray(photograph.convert("L"), dtype=np.float32)[..., None] / 255
    picture = np.repeat(0.45 + 0.55 * grey, 3, axis=2)
    for thing in sorted(removed, key=lambda thing: -thing.mask.sum()):
        colour = heat_map(np.full((1, 1), thing.value), scale, NON_NEGATIVE)[0, 0]
        shade = 0.8 + 0.2 * grey[thing.mask]
        picture[thing.mask] = colour * shade
    return picture


def removal_figure(photograph, removed):
    """A matplotlib Figure of how objects were removed: a row for each of the photograph with its
    outline, the mask that was filled, and the result. removed: a list of Removed.
    """
    side = PANEL - 2 * MARGIN
    height = side * panel_shape(photograph)
    sheet = Sheet(3 * PANEL, (TITLE + height + GAP) * len(removed) + GAP)
    for row, thing in enumerate(removed):
        top = TITLE + row * (TITLE + height + GAP)
        pictures = (photograph, np.where(thing.area[..., None], 255, 0), thing.image)
        titles = (thing.name, "what is filled", f"without {thing.name}")
        for column, (picture, title) in enumerate(zip(pictures, titles)):
            axes = sheet.axes(column * PANEL + MARGIN, top, side, height)
            axes.imshow(np.broadcast_to(np.asarray(picture, np.uint8), (*thing.area.shape, 3)))
            draw_title(axes, title)
            if column == 0:
                axes.contour(thing.mask, [0.5], colors=FOR, linewidths=1)
    return sheet.figure


def attention_figure(strips):
    """A matplotlib Figure of where a captioner looks for its words, a strip for each picture.

    strips: [(title, PIL image, words, maps (T, rows, columns))]; all maps share one scale.
    """
    side = SMALL_PANEL - 2 * SMALL_MARGIN
    height = side * panel_shape(strips[0][1])
    row_height = TITLE + height + GAP
    longest = max(len(words) for _, _, words, _ in strips)
    columns = min(longest, SMALL_COLUMNS)
    rows = [math.ceil(len(words) / columns) for _, _, words, _ in strips]
    sheet = Sheet(SMALL_PANEL * (columns + 1), sum(rows) * row_height + GAP)
    scale = max(float(maps.max(initial=0)) for *_, maps in strips)
    top = TITLE
    for (title, picture, words, maps), lines in zip(strips, rows):
        axes = sheet.axes(SMALL_MARGIN, top, side, height)
        axes.imshow(picture, interpolation="lanczos")
        axes.set_title(title, fontsize=WORD_SIZE, pad=4, parse_math=False)
        for position, word in enumerate(words):
            line, column = divmod(position, columns)
            left = (column + 1) * SMALL_PANEL + SMALL_MARGIN
            axes = sheet.axes(left, top + line * row_height, side, height)
            values = maps[position].astype(np.float32)
            axes.imshow(overlay(picture, values, scale, NON_NEGATIVE), interpolation="lanczos")
            draw_title(axes, word)
        top += lines * row_height
    return sheet.figure
