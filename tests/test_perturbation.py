"""Perturbation tests: orders, curves and areas against slow ones, and what is removed."""

import json
import math
import random

import numpy as np
import pytest
import tiny_clip
import tiny_transformers
import torch
from fixtures import command, prepared_scenes
from helpers import random_captioner

import perturbation as perturbation_script
from captioner import load_captioner
from captionmetrics import Captions
from commandline import UserError
from contrastive import build_stem, new_clip
from experiments import perturbation
from experiments.perturbation import ORDERS, SHARES, area, curves_of, kept_after, order_of, table
from experiments.perturbed import (
    CAPTION,
    IMAGE,
    QUESTION,
    WORDS,
    Answers,
    ClipMapperSentences,
    LstmSentences,
    nearness_to_the_centre,
    normalised_sum,
    some_of_each,
)
from pretrainedmodel import METHODS
from pycocoevalcap.cider.cider import Cider
from questions import answers_of, read_questions
from vocabulary import Vocabulary


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return prepared_scenes(tmp_path_factory.mktemp("data") / "scenes", 8, 4, 4)


@pytest.fixture(scope="module")
def folders(scenes, tmp_path_factory):
    """CLIPmappers with random weights that know the scenes' words."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("clipmapper")
    asked = read_questions(scenes, "train")
    texts = [question.text for question in asked] * 3
    clip = new_clip(build_stem("scenes_vgg", "random"), texts, 12, 1, 3, 4)
    tiny_clip.enliven(clip.model)
    clip.save(root / "clip")
    found = {}
    for task in ("caption", "vqa"):
        answers = tuple(answers_of(asked))
        found[task] = tiny_clip.save_mapper(task, root / "clip", root / task, answers)
    return found


@pytest.fixture(scope="module")
def captioners(folders):
    return {task: load_captioner(folder) for task, folder in folders.items()}


# --------------------------------------------------------------------------------------- the curves


def test_the_most_relevant_goes_first_or_last():
    relevance = torch.tensor([0.1, -3.0, 2.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    positive = order_of(relevance, "positive", generator)
    negative = order_of(relevance, "negative", generator)
    assert positive.tolist() == [2, 3, 0, 1]
    assert negative.tolist() == [1, 0, 3, 2]
    assert kept_after(positive, 0.5).tolist() == [0, 1]
    assert kept_after(negative, 0.75).tolist() == [2]
    assert kept_after(positive, 0).tolist() == [0, 1, 2, 3]
    assert kept_after(positive, 1).tolist() == []


def test_chance_decides_among_equals():
    generator = torch.Generator().manual_seed(0)
    first = [order_of(torch.zeros(6), "positive", generator)[0].item() for _ in range(300)]
    assert min(np.bincount(first, minlength=6)) > 25


@pytest.mark.parametrize("length", [1, 3, 7, 64])
def test_curves_measure_what_is_kept_at_each_share(length):
    generator = torch.Generator().manual_seed(1)
    relevances = [torch.rand(length, generator=generator) for _ in range(2)]
    orders = [order_of(relevance, name, generator) for relevance in relevances for name in ORDERS]
    weights = torch.arange(1.0, length + 1) ** 2
    calls = []

    def measured(kept):
        calls.append(kept.shape)
        return [weights[row].sum().item() for row in kept]

    curves = curves_of(orders, measured)
    for order, curve in zip(orders, curves):
        for share, value in zip(SHARES, curve):
            removed = round(share * length)
            left = order.tolist()[removed:]
            assert value == pytest.approx(sum(weights[place].item() for place in left))
    assert len(calls) == len({round(share * length) for share in SHARES})
    assert (1, length) in calls and (1, 0) in calls


def test_an_area_is_that_of_trapezoids():
    curve = [1.0, 0.5, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0]
    expected = 0.25 * 0.75 + 0.25 * 0.5 + 0.25 * 0.375 + 0.05 * 0.125
    assert area(curve) == pytest.approx(expected)
    assert area([1.0] * 9) == pytest.approx(1)


class Known:
    """Items whose measure is the share of their relevance that is kept."""

    name = "known"
    measures = {"image": "share", "text": "share"}
    images = 12

    def __init__(self):
        rng = np.random.default_rng(0)
        self.relevance = torch.from_numpy(rng.random((24, 10)))

    def __len__(self):
        return 24

    def image_of(self, item):
        return item // 2

    def explained(self, item, method):
        truth = self.relevance[item]
        found = {"relevancy": truth + 0.5 * torch.roll(truth, 1), "lrp": truth}
        if method == "opposite":
            return {"image": -truth, "text": None}
        return {"image": found[method], "text": found[method] if item else None}

    def baselines(self, item):
        return {"image": {"constant": torch.zeros(10)}}

    def measured(self, item, side, kept):
        truth = self.relevance[item]
        return [(truth[row].sum() / truth.sum()).item() for row in kept]

    def finished(self, records):
        return records


def test_the_table_tells_which_explanation_is_right(tmp_path):
    subject = Known()
    methods = ["relevancy", "lrp", "opposite"]
    path = tmp_path / "known.jsonl"
    records = perturbation.examine(subject, methods, path, {"seed": 0})
    rows = {(row["removed"], row["method"]): row for row in table(records, subject)}
    assert rows["image", "lrp"]["items"] == 24
    assert rows["text", "lrp"]["items"] == 23
    assert ("text", "opposite") not in rows
    right = rows["image", "lrp"]
    assert right["positive"] < rows["image", "relevancy"]["positive"]
    assert right["negative"] > rows["image", "relevancy"]["negative"]
    assert right["gap"] == pytest.approx(right["negative"] - right["positive"])
    assert rows["image", "opposite"]["gap"] == pytest.approx(-right["gap"])
    assert abs(rows["image", "random"]["gap"]) < 0.1
    assert abs(rows["image", "constant"]["gap"]) < 0.1
    assert right["gap, less that of relevancy low"] > 0
    assert right["gap low"] < right["gap"] < right["gap high"]
    # What is compared in pairs is the mean of the differences.
    difference = right["gap"] - rows["image", "relevancy"]["gap"]
    assert right["gap, less that of relevancy"] == pytest.approx(difference)
    found = perturbation.pairs(perturbation.areas_of_all(records), subject.images)
    of_pair = {(row["removed"], row["first"], row["second"]): row for row in found}
    row = of_pair["image", "relevancy", "lrp"]
    assert row["difference"] == pytest.approx(-difference, abs=1e-4)  # areas are rounded
    assert row["high"] == pytest.approx(-right["gap, less that of relevancy low"], abs=1e-4)
    assert len(of_pair) == 5 * 4 // 2 + 3 * 2 // 2


def test_methods_of_different_items_are_no_pair():
    every = {"images": [0, 1], "positive": [0.1, 0.2], "negative": [0.3, 0.5]}
    some = {"images": [0], "positive": [0.1], "negative": [0.3]}
    assert perturbation.pairs({"image": {"one": every, "other": some}}, 2) == []
    (row,) = perturbation.pairs({"image": {"one": every, "other": every}}, 2)
    assert row["difference"] == 0


def test_intervals_draw_images_and_not_items(tmp_path):
    """Two items of one image that say the same are one piece of evidence."""
    subject = Known()
    subject.relevance[1::2] = subject.relevance[::2]
    once = perturbation.examine(subject, ["lrp"], tmp_path / "a.jsonl", {})
    single = [record for record in once if record["index"] % 2 == 0]
    both = [dict(record) for record in single for _ in range(2)]
    first, second = (
        next(row for row in table(found, subject) if row["method"] == "lrp")
        for found in (single, both)
    )
    assert first["gap low"] == pytest.approx(second["gap low"])
    assert first["gap high"] == pytest.approx(second["gap high"])


def test_an_interrupted_test_goes_on(tmp_path):
    whole = perturbation.examine(Known(), ["lrp"], tmp_path / "whole.jsonl", {"seed": 0})
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    asked = []

    class Counted(Known):
        def explained(self, item, method):
            asked.append(item)
            return super().explained(item, method)

    again = perturbation.examine(Counted(), ["lrp"], tmp_path / "cut.jsonl", {"seed": 0})
    assert again == whole
    assert asked == list(range(8, 24))
    with pytest.raises(UserError, match="delete it, or choose another output"):
        perturbation.examine(Known(), ["lrp"], tmp_path / "cut.jsonl", {"seed": 1})


# ------------------------------------------------------------------------------------- the subjects


def test_questions_are_spread_over_the_images():
    groups = [[0, 1, 2, 3], [4], [5, 6, 7]]
    chosen = some_of_each(groups, 5, random.Random(0))
    assert chosen == sorted(chosen) and len(set(chosen)) == 5
    assert [sum(number in chosen for number in group) for group in groups] == [2, 1, 2]
    assert some_of_each(groups, 100, random.Random(0)) == list(range(8))


def test_the_middle_is_nearest_to_the_centre():
    relevance = nearness_to_the_centre((3, 5)).reshape(3, 5)
    assert relevance.argmax() == 7
    assert relevance[1, 2] == 0
    assert relevance[0, 0] == pytest.approx(-math.hypot(1 / 3, 2 / 5))


def test_every_word_counts_alike_for_a_caption():
    relevance = torch.tensor([[1.0, -1.0, 2.0], [10.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert normalised_sum(relevance).tolist() == [1.25, -0.25, 0.5]


def test_answers_are_right_with_the_tokens_that_are_kept(captioners, scenes):
    captioner = captioners["vqa"]
    subject = Answers(captioner, scenes, "test", 6)
    assert len(subject) == 6 and subject.images == 4
    model = captioner.model
    for item in range(6):
        question = subject.questions[item]
        maps = subject.maps[subject.image_of(item)][None]
        kept = torch.tensor([[0, 5, 63], [1, 2, 40]])
        values = subject.measured(item, IMAGE, kept)
        for row, value in zip(kept, values):
            tokens = model.image_tokens(maps, row[None])
            logits = model(tokens, captioner.question_ids([question.text]))
            assert value == (captioner.answers[logits.argmax()] == question.answer)
        words = question.text.replace("?", " ?").replace("'", " ' ").split()
        subset = [place for place in range(len(words)) if place % 2 == 0]
        (value,) = subject.measured(item, QUESTION, torch.tensor([subset]))
        left = " ".join(words[place] for place in subset)
        logits = model(model.image_tokens(maps), captioner.question_ids([left]))
        assert value == (captioner.answers[logits.argmax()] == question.answer)


def test_what_explains_an_answer_is_what_the_captioner_explains(captioners, scenes):
    captioner = captioners["vqa"]
    subject = Answers(captioner, scenes, "test", 3)
    text = subject.questions[1].text
    maps = subject.maps[subject.image_of(1)][None]
    for method in ("relevancy", "attnlrp"):
        found = subject.explained(1, method)
        answer = captioner.answers[
            captioner.model(captioner.model.image_tokens(maps), captioner.question_ids([text]))
            .argmax()
            .item()
        ]
        _, expected = captioner.question_relevance(maps, text, answer, METHODS[method])
        assert torch.equal(found[QUESTION], expected["words"][0, 1:-1])
        if method == "relevancy":
            assert torch.equal(found[IMAGE], expected["tokens"][0, 1:])
        else:  # of what the patches are made of: here a region is a patch
            torch.testing.assert_close(found[IMAGE], expected["image"][0].flatten())


@pytest.fixture(scope="module")
def sentences(captioners, scenes):
    return ClipMapperSentences(captioners["caption"], scenes, "test", 3)


def test_a_word_is_as_probable_as_the_captioner_says(sentences):
    captioner = sentences.captioner
    model = captioner.model
    for item in range(3):
        position = sentences.positions[item]
        ids = sentences.captions[item]
        maps = sentences.maps[item][None]
        whole = sentences.measured(item, IMAGE, torch.arange(64)[None])
        with torch.no_grad():
            explanation = captioner._explain_one(maps, ids, METHODS["gradient"])
        assert whole[0] == pytest.approx(explanation.probabilities[position].item(), rel=1e-4)
        subset = torch.arange(position)[None, ::2]
        (value,) = sentences.measured(item, WORDS, subset)
        left = [captioner.start, *[ids[place] for place in subset[0].tolist()]]
        logits = model(model.image_tokens(maps), torch.tensor([left]))[0, -1]
        assert value == pytest.approx(logits.softmax(-1)[ids[position]].item(), rel=1e-4)


def test_cider_is_that_of_what_is_said_then(sentences, tmp_path):
    methods = ["relevancy", "attention_gradcam"]
    records = perturbation.examine(sentences, methods, tmp_path / "some.jsonl", {})
    references = {number: entry["captions"] for number, entry in enumerate(sentences.entries)}
    kept = torch.arange(64)[None]
    said = {number: sentences.measured(number, CAPTION, kept)[0] for number in references}
    tokens = Captions(said, references).tokens
    _, truth = Cider().compute_score(tokens.references, tokens.predictions)
    assert len(records) == 3
    for record in records:
        for orders in record["curves"][CAPTION].values():
            for curve in orders.values():
                assert curve[0] == pytest.approx(truth[record["index"]])
                assert all(isinstance(value, float) for value in curve)
        assert set(record["curves"]) == {IMAGE, WORDS, CAPTION}
        assert "last words" in record["curves"][WORDS]
        assert 0 <= record["curves"][IMAGE]["random"]["positive"][3] <= 1


def test_regions_of_an_lstm_are_taken_away(scenes):
    vocabulary = Vocabulary.load(scenes / "vocabulary.json")
    captioner = random_captioner(vocabulary=vocabulary).float()
    subject = LstmSentences(captioner, scenes, "val", 2)
    for item in range(2):
        ids = subject.captions[item]
        position = subject.positions[item]
        kept = torch.tensor([[0, 9, 63], [4, 5, 6]])
        values = subject.measured(item, IMAGE, kept)
        for row, value in zip(kept, values):
            features = subject.features[item][:, row]
            inputs = torch.tensor([[[captioner.vocabulary.start, *ids[:position]]]])
            logits = captioner(features, inputs)[0, 0, -1]
            assert value == pytest.approx(logits.softmax(-1)[ids[position]].item(), rel=1e-4)
        (nothing,) = subject.measured(item, IMAGE, torch.empty(1, 0, dtype=torch.long))
        assert 0 <= nothing <= 1
        found = subject.explained(item, "lrp")
        (whole,) = captioner.explain(
            subject.dataset[item][0][None], [vocabulary.decode(ids)], "lrp"
        )
        torch.testing.assert_close(found[IMAGE], whole.region_relevance[position])
        torch.testing.assert_close(found[WORDS], whole.word_relevance[position, 1 : position + 1])
        assert subject.explained(item, "attention")[WORDS] is None


# -------------------------------------------------------------------------------------- the command


def test_every_method_is_tested_once(captioners):
    transformer = perturbation_script.default_methods(captioners["vqa"])
    assert {"relevancy", "attnlrp", "rollout", "partial_lrp"} <= set(transformer)
    assert not {"lrp", "gradcam"} & set(transformer)
    multi_head = perturbation_script.default_methods(random_captioner(model_type="aoa"))
    assert multi_head == ["attention", "gradcam", "input_x_gradient", "attnlrp", "lrp"]
    assert "attnlrp" not in perturbation_script.default_methods(random_captioner())


def test_the_command_writes_a_table(folders, scenes, tmp_path, monkeypatch, capsys):
    flags = ["--checkpoint", folders["vqa"], "--dataset", scenes, "--items", 5]
    flags += ["--methods", "relevancy", "weighted_relevancy", "--output", tmp_path]
    command(monkeypatch, perturbation_script, *flags, "--device", "cpu")
    perturbation_script.main()
    assert "| image " in capsys.readouterr().out
    assert (tmp_path / "vqa-test.png").exists()
    report = json.loads((tmp_path / "vqa-test.json").read_text())
    assert report["items"] == 5
    found = {(row["removed"], row["method"]) for row in report["table"]}
    methods = ("relevancy", "weighted_relevancy", "random")
    expected = {(side, method) for side in (IMAGE, QUESTION) for method in methods}
    assert found == expected | {(IMAGE, "centre")}
    all_areas = json.loads((tmp_path / "vqa-test-areas.json").read_text())
    assert len(all_areas[IMAGE]["random"]["images"]) == 5
    assert len(report["curves"][QUESTION]["relevancy"]["negative"]) == len(SHARES)
    row = report["table"][0]
    areas = all_areas[IMAGE]["relevancy"]["positive"]
    assert row["positive"] == pytest.approx(np.mean(areas), abs=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "nowhere"], "has no split 'nowhere'"),
        (["--methods", "gradcam"], "no explanation method 'gradcam'"),
        (["--items", 0], "items"),
        (["--dataset", "no-such-dataset"], "no-such-dataset"),
    ],
)
def test_mistakes_are_one_line(more, message, folders, scenes, tmp_path, monkeypatch):
    flags = ["--checkpoint", folders["vqa"], "--dataset", scenes, "--output", tmp_path, *more]
    command(monkeypatch, perturbation_script, *flags, "--device", "cpu")
    with pytest.raises(UserError, match=message) as error:
        perturbation_script.main()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_has_no_patches_to_remove_is_refused(scenes, tmp_path, monkeypatch):
    folder = tiny_transformers.save("blip", tmp_path / "blip")
    flags = ["--checkpoint", folder, "--dataset", scenes, "--output", tmp_path / "out"]
    command(monkeypatch, perturbation_script, *flags, "--device", "cpu")
    with pytest.raises(UserError, match="not from one of type 'blip'"):
        perturbation_script.main()
    command(monkeypatch, perturbation_script, "--dataset", scenes)
    with pytest.raises(UserError, match="--checkpoint has to say"):
        perturbation_script.main()
