"""preparedataset: the real file formats in, the prepared dataset out. Mistakes are in test_bad_input.py."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from fixtures import (
    REAL,
    REPOSITORY,
    WRITERS,
    edit,
    flickr_file,
    write_coco,
    write_coco2017,
    write_entities,
    write_flickr,
)
from PIL import Image
from torch import nn

import preparedataset
from captiondata import CaptionDataset
from commandline import UserError, read_json
from featurecache import encoder_path, features_path
from images import image_transform
from preparedataset import cache_features, describe, draw_scenes, encode_captions, prepare
from vocabulary import tokenize


@pytest.fixture
def coco(tmp_path):
    return write_coco2017(tmp_path / "coco")


@pytest.fixture
def flickr(tmp_path):
    return write_flickr(tmp_path / "flickr")


def test_coco_is_split_by_id_and_keeps_objects(coco, tmp_path):
    info = prepare("coco2017", coco, tmp_path / "out", min_word_freq=1)
    assert info == read_json(tmp_path / "out" / "info.json") and info["splits"] == {
        "train": 3,
        "val": 1,
        "test": 2,
    }
    assert [e["image_id"] for e in CaptionDataset(tmp_path / "out", "train").entries] == [2, 4, 9]
    val = CaptionDataset(tmp_path / "out", "val", image_transform(8))
    assert val.entries[0]["image_id"] == 30 and val[0][0].shape == (3, 8, 8)
    assert (
        val.entries[0]["file"] == "train2017/000000000030.jpg"
        and val.entries[0]["captions"][1] == "A dog, no. 1"
    )
    assert val.entries[0]["objects"] == [
        {
            "category": "dog",
            "bbox": [2, 1, 10, 7],
            "iscrowd": 0,
            "main": False,
            "segmentation": [[2, 1, 10, 1, 10, 7]],
        }
    ]
    assert info["categories"].keys() == {"dog", "bus"} and {"dog", "dogs", "puppies"} <= set(
        info["categories"]["dog"]
    )
    assert (
        val.vocabulary.words[1:7] == ["a", "dog", "no", "0", "1", "2"] and info["max_length"] == 4
    )


@pytest.mark.parametrize("name, threshold", [("coco2017", 4), ("flickr30k", 3), ("flickr8k", 3)])
def test_each_dataset_from_its_own_files(name, threshold, tmp_path):
    """The vocabulary: in first-seen order of the training captions, what occurs often enough; the rest is <unk>."""
    root = WRITERS[name](tmp_path / "raw")
    document = root / (
        "annotations/captions_train2017.json" if name == "coco2017" else f"dataset_{name}.json"
    )
    rare = {"caption": "Zebra thrice thrice thrice", "raw": "Zebra thrice thrice thrice"}
    edit(
        document,
        lambda data: (
            data["annotations"] if name == "coco2017" else data["images"][0]["sentences"]
        )[1].update(rare),
    )
    info = prepare(name, root, tmp_path / "out")
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {
        "info",
        "vocabulary",
        *info["splits"],
    }
    assert info["min_word_freq"] == threshold
    train = CaptionDataset(tmp_path / "out", "train")
    said = Counter(
        word
        for entry in train.entries
        for caption in entry["captions"]
        for word in tokenize(caption)
    )
    assert train.vocabulary.words == [
        "<pad>",
        *(word for word in said if said[word] >= threshold),
        "<unk>",
        "<start>",
        "<end>",
    ]
    assert "zebra" not in train.vocabulary and ("thrice" in train.vocabulary) == (threshold == 3)
    assert train.vocabulary.unk in train.entries[0]["encoded"][1] and any(
        entry["objects"] for entry in train.entries
    )


@pytest.mark.parametrize("name", ["coco2017", "flickr8k"])
def test_the_small_files_are_built_like_the_originals(name, tmp_path):
    def build(value):
        """The keys and types of a JSON value, of a list's first item."""
        if isinstance(value, dict):
            return {key: build(item) for key, item in value.items()}
        return (
            [build(value[0])]
            if isinstance(value, list) and value
            else "number"
            if isinstance(value, (int, float))
            else type(value).__name__
        )

    if not (REAL / name).exists():
        pytest.skip("the originals are not here")
    WRITERS[name](tmp_path)
    for path in tmp_path.glob("**/*.json"):
        ours, originals = read_json(path), read_json(REAL / name / path.relative_to(tmp_path))
        assert build(ours) == build(originals), path.name
        if name == "coco2017" and "instances" in path.name:
            ours, originals = (
                [thing for thing in data["annotations"] if thing["iscrowd"]][0]
                for data in (ours, originals)
            )
            assert build(ours) == build(originals)


def save_grey(path):
    Image.new("L", (20, 10), 100).save(path)


def save_cmyk(path):
    Image.new("CMYK", (20, 10), (0, 255, 255, 0)).save(path, "JPEG")


def save_16_bit(path):
    Image.fromarray(np.full((10, 20), 40000, np.uint16)).save(
        path, "PNG"
    )  # by another name: PIL looks inside


def save_turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10), "red").save(path, "JPEG", exif=exif)


@pytest.mark.parametrize(
    "save, size",
    [
        (save_grey, (20, 10)),
        (save_cmyk, (20, 10)),
        (save_16_bit, (20, 10)),
        (save_turned, (10, 20)),
    ],
)
def test_unusual_images_prepare_and_load(save, size, flickr, tmp_path):
    save(flickr / "images" / flickr_file("flickr8k", 0))
    prepare("flickr8k", flickr, tmp_path / "out")
    train = CaptionDataset(tmp_path / "out", "train", image_transform(8))
    assert train[0][0].shape == (3, 8, 8) and train.image(0).mode == "RGB"
    assert (train.entries[0]["width"], train.entries[0]["height"]) == size == train.image(0).size


def test_the_summary_tells_what_was_read_and_dropped_and_why(flickr, tmp_path):
    raws = ["Two dogs.", "!", "one two three four five six seven", "Two dogs.", "Two cats."]
    edit(
        flickr / "dataset_flickr8k.json",
        lambda data: [s.update(raw=raw) for s, raw in zip(data["images"][0]["sentences"], raws)],
    )
    edit(flickr / "dataset_flickr8k.json", lambda data: data["images"][3].update(sentences=[]))
    assert list(describe(prepare("flickr8k", flickr, tmp_path / "out", max_length=5))) == [
        "train: read images 3, captions 10; dropped captions without a word 1, captions longer than --max_length 1, "
        "images left without a caption 1",
        "    kept images 2, of them without boxes of objects 2; words 26, of them <unk> 1 (3.8%)",
        "val: read images 1, captions 5; dropped nothing",
        "    kept images 1, of them without boxes of objects 1; words 20, of them <unk> 5 (25.0%)",
        "vocabulary: 4 words that occur in train 3 times or more, and <pad>, <unk>, <start>, <end>",
    ]


def test_coco_large_split_leaves_the_rest_unused(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(preparedataset, "COCO_TRAIN", 2)
    monkeypatch.setattr(preparedataset, "COCO_VAL", 1)
    info = prepare("coco2017", coco, tmp_path / "out")
    assert (
        info["splits"] == {"train": 2, "val": 1, "test": 2}
        and info["summary"]["images_unused"] == 1
    )


def test_scenes_carry_synonyms_pairs_and_a_relative_images_root(tmp_path):
    synonyms = [{"id": 3, "name": "dog", "synonyms": ["dog", "puppy"]}, {"id": 7, "name": "ball"}]
    for name, ids in (("train", [1, 2]), ("val", [3]), ("test", [4])):
        write_coco(
            tmp_path / "s", name, ids, synonyms, info={"planted_pairs": [["dog", "ball"]]}, main=1
        )
    info = prepare("scenes", tmp_path / "s", tmp_path / "s", min_word_freq=1)
    assert info["images_root"] == "." and info["planted_pairs"] == [["dog", "ball"]]
    assert info["categories"] == {"dog": ["dog", "puppy"], "ball": ["ball", "balls"]}
    test = CaptionDataset(tmp_path / "s", "test")
    assert test.image(0).size == (20, 10) and test.entries[0]["objects"][0]["main"]


def test_entities_become_boxes_of_the_images_own_size(flickr, tmp_path):
    write_entities(flickr)
    prepare("flickr8k", flickr, tmp_path / "out", min_word_freq=1)
    objects = {
        entry["file"]: entry["objects"]
        for entry in CaptionDataset(tmp_path / "out", "train").entries
    }
    assert objects["1000_ab0.jpg"] == objects["1003_ab3.jpg"] == []
    assert objects["1001_ab1.jpg"] == [  # 20 x 10 pixels
        {"category": "person", "bbox": [4, 1, 10, 10], "words": ["man", "guy"]},
        {"category": "frisbee", "bbox": [0, 0, 20, 5], "words": ["frisbee"]},
        {"category": "gadget", "bbox": [0, 0, 20, 5], "words": ["gadget"]},
    ]


def test_flickr_uses_raw_sentences_and_has_no_test_split(flickr, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "test.json").write_text("[]")  # of an earlier preparation
    info = prepare("flickr8k", flickr, tmp_path / "out")
    train = CaptionDataset(tmp_path / "out", "train")
    assert (
        info["splits"] == {"train": 3, "val": 1} and not (tmp_path / "out" / "test.json").exists()
    )
    assert [entry["image_id"] for entry in train.entries] == [0, 1, 3]
    assert train.vocabulary.decode(train.entries[0]["encoded"][0]) == ["two", "dogs", "ball", "0"]
    assert (train.entries[0]["width"], train.entries[0]["height"]) == (20, 10) and train.entries[0][
        "objects"
    ] == []
    assert Path(info["images_root"]).is_absolute()


def test_captions_are_counted_then_filtered_then_five():
    words = [["a b c d"], [" . "], ["e e e"], [f"x {k}" for k in range(7)]]
    entries = [
        {"captions": captions, "file": str(k), "objects": []} for k, captions in enumerate(words)
    ]
    entries[2]["captions"] = ["e e e", "a", "!"]
    vocabulary, kept, summary = encode_captions({"train": entries}, 2, 3, seed=0)
    assert vocabulary.words[1:-3] == [
        "a",
        "e",
        "x",
    ]  # "a" counts though its first caption is too long
    assert [entry["file"] for entry in kept["train"]] == ["2", "3"]
    assert summary["train"] == {
        "images_read": 4,
        "captions_read": 12,
        "captions_dropped_empty": 2,
        "captions_dropped_too_long": 1,
        "images_dropped_without_caption": 2,
        "images_without_boxes": 2,
        "words": 14,
        "words_unknown": 5,
    }
    few, many = kept["train"]
    assert few["captions"] == ["e e e", "a"] and len(few["encoded"]) == 5
    assert few["encoded"][:2] == [[2, 2, 2], [1]] and all(
        ids in few["encoded"][:2] for ids in few["encoded"]
    )
    assert len(many["captions"]) == 7 and [ids[0] for ids in many["encoded"]] == [3] * 5


def test_sampling_of_five_depends_on_the_seed_only():
    entry = {"captions": [" ".join(["w"] * k) for k in range(1, 13)], "file": "x", "objects": []}
    lengths = [
        [
            len(ids)
            for ids in encode_captions({"train": [entry]}, 1, 30, seed)[1]["train"][0]["encoded"]
        ]
        for seed in (0, 0, 1)
    ]
    assert lengths[0] == lengths[1] != lengths[2] and len(set(lengths[0])) == 5


def run_script(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "preparedataset.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def test_scenes_from_the_command_line(tmp_path):
    result = run_script(
        "--train",
        12,
        "--val",
        3,
        "--test",
        3,
        "--image_size",
        64,
        "--features",
        "scenes_vgg",
        "--min_word_freq",
        1,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "data" / "scenes"
    assert "data/scenes is ready: train 12, val 3, test 3 images" in result.stdout
    assert [
        len(CaptionDataset(folder, s, features="scenes_vgg")) for s in ("train", "val", "test")
    ] == [12, 3, 3]


def test_scenes_are_redrawn_for_other_parameters_only(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        preparedataset.scenes, "write_scenes", lambda root, **parameters: drawn.append(parameters)
    )
    parameters = {
        "train": 2,
        "val": 1,
        "test": 1,
        "size": 64,
        "bias": 0.9,
        "test_bias": 0.5,
        "seed": 0,
    }
    draw_scenes(tmp_path, tmp_path, **parameters)
    (tmp_path / "features-x.h5").touch()
    (tmp_path / "info.json").write_text(json.dumps({"name": "scenes", "images_root": "."}))
    draw_scenes(tmp_path, tmp_path, **parameters)
    assert len(drawn) == 1 and (tmp_path / "features-x.h5").exists()
    with pytest.raises(UserError):
        draw_scenes(tmp_path, tmp_path, **{**parameters, "bias": 1.5})
    assert (tmp_path / "features-x.h5").exists() and (tmp_path / "info.json").exists()
    draw_scenes(tmp_path, tmp_path, **{**parameters, "seed": 1})
    assert (
        len(drawn) == 2
        and not (tmp_path / "features-x.h5").exists()
        and not (tmp_path / "info.json").exists()
    )


def test_features_of_other_drawings_do_not_stay(tmp_path, monkeypatch):
    """Two folders of scenes of the same names, prepared one after another into the same output."""
    monkeypatch.setattr(preparedataset.scenes, "write_scenes", lambda root, **parameters: None)
    parameters = {"train": 2, "val": 1, "test": 1, "size": 64, "bias": 0.9, "test_bias": 0.5}
    roots, output = [tmp_path / "a", tmp_path / "b"], tmp_path / "out"
    output.mkdir()
    for seed, root in enumerate(roots):
        draw_scenes(root, output, **parameters, seed=seed)
    for root, stays in ((roots[0], True), (roots[1], False)):
        (output / "features-x.h5").touch()
        (output / "info.json").write_text(
            json.dumps({"name": "scenes", "images_root": str(roots[0])})
        )
        draw_scenes(root, output, **parameters, seed=roots.index(root))
        assert (output / "features-x.h5").exists() == stays


class TinyEncoder(nn.Module):
    """16 x 16 pixels -> 2 x 2 regions of 5 channels; counts the images it sees."""

    name, image_size, grid, out_channels = "tiny", 16, (2, 2), 5

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.seed, self.seen = nn.Conv2d(3, 5, 8, stride=8), seed, 0

    def forward(self, images):
        self.seen += len(images)
        return self.net(images).flatten(2).transpose(1, 2)

    def weights_hash(self):
        return f"weights{self.seed}"


def contents(path):
    with h5py.File(path) as file:
        return {name: file[name][:].tobytes() for name in file}, {
            key: str(file.attrs[key]) for key in file.attrs
        }


def test_cached_features_are_the_encoders_own(flickr, tmp_path):
    prepare("flickr8k", flickr, tmp_path / "out")
    encoder = TinyEncoder()
    cache_features(tmp_path / "out", encoder, batch_size=2)
    images = CaptionDataset(tmp_path / "out", "train", image_transform(16))
    features = CaptionDataset(tmp_path / "out", "train", features="tiny")
    stamp = {
        "encoder": "tiny",
        "weights_hash": "weights0",
        "image_size": 16,
        "grid": [2, 2],
        "preprocessing": preparedataset.PREPROCESSING,
    }
    assert features.features_attributes == stamp
    for k in range(3):
        direct = encoder(images[k][0][None])[0]
        assert features[k][0].shape == (4, 5)
        torch.testing.assert_close(features[k][0].float(), direct, rtol=1e-3, atol=1e-3)
    with h5py.File(features_path(tmp_path / "out", "tiny")) as file:
        assert file["train"].dtype == np.float16 and "test" not in file


def test_augmented_features_are_of_augmented_images(flickr, tmp_path):
    prepare("flickr8k", flickr, tmp_path / "out")
    encoder, images = (
        TinyEncoder(),
        CaptionDataset(tmp_path / "out", "train", image_transform(16, augment=True)),
    )
    cache_features(tmp_path / "out", encoder, augment=2, seed=5)
    assert encoder.seen == 4 + 3 + 3  # the val image is not augmented
    images.augmentation_seed = 5
    for version in (1, 2):
        with h5py.File(features_path(tmp_path / "out", "tiny", version)) as file:
            assert "seed 5" in file.attrs["preprocessing"] and "val" not in file
            images.epoch = version
            for k in range(3):
                torch.testing.assert_close(
                    torch.from_numpy(file["train"][k]).float(),
                    encoder(images[k][0][None])[0],
                    rtol=1e-3,
                    atol=1e-3,
                )
    with pytest.raises(
        UserError,
        match="augmented1.h5 was made with preprocessing .*seed 5, not .*seed 6; delete it",
    ):
        cache_features(tmp_path / "out", encoder, augment=1, seed=6)


def test_an_interrupted_cache_goes_on_to_the_same_content(flickr, tmp_path):
    prepare("flickr8k", flickr, tmp_path / "out")
    path, encoder = features_path(tmp_path / "out", "tiny"), TinyEncoder()
    cache_features(tmp_path / "out", encoder, batch_size=1)
    whole = contents(path)
    with h5py.File(path, "r+") as file:
        for split, row in (("train", 0), ("train", 2), ("val", 0)):
            file[f"{split}_done"][row], file[split][row] = False, np.zeros((4, 5))
    encoder.seen = 0
    cache_features(tmp_path / "out", encoder, batch_size=1)
    assert encoder.seen == 3 and contents(path) == whole
    cache_features(tmp_path / "out", encoder)
    assert encoder.seen == 3


CACHING = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_preparedataset import TinyEncoder
from preparedataset import cache_features
cache_features({folder!r}, TinyEncoder(), batch_size=4, workers=0)
"""


def test_caching_killed_at_any_moment_loses_at_most_a_batch(tmp_path):
    """SIGKILL six times at random moments of the writing: the file is whole, and every row that counts is right."""
    root = write_flickr(tmp_path / "flickr", splits=["train", "val"] * 150)
    path, moments = features_path(tmp_path / "out", "tiny"), random.Random(0)
    prepare("flickr8k", root, tmp_path / "out")
    cache_features(tmp_path / "out", TinyEncoder(), batch_size=4, workers=0)
    whole = contents(path)
    path.unlink()
    script = CACHING.format(
        root=str(REPOSITORY), tests=str(REPOSITORY / "tests"), folder=str(tmp_path / "out")
    )
    counts = [0]
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (
            path.exists() and path.stat().st_mtime_ns > time.time_ns() - 50_000_000
        ):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.wait()
        with h5py.File(path) as file:
            done = np.flatnonzero(file["train_done"][:])
            rows, expected = (
                file["train"][:],
                np.frombuffer(whole[0]["train"], np.float16).reshape(150, 4, 5),
            )
            assert np.array_equal(rows[done], expected[done])
            strangers = np.flatnonzero((rows != 0).any((1, 2)) & ~file["train_done"][:])
        assert len(strangers) <= 4
        counts.append(len(done))
    assert counts == sorted(counts) and len(set(counts)) > 3
    cache_features(tmp_path / "out", TinyEncoder(), batch_size=4, workers=0)
    assert contents(path) == whole


def test_caches_of_other_weights_or_images_are_refused(flickr, tmp_path):
    prepare("flickr8k", flickr, tmp_path / "out")
    path = features_path(tmp_path / "out", "tiny")
    cache_features(tmp_path / "out", TinyEncoder())
    whole, weights = contents(path), encoder_path(tmp_path / "out", "tiny").read_bytes()
    with pytest.raises(
        UserError, match="tiny.h5 was made with weights_hash weights0, not weights1; delete it"
    ):
        cache_features(tmp_path / "out", TinyEncoder(seed=1))
    edit(flickr / "dataset_flickr8k.json", lambda data: data["images"].pop(0))
    prepare("flickr8k", flickr, tmp_path / "out")
    with pytest.raises(UserError, match="made for other images of split 'train'; delete it"):
        cache_features(tmp_path / "out", TinyEncoder())
    assert (
        contents(path) == whole and encoder_path(tmp_path / "out", "tiny").read_bytes() == weights
    )
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be opened"):
        cache_features(tmp_path / "out", TinyEncoder())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line_and_can_be_mended(flickr, tmp_path, workers):
    prepare("flickr8k", flickr, tmp_path / "out")
    path = flickr / "images" / flickr_file("flickr8k", 3)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="^[^\n]*ab3.jpg cannot be read as an image[^\n]*$"):
        cache_features(tmp_path / "out", TinyEncoder(), batch_size=1, workers=workers)
    path.write_bytes(whole)
    encoder = TinyEncoder()
    cache_features(tmp_path / "out", encoder)
    assert encoder.seen == 2  # 3.jpg and the val image: the two before it were kept


@pytest.mark.skipif(
    not (REAL / "flickr8k").exists(), reason="the photographs of Flickr8k are not here"
)
def test_real_flickr8k(tmp_path):
    info = prepare("flickr8k", REAL / "flickr8k", tmp_path / "out")
    assert (
        info["splits"] == {"train": 6000, "val": 1000}
        and info["summary"]["train"]["captions_read"] == 30000
    )
    dataset = CaptionDataset(tmp_path / "out", "val", image_transform(224))
    x, captions, index = dataset[random.Random(0).randrange(1000)]
    assert x.shape == (3, 224, 224) and captions.shape == (5, info["max_length"] + 2)
    assert dataset.vocabulary.decode(captions[0])[0] in dataset.references()[index][0].lower()
    assert 3000 < len(dataset.vocabulary) < 4000


@pytest.mark.skipif(not (REAL / "coco2017").exists(), reason="the photographs of COCO are not here")
def test_real_coco2017(tmp_path):
    info = prepare("coco2017", REAL / "coco2017", tmp_path / "out")
    assert info["splits"] == {"train": 77, "val": 3, "test": 79} and len(info["categories"]) == 80
    test = CaptionDataset(tmp_path / "out", "test", image_transform(224))
    assert [entry["image_id"] for entry in test.entries] == sorted(
        entry["image_id"] for entry in test.entries
    )
    for k in (0, 40, 78):
        assert test.image(k).size == (test.entries[k]["width"], test.entries[k]["height"])
    boxes = [(entry, thing["bbox"]) for entry in test.entries for thing in entry["objects"]]
    assert len(boxes) == len(
        read_json(REAL / "coco2017/annotations/instances_val2017.json")["annotations"]
    )
    assert all(
        0 <= x1 < x2 <= e["width"] + 1 and 0 <= y1 < y2 <= e["height"] + 1
        for e, (x1, y1, x2, y2) in boxes
    )
