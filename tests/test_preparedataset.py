"""preparedataset: the real file formats in, the prepared dataset out; every mistake one line and nothing written."""

import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import preparedataset
from captiondata import CaptionDataset, image_transform
from commandline import UserError, read_json, write_json
from featurecache import features_path
from preparedataset import cache_features, draw_scenes, encode_captions, prepare

REPOSITORY = Path(__file__).resolve().parent.parent
REAL = REPOSITORY.parent / "shared" / "data"
CATEGORIES = [{"id": 3, "name": "dog", "supercategory": "animal"}, {"id": 7, "name": "bus", "supercategory": "vehicle"}]


def draw(path, size=(20, 10), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)


def write_coco(root, name, ids, categories=CATEGORIES, info=None):
    """A split in COCO's layout; an image is 20 x 10 pixels with a dog in x 2..10, y 1..7, listed in reverse."""
    images = [{"id": i, "file_name": f"{i:012}.jpg", "width": 20, "height": 10} for i in reversed(ids)]
    for image in images:
        draw(root / name / image["file_name"], seed=image["id"])
    sentences = [{"id": 10 * i + k, "image_id": i, "caption": f"A dog, no. {k} \n"} for i in ids for k in range(5)]
    boxes = [{"id": i, "image_id": i, "category_id": 3, "bbox": [2, 1, 8, 6], "iscrowd": 0,
              "segmentation": [[2, 1, 10, 1, 10, 7]], "main": 1} for i in ids]
    common = {"info": info or {}, "images": images}
    contents = {"captions": {"annotations": sentences}, "instances": {"annotations": boxes, "categories": categories}}
    for kind, content in contents.items():
        write_json(root / "annotations" / f"{kind}_{name}.json", {**common, **content})
    return root


@pytest.fixture
def coco(tmp_path):
    write_coco(tmp_path / "coco", "train2017", [9, 4, 30, 2])
    return write_coco(tmp_path / "coco", "val2017", [5, 6])


@pytest.fixture
def flickr(tmp_path):
    root, splits = tmp_path / "flickr", ["train", "restval", "val", "train"]
    images = []
    for k, split in enumerate(splits):
        draw(root / "images" / f"{k}.jpg", seed=k)
        sentences = [{"tokens": ["ignored"], "raw": f"Two dogs' ball, {k}."} for _ in range(5)]
        images.append({"filename": f"{k}.jpg", "imgid": k, "split": split, "sentids": [], "sentences": sentences})
    write_json(root / "dataset_flickr8k.json", {"dataset": "flickr8k", "images": images})
    return root


def edit(path, change):
    data = read_json(path)
    change(data)
    write_json(path, data)


def assert_refused(message, name, root, output, **options):
    """`prepare` raises a one-line UserError that matches `message`, and `output` is not even begun."""
    with pytest.raises(UserError, match=message) as caught:
        prepare(name, root, output, **options)
    assert "\n" not in str(caught.value) and not output.exists()


def test_coco_is_split_by_id_and_keeps_objects(coco, tmp_path):
    info = prepare("coco2017", coco, tmp_path / "out", min_word_freq=1)
    assert info == read_json(tmp_path / "out" / "info.json") and info["splits"] == {"train": 3, "val": 1, "test": 2}
    assert [e["image_id"] for e in CaptionDataset(tmp_path / "out", "train").entries] == [2, 4, 9]
    val = CaptionDataset(tmp_path / "out", "val", image_transform(8))
    assert val.entries[0]["image_id"] == 30 and val[0][0].shape == (3, 8, 8)
    assert val.entries[0]["file"] == "train2017/000000000030.jpg" and val.entries[0]["captions"][1] == "A dog, no. 1"
    assert val.entries[0]["objects"] == [{"category": "dog", "bbox": [2, 1, 10, 7], "iscrowd": 0, "main": True,
                                          "segmentation": [[2, 1, 10, 1, 10, 7]]}]
    assert info["categories"].keys() == {"dog", "bus"} and {"dog", "dogs", "puppies"} <= set(info["categories"]["dog"])
    assert val.vocabulary.words[1:7] == ["a", "dog", "no", "0", "1", "2"] and info["max_length"] == 4


def test_coco_large_split_leaves_the_rest_unused(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(preparedataset, "COCO_TRAIN", 2)
    monkeypatch.setattr(preparedataset, "COCO_VAL", 1)
    info = prepare("coco2017", coco, tmp_path / "out")
    assert info["splits"] == {"train": 2, "val": 1, "test": 2} and info["summary"]["images_unused"] == 1


def test_scenes_carry_synonyms_pairs_and_a_relative_images_root(tmp_path):
    synonyms = [{"id": 3, "name": "dog", "synonyms": ["dog", "puppy"]}]
    for name, ids in (("train", [1, 2]), ("val", [3]), ("test", [4])):
        write_coco(tmp_path / "s", name, ids, categories=synonyms, info={"planted_pairs": [["dog", "ball"]]})
    info = prepare("scenes", tmp_path / "s", tmp_path / "s", min_word_freq=1)
    assert info["images_root"] == "." and info["planted_pairs"] == [["dog", "ball"]]
    assert info["categories"] == {"dog": ["dog", "puppy"]}
    assert CaptionDataset(tmp_path / "s", "test").image(0).size == (20, 10)


ENTITY = """<annotation><filename>7.jpg</filename><size><width>500</width><height>400</height><depth>3</depth></size>
<object><name>11</name><bndbox><xmin>100</xmin><ymin>40</ymin><xmax>250</xmax><ymax>400</ymax></bndbox></object>
<object><name>12</name><name>13</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>500</xmax><ymax>200</ymax></bndbox></object>
<object><name>14</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>"""
SENTENCES = """[/EN#11/people A young man] throws [/EN#12/other a frisbee] .
[/EN#11/people A guy] with [/EN#13/other a gadget] on [/EN#14/scene the street]"""


def test_entities_become_boxes_of_the_images_own_size(flickr, tmp_path):
    for folder, name, text in (("Annotations", "1.xml", ENTITY), ("Sentences", "1.txt", SENTENCES)):
        (flickr / "Flickr30kEntities" / folder).mkdir(parents=True)
        (flickr / "Flickr30kEntities" / folder / name).write_text(text)
    prepare("flickr8k", flickr, tmp_path / "out", min_word_freq=1)
    objects = {entry["file"]: entry["objects"] for entry in CaptionDataset(tmp_path / "out", "train").entries}
    assert objects["0.jpg"] == objects["3.jpg"] == []
    assert objects["1.jpg"] == [  # 20 x 10 pixels
        {"category": "person", "bbox": [4, 1, 10, 10], "words": ["man", "guy"]},
        {"category": "frisbee", "bbox": [0, 0, 20, 5], "words": ["frisbee"]},
        {"category": "gadget", "bbox": [0, 0, 20, 5], "words": ["gadget"]},
    ]
    (flickr / "Flickr30kEntities/Annotations/1.xml").write_text("<annotation>")
    assert_refused("Flickr30k Entities", "flickr8k", flickr, tmp_path / "other", min_word_freq=1)


def test_flickr_uses_raw_sentences_and_has_no_test_split(flickr, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "test.json").write_text("[]")  # of an earlier preparation
    info = prepare("flickr8k", flickr, tmp_path / "out")
    train = CaptionDataset(tmp_path / "out", "train")
    assert info["splits"] == {"train": 3, "val": 1} and not (tmp_path / "out" / "test.json").exists()
    assert [entry["image_id"] for entry in train.entries] == [0, 1, 3]
    assert train.vocabulary.decode(train.entries[0]["encoded"][0]) == ["two", "dogs", "ball", "0"]
    assert (train.entries[0]["width"], train.entries[0]["height"]) == (20, 10) and train.entries[0]["objects"] == []
    assert Path(info["images_root"]).is_absolute()


def test_size_is_that_of_the_upright_image(flickr, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(flickr / "images" / "0.jpg", exif=exif)
    prepare("flickr8k", flickr, tmp_path / "out")
    train = CaptionDataset(tmp_path / "out", "train")
    assert (train.entries[0]["width"], train.entries[0]["height"]) == (10, 20) == train.image(0).size


def test_captions_are_counted_then_filtered_then_five():
    words = [["a b c d"], [" . "], ["e e e"], [f"x {k}" for k in range(7)]]
    entries = [{"captions": captions, "file": str(k)} for k, captions in enumerate(words)]
    entries[2]["captions"] = ["e e e", "a", "!"]
    vocabulary, kept, summary = encode_captions({"train": entries}, 2, 3, seed=0)
    assert vocabulary.words[1:-3] == ["a", "e", "x"]  # "a" counts though its first caption is too long
    assert [entry["file"] for entry in kept["train"]] == ["2", "3"]
    assert summary["train"] == {"images_read": 4, "captions_read": 12, "captions_dropped_empty": 2,
                                "captions_dropped_too_long": 1, "images_dropped_without_caption": 2}
    few, many = kept["train"]
    assert few["captions"] == ["e e e", "a"] and len(few["encoded"]) == 5
    assert few["encoded"][:2] == [[2, 2, 2], [1]] and all(ids in few["encoded"][:2] for ids in few["encoded"])
    assert len(many["captions"]) == 7 and [ids[0] for ids in many["encoded"]] == [3] * 5


def test_sampling_of_five_depends_on_the_seed_only():
    entry = {"captions": [" ".join(["w"] * k) for k in range(1, 13)], "file": "x"}
    lengths = [[len(ids) for ids in encode_captions({"train": [entry]}, 1, 30, seed)[1]["train"][0]["encoded"]]
               for seed in (0, 0, 1)]
    assert lengths[0] == lengths[1] != lengths[2] and len(set(lengths[0])) == 5


def test_missing_or_zipped_root(tmp_path):
    assert_refused("there is no folder .*nowhere.*annotations/", "coco2017", tmp_path / "nowhere", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "coco.zip", "w") as file:
        file.writestr("a", "b")
    assert_refused("coco.zip .* is a zip file; unpack it", "coco2017", tmp_path / "coco.zip", tmp_path / "out")
    (tmp_path / "file").write_text("")
    assert_refused("is a file, not a folder", "flickr8k", tmp_path / "file", tmp_path / "out")


def test_instances_given_where_captions_are_expected(coco, tmp_path):
    annotations = coco / "annotations"
    (annotations / "captions_train2017.json").write_bytes((annotations / "instances_train2017.json").read_bytes())
    assert_refused("captions_train2017.json is not a COCO captions file", "coco2017", coco, tmp_path / "out")


@pytest.mark.parametrize("content", ["[]", "{}", '{"images": [{"id": 1}], "annotations": []}',
                                     '{"images": [1], "annotations": []}'])
def test_other_json_given_for_coco(coco, tmp_path, content):
    (coco / "annotations" / "instances_val2017.json").write_text(content)
    assert_refused("instances_val2017.json is not a COCO instances file", "coco2017", coco, tmp_path / "out")


def test_json_that_is_missing_or_cut_off(coco, tmp_path):
    path = coco / "annotations" / "captions_val2017.json"
    path.write_text(path.read_text()[:100])
    assert_refused("captions_val2017.json is not a JSON file", "coco2017", coco, tmp_path / "out")
    path.unlink()
    assert_refused("there is no file .*captions_val2017.json", "coco2017", coco, tmp_path / "out")


@pytest.mark.parametrize("content", ["[]", '{"images": [{"id": 1, "file_name": "x"}], "annotations": []}',
                                     '{"images": [{"imgid": 1, "filename": "x", "split": "val", "sentences": [1]}]}'])
def test_other_json_given_for_flickr(flickr, tmp_path, content):
    (flickr / "dataset_flickr8k.json").write_text(content)
    assert_refused("dataset_flickr8k.json is not in Karpathy's format", "flickr8k", flickr, tmp_path / "out")


def test_unknown_split(flickr, tmp_path):
    edit(flickr / "dataset_flickr8k.json", lambda data: data["images"][0].update(split="dev"))
    assert_refused("has a split 'dev'; known are train", "flickr8k", flickr, tmp_path / "out")


def test_missing_images_folder(coco, flickr, tmp_path):
    (coco / "val2017").rename(coco / "other")
    assert_refused("there is no folder .*val2017 .the images folder", "coco2017", coco, tmp_path / "out")
    (flickr / "images").rename(flickr / "pictures")
    assert_refused("no images folder in .*flickr; it may be called images", "flickr8k", flickr, tmp_path / "out")


def test_missing_images_are_counted_and_the_first_is_named(coco, tmp_path):
    for i in (4, 5):
        next(coco.glob(f"*/{i:012}.jpg")).unlink()
    assert_refused("2 of 6 images are missing, the first is .*000000000004.jpg", "coco2017", coco, tmp_path / "out")


def test_unreadable_image(flickr, tmp_path):
    (flickr / "images" / "2.jpg").write_text("hello")
    assert_refused("2.jpg cannot be read as an image", "flickr8k", flickr, tmp_path / "out")


def test_duplicate_ids(coco, flickr, tmp_path):
    edit(coco / "annotations" / "captions_train2017.json", lambda data: data["images"].append(data["images"][0]))
    assert_refused("captions_train2017.json lists the image id 2 more than once", "coco2017", coco, tmp_path / "out")
    edit(flickr / "dataset_flickr8k.json", lambda data: data["images"][1].update(imgid=0))
    assert_refused("lists the image id 0 more than once", "flickr8k", flickr, tmp_path / "out")


def test_annotations_of_unknown_images_and_categories(coco, tmp_path):
    edit(coco / "annotations" / "captions_train2017.json", lambda data: data["annotations"][0].update(image_id=77))
    assert_refused("caption of the image 77, which it does not list", "coco2017", coco, tmp_path / "out")
    edit(coco / "annotations" / "instances_train2017.json", lambda data: data["annotations"][0].update(category_id=99))
    assert_refused("category 99, which it does not list", "coco2017", coco, tmp_path / "out")


def test_empty_splits(flickr, tmp_path):
    assert_refused("split 'train' is empty", "flickr8k", flickr, tmp_path / "out", max_length=1)
    edit(flickr / "dataset_flickr8k.json", lambda data: data["images"].pop(2))
    assert_refused("split 'val' is empty", "flickr8k", flickr, tmp_path / "out")


def test_a_failed_preparation_leaves_the_old_one_whole(flickr, tmp_path):
    prepare("flickr8k", flickr, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError):
        prepare("flickr8k", flickr, tmp_path / "out", max_length=1)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_info_is_written_last(flickr, tmp_path, monkeypatch):
    prepare("flickr8k", flickr, tmp_path / "out")
    monkeypatch.setattr(preparedataset, "write_json", lambda *_, **__: 1 / 0)  # the disk is full
    with pytest.raises(ZeroDivisionError):
        prepare("flickr8k", flickr, tmp_path / "out")
    with pytest.raises(UserError, match="not a prepared dataset"):
        CaptionDataset(tmp_path / "out", "train")


def run_script(*arguments, cwd):
    return subprocess.run([sys.executable, str(REPOSITORY / "preparedataset.py"), *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True)


def test_mistakes_exit_with_2_and_one_line(tmp_path):
    for arguments in (["--dataset", "coco2017"], ["--dataset", "flickr30k", "--root", tmp_path / "none"]):
        result = run_script(*arguments, cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.startswith("preparedataset.py: error: ")
        assert result.stderr.count("\n") == 1 and not result.stdout and not any(tmp_path.iterdir())


def test_scenes_from_the_command_line(tmp_path):
    result = run_script("--train", 12, "--val", 3, "--test", 3, "--image_size", 64, "--features", "scenes_vgg",
                        "--min_word_freq", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "data" / "scenes"
    assert "data/scenes is ready: train 12, val 3, test 3 images" in result.stdout
    assert [len(CaptionDataset(folder, s, features="scenes_vgg")) for s in ("train", "val", "test")] == [12, 3, 3]


def test_scenes_are_redrawn_for_other_parameters_only(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(preparedataset.scenes, "write_scenes", lambda root, **parameters: drawn.append(parameters))
    parameters = {"train": 2, "val": 1, "test": 1, "size": 64, "bias": 0.9, "test_bias": 0.5, "seed": 0}
    draw_scenes(tmp_path, tmp_path, **parameters)
    (tmp_path / "features-x.h5").touch()
    (tmp_path / "info.json").touch()
    draw_scenes(tmp_path, tmp_path, **parameters)
    assert len(drawn) == 1 and (tmp_path / "features-x.h5").exists()
    with pytest.raises(UserError):
        draw_scenes(tmp_path, tmp_path, **{**parameters, "bias": 1.5})
    assert (tmp_path / "features-x.h5").exists() and (tmp_path / "info.json").exists()
    draw_scenes(tmp_path, tmp_path, **{**parameters, "seed": 1})
    assert len(drawn) == 2 and not (tmp_path / "features-x.h5").exists() and not (tmp_path / "info.json").exists()


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
        return {name: file[name][:].tobytes() for name in file}, {key: str(file.attrs[key]) for key in file.attrs}


def test_cached_features_are_the_encoders_own(flickr, tmp_path):
    prepare("flickr8k", flickr, tmp_path / "out")
    encoder = TinyEncoder()
    cache_features(tmp_path / "out", encoder, batch_size=2)
    images = CaptionDataset(tmp_path / "out", "train", image_transform(16))
    features = CaptionDataset(tmp_path / "out", "train", features="tiny")
    stamp = {"encoder": "tiny", "weights_hash": "weights0", "image_size": 16, "grid": [2, 2], "preprocessing": preparedataset.PREPROCESSING}
    assert features.features_attributes == stamp
    for k in range(3):
        direct = encoder(images[k][0][None])[0]
        assert features[k][0].shape == (4, 5)
        torch.testing.assert_close(features[k][0].float(), direct, rtol=1e-3, atol=1e-3)
    with h5py.File(features_path(tmp_path / "out", "tiny")) as file:
        assert file["train"].dtype == np.float16 and "test" not in file


def test_augmented_features_are_of_augmented_images(flickr, tmp_path):
    prepare("flickr8k", flickr, tmp_path / "out")
    encoder, images = TinyEncoder(), CaptionDataset(tmp_path / "out", "train", image_transform(16, augment=True))
    cache_features(tmp_path / "out", encoder, augment=2, seed=5)
    assert encoder.seen == 4 + 3 + 3  # the val image is not augmented
    images.augmentation_seed = 5
    for version in (1, 2):
        with h5py.File(features_path(tmp_path / "out", "tiny", version)) as file:
            assert "seed 5" in file.attrs["preprocessing"] and "val" not in file
            images.epoch = version
            for k in range(3):
                torch.testing.assert_close(torch.from_numpy(file["train"][k]).float(), encoder(images[k][0][None])[0], rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="augmented1.h5 was made with preprocessing .*seed 5, not .*seed 6; delete it"):
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
    root = tmp_path / "flickr"
    images = [{"filename": f"{k}.jpg", "imgid": k, "split": "val" if k % 100 == 0 else "train", "sentences": [{"raw": "a dog"}] * 5} for k in range(400)]
    for image in images:
        draw(root / "images" / image["filename"], seed=image["imgid"])
    write_json(root / "dataset_flickr8k.json", {"images": images})
    path, moments = features_path(tmp_path / "out", "tiny"), random.Random(0)
    prepare("flickr8k", root, tmp_path / "out")
    cache_features(tmp_path / "out", TinyEncoder(), batch_size=4, workers=0)
    whole = contents(path)
    path.unlink()
    script = CACHING.format(root=str(REPOSITORY), tests=str(REPOSITORY / "tests"), folder=str(tmp_path / "out"))
    counts = [0]
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > time.time_ns() - 50_000_000):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.wait()
        with h5py.File(path) as file:
            done = np.flatnonzero(file["train_done"][:])
            rows, expected = file["train"][:], np.frombuffer(whole[0]["train"], np.float16).reshape(396, 4, 5)
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
    whole = contents(path)
    with pytest.raises(UserError, match="tiny.h5 was made with weights_hash weights0, not weights1; delete it"):
        cache_features(tmp_path / "out", TinyEncoder(seed=1))
    edit(flickr / "dataset_flickr8k.json", lambda data: data["images"].pop(0))
    prepare("flickr8k", flickr, tmp_path / "out")
    with pytest.raises(UserError, match="made for other images of split 'train'; delete it"):
        cache_features(tmp_path / "out", TinyEncoder())
    assert contents(path) == whole
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be opened"):
        cache_features(tmp_path / "out", TinyEncoder())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line_and_can_be_mended(flickr, tmp_path, workers):
    prepare("flickr8k", flickr, tmp_path / "out")
    path = flickr / "images" / "3.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="^[^\n]*3.jpg cannot be read as an image[^\n]*$"):
        cache_features(tmp_path / "out", TinyEncoder(), batch_size=1, workers=workers)
    path.write_bytes(whole)
    encoder = TinyEncoder()
    cache_features(tmp_path / "out", encoder)
    assert encoder.seen == 2  # 3.jpg and the val image: the two before it were kept


@pytest.mark.skipif(not (REAL / "flickr8k").exists(), reason="the photographs of Flickr8k are not here")
def test_real_flickr8k(tmp_path):
    info = prepare("flickr8k", REAL / "flickr8k", tmp_path / "out")
    assert info["splits"] == {"train": 6000, "val": 1000} and info["summary"]["train"]["captions_read"] == 30000
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
    assert [entry["image_id"] for entry in test.entries] == sorted(entry["image_id"] for entry in test.entries)
    for k in (0, 40, 78):
        assert test.image(k).size == (test.entries[k]["width"], test.entries[k]["height"])
    boxes = [(entry, thing["bbox"]) for entry in test.entries for thing in entry["objects"]]
    assert len(boxes) == len(read_json(REAL / "coco2017/annotations/instances_val2017.json")["annotations"])
    assert all(0 <= x1 < x2 <= e["width"] + 1 and 0 <= y1 < y2 <= e["height"] + 1 for e, (x1, y1, x2, y2) in boxes)
