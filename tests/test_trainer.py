"""The parts of the training loop: averaged weights, schedules, batches, targets of the encoder."""

from dataclasses import replace

import pytest
import torch
from fixtures import prepared_scenes
from helpers import random_captioner
from torch.utils.data import DataLoader

from basemodel import read_checkpoint
from captiondata import CaptionDataset
from captioner import MODELS, CaptionerConfig, build_captioner
from commandline import UserError
from encoder import build_encoder
from images import image_transform
from objectives import CrossEntropy, training_batch
from plots import training_figure
from trainer import (
    Progress,
    Trainer,
    TrainingConfig,
    TrainingStep,
    WeightAverage,
    build_optimizer,
    clip_gradients,
    epoch_batches,
    object_targets,
    one_cycle,
)

SMALL_CONFIG = TrainingConfig(epochs=2, batch_size=4, workers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared_scenes(tmp_path_factory.mktemp("trainer") / "scenes", 8, 2, 2)


def linear(weight):
    """A layer whose weight is trained and whose bias, a negative zero, is frozen."""
    layer = torch.nn.Linear(1, 1)
    layer.weight.data.fill_(weight)
    layer.bias.requires_grad_(False).fill_(-0.0)
    return layer


def test_the_average_of_the_weights_by_hand():
    source = linear(2.0)
    average = WeightAverage(source, 0.5)
    expected = 2.0
    for steps, value in enumerate([3.0, -1.0, 4.0, 1.0, 5.0] * 5):
        source.weight.data.fill_(value)
        average.update(steps)
        decay = min(0.5, (1 + steps) / (10 + steps))
        expected = decay * expected + (1 - decay) * value
    assert average.captioner().weight.item() == pytest.approx(expected)
    # What is frozen keeps every bit, and with them the hash of an encoder.
    assert average.captioner().bias.signbit().all()
    assert WeightAverage(source, 0.0).captioner() is source


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_share_of_the_start_by_hand(decay):
    source = linear(2.0)
    average = WeightAverage(source, decay, 0.25)
    source.weight.data.fill_(6.0)
    average.update(1000)
    last = 4.0 if decay else 6.0
    assert average.captioner().weight.item() == 0.75 * last + 0.25 * 2.0
    assert average.captioner().bias.signbit().all()
    assert source.weight.item() == 6.0
    again = WeightAverage(torch.nn.Linear(1, 1), decay, 0.25)
    again.load_state_dict(average.state_dict())
    if decay:
        assert again.captioner().weight.item() == average.captioner().weight.item()
    assert again.initial.weight.item() == 2.0


def test_a_trained_batch_norm_is_averaged_whole():
    """Its statistics belong to its weights.

    A buffer of a module without weights, as the silence of a captioner, stays.
    """
    source = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1))
    source[1].requires_grad_(False)
    source.register_buffer("silence", torch.tensor([-torch.inf]))
    average = WeightAverage(source, 0.0, 0.5)
    for layer in source[:2]:
        layer.running_mean.fill_(10.0)
        layer.weight.data.fill_(3.0)
    kept = average.captioner()
    assert kept[0].running_mean.item() == 5.0
    assert kept[0].weight.item() == 2.0
    assert kept.silence.isneginf().all()
    assert kept[1].running_mean.item() == 10.0
    assert kept[1].weight.item() == 3.0


def test_a_training_batch_is_shifted_and_cut():
    captions = torch.tensor([[[8, 3, 9, 0, 0, 0], [8, 1, 2, 9, 0, 0]]])
    inputs, targets = training_batch(captions, 2, pad=0)
    assert inputs.tolist() == [[[8, 1, 2], [8, 3, 9]]]
    assert targets.tolist() == [[[1, 2, 9], [3, 9, 0]]]
    picked, _ = training_batch(captions.expand(50, 2, 6), 1, pad=0)
    assert picked.shape[1] == 1
    assert len({tuple(row.tolist()) for row in picked[:, 0, :3]}) == 2


def test_object_targets_are_the_annotated_categories(folder):
    dataset = CaptionDataset(folder, "train")
    names = list(dataset.info["categories"])
    for entry, row in zip(dataset.entries, object_targets(dataset)):
        found = {names[column] for column in row.nonzero().flatten()}
        assert found == {thing["category"] for thing in entry["objects"]}


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 10, 11, 20])
def test_a_cosine_of_any_number_of_steps_comes_down(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    scheduler = one_cycle(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[-1] < 1e-4 or steps == 1


def test_the_batches_of_an_epoch_are_its_own():
    batches = epoch_batches(10, 4, seed=1, epoch=1)
    assert [len(batch) for batch in batches] == [4, 4]
    assert len(set(batches[0] + batches[1])) == 8
    assert batches == epoch_batches(10, 4, 1, 1)
    assert batches != epoch_batches(10, 4, 1, 2)
    assert [len(batch) for batch in epoch_batches(3, 4, 0, 1)] == [3]


def test_augmentation_depends_on_seed_epoch_and_image_only(folder):
    dataset = CaptionDataset(folder, "train", image_transform(32, augment=True))
    dataset.augmentation_seed = 3
    dataset.epoch = 1
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


def test_a_loss_that_is_not_finite_is_found_with_its_step():
    progress = Progress(epoch=3, step=4)
    for loss in (1.0, 2.0):
        progress.add({"loss": torch.tensor(loss), "words": torch.tensor(5.0)})
    progress.add_up()
    assert progress.sums == {"loss": 3.0, "words": 10.0}
    for loss in (1.0, float("inf"), float("nan")):
        progress.add({"loss": torch.tensor(loss), "words": torch.tensor(5.0)})
    with pytest.raises(UserError, match="the loss is inf in epoch 3, step 7"):
        progress.add_up()


def test_a_trainer_needs_no_command(folder, tmp_path):
    """It trains, writes its files, and goes on from them; other settings are refused."""
    train_set = CaptionDataset(folder, "train", image_transform(128))
    val_set = CaptionDataset(folder, "val", image_transform(128))
    captioner = random_captioner(vocabulary=train_set.vocabulary).float()
    captioner.encoder.requires_grad_(False)
    output = tmp_path / "it.pt"
    settings = {"seed": 0}

    def trainer(config, settings):
        objective = CrossEntropy(captioner)
        return Trainer(captioner, objective, train_set, val_set, output, config, settings=settings)

    first = trainer(SMALL_CONFIG, settings)
    first.begin()
    first.fit()
    last = read_checkpoint(tmp_path / "it.last.pt")
    assert last["training"]["iterations"] == 4
    second = trainer(replace(SMALL_CONFIG, epochs=3), settings)
    second.resume(last)
    second.fit()
    assert [row["epoch"] for row in second.progress.history] == [1, 2, 3]
    with pytest.raises(UserError, match="had seed 0, not 1"):
        trainer(SMALL_CONFIG, {"seed": 1}).resume(last)
    with pytest.raises(UserError, match="is a finished captioner"):
        trainer(SMALL_CONFIG, settings).resume(read_checkpoint(tmp_path / "it.pt"))


def test_the_figure_draws_what_the_history_holds():
    history = [
        {"iterations": 0, "CIDEr": 0.1},
        {"iterations": 5, "CIDEr": 0.2, "loss": 3.0},
    ]
    left, right = training_figure(history).axes
    assert [line.get_label() for line in left.lines] == ["loss"]
    assert [line.get_label() for line in right.lines] == ["CIDEr"]
    assert right.lines[0].get_xydata().tolist() == [[0, 0.1], [5, 0.2]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("model_type", MODELS)
def test_a_step_of_cross_entropy_never_waits_for_the_gpu(folder, model_type):
    dataset = CaptionDataset(folder, "train", image_transform(128))
    encoder = build_encoder("scenes_vgg", "random")
    config = CaptionerConfig(model_type, "scenes_vgg")
    captioner = build_captioner(config, dataset.vocabulary, encoder).cuda().train()
    objective = CrossEntropy(captioner, attention_penalty=captioner.attention_penalty)
    step = TrainingStep(captioner, objective, False, True)
    optimizer = build_optimizer(captioner, TrainingConfig())
    images, captions, indices = next(iter(DataLoader(dataset, 8)))
    images = images.cuda()

    def once():
        loss, _ = step(images, captions, indices)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(optimizer, 0.1, 0.0)
        optimizer.step()
        return loss

    once()  # the first one allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)
