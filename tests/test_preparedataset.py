"""preparedataset: the real file formats in, the prepared dataset out. Mistakes are in
test_bad_input.py."""

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

import captiondata
import readers.coco
import scenes
from captiondata import CaptionDataset, cache_features, encode_captions
from commandline import UserError, read_json
from featurecache import encoder_path, features_path
from images import image_transform
from preparedataset import describe, prepare
from scenes import draw_scenes
from vocabulary import tokenize


@pytest.fixture
def coco(tmp_path):
    return write_coco2017(tmp_path / "coco")


@pytest.fixture
def flickr(tmp_path):
    return write_flickr(tmp_path / "flickr")


def test_coco_is_split_by_id_and_keeps_objects(coco, tmp_path):
    info = prepare("coco2017", coco, tmp_path / "out", min_word_freq=1)
    assert info == read_json(tmp_path / "out" / "info.json")
    assert info["splits"] == {"train": 3, "val": 1, "test": 2}
    train = CaptionDataset(tmp_path / "out", "train")
    assert [entry["image_id"] for entry in train.entries] == [2, 4, 9]
    val = CaptionDataset(tmp_path / "out", "val", image_transform(8))
    assert val[0][0].shape == (3, 8, 8)
    entry = val.entries[0]
    assert entry["image_id"] == 30
    assert entry["file"] == "train2017/000000000030.jpg"
    assert entry["captions"][1] == "A dog, no. 1"
    dog = {
        "category": "dog",
        "bbox": [2, 1, 10, 7],
        "iscrowd": 0,
        "main": False,
        "segmentation": [[2, 1, 10, 1, 10, 7]],
    }
    assert entry["objects"] == [dog]
    assert info["categories"].keys() == {"dog", "bus"}
    assert {"dog", "dogs", "puppies"} <= set(info["categories"]["dog"])
    assert val.vocabulary.words[1:7] == ["a", "dog", "no", "0", "1", "2"]
    assert info["max_length"] == 4


def say_something_rare(name, root):
    """Change one training caption of a dataset that WRITERS wrote."""
    rare = "Zebra thrice thrice thrice"
    if name == "coco2017":
        document = root / "annotations" / "captions_train2017.json"
        edit(document, lambda data: data["annotations"][1].update(caption=rare))
    else:
        document = root / f"dataset_{name}.json"
        edit(document, lambda data: data["images"][0]["sentences"][1].update(raw=rare))


@pytest.mark.parametrize("name, threshold", [("coco2017", 4), ("flickr30k", 3), ("flickr8k", 3)])
def test_each_dataset_from_its_own_files(name, threshold, tmp_path):
    """The vocabulary: in first-seen order of the training captions, what occurs often enough; the
    rest is <unk>."""
    root = WRITERS[name](tmp_path / "raw")
    say_something_rare(name, root)
    info = prepare(name, root, tmp_path / "out")
    files = {path.stem for path in (tmp_path / "out").iterdir()}
    assert files == {"info", "vocabulary", *info["splits"]}
    assert info["min_word_freq"] == threshold
    train = CaptionDataset(tmp_path / "out", "train")
    said = Counter()
    for entry in train.entries:
        for caption in entry["captions"]:
            said.update(tokenize(caption))
    frequent = [word for word in said if said[word] >= threshold]
    assert train.vocabulary.words == ["<pad>", *frequent, "<unk>", "<start>", "<end>"]
    assert "zebra" not in train.vocabulary
    assert ("thrice" in train.vocabulary) == (threshold == 3)
    assert train.vocabulary.unk in train.entries[0]["encoded"][1]
    assert any(entry["objects"] for entry in train.entries)


def build_of(value):
    """The keys and types of a JSON value, of a list's first item."""
    if isinstance(value, dict):
        return {key: build_of(item) for key, item in value.items()}
    if isinstance(value, list) and value:
        return [build_of(value[0])]
    if isinstance(value, (int, float)):
        return "number"
    return type(value).__name__


def first_crowd(instances):
    return next(thing for thing in instances["annotations"] if thing["iscrowd"])


@pytest.mark.parametrize("name", ["coco2017", "flickr8k"])
def test_the_small_files_are_built_like_the_originals(name, tmp_path):
    if not (REAL / name).exists():
        pytest.skip("the originals are not here")
    WRITERS[name](tmp_path)
    for path in tmp_path.glob("**/*.json"):
        ours = read_json(path)
        originals = read_json(REAL / name / path.relative_to(tmp_path))
        assert build_of(ours) == build_of(originals), path.name
        if name == "coco2017" and "instances" in path.name:
            assert build_of(first_crowd(ours)) == build_of(first_crowd(originals))


def save_grey(path):
    Image.new("L", (20, 10), 100).save(path)


def save_cmyk(path):
    Image.new("CMYK", (20, 10), (0, 255, 255, 0)).save(path, "JPEG")


def save_16_bit(path):
    pixels = np.full((10, 20), 40000, np.uint16)
    Image.fromarray(pixels).save(path, "PNG")  # by another name: PIL looks inside


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
    assert train[0][0].shape == (3, 8, 8)
    assert train.image(0).mode == "RGB"
    assert train.image(0).size == size
    assert (train.entries[0]["width"], train.entries[0]["height"]) == size


def test_the_summary_tells_what_was_read_and_dropped_and_why(flickr, tmp_path):
    raws = ["Two dogs.", "!", "one two three four five six seven", "Two dogs.", "Two cats."]

    def change(data):
        for sentence, raw in zip(data["images"][0]["sentences"], raws):
            sentence["raw"] = raw
        data["images"][3]["sentences"] = []

    edit(flickr / "dataset_flickr8k.json", change)
    assert list(describe(prepare("flickr8k", flickr, tmp_path / "out", max_length=5))) == [
        "train: read 3 images, 10 captions; dropped 1 captions without a word, "
        "1 captions longer than --max_length, 1 images left without a caption",
        "    kept 2 images, 2 without boxes of objects; 26 words, 1 of them <unk> (3.8%)",
        "val: read 1 images, 5 captions; dropped nothing",
        "    kept 1 images, 1 without boxes of objects; 20 words, 5 of them <unk> (25.0%)",
        "vocabulary: 4 words that occur in train at least 3 times, "
        "and <pad>, <unk>, <start>, <end>",
    ]


def test_coco_large_split_leaves_the_rest_unused(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(readers.coco, "COCO_TRAIN", 2)
    monkeypatch.setattr(readers.coco, "COCO_VAL", 1)
    info = prepare("coco2017", coco, tmp_path / "out")
    assert info["splits"] == {"train": 2, "val": 1, "test": 2}
    assert info["summary"]["images_unused"] == 1


def test_scenes_carry_synonyms_pairs_and_a_relative_images_root(tmp_path):
    synonyms = [{"id": 3, "name": "dog", "synonyms": ["dog", "puppy"]}, {"id": 7, "name": "ball"}]
    pairs = {"planted_pairs": [["dog", "ball"]]}
    for name, ids in (("train", [1, 2]), ("val", [3]), ("test", [4])):
        write_coco(tmp_path / "s", name, ids, synonyms, pairs, main=1)
    info = prepare("scenes", tmp_path / "s", tmp_path / "s", min_word_freq=1)
    assert info["images_root"] == "."
    assert info["planted_pairs"] == [["dog", "ball"]]
    assert info["categories"] == {"dog": ["dog", "puppy"], "ball": ["ball", "balls"]}
    test = CaptionDataset(tmp_path / "s", "test")
    assert test.image(0).size == (20, 10)
    assert test.entries[0]["objects"][0]["main"]


def test_entities_become_boxes_of_the_images_own_size(flickr, tmp_path):
    write_entities(flickr)
    prepare("flickr8k", flickr, tmp_path / "out", min_word_freq=1)
    train = CaptionDataset(tmp_path / "out", "train")
    objects = {entry["file"]: entry["objects"] for entry in train.entries}
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
    assert info["splits"] == {"train": 3, "val": 1}
    assert not (tmp_path / "out" / "test.json").exists()
    assert [entry["image_id"] for entry in train.entries] == [0, 1, 3]
    entry = train.entries[0]
    assert train.vocabulary.decode(entry["encoded"][0]) == ["two", "dogs", "ball", "0"]
    assert (entry["width"], entry["height"]) == (20, 10)
    assert entry["objects"] == []
    assert Path(info["images_root"]).is_absolute()


def test_captions_are_counted_then_filtered_then_five():
    captions = [["a b c d"], [" . "], ["e e e", "a", "!"], [f"x {k}" for k in range(7)]]
    entries = []
    for k, of_one in enumerate(captions):
        entries.append({"captions": of_one, "file": str(k), "objects": []})
    vocabulary, kept, summary = encode_captions({"train": entries}, 2, 3, seed=0)
    # "a" counts though its first caption is too long
    assert vocabulary.words[1:-3] == ["a", "e", "x"]
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
    assert few["captions"] == ["e e e", "a"]
    assert len(few["encoded"]) == 5
    assert few["encoded"][:2] == [[2, 2, 2], [1]]
    assert all(ids in few["encoded"][:2] for ids in few["encoded"])
    assert len(many["captions"]) == 7
    assert [ids[0] for ids in many["encoded"]] == [3] * 5


def lengths_of_five(seed):
    """The lengths of the captions that are chosen of twelve, of 1 to 12 words."""
    captions = [" ".join(["w"] * length) for length in range(1, 13)]
    entry = {"captions": captions, "file": "x", "objects": []}
    _, kept, _ = encode_captions({"train": [entry]}, 1, 30, seed)
    return [len(ids) for ids in kept["train"][0]["encoded"]]


def test_sampling_of_five_depends_on_the_seed_only():
    assert lengths_of_five(0) == lengths_of_five(0)
    assert lengths_of_five(0) != lengths_of_five(1)
    assert len(set(lengths_of_five(0))) == 5


def run_script(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "preparedataset.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def test_scenes_from_the_command_line(tmp_path):
    counts = ("--train", 12, "--val", 3, "--test", 3)
    rest = ("--image_size", 64, "--features", "scenes_vgg", "--min_word_freq", 1)
    result = run_script(*counts, *rest, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "data/scenes is ready: train 12, val 3, test 3 images" in result.stdout
    folder = tmp_path / "data" / "scenes"
    for split, count in (("train", 12), ("val", 3), ("test", 3)):
        assert len(CaptionDataset(folder, split, features="scenes_vgg")) == count


PARAMETERS = {"train": 2, "val": 1, "test": 1, "size": 64, "bias": 0.9, "test_bias": 0.5}


@pytest.fixture
def drawn(monkeypatch):
    """The parameters of all drawings; nothing is really drawn."""
    calls = []
    monkeypatch.setattr(scenes, "write_scenes", lambda root, **parameters: calls.append(parameters))
    return calls


def prepare_nothing(output, images_root):
    """What a prepared dataset of scenes has, without content."""
    info = {"name": "scenes", "images_root": str(images_root)}
    (output / "info.json").write_text(json.dumps(info))
    (output / "features-x.h5").touch()


def test_scenes_are_redrawn_for_other_parameters_only(tmp_path, drawn):
    draw_scenes(tmp_path, tmp_path, **PARAMETERS, seed=0)
    prepare_nothing(tmp_path, ".")
    draw_scenes(tmp_path, tmp_path, **PARAMETERS, seed=0)
    assert len(drawn) == 1
    assert (tmp_path / "features-x.h5").exists()
    with pytest.raises(UserError):
        draw_scenes(tmp_path, tmp_path, **{**PARAMETERS, "bias": 1.5}, seed=0)
    assert (tmp_path / "features-x.h5").exists()
    assert (tmp_path / "info.json").exists()
    draw_scenes(tmp_path, tmp_path, **PARAMETERS, seed=1)
    assert len(drawn) == 2
    assert not (tmp_path / "features-x.h5").exists()
    assert not (tmp_path / "info.json").exists()


def test_features_of_other_drawings_do_not_stay(tmp_path, drawn):
    """Two folders of scenes of the same names, prepared one after another into the same output."""
    output = tmp_path / "out"
    output.mkdir()
    first = tmp_path / "a"
    second = tmp_path / "b"
    draw_scenes(first, output, **PARAMETERS, seed=0)
    draw_scenes(second, output, **PARAMETERS, seed=1)
    prepare_nothing(output, first)
    draw_scenes(first, output, **PARAMETERS, seed=0)
    assert (output / "features-x.h5").exists()
    draw_scenes(second, output, **PARAMETERS, seed=1)
    assert not (output / "features-x.h5").exists()


def test_scenes_of_an_earlier_version_are_not_drawn_again(tmp_path, drawn):
    """Its record holds the hash of scenes.py as it was then."""
    record = {**PARAMETERS, "seed": 0, "scenes.py": scenes.OLD_SOURCE}
    (tmp_path / "drawn.json").write_text(json.dumps(record))
    prepare_nothing(tmp_path, ".")
    draw_scenes(tmp_path, tmp_path, **PARAMETERS, seed=0)
    assert not drawn
    assert (tmp_path / "features-x.h5").exists()
    assert read_json(tmp_path / "drawn.json") == record
    record["scenes.py"] = "of a version before"
    (tmp_path / "drawn.json").write_text(json.dumps(record))
    draw_scenes(tmp_path, tmp_path, **PARAMETERS, seed=0)
    assert len(drawn) == 1
    assert not (tmp_path / "features-x.h5").exists()


def test_scenes_are_redrawn_when_the_drawings_change(tmp_path, drawn, monkeypatch):
    draw_scenes(tmp_path, tmp_path, **PARAMETERS, seed=0)
    monkeypatch.setitem(scenes.RIGID, "ball", "ellipse a 0 0 100 90")
    draw_scenes(tmp_path, tmp_path, **PARAMETERS, seed=0)
    assert len(drawn) == 2


class TinyEncoder(nn.Module):
    """16 x 16 pixels -> 2 x 2 regions of 5 channels; counts the images it sees."""

    name = "tiny"
    image_size = 16
    grid = (2, 2)
    out_channels = 5

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Conv2d(3, 5, 8, stride=8)
        self.seed = seed
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return self.net(images).flatten(2).transpose(1, 2)

    def weights_hash(self):
        return f"weights{self.seed}"


def contents(path):
    """The bytes of all datasets of an HDF5 file, and its attributes."""
    with h5py.File(path) as file:
        datasets = {name: file[name][:].tobytes() for name in file}
        return datasets, {key: str(file.attrs[key]) for key in file.attrs}


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
        "preprocessing": captiondata.PREPROCESSING,
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
    encoder = TinyEncoder()
    images = CaptionDataset(tmp_path / "out", "train", image_transform(16, augment=True))
    cache_features(tmp_path / "out", encoder, augment=2, seed=5)
    assert encoder.seen == 4 + 3 + 3  # the val image is not augmented
    images.augmentation_seed = 5
    for version in (1, 2):
        images.epoch = version
        with h5py.File(features_path(tmp_path / "out", "tiny", version)) as file:
            assert "seed 5" in file.attrs["preprocessing"]
            assert "val" not in file
            rows = torch.from_numpy(file["train"][:]).float()
        for k in range(3):
            direct = encoder(images[k][0][None])[0]
            torch.testing.assert_close(rows[k], direct, rtol=1e-3, atol=1e-3)
    complaint = "augmented1.h5 was made with preprocessing .*seed 5, not .*seed 6; delete it"
    with pytest.raises(UserError, match=complaint):
        cache_features(tmp_path / "out", encoder, augment=1, seed=6)


def test_an_interrupted_cache_goes_on_to_the_same_content(flickr, tmp_path):
    prepare("flickr8k", flickr, tmp_path / "out")
    path = features_path(tmp_path / "out", "tiny")
    encoder = TinyEncoder()
    cache_features(tmp_path / "out", encoder, batch_size=1)
    whole = contents(path)
    with h5py.File(path, "r+") as file:
        for split, row in (("train", 0), ("train", 2), ("val", 0)):
            file[f"{split}_done"][row] = False
            file[split][row] = np.zeros((4, 5))
    encoder.seen = 0
    cache_features(tmp_path / "out", encoder, batch_size=1)
    assert encoder.seen == 3
    assert contents(path) == whole
    cache_features(tmp_path / "out", encoder)
    assert encoder.seen == 3


CACHING = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_preparedataset import TinyEncoder
from captiondata import cache_features
cache_features({folder!r}, TinyEncoder(), batch_size=4, workers=0)
"""


def kill_while_it_writes(script, path, moment):
    """Run a script, and kill it `moment` seconds after it has begun to write the file `path`."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", script], **quiet)
    while process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns > time.time_ns() - 50_000_000:
            break
        time.sleep(0.002)
    time.sleep(moment)
    process.kill()
    process.wait()


def test_caching_killed_at_any_moment_loses_at_most_a_batch(tmp_path):
    """SIGKILL six times at random moments of the writing: the file is whole, and every row that
    counts is right."""
    root = write_flickr(tmp_path / "flickr", splits=["train", "val"] * 150)
    path = features_path(tmp_path / "out", "tiny")
    prepare("flickr8k", root, tmp_path / "out")
    cache_features(tmp_path / "out", TinyEncoder(), batch_size=4, workers=0)
    whole = contents(path)
    expected = np.frombuffer(whole[0]["train"], np.float16).reshape(150, 4, 5)
    path.unlink()
    script = CACHING.format(
        root=str(REPOSITORY), tests=str(REPOSITORY / "tests"), folder=str(tmp_path / "out")
    )
    moments = random.Random(0)
    counts = [0]
    for _ in range(6):
        kill_while_it_writes(script, path, moments.uniform(0, 0.05))
        with h5py.File(path) as file:
            done = file["train_done"][:]
            rows = file["train"][:]
        assert np.array_equal(rows[done], expected[done])
        written = (rows != 0).any((1, 2))
        assert (written & ~done).sum() <= 4
        counts.append(done.sum())
    assert counts == sorted(counts)
    assert len(set(counts)) > 3
    cache_features(tmp_path / "out", TinyEncoder(), batch_size=4, workers=0)
    assert contents(path) == whole


def test_caches_of_other_weights_or_images_are_refused(flickr, tmp_path):
    prepare("flickr8k", flickr, tmp_path / "out")
    path = features_path(tmp_path / "out", "tiny")
    cache_features(tmp_path / "out", TinyEncoder())
    whole = contents(path)
    weights = encoder_path(tmp_path / "out", "tiny").read_bytes()
    complaint = "tiny.h5 was made with weights_hash weights0, not weights1; delete it"
    with pytest.raises(UserError, match=complaint):
        cache_features(tmp_path / "out", TinyEncoder(seed=1))
    edit(flickr / "dataset_flickr8k.json", lambda data: data["images"].pop(0))
    prepare("flickr8k", flickr, tmp_path / "out")
    with pytest.raises(UserError, match="made for other images of split 'train'; delete it"):
        cache_features(tmp_path / "out", TinyEncoder())
    assert contents(path) == whole
    assert encoder_path(tmp_path / "out", "tiny").read_bytes() == weights
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
    assert info["splits"] == {"train": 6000, "val": 1000}
    assert info["summary"]["train"]["captions_read"] == 30000
    dataset = CaptionDataset(tmp_path / "out", "val", image_transform(224))
    x, captions, index = dataset[random.Random(0).randrange(1000)]
    assert x.shape == (3, 224, 224)
    assert captions.shape == (5, info["max_length"] + 2)
    assert dataset.vocabulary.decode(captions[0])[0] in dataset.references()[index][0].lower()
    assert 3000 < len(dataset.vocabulary) < 4000


@pytest.mark.skipif(not (REAL / "coco2017").exists(), reason="the photographs of COCO are not here")
def test_real_coco2017(tmp_path):
    info = prepare("coco2017", REAL / "coco2017", tmp_path / "out")
    assert info["splits"] == {"train": 77, "val": 3, "test": 79}
    assert len(info["categories"]) == 80
    test = CaptionDataset(tmp_path / "out", "test", image_transform(224))
    ids = [entry["image_id"] for entry in test.entries]
    assert ids == sorted(ids)
    for k in (0, 40, 78):
        assert test.image(k).size == (test.entries[k]["width"], test.entries[k]["height"])
    boxes = 0
    for entry in test.entries:
        for thing in entry["objects"]:
            x1, y1, x2, y2 = thing["bbox"]
            assert 0 <= x1 < x2 <= entry["width"] + 1
            assert 0 <= y1 < y2 <= entry["height"] + 1
            boxes += 1
    instances = read_json(REAL / "coco2017/annotations/instances_val2017.json")
    assert boxes == len(instances["annotations"])
