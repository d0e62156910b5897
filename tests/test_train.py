"""train.py: it learns, the same seed gives the same numbers, a resumed run ends where an
uninterrupted one does, and flags mean what the help says.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import h5py
import pytest
import torch
from fixtures import command, prepared_scenes, refused

import objectives
import train
import trainer
from basemodel import read_checkpoint
from captiondata import cache_features
from captioner import load_captioner
from commandline import UserError, read_json, write_json
from encoder import CutEncoder, build_encoder
from featurecache import features_path
from train import FLAGS, parse_arguments
from trainer import EpochTable, Trainer, precision

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["--batch_size", 8, "--workers", 0, "--device", "cpu"]
SMALL = ["--embed_dim", 12, "--hidden_dim", 16, *COMMON]
NO_PRETRAINING = ["--pretrain_epochs", 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared_scenes(tmp_path_factory.mktemp("train") / "scenes", 24, 6, 6)


def run(monkeypatch, *arguments):
    command(monkeypatch, train, *arguments)
    train.main()


def options_of(*arguments):
    return parse_arguments([str(argument) for argument in arguments])


def weights(path):
    return read_checkpoint(path)["state_dict"]


def rows_of(path):
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_training_lowers_the_loss_and_writes_what_it_says(folder, tmp_path, monkeypatch):
    output = tmp_path / "it.pt"
    flags = ["--epochs", 3, "--pretrain_epochs", 1, "--output", output]
    run(monkeypatch, "--dataset", folder, *SMALL, *flags)
    rows = rows_of(output)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"BLEU-4", "CIDEr", "seconds"} <= rows[0].keys()
    captioner = load_captioner(output)
    assert captioner.caption(torch.zeros(1, 3, 128, 128))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["it.jsonl", "it.last.pt", "it.pt", "it.training.png"]


def test_the_same_seed_gives_the_same_captioner(folder, tmp_path, monkeypatch):
    flags = ["--dataset", folder, *SMALL, *NO_PRETRAINING, "--epochs", 1]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(monkeypatch, *flags, "--seed", seed, "--output", tmp_path / f"{name}.pt")
    assert_same_weights(tmp_path / "a.last.pt", tmp_path / "b.last.pt")
    a, c = weights(tmp_path / "a.last.pt"), weights(tmp_path / "c.last.pt")
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


@pytest.mark.parametrize("supported", [True, False])
def test_the_head_tells_of_a_cpu_without_bfloat16(supported, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert precision(False, torch.device("cpu")) == "float32"
    assert ("far more slowly" in precision(True, torch.device("cpu"))) != supported
    assert precision(True, torch.device("cuda")) == "bfloat16 where it is safe"


def test_the_log_has_a_head_and_a_table(folder, tmp_path, monkeypatch, capsys):
    flags = ["--dataset", folder, *SMALL, *NO_PRETRAINING, "--output", tmp_path / "it.pt"]
    run(monkeypatch, *flags, "--epochs", 2, "--decoder_lr", 0.25, "--finetune_encoder")
    lines = capsys.readouterr().out.splitlines()
    head = {}
    for line in lines[:11]:
        name, _, text = line.partition("  ")
        head[name] = text.strip()
    captioner = load_captioner(tmp_path / "it.pt")
    numbers = sum(parameter.numel() for parameter in captioner.parameters())
    assert head["captioner"] == "gridtd, scenes_vgg (trained)"
    assert head["parameters"] == f"{numbers:,}, {numbers:,} of them trained"
    assert head["vocabulary"] == f"{len(captioner.vocabulary.kept)} words"
    assert head["data"] == f"{folder}, images: train 24, val 6"
    assert head["steps"] == "6, 3 an epoch, each of 8 images"
    assert head["learning rate"] == "0.25, of the encoder 0.002; cosine"
    assert head["precision"] == "float32"
    assert head["files"].startswith(f"{tmp_path}/it.pt, it.last.pt, it.jsonl")
    names, *rows = lines[11:14]
    assert names.split() == list(rows_of(tmp_path / "it.pt")[0])
    ends = [match.end() for match in re.finditer(r"\S+", names)]
    for row in rows:
        assert [match.end() for match in re.finditer(r"\S+", row)] == ends
    assert f"{tmp_path}/it.last.pt is for going on" in lines[-1]


def test_the_columns_are_named_again_where_they_change(capsys):
    table = EpochTable()
    for row in ({"epoch": 0, "CIDEr": 0.5}, {"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.5}):
        table.show(row)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["epoch", "CIDEr"],
        ["0", "0.5000"],
        ["epoch", "loss"],
        ["1", "2.0000"],
        ["2", "1.5000"],
    ]


def cache_of(folder, *encoders):
    """Caches of so many encoders, of which nothing but the name is known."""
    for encoder in encoders:
        with h5py.File(features_path(folder, encoder), "w") as file:
            file.attrs["encoder"] = encoder
        with h5py.File(features_path(folder, encoder, version=1), "w") as file:
            file.attrs["encoder"] = encoder


def chosen(*flags):
    return train.choose_encoder(options_of(*flags)).captioner.encoder


def test_the_encoder_is_the_one_whose_features_are_cached(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "scenes")
    flags = ["--dataset", copy, "--preset", "paper"]
    assert chosen(*flags) == "vgg16"
    cache_of(copy, "timm/resnet18")
    assert chosen(*flags) == "timm/resnet18"
    assert "the encoder is timm/resnet18, whose features are cached" in capsys.readouterr().out
    assert chosen(*flags, "--encoder", "vgg16") == "vgg16"
    assert chosen(*flags, "--finetune_encoder") == "vgg16"
    assert chosen(*flags, "--encoder_weights", "random") == "vgg16"
    cache_of(copy, "squeezenet1_1")
    with pytest.raises(UserError, match="features of squeezenet1_1, timm/resnet18; choose one"):
        chosen(*flags)
    assert chosen(*flags, "--encoder", "resnet101") == "resnet101"
    cache_of(copy, "vgg16")
    assert chosen(*flags) == "vgg16"


def test_what_a_captioner_was_trained_on_need_not_be_named(folder, tmp_path, monkeypatch):
    """Nor its encoder; the same one may be named, and another is refused."""
    copy = shutil.copytree(folder, tmp_path / "drawings")
    it = tmp_path / "it.pt"
    run(monkeypatch, "--dataset", copy, *SMALL, *NO_PRETRAINING, "--epochs", 1, "--output", it)
    assert read_checkpoint(it)["about"]["folder"] == str(copy)
    cache_of(copy, "squeezenet1_1")
    assert options_of("--resume", tmp_path / "it.last.pt").folder == copy
    assert chosen("--resume", tmp_path / "it.last.pt") == "scenes_vgg"
    (copy / "features-squeezenet1_1.h5").unlink()
    tuning = [*COMMON, "--cider_tune", "--max_iterations", 1, "--resume", it]
    assert options_of(*tuning).folder == copy
    run(monkeypatch, *tuning, "--encoder", "scenes_vgg", "--output", tmp_path / "tuned.pt")
    with pytest.raises(UserError, match="it.pt is not of --encoder vgg16, but scenes_vgg"):
        run(monkeypatch, *tuning, "--encoder", "vgg16")
    copy.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="was trained on scenes, and there is no .*drawings; make"):
        options_of(*tuning)
    (tmp_path / "data").mkdir()
    (tmp_path / "moved").rename(tmp_path / "data/scenes")
    assert options_of(*tuning).folder == Path("data/scenes")


def test_the_preset_is_that_of_the_data_and_not_of_their_folder(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "flickr")
    assert options_of("--dataset", copy).captioner.embed_dim == 128
    assert options_of("--dataset", copy, "--lrp_tune").training.max_iterations == 500


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_a_resumed_training_ends_like_an_uninterrupted_one(folder, tmp_path, monkeypatch, schedule):
    flags = ["--dataset", folder, *SMALL, "--pretrain_epochs", 1, "--epochs", 3]
    flags += ["--schedule", schedule, "--finetune_encoder"]
    if schedule == "cosine":
        flags += ["--ema_decay", 0.9]
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    run(monkeypatch, *flags, "--output", whole)
    train_epoch = Trainer.train_epoch

    def stop_in_the_last_epoch(self):
        if self.progress.epoch == 3:
            raise KeyboardInterrupt
        train_epoch(self)

    monkeypatch.setattr(Trainer, "train_epoch", stop_in_the_last_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *flags, "--output", parts)
    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    run(monkeypatch, *flags, "--output", parts, "--resume", tmp_path / "parts.last.pt")
    assert_same_weights(tmp_path / "whole.last.pt", tmp_path / "parts.last.pt")
    averages = []
    for path in ("whole.last.pt", "parts.last.pt"):
        averages.append(read_checkpoint(tmp_path / path)["training"]["average"])
    assert bool(averages[0]) == (schedule == "cosine")
    for name, value in averages[0].get("average", {}).items():
        assert torch.equal(value, averages[1]["average"][name])


def test_the_cosine_comes_down_by_the_last_step(folder, tmp_path, monkeypatch):
    """Also where --max_iterations ends a training before its epochs do.

    And no training goes on along another cosine.
    """
    flags = ["--dataset", folder, *SMALL, *NO_PRETRAINING, "--output", tmp_path / "it.pt"]
    flags += ["--schedule", "cosine", "--decoder_lr", 0.1]
    rates = []

    def note_rate(optimizer, *_):
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(trainer, "clip_gradients", note_rate)
    run(monkeypatch, *flags, "--epochs", 50, "--max_iterations", 5)
    assert len(rates) == 5
    assert max(rates) > 0.05
    assert rates[-1] < 1e-5
    with pytest.raises(UserError, match="takes 5 steps, not 9"):
        run(monkeypatch, *flags, "--epochs", 3, "--resume", tmp_path / "it.last.pt")


def test_a_frozen_encoder_stays_as_it_is_and_a_tuned_one_moves(folder, tmp_path, monkeypatch):
    flags = ["--dataset", folder, *SMALL, *NO_PRETRAINING, "--epochs", 1]
    for name, flag in (("frozen", "--no-finetune_encoder"), ("tuned", "--finetune_encoder")):
        run(monkeypatch, *flags, flag, "--output", tmp_path / f"{name}.pt")
    torch.manual_seed(0)  # the encoder is what a run draws first
    fresh = build_encoder("scenes_vgg").state_dict()
    frozen = weights(tmp_path / "frozen.last.pt")
    tuned = weights(tmp_path / "tuned.last.pt")
    for name, value in fresh.items():
        assert torch.equal(frozen[f"encoder.{name}"], value)
    assert not torch.equal(tuned["encoder.net.0.weight"], fresh["net.0.weight"])
    assert not torch.equal(tuned["encoder.net.1.running_mean"], fresh["net.1.running_mean"])


def test_a_loss_that_is_not_finite_stops_the_training(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "precise", lambda logits: logits * float("nan"))
    flags = ["--epochs", 1, *NO_PRETRAINING, "--output", tmp_path / "it.pt"]
    with pytest.raises(UserError, match="the loss is nan in epoch 1, step 0"):
        run(monkeypatch, "--dataset", folder, *SMALL, *flags)
    assert not list(tmp_path.iterdir())


def test_features_of_other_weights_are_refused():
    class Cached:
        features = "scenes_vgg"
        stage = None
        features_attributes = {"weights_hash": "of others"}

    with pytest.raises(UserError, match="come from other weights"):
        train.check_cache(Cached, build_encoder("scenes_vgg", "random"))


@pytest.mark.parametrize("memory", [[], ["--cache_in_memory"]])
def test_training_on_cached_features_takes_the_encoder_that_made_them(
    folder, tmp_path, monkeypatch, capsys, memory
):
    copy = shutil.copytree(folder, tmp_path / "scenes")
    torch.manual_seed(5)
    encoder = build_encoder("scenes_vgg", "random")
    cache_features(copy, encoder, workers=0)
    shutil.rmtree(copy / "train")  # the images are not needed any more
    flags = ["--epochs", 1, "--augment", "--output", tmp_path / "it.pt"]
    run(monkeypatch, "--dataset", copy, *SMALL, *flags, *memory)
    assert "so no image is augmented" in capsys.readouterr().out
    trained = load_captioner(tmp_path / "it.pt").encoder.state_dict()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, trained[name])


STAGE = "18"  # the last two convolutions of the scenes' VGG


def moved_parameters(captioner, encoder):
    """The numbers of the layers whose weights are others in a captioner than in its encoder."""
    before = encoder.state_dict()
    moved = set()
    for name, value in captioner.encoder.state_dict().items():
        if not torch.equal(value, before[name]):
            moved.add(int(name.split(".")[1]))
    return moved


@pytest.mark.parametrize("cached", [False, True])
def test_the_last_stages_of_an_encoder_are_trained(folder, tmp_path, monkeypatch, capsys, cached):
    copy = shutil.copytree(folder, tmp_path / "scenes")
    torch.manual_seed(5)
    encoder = build_encoder("scenes_vgg", "random")
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    flags = ["--encoder_weights", tmp_path / "encoder.pth"]
    if cached:
        cache_features(copy, encoder, workers=0, cut=CutEncoder(encoder, STAGE))
        shutil.rmtree(copy / "train")  # the images are not needed any more
        flags = ["--cache_in_memory"]
    flags += ["--finetune_from", STAGE, "--encoder_lr", 1e-3, "--output", tmp_path / "it.pt"]
    run(monkeypatch, "--dataset", copy, *SMALL, "--epochs", 1, "--pretrain_epochs", 0, *flags)
    assert "trained from 18 on" in capsys.readouterr().out
    trained = load_captioner(tmp_path / "it.pt")
    # Convolutions and batch-norms; the statistics of these stay.
    assert moved_parameters(trained, encoder) == {18, 19, 22, 23}
    for name, value in encoder.state_dict().items():
        if "running" in name:
            assert torch.equal(value, trained.encoder.state_dict()[name])


def test_training_on_what_a_stage_is_given_is_training_on_images(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "scenes")
    encoder = build_encoder("scenes_vgg", "random")
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    common = ["--dataset", copy, *SMALL, "--max_iterations", 3, "--pretrain_epochs", 0]
    common += ["--finetune_from", STAGE, "--no-augment", "--dropout", 0, "--schedule", "constant"]
    weights = ["--encoder_weights", tmp_path / "encoder.pth"]
    run(monkeypatch, *common, *weights, "--output", tmp_path / "images.pt")
    cache_features(copy, encoder, workers=0, cut=CutEncoder(encoder, STAGE))
    run(monkeypatch, *common, "--output", tmp_path / "cached.pt")
    (of_images,) = rows_of(tmp_path / "images.pt")
    (of_cache,) = rows_of(tmp_path / "cached.pt")
    assert of_cache["loss"] == pytest.approx(of_images["loss"], rel=1e-3)  # rows are float16


def test_a_captioner_goes_on_learning_from_its_own_cached_stage(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "scenes")
    encoder = build_encoder("scenes_vgg", "random")
    cache_features(copy, encoder, workers=0, cut=CutEncoder(encoder, STAGE))
    shutil.rmtree(copy / "train")
    flags = ["--dataset", copy, "--finetune_from", STAGE, "--max_iterations", 1]
    run(monkeypatch, *flags, *SMALL, "--output", tmp_path / "it.pt")
    tuning = ["--cider_tune", "--resume", tmp_path / "it.pt", "--batch_size", 4, "--workers", 0]
    run(monkeypatch, *flags, *tuning, "--output", tmp_path / "tuned.pt")
    assert moved_parameters(load_captioner(tmp_path / "tuned.pt"), encoder) == {18, 19, 22, 23}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--finetune_from", "99"], "cannot be cut at '99'"),
        (["--finetune_from", "19", "--finetune_encoder"], "choose --finetune_encoder, for all"),
        (["--finetune_from", "1", "--encoder", "timm/vit_tiny_patch16_224"], "no chain of stages"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(folder, tmp_path, monkeypatch, flags, message):
    weights = ["--encoder_weights", "random", "--output", tmp_path / "it.pt"]
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--dataset", folder, *SMALL, *weights, *flags)
    assert not list(tmp_path.iterdir())


def test_presets_are_defaults_and_flags_win():
    scenes = options_of()
    assert (scenes.captioner.encoder, scenes.training.schedule) == ("scenes_vgg", "cosine")
    flickr = options_of("--dataset", "flickr30k", "--epochs", 3)
    assert (flickr.captioner.encoder, flickr.training.schedule) == ("vgg16", "plateau")
    assert (flickr.training.decoder_lr, flickr.training.epochs) == (5e-4, 3)
    assert flickr.output == Path("checkpoints/flickr30k-gridtd.pt")
    adaptive = options_of("--dataset", "coco2017", "--model_type", "adaptive")
    assert (adaptive.objective.ss_prob, adaptive.training.epochs) == (0.2, 30)
    aoa = options_of("--dataset", "coco2017", "--model_type", "aoa")
    assert (aoa.captioner.dropout, aoa.training.epochs) == (0.3, 50)
    tuned = options_of("--dataset", "flickr8k", "--preset", "flickr8k", "--lrp_tune")
    assert (tuned.training.max_iterations, tuned.training.schedule) == (320, "constant")
    assert tuned.settings["embed_dropout"] == 0.0


def test_every_default_names_a_flag():
    """And no flag is declared twice."""
    names = [flag.name for flag in FLAGS]
    assert len(names) == len(set(names))
    tables = [*train.PRESETS.values(), *train.PAPER_MODELS.values(), *train.TUNING.values()]
    for table in [*tables, train.TUNING_COMMON]:
        assert table.keys() <= {*names, "max_length"}


def test_no_fine_tuning_takes_the_file_of_another():
    commands = (
        [],
        ["--cider_tune"],
        ["--lrp_cider_tune"],
        ["--lrp_tune"],
        ["--lrp_tune", "--lrp_lambda", "1"],
        ["--lrp_tune", "--lrp_form", "image"],
        ["--lrp_tune", "--lrp_control", "random"],
    )
    outputs = [str(options_of(*flags).output) for flags in commands]
    assert len(set(outputs)) == 7
    assert outputs[3] == "checkpoints/scenes-gridtd-lrp_tune.pt"
    assert outputs[4] == "checkpoints/scenes-gridtd-lrp_tune-lambda_1.0.pt"


OTHER_FLAGS = {  # of a run that goes on: what it may not be changed to, and the complaint
    "seed": (1, "seed 0, not 1"),
    "schedule": ("constant", "schedule cosine, not constant"),
    "batch_size": (4, "batch_size 8, not 4"),
    "decoder_lr": (1e-7, "decoder_lr 0.003, not 1e-07"),
    "ema_decay": (0.9, "ema_decay 0.0, not 0.9"),
    "dropout": (0.1, "dropout 0.3, not 0.1"),
    "num_head": (4, "another captioner, vocabulary"),
    "hidden_dim": (24, "another captioner, vocabulary"),
}


def test_a_resumed_training_goes_on_in_its_own_file(folder, tmp_path, monkeypatch):
    """Whatever it was called; and what a fine-tuning starts from names the file that it goes to."""
    flags = ["--dataset", folder, *SMALL, *NO_PRETRAINING, "--model_type", "aoa"]
    run(monkeypatch, *flags, "--epochs", 1, "--output", tmp_path / "one.pt")
    resumed = ["--resume", tmp_path / "one.last.pt"]
    assert options_of(*resumed).output == tmp_path / "one.pt"
    assert options_of(*resumed, "--cider_tune").output == tmp_path / "one-cider_tune.pt"
    tuning = ["--dataset", folder, *COMMON, "--cider_tune", "--max_iterations", 2]
    run(monkeypatch, *tuning, "--resume", tmp_path / "one.pt")
    tuned = tmp_path / "one-cider_tune.last.pt"
    assert tuned.exists()
    options = options_of("--cider_tune", "--resume", tuned)
    assert options.continues
    assert options.output == tmp_path / "one-cider_tune.pt"
    with pytest.raises(UserError, match="to go on with it give --cider_tune too"):
        run(monkeypatch, *flags, "--resume", tuned)
    for name, (value, complaint) in OTHER_FLAGS.items():
        with pytest.raises(UserError, match=complaint):
            run(monkeypatch, *flags, *resumed, f"--{name}", value)
    words = read_json(folder / "vocabulary.json")
    other = shutil.copytree(folder, tmp_path / "other/scenes")
    write_json(other / "vocabulary.json", [words[0], *words[-4:0:-1], *words[-3:]])
    with pytest.raises(UserError, match="another captioner, vocabulary"):
        run(monkeypatch, *flags, *resumed, "--dataset", other)


def test_a_training_killed_after_its_last_step_still_gives_a_captioner(
    folder, tmp_path, monkeypatch
):
    """--checkpoint_every may fall on that step, and the validation that follows takes minutes."""
    start, output = tmp_path / "start.pt", tmp_path / "it.pt"
    flags = ["--dataset", folder, *SMALL, *NO_PRETRAINING, "--epochs", 1]
    run(monkeypatch, *flags, "--output", start)
    flags = ["--dataset", folder, *COMMON, "--lrp_tune", "--output", output]
    flags += ["--max_iterations", 2, "--checkpoint_every", 2]
    validate = Trainer.validate

    def killed_at_the_end(self, captioner):
        if self.last.exists():
            raise KeyboardInterrupt
        return validate(self, captioner)

    monkeypatch.setattr(Trainer, "validate", killed_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *flags, "--resume", start)
    assert not output.exists()
    monkeypatch.setattr(Trainer, "validate", validate)
    run(monkeypatch, *flags, "--resume", tmp_path / "it.last.pt")
    assert load_captioner(output)
    assert len(rows_of(output)) == 2


USELESS_FLAGS = [
    ("--lrp_tune --label_smoothing 0.1", "--label_smoothing goes with training by cross-entropy"),
    (
        "--cider_tune --captions_per_image 1",
        "--captions_per_image goes with training by cross-entropy or --lrp_tune only",
    ),
    ("--cider_tune --hidden_dim 8", "--hidden_dim goes with training"),
    ("--lrp_cider_tune --max_length 9", "--max_length goes with training"),
    ("--cider_tune --lrp_control random", "--lrp_control goes with --lrp_tune only"),
    (
        "--lrp_tune --lrp_form image --lrp_control random",
        "--lrp_control goes with --lrp_form last_layer only",
    ),
    ("--samples 3", "--samples goes with --cider_tune or --lrp_cider_tune only"),
]


@pytest.mark.parametrize("flags, complaint", USELESS_FLAGS)
def test_a_flag_that_would_do_nothing_is_refused(flags, complaint):
    with pytest.raises(UserError, match=complaint):
        options_of(*flags.split())


def test_an_encoder_that_has_learnt_is_not_pretrained_unless_asked_for(
    folder, tmp_path, monkeypatch
):
    torch.save(build_encoder("scenes_vgg", "random").state_dict(), tmp_path / "encoder.pt")
    asked = []

    def note_epochs(encoder, dataset, epochs, config, device):
        asked.append(epochs)

    monkeypatch.setattr(train, "pretrain_encoder", note_epochs)
    flags = ["--preset", "scenes", "--dataset", folder, *SMALL, "--epochs", 1]
    flags += ["--output", tmp_path / "it.pt"]
    learnt = ["--encoder_weights", tmp_path / "encoder.pt"]
    run(monkeypatch, *flags, *learnt)
    assert asked == []
    run(monkeypatch, *flags)
    run(monkeypatch, *flags, *learnt, "--pretrain_epochs", 2)
    assert asked == [4, 2]


def test_a_captioner_with_an_encoder_of_its_own_is_tuned_on_images(
    folder, tmp_path, monkeypatch, capsys
):
    """Where the cached features are of other weights."""
    copy = shutil.copytree(folder, tmp_path / "scenes")
    flags = ["--epochs", 1, *NO_PRETRAINING, "--output", tmp_path / "it.pt"]
    run(monkeypatch, "--dataset", copy, *SMALL, *flags)
    cache_features(copy, build_encoder("scenes_vgg", "random"), workers=0)
    flags = ["--cider_tune", "--max_iterations", 1, "--resume", tmp_path / "it.pt"]
    run(monkeypatch, "--dataset", copy, *COMMON, *flags)
    assert "so the images are read" in capsys.readouterr().out
    assert (tmp_path / "it-cider_tune.pt").exists()


@pytest.mark.parametrize("model_type", ["adaptive", "aoa", "soft"])
def test_the_other_captioners_train_too(folder, tmp_path, monkeypatch, model_type):
    output = tmp_path / "it.pt"
    flags = ["--epochs", 2, *NO_PRETRAINING, "--ss_prob", 0.3, "--output", output]
    run(monkeypatch, "--dataset", folder, *SMALL, "--model_type", model_type, *flags)
    rows = rows_of(output)
    assert rows[1]["loss"] < rows[0]["loss"]
    assert ("attention_loss" in rows[0]) == (model_type == "soft")
    captioner = load_captioner(output)
    assert captioner.config.model_type == model_type
    (explanation,) = captioner.explain(torch.randn(1, 3, 128, 128), [["a", "the"]])
    assert explanation.image_relevance.any(-1).any(-1).all()


MISTAKES = [
    (["--dataset", "nowhere"], "is not a prepared dataset"),
    (["--resume", "README.md"], "not a checkpoint"),
    (["--device", "cuda:99"], "cannot be used on this machine"),
    (["--output", "README.md/it.pt"], "README.md is not a folder"),
    (["--cache_in_memory"], "--cache_in_memory needs cached features"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(folder, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = ["--dataset", folder, *NO_PRETRAINING, *arguments]
    assert message in refused(train, flags, monkeypatch, capsys)


def training_process(folder, output, *flags):
    arguments = ["--dataset", folder, *SMALL, *NO_PRETRAINING, "--output", output, *flags]
    arguments += ["--epochs", 6, "--finetune_encoder", "--augment", "--ss_prob", 0.2]
    arguments += ["--checkpoint_every", 2]
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def killed_at_a_random_moment(folder, output, chooser):
    """Start or go on with a training, and kill it after it has written a checkpoint.

    Returns whether it was still running.
    """
    last = output.with_suffix(".last.pt")
    seen = last.stat().st_mtime_ns if last.exists() else None
    resume = ["--resume", last] if last.exists() else []
    process = training_process(folder, output, *resume)
    while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == seen):
        time.sleep(0.002)
    time.sleep(chooser.uniform(0, 0.15))
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running


def test_a_training_killed_at_any_moment_goes_on_to_the_same_end(folder, tmp_path):
    """SIGKILL five times, each a random moment after the process went to work.

    That may be in a step, in validation or while it writes.
    """
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    last = parts.with_suffix(".last.pt")
    uninterrupted = training_process(folder, whole)
    chooser = Random(0xDEAD)
    killed = 0
    for _ in range(5):
        killed += killed_at_a_random_moment(folder, parts, chooser)
        read_checkpoint(last)  # whole, whenever it was
    assert killed >= 4
    for process in (training_process(folder, parts, "--resume", last), uninterrupted):
        process.communicate()
        assert process.returncode == 0
    assert_same_weights(tmp_path / "whole.last.pt", last)
    rows = rows_of(whole), rows_of(parts)
    for row in [*rows[0], *rows[1]]:
        del row["seconds"]
    assert rows[0] == rows[1]
    assert not list(tmp_path.glob(".*"))  # what was half-written is gone


def test_a_finished_captioner_is_not_resumed_but_tuned(folder, tmp_path, monkeypatch):
    flags = ["--dataset", folder, *SMALL, *NO_PRETRAINING]
    run(monkeypatch, *flags, "--epochs", 1, "--output", tmp_path / "it.pt")
    flags += ["--epochs", 2, "--resume", tmp_path / "it.pt", "--output", tmp_path / "more.pt"]
    with pytest.raises(UserError, match="wants the .last.pt file"):
        run(monkeypatch, *flags)
