"""The page of explanations: what it holds, and what it does in a browser."""

import base64
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from explanation import METHODS, Explanation
from page import LEVELS, Entry, entry_data, page, quantised, write_page
from plots import drawable_maps

WORDS = ["a", "dog", "</script><b>", "park"]
HEADS = 3


def explanation_of(method, words=WORDS, seed=0, side=48):
    """A made-up Explanation: the word at position t is explained by the t-th column."""
    generator = torch.Generator().manual_seed(seed)
    count = len(words)
    maps = torch.randn(count, side, side, generator=generator)
    chosen = METHODS[method]
    if chosen.kind == "non-negative":
        maps = maps.abs()
    return Explanation(
        words=list(words),
        scores=torch.linspace(1, 9, count),
        probabilities=torch.linspace(0.1, 0.9, count),
        image_relevance=maps,
        region_relevance=torch.randn(count, 16, generator=generator),
        word_relevance=torch.randn(count, count, generator=generator).tril(),
        attention=torch.rand(count, HEADS, 16, generator=generator),
        beta=None,
        kind=chosen.kind,
        additive=chosen.additive,
        method=method,
    )


def photograph():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def entry(*methods, name="<i>photo</i>.jpg", words=WORDS):
    found = {method: explanation_of(method, words) for method in methods}
    return Entry(name, photograph(), found, [("dog", 50, 30, 250, 150)])


def decoded(maps):
    """The values (N, h, w) of quantised maps."""
    levels = np.frombuffer(base64.b64decode(maps["bytes"]), dtype=np.int8)
    levels = levels.reshape(-1, maps["height"], maps["width"])
    return levels / LEVELS * np.array(maps["scales"])[:, None, None]


def test_the_page_has_the_numbers_of_the_explanation():
    explanation = explanation_of("lrp")
    data = entry_data(Entry("photo", photograph(), {"lrp": explanation}))
    (layer,) = data["layers"]
    assert layer["words"] == WORDS
    assert np.allclose(layer["scores"], explanation.scores, rtol=1e-4)
    assert np.allclose(layer["probabilities"], explanation.probabilities, rtol=1e-4)
    assert np.allclose(layer["shares"], explanation.score_shares(), rtol=1e-4)
    assert [len(row) for row in layer["preceding"]] == [0, 1, 2, 3]
    assert np.allclose(layer["preceding"][3], explanation.word_relevance[3, 1:4], rtol=1e-4)
    assert (data["width"], data["height"]) == (500, 300)


def test_a_map_is_kept_to_half_a_level():
    explanation = explanation_of("lrp")
    maps = drawable_maps(explanation)
    data = entry_data(Entry("photo", photograph(), {"lrp": explanation}))
    found = decoded(data["layers"][0]["maps"])
    assert found.shape == maps.shape  # it is small enough to be kept as it is
    largest = np.abs(maps).max(axis=(1, 2))
    error = np.abs(found - maps).max(axis=(1, 2))
    assert (error <= largest * (0.5 / LEVELS) * (1 + 1e-4)).all()
    heads = data["layers"][0]["heads"]
    expected = explanation.attention.reshape(-1, 4, 4).numpy()
    assert heads["count"] == HEADS
    assert np.abs(decoded(heads) - expected).max() <= 0.5 / LEVELS + 1e-4


def test_a_map_of_zeros_stays_zero():
    found = quantised(np.zeros((2, 4, 4), dtype=np.float32))
    assert found["scales"] == found["full"] == [0, 0]
    assert not decoded(found).any()


def test_shares_are_of_additive_methods_only_and_heads_of_square_grids_only():
    data = entry_data(entry("lrp", "gradcam"))
    lrp, gradcam = data["layers"]
    assert lrp["shares"] is not None and gradcam["shares"] is None
    explanation = replace(explanation_of("lrp"), attention=torch.rand(4, 1, 15))
    data = entry_data(Entry("photo", photograph(), {"lrp": explanation}))
    assert data["layers"][0]["heads"] is None


def test_a_long_caption_with_many_methods_stays_below_a_megabyte():
    words = [f"word{number}" for number in range(20)]
    found = {}
    for number in range(8):
        found[f"method {number}"] = explanation_of("lrp", words, number, side=300)
    large = photograph().resize((3000, 2000))
    assert len(page([Entry("photo", large, found)])) < 1_000_000


def test_names_and_words_cannot_become_markup():
    text = page([entry("lrp")], title="<script>alert(1)</script>")
    assert "<i>photo" not in text and "<b>" not in text
    assert "<script>alert" not in text
    script = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert json.loads(script[1])["entries"][0]["layers"][0]["words"] == WORDS


def test_the_page_needs_nothing_else():
    text = page([entry("lrp", "gradcam")])
    assert not re.search(r"https?:|//www|@import|<link", text)
    for source in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert source.startswith("data:")


# ------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright; pip install '.[browser]'"
    )
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium, such as Debian's package of that name")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser, tmp_path):
    """The page of two images in a tab; the test fails if its script does."""
    entries = [entry("lrp", "gradcam"), entry("lrp", name="second.jpg", words=["two", "words"])]
    file = write_page(tmp_path / "page.html", entries)
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    errors = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(file.as_uri())
    yield tab
    assert errors == []
    tab.close()


def about(tab):
    """What the page says of the shown word of the first image."""
    return tab.locator(".about").first.inner_text()


def picture(tab):
    """The pixels of the first map, as a list of bytes."""
    return tab.evaluate(
        "(() => { const c = document.querySelector('canvas');"
        "return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data); })()"
    )


def word(tab, position):
    return tab.locator(".caption").first.locator(".word").nth(position)


def test_one_points_at_words_and_pins_them(tab):
    word(tab, 1).click()
    assert about(tab).startswith("dog has a probability of 37 %, and a score of 3.7.")
    assert word(tab, 1).get_attribute("aria-checked") == "true"
    assert tab.locator("#spoken").text_content() == about(tab)
    pinned = picture(tab)
    word(tab, 3).hover()
    assert about(tab).startswith("park")
    assert picture(tab) != pinned
    tab.locator("h1").hover()
    assert about(tab).startswith("dog")
    assert picture(tab) == pinned


def test_the_arrow_keys_move_between_words(tab):
    word(tab, 0).click()
    tab.keyboard.press("ArrowRight")
    assert about(tab).startswith("dog")
    tab.keyboard.press("End")
    assert about(tab).startswith("park")
    tab.keyboard.press("ArrowRight")
    assert about(tab).startswith("a has")
    assert tab.evaluate("document.activeElement.getAttribute('data-position')") == "0"


def test_the_controls_change_the_map(tab):
    word(tab, 3).click()
    seen = [picture(tab)]
    for name, value in [("sign", "for"), ("scale", "word"), ("view", "1"), ("view", "mean")]:
        tab.select_option(f"#choose-{name}", value)
        seen.append(picture(tab))
    tab.select_option("#choose-view", "map")
    tab.select_option("#choose-layer", "gradcam")
    seen.append(picture(tab))
    assert tab.locator(".meters").first.inner_text() == ""  # its relevance is no share of the score
    tab.locator("#choose-threshold").fill("60")
    seen.append(picture(tab))
    for index, one in enumerate(seen):
        assert one not in seen[:index]
    tab.locator("#choose-threshold").fill("100")
    tab.locator("#choose-opacity").fill("0")
    assert not any(picture(tab)[3::4])


def test_a_pixel_has_the_colour_of_its_relevance(tab):
    explanation = explanation_of("lrp")
    word(tab, 3).click()
    maps = drawable_maps(explanation)
    values = np.array(picture(tab)).reshape(*maps.shape[1:], 4)
    highest = np.unravel_index(maps[3].argmax(), maps[3].shape)
    lowest = np.unravel_index(maps[3].argmin(), maps[3].shape)
    red, _, blue, shown = values[highest]
    assert red > blue + 40 and shown > 100
    red, _, blue, shown = values[lowest]
    assert blue > red + 40 and shown > 100


def test_boxes_are_shown_when_asked_for(tab):
    box = tab.locator(".box").first
    assert not box.is_visible()
    tab.select_option("#choose-boxes", "yes")
    stage = tab.locator(".stage").first.bounding_box()
    found = box.bounding_box()
    assert found["x"] - stage["x"] == pytest.approx(0.1 * stage["width"], abs=1)
    assert found["width"] == pytest.approx(0.4 * stage["width"], abs=1)


@pytest.mark.parametrize("width", [380, 760, 1600])
def test_nothing_is_wider_than_the_window(tab, width):
    tab.set_viewport_size({"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_on_paper_every_word_has_its_map(tab):
    tab.pdf()
    assert tab.locator(".multiples").first.locator("canvas").count() == len(WORDS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_fault_of_accessibility(tab, scheme):
    axe = pytest.importorskip(
        "axe_core_python.sync_playwright", reason="needs axe-core; pip install '.[browser]'"
    )
    tab.emulate_media(color_scheme=scheme)
    word(tab, 3).click()
    faults = []
    for found in axe.Axe().run(tab)["violations"]:
        if found["impact"] in ("serious", "critical"):
            faults.append((found["id"], found["nodes"][0]["html"]))
    assert faults == []
