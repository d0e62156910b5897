"""The command: a captioner on a split, its word scores, and what it writes."""

import json
from pathlib import Path

import pytest
import torch
from fixtures import command, draw, prepared_scenes, refused
from helpers import random_captioner

import evaluation
from captiondata import CaptionDataset
from commandline import UserError, write_json
from experiments import records
from experiments.captions import choose_object_words
from experiments.probabilities import word_scores
from images import image_transform, load_image
from preparedataset import prepare

ROOT = Path(__file__).resolve().parent.parent


def test_word_scores_are_the_largest_probabilities_on_the_way():
    captioner = random_captioner(words=6)
    vocabulary = captioner.vocabulary
    words = vocabulary.words[1:4]
    features = torch.randn(2, 9, captioner.encoder.out_channels, dtype=torch.float64)
    captions = [[words[0], words[1], words[0]], [words[2]]]
    scores = word_scores(captioner, features, captions, [words[1], "nowhere", words[2]])
    for row, caption in enumerate(captions):
        best = largest_probabilities(captioner, features[row : row + 1], caption)
        one, other = vocabulary.encode([words[1], words[2]])
        expected = [best[one].item(), 0.0, best[other].item()]
        assert scores[row].tolist() == pytest.approx(expected, abs=1e-12)


@torch.no_grad()
def largest_probabilities(captioner, features, caption):
    """The largest probability that each word of the vocabulary had, by decoding step by step."""
    memory = captioner.image_memory(features)
    state = captioner.initial_state(memory)
    steps = []
    for word in ["<start>", *caption]:
        token_ids = torch.tensor([captioner.vocabulary.encode([word])])
        log_probabilities, state = captioner.next_words(token_ids, state, memory)
        steps.append(log_probabilities[0, 0].exp())
    return torch.stack(steps).amax(0)


def test_the_object_words_are_by_default_those_of_the_dataset():
    corpus = {index: ["a dog"] for index in range(50)}
    categories = {"dog": ["dog"]}
    assert "clock" in choose_object_words(None, "coco2017", corpus, categories)
    assert "hat" in choose_object_words(None, "flickr8k", corpus, categories)
    assert choose_object_words(None, "scenes", corpus, categories) == ["dog"]
    assert choose_object_words("train", "coco2017", corpus, categories) == ["dog"]


def evaluate(monkeypatch, *arguments):
    command(monkeypatch, evaluation, *arguments)
    evaluation.main()


@pytest.fixture
def scenes(tmp_path):
    """A small prepared dataset."""
    return prepared_scenes(tmp_path / "scenes", 8, 4, 5)


def flags_for(tmp_path, scenes, output):
    """A captioner at it.pt, read on these scenes, and where the result goes."""
    checkpoint = ["--checkpoint", tmp_path / "it.pt"]
    return [*checkpoint, "--dataset", scenes, "--output", tmp_path / output, "--workers", 0]


def test_the_command_measures_a_split_and_writes_it(tmp_path, scenes, monkeypatch, capsys):
    random_captioner().float().save(tmp_path / "it.pt")
    metrics = [
        "bleu",
        "meteor",
        "cider",
        "ciderd",
        "chair",
        "object_words",
        "object_word_ap",
        "planted",
    ]
    flags = flags_for(tmp_path, scenes, "out.json")
    evaluate(monkeypatch, *flags, "--limit", 3, "--metrics", *metrics)
    result = json.loads((tmp_path / "out.json").read_text())
    entries = CaptionDataset(scenes, "test").entries[:3]
    assert [row["image_id"] for row in result["captions"]] == [
        entry["image_id"] for entry in entries
    ]
    assert result["metrics"].keys() >= {"BLEU-4", "METEOR", "CIDEr", "CIDEr-D", "names main object"}
    unavailable = result["unavailable"]
    assert unavailable["chair"] == "CHAIR: no caption names an object"
    assert "training captions" in unavailable["object_words"]
    assert unavailable["object_words"] == unavailable["object_word_ap"]
    assert len(result["checkpoint_sha256"]) == 16
    assert result["versions"]["torch"] == torch.__version__
    assert "names main object" in capsys.readouterr().out


def test_only_one_process_scores_predictions(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    write_json(tmp_path / "found.json", [{"image_id": 1, "caption": "a dog"}])
    captions = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"image_id": 1, "caption": "A dog."}],
    }
    write_json(tmp_path / "captions.json", captions)
    files = ("--predictions", tmp_path / "found.json", "--annotations", tmp_path / "captions.json")
    output = tmp_path / "scores.json"
    evaluate(monkeypatch, *files, "--metrics", "diversity", "--output", output)
    assert not output.exists() and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    evaluate(monkeypatch, *files, "--metrics", "diversity", "--output", output)
    assert output.exists()


@pytest.mark.parametrize(
    "decoding, others",
    (
        (["diverse_beam", "--groups", 3], 2),
        (["nucleus", "--num_captions", 5], 4),
    ),
)
def test_all_captions_that_a_decoder_finds_are_written(
    tmp_path, scenes, monkeypatch, decoding, others
):
    random_captioner().float().save(tmp_path / "it.pt")
    flags = flags_for(tmp_path, scenes, "lrp0.5")
    flags += ["--metrics", "diversity", "--max_length", 6]
    evaluate(monkeypatch, *flags, "--decoding", *decoding)
    rows = json.loads((tmp_path / "lrp0.5.json").read_text())["captions"]
    for row in rows:
        assert len(row["others"]) == others
        assert len(row["caption"].split()) <= 6


def test_a_part_of_a_split_does_not_replace_the_whole(tmp_path, scenes, monkeypatch):
    """Nor do the tables of an experiment, which share the records of single images."""
    monkeypatch.chdir(tmp_path)
    random_captioner().float().save("it.pt")
    flags = ["--checkpoint", "it.pt", "--dataset", scenes, "--workers", 0, "--max_length", 5]
    flags += ["--metrics", "diversity", "--experiment", "captions", "hallucination"]
    flags += ["--methods", "attention"]
    evaluate(monkeypatch, *flags)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    stem = "it-scenes-test"
    kept = [f"{stem}-hallucination.{ending}" for ending in ("json", "jsonl", "md")]
    assert sorted(whole) == sorted([f"{stem}.json", *kept])
    monkeypatch.setattr(records, "examine", None)  # all records are there
    evaluate(monkeypatch, *flags, "--limit", 2)
    names = {path.name for path in (tmp_path / "results").iterdir()}
    for name, content in whole.items():
        assert (tmp_path / "results" / name).read_bytes() == content
    added = (".json", "-hallucination.json", "-hallucination.md")
    assert names - whole.keys() == {f"{stem}-limit2{ending}" for ending in added}
    rows = json.loads((tmp_path / f"results/{stem}-limit2.json").read_text())["captions"]
    assert len(rows) == 2


def test_the_dataset_is_what_the_captioner_was_trained_on(tmp_path, scenes, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--checkpoint", "it.pt", "--workers", 0, "--metrics", "diversity", "--max_length", 4]
    captioner = random_captioner().float()
    captioner.save("it.pt", about={"dataset": "drawings"})
    told = refused(evaluation, flags, monkeypatch, capsys)
    assert told.startswith("the captioner was trained on drawings, and there is no prepared ")
    assert not (tmp_path / "results").exists()
    (tmp_path / "data").mkdir()
    scenes.rename(tmp_path / "data/drawings")
    evaluate(monkeypatch, *flags)
    assert "the dataset is data/drawings, what the" in capsys.readouterr().out
    assert (tmp_path / "results/it-drawings-test.json").exists()
    captioner.save("it.pt")
    told = refused(evaluation, flags, monkeypatch, capsys)
    assert told == "the checkpoint does not say what it was trained on; name the dataset"


def test_what_cannot_be_written_is_told_before_anything_is_computed(
    tmp_path, scenes, monkeypatch, capsys
):
    random_captioner().float().save(tmp_path / "it.pt")
    monkeypatch.setattr(evaluation, "open_split", None)
    monkeypatch.setattr(evaluation, "caption_folder", None)
    monkeypatch.setattr(evaluation, "matching_captions", None)
    checkpoint = ["--checkpoint", tmp_path / "it.pt"]
    for what in (
        [*checkpoint, "--dataset", scenes],
        [*checkpoint, "--images", scenes / "test"],
        ["--predictions", "p.json", "--annotations", "a.json"],
    ):
        flags = [*what, "--output", tmp_path / "it.pt/x"]
        told = refused(evaluation, flags, monkeypatch, capsys)
        assert "it.pt is not a folder, so nothing can be written into " in told


def test_predictions_and_references_need_not_be_of_the_same_images(tmp_path, monkeypatch, capsys):
    """A reference without a word does not count."""
    captions = [(1, "A dog."), (1, "!"), (1, ""), (2, "A cat."), (3, " "), (4, "A man."), (5, "A.")]
    annotations = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(1, 6)],
        "annotations": [{"image_id": key, "caption": text} for key, text in captions],
    }
    write_json(tmp_path / "captions.json", annotations)
    rows = [{"image_id": key, "caption": "a dog"} for key in (1, 2, 3, 9)]
    write_json(tmp_path / "found.json", rows)
    files = ["--predictions", tmp_path / "found.json", "--annotations", tmp_path / "captions.json"]
    metrics = ["--metrics", "bleu", "cider"]
    evaluate(monkeypatch, *files, *metrics, "--output", tmp_path / "out.json")
    out = capsys.readouterr().out
    assert "2 of 4 images of " in out and "captions.json have no prediction\n" in out
    assert "2 of 4 predictions have no reference, and do not count\n" in out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["captions"] == rows[:2]
    assert result["images_without_prediction"] == 2
    assert result["predictions_without_reference"] == 2
    write_json(tmp_path / "found.json", rows[:2])
    annotations["annotations"] = [{"image_id": 1, "caption": "A dog."}]
    annotations["annotations"].append({"image_id": 2, "caption": "A cat."})
    write_json(tmp_path / "captions.json", annotations)
    evaluate(monkeypatch, *files, *metrics, "--output", tmp_path / "plain.json")
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert result["metrics"] == plain["metrics"]


# ----------------------------------------------------------------------------- kept image by image

STOP_WORDS = ["a", "the", "of", "on", "in", "with", "and", "is", "it", "at", "to", "by"]
WORDS = [*STOP_WORDS, "dog", "bench", "man"]
NAME = "out-word_ablation-hallucination"
EXPERIMENT = ["--experiment", "word_ablation", "hallucination", "--methods", "lrp", "gradcam"]


@pytest.fixture
def experiment(tmp_path, scenes, monkeypatch):
    """A function that runs two experiments with further flags, two images at once.

    It returns the indices of the images that it has examined.
    """
    captioner = random_captioner().float()
    captioner.vocabulary.words[1:30:2] = WORDS
    captioner.save(tmp_path / "it.pt")
    monkeypatch.setattr(records, "EXAMINED_AT_ONCE", 2)
    original = records.examine
    examined = []

    def examine(images, indices, *rest):
        examined.append(indices)
        return original(images, indices, *rest)

    monkeypatch.setattr(records, "examine", examine)

    def run(*further):
        examined.clear()
        flags = flags_for(tmp_path, scenes, "out")
        evaluate(monkeypatch, *flags, "--max_length", 8, *EXPERIMENT, *further)
        return list(examined)

    return run


def test_an_interrupted_run_goes_on_to_the_same_tables(tmp_path, experiment, capsys):
    assert experiment() == [[0, 1], [2, 3], [4]]
    path = tmp_path / f"{NAME}.jsonl"
    whole = path.read_text()
    lines = whole.splitlines()
    tables = json.loads(path.with_suffix(".json").read_text())["tables"]
    assert "**word ablation**" in path.with_suffix(".md").read_text()
    assert "word ablation" in capsys.readouterr().out
    # The header, the first batch, and a line cut by a kill.
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    assert experiment() == [[2, 3], [4]]
    assert path.read_text() == whole
    assert json.loads(path.with_suffix(".json").read_text())["tables"] == tables


def test_a_part_of_the_split_becomes_the_whole(tmp_path, experiment):
    assert experiment("--limit", 3) == [[0, 1], [2]]
    assert experiment() == [[3, 4]]
    path = tmp_path / f"{NAME}.jsonl"
    whole = path.read_text()
    assert len(whole.splitlines()) == 1 + 5
    assert experiment("--limit", 3) == []
    assert path.read_text() == whole


def test_records_of_other_settings_are_neither_mixed_in_nor_replaced(tmp_path, scenes, experiment):
    experiment()
    path = tmp_path / f"{NAME}.jsonl"
    whole = path.read_text()
    told = f"{NAME}.jsonl keeps what was found with other settings"
    with pytest.raises(UserError, match=told):
        experiment("--seed", 1)
    with pytest.raises(UserError, match=told):
        experiment("--object_words", "coco")
    entries = json.loads((scenes / "test.json").read_text())
    for entry in entries:
        entry["captions"].reverse()
    write_json(scenes / "test.json", entries)
    with pytest.raises(UserError, match=told):
        experiment()
    assert path.read_text() == whole


def test_the_parts_of_several_processes_are_put_into_one_file(tmp_path):
    header = {"seed": 0}
    path = tmp_path / "out.jsonl"
    part = records.part_path(path, 3)
    neighbour = tmp_path / "out.b.jsonl"  # of an --output of its own
    records.append_lines(path, [header, {"index": 1}])
    records.append_lines(part, [header, {"index": 0}])
    records.append_lines(neighbour, [{"seed": 1}])
    assert records.collect_records(path, header) == {1: {"index": 1}, 0: {"index": 0}}
    assert path.read_text() == '{"seed": 0}\n{"index": 1}\n{"index": 0}\n'
    assert not part.exists()
    assert neighbour.exists()


def test_a_method_that_is_not_for_the_captioner_is_told_before_anything_is_computed(
    tmp_path, scenes, monkeypatch, capsys
):
    random_captioner().float().save(tmp_path / "it.pt")
    monkeypatch.setattr(records, "examine", None)
    flags = flags_for(tmp_path, scenes, "out")
    with pytest.raises(UserError, match="attention scores"):
        evaluate(monkeypatch, *flags, "--experiment", "all", "--methods", "lrp", "attnlrp")
    assert not list(tmp_path.glob("out*"))


def test_attnlrp_is_a_method_of_the_experiments(tmp_path, scenes, monkeypatch):
    random_captioner(model_type="aoa").float().save(tmp_path / "it.pt")
    flags = flags_for(tmp_path, scenes, "out")
    flags += ["--limit", 2, "--max_length", 4]
    evaluate(monkeypatch, *flags, "--experiment", "image_ablation", "--methods", "attnlrp")
    header = json.loads((tmp_path / "out-image_ablation.jsonl").read_text().splitlines()[0])
    assert header["methods"] == ["attnlrp"]


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "flags, told",
    (
        ("--batch_size 0", "--batch_size must be at least 1"),
        ("--workers -1", "--workers must be at least 0"),
        ("--output .", "not the name of a .json file"),
        ("--output .json", "not the name of a .json file"),
        ("--methods lrp", "--methods goes with --experiment"),
        ("--predictions x.json --limit 3", "--limit goes with a captioner"),
        ("--predictions x.json --beam_size 9", "--beam_size goes with a captioner"),
        ("--predictions x.json", "needs --annotations"),
        ("--predictions x.json --object_words train", "needs --train_annotations"),
        ("--instances x.json", "--instances goes with --predictions"),
        ("--temperature nan --decoding nucleus", "temperature must be from 0.001"),
        ("--predictions x.json --experiment correctness", "--experiment goes with a captioner"),
    ),
)
def test_mistakes_are_told_before_anything_is_read(monkeypatch, flags, told):
    with pytest.raises(UserError, match=told):
        evaluate(monkeypatch, *flags.split())


# -------------------------------------------------------------------------------- real photographs


@pytest.mark.parametrize("name, split", (("coco2017", "test"), ("flickr8k", "val")))
def test_all_experiments_on_real_photographs(tmp_path, monkeypatch, name, split):
    """A captioner of drawings only, on COCO's boxes and outlines, or Flickr30k Entities' boxes."""
    source = ROOT.parent / "shared/data" / name
    if not source.exists():
        pytest.skip(f"wants ../shared/data/{name}")
    folder = tmp_path / name
    prepare(name, source, folder)
    monkeypatch.chdir(ROOT)
    flags = ["--dataset", folder, "--split", split, "--limit", 6, "--workers", 0]
    flags += ["--experiment", "all", "--methods", "lrp", "attention", "--metrics", "cider", "chair"]
    evaluate(monkeypatch, *flags, "--output", tmp_path / "out")
    tables = json.loads((tmp_path / "out-all.json").read_text())["tables"]
    assert list(tables) == ["word_ablation", "image_ablation", "correctness", "hallucination"]
    assert tables["word_ablation"]
    assert tables["image_ablation"]
    if name == "flickr8k":
        entries = CaptionDataset(folder, split).entries
        assert any(entry["objects"] for entry in entries)


def test_the_images_of_a_folder_are_captioned_for_others_to_score(tmp_path, monkeypatch, capsys):
    captioner = random_captioner().float()
    captioner.save(tmp_path / "it.pt")
    folder = tmp_path / "photographs"
    for number in range(3):
        draw(folder / f"{number}.jpg", size=(40, 30), seed=number)
    (folder / "notes.txt").write_text("no image")
    small = ["--batch_size", 2, "--max_length", 4, "--output", tmp_path / "captions.json"]
    command(monkeypatch, evaluation, "--checkpoint", tmp_path / "it.pt", "--images", folder, *small)
    evaluation.main()
    rows = json.loads((tmp_path / "captions.json").read_text())
    assert [row["image_id"] for row in rows] == ["0.jpg", "1.jpg", "2.jpg"]
    transform = image_transform(128)
    for row in rows:
        image = transform(load_image(folder / row["image_id"]))
        assert row["caption"] == " ".join(captioner.caption(image[None], max_length=4)[0])
    assert "3 captions are in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--images", "nowhere"], "there is no folder nowhere of images"),
        (["--images", "empty"], "there is no image in empty"),
        (
            ["--images", "empty", "--metrics", "bleu"],
            "--metrics goes with a captioner of a dataset",
        ),
        (["--images", "empty", "--predictions", "p.json"], "--predictions are captions already"),
    ],
)
def test_a_folder_that_cannot_be_captioned_is_one_line(
    flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    random_captioner().float().save(tmp_path / "it.pt")
    told = refused(evaluation, ["--checkpoint", "it.pt", *flags], monkeypatch, capsys)
    assert message in told
    assert not (tmp_path / "results").exists()
