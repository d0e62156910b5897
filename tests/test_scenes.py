"""The embedded dataset: what is written is COCO, exact, repeatable and biased as planned."""

import hashlib
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import scenes
from commandline import UserError

COUNTS = {"train": 60, "val": 20, "test": 20}
FORMS = {word: name for name, kind in scenes.CATEGORIES.items() for word in kind.synonyms}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write_scenes(folder, **COUNTS, seed=3, workers=2)
    return folder


@pytest.fixture(scope="module")
def sampled():
    """Scenes that are sampled but not drawn, by split."""
    return {
        split: [scenes.sample_scene(0, split, k, bias) for k in range(n)]
        for split, bias, n in (("train", 0.95, 1500), ("test", 0.3, 1500))
    }


def words(text):
    return re.findall(r"\w+", text.lower())


def read(folder, kind, split):
    return json.loads((folder / "annotations" / f"{kind}_{split}.json").read_text(encoding="utf-8"))


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_file_is_there_and_nothing_else(folder):
    names = {path.name for path in (folder / "annotations").iterdir()}
    assert names == {
        f"{kind}_{split}.json" for kind in ("captions", "instances", "scenes") for split in COUNTS
    }
    for split, count in COUNTS.items():
        assert {path.name for path in (folder / split).iterdir()} == {
            image["file_name"] for image in read(folder, "captions", split)["images"]
        }
        assert len(list((folder / split).iterdir())) == count


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
            assert mask.sum() == annotation["area"] > 0 and annotation["iscrowd"] == 0
            assert annotation["bbox"] == [
                columns.min(),
                rows.min(),
                np.ptp(columns) + 1,
                np.ptp(rows) + 1,
            ]
            covered += mask
        assert covered.max() == 1  # masks are the visible parts: no pixel belongs to two objects


@pytest.mark.parametrize("split", COUNTS)
def test_captions_and_scenes_agree_with_the_images(folder, split):
    captions, instances, truth = (
        read(folder, kind, split) for kind in ("captions", "instances", "scenes")
    )
    assert captions["images"] == instances["images"]
    for image, record in zip(captions["images"], truth["scenes"], strict=True):
        assert (
            Image.open(folder / split / image["file_name"]).size
            == (image["width"], image["height"])
            == (128, 128)
        )
        assert len([a for a in captions["annotations"] if a["image_id"] == image["id"]]) == 5
        boxes = [a["bbox"] for a in instances["annotations"] if a["image_id"] == image["id"]]
        assert (
            record["image_id"] == image["id"]
            and [thing["bbox"] for thing in record["objects"]] == boxes
        )
        names = [thing["category"] for thing in record["objects"]]
        assert record["main"] == names[0] and [thing["main"] for thing in record["objects"]][0]
        if record["planted"]:
            assert record["planted"]["present"] == (record["planted"]["pair"][1] in names)


def test_ids_are_unique_over_the_splits(folder):
    for kind, key in (
        ("captions", "images"),
        ("captions", "annotations"),
        ("instances", "annotations"),
    ):
        ids = [row["id"] for split in COUNTS for row in read(folder, kind, split)[key]]
        assert len(ids) == len(set(ids))


def test_the_main_object_is_the_large_one(folder):
    for split in COUNTS:
        for record in read(folder, "scenes", split)["scenes"]:
            assert record["objects"][0]["size"] >= 0.2
            for name, thing in ((thing["category"], thing) for thing in record["objects"][1:]):
                assert not scenes.CATEGORIES[name].tiny or thing["size"] <= scenes.TINY


def test_info_records_the_planted_pairs_and_what_came_of_them(folder):
    info, records = (
        read(folder, "captions", "train")["info"],
        read(folder, "scenes", "train")["scenes"],
    )
    assert info["planted_pairs"] == scenes.PAIRS and len(scenes.PAIRS) == 6
    assert info["bias"] == {"train": 0.9, "val": 0.6, "test": 0.6}
    for row in info["measured"]:
        there = [
            row["pair"][1] in [thing["category"] for thing in record["objects"]]
            for record in records
            if record["main"] == row["pair"][0]
        ]
        assert (row["main"], row["both"]) == (len(there), sum(there))


def test_same_seed_same_bytes_whatever_the_workers(folder, tmp_path):
    scenes.write_scenes(tmp_path, **COUNTS, seed=3, workers=1)
    assert hashes(tmp_path) == hashes(folder)


def test_another_seed_draws_other_scenes(folder, tmp_path):
    scenes.write_scenes(tmp_path, train=4, val=0, test=0, seed=4, workers=1)
    assert (
        read(tmp_path, "captions", "train")["annotations"]
        != read(folder, "captions", "train")["annotations"][:20]
    )
    assert read(tmp_path, "captions", "val")["images"] == []


def test_an_image_does_not_depend_on_how_many_there_are(folder, tmp_path):
    scenes.write_scenes(tmp_path, train=2, val=1, test=1, seed=3, workers=1)
    small, large = hashes(tmp_path), hashes(folder)
    assert [large[name] for name in small if name.endswith(".jpg")] == [
        small[name] for name in small if name.endswith(".jpg")
    ]


def test_annotations_of_an_interrupted_run_are_not_left_behind(tmp_path, monkeypatch):
    scenes.write_scenes(tmp_path, train=2, val=1, test=1, workers=1)

    def interrupt(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "draw_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        scenes.write_scenes(tmp_path, train=2, val=1, test=1, seed=1, workers=1)
    assert not list((tmp_path / "annotations").iterdir())


def test_a_word_means_one_category_and_no_word_of_a_place_means_any():
    synonyms = [word for kind in scenes.CATEGORIES.values() for word in kind.synonyms]
    assert len(synonyms) == len(set(synonyms)) == len(FORMS) and len(scenes.CATEGORIES) >= 20
    phrases = " ".join(
        f"{place.places} {place.over} {place.afloat}" for place in scenes.SETTINGS.values()
    )
    verbs = " ".join(verb for verbs in scenes.DOING.values() for verb in verbs)
    assert not set(words(f"{phrases} {verbs}")) & set(FORMS) and len(scenes.SETTINGS) >= 6


def test_captions_name_the_main_object_and_nothing_that_is_absent(sampled):
    for scene in sampled["train"] + sampled["test"]:
        there = {thing["category"] for thing in scene["objects"]}
        for text in scene["captions"]:
            named = {FORMS[word] for word in words(text) if word in FORMS}
            assert scene["main"] in named, text
            assert named <= there, text


def test_captions_are_five_different_ones_of_bounded_length_and_never_say_sides(sampled):
    for scene in sampled["train"] + sampled["test"]:
        assert len(set(scene["captions"])) == 5
        for text in scene["captions"]:
            assert 5 <= len(words(text)) <= 16 and "  " not in text
            assert not {"left", "right"} & set(words(text))
    assert (
        len(
            {
                word
                for scene in sampled["train"]
                for text in scene["captions"]
                for word in words(text)
            }
        )
        >= 120
    )


def test_number_words_count_the_main_objects(sampled):
    for scene in sampled["train"]:
        count = sum(thing["category"] == scene["main"] for thing in scene["objects"])
        said = {word for text in scene["captions"] for word in words(text)}
        fitting = {1: set(), 2: {"two", "pair", "couple"}, 3: {"three", "several"}}[count]
        assert said & {"two", "three", "pair", "couple", "several"} <= fitting


def test_the_companion_is_there_as_often_as_planned(sampled):
    for split, bias in (("train", 0.95), ("test", 0.3)):
        rows = scenes.measure(sampled[split])
        main, both = sum(row["main"] for row in rows), sum(row["both"] for row in rows)
        assert 0.44 * 1500 < main < 0.56 * 1500  # half of the images
        assert abs(both / main - bias) < 4 * math.sqrt(bias * (1 - bias) / main)
        for row in rows:
            assert abs(row["share"] - bias) < 4.5 * math.sqrt(bias * (1 - bias) / row["main"])


def test_the_companion_is_said_nearly_always_soon_after_the_main_object(sampled):
    said, gaps = [], []
    for scene in sampled["train"]:
        if scene["planted"] and scene["planted"]["present"]:
            for text in scene["captions"]:
                names = [FORMS.get(word) for word in words(text)]
                said.append(scene["planted"]["pair"][1] in names)
                if said[-1]:
                    gaps.append(
                        names.index(scene["planted"]["pair"][1]) - names.index(scene["main"])
                    )
    assert 0.87 < np.mean(said) < 0.97
    assert np.mean([0 < gap <= 9 for gap in gaps]) > 0.95


def test_companions_also_come_without_their_main_object(sampled):
    for main, companion in scenes.PAIRS:
        alone = [
            scene
            for scene in sampled["train"]
            if scene["main"] != main
            and any(thing["category"] == companion for thing in scene["objects"])
        ]
        assert len(alone) >= 5, companion


@pytest.mark.parametrize("name", scenes.CATEGORIES)
def test_every_pose_is_a_drawing_of_some_size(name):
    for pose in scenes.CATEGORIES[name].poses.split():
        _, _, width, height, _ = scenes.drawing(name, pose)
        assert 20 < width < 300 and 20 < height < 200
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
    assert all(
        coco.annToMask(annotation).shape == (96, 96)
        for annotation in coco.loadAnns(coco.getAnnIds())
    )
