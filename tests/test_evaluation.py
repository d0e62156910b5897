"""The command: a captioner on a split, its word scores, and what it writes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from fixtures import prepared_scenes
from helpers import random_captioner

import evaluation
from captiondata import CaptionDataset
from commandline import UserError, write_json
from evaluation import word_scores
from preparedataset import prepare

ROOT = Path(__file__).resolve().parent.parent


def test_word_scores_are_the_largest_probabilities_on_the_way():
    captioner = random_captioner(words=6)
    words = captioner.vocabulary.words[1:4]
    features = torch.randn(2, 9, captioner.encoder.out_channels, dtype=torch.float64)
    captions = [[words[0], words[1], words[0]], [words[2]]]
    scores = word_scores(captioner, features, captions, [words[1], "nowhere", words[2]])
    with torch.no_grad():
        for row, caption in enumerate(captions):
            memory = captioner.image_memory(features[row : row + 1])
            state, steps = captioner.initial_state(memory), []
            for word in ["<start>", *caption]:
                step, state = captioner.next_words(
                    torch.tensor([captioner.vocabulary.encode([word])]), state, memory
                )
                steps.append(step[0, 0].exp())
            best = torch.stack(steps).amax(0)
            expected = [
                best[captioner.vocabulary.encode([words[1]])[0]].item(),
                0.0,
                best[captioner.vocabulary.encode([words[2]])[0]].item(),
            ]
            assert scores[row].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_command_measures_a_split_and_writes_it(tmp_path, monkeypatch, capsys):
    folder = prepared_scenes(tmp_path / "scenes", 8, 4, 5)
    captioner = random_captioner().float()
    captioner.save(tmp_path / "it.pt")
    arguments = [
        "--checkpoint",
        tmp_path / "it.pt",
        "--dataset",
        folder,
        "--output",
        tmp_path / "out.json",
        "--workers",
        0,
        "--limit",
        3,
    ]
    arguments += [
        "--metrics",
        "bleu",
        "meteor",
        "cider",
        "ciderd",
        "chair",
        "object_words",
        "object_word_ap",
        "planted",
    ]
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *map(str, arguments)])
    evaluation.main()
    result = json.loads((tmp_path / "out.json").read_text())
    dataset = CaptionDataset(folder, "test")
    assert [row["image_id"] for row in result["captions"]] == [
        entry["image_id"] for entry in dataset.entries[:3]
    ]
    assert result["metrics"].keys() >= {"BLEU-4", "METEOR", "CIDEr", "CIDEr-D", "names main object"}
    assert result["unavailable"]["chair"] == "CHAIR: no caption names an object"
    assert (
        "training captions"
        in result["unavailable"]["object_words"]
        == result["unavailable"]["object_word_ap"]
    )
    assert (
        len(result["checkpoint_sha256"]) == 16 and result["versions"]["torch"] == torch.__version__
    )
    assert "names main object" in capsys.readouterr().out


def test_all_captions_that_a_decoder_finds_are_written(tmp_path, monkeypatch):
    folder = prepared_scenes(tmp_path / "scenes", 8, 4, 5)
    random_captioner().float().save(tmp_path / "it.pt")
    arguments = [
        "--checkpoint",
        tmp_path / "it.pt",
        "--dataset",
        folder,
        "--output",
        tmp_path / "lrp0.5",
        "--workers",
        0,
        "--metrics",
        "diversity",
    ]
    for extra, others in (
        ("--decoding diverse_beam --groups 3 --max_length 6", 2),
        ("--decoding nucleus --num_captions 5 --max_length 6", 4),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluation.py", *map(str, arguments), *extra.split()])
        evaluation.main()
        rows = json.loads((tmp_path / "lrp0.5.json").read_text())["captions"]
        assert all(
            len(row["others"]) == others and len(row["caption"].split()) <= 6 for row in rows
        )


def experiment(monkeypatch, tmp_path, folder, *flags):
    arguments = [
        "--checkpoint",
        tmp_path / "it.pt",
        "--dataset",
        folder,
        "--output",
        tmp_path / "out",
        "--workers",
        0,
        "--max_length",
        8,
        *flags,
    ]
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *map(str, arguments)])
    evaluation.main()


def test_experiments_are_resumed_image_by_image(tmp_path, monkeypatch, capsys):
    """An interrupted run goes on with the images that are missing, to the same tables, also from a part of the split to the whole;
    other settings are not mixed with it, nor do they replace it."""
    folder = prepared_scenes(tmp_path / "scenes", 8, 4, 5)
    captioner = random_captioner().float()
    captioner.vocabulary.words[1:30:2] = [
        f"{word}" for word in "a the of on in dog bench man with and is it at to by".split()
    ]
    captioner.save(tmp_path / "it.pt")
    monkeypatch.setattr(evaluation, "EXAMINED_AT_ONCE", 2)
    flags = ["--experiment", "word_ablation", "hallucination", "--methods", "lrp", "gradcam"]
    experiment(monkeypatch, tmp_path, folder, *flags)
    path = tmp_path / "out-word_ablation-hallucination.jsonl"
    whole = path.read_text()
    tables = json.loads(path.with_suffix(".json").read_text())["tables"]
    assert (
        "**word ablation**" in path.with_suffix(".md").read_text()
        and "word ablation" in capsys.readouterr().out
    )
    path.write_text(
        "\n".join(whole.splitlines()[:3]) + "\n" + whole.splitlines()[3][:20]
    )  # the first batch, and a line cut by a kill
    calls = []
    original = evaluation.Examiner.__call__
    monkeypatch.setattr(
        evaluation.Examiner,
        "__call__",
        lambda self, images, indices, entries: (
            calls.append(indices) or original(self, images, indices, entries)
        ),
    )
    experiment(monkeypatch, tmp_path, folder, *flags)
    assert calls == [[2, 3], [4]] and path.read_text() == whole
    assert json.loads(path.with_suffix(".json").read_text())["tables"] == tables
    with pytest.raises(
        UserError,
        match="out-word_ablation-hallucination.jsonl keeps what was found with other flags",
    ):
        experiment(monkeypatch, tmp_path, folder, *flags, "--seed", 1)
    with pytest.raises(UserError, match="with other flags"):
        experiment(monkeypatch, tmp_path, folder, *flags, "--object_words", "coco")
    split = (folder / "test.json").read_bytes()
    write_json(
        folder / "test.json",
        [entry | {"captions": entry["captions"][::-1]} for entry in json.loads(split)],
    )
    with pytest.raises(UserError, match="with other flags"):
        experiment(monkeypatch, tmp_path, folder, *flags)
    (folder / "test.json").write_bytes(split)
    neighbour = tmp_path / "out-word_ablation-hallucination.b.jsonl"  # of an --output of its own
    neighbour.write_text(whole)
    assert path.read_text() == whole
    experiment(monkeypatch, tmp_path, folder, *flags, "--limit", 3)
    assert len(calls) == 2 and path.read_text() == neighbour.read_text() == whole
    path.unlink()
    experiment(monkeypatch, tmp_path, folder, *flags, "--limit", 3)
    experiment(monkeypatch, tmp_path, folder, *flags)
    assert calls[2:] == [[0, 1], [2], [3, 4]] and len(path.read_text().splitlines()) == len(
        whole.splitlines()
    )


@pytest.mark.parametrize("flags, told", [
    (["--batch_size", 0], "--batch_size must be at least 1"), (["--workers", -1], "--workers must be at least 0"), (["--output", "."], "not the name of a .json file"),
    (["--output", ".json"], "not the name of a .json file"), (["--methods", "lrp"], "--methods goes with --experiment"),
    (["--predictions", "x.json", "--limit", 3], "--limit goes with a captioner"), (["--predictions", "x.json", "--beam_size", 9], "--beam_size goes with a captioner"),
    (["--predictions", "x.json", "--object_words", "train"], "needs --train_annotations"), (["--instances", "x.json"], "--instances goes with --predictions"),
    (["--temperature", "nan", "--decoding", "nucleus"], "--temperature must be from 0.001"),
    (["--predictions", "x.json", "--experiment", "correctness"], "--experiment goes with a captioner"),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_read(monkeypatch, flags, told):
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *map(str, flags)])
    with pytest.raises(UserError, match=told):
        evaluation.main()


@pytest.mark.parametrize(
    "name, root, split", [("coco2017", "coco2017", "test"), ("flickr8k", "flickr8k", "val")]
)
def test_experiments_run_on_real_photographs(tmp_path, monkeypatch, name, root, split):
    """A captioner that knows drawings only, on COCO's boxes and outlines and on Flickr30k Entities' boxes."""
    source = ROOT.parent / "shared/data" / root
    if not source.exists():
        pytest.skip(f"wants ../shared/data/{root}")
    prepare(name, source, tmp_path / name)
    arguments = ["--dataset", tmp_path / name, "--split", split, "--limit", 6, "--experiment", "all", "--methods", "lrp", "attention",
                 "--metrics", "cider", "chair", "--workers", 0, "--output", tmp_path / "out"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *map(str, arguments)])
    monkeypatch.chdir(ROOT)
    evaluation.main()
    tables = json.loads((tmp_path / "out-all.json").read_text())["tables"]
    assert (
        tables["word_ablation"]
        and tables["image_ablation"]
        and set(tables) == {"word_ablation", "image_ablation", "correctness", "hallucination"}
    )
    if name == "flickr8k":
        assert any(entry["objects"] for entry in CaptionDataset(tmp_path / name, split).entries)
