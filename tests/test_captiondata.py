"""captiondata: images of every kind become upright RGB, words round-trip, a prepared dataset is
read item by item."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from nltk.corpus import stopwords
from nltk.tokenize import RegexpTokenizer
from PIL import Image
from torch.utils.data import DataLoader

from captiondata import CaptionDataset, files_hash, open_split
from commandline import UserError, write_json
from featurecache import features_path, lay_out, versions_of, write_rows
from images import image_transform, load_image
from prepared import dataset_folder
from vocabulary import STOP_WORDS, Vocabulary, tokenize

RED = (255, 0, 0)


def prepared(folder, n=4, side=12):
    """A prepared dataset of `n` train images, image k of the grey value 40 k."""
    (folder / "images").mkdir(parents=True)
    entries = []
    for k in range(n):
        Image.new("RGB", (side, side), (40 * k,) * 3).save(folder / "images" / f"{k}.png")
        entries.append(
            {
                "image_id": k,
                "file": f"{k}.png",
                "width": side,
                "height": side,
                "captions": [f"caption {c} of {k}" for c in range(5)],
                "encoded": [[1], [1, 2], [2], [2, 1, 1], [1]],
                "objects": [],
            }
        )
    Vocabulary(["<pad>", "a", "dog", "<unk>", "<start>", "<end>"]).save(folder / "vocabulary.json")
    info = {
        "name": "tiny",
        "images_root": "images",
        "max_length": 3,
        "splits": {"train": n},
        "categories": {},
    }
    write_json(folder / "train.json", entries)
    write_json(folder / "info.json", info)
    return folder


def cache(folder, split="train", done=True, files=None, version=0, weights="abc"):
    """A feature cache of 2 regions x 3 channels whose row k is filled with k + 10 version."""
    entries = CaptionDataset(folder, split).entries
    path = features_path(folder, "tiny", version)
    path.unlink(missing_ok=True)
    stamp = {
        "encoder": "tiny",
        "weights_hash": weights,
        "image_size": 8,
        "grid": (1, 2),
        "preprocessing": "none",
    }
    lay_out(path, stamp, {split: (len(entries), files or files_hash(entries))}, (2, 3))
    if done:
        values = np.arange(len(entries)) + 10 * version
        rows = values[:, None, None] * np.ones((1, 2, 3))
        write_rows(path, split, list(range(len(entries))), rows.astype(np.float16))


def test_tokenize_lowers_and_splits_at_punctuation():
    words = ["a", "man", "s", "red", "hat", "well", "worn"]
    assert tokenize("A man's RED hat, well-worn.") == words
    assert tokenize(" .!? ") == []


def test_captions_are_taken_apart_as_by_nltk():
    reference = RegexpTokenizer(r"\w+")
    texts = ["A man's hat.", "Zwei Jungen, 3 ÄPFEL_und\n\tein  Ball!", "", "日本語 İstanbul हिन्दी"]
    for text in texts:
        assert tokenize(text) == reference.tokenize(text.lower())


def test_stop_words_are_nltks():
    """Newer lists have more contractions; no word of a tokenised caption has an apostrophe."""
    try:
        theirs = {word for word in stopwords.words("english") if "'" not in word}
    except LookupError:
        pytest.skip("NLTK's data is not here: python -m nltk.downloader stopwords")
    assert theirs == {word for word in STOP_WORDS if "'" not in word}


def test_vocabulary_keeps_first_seen_order_and_drops_rare_words():
    captions = [["the", "dog"], ["a", "dog", "the"], ["the", "cat"]]
    vocabulary = Vocabulary.build(captions, min_word_freq=2)
    assert vocabulary.words == ["<pad>", "the", "dog", "<unk>", "<start>", "<end>"]
    assert (vocabulary.pad, vocabulary.unk, vocabulary.start, vocabulary.end) == (0, 3, 4, 5)
    assert len(vocabulary) == 6
    assert "dog" in vocabulary
    assert "cat" not in vocabulary


def test_vocabulary_round_trip(tmp_path):
    Vocabulary.build([["the", "dog", "sees"]], 1).save(tmp_path / "vocabulary.json")
    vocabulary = Vocabulary.load(tmp_path / "vocabulary.json")
    ids = vocabulary.encode(["the", "zebra", "sees"])
    assert ids == [1, vocabulary.unk, 3]
    framed = torch.tensor([vocabulary.start, *ids, vocabulary.end, vocabulary.pad, 2])
    assert vocabulary.decode(framed) == ["the", "<unk>", "sees"]


@pytest.mark.parametrize("content", [["a", "b"], {"a": 1}, []])
def test_vocabulary_refuses_another_file(tmp_path, content):
    write_json(tmp_path / "v.json", content)
    with pytest.raises(UserError, match="not a vocabulary"):
        Vocabulary.load(tmp_path / "v.json")


def test_load_image_grey(tmp_path):
    Image.new("L", (3, 2), 100).save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (3, 2), (100, 100, 100))


def test_load_image_cmyk(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=100)
    image = load_image(tmp_path / "x.jpg")
    assert image.mode == "RGB"
    assert np.allclose(image.getpixel((8, 8)), RED, atol=4)


def test_load_image_16_bit_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 32896], [65535, 257]], np.uint16)).save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png")
    assert image.mode == "RGB"
    assert np.asarray(image)[..., 0].tolist() == [[0, 128], [255, 1]]


def test_load_image_palette_with_transparency_lies_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "x.png", transparency=1)
    image = load_image(tmp_path / "x.png")
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == RED
    assert image.getpixel((1, 0)) == (255, 255, 255)


def test_load_image_alpha_lies_on_white(tmp_path):
    Image.new("RGBA", (1, 1), (0, 0, 0, 51)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png").getpixel((0, 0)) == (204, 204, 204)


def test_load_image_turns_as_exif_says(tmp_path):
    image = Image.new("RGB", (32, 16), "blue")
    image.paste(RED, (0, 0, 16, 16))  # red left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes top
    image.save(tmp_path / "x.jpg", exif=exif, quality=100, subsampling=0)
    turned = load_image(tmp_path / "x.jpg")
    assert turned.size == (16, 32)
    assert np.allclose(turned.getpixel((8, 8)), RED, atol=4)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_load_image_names_a_truncated_file(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=f"x.{suffix} cannot be read"):
        load_image(path)


def test_load_image_names_what_is_no_image(tmp_path):
    (tmp_path / "x.jpg").write_text("hello")
    with pytest.raises(UserError, match="x.jpg cannot be read"):
        load_image(tmp_path / "x.jpg")
    with pytest.raises(UserError, match="there is no image .*y.jpg"):
        load_image(tmp_path / "y.jpg")
    with pytest.raises(UserError, match="cannot be read"):
        load_image(tmp_path)


def test_image_transform_stretches_and_normalises():
    image = Image.new("RGB", (20, 10), "blue")
    image.paste(RED, (0, 0, 10, 10))
    x = image_transform(8)(image)
    assert type(x) is torch.Tensor
    assert x.shape == (3, 8, 8)
    assert x.dtype == torch.float32
    mean = torch.tensor([0.485, 0.456, 0.406])
    deviation = torch.tensor([0.229, 0.224, 0.225])
    red = (torch.tensor([1.0, 0.0, 0.0]) - mean) / deviation
    torch.testing.assert_close(x[:, 4, 0], red, atol=1e-5, rtol=0)


def test_augmentation_mirrors_sometimes_and_only_if_asked():
    image = Image.new("RGB", (8, 8), "blue")
    image.paste(RED, (0, 0, 4, 8))
    torch.manual_seed(0)
    left_is_red = []
    for _ in range(20):
        x = image_transform(8, augment=True)(image)
        left_is_red.append(bool(x[0, 4, 0] > x[0, 4, 7]))
    assert any(left_is_red)
    assert not all(left_is_red)
    assert torch.equal(image_transform(8)(image), image_transform(8)(image))


def test_items_of_images(tmp_path):
    dataset = CaptionDataset(prepared(tmp_path / "d"), "train", image_transform(8))
    x, captions, index = dataset[2]
    assert len(dataset) == 4
    assert index == 2
    assert x.shape == (3, 8, 8)
    assert captions.dtype == torch.long
    assert captions.tolist() == [
        [4, 1, 5, 0, 0],
        [4, 1, 2, 5, 0],
        [4, 2, 5, 0, 0],
        [4, 2, 1, 1, 5],
        [4, 1, 5, 0, 0],
    ]
    assert dataset.image(2).getpixel((0, 0)) == (80, 80, 80)
    untransformed = CaptionDataset(tmp_path / "d", "train")[2][0]
    assert untransformed.unique().tolist() == pytest.approx([80 / 255])
    assert dataset.references()[3][0] == "caption 0 of 3"
    assert dataset.info["name"] == "tiny"


def test_items_of_features_in_workers_and_after_pickling(tmp_path):
    cache(prepared(tmp_path / "d"))
    dataset = CaptionDataset(tmp_path / "d", "train", features="tiny")
    assert dataset[3][0].tolist() == [[3.0] * 3] * 2
    assert dataset[3][0].dtype == torch.float16
    assert dataset.features_attributes == {
        "encoder": "tiny",
        "weights_hash": "abc",
        "image_size": 8,
        "grid": [1, 2],
        "preprocessing": "none",
    }
    again = pickle.loads(pickle.dumps(dataset))  # although its file is open
    assert again[1][0].tolist() == [[1.0] * 3] * 2
    rows = torch.cat([x for x, _, _ in DataLoader(dataset, 2, num_workers=2)])
    assert rows[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_augmented_versions_take_turns(tmp_path):
    folder = prepared(tmp_path / "d")
    for version in range(3):
        cache(folder, version=version)
    assert versions_of(folder, "tiny") == 2
    dataset = CaptionDataset(folder, "train", features="tiny", versions=2)
    seen = []
    for epoch in range(3):
        dataset.epoch = epoch
        seen.append([dataset[index][0][0, 0].item() for index in range(4)])
    assert [sorted(column) for column in zip(*seen)] == [
        [0, 10, 20],
        [1, 11, 21],
        [2, 12, 22],
        [3, 13, 23],
    ]
    assert seen[0] == [0, 11, 22, 3]  # not all images by the same version at once
    cache(folder, version=2, weights="others")
    complaint = "augmented2.h5 was made with other weights than .*features-tiny.h5; delete it"
    with pytest.raises(UserError, match=complaint):
        CaptionDataset(folder, "train", features="tiny", versions=2)


def test_features_in_memory_are_those_of_the_file(tmp_path):
    folder = prepared(tmp_path / "d")
    for version in range(2):
        cache(folder, version=version)
    one = CaptionDataset(folder, "train", features="tiny", versions=1)
    other = CaptionDataset(folder, "train", features="tiny", versions=1)
    other.load(torch.device("cpu"))
    items = {}
    for version in range(2):
        one.epoch = version
        items[version] = [one[index][0] for index in range(4)]
    for version in range(2):
        features_path(folder, "tiny", version).unlink()  # not needed any more
    for version in range(2):
        other.epoch = version
        for index in range(4):
            assert torch.equal(items[version][index], other[index][0])
    assert other.features_bytes() == 2 * 4 * 6 * 2


def test_a_damaged_row_is_named(tmp_path):
    folder = prepared(tmp_path / "d")
    cache(folder)
    with h5py.File(features_path(folder, "tiny"), "r+") as file:
        file["train"][2, 0, 0] = 7
    dataset = CaptionDataset(folder, "train", features="tiny")
    assert dataset[1][0].tolist() == [[1.0] * 3] * 2
    complaint = "features-tiny.h5 is damaged at image 2 of split 'train'; delete it"
    with pytest.raises(UserError, match=complaint):
        dataset[2]
    with pytest.raises(UserError, match="damaged at image 2"):
        dataset.load(torch.device("cpu"))


def test_unusable_caches_are_refused(tmp_path):
    folder = prepared(tmp_path / "d")
    complaint = "there is no .*features-tiny.h5; run preparedataset.py --features tiny"
    with pytest.raises(UserError, match=complaint):
        CaptionDataset(folder, "train", features="tiny")
    cache(folder, done=False)
    with pytest.raises(UserError, match="incomplete for split 'train'"):
        CaptionDataset(folder, "train", features="tiny")
    cache(folder, files="other")
    with pytest.raises(UserError, match="made for other images"):
        CaptionDataset(folder, "train", features="tiny")
    features_path(folder, "tiny").write_bytes(b"junk")
    with pytest.raises(UserError, match="features-tiny.h5 cannot be read"):
        CaptionDataset(folder, "train", features="tiny")


def test_unprepared_folder_and_unknown_split(tmp_path):
    with pytest.raises(UserError, match="not a prepared dataset"):
        CaptionDataset(tmp_path / "none", "train")
    with pytest.raises(UserError, match="no split 'test'; it has: train"):
        CaptionDataset(prepared(tmp_path / "d"), "test")


def test_a_bare_name_is_a_folder_under_data(tmp_path):
    assert dataset_folder("scenes") == Path("data/scenes")
    assert dataset_folder("./scenes/x") == Path("scenes/x")
    assert dataset_folder(tmp_path) == tmp_path


def test_a_split_is_opened_as_the_encoder_wants_it(tmp_path):
    folder = prepared(tmp_path / "d")
    cache(folder)
    of_images = SimpleNamespace(given=False, name="tiny", image_size=8)
    of_features = SimpleNamespace(given=True, name="tiny")
    assert open_split(folder, "train", of_images)[0][0].shape == (3, 8, 8)
    assert open_split(folder, "train", of_features)[0][0].shape == (2, 3)
