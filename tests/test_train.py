"""Training: it learns, the same seed gives the same numbers, a resumed run ends where an uninterrupted one does."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from fixtures import prepared_scenes, refused
from torch.utils.data import DataLoader

import objectives
import train
from basemodel import read_checkpoint
from captiondata import CaptionDataset
from captioner import MODELS, CaptionerConfig, build_captioner, load_captioner
from commandline import UserError, read_json, write_json
from images import image_transform
from preparedataset import cache_features

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["--batch_size", "8", "--workers", "0", "--device", "cpu"]
SMALL = ["--embed_dim", "12", "--hidden_dim", "16", *COMMON]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared_scenes(tmp_path_factory.mktemp("train") / "scenes", 24, 6, 6)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()


def weights(path):
    return read_checkpoint(path)["state_dict"]


def test_training_lowers_the_loss_and_writes_what_it_says(folder, tmp_path, monkeypatch):
    output = tmp_path / "it.pt"
    run(
        monkeypatch,
        "--dataset",
        folder,
        *SMALL,
        "--epochs",
        3,
        "--pretrain_epochs",
        1,
        "--output",
        output,
    )
    rows = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"BLEU-4", "CIDEr", "seconds"} <= rows[0].keys()
    captioner = load_captioner(output)
    assert captioner.caption(torch.zeros(1, 3, 128, 128))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "it.jsonl",
        "it.last.pt",
        "it.pt",
        "it.training.png",
    ]


def test_the_same_seed_gives_the_same_captioner(folder, tmp_path, monkeypatch):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(
            monkeypatch,
            "--dataset",
            folder,
            *SMALL,
            "--epochs",
            1,
            "--pretrain_epochs",
            0,
            "--seed",
            seed,
            "--output",
            tmp_path / f"{name}.pt",
        )
    a, b, c = (weights(tmp_path / f"{name}.last.pt") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_a_resumed_training_ends_like_an_uninterrupted_one(folder, tmp_path, monkeypatch, schedule):
    flags = [
        "--dataset",
        folder,
        *SMALL,
        "--pretrain_epochs",
        1,
        "--epochs",
        3,
        "--schedule",
        schedule,
        "--finetune_encoder",
    ]
    flags += ["--ema_decay", 0.9] if schedule == "cosine" else []
    run(monkeypatch, *flags, "--output", tmp_path / "whole.pt")
    interrupted = train.train_epoch

    def stop_in_the_last_epoch(*arguments):
        if arguments[5].epoch == 3:
            raise KeyboardInterrupt
        return interrupted(*arguments)

    monkeypatch.setattr(train, "train_epoch", stop_in_the_last_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *flags, "--output", tmp_path / "parts.pt")
    monkeypatch.setattr(train, "train_epoch", interrupted)
    run(
        monkeypatch,
        *flags,
        "--output",
        tmp_path / "parts.pt",
        "--resume",
        tmp_path / "parts.last.pt",
    )
    whole, parts = (weights(tmp_path / f"{name}.last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    averages = [
        read_checkpoint(tmp_path / f"{name}.last.pt")["training"]["average"]
        for name in ("whole", "parts")
    ]
    assert bool(averages[0]) == (schedule == "cosine")
    assert all(
        torch.equal(value, averages[1]["average"][key])
        for key, value in averages[0].get("average", {}).items()
    )


def test_the_cosine_comes_down_by_the_last_step(folder, tmp_path, monkeypatch):
    """Also where --max_iterations ends a training before its epochs do; and nobody goes on along another cosine."""
    flags = [
        "--dataset",
        folder,
        *SMALL,
        "--pretrain_epochs",
        0,
        "--output",
        tmp_path / "it.pt",
        "--schedule",
        "cosine",
        "--decoder_lr",
        0.1,
    ]
    rates = []
    monkeypatch.setattr(
        train, "clip", lambda optimizer, args: rates.append(optimizer.param_groups[0]["lr"])
    )
    run(monkeypatch, *flags, "--epochs", 50, "--max_iterations", 5)
    assert len(rates) == 5 and max(rates) > 0.05 and rates[-1] < 1e-5
    with pytest.raises(UserError, match="cosine takes 5 steps, these flags 9"):
        run(monkeypatch, *flags, "--epochs", 3, "--resume", tmp_path / "it.last.pt")


def test_the_average_of_the_weights_by_hand():
    source = torch.nn.Linear(1, 1)
    source.bias.requires_grad_(False).fill_(-0.0)
    average, values, expected = (
        train.WeightAverage(source, 0.5),
        [3.0, -1.0, 4.0, 1.0, 5.0],
        source.weight.item(),
    )
    for steps, value in enumerate(values * 5):
        source.weight.data.fill_(value)
        average.update(steps)
        decay = min(0.5, (1 + steps) / (10 + steps))
        expected = decay * expected + (1 - decay) * value
    assert average.captioner().weight.item() == pytest.approx(expected)
    assert (
        average.captioner().bias.signbit().all()
    )  # what is frozen keeps every bit, and with them the hash of an encoder
    assert train.WeightAverage(source, 0.0).captioner() is source


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_share_of_the_start_by_hand(decay):
    source = torch.nn.Linear(1, 1)
    source.weight.data.fill_(2.0)
    source.bias.requires_grad_(False).fill_(-0.0)
    average = train.WeightAverage(source, decay, 0.25)
    source.weight.data.fill_(6.0)
    average.update(1000)
    last = 4.0 if decay else 6.0
    assert (
        average.captioner().weight.item() == 0.75 * last + 0.25 * 2.0
        and average.captioner().bias.signbit().all()
    )
    assert source.weight.item() == 6.0
    again = train.WeightAverage(torch.nn.Linear(1, 1), decay, 0.25)
    again.load_state_dict(average.state_dict())
    if decay:
        assert again.captioner().weight.item() == average.captioner().weight.item()
    assert again.start.weight.item() == 2.0


def test_a_trained_batch_norm_is_averaged_whole():
    """Its statistics belong to its weights; a buffer of a module without weights, as the silence of a captioner, stays."""
    source = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1))
    source[1].requires_grad_(False)
    source.register_buffer("silence", torch.tensor([-torch.inf]))
    average = train.WeightAverage(source, 0.0, 0.5)
    for layer in source[:2]:
        layer.running_mean.fill_(10.0)
        layer.weight.data.fill_(3.0)
    kept = average.captioner()
    assert (
        kept[0].running_mean.item() == 5.0
        and kept[0].weight.item() == 2.0
        and kept.silence.isneginf().all()
    )
    assert kept[1].running_mean.item() == 10.0 and kept[1].weight.item() == 3.0


def test_a_frozen_encoder_stays_as_it_is_and_a_tuned_one_moves(folder, tmp_path, monkeypatch):
    for name, flag in (("frozen", "--no-finetune_encoder"), ("tuned", "--finetune_encoder")):
        run(
            monkeypatch,
            "--dataset",
            folder,
            *SMALL,
            "--epochs",
            1,
            "--pretrain_epochs",
            0,
            flag,
            "--output",
            tmp_path / f"{name}.pt",
        )
    torch.manual_seed(0)  # what a run draws first: the encoder
    fresh = train.build_encoder("scenes_vgg").state_dict()
    frozen, tuned = (weights(tmp_path / f"{name}.last.pt") for name in ("frozen", "tuned"))
    assert all(torch.equal(frozen[f"encoder.{key}"], value) for key, value in fresh.items())
    assert not torch.equal(tuned["encoder.net.0.weight"], fresh["net.0.weight"])
    assert not torch.equal(tuned["encoder.net.1.running_mean"], fresh["net.1.running_mean"])


def test_a_training_batch_is_shifted_and_cut(folder):
    captions = torch.tensor([[[8, 3, 9, 0, 0, 0], [8, 1, 2, 9, 0, 0]]])
    inputs, targets = objectives.training_batch(captions, 2, pad=0)
    assert inputs.tolist() == [[[8, 1, 2], [8, 3, 9]]]
    assert targets.tolist() == [[[1, 2, 9], [3, 9, 0]]]
    picked, _ = objectives.training_batch(captions.expand(50, 2, 6), 1, pad=0)
    assert picked.shape[1] == 1 and len({tuple(row.tolist()) for row in picked[:, 0, :3]}) == 2


def test_object_targets_are_the_annotated_categories(folder):
    dataset = CaptionDataset(folder, "train")
    names = list(dataset.info["categories"])
    for entry, row in zip(dataset.entries, train.object_targets(dataset)):
        assert {names[column] for column in row.nonzero().flatten()} == {
            thing["category"] for thing in entry["objects"]
        }


def test_a_loss_that_is_not_finite_stops_the_training(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "precise", lambda logits: logits * float("nan"))
    with pytest.raises(UserError, match="the loss is nan in epoch 1, step 0"):
        run(
            monkeypatch,
            "--dataset",
            folder,
            *SMALL,
            "--epochs",
            1,
            "--pretrain_epochs",
            0,
            "--output",
            tmp_path / "it.pt",
        )
    assert not list(tmp_path.iterdir())


def test_features_of_other_weights_are_refused(folder, monkeypatch):
    class Cached:
        features, features_attributes = "scenes_vgg", {"weights_hash": "of others"}

    with pytest.raises(UserError, match="come from other weights"):
        train.check_cache(Cached, train.build_encoder("scenes_vgg", "random"))


def test_training_on_cached_features_takes_the_encoder_that_made_them(
    folder, tmp_path, monkeypatch, capsys
):
    copy = shutil.copytree(folder, tmp_path / "scenes")
    torch.manual_seed(5)
    encoder = train.build_encoder("scenes_vgg", "random")
    cache_features(copy, encoder, workers=0)
    shutil.rmtree(copy / "train")  # the images are not needed any more
    run(
        monkeypatch,
        "--dataset",
        copy,
        *SMALL,
        "--epochs",
        1,
        "--augment",
        "--output",
        tmp_path / "it.pt",
    )
    assert "so no image is augmented" in capsys.readouterr().out
    trained = load_captioner(tmp_path / "it.pt").encoder
    assert all(
        torch.equal(value, trained.state_dict()[key]) for key, value in encoder.state_dict().items()
    )


def test_presets_are_defaults_and_flags_win(monkeypatch):
    scenes, flickr = (
        train.parse_arguments([]),
        train.parse_arguments(["--dataset", "flickr30k", "--epochs", "3"]),
    )
    assert (scenes.encoder, scenes.schedule) == ("scenes_vgg", "cosine")
    assert (flickr.encoder, flickr.schedule, flickr.decoder_lr, flickr.epochs) == (
        "vgg16",
        "plateau",
        5e-4,
        3,
    )
    assert flickr.output == "checkpoints/flickr30k-gridtd.pt"
    adaptive, aoa = (
        train.parse_arguments(["--dataset", "coco2017", "--model_type", model])
        for model in ("adaptive", "aoa")
    )
    assert (adaptive.ss_prob, adaptive.epochs) == (0.2, 30) and (aoa.dropout, aoa.epochs) == (
        0.3,
        50,
    )


def test_no_fine_tuning_takes_the_file_of_another():
    flags = (
        ["--cider_tune"],
        ["--lrp_cider_tune"],
        ["--lrp_tune"],
        ["--lrp_tune", "--lrp_lambda", "1"],
        ["--lrp_tune", "--lrp_form", "image"],
    )
    outputs = [train.parse_arguments(list(those)).output for those in ([], *flags)]
    assert len(set(outputs)) == 6 and outputs[3] == "checkpoints/scenes-gridtd-lrp_tune.pt"


def test_a_resumed_training_goes_on_in_its_own_file(folder, tmp_path, monkeypatch):
    """Whatever it was called; and what a fine-tuning starts from names the file that it goes to."""
    flags = ["--dataset", folder, *SMALL, "--pretrain_epochs", 0]
    run(monkeypatch, *flags, "--model_type", "aoa", "--epochs", 1, "--output", tmp_path / "one.pt")
    resumed = ["--resume", f"{tmp_path}/one.last.pt"]
    assert train.parse_arguments(resumed).output == f"{tmp_path}/one.pt"
    assert (
        train.parse_arguments([*resumed, "--cider_tune"]).output == f"{tmp_path}/one-cider_tune.pt"
    )
    run(
        monkeypatch,
        "--dataset",
        folder,
        *COMMON,
        "--cider_tune",
        "--max_iterations",
        2,
        "--resume",
        tmp_path / "one.pt",
    )
    tuned = tmp_path / "one-cider_tune.last.pt"
    assert tuned.exists() and train.parse_arguments(
        ["--cider_tune", "--resume", str(tuned)]
    ).output == str(tmp_path / "one-cider_tune.pt")
    with pytest.raises(UserError, match="to go on with it give --cider_tune too"):
        run(monkeypatch, *flags, "--resume", tuned)
    for name, value, told in (
        ("seed", 1, "--seed 0, not 1"), ("schedule", "constant", "--schedule cosine, not constant"), ("batch_size", 4, "--batch_size 8, not 4"),
        ("decoder_lr", 1e-7, "--decoder_lr 0.003, not 1e-07"), ("ema_decay", 0.9, "--ema_decay 0.0, not 0.9"), ("dropout", 0.1, "--dropout 0.3, not 0.1"),
        ("num_head", 4, "another captioner, vocabulary"), ("hidden_dim", 24, "another captioner, vocabulary"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            run(monkeypatch, *flags, "--model_type", "aoa", *resumed, f"--{name}", value)
    words = read_json(folder / "vocabulary.json")
    other = shutil.copytree(folder, tmp_path / "other/scenes")
    write_json(other / "vocabulary.json", [words[0], *words[-4:0:-1], *words[-3:]])
    with pytest.raises(UserError, match="another captioner, vocabulary"):
        run(monkeypatch, *flags[2:], "--dataset", other, "--model_type", "aoa", *resumed)


def test_a_training_killed_after_its_last_step_still_gives_a_captioner(
    folder, tmp_path, monkeypatch
):
    """--checkpoint_every may fall on that step, and the validation that follows takes minutes."""
    run(
        monkeypatch,
        "--dataset",
        folder,
        *SMALL,
        "--epochs",
        1,
        "--pretrain_epochs",
        0,
        "--output",
        tmp_path / "start.pt",
    )
    flags = [
        "--dataset",
        folder,
        *COMMON,
        "--lrp_tune",
        "--max_iterations",
        2,
        "--checkpoint_every",
        2,
        "--output",
        tmp_path / "it.pt",
    ]
    validate = train.validate

    def killed_at_the_end(captioner, *arguments):
        if (tmp_path / "it.last.pt").exists():
            raise KeyboardInterrupt
        return validate(captioner, *arguments)

    monkeypatch.setattr(train, "validate", killed_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *flags, "--resume", tmp_path / "start.pt")
    assert not (tmp_path / "it.pt").exists()
    monkeypatch.setattr(train, "validate", validate)
    run(monkeypatch, *flags, "--resume", tmp_path / "it.last.pt")
    assert (
        load_captioner(tmp_path / "it.pt")
        and len((tmp_path / "it.jsonl").read_text().splitlines()) == 2
    )


@pytest.mark.parametrize("flags, told", [
    (["--lrp_tune", "--label_smoothing", 0.1], "--label_smoothing goes with training by cross-entropy only"),
    (["--cider_tune", "--captions_per_image", 1], "--captions_per_image goes with training by cross-entropy or --lrp_tune only"),
    (["--cider_tune", "--hidden_dim", 8], "--hidden_dim goes with training"), (["--lrp_cider_tune", "--max_length", 9], "--max_length goes with training"),
    (["--samples", 3], "--samples goes with --cider_tune or --lrp_cider_tune only"),
])  # fmt: skip
def test_a_flag_that_would_do_nothing_is_refused(flags, told):
    with pytest.raises(UserError, match=told):
        train.parse_arguments(list(map(str, flags)))


def test_an_encoder_that_has_learnt_is_not_pretrained_unless_asked_for(
    folder, tmp_path, monkeypatch
):
    torch.save(train.build_encoder("scenes_vgg", "random").state_dict(), tmp_path / "encoder.pt")
    epochs = []
    monkeypatch.setattr(
        train,
        "pretrain_encoder",
        lambda encoder, dataset, args, device: epochs.append(args.pretrain_epochs),
    )
    flags = [
        "--preset",
        "scenes",
        "--dataset",
        folder,
        *SMALL,
        "--epochs",
        1,
        "--output",
        tmp_path / "it.pt",
    ]
    run(monkeypatch, *flags, "--encoder_weights", tmp_path / "encoder.pt")
    assert epochs == []
    run(monkeypatch, *flags)
    run(monkeypatch, *flags, "--encoder_weights", tmp_path / "encoder.pt", "--pretrain_epochs", 2)
    assert epochs == [4, 2]


def test_a_captioner_with_an_encoder_of_its_own_is_tuned_on_images(
    folder, tmp_path, monkeypatch, capsys
):
    """Where the cached features are of other weights."""
    copy = shutil.copytree(folder, tmp_path / "scenes")
    run(
        monkeypatch,
        "--dataset",
        copy,
        *SMALL,
        "--epochs",
        1,
        "--pretrain_epochs",
        0,
        "--output",
        tmp_path / "it.pt",
    )
    cache_features(copy, train.build_encoder("scenes_vgg", "random"), workers=0)
    run(
        monkeypatch,
        "--dataset",
        copy,
        *COMMON,
        "--cider_tune",
        "--max_iterations",
        1,
        "--resume",
        tmp_path / "it.pt",
    )
    assert (
        "so the images are read" in capsys.readouterr().out
        and (tmp_path / "it-cider_tune.pt").exists()
    )


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 10, 11, 20])
def test_a_cosine_of_any_number_of_steps_comes_down(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    scheduler, rates = train.one_cycle(optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[-1] < 1e-4 or steps == 1


@pytest.mark.parametrize("model_type", ["adaptive", "aoa"])
def test_the_other_captioners_train_too(folder, tmp_path, monkeypatch, model_type):
    output = tmp_path / "it.pt"
    run(
        monkeypatch,
        "--dataset",
        folder,
        *SMALL,
        "--model_type",
        model_type,
        "--epochs",
        2,
        "--pretrain_epochs",
        0,
        "--ss_prob",
        0.3,
        "--output",
        output,
    )
    rows = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert load_captioner(output).config.model_type == model_type


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "nowhere"], "is not a prepared dataset"),
    (["--resume", "README.md"], "not a checkpoint"),
    (["--device", "cuda:99"], "cannot be used on this machine"),
    (["--output", "README.md/it.pt"], "Not a directory"),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(folder, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = arguments if "--dataset" in arguments else ["--dataset", folder, *arguments]
    assert message in refused(train, [*flags, "--pretrain_epochs", 0], monkeypatch, capsys)


def training_process(folder, output, *flags):
    arguments = ["--dataset", folder, *SMALL, "--epochs", 6, "--pretrain_epochs", 0, "--finetune_encoder", "--augment", "--ss_prob", 0.2,
                 "--checkpoint_every", 2, "--output", output, *flags]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_a_training_killed_at_any_moment_goes_on_to_the_same_end(folder, tmp_path):
    """SIGKILL five times, each a random moment after the process went to work, in a step, in validation or while writing."""
    whole = training_process(folder, tmp_path / "whole.pt")
    output, moments = tmp_path / "parts.pt", Random(0xDEAD)
    last, killed = output.with_suffix(".last.pt"), 0
    for _ in range(5):
        seen = last.stat().st_mtime_ns if last.exists() else None
        process = training_process(folder, output, *(["--resume", last] if last.exists() else []))
        while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == seen):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.15))
        killed += process.poll() is None
        process.kill()
        process.communicate()
        read_checkpoint(last)  # whole, whenever it was
    assert killed >= 4
    done = training_process(folder, output, "--resume", last)
    assert done.communicate() and done.returncode == 0
    assert whole.communicate() and whole.returncode == 0
    one, other = (weights(tmp_path / f"{name}.last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert [row | {"seconds": 0} for row in rows[0]] == [row | {"seconds": 0} for row in rows[1]]
    assert not list(tmp_path.glob(".*"))  # what was half-written is gone


def test_augmentation_depends_on_seed_epoch_and_image_only(folder):
    dataset = CaptionDataset(folder, "train", image_transform(32, augment=True))
    dataset.augmentation_seed, dataset.epoch = 3, 1
    first = [dataset[index][0] for index in (0, 1, 2)]
    state = torch.get_rng_state()
    torch.rand(5)
    again = [dataset[index][0] for index in (2, 1, 0)][::-1]
    assert all(map(torch.equal, first, again))
    dataset.epoch = 2
    assert not all(torch.equal(one, dataset[index][0]) for index, one in enumerate(first))
    torch.set_rng_state(state)
    dataset[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_batches_of_an_epoch_are_its_own():
    batches = train.epoch_batches(10, 4, seed=1, epoch=1)
    assert [len(batch) for batch in batches] == [4, 4] and len(set(sum(batches, []))) == 8
    assert batches == train.epoch_batches(10, 4, 1, 1) != train.epoch_batches(10, 4, 1, 2)
    assert [len(batch) for batch in train.epoch_batches(3, 4, 0, 1)] == [3]


def test_a_finished_captioner_is_not_resumed_but_tuned(folder, tmp_path, monkeypatch):
    run(
        monkeypatch,
        "--dataset",
        folder,
        *SMALL,
        "--epochs",
        1,
        "--pretrain_epochs",
        0,
        "--output",
        tmp_path / "it.pt",
    )
    with pytest.raises(UserError, match="wants the .last.pt file"):
        run(
            monkeypatch,
            "--dataset",
            folder,
            *SMALL,
            "--epochs",
            2,
            "--resume",
            tmp_path / "it.pt",
            "--output",
            tmp_path / "more.pt",
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("model_type", MODELS)
def test_a_step_of_cross_entropy_never_waits_for_the_gpu(folder, model_type):
    dataset, args = (
        CaptionDataset(folder, "train", image_transform(128)),
        train.parse_arguments(["--model_type", model_type]),
    )
    captioner = build_captioner(
        CaptionerConfig(model_type, "scenes_vgg"),
        dataset.vocabulary,
        train.build_encoder("scenes_vgg", "random"),
    ).cuda()
    step = train.TrainingStep(
        captioner.train(), train.build_objective(captioner, dataset, args), False, True
    )
    optimizer, _ = train.build_optimizer(captioner, args, 10)
    images, captions, indices = next(iter(DataLoader(dataset, 8)))
    images = images.cuda()

    def once():
        loss, _ = step(images, captions, indices)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        train.clip(optimizer, args)
        optimizer.step()
        return loss

    once()  # the first one allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)
