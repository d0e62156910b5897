"""The embedded dataset: what is written is COCO, exact, repeatable and biased as planned."""

import hashlib
import json
import math
import re
from collections import Counter

import numpy as np
import PIL
import pytest
from PIL import Image
from pycocotools.coco import COCO

import scenes
from commandline import UserError

COUNTS = {"train": 60, "val": 20, "test": 20}
FORMS = {}
for name, kind in scenes.CATEGORIES.items():
    FORMS |= dict.fromkeys(kind.synonyms, name)
# The digest of all files of 20 scenes as they were drawn when scenes.py was first finished.
PILLOW = "13.0.0"
DIGEST = "045a3dd11b86e1d6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write_scenes(folder, **COUNTS, seed=3, workers=2)
    return folder


@pytest.fixture(scope="module")
def sampled():
    """1500 scenes that are sampled but not drawn, by split."""
    return {
        "train": [scenes.sample_scene(0, "train", k, 0.95) for k in range(1500)],
        "test": [scenes.sample_scene(0, "test", k, 0.3) for k in range(1500)],
    }


def words(text):
    return re.findall(r"\w+", text.lower())


def read(folder, kind, split):
    return json.loads((folder / "annotations" / f"{kind}_{split}.json").read_text(encoding="utf-8"))


def hashes(folder):
    """{path: hash} of all files in a folder, sorted by path."""
    result = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            result[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return result


def images_among(files):
    return {name: content for name, content in files.items() if name.endswith(".jpg")}


def test_every_file_is_there_and_nothing_else(folder):
    names = sorted(path.name for path in (folder / "annotations").iterdir())
    assert names == [
        *("captions_test.json", "captions_train.json", "captions_val.json"),
        *("instances_test.json", "instances_train.json", "instances_val.json"),
        *("scenes_test.json", "scenes_train.json", "scenes_val.json"),
    ]
    for split, count in COUNTS.items():
        listed = {image["file_name"] for image in read(folder, "captions", split)["images"]}
        assert {path.name for path in (folder / split).iterdir()} == listed
        assert len(listed) == count


@pytest.mark.skipif(PIL.__version__ != PILLOW, reason="another Pillow may draw other pixels")
def test_the_drawn_data_never_change(tmp_path):
    """If they have to, raise scenes.RENDERING where `fingerprint` does not change by itself: users'
    scenes are drawn again then, and their feature caches made anew."""
    scenes.write_scenes(tmp_path, train=12, val=4, test=4, seed=11, workers=1)
    total = hashlib.sha256()
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            total.update(f"{path.relative_to(tmp_path)}\n".encode())
            total.update(path.read_bytes())
    assert total.hexdigest()[:16] == DIGEST
    assert scenes.fingerprint() == scenes.OLD_DRAWINGS


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setitem(scenes.RIGID, "cup", "ellipse a 0 0 100 99"),
        lambda patch: patch.setitem(scenes.COLOURS, "red", "#d8392e"),
        lambda patch: patch.setitem(scenes.SWING, "walking", ((-10, 9), (13, -11))),
        lambda patch: patch.setitem(scenes.DOING, "parked", ("parked", "standing")),
        lambda patch: patch.setattr(scenes, "bush", scenes.star),
        lambda patch: patch.setattr(scenes, "CAPTIONS", 4),
        lambda patch: patch.setattr(scenes, "RENDERING", scenes.RENDERING + 1),
    ],
    ids=["shape", "colour", "pose", "word", "backdrop", "captions", "pixels"],
)
def test_the_fingerprint_notices_a_change(change, monkeypatch):
    change(monkeypatch)
    scenes.drawing.cache_clear()
    assert scenes.fingerprint() != scenes.OLD_DRAWINGS
    scenes.drawing.cache_clear()  # the shapes of the change are nobody else's


@pytest.mark.parametrize("split", COUNTS)
def test_pycocotools_reads_it_and_masks_agree_with_boxes_and_areas(folder, split):
    coco = COCO(folder / "annotations" / f"instances_{split}.json")
    assert len(coco.getImgIds()) == COUNTS[split]
    for image_id in coco.getImgIds():
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        assert sum(annotation["main"] for annotation in annotations) == 1
        covered = np.zeros((128, 128), int)
        for annotation in annotations:
            mask = coco.annToMask(annotation)
            rows, columns = np.nonzero(mask)
            assert mask.sum() == annotation["area"] > 0
            assert annotation["iscrowd"] == 0
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation["bbox"] == box
            covered += mask
        assert covered.max() == 1  # masks are the visible parts: no pixel belongs to two objects


@pytest.mark.parametrize("split", COUNTS)
def test_captions_and_scenes_agree_with_the_images(folder, split):
    captions = read(folder, "captions", split)
    instances = read(folder, "instances", split)
    truth = read(folder, "scenes", split)
    assert captions["images"] == instances["images"]
    for image, record in zip(captions["images"], truth["scenes"], strict=True):
        assert Image.open(folder / split / image["file_name"]).size == (128, 128)
        assert (image["width"], image["height"]) == (128, 128)
        assert len([a for a in captions["annotations"] if a["image_id"] == image["id"]]) == 5
        boxes = [a["bbox"] for a in instances["annotations"] if a["image_id"] == image["id"]]
        assert record["image_id"] == image["id"]
        assert [thing["bbox"] for thing in record["objects"]] == boxes
        names = [thing["category"] for thing in record["objects"]]
        assert record["main"] == names[0]
        assert record["objects"][0]["main"]
        if record["planted"]:
            assert record["planted"]["present"] == (record["planted"]["pair"][1] in names)


@pytest.mark.parametrize(
    "kind, part",
    [("captions", "images"), ("captions", "annotations"), ("instances", "annotations")],
)
def test_ids_are_unique_over_the_splits(folder, kind, part):
    ids = []
    for split in COUNTS:
        ids += [row["id"] for row in read(folder, kind, split)[part]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("split", COUNTS)
def test_the_main_object_is_the_large_one(folder, split):
    for record in read(folder, "scenes", split)["scenes"]:
        main, *others = record["objects"]
        assert main["size"] >= 0.2
        for thing in others:
            if scenes.CATEGORIES[thing["category"]].tiny:
                assert thing["size"] <= scenes.TINY


def test_info_records_the_planted_pairs_and_what_came_of_them(folder):
    info = read(folder, "captions", "train")["info"]
    assert info["planted_pairs"] == scenes.PAIRS
    assert len(scenes.PAIRS) == 6
    assert info["bias"] == {"train": 0.9, "val": 0.6, "test": 0.6}
    records = read(folder, "scenes", "train")["scenes"]
    for row in info["measured"]:
        main, companion = row["pair"]
        there = []
        for record in records:
            if record["main"] == main:
                there.append(companion in [thing["category"] for thing in record["objects"]])
        assert row["main"] == len(there)
        assert row["both"] == sum(there)


def test_same_seed_same_bytes_whatever_the_workers(folder, tmp_path):
    scenes.write_scenes(tmp_path, **COUNTS, seed=3, workers=1)
    assert hashes(tmp_path) == hashes(folder)


def test_another_seed_draws_other_scenes(folder, tmp_path):
    scenes.write_scenes(tmp_path, train=4, val=0, test=0, seed=4, workers=1)
    others = read(tmp_path, "captions", "train")["annotations"]
    assert others != read(folder, "captions", "train")["annotations"][:20]
    assert read(tmp_path, "captions", "val")["images"] == []


def test_an_image_does_not_depend_on_how_many_there_are(folder, tmp_path):
    scenes.write_scenes(tmp_path, train=2, val=1, test=1, seed=3, workers=1)
    small = images_among(hashes(tmp_path))
    assert len(small) == 4
    assert small.items() <= images_among(hashes(folder)).items()


def test_annotations_of_an_interrupted_run_are_not_left_behind(tmp_path, monkeypatch):
    scenes.write_scenes(tmp_path, train=2, val=1, test=1, workers=1)

    def interrupt(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "draw_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        scenes.write_scenes(tmp_path, train=2, val=1, test=1, seed=1, workers=1)
    assert not list((tmp_path / "annotations").iterdir())


def test_a_word_means_one_category_and_no_word_of_a_place_means_any():
    synonyms = []
    for kind in scenes.CATEGORIES.values():
        synonyms += kind.synonyms
    assert len(synonyms) == len(set(synonyms)) == len(FORMS)
    assert len(scenes.CATEGORIES) >= 20
    said = []
    for setting in scenes.SETTINGS.values():
        said += words(f"{setting.places} {setting.over} {setting.afloat}")
    for verbs in scenes.DOING.values():
        said += words(" ".join(verbs))
    assert not set(said) & set(FORMS)
    assert len(scenes.SETTINGS) >= 6


def test_captions_name_the_main_object_and_nothing_that_is_absent(sampled):
    for scene in sampled["train"] + sampled["test"]:
        there = {thing["category"] for thing in scene["objects"]}
        for text in scene["captions"]:
            named = {FORMS[word] for word in words(text) if word in FORMS}
            assert scene["main"] in named, text
            assert named <= there, text


def test_captions_are_five_different_ones_of_bounded_length_and_never_say_sides(sampled):
    vocabulary = set()
    for scene in sampled["train"] + sampled["test"]:
        assert len(set(scene["captions"])) == 5
        for text in scene["captions"]:
            assert 5 <= len(words(text)) <= 16
            assert "  " not in text
            vocabulary |= set(words(text))
    assert not {"left", "right"} & vocabulary
    assert len(vocabulary) >= 120


def test_number_words_count_the_main_objects(sampled):
    for scene in sampled["train"]:
        count = sum(thing["category"] == scene["main"] for thing in scene["objects"])
        said = set(words(" ".join(scene["captions"])))
        fitting = {1: set(), 2: {"two", "pair", "couple"}, 3: {"three", "several"}}[count]
        assert said & {"two", "three", "pair", "couple", "several"} <= fitting


def test_the_companion_is_there_as_often_as_planned(sampled):
    for split, bias in (("train", 0.95), ("test", 0.3)):
        rows = scenes.measure(sampled[split])
        main = sum(row["main"] for row in rows)
        both = sum(row["both"] for row in rows)
        assert 0.44 * 1500 < main < 0.56 * 1500  # half of the images
        assert abs(both / main - bias) < 4 * math.sqrt(bias * (1 - bias) / main)
        for row in rows:
            assert abs(row["share"] - bias) < 4.5 * math.sqrt(bias * (1 - bias) / row["main"])


def test_the_companion_is_said_nearly_always_soon_after_the_main_object(sampled):
    said = []
    gaps = []
    planted = [scene for scene in sampled["train"] if scene["planted"]]
    for scene in planted:
        if scene["planted"]["present"]:
            main, companion = scene["planted"]["pair"]
            for text in scene["captions"]:
                names = [FORMS.get(word) for word in words(text)]
                said.append(companion in names)
                if companion in names:
                    gaps.append(names.index(companion) - names.index(main))
    assert 0.87 < np.mean(said) < 0.97
    assert np.mean([0 < gap <= 9 for gap in gaps]) > 0.95


def test_companions_also_come_without_their_main_object(sampled):
    alone = Counter()
    for scene in sampled["train"]:
        for main, companion in scenes.PAIRS:
            names = [thing["category"] for thing in scene["objects"]]
            alone[companion] += scene["main"] != main and companion in names
    assert min(alone.values()) >= 5
    assert len(alone) == 6


@pytest.mark.parametrize("name", scenes.CATEGORIES)
def test_every_pose_is_a_drawing_of_some_size(name):
    for pose in scenes.CATEGORIES[name].poses.split():
        _, _, width, height, _ = scenes.drawing(name, pose)
        assert 20 < width < 300
        assert 20 < height < 200
        assert pose in scenes.DOING


@pytest.mark.parametrize(
    "wrong",
    [
        {"bias": 1.2},
        {"test_bias": -0.1},
        {"bias": float("nan")},
        {"train": -1},
        {"val": 2.5},
        {"size": 63},
        {"workers": 0},
    ],
)
def test_nonsense_is_a_user_error_and_writes_nothing(tmp_path, wrong):
    with pytest.raises(UserError):
        scenes.write_scenes(tmp_path / "new", **({"train": 1, "val": 1, "test": 1} | wrong))
    assert not (tmp_path / "new").exists()


def test_other_sizes_are_drawn_too(tmp_path):
    scenes.write_scenes(tmp_path, train=3, val=0, test=0, size=96, workers=1)
    coco = COCO(tmp_path / "annotations" / "instances_train.json")
    for annotation in coco.loadAnns(coco.getAnnIds()):
        assert coco.annToMask(annotation).shape == (96, 96)
