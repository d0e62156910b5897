"""Captioners are given photographs, and explanations draw themselves."""

import json

import numpy as np
import pytest
import tiny_transformers
import torch
from helpers import random_captioner, relative_difference
from PIL import Image
from test_captioner import equal_explanations

from captioner import load_captioner
from commandline import UserError
from images import image_transform, load_image


@pytest.fixture(scope="module", params=["gridtd", "blip"])
def captioner(request, tmp_path_factory):
    """One of this project's captioners, and one of transformers."""
    if request.param == "gridtd":
        return random_captioner().float()
    folder = tmp_path_factory.mktemp("transformers")
    return load_captioner(tiny_transformers.save("blip", folder))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two images of other shapes than the network's, one with transparency."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    paths = [folder / "wide.png", folder / "tall.png"]
    for path, (width, height), mode in zip(paths, ((60, 40), (30, 50)), ("RGB", "RGBA")):
        pixels = torch.randint(256, (height, width, len(mode)), generator=generator)
        Image.fromarray(pixels.to(torch.uint8).numpy(), mode).save(path)
    return paths


def words_of(captioner):
    """A caption that the captioner knows the words of."""
    return ["w1", "w2"] if hasattr(captioner, "vocabulary") else ["a", "doggy"]


def test_a_photograph_is_a_file_or_a_pil_image(captioner, files):
    words = words_of(captioner)
    method = "gradient"
    both = captioner.explain(files, [words, words], method)
    for path, expected in zip(files, both):
        for photograph in (path, str(path), Image.open(path)):
            found = captioner.explain(photograph, words, method)
            assert found.words == words
            assert found.photograph.size == Image.open(path).size
            # In float32, of which a batch is rounded otherwise on some CPUs (2e-5 was seen).
            assert relative_difference(found.image_relevance, expected.image_relevance) < 1e-4
    captions = captioner.caption(files)
    assert [captioner.caption(path) for path in files] == captions
    assert captioner.explain(files[0], method=method).words == captions[0]


def test_a_photograph_is_what_its_tensor_is(files):
    captioner = random_captioner().float()
    pixels = image_transform(captioner.encoder.image_size)(load_image(files[1]))[None]
    of_tensor = captioner.explain(pixels, [["w1"]])[0]
    assert of_tensor.photograph is None
    of_file = captioner.explain(files[1], ["w1"])
    of_file.photograph = None
    assert equal_explanations(of_file, of_tensor)


def test_the_caption_of_a_photograph_may_be_a_text(captioner, files):
    words = words_of(captioner)
    found = captioner.explain(files[0], " ".join(words), "gradient")
    assert found.words == words
    with pytest.raises(UserError, match="need a caption each, and 'a dog' is one text"):
        captioner.explain(files, "a dog")


def test_what_is_no_photograph_is_refused(captioner, files):
    with pytest.raises(UserError, match="name of a file or a PIL image, not a int"):
        captioner.explain([files[0], 3])
    with pytest.raises(UserError, match="name of a file or a PIL image, not a Tensor"):
        captioner.caption([torch.zeros(3, 128, 128)])
    with pytest.raises(UserError, match="there is no image nowhere.jpg"):
        captioner.caption("nowhere.jpg")


def test_an_explanation_says_what_it_is(captioner, files):
    words = words_of(captioner)
    found = captioner.explain(files[0], words, "gradient")
    assert (
        repr(found)
        == "<Explanation by gradient: "
        + " ".join(f"{word} ({score:.1f})" for word, score in zip(words, found.scores.tolist()))
        + ">"
    )


def test_an_explanation_draws_itself(captioner, files, tmp_path):
    words = words_of(captioner)
    found = captioner.explain(files[0], words, "gradient")
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    for ending, start in starts.items():
        path = found.save(tmp_path / f"figure{ending}", words=words[1:])
        assert path.read_bytes().startswith(start)
    page = found.save(tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and words[1] in page
    assert found._repr_html_().startswith('<iframe srcdoc="&lt;!DOCTYPE html')
    with pytest.raises(UserError, match="the caption has no word 'cat'"):
        found.plot(words=["cat"])
    with np.load(found.save(tmp_path / "arrays.npz")) as arrays:
        assert np.array_equal(arrays["image_relevance"], found.image_relevance.numpy())
        assert arrays["words"].tolist() == found.words and arrays["method"] == "gradient"
    numbers = json.loads(found.save(tmp_path / "numbers.json").read_text())
    assert numbers["words"] == found.words and numbers["scores"] == found.scores.tolist()
    with pytest.raises(UserError, match="'figure.txt' is not the name of a file that ends in"):
        found.save("figure.txt")


def test_without_a_photograph_one_is_asked_for(captioner, files):
    found = captioner.explain(files[0], words_of(captioner), "gradient")
    photograph = found.photograph
    found.photograph = None
    assert found._repr_html_() is None
    with pytest.raises(UserError, match="knows no photograph to draw over"):
        found.plot()
    assert found.plot(photograph=photograph).axes
