"""Everything that can be wrong with the files and flags a user gives: one line that says so, exit
code 2, and nothing written."""

import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from fixtures import (
    REPOSITORY,
    WRITERS,
    command,
    edit,
    flickr_file,
    refused,
    write_coco2017,
    write_flickr,
)
from PIL import Image

import preparedataset
import train
from captiondata import CaptionDataset, features_path
from commandline import UserError, run
from encoder import build_encoder

CAPTIONS = "annotations/captions_train2017.json"
INSTANCES = "annotations/instances_train2017.json"
PHOTO = "images/1001_ab1.jpg"
ANNOTATION = "Flickr30kEntities/Annotations/1001.xml"
SENTENCES = "Flickr30kEntities/Sentences/1001.txt"
KARPATHY = "dataset_flickr8k.json"
SMALL = (
    *("--encoder", "scenes_vgg", "--embed_dim", 8, "--hidden_dim", 8),
    *("--epochs", 1, "--pretrain_epochs", 0, "--workers", 0),
)


# What can happen to a file or folder: functions that return a function of the dataset's root.


def removed(name):
    def damage(root):
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return damage


def renamed(name, other):
    return lambda root: (root / name).rename(root / other)


def copied(name, over):
    return lambda root: shutil.copy(root / name, root / over)


def written(name, content):
    if isinstance(content, str):
        content = content.encode()
    return lambda root: (root / name).write_bytes(content)


def cut(name, end=300):
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:end])


def replaced(name, old, new):
    """What stands once in a text file is another."""
    return lambda root: (root / name).write_text((root / name).read_text().replace(old, new, 1))


def changed(name, part, number=0, **values):
    """Fields of one record in a JSON file are others."""
    return lambda root: edit(root / name, lambda data: data[part][number].update(values))


def doubled(name):
    return lambda root: edit(root / name, lambda data: data["images"].append(data["images"][0]))


def packed(kind, *folders):
    """Folders that are still in an archive beside their place; without any, the root itself."""

    def damage(root):
        for folder in [root / name for name in folders] or [root]:
            shutil.make_archive(folder, kind, folder)
            shutil.rmtree(folder)

    return damage


def archived_root(root):
    packed("zip")(root)


def whole(root):
    pass


def replaced_by_folder(name):
    def damage(root):
        removed(name)(root)
        (root / name).mkdir()

    return damage


in_place_of_image = replaced_by_folder(PHOTO)
in_place_of_json = replaced_by_folder(KARPATHY)


def in_place_of_annotations(root):
    removed("annotations")(root)
    written("annotations", "")(root)


def coco_for_karpathy(root):
    written(KARPATHY, (write_coco2017(root) / CAPTIONS).read_bytes())(root)


def karpathy_for_coco(root):
    written(CAPTIONS, (write_flickr(root) / KARPATHY).read_bytes())(root)


def without_categories(root):
    edit(root / INSTANCES, lambda data: data.pop("categories"))


def of_coco(root):
    replaced(KARPATHY, '"dataset": "flickr8k"', '"dataset": "coco"')(root)


def half_a_letter(root):
    changed(KARPATHY, "images", sentences=[{"raw": "\ud83d"}])(root)


def outside_of_the_folder(root):
    changed(CAPTIONS, "images", file_name="../../etc/passwd")(root)


def without_val(root):
    edit(root / KARPATHY, lambda data: data["images"].pop(2))


def without_train(root):
    def change(data):
        for image in data["images"]:
            image["split"] = "val"

    edit(root / KARPATHY, change)


def without_words(root):
    def change(data):
        for image in data["images"]:
            for sentence in image["sentences"]:
                sentence["raw"] = " . "

    edit(root / KARPATHY, change)


def without_an_image(root):
    for path in root.glob("*/*4.jpg"):
        path.unlink()


def huge_image(root):
    Image.new("1", (20000, 20000)).save(root / PHOTO, "PNG")


def regions(root, features=(4, 2048), value=1.0, boxes=(4, 4)):
    """Region features of all images of `write_flickr`, all alike."""
    for k, split in enumerate(("train", "train", "val", "train")):
        path = root.parent / "regions" / split / f"{flickr_file('flickr8k', k)}.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["image_features"] = np.full(features, value, np.float32)
            file["image_boxes"] = np.zeros(boxes, np.float32)


def regions_of_another_network(root):
    regions(root, features=(4, 7))


def regions_a_number(root):
    regions(root, features=())


def regions_without_a_box(root):
    regions(root, boxes=(3, 4))


def regions_not_finite(root):
    regions(root, value=np.nan)


def missing_regions(root):
    regions(root)
    removed("regions/val")(root.parent)


def other_weights(root):
    torch.save({"0.weight": torch.zeros(3)}, root.parent / "weights.pt")


COCO = "coco2017"
FLICKR = "flickr8k"
FLICKR30K = "flickr30k"
BOTTOM_UP = ["--features", "bottom_up", "--regions", "regions"]

# what is wrong: (the dataset, what damages its folder, flags, the line)
RAW = {
    "root missing": (COCO, whole, ["--root", "nowhere"],
        "there is no folder nowhere .*which holds annotations/, train2017/"),
    "root not given": (COCO, whole, None, "coco2017 needs --root, the folder with annotations/"),
    "root a zip": (COCO, archived_root, ["--root", "raw.zip"],
        r"raw.zip .* is an archive; unpack it and give the folder"),
    "root a tar": (COCO, packed("gztar"), ["--root", "raw.tar.gz"],
        "raw.tar.gz .* is an archive; unpack it"),
    "root a file": (FLICKR, whole, ["--root", f"raw/{KARPATHY}"],
        f"{KARPATHY} .* is a file, not a folder"),
    "root zipped beside": (COCO, archived_root, [],
        "there is no folder raw .*; unpack raw.zip in ."),
    "annotations missing": (COCO, removed("annotations"), [],
        "there is no folder raw/annotations .the COCO annotations"),
    "annotations zipped": (COCO, packed("zip", "annotations"), [], "unpack annotations.zip in raw"),
    "annotations a file": (COCO, in_place_of_annotations, [], "raw/annotations .* is a file"),
    "images zipped": (COCO, packed("zip", "train2017", "val2017"), [],
        "there is no folder raw/train2017 .*; unpack train2017.zip in raw"),
    "images tarred": (FLICKR, packed("gztar", "images"), [],
        "no images folder in raw; it may be called images.*; unpack images.tar.gz in raw"),
    "images folder missing": (COCO, renamed("val2017", "other"), [],
        "there is no folder raw/val2017 .the images folder.$"),
    "images folder missing, Flickr": (FLICKR, renamed("images", "pictures"), [],
        "no images folder in raw; it may be called images"),
    "a JSON missing": (COCO, removed(CAPTIONS), [], f"there is no file raw/{CAPTIONS}"),
    "the JSON missing, Flickr": (FLICKR30K, removed("dataset_flickr30k.json"), [],
        "there is no file raw/dataset_flickr30k.json"),
    "captions in place of instances": (COCO, copied(CAPTIONS, INSTANCES), [],
        r"instances_train2017.json is not a COCO instances file: annotations\[0\] has no 'bbox'"),
    "instances in place of captions": (COCO, copied(INSTANCES, CAPTIONS), [],
        r"captions_train2017.json is not a COCO captions file: annotations\[0\] has no 'caption'"),
    "captions of another split": (COCO, copied("annotations/captions_val2017.json", CAPTIONS), [],
        "captions_train2017.json and .*instances_train2017.json have no image in common"),
    "COCO's JSON for Flickr's": (FLICKR, coco_for_karpathy, [],
        r"is not in Karpathy's format: images\[0\] has no 'filename'"),
    "Karpathy's JSON for COCO's": (COCO, karpathy_for_coco, [],
        r"is not a COCO captions file: images\[0\] has no 'file_name'"),
    "JSON of another of Karpathy's": (FLICKR, of_coco, [],
        "is of the dataset 'coco', not flickr8k"),
    "JSON truncated": (COCO, cut(CAPTIONS), [],
        "captions_train2017.json is not a JSON file, or is cut off"),
    "JSON truncated, Flickr": (FLICKR, cut(KARPATHY), [],
        "dataset_flickr8k.json is not a JSON file, or is cut off"),
    "JSON empty": (COCO, written(INSTANCES, ""), [], "instances_train2017.json is not a JSON file"),
    "JSON binary": (FLICKR, written(KARPATHY, b"\x1f\x8b\x08\xff\xfe\x00"), [],
        "dataset_flickr8k.json is not a JSON file"),
    "JSON of endless depth": (FLICKR, written(KARPATHY, "[" * 100_000), [],
        "dataset_flickr8k.json is not a JSON file"),
    "JSON a folder": (FLICKR, in_place_of_json, [], "dataset_flickr8k.json is not a JSON file"),
    "JSON a list": (COCO, written(CAPTIONS, "[]"), [],
        "is not a COCO captions file: it has no list 'images'"),
    "JSON without a list": (FLICKR, written(KARPATHY, '{"images": {}}'), [],
        "is not in Karpathy's format: it has no list 'images'"),
    "records that are no objects": (FLICKR, written(KARPATHY, '{"images": [1]}'), [],
        r"is not in Karpathy's format: images\[0\] has no"),
    "sentences without text": (FLICKR, changed(KARPATHY, "images", 2, sentences=[{}]), [],
        r"images\[2\].sentences\[0\] has no 'raw'"),
    "categories missing": (COCO, without_categories, [],
        "instances_train2017.json .* it has no list 'categories'"),
    "caption null": (COCO, changed(CAPTIONS, "annotations", 3, caption=None), [],
        r"'caption' of annotations\[3\] is None, not a text"),
    "caption a list": (FLICKR, changed(KARPATHY, "images", sentences=[{"raw": ["a"]}]), [],
        r"'raw' of images\[0\].sentences\[0\] is \['a'\], not a text"),
    "caption of half a letter": (FLICKR, half_a_letter, [], r"is '\\ud83d', not a text"),
    "id not a number": (COCO, changed(CAPTIONS, "images", id=[1]), [],
        r"'id' of images\[0\] is \[1\], not a whole number"),
    "image ids doubled": (COCO, doubled(CAPTIONS), [],
        "captions_train2017.json lists the image id 2 more than once"),
    "image ids doubled, Flickr": (FLICKR, changed(KARPATHY, "images", 1, imgid=0), [],
        "lists the image id 0 more than once"),
    "caption of no image": (COCO, changed(CAPTIONS, "annotations", image_id=77), [],
        "captions_train2017.json has an annotation of the image 77, which it does not list"),
    "box of no image": (COCO, changed(INSTANCES, "annotations", image_id=77), [],
        "instances_train2017.json has an annotation of the image 77"),
    "category not listed": (COCO, changed(INSTANCES, "annotations", category_id=99), [],
        "instances_train2017.json has an annotation of the category 99, which it does not list"),
    "box of three numbers": (COCO, changed(INSTANCES, "annotations", bbox=[1, 2, 3]), [],
        r"'bbox' of annotations\[0\] is \[1, 2, 3\], not four numbers"),
    "box of texts": (COCO, changed(INSTANCES, "annotations", bbox=["1", "2", "3", "4"]), [],
        "not four numbers"),
    "box null": (COCO, changed(INSTANCES, "annotations", bbox=None), [],
        "is None, not four numbers"),
    "box infinite": (COCO, changed(INSTANCES, "annotations", bbox=[0, 0, 1, float("inf")]), [],
        r"is \[0, 0, 1, inf\], not four numbers"),
    "file outside of the folder": (COCO, outside_of_the_folder, [],
        "is '../../etc/passwd', not a file name inside the images folder"),
    "file by its absolute path": (FLICKR, changed(KARPATHY, "images", filename="/etc/passwd"), [],
        "is '/etc/passwd', not a file name inside the images folder"),
    "file without a name": (FLICKR, changed(KARPATHY, "images", filename=""), [],
        "is '', not a file name"),
    "split unknown": (FLICKR, changed(KARPATHY, "images", split="dev"), [],
        "has a split 'dev'; known are train"),
    "no image for val": (FLICKR, without_val, [],
        "split 'val' is empty: raw lists no images for it"),
    "no image for train": (FLICKR, without_train, [], "split 'train' is empty"),
    "captions without words": (FLICKR, without_words, [],
        r"split 'train' is empty: 3 images, no caption of 1 to 50 words"),
    "images missing": (COCO, without_an_image, [],
        "1 of 6 images are missing, the first is raw/train2017/000000000004.jpg"),
    "image a folder": (FLICKR, in_place_of_image, [],
        "1 of 4 images are missing, the first is raw/images/1001_ab1.jpg"),
    "image empty": (COCO, written("val2017/000000000006.jpg", ""), [],
        "000000000006.jpg cannot be read as an image, it may be damaged"),
    "image an error page": (FLICKR, written(PHOTO, "<html>404</html>"), [],
        "1001_ab1.jpg cannot be read as an image"),
    "image cut in its header": (FLICKR, cut(PHOTO, 30), [],
        "1001_ab1.jpg cannot be read as an image"),
    "image truncated": (FLICKR, cut(PHOTO, -100), [],
        "1001_ab1.jpg cannot be read as an image, it may be damaged"),
    "image of too many pixels": (FLICKR, huge_image, [], "1001_ab1.jpg cannot be read as an image"),
    "Entities cut off": (FLICKR, cut(ANNOTATION), [],
        "1001.xml or .*1001.txt is missing, damaged or not of Flickr30k Entities"),
    "Entities' size no number": (FLICKR, replaced(ANNOTATION, "500</width>", "wide</width>"), [],
        "1001.xml or .*invalid literal for int.*wide"),
    "Entities' size 0": (FLICKR, replaced(ANNOTATION, "500</width>", "0</width>"), [],
        "1001.xml .*division by zero"),
    "Entities' box incomplete": (FLICKR, replaced(ANNOTATION, "<xmin>100</xmin>", ""), [],
        "1001.xml .* not of Flickr30k Entities"),
    "Entities' sentences missing": (FLICKR, removed(SENTENCES), [], "1001.txt is missing"),
    "Entities' sentences binary": (FLICKR, written(SENTENCES, b"\xff\xfe\xfa"), [],
        "1001.txt is missing, damaged"),
    "Entities zipped": (FLICKR30K, packed("zip", "Flickr30kEntities/Annotations"), [],
        "there is no folder .*Annotations .*; unpack Annotations.zip in raw/Flickr30kEntities"),
    "max_length too small": (FLICKR, whole, ["--max_length", 1],
        r"split 'train' is empty: 3 images, no caption of 1 to 1 words .max_length"),
    "vocabulary empty": (FLICKR, whole, ["--min_word_freq", 1000],
        "no word occurs 1000 times in the captions of train; give a lower min_word_freq"),
    "a negative number": (FLICKR, whole, ["--min_word_freq", -1],
        "--min_word_freq must be at least 1, not -1"),
    "a word for a number": (FLICKR, whole, ["--batch_size", "many"],
        "argument --batch_size: invalid int value: 'many'"),
    "a negative seed": (FLICKR, whole, ["--seed", -1], "argument --seed: -1 is not between 0 and"),
    "a flag of the scenes": (FLICKR, whole, ["--bias", 0.5],
        "--bias goes with --dataset scenes only"),
    "a flag of one's own images": (FLICKR, whole, ["--captions", "raw/my.csv"],
        "--captions goes with --dataset karpathy or --dataset csv only"),
    "captions not given": (FLICKR, whole, ["--dataset", "csv"],
        "--dataset csv needs --captions, the file with the columns image, caption"),
    "a flag that is none": (FLICKR, whole, ["--ruut", "raw"], "unrecognized arguments: --ruut raw"),
    "dataset unknown": (FLICKR, whole, ["--dataset", "imagenet"],
        "argument --dataset: invalid choice: 'imagenet'"),
    "another dataset taken for scenes": (COCO, whole, ["--dataset", "scenes"],
        "raw holds another dataset; prepare it by its own name"),
    "scenes too small": (COCO, whole, ["--dataset", "scenes", "--root", "new", "--image_size", 8],
        "size must be a whole number of pixels, 64 or more, not 8"),
    "encoder unknown": (FLICKR, whole, ["--features", "vgg1000"],
        "there is no encoder 'vgg1000'; choose from"),
    "device unknown": (FLICKR, whole, ["--device", "abacus"], "device 'abacus' cannot be used"),
    "weights of another network": (FLICKR, other_weights,
        ["--features", "squeezenet1_1", "--encoder_weights", "weights.pt"],
        "weights.pt does not hold the weights of this encoder"),
    "weights that are none": (FLICKR, whole,
        ["--features", "squeezenet1_1", "--encoder_weights", f"raw/{KARPATHY}"],
        "is not a PyTorch state dict"),
    "weights without an encoder": (FLICKR, whole, ["--encoder_weights", "random"],
        "--encoder_weights goes with --features"),
    "bottom-up without regions": (FLICKR, whole, ["--features", "bottom_up"],
        "--features bottom_up and --regions FOLDER belong together"),
    "regions without bottom-up": (FLICKR, regions,
        ["--regions", "regions", "--features", "scenes_vgg"],
        "belong together"),
    "regions missing": (FLICKR, missing_regions, BOTTOM_UP,
        "1 of 4 files of regions are missing, the first is regions/val/1002_ab2.jpg.hdf5"),
    "output a file": (FLICKR, whole, ["--output", f"raw/{KARPATHY}"],
        f"raw/{KARPATHY} .the folder to write. is a file, not a folder"),
    "output inside a file": (FLICKR, whole, ["--output", f"raw/{KARPATHY}/x"],
        f"raw/{KARPATHY} is not a folder, so nothing can be written into "),
}  # fmt: skip


def tree(folder):
    """What stands in a folder: {path: content, None for a folder}."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory; the datasets are to lie in raw/, what is prepared in earlier/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000_000)
    Path("raw").mkdir()
    return tmp_path


@pytest.mark.parametrize("name, damage, flags, message", RAW.values(), ids=RAW)
def test_bad_raw_dataset(name, damage, flags, message, place, monkeypatch, capsys):
    WRITERS[name](Path("raw"))
    preparedataset.prepare(name, "raw", "earlier", min_word_freq=1)
    damage(Path("raw"))
    before = tree(place)
    for output in ("new", "earlier"):
        given = ["--dataset", name, "--output", output]
        if flags is not None:
            given += ["--root", "raw", *flags]
        assert re.search(message, refused(preparedataset, given, monkeypatch, capsys))
        assert tree(place) == before


def cached(damage=whole):
    """Features of the prepared dataset, and what is then done to them."""

    def make(folder):
        torch.manual_seed(0xBAD)
        preparedataset.cache_features(folder, build_encoder("scenes_vgg", "random"), workers=0)
        damage(folder)

    return make


def other_images(folder):
    with h5py.File(features_path(folder, "scenes_vgg"), "r+") as file:
        file["train"].attrs["files_hash"] = "of others"


def unfinished(folder):
    with h5py.File(features_path(folder, "scenes_vgg"), "r+") as file:
        file["val_done"][0] = False


CACHE = "features-scenes_vgg.h5"
INFO = "info.json"
WORDS = "vocabulary.json"
TRAIN = "train.json"
AGAIN = "is damaged or of another preparation than its neighbours; run preparedataset.py again"


def with_another_vocabulary(folder):
    written(WORDS, '["<pad>", "a", "<unk>", "<start>", "<end>"]')(folder)


def without_max_length(folder):
    edit(folder / INFO, lambda info: info.pop("max_length"))


def with_more_images(folder):
    edit(folder / INFO, lambda info: info["splits"].update(train=7))


def without_val_in_info(folder):
    edit(folder / INFO, lambda info: info["splits"].pop("val"))


def without_encoded_captions(folder):
    edit(folder / TRAIN, lambda rows: rows[1].pop("encoded"))


def with_a_long_caption(folder):
    edit(folder / TRAIN, lambda rows: rows[1]["encoded"][0].extend([1] * 60))


def move_images(folder):
    Path("raw/images").rename("raw/other")


def cut_a_photo(folder):
    cut(PHOTO, -100)(Path("raw"))


# what is wrong: (what damages the prepared dataset, flags of train.py, the line)
PREPARED = {
    "no such dataset": (whole, ["--dataset", "nowhere"],
        "data/nowhere is not a prepared dataset; run: python preparedataset.py"),
    "not prepared": (removed(INFO), [], "prepared is not a prepared dataset"),
    "info cut off": (cut(INFO), [], "info.json is not a JSON file, or is cut off"),
    "info a list": (written(INFO, "[]"), [], f"info.json {AGAIN}"),
    "info of another version": (without_max_length, [], f"info.json {AGAIN}"),
    "info of another preparation": (with_more_images, [], f"train.json {AGAIN}"),
    "no split for validation": (without_val_in_info, [], "has no split 'val'; it has: train"),
    "vocabulary missing": (removed(WORDS), [], "there is no file prepared/vocabulary.json"),
    "vocabulary binary": (written(WORDS, b"\xff\xfe\xfa"), [],
        "vocabulary.json is not a JSON file"),
    "vocabulary a list of others": (written(WORDS, '["a", "b"]'), [],
        "vocabulary.json: this is not a vocabulary"),
    "vocabulary of numbers": (written(WORDS, '["<pad>", 1, "<unk>", "<start>", "<end>"]'), [],
        "vocabulary.json: this is not a vocabulary"),
    "vocabulary of another preparation": (with_another_vocabulary, [], f"train.json {AGAIN}"),
    "split missing": (removed(TRAIN), [], "there is no file prepared/train.json"),
    "split cut off": (cut(TRAIN), [], "train.json is not a JSON file, or is cut off"),
    "split an object": (written(TRAIN, "{}"), [], f"train.json {AGAIN}"),
    "split of other records": (written(TRAIN, "[1, 2, 3]"), [], f"train.json {AGAIN}"),
    "split without encoded captions": (without_encoded_captions, [], f"train.json {AGAIN}"),
    "split with long captions": (with_a_long_caption, [], f"train.json {AGAIN}"),
    "images moved": (move_images, [], "there is no image .*raw/images/100"),
    "image truncated": (cut_a_photo, ["--batch_size", 1],
        "1001_ab1.jpg cannot be read as an image, it may be damaged"),
    "bottom-up features not cached": (whole, ["--encoder", "bottom_up"],
        "bottom_up features have to be cached first: preparedataset.py --features bottom_up"),
    "cache truncated": (cached(cut(CACHE)), [],
        "features-scenes_vgg.h5 cannot be read .*; delete it and run preparedataset.py "
        "--features scenes_vgg"),
    "cache unfinished": (cached(unfinished), [],
        "is incomplete for split 'val'; run preparedataset.py"),
    "cache of other images": (cached(other_images), [], "was made for other images; delete it"),
    "cache of other weights": (cached(), ["--encoder_weights", "random"],
        "the cached scenes_vgg features come from other weights"),
    "cache without its encoder": (cached(removed("encoder-scenes_vgg.pt")), [],
        "there is no file prepared/encoder-scenes_vgg.pt"),
    "weights of another network": (other_weights, ["--encoder_weights", "weights.pt"],
        "does not hold the weights of this encoder"),
    "a word for a number": (whole, ["--epochs", "many"],
        "argument --epochs: invalid int value: 'many'"),
    "no epoch": (whole, ["--epochs", 0], "--epochs must be at least 1, not 0"),
    "fewer than no processes": (whole, ["--workers", -1], "--workers must be at least 0, not -1"),
    "more than all dropped out": (whole, ["--dropout", 2],
        "--dropout must be from 0 to 1, not 2.0"),
    "a learning rate that is no number": (whole, ["--decoder_lr", "nan"],
        "--decoder_lr must be at least 0, not nan"),
    "output a folder": (whole, ["--output", "raw"], "--output raw is not the name of a .pt file"),
    "output without .pt": (whole, ["--output", "lrp0.5"],
        "--output lrp0.5 is not the name of a .pt file"),
    "captioner unknown": (whole, ["--model_type", "parrot"],
        "argument --model_type: invalid choice: 'parrot'"),
}  # fmt: skip


@pytest.mark.parametrize("damage, flags, message", PREPARED.values(), ids=PREPARED)
def test_bad_prepared_dataset(damage, flags, message, place, monkeypatch, capsys):
    write_flickr(Path("raw"))
    preparedataset.prepare("flickr8k", "raw", "prepared")
    damage(Path("prepared"))
    capsys.readouterr()  # the bars of making a cache
    before = tree(place)
    given = ["--dataset", "./prepared", *SMALL, "--output", "it.pt", *flags]
    # The head of the training's log is printed before the first image is read.
    told = refused(train, given, monkeypatch, capsys, quiet=False)
    assert re.search(message, told)
    assert tree(place) == before


# what is wrong: (what damages the raw dataset, flags of preparedataset.py, the line)
REGIONS = {
    "regions of another network": (regions_of_another_network, BOTTOM_UP,
        "expected 1 to 36 regions of 2048 numbers with a box each, not features .4, 7."),
    "regions a number": (regions_a_number, BOTTOM_UP,
        "hdf5 does not hold image_features and image_boxes"),
    "regions without boxes": (regions_without_a_box, BOTTOM_UP,
        "expected 1 to 36 regions .* and boxes .3, 4."),
    "regions not finite": (regions_not_finite, BOTTOM_UP,
        "hdf5 holds numbers that are not finite; extract its features again"),
}  # fmt: skip


@pytest.mark.parametrize("damage, flags, message", REGIONS.values(), ids=REGIONS)
def test_what_is_wrong_with_regions_leaves_a_whole_dataset_and_an_unfinished_cache(
    damage, flags, message, place, monkeypatch, capfd
):
    """They are read last, for that takes longest; the cache goes on from there once they are
    mended."""
    write_flickr(Path("raw"))
    damage(Path("raw"))
    given = ["--dataset", "flickr8k", "--root", "raw", "--output", "new", "--workers", 0, *flags]
    command(monkeypatch, preparedataset, *given)
    with pytest.raises(SystemExit) as caught:
        run(preparedataset.main)
    *_, last = capfd.readouterr().err.removesuffix("\n").split("\n")
    assert caught.value.code == 2
    assert re.search(f"^preparedataset.py: error: .*{message}", last)
    assert len(CaptionDataset("new", "train")) == 3
    with pytest.raises(UserError, match="is incomplete"):
        CaptionDataset("new", "train", features=flags[1])


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        (
            "preparedataset.py",
            ["--dataset", "flickr8k", "--root", "raw", "--output", "new"],
            "dataset_flickr8k.json is not a JSON file",
        ),
        ("train.py", ["--dataset", "./prepared"], "prepared/train.json is damaged"),
    ],
)
def test_bad_input_of_a_real_process(script, arguments, message, place):
    write_flickr(Path("raw"))
    preparedataset.prepare("flickr8k", "raw", "prepared")
    cut(KARPATHY)(Path("raw"))
    written(TRAIN, "[]")(Path("prepared"))
    before = tree(place)
    done = subprocess.run(
        [sys.executable, REPOSITORY / script, *arguments],
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{script}: error: ")
    assert message in done.stderr
    assert tree(place) == before


@contextmanager
def room(size):
    """No file may grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [10, 1500])  # the vocabulary goes in the latter, the splits do not
def test_a_full_disk(size, place, monkeypatch, capsys):
    write_flickr(Path("raw"))
    preparedataset.prepare("flickr8k", "raw", "earlier", min_word_freq=1)
    before = tree(place)
    for output in ("new", "earlier"):
        given = ["--dataset", "flickr8k", "--root", "raw", "--output", output]
        with room(size):
            message = refused(preparedataset, given, monkeypatch, capsys)
        assert "File too large" in message
        assert tree(place) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(place, monkeypatch, capsys):
    write_flickr(Path("raw"))
    Path("locked").mkdir(mode=0o500)
    given = ["--dataset", "flickr8k", "--root", "raw", "--output", "locked/new"]
    assert "Permission denied" in refused(preparedataset, given, monkeypatch, capsys)
    assert not any(Path("locked").iterdir())
