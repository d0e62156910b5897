"""Training a CLIPmapper: what it is shown, what is measured, resuming, and mistakes."""

import json
import math

import pytest
import tiny_clip
import torch
from fixtures import command, prepared_scenes

import train
import train_clipmapper
from captioner import load_captioner
from clipmappermodel import load_clipmapper
from commandline import UserError
from contrastive import build_stem, load_clip, new_clip
from questions import answers_of, chance, read_questions
from train_clipmapper import Captions, Questions, Training

SMALL = ["--width", 8, "--layers", 2, "--heads", 2, "--prefix", 2, "--device", "cpu"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return prepared_scenes(tmp_path_factory.mktemp("data") / "scenes", 12, 6, 6)


@pytest.fixture(scope="module")
def clip_folder(scenes, tmp_path_factory):
    """Of the words of the scenes' questions and captions."""
    torch.manual_seed(0)
    texts = [question.text for question in read_questions(scenes, "train")] * 3
    folder = tmp_path_factory.mktemp("clip")
    new_clip(build_stem("scenes_vgg", "random", ["7"]), texts, 8, 1, 2, 4).save(folder)
    return folder


@pytest.fixture
def flags(scenes, clip_folder):
    return ["--dataset", scenes, "--clip", clip_folder, *SMALL]


def trained(monkeypatch, *flags):
    command(monkeypatch, train_clipmapper, *flags)
    train_clipmapper.main()


def test_a_caption_is_said_word_by_word(scenes, clip_folder):
    examples = Captions(scenes, "train", load_clip(clip_folder))
    generator = torch.Generator().manual_seed(0)
    numbers, ids, targets = examples.batch([3, 0], generator)
    assert numbers == [3, 0]
    end = examples.clip.tokenizer.eos_token_id
    for row, number in enumerate(numbers):
        known = examples.clip.token_ids(examples.dataset.entries[number]["captions"]).tolist()
        said = targets[row][targets[row] >= 0].tolist()
        assert said[-1] == end and said.count(end) == 1
        whole = [ids[row, 0].item(), *said]
        assert any(caption[: len(whole)] == whole for caption in known)
        assert ids[row, 1 : len(said)].tolist() == said[:-1]


def test_an_epoch_asks_every_question_once_image_by_image(scenes, clip_folder):
    examples = Questions(scenes, "train", load_clip(clip_folder))
    order = examples.order(torch.Generator().manual_seed(0)).tolist()
    assert sorted(order) == list(range(len(examples)))
    images = [examples.images[number] for number in order]
    changes = sum(one != other for one, other in zip(images, images[1:]))
    assert changes == len(set(images)) - 1
    assert images != sorted(images)


def test_an_answer_that_cannot_be_given_is_no_target(scenes, clip_folder):
    examples = Questions(scenes, "train", load_clip(clip_folder))
    examples.answers = ("no", "yes")
    numbers, ids, targets = examples.batch(range(len(examples)))
    for place, question in enumerate(examples.questions):
        expected = {"no": 0, "yes": 1}.get(question.answer, -100)
        assert targets[place] == expected
        file = question.file
        assert Captions(scenes, "train", None).dataset.entries[numbers[place]]["file"] == file


def test_right_answers_are_counted(scenes, clip_folder, monkeypatch, tmp_path, flags):
    output = tmp_path / "vqa"
    trained(monkeypatch, *flags, "--task", "vqa", "--epochs", 2, "--output", output)
    report = json.loads((output / "about.json").read_text())
    assert set(report["measured"]) == {"val", "test"}
    assert len(report["history"]) == 2
    answerer = load_captioner(output)
    questions = read_questions(scenes, "test")
    assert answerer.answers == tuple(answers_of(read_questions(scenes, "train")))
    stem = answerer.clip.stem
    clip = load_clip(clip_folder)
    entries = Captions(scenes, "test", clip).dataset.entries
    files = [entry["file"] for entry in entries]
    tokens = train_clipmapper.tokens_of(
        clip, answerer.model, scenes, ["test"], False, torch.device("cpu")
    )["test"]
    assert stem.name == "scenes_vgg"
    right = 0
    for question in questions:
        image = tokens[files.index(question.file)][None].float()
        logits = answerer.model(image, answerer.question_ids([question.text]))
        right += answerer.answers[logits.argmax()] == question.answer
    measured = report["measured"]["test"]
    assert measured["accuracy"] == pytest.approx(right / len(questions))
    assert measured["chance"] == pytest.approx(chance(questions))


def test_a_blind_answerer_says_the_same_of_every_image(monkeypatch, tmp_path, flags, scenes):
    """It is trained on zeros, and what it learns from them does not depend on the image."""
    output = tmp_path / "blind"
    trained(monkeypatch, *flags, "--task", "vqa", "--epochs", 1, "--blind", "--output", output)
    report = json.loads((output / "about.json").read_text())
    assert report["settings"]["blind"] is True
    clip = load_clip(flags[3])
    model = load_clipmapper(output).model
    tokens = train_clipmapper.tokens_of(clip, model, scenes, ["val"], True, torch.device("cpu"))
    assert tokens["val"].shape[0] == 6 and not tokens["val"].any()


def test_captions_are_measured_by_cider(monkeypatch, tmp_path, flags, capsys):
    output = tmp_path / "caption"
    trained(monkeypatch, *flags, "--epochs", 2, "--output", output)
    report = json.loads((output / "about.json").read_text())
    assert {"CIDEr", "BLEU-4"} <= set(report["measured"]["test"])
    assert report["history"][0]["loss"] > report["history"][1]["loss"]
    assert "the CLIPmapper is" in capsys.readouterr().out
    assert load_captioner(output).task == "caption"


def test_what_is_frozen_stays(monkeypatch, tmp_path, flags, clip_folder):
    output = tmp_path / "caption"
    trained(monkeypatch, *flags, "--epochs", 1, "--output", output)
    before = load_clip(clip_folder)
    after = load_captioner(output)
    for name, value in before.model.state_dict().items():
        assert torch.equal(value, after.model.clip.state_dict()[name])
    for name, value in before.stem.state_dict().items():
        assert torch.equal(value, after.model.stem.state_dict()[name])


def test_the_loss_is_the_mean_cross_entropy_of_the_words(scenes, clip_folder):
    clip = load_clip(clip_folder)
    examples = {"train": Captions(scenes, "train", clip)}
    config = train_clipmapper.ClipMapperConfig("caption", (), 8, 2, 2, 2, dropout=0.0)
    model = train_clipmapper.ClipMapper(config, clip)
    tokens = {"train": torch.randn(12, 65, 8).half()}
    settings = {"lr": 0.0, "weight_decay": 0.0, "epochs": 1, "batch_size": 4, "seed": 0}
    settings["label_smoothing"] = 0.1
    training = Training(model, clip, examples, tokens, settings, torch.device("cpu"))
    numbers, ids, targets = examples["train"].batch([1, 5], torch.Generator().manual_seed(2))
    loss = training.train_step(numbers, ids, targets)
    total = 0.0
    words = 0
    for row, number in enumerate(numbers):
        logits = model(tokens["train"][number : number + 1].float(), ids[row : row + 1])[0]
        for position, target in enumerate(targets[row].tolist()):
            if target >= 0:
                chances = logits[position].detach().double().softmax(-1)
                spread = sum(math.log(chance) for chance in chances) / len(chances)
                total -= 0.9 * math.log(chances[target]) + 0.1 * spread
                words += 1
    assert loss.item() == pytest.approx(total / words, rel=1e-5)


def test_an_interrupted_training_goes_on_bit_for_bit(monkeypatch, tmp_path, flags):
    flags = [*flags, "--task", "vqa", "--epochs", 3]
    trained(monkeypatch, *flags, "--output", tmp_path / "whole")
    epoch = Training.train_epoch

    def killed(self):
        if self.epochs.epoch == 1:
            raise KeyboardInterrupt
        return epoch(self)

    monkeypatch.setattr(Training, "train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(monkeypatch, *flags, "--output", tmp_path / "cut")
    monkeypatch.setattr(Training, "train_epoch", epoch)
    torch.manual_seed(3)  # dropout has the numbers that it would have had
    trained(monkeypatch, *flags, "--output", tmp_path / "cut")
    histories = []
    for name in ("whole", "cut"):
        histories.append(json.loads((tmp_path / name / "about.json").read_text())["history"])
    assert histories[0] == histories[1]
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(UserError, match="is of other settings"):
        (tmp_path / "cut" / "training.pt").write_bytes(b"")
        torch.save({"settings": {}}, tmp_path / "cut" / "training.pt")
        trained(monkeypatch, *flags, "--output", tmp_path / "cut")


def test_train_hands_over(monkeypatch, tmp_path, flags):
    output = tmp_path / "caption"
    command(
        monkeypatch, train, "--model_type", "clipmapper", *flags, "--epochs", 1, "--output", output
    )
    train.main()
    assert load_captioner(output).task == "caption"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--heads", 3], "--width 8 is no multiple of --heads 3"),
        (["--clip", "no-such-folder"], "no CLIP can be loaded from no-such-folder"),
        (["--dataset", "no-such-dataset"], "no-such-dataset"),
        (["--epochs", 0], "epochs"),
    ],
)
def test_mistakes_are_one_line(more, message, monkeypatch, tmp_path, flags):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    output = tmp_path / "mapper"
    with pytest.raises(UserError, match=message) as error:
        trained(monkeypatch, *flags, *more, "--output", output)
    assert "\n" not in str(error.value)
    assert not (output / "config.json").exists()


def test_questions_want_scenes(monkeypatch, tmp_path, flags, scenes):
    other = tmp_path / "data"
    other.mkdir()
    for path in scenes.glob("*.json"):
        (other / path.name).write_bytes(path.read_bytes())
    info = json.loads((other / "info.json").read_text())
    (other / "info.json").write_text(json.dumps(info | {"name": "flickr8k"}))
    with pytest.raises(UserError, match="--task vqa wants the drawn scenes"):
        trained(monkeypatch, *flags, "--task", "vqa", "--dataset", other)


def test_a_start_of_other_sizes_is_one_line(monkeypatch, tmp_path, flags):
    tiny_clip.save_mapper("caption", tiny_clip.save_clip(tmp_path / "clip"), tmp_path / "other")
    with pytest.raises(UserError, match="does not hold the weights"):
        trained(monkeypatch, *flags, "--start", tmp_path / "other", "--output", tmp_path / "new")
