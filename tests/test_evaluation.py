"""Caption and object metrics on hand-made captions with hand-computed answers."""

import json
import sys

import pytest
import torch

import evaluation
from captiondata import CaptionDataset
from evaluation import caption_metrics, mentioned_objects, object_metrics, object_phrases
from preparedataset import prepare
from scenes import write_scenes
from test_lrp_utils import random_captioner

PHRASES = object_phrases({"dog": ["dog", "dogs"], "hot dog": ["hot dog", "hot dogs"], "man": ["man", "men", "guy"], "ball": ["ball"]})


def test_mentioned_objects_reads_plurals_synonyms_and_compounds():
    assert mentioned_objects("two dogs and a guy".split(), PHRASES) == ["dog", "man"]
    assert mentioned_objects("a man eats a hot dog near a dog".split(), PHRASES) == ["man", "hot dog", "dog"]
    assert mentioned_objects("a hot day".split(), PHRASES) == []
    assert mentioned_objects([], PHRASES) == []


def test_object_metrics_by_hand():
    def thing(category, main=False):
        return {"category": category, "main": main}

    info = {"categories": {"dog": ["dog"], "ball": ["ball"], "man": ["man"]}, "planted_pairs": [["dog", "ball"]]}
    entries = [
        {"objects": [thing("dog", True)]},  # hallucinated ball, planted
        {"objects": [thing("dog", True), thing("ball")]},  # all true
        {"objects": [thing("man", True)]},  # names a dog instead of the man
        {"objects": [thing("dog", True)]},  # A without B, and B not named
    ]
    captions = ["a dog with a ball", "a dog with a ball", "a dog", "a dog"]
    metrics = object_metrics({i: caption.split() for i, caption in enumerate(captions)}, entries, info)
    assert metrics == {"names_main_object": 3 / 4, "names_absent_object": 2 / 4, "absent_object_words": 2 / 6, "planted_hallucination": 1 / 2}


def test_caption_metrics_of_a_perfect_and_a_wrong_caption():
    references = {0: ["A dog runs on the grass.", "a dog, running"], 1: ["Two men play football!"], 2: ["a red bus in town"]}
    perfect = {0: "a dog runs on the grass".split(), 1: "two men play football".split(), 2: "a red bus in town".split()}
    wrong = {0: "x y".split(), 1: "x y".split(), 2: "x y".split()}
    assert caption_metrics(perfect, references)["BLEU-4"] == pytest.approx(1, abs=1e-6)
    assert caption_metrics(perfect, references)["CIDEr"] > 5
    assert caption_metrics(wrong, references)["CIDEr"] == 0
    with pytest.raises(ValueError):
        caption_metrics(perfect, {0: ["a"]})


def test_the_command_measures_a_split_and_writes_it(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "scenes"
    write_scenes(folder, 8, 4, 5, workers=1)
    prepare("scenes", folder, folder)
    captioner = random_captioner().float()
    captioner.save(tmp_path / "it.pt")
    arguments = ["--checkpoint", tmp_path / "it.pt", "--dataset", folder, "--output", tmp_path / "out.json", "--workers", 0, "--limit", 3]
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *map(str, arguments)])
    evaluation.main()
    result = json.loads((tmp_path / "out.json").read_text())
    dataset = CaptionDataset(folder, "test")
    assert [row["image_id"] for row in result["captions"]] == [entry["image_id"] for entry in dataset.entries[:3]]
    assert result["metrics"].keys() >= {"BLEU-4", "CIDEr", "names_main_object", "names_absent_object"}
    assert len(result["checkpoint_sha256"]) == 16 and result["versions"]["torch"] == torch.__version__
    assert "names_main_object" in capsys.readouterr().out
