"""The command: a captioner on a split, its word scores, and what it writes."""

import json
import sys

import pytest
import torch

import evaluation
from captiondata import CaptionDataset
from evaluation import word_scores
from preparedataset import prepare
from scenes import write_scenes
from test_lrp_utils import random_captioner


def test_word_scores_are_the_largest_probabilities_on_the_way():
    captioner = random_captioner(words=6)
    words = captioner.vocabulary.words[1:4]
    features = torch.randn(2, 9, captioner.encoder.out_channels, dtype=torch.float64)
    captions = [[words[0], words[1], words[0]], [words[2]]]
    scores = word_scores(captioner, features, captions, [words[1], "nowhere", words[2]])
    with torch.no_grad():
        for row, caption in enumerate(captions):
            memory = captioner.look(features[row : row + 1])
            state, steps = captioner.start(memory), []
            for word in ["<start>", *caption]:
                step, state = captioner.next_words(torch.tensor([captioner.vocabulary.encode([word])]), state, memory)
                steps.append(step[0, 0].exp())
            best = torch.stack(steps).amax(0)
            expected = [best[captioner.vocabulary.encode([words[1]])[0]].item(), 0.0, best[captioner.vocabulary.encode([words[2]])[0]].item()]
            assert scores[row].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_command_measures_a_split_and_writes_it(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "scenes"
    write_scenes(folder, 8, 4, 5, workers=1)
    prepare("scenes", folder, folder)
    captioner = random_captioner().float()
    captioner.save(tmp_path / "it.pt")
    arguments = ["--checkpoint", tmp_path / "it.pt", "--dataset", folder, "--output", tmp_path / "out.json", "--workers", 0, "--limit", 3]
    arguments += ["--metrics", "bleu", "meteor", "cider", "ciderd", "chair", "object_words", "object_word_ap", "planted"]
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *map(str, arguments)])
    evaluation.main()
    result = json.loads((tmp_path / "out.json").read_text())
    dataset = CaptionDataset(folder, "test")
    assert [row["image_id"] for row in result["captions"]] == [entry["image_id"] for entry in dataset.entries[:3]]
    assert result["metrics"].keys() >= {"BLEU-4", "METEOR", "CIDEr", "CIDEr-D", "names main object"}
    assert result["unavailable"]["chair"] == "CHAIR: no caption names an object"
    assert "training captions" in result["unavailable"]["object_words"] == result["unavailable"]["object_word_ap"]
    assert len(result["checkpoint_sha256"]) == 16 and result["versions"]["torch"] == torch.__version__
    assert "names main object" in capsys.readouterr().out


def test_all_captions_that_a_decoder_finds_are_written(tmp_path, monkeypatch):
    folder = tmp_path / "scenes"
    write_scenes(folder, 8, 4, 5, workers=1)
    prepare("scenes", folder, folder)
    random_captioner().float().save(tmp_path / "it.pt")
    arguments = ["--checkpoint", tmp_path / "it.pt", "--dataset", folder, "--output", tmp_path / "out.json", "--workers", 0, "--metrics", "diversity"]
    for extra, others in (("--decoding diverse_beam --groups 3 --max_length 6", 2), ("--decoding nucleus --num_captions 5 --max_length 6", 4)):
        monkeypatch.setattr(sys, "argv", ["evaluation.py", *map(str, arguments), *extra.split()])
        evaluation.main()
        rows = json.loads((tmp_path / "out.json").read_text())["captions"]
        assert all(len(row["others"]) == others and len(row["caption"].split()) <= 6 for row in rows)
