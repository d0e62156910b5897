"""The figures: colours that mean the same everywhere, one scale, the bars' numbers, the shapes."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import random_captioner
from matplotlib.colors import to_rgb
from PIL import Image

import perturbation_utils
import plots
from captioner import METHODS
from commandline import UserError
from explanation import NON_NEGATIVE, SIGNED, SIZE, Explanation
from plots import (
    DIVERGING,
    SEQUENTIAL,
    SMALLEST_PRINT,
    comparison_figure,
    contrast,
    drawing_of,
    explanation_figure,
    fit_width,
    heat_map,
    ink_on,
    overlay,
    panel_rows,
    text_width,
)
from pretrainedmodel import METHODS as PRETRAINED_METHODS

GRAY = Image.new("RGB", (128, 128), "gray")


def explanation_of(maps, word_relevance=None, **fields):
    """An Explanation with these image maps (T, H, W) and relevance of words (T, T)."""
    maps = torch.as_tensor(maps, dtype=torch.float32)
    length = len(maps)
    if word_relevance is None:
        word_relevance = torch.randn(length, length, generator=torch.manual_seed(7)).tril()
    return Explanation(
        words=[f"w{index}" for index in range(length)],
        scores=torch.zeros(length),
        probabilities=torch.full((length,), 0.5),
        image_relevance=maps,
        region_relevance=maps.flatten(1),
        word_relevance=word_relevance,
        attention=torch.zeros(length, 1, 4),
        beta=None,
        **fields,
    )


def random_maps(words, height=40, width=40):
    return torch.randn(words, height, width, generator=torch.manual_seed(3))


def pictures_of(figure):
    """The RGB arrays of the heat maps in a figure of words."""
    titled = [axes for axes in figure.axes if axes.get_title()]
    return [axes.images[0].get_array() for axes in titled]


# ----------------------------------------------------------------------------------------- colours


def test_heat_maps_are_red_for_blue_against_and_white_at_zero():
    relevance = np.zeros((60, 60), dtype=np.float32)
    relevance[10:20, 10:20] = 2
    relevance[40:50, 40:50] = -2
    colours = heat_map(relevance, 2.0)
    red = colours[15, 15]
    blue = colours[45, 45]
    assert red[0] > red[2] + 0.4
    assert blue[2] > blue[0] + 0.25
    assert (colours[15, 45] == 1).all()
    assert overlay(Image.new("RGB", (30, 20)), relevance, 2.0).shape == (20, 30, 3)


@pytest.mark.parametrize("kind", [SIZE, NON_NEGATIVE])
def test_maps_without_a_sign_have_one_colour_that_darkens_from_zero(kind):
    values = np.linspace(0, 3, 31, dtype=np.float32)[None]
    colours = heat_map(values, 3.0, kind)[0]
    assert (colours[0] == 1).all()
    lightness = [plots.luminance(colour) for colour in colours]
    assert all(np.diff(lightness) < 0)
    # Neither the red nor the blue that mean something elsewhere.
    for end in (plots.FOR, plots.AGAINST):
        assert np.abs(colours[-1] - to_rgb(end)).max() > 0.2


def test_both_sides_of_the_diverging_colours_are_equally_strong():
    """The same size has about the same lightness on both sides, and a larger one is darker."""
    shares = np.linspace(0, 1, 21)
    of_for = np.array([plots.luminance(DIVERGING(0.5 + share / 2)[:3]) for share in shares])
    against = np.array([plots.luminance(DIVERGING(0.5 - share / 2)[:3]) for share in shares])
    assert (np.diff(of_for) < 0).all() and (np.diff(against) < 0).all()
    assert np.abs(of_for - against).max() < 0.15


# Viénot, Brettel and Mollon (1999): linear RGB as people without long- or medium-wave cones see it.
DEFICIENCIES = {
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_for_and_against_differ_for_the_colour_blind(deficiency):
    seen = np.array(DEFICIENCIES[deficiency])
    for share in (0.3, 0.6, 1.0):
        linear = [np.array(DIVERGING(0.5 + side * share / 2)[:3]) ** 2.2 for side in (-1, 1)]
        against, speaks_for = (seen @ colour for colour in linear)
        # What is left to them is yellow against blue.
        assert speaks_for[0] > 1.3 * speaks_for[2]
        assert against[2] > 1.3 * against[0]


def test_contrast_is_that_of_wcag():
    assert contrast("white", "black") == pytest.approx(21)
    assert contrast("#777777", "white") == pytest.approx(4.48, abs=0.005)  # WCAG's known example
    assert contrast("red", "red") == 1


def test_every_text_has_a_contrast_of_four_and_a_half():
    assert contrast(plots.NOTE, "white") >= 4.5
    for colours in (DIVERGING, SEQUENTIAL):
        for background in colours(np.linspace(0, 1, 101))[:, :3]:
            assert contrast(ink_on(background), background) >= 4.5


# ------------------------------------------------------------------------------------------ scales


def test_the_words_of_a_caption_share_a_scale_and_the_same_value_has_the_same_colour():
    maps = torch.zeros(3, 40, 40)
    maps[0, :20] = 4
    maps[1, :20] = 1
    maps[2, 20:] = 1
    shared = drawing_of(GRAY, explanation_of(maps))
    assert shared.map_scales.tolist() == pytest.approx([4, 4, 4])
    first, second, third = pictures_of(explanation_figure(GRAY, explanation_of(maps)))
    np.testing.assert_allclose(second[5, 5], third[-5, 5])
    assert second[5, 5, 2] > first[5, 5, 2] + 0.2  # a quarter of the relevance is paler
    alone = drawing_of(GRAY, explanation_of(maps), scale="word")
    assert alone.map_scales.tolist() == pytest.approx([4, 1, 1])
    first, second, third = pictures_of(explanation_figure(GRAY, explanation_of(maps), scale="word"))
    np.testing.assert_allclose(second[5, 5], first[5, 5])


def test_the_scale_is_that_of_the_caption_even_if_few_words_are_drawn():
    explanation = explanation_of(random_maps(4) * torch.tensor([9.0, 1, 1, 1])[:, None, None])
    all_words = pictures_of(explanation_figure(GRAY, explanation))
    few = pictures_of(explanation_figure(GRAY, explanation, [1, 2]))
    np.testing.assert_array_equal(all_words[1], few[0])


def test_the_preceding_words_share_a_scale_too():
    relevance = torch.tensor([[8.0, 0], [2, -1]])
    explanation = explanation_of(random_maps(2), relevance)
    assert drawing_of(GRAY, explanation).word_scales.tolist() == [8, 8]
    assert drawing_of(GRAY, explanation, "word").word_scales.tolist() == [8, 2]


def test_the_ends_of_the_colour_bar_are_the_scale():
    maps = torch.full((2, 40, 40), 0.25)
    figure = explanation_figure(GRAY, explanation_of(maps))
    texts = [text.get_text() for text in figure.texts]
    assert "0.25" in texts and "−0.25" in texts
    alone = explanation_figure(GRAY, explanation_of(maps), scale="word")
    assert "max" in [text.get_text() for text in alone.texts]


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale is caption or word, not 'page'"):
        explanation_figure(GRAY, explanation_of(random_maps(1)), scale="page")


@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (10, 400), (400, 10)])
@pytest.mark.parametrize("kind", [SIGNED, SIZE])
def test_a_heat_map_of_nothing_is_white_in_any_shape(shape, kind):
    """The height of a panorama is less than the blur, which goes by the width."""
    white = Image.new("RGB", shape[::-1], "white")
    (picture,) = pictures_of(
        explanation_figure(white, explanation_of(torch.zeros(1, *shape), kind=kind))
    )
    assert picture.min() == 1


# ------------------------------------------------------------------------------------------- kinds


def test_the_tables_of_methods_say_of_which_kind_each_is():
    kinds = {name: method.kind for name, method in METHODS.items()}
    assert kinds == {
        **dict.fromkeys(("lrp", "attnlrp", "gradient", "input_x_gradient"), SIGNED),
        **dict.fromkeys(("lrp_alpha2beta1", "lrp_gamma", "lrp_epsilon"), SIGNED),
        **dict.fromkeys(("integrated_gradients", "smoothgrad"), SIGNED),
        **dict.fromkeys(("occlusion", "rise"), SIGNED),
        **dict.fromkeys(("guided_backprop", "guided_gradcam"), SIZE),
        **dict.fromkeys(("gradcam", "layercam", "attention"), NON_NEGATIVE),
    }
    for methods in (METHODS, PRETRAINED_METHODS):
        additive = {name for name, method in methods.items() if method.additive}
        # Partial LRP stops at the attention of the last layer.
        assert additive == {name for name in methods if "lrp" in name} - {"partial_lrp"}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "attnlrp"])
def test_an_explanation_is_of_the_kind_of_its_method(method, monkeypatch):
    monkeypatch.setattr(perturbation_utils, "MASKS", 20)
    captioner = random_captioner().float()
    images = torch.randn(1, 3, 128, 128, generator=torch.manual_seed(1))
    [explanation] = captioner.explain(images, [["w1", "w2"]], method)
    assert explanation.kind == METHODS[method].kind
    assert explanation.additive == METHODS[method].additive
    lowest = explanation.image_relevance.min()
    assert lowest >= 0 if explanation.kind == NON_NEGATIVE else lowest < 0


def test_where_the_sign_says_nothing_a_map_and_its_negative_look_the_same():
    maps = random_maps(2)
    one = explanation_figure(GRAY, explanation_of(maps, kind=SIZE))
    other = explanation_figure(GRAY, explanation_of(-maps, kind=SIZE))
    for first, second in zip(pictures_of(one), pictures_of(other)):
        np.testing.assert_array_equal(first, second)


# -------------------------------------------------------------------------------------------- bars


def bars_of(figure):
    """The values of the bars in a figure, [image, words] of each word."""
    return [[bar.get_width() for bar in axes.patches] for axes in figure.axes if axes.patches]


@pytest.mark.parametrize("scale", plots.SCALES)
def test_the_bars_are_the_sums_of_relevance_of_image_and_words(scale):
    captioner = random_captioner().float()
    images = torch.randn(1, 3, 128, 128, generator=torch.manual_seed(1))
    [explanation] = captioner.explain(images, [["w1", "w2", "w3"]])
    expected = []
    for position in range(3):
        image = float(explanation.region_relevance[position].double().sum())
        words = float(explanation.word_relevance[position].double().sum())
        expected.append([image, words])
    figure = explanation_figure(GRAY, explanation, scale=scale)
    np.testing.assert_allclose(bars_of(figure), expected, rtol=1e-4)
    limits = {axes.get_xlim() for axes in figure.axes if axes.patches}
    assert len(limits) == 1  # a longer bar is a larger share
    written = [text.get_text() for text in figure.texts]
    for pair in expected:
        for share in pair:
            assert f"{share:.1f}".replace("-", "−") in written


def test_the_image_tokens_that_are_no_region_count_for_the_image():
    class_relevance = torch.tensor([5.0, -7.0])
    explanation = explanation_of(random_maps(2), extra={"class_relevance": class_relevance})
    without = dataclasses.replace(explanation, extra={})
    difference = explanation.score_shares() - without.score_shares()
    torch.testing.assert_close(difference[:, 0], class_relevance, rtol=1e-4, atol=1e-4)
    assert not difference[:, 1].any()


def test_methods_whose_sums_mean_nothing_have_no_bars():
    assert bars_of(explanation_figure(GRAY, explanation_of(random_maps(2)))) == []


# ------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("size", [(160, 90), (90, 160), (64, 64), (3000, 1500)])
def test_a_heat_map_has_the_photographs_shape_and_lies_over_all_of_it(size):
    width, height = size
    photograph = Image.new("RGB", size, "white")
    maps = torch.zeros(1, 40, 40)
    maps[:, 20:] = 1  # the lower half
    (picture,) = pictures_of(explanation_figure(photograph, explanation_of(maps)))
    assert max(picture.shape) <= plots.LARGEST
    assert picture.shape[1] / picture.shape[0] == pytest.approx(width / height, rel=0.01)
    if max(size) <= plots.LARGEST:
        assert picture.shape[:2] == (height, width)
    assert (picture[: picture.shape[0] // 3] > 0.97).all()
    np.testing.assert_allclose(picture[-1], to_rgb(plots.FOR) * np.ones((len(picture[0]), 1)))


def test_the_photograph_keeps_its_sharpness():
    pixels = np.random.default_rng(0xCAFE).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    figure = explanation_figure(Image.fromarray(pixels), explanation_of(torch.zeros(1, 20, 20)))
    (picture,) = pictures_of(figure)
    grey = np.asarray(Image.fromarray(pixels).convert("L")) / 255
    np.testing.assert_allclose(picture[..., 0], 0.65 + 0.35 * grey, atol=1e-6)


def test_large_maps_are_drawn_in_a_sane_size():
    drawing = drawing_of(GRAY, explanation_of(torch.full((1, 1000, 2000), 0.5)))
    assert drawing.maps.shape == (1, 320, 640)
    np.testing.assert_allclose(drawing.maps, 0.5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (20000, 20), (20, 20000)])
def test_a_figure_of_a_strange_image_is_of_sane_size(size):
    image = Image.new("RGB", size, "blue")
    explanation = explanation_of(random_maps(2))
    for figure in (
        explanation_figure(image, explanation),
        comparison_figure(image, {"lrp": explanation}),
    ):
        assert max(figure.get_size_inches()) < 10


# ------------------------------------------------------------------------------------------ layout


@pytest.mark.parametrize("length", [0, 1, 2, 7, 16])
def test_a_figure_has_a_panel_for_every_word(length):
    explanation = explanation_of(random_maps(length), additive=True)
    figure = explanation_figure(GRAY, explanation)
    titles = [axes.get_title() for axes in figure.axes]
    assert sum(title.startswith("w") for title in titles) == length


@pytest.mark.parametrize("panels", range(1, 40))
def test_few_places_stay_empty(panels):
    rows = panel_rows(list(range(panels)))
    assert [panel for row in rows for panel in row] == list(range(panels))
    assert max(map(len, rows)) <= 6
    empty = len(rows) * len(rows[0]) - panels
    if panels <= 5:
        assert len(rows) == 1
    else:
        assert empty == min(-panels % columns for columns in (4, 5, 6))


def test_figures_of_some_words_have_no_other_panels():
    explanation = explanation_of(random_maps(4))
    one = explanation_figure(GRAY, explanation, [1, 3])
    several = comparison_figure(GRAY, {"lrp": explanation, "again": explanation}, [1, 3])
    for figure in (one, several):
        titles = [axes.get_title().partition(" ")[0] for axes in figure.axes]
        assert [title for title in titles if title] == ["w1", "w3"]


def test_a_comparison_shows_the_photograph_and_a_legend_for_each_method():
    photograph = Image.new("RGB", (40, 30), "red")
    explanations = {
        "lrp": explanation_of(random_maps(2)),
        "guided_backprop": explanation_of(random_maps(2), kind=SIZE),
        "gradcam": explanation_of(random_maps(2).abs(), kind=NON_NEGATIVE),
    }
    figure = comparison_figure(photograph, explanations)
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert np.asarray(shown[0]).tolist() == np.asarray(photograph).tolist()
    texts = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    for kind in (SIGNED, SIZE, NON_NEGATIVE):
        assert plots.meaning(kind) in texts


def test_all_of_a_long_caption_is_inside_the_figure_and_no_text_lies_on_another():
    explanation = explanation_of(random_maps(24), additive=True)
    explanation.words[:] = ["extraordinary", "a", "skateboarding", "$5", "w"] * 4 + ["end"] * 4
    for figure in (
        explanation_figure(GRAY, explanation),
        comparison_figure(GRAY, {"lrp": explanation, "gradient_weighted_relevancy": explanation}),
    ):
        renderer = figure.canvas.get_renderer()
        boxes = [text.get_window_extent(renderer) for text in figure.texts]
        for axes in figure.axes:
            boxes.append(axes.get_window_extent(renderer))
            if axes.get_title():
                boxes.append(axes.title.get_window_extent(renderer))
        for index, box in enumerate(boxes):
            assert box.x0 >= 0 and box.y0 >= 0
            assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            for other in boxes[:index]:
                overlap_x = min(box.x1, other.x1) - max(box.x0, other.x0)
                overlap_y = min(box.y1, other.y1) - max(box.y0, other.y0)
                assert min(overlap_x, overlap_y) < 2  # pixels


@pytest.mark.parametrize("scale", plots.SCALES)
def test_all_of_a_comparison_of_one_word_is_inside_the_figure(scale):
    explanation = explanation_of(random_maps(6))
    figure = comparison_figure(GRAY, {"lrp": explanation}, [2], scale)
    renderer = figure.canvas.get_renderer()
    for text in figure.texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, text.get_text()


def test_an_explanation_of_a_word_that_was_not_said_tells_so_in_its_title():
    explanation = explanation_of(random_maps(3))
    explanation.words[:] = ["a", "big", "cat"]
    assert explanation.title() == "a big cat"
    explanation.instead_of = "dog"
    assert explanation.title() == "a big (cat) instead of dog"


def test_the_width_of_a_word_is_measured_in_inches():
    assert text_width("mm") == pytest.approx(2 * text_width("m"), rel=0.1)
    assert 0.1 < text_width("word") < 0.6


def test_a_figure_that_fits_a_column_has_room_for_its_print():
    explanations = {
        "lrp": explanation_of(random_maps(3)),
        "guided_backprop": explanation_of(random_maps(3), kind=SIZE),
        "gradcam": explanation_of(random_maps(3).abs(), kind=NON_NEGATIVE),
    }
    figure = comparison_figure(GRAY, explanations)
    shape = figure.get_figheight() / figure.get_figwidth()
    column = 85 / 25.4
    fit_width(figure, column)
    assert figure.get_size_inches() == pytest.approx([column, column * shape])
    renderer = figure.canvas.get_renderer()
    assert min(text.get_fontsize() for text in figure.texts) == SMALLEST_PRINT
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    for index, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
        for other in boxes[:index]:
            overlap_x = min(box.x1, other.x1) - max(box.x0, other.x0)
            overlap_y = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert overlap_x <= 1 or overlap_y <= 2  # pixels: boxes are larger than their letters
    fit_width(figure, 20)  # it is narrower already
    assert figure.get_figwidth() == pytest.approx(column)
    with pytest.raises(UserError, match="draw fewer words"):
        fit_width(figure, 0.5 * column)
