"""The training loop: optimizer, schedules, averaged weights, validation, checkpoints, and going on
with an interrupted training to the same end.

    trainer = Trainer(captioner, objective, train_set, val_set, "checkpoints/it.pt", config)
    trainer.resume(read_checkpoint("checkpoints/it.last.pt"))    # or trainer.begin()
    trainer.fit()

Beside the captioner it.pt, it.last.pt holds all that is needed to go on, it.jsonl a line of figures
for each epoch, and it.training.png their curves. Before it meets captions, an encoder may learn to
name the objects in the images (`pretrain_encoder`).
"""

import copy
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
from captionmetrics import caption_metrics
from commandline import (
    UserError,
    provenance,
    remove_leftovers,
    set_seed,
    write_atomically,
)
from decoding import decode_split
from encoder import CutEncoder
from names import CROSS_ENTROPY
from objectives import SCST
from plots import save_figure, training_figure

ADAM_BETA2 = 0.999
# Plateau: the learning rate times 0.8 after 2 epochs without a gain in CIDEr
PLATEAU_FACTOR = 0.8
PLATEAU_PATIENCE = 2
PLATEAU_FLOOR = 2e-5
MEMORY_FRACTION = 0.7  # of a GPU's free memory, or of all of the machine's, for cached features
CHECK_EVERY = 50  # steps after which the losses are read; reading them waits for the GPU
TRAINING_DOTS_PER_INCH = 120  # of the curves
NARROWEST_COLUMN = 8  # characters, of the table of epochs


@dataclass(frozen=True)
class TrainingConfig:
    """How a captioner is trained.

    mode              what is minimised: CROSS_ENTROPY, or one of names.TUNING_MODES. A
                      fine-tuning validates what it starts from, and keeps the last captioner
                      instead of the one with the best CIDEr
    epochs            passes over the training images
    max_iterations    stop after so many steps; None: only after the epochs
    batch_size        images in a step, of all processes together
    decoder_lr        learning rate of all but the encoder
    finetune_encoder  whether the encoder is trained too, with the learning rate encoder_lr
    finetune_from     the stage from which on it is; the statistics of batch-norms stay as they are
    schedule          one of names.SCHEDULES: "plateau" lowers the learning rates after epochs
                      without a gain in CIDEr, "cosine" is one cycle
    adam_beta1        Adam's decay of the mean gradient
    grad_clip         clamp every gradient to +- this value; 0: do not
    grad_norm         scale the gradients down to this norm; 0: do not
    ema_decay         of the average of the weights, which is validated and kept; 0: no average
    start_share       how much of the weights that are validated and kept comes from those that the
                      training started from
    bfloat16          compute in bfloat16 where it is safe
    workers           processes that read images
    checkpoint_every  steps from one checkpoint to the next, from which a training can be resumed
    seed              of all random numbers
    """

    mode: str = CROSS_ENTROPY
    epochs: int = 20
    max_iterations: int | None = None
    batch_size: int = 32
    decoder_lr: float = 5e-4
    encoder_lr: float = 1e-4
    finetune_encoder: bool = False
    finetune_from: str | None = None
    schedule: str = "plateau"
    adam_beta1: float = 0.8
    grad_clip: float = 0.1
    grad_norm: float = 0.0
    ema_decay: float = 0.0
    start_share: float = 0.0
    bfloat16: bool = False
    workers: int = 2
    checkpoint_every: int = 500
    seed: int = 0


class Trainer:
    """Trains a captioner: `begin()` or `resume(checkpoint)`, and then `fit()`.

    captioner    on its device; its encoder's parameters require gradients if they are trained
    objective    what a step minimises; see objectives.py
    train_set, val_set    CaptionDatasets
    output       where the captioner goes, a .pt file; the other files get their names from it
    config       a TrainingConfig
    decoding     options of `decode` for the validation; none: 3 beams, as the paper decodes
    settings     {name: value}: what a training that goes on with this one has to repeat, since it
                 would not come to the same end otherwise; saved under "flags"
    """

    def __init__(
        self, captioner, objective, train_set, val_set, output, config, decoding=None, settings=None
    ):
        self.captioner = captioner
        self.objective = objective
        self.train_set = train_set
        self.val_set = val_set
        self.config = config
        self.decoding = decoding or {}
        self.settings = settings or {}
        self.output = Path(output)
        self.last = self.output.with_suffix(".last.pt")
        self.optimizer = build_optimizer(captioner, config)
        self.total_steps = self._total_steps()
        self.scheduler = build_scheduler(self.optimizer, config.schedule, self.total_steps)
        cached = bool(train_set.features)
        step = TrainingStep(captioner, objective, cached, config.bfloat16, train_set.stage)
        self.step = distributed.parallel(step)
        # By now the weights are the same in all processes.
        self.average = WeightAverage(captioner, config.ema_decay, config.start_share)
        self.progress = Progress()
        self.table = EpochTable()

    def _steps_an_epoch(self):
        return max(1, len(self.train_set) // self.config.batch_size)

    def _total_steps(self):
        steps = self.config.epochs * self._steps_an_epoch()
        return min(steps, self.config.max_iterations or steps)

    def overview(self):
        """What is trained, on what, and how: {what: how}, the head of a training's log."""
        config = self.config
        model = self.captioner.config
        encoder = "trained" if config.finetune_encoder else "frozen"
        if config.finetune_from:
            encoder = f"trained from {config.finetune_from} on"
        rates = f"{config.decoder_lr:g}"
        if encoder != "frozen":
            rates += f", of the encoder {config.encoder_lr:g}"
        trained = sum(numbers_in(group) for group in self.optimizer.param_groups)
        parameters = sum(parameter.numel() for parameter in self.captioner.parameters())
        data = "cached features" if self.train_set.features else "images"
        history, figure = history_paths(self.output)
        return {
            "captioner": f"{model.model_type}, {model.encoder} ({encoder})",
            "parameters": f"{parameters:,}, {trained:,} of them trained",
            "vocabulary": f"{len(self.captioner.vocabulary.kept)} words",
            "data": f"{self.train_set.folder}, {data}: "
            f"train {len(self.train_set)}, val {len(self.val_set)}",
            "mode": config.mode,
            "steps": f"{self.total_steps}, {self._steps_an_epoch()} an epoch, "
            f"each of {config.batch_size} images",
            "learning rate": f"{rates}; {config.schedule}",
            "device": f"{self.captioner.device}, processes: {distributed.world_size()}",
            "precision": precision(config.bfloat16, self.captioner.device),
            "files": f"{self.output}, {self.last.name}, {history.name}, {figure.name}",
            "figures": "loss, a mean over words (of cross-entropy in nats); words of a step; "
            "BLEU and CIDEr of val",
        }

    def begin(self):
        """Prepare a training from its first step; a fine-tuning validates what it starts from."""
        if self.config.mode != CROSS_ENTROPY:
            row = {"epoch": 0, "iterations": 0, **self.validate(self.captioner)}
            self.progress.history.append(row)
            self.table.show(row)
        if distributed.is_main():
            # It would be of an earlier training, and if torchrun restarted this one, that would be
            # resumed instead.
            self.last.unlink(missing_ok=True)

    def resume(self, checkpoint):
        """Put back the state that an interrupted training saved in its .last.pt file.

        checkpoint: the dict that `read_checkpoint` returns. UserError if it is of no training, of
        another captioner, vocabulary or dataset, of a training with other settings, or of a longer
        or shorter one whose learning rates fall from its first step to its last.
        """
        training = checkpoint.get("training")
        if training is None:
            raise UserError("this checkpoint is a finished captioner; resume from a .last.pt file")
        self._check_same_training(checkpoint)
        try:
            self.captioner.load_state_dict(checkpoint["state_dict"])
            self.average.load_state_dict(training["average"])
            self.optimizer.load_state_dict(training["optimizer"])
            self.scheduler.load_state_dict(training["scheduler"])
            progress = Progress.from_state(training)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                "the checkpoint to resume is of another captioner; "
                "give the settings it was trained with"
            ) from None
        if self.config.schedule == "cosine" and self.scheduler.total_steps != self.total_steps:
            raise UserError(
                f"the cosine of the training to resume takes {self.scheduler.total_steps} steps, "
                f"not {self.total_steps}; give the settings it was trained with"
            )
        self.progress = progress

    def _check_same_training(self, checkpoint):
        """Raise a UserError if settings, captioner or vocabulary of a checkpoint differ."""
        settings = checkpoint["training"].get("flags")
        for name, value in (settings or {}).items():
            own = self.settings.get(name)
            if value != own:
                raise UserError(
                    f"the training to resume had {name} {value}, not {own}; "
                    "give the settings it was trained with"
                )
        same_vocabulary = checkpoint["vocabulary"] == self.captioner.vocabulary.words
        same_captioner = checkpoint["config"] == asdict(self.captioner.config)
        if settings is None or not same_vocabulary or not same_captioner:
            raise UserError(
                "the checkpoint to resume is of another captioner, vocabulary or version; "
                "give the settings and the dataset it was trained with"
            )

    def fit(self):
        """Train to the last epoch or iteration, writing checkpoints and figures on the way.

        UserError if the loss stops being finite.
        """
        self._remove_leftovers()
        while self._goes_on():
            started = time.perf_counter()
            self.train_epoch()
            kept = self.average.captioner()
            metrics = self.validate(kept)
            if self.config.schedule == "plateau":
                self.scheduler.step(metrics["CIDEr"])
            self.table.show(self.progress.finish_epoch(metrics, time.perf_counter() - started))
            self.save_kept(kept, metrics["CIDEr"])
            self.save_last()
            if distributed.is_main():
                write_history(self.output, self.progress.history)
        if distributed.is_main():
            print(f"the captioner (val CIDEr {self.progress.best:.4f}) is {self.output}")
            print(f"{self.last} is for going on with this training; if that is done, delete it")

    def _remove_leftovers(self):
        """Remove what a training left that was killed while it wrote."""
        if distributed.is_main():
            history, figure = history_paths(self.output)
            for path in (self.output, self.last, history, figure):
                remove_leftovers(path)

    def _goes_on(self):
        """Whether there is an epoch to train; one that is under way is always finished."""
        progress = self.progress
        most = self.config.max_iterations or math.inf
        return progress.epoch <= self.config.epochs and (
            progress.step > 0 or progress.iterations < most
        )

    def train_epoch(self):
        """Make the steps that are left of an epoch, with a checkpoint every so many of them."""
        self.captioner.train()
        self.captioner.encoder.train(self.config.finetune_encoder)
        self.train_set.epoch = self.progress.epoch
        bar = tqdm(
            self._loader(),
            desc=f"epoch {self.progress.epoch}",
            leave=False,
            disable=not distributed.is_main(),
        )
        for inputs, captions, indices in bar:
            self.train_step(inputs, captions, indices)
            if self.progress.iterations % CHECK_EVERY == 0:
                self.progress.add_up()
                bar.set_postfix(loss=f"{self.progress.mean_loss():.3f}")
            if self.progress.iterations % self.config.checkpoint_every == 0:
                self.save_last()
        self.progress.add_up()

    def _loader(self):
        """A DataLoader of this process' part of each batch that is left of the epoch."""
        config = self.config
        batches = epoch_batches(
            len(self.train_set), config.batch_size, config.seed, self.progress.epoch
        )
        batches = batches[self.progress.step :]
        if config.max_iterations:
            batches = batches[: config.max_iterations - self.progress.iterations]
        # Without workers the features may be on the GPU already, and cannot be pinned.
        pinned = self.captioner.device.type == "cuda" and config.workers > 0
        return DataLoader(
            self.train_set,
            batch_sampler=[distributed.shared(batch) for batch in batches],
            num_workers=config.workers,
            pin_memory=pinned,
        )

    def train_step(self, inputs, captions, indices):
        """Make one step with a batch of the training set.

        Its random numbers depend on nothing but seed, step and process, so that an interrupted
        training makes the same step again.
        """
        device = self.captioner.device
        set_seed(distributed.seed_of(self.config.seed, self.progress.iterations))
        loss, figures = self.step(inputs.to(device, non_blocking=True), captions, indices)
        loss = loss * distributed.loss_weight(figures["words"], device)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(self.optimizer, self.config.grad_clip, self.config.grad_norm)
        self.optimizer.step()
        self.average.update(self.progress.iterations)
        if self.config.schedule == "cosine":
            self.scheduler.step()
        words = torch.tensor(float(figures["words"] * distributed.world_size()))
        self.progress.add({"loss": loss.detach(), **figures, "words": words})

    def validate(self, captioner):
        """Caption the validation images -> {metric: value}.

        BLEU-1..4 and CIDEr; for SCST also CIDEr-D by the document frequencies of the reward.
        """
        predictions = decode_split(
            captioner, self.val_set, workers=self.config.workers, **self.decoding
        )
        references = self.val_set.references()
        metrics = caption_metrics(predictions, references)
        if isinstance(self.objective, SCST):
            metrics["CIDEr-D"] = self.objective.score_words(predictions, references)
        return metrics

    def save_kept(self, captioner, cider):
        """Write the captioner to keep, if it is the best so far or that of a fine-tuning."""
        best = cider > self.progress.best
        if best or self.config.mode != CROSS_ENTROPY or not self.output.exists():
            self.progress.best = cider
            self._save(captioner, self.output)

    def save_last(self):
        """Write the .last.pt file that `resume` goes on from."""
        self.progress.add_up()
        training = {
            **self.progress.state(),
            "mode": self.config.mode,
            "flags": self.settings,
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        self._save(self.captioner, self.last, training=training)

    def _save(self, captioner, path, **extra):
        """Write a captioner's file, with where it comes from."""
        about = {
            "dataset": self.val_set.info["name"],
            "folder": str(self.val_set.folder),
            "val": self.progress.history[-1] if self.progress.history else {},
            "mode": self.config.mode,
            "provenance": provenance(self.config.seed),
        }
        if distributed.is_main():
            captioner.save(path, about=about, **extra)


class TrainingStep(nn.Module):
    """What one step computes of a batch: the region features and the objective.

    cached: whether the inputs are cached features; bfloat16: compute in bfloat16 where it is safe;
    stage: the one from which on the encoder has to finish cached features, or None.
    DistributedDataParallel wraps this module.
    """

    def __init__(self, captioner, objective, cached, bfloat16, stage=None):
        super().__init__()
        self.captioner = captioner
        self.objective = objective
        self.cached = cached
        self.cut = CutEncoder(captioner.encoder, stage) if stage else None
        self.bfloat16 = bfloat16

    def forward(self, inputs, captions, indices):
        """Inputs, captions and indices of a batch -> what the objective returns.

        inputs: images (B, 3, H, W) or cached features (B, L, D); captions: (B, 5, length + 2);
        indices: (B,).
        """
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.objective(inputs, self._features(inputs), captions, indices)

    def _features(self, inputs):
        """The region features (B, L, D) of a batch."""
        if not self.cached:
            return self.captioner.encoder(inputs)
        rows = inputs.float()
        return self.cut.finish(rows) if self.cut else rows


class WeightAverage:
    """The weights that are validated and kept of a training.

    With a decay they are the exponential moving average of the captioner's weights, which captions
    better than the last of them. The average forgets faster at first, when there is little worth
    remembering. With a start_share, for fine-tuning, so much of them comes from the weights that
    the training started from (Wortsman et al. 2022), which makes up for learning the few training
    images by heart.
    """

    def __init__(self, captioner, decay, start_share=0.0):
        self.source = captioner
        self.decay = decay
        self.start_share = start_share
        self.average = _frozen_copy(captioner) if decay else captioner
        self.initial = _frozen_copy(captioner) if start_share else None
        self._average_tensors = self._moving(self.average)
        self._source_tensors = self._moving(captioner)

    def captioner(self):
        """The captioner to keep: the trained one itself without a decay and a start_share."""
        if not self.start_share:
            return self.average
        kept = _frozen_copy(self.average)
        torch._foreach_lerp_(self._moving(kept), self._moving(self.initial), self.start_share)
        return kept

    def _moving(self, captioner):
        """The tensors that training moves, of a copy of the captioner.

        They are the trained parameters, and the statistics of batch-norms that are trained.
        """
        tensors = []
        for module, source in zip(captioner.modules(), self.source.modules()):
            trained = []
            pairs = zip(module.parameters(recurse=False), source.parameters(recurse=False))
            for own, original in pairs:
                if original.requires_grad:
                    trained.append(own)
            tensors += trained
            if trained:
                buffers = module.buffers(recurse=False)
                tensors += [buffer for buffer in buffers if buffer.is_floating_point()]
        return tensors

    @torch.no_grad()
    def update(self, steps):
        """Take in the weights after so many steps."""
        if self.decay:
            decay = min(self.decay, (1 + steps) / (10 + steps))
            torch._foreach_lerp_(self._average_tensors, self._source_tensors, 1 - decay)

    def _parts(self):
        """The captioners beside the trained one, by their names in a checkpoint."""
        parts = {}
        if self.decay:
            parts["average"] = self.average
        if self.start_share:
            parts["start"] = self.initial
        return parts

    def state_dict(self):
        """The weights of the average and of the start, where they are wanted."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state):
        """Put back what `state_dict` returned. KeyError if that was of other settings."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


def _frozen_copy(captioner):
    return copy.deepcopy(captioner).requires_grad_(False)


@dataclass
class Progress:
    """How far a training has come. With the states of model, optimizer and schedule it is a
    checkpoint, from which a killed training goes on to the same end.

    epoch        the one under way, from 1
    step         its steps that are done
    iterations   all steps that are done
    best         the best CIDEr so far
    sums         {name: sum of this figure over the steps of the epoch}
    history      the rows of the epochs that are done
    recent       figures of the steps that were not read yet; they are on the device, and a
                 checkpoint does not hold them
    """

    epoch: int = 1
    step: int = 0
    iterations: int = 0
    best: float = -1.0
    sums: dict = field(default_factory=dict)
    history: list = field(default_factory=list)
    recent: list = field(default_factory=list)

    def add(self, figures):
        """Count a step with these figures, tensors () without gradient."""
        self.step += 1
        self.iterations += 1
        self.recent.append(figures)

    def add_up(self):
        """Add up the recent steps' figures, means over the processes.

        UserError if one of their losses is not finite.
        """
        if not self.recent:
            return
        for name in self.recent[0]:
            figures = torch.stack([step_figures[name] for step_figures in self.recent])
            values = distributed.averaged(figures).tolist()
            if name == "loss":
                self._check_finite(values)
            self.sums[name] = sum(values, self.sums.get(name, 0.0))
        self.recent = []

    def _check_finite(self, losses):
        """Raise a UserError for the first loss of the recent steps that is not finite."""
        for number, loss in enumerate(losses, start=self.step - len(losses)):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} in epoch {self.epoch}, step {number}; the last checkpoint "
                    "is whole; try a lower learning rate of the decoder"
                )

    def mean_loss(self):
        """The mean loss of the steps of this epoch that were added up."""
        return self.sums["loss"] / self.step

    def finish_epoch(self, metrics, seconds):
        """Begin the next epoch; returns the row of the last one.

        A row holds the means of its steps' figures, the validation metrics and the seconds it took.
        """
        row = {"epoch": self.epoch, "iterations": self.iterations}
        for name, value in self.sums.items():
            row[name] = value / self.step
        row |= metrics
        row["seconds"] = seconds
        self.history.append(row)
        self.epoch += 1
        self.step = 0
        self.sums = {}
        return row

    def state(self):
        """What a checkpoint holds of it."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "iterations": self.iterations,
            "best": self.best,
            "sums": self.sums,
            "history": self.history,
        }

    @classmethod
    def from_state(cls, state):
        """The Progress whose `state` a dict holds, among other things."""
        return cls(**{name: state[name] for name in cls().state()})


def build_optimizer(captioner, config):
    """Adam over the decoder and, if it is trained, the encoder, each with its learning rate."""
    groups = [{"params": captioner.decoder_parameters(), "lr": config.decoder_lr}]
    of_encoder = [part for part in captioner.encoder.parameters() if part.requires_grad]
    if of_encoder:
        groups.append({"params": of_encoder, "lr": config.encoder_lr})
    return torch.optim.Adam(groups, betas=(config.adam_beta1, ADAM_BETA2), fused=True)


def precision(bfloat16, device):
    """What a training computes in, for the head of its log; bfloat16: whether it is asked for."""
    if not bfloat16:
        return "float32"
    onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if onednn and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bfloat16, which this CPU computes far more slowly than float32: see --no-bfloat16"
    return "bfloat16 where it is safe"


def numbers_in(group):
    """How many numbers a group of an optimizer trains."""
    return sum(parameter.numel() for parameter in group["params"])


def build_scheduler(optimizer, schedule, total_steps):
    """The schedule of an optimizer's learning rates; schedule: one of names.SCHEDULES."""
    if schedule == "cosine":
        return one_cycle(optimizer, total_steps)
    if schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", PLATEAU_FACTOR, PLATEAU_PATIENCE - 1, threshold=0, min_lr=PLATEAU_FLOOR
    )


def one_cycle(optimizer, steps):
    """A schedule that warms up over a tenth of the steps, and then falls to nothing as a cosine.

    The optimizer's learning rates are its highest ones.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    warm_up = 0.1 + 1e-9  # of exactly one step PyTorch divides by zero
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=warm_up, cycle_momentum=False
    )


def clip_gradients(optimizer, largest, norm):
    """Clamp every gradient to +- largest, and scale all down to a norm; 0: do not."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    if largest:
        torch.nn.utils.clip_grad_value_(parameters, largest)
    if norm:
        torch.nn.utils.clip_grad_norm_(parameters, norm)


def epoch_batches(images, batch_size, seed, epoch):
    """The batches of an epoch over so many images: lists of indices.

    Their order depends on nothing but seed and epoch. An incomplete batch is left out, unless it is
    the only one.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(images, generator=generator).tolist()
    batches = [order[first : first + batch_size] for first in range(0, images, batch_size)]
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    return batches


def object_targets(dataset):
    """Which categories each image of a dataset shows: float (n, categories) of 0 and 1."""
    columns = {category: column for column, category in enumerate(dataset.info["categories"])}
    targets = torch.zeros(len(dataset), len(columns))
    for row, entry in enumerate(dataset.entries):
        for thing in entry["objects"]:
            if thing["category"] in columns:
                targets[row, columns[thing["category"]]] = 1
    return targets


def pretrain_encoder(encoder, dataset, epochs, config, device):
    """Teach an encoder which objects are in an image, before it meets a caption.

    The paper's VGG16 learnt that from ImageNet. The loss is the binary cross-entropy of a linear
    layer over the mean region feature, minimised by one cycle of Adam. Of the TrainingConfig this
    takes batch_size, encoder_lr, adam_beta1, bfloat16 and workers. UserError if the dataset has no
    annotated objects.
    """
    targets = object_targets(dataset)
    if not targets.any():
        raise UserError(
            "pretraining the encoder needs annotated objects, and this dataset has none; "
            "use 0 pretrain_epochs"
        )
    classifier = nn.Linear(encoder.out_channels, targets.shape[1]).to(device)
    encoder.to(device).train()
    parameters = [*encoder.parameters(), *classifier.parameters()]
    loader = DataLoader(dataset, config.batch_size, shuffle=True, num_workers=config.workers)
    optimizer = torch.optim.Adam(
        parameters, config.encoder_lr, (config.adam_beta1, ADAM_BETA2), fused=True
    )
    scheduler = one_cycle(optimizer, epochs * len(loader))
    for epoch in range(1, epochs + 1):
        dataset.epoch = -epoch  # augments in another way than any epoch with captions
        bar = tqdm(
            loader, desc=f"objects, epoch {epoch}", leave=False, disable=not distributed.is_main()
        )
        for count, (images, _, indices) in enumerate(bar):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
                logits = classifier(encoder(images.to(device)).mean(dim=1))
            wanted = targets[indices].to(device)
            loss = F.binary_cross_entropy_with_logits(logits.float(), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            if count % CHECK_EVERY == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    encoder.eval()


def cache_in_memory(datasets, device):
    """Read cached features into the device's memory or, if they do not fit, into the machine's.

    UserError if they fit into neither.
    """
    needed = sum(dataset.features_bytes() for dataset in datasets)
    for place in dict.fromkeys((device, torch.device("cpu"))):
        if needed < MEMORY_FRACTION * _memory_bytes(place):
            for dataset in datasets:
                dataset.load(place)
            return
    raise UserError(
        f"the features take {needed / 1e9:.1f} GB, more than there is memory; "
        "do without cache_in_memory"
    )


def _memory_bytes(device):
    """A GPU's free memory; else what each process here may take of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine / distributed.processes_here()


def show_overview(overview):
    """Print the head of a training's log, {what: how}."""
    if not distributed.is_main():
        return
    width = max(map(len, overview))
    for name, text in overview.items():
        print(f"{name:{width}}  {text}")


class EpochTable:
    """Prints the epochs of a training as the rows of a table.

    The names of the columns stand above the first row, and above one that has other columns.
    """

    def __init__(self):
        self._columns = []

    def show(self, row):
        """Print the figures {name: value} of an epoch."""
        if not distributed.is_main():
            return
        if list(row) != self._columns:
            self._columns = list(row)
            print("  ".join(f"{name:>{self._width(name)}}" for name in row))
        cells = []
        for name, value in row.items():
            text = str(value) if isinstance(value, int) else f"{value:.4f}"
            cells.append(f"{text:>{self._width(name)}}")
        print("  ".join(cells))

    @staticmethod
    def _width(name):
        return max(len(name), NARROWEST_COLUMN)


def history_paths(output):
    """Where the figures of the epochs are written: JSON lines, and curves."""
    return output.with_suffix(".jsonl"), output.with_suffix(".training.png")


def write_history(output, history):
    """Write the figures of all epochs, as JSON lines and as curves."""
    lines, curves = history_paths(output)
    with write_atomically(lines) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in history))
    save_figure(training_figure(history), curves, TRAINING_DOTS_PER_INCH)
