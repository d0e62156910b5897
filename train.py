"""Train a captioner with cross-entropy; an encoder without ImageNet weights first learns to name the objects in the images.
Fine-tune a trained one by SCST, by LRP-inference, or by both.

    python train.py                                                       # the embedded scenes, a few minutes on 2 cores
    python train.py --dataset flickr8k --encoder squeezenet1_1            # on cached features, if preparedataset.py made them
    python train.py --dataset coco2017 --encoder vgg16 --finetune_encoder # from the images
    python train.py --dataset flickr8k --encoder inception_v3 --model_type aoa --preset flickr8k      # the README's recipe
    python train.py --resume checkpoints/scenes-gridtd.last.pt            # go on where it stopped, to the same end
    python train.py --cider_tune                                          # SCST from checkpoints/scenes-gridtd.pt, or --resume CKPT
    python train.py --lrp_tune                                            # LRP-inference fine-tuning
    python train.py --lrp_tune --lrp_lambda 1                             # its baseline: as many steps without LRP
    python train.py --lrp_cider_tune                                      # LRP-inference with SCST
    torchrun --nproc_per_node=4 train.py ...                              # the same steps, each shared by 4 processes

After every epoch the validation images are captioned; the captioner (the best by CIDEr, or after fine-tuning the last) is
checkpoints/NAME.pt, the last one with all that is needed to go on checkpoints/NAME.last.pt, and the figures of each epoch are
a line of checkpoints/NAME.jsonl and a curve in checkpoints/NAME.training.png.
"""

import argparse
import copy
import json
import math
import os
import re
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
from basemodel import DROPOUTS, read_checkpoint
from captiondata import CaptionDataset
from captioner import (
    MODELS,
    CaptionerConfig,
    build_captioner,
    load_captioner,
)
from captionmetrics import caption_metrics
from commandline import (
    CommandLine,
    UserError,
    add_common_flags,
    provenance,
    run,
    set_seed,
    write_atomically,
)
from decoding import add_decoding_flags, decoding_options
from encoder import ENCODERS, build_encoder, has_learnt
from evaluation import dataset_folder, decode_split
from featurecache import encoder_path, features_path, versions_of
from images import image_transform
from objectives import SCST, CrossEntropy, ImageLRPInference, LRPInference

# Three sets of defaults. "paper" is what the authors' code uses (§4 and the final version); "scenes" is smaller and quicker, for an
# encoder that learns from nothing in a few minutes; "flickr8k" is for few photographs and cached features: what a captioner of
# today gets: more dropout, a higher learning rate for fewer epochs, and the average of the weights.
PAPER = {
    "encoder": "vgg16", "embed_dim": 512, "hidden_dim": 512, "dropout": 0.5, "epochs": 20, "batch_size": 32, "decoder_lr": 5e-4,
    "encoder_lr": 1e-4, "schedule": "plateau", "augment": True, "pretrain_epochs": 0, "embed_dropout": 0.0, "region_dropout": 0.0,
    "attention_dropout": 0.1, "adam_beta1": 0.8, "grad_clip": 0.1, "grad_norm": 0.0, "ema_decay": 0.0, "label_smoothing": 0.0,
}  # fmt: skip
PRESETS = {
    "paper": PAPER,
    "scenes": PAPER | {
        "encoder": "scenes_vgg", "embed_dim": 128, "hidden_dim": 192, "dropout": 0.3, "epochs": 4, "decoder_lr": 3e-3,
        "encoder_lr": 2e-3, "schedule": "cosine", "augment": False, "pretrain_epochs": 4,
    },
    "flickr8k": PAPER | {
        "encoder": "inception_v3", "epochs": 10, "batch_size": 16, "decoder_lr": 1e-3, "schedule": "cosine", "embed_dropout": 0.5,
        "region_dropout": 0.2, "attention_dropout": 0.0, "adam_beta1": 0.9, "grad_clip": 0.0, "grad_norm": 5.0, "ema_decay": 0.999,
        "label_smoothing": 0.1,
    },
}  # fmt: skip
PAPER_MODELS = {  # what the authors' code sets for one captioner only
    "adaptive": {"epochs": 30, "ss_prob": 0.2},
    "gridtd": {},
    "aoa": {"epochs": 50, "dropout": 0.3},
}
ADAM_BETA2 = 0.999
# What fine-tuning changes. The paper's LRP-inference: 1e-6, 320 steps on Flickr30k, 500 on COCO (§4.4). No dropout: the captions
# that SCST samples come from the distribution whose log-probability is raised.
MODES = ("cider_tune", "lrp_tune", "lrp_cider_tune")
TUNING = {
    "lrp_tune": {"decoder_lr": 1e-6, "encoder_lr": 1e-6, "max_iterations": 500},
    "cider_tune": {"decoder_lr": 5e-5, "encoder_lr": 5e-5, "max_iterations": 1000},
    "lrp_cider_tune": {"decoder_lr": 5e-5, "encoder_lr": 5e-5, "max_iterations": 1000},
}
ONLY_WITH = {  # flags, and the modes that take them
    **dict.fromkeys(
        (
            "encoder",
            "encoder_weights",
            "num_head",
            "embed_dim",
            "hidden_dim",
            "pretrain_epochs",
            "max_length",
        ),
        ("cross_entropy",),
    ),
    **dict.fromkeys(("ss_prob", "label_smoothing"), ("cross_entropy",)),
    "captions_per_image": ("cross_entropy", "lrp_tune"),
    "start_share": MODES,
    **dict.fromkeys(("lrp_lambda", "lrp_form"), ("lrp_tune",)),
    **dict.fromkeys(("samples", "scst_baseline", "bleu_weight"), ("cider_tune", "lrp_cider_tune")),
}
TUNING_COMMON = {name: 0.0 for name in DROPOUTS} | {
    "epochs": 10_000, "schedule": "constant", "pretrain_epochs": 0, "ss_prob": 0.0, "ema_decay": 0.0, "label_smoothing": 0.0,
    "max_length": None,
}  # fmt: skip
FLICKR_ITERATIONS = 320
PLATEAU_FACTOR, PLATEAU_PATIENCE, PLATEAU_FLOOR = (
    0.8,
    2,
    2e-5,
)  # lr x 0.8 after 2 epochs without a gain in CIDEr
SAME_FLAGS = (  # without which a resumed training would not end as the uninterrupted one
    "seed", "schedule", "batch_size", "captions_per_image", "decoder_lr", "encoder_lr", "adam_beta1", "grad_clip", "grad_norm", "ema_decay",
    "label_smoothing", "ss_prob", "finetune_encoder", "augment", "bfloat16", "start_share", "lrp_lambda", "lrp_form", "samples", "scst_baseline",
    "bleu_weight", *DROPOUTS,
)  # fmt: skip
MEMORY_SHARE = 0.7  # of a GPU's free memory, or of all of the machine's, for cached features
CHECK_EVERY = 50  # steps after which the losses are looked at; looking waits for the GPU
LIMITS = {  # of the flags, both included
    **dict.fromkeys(("epochs", "batch_size", "embed_dim", "hidden_dim", "num_head", "max_iterations", "checkpoint_every", "samples"), (1, math.inf)),
    **dict.fromkeys(("pretrain_epochs", "workers", "decoder_lr", "encoder_lr", "grad_clip", "grad_norm", "bleu_weight"), (0, math.inf)),
    **dict.fromkeys((*DROPOUTS, "ema_decay", "label_smoothing", "ss_prob", "start_share", "lrp_lambda"), (0, 1)), "adam_beta1": (0, 0.9999), "captions_per_image": (1, 5),
}  # fmt: skip


def object_targets(dataset):
    """Which categories each image of a dataset shows: float (n, categories) of 0 and 1."""
    columns = {category: column for column, category in enumerate(dataset.info["categories"])}
    targets = torch.zeros(len(dataset), len(columns))
    for row, entry in enumerate(dataset.entries):
        targets[
            row,
            [
                columns[thing["category"]]
                for thing in entry["objects"]
                if thing["category"] in columns
            ],
        ] = 1
    return targets


def pretrain_encoder(encoder, dataset, args, device):
    """Teach an encoder which objects are in an image, as ImageNet taught the paper's VGG16 before it met a caption.

    Binary cross-entropy of a linear layer over the mean region feature, args.pretrain_epochs epochs, one cycle of Adam.
    UserError if the dataset has no annotated objects.
    """
    targets = object_targets(dataset)
    if not targets.any():
        raise UserError(
            "--pretrain_epochs needs annotated objects, and this dataset has none; use --pretrain_epochs 0"
        )
    classifier = nn.Linear(encoder.out_channels, targets.shape[1]).to(device)
    encoder.to(device).train()
    parameters = [*encoder.parameters(), *classifier.parameters()]
    loader = DataLoader(dataset, args.batch_size, shuffle=True, num_workers=args.workers)
    optimizer = torch.optim.Adam(
        parameters, args.encoder_lr, (args.adam_beta1, ADAM_BETA2), fused=True
    )
    scheduler = one_cycle(optimizer, args.pretrain_epochs * len(loader))
    for epoch in range(1, args.pretrain_epochs + 1):
        dataset.epoch = -epoch  # augments otherwise than any epoch of captions
        bar = tqdm(
            loader, desc=f"objects, epoch {epoch}", leave=False, disable=not distributed.is_main()
        )
        for count, (images, _, indices) in enumerate(bar):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bfloat16):
                logits = classifier(encoder(images.to(device)).mean(dim=1))
            loss = F.binary_cross_entropy_with_logits(logits.float(), targets[indices].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            if count % CHECK_EVERY == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    encoder.eval()


def one_cycle(optimizer, steps):
    """Warm up over a tenth of the steps to the optimizer's learning rates, then down to nothing along a cosine."""
    rates = [group["lr"] for group in optimizer.param_groups]
    warm_up = 0.1 + 1e-9  # of exactly one step PyTorch divides by zero
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=warm_up, cycle_momentum=False
    )


def build_optimizer(captioner, args, steps):
    """Adam over the decoder and, if it is tuned, the encoder, and the schedule of their learning rates."""
    groups = [{"params": captioner.decoder_parameters(), "lr": args.decoder_lr}]
    if args.finetune_encoder:
        groups.append({"params": list(captioner.encoder.parameters()), "lr": args.encoder_lr})
    optimizer = torch.optim.Adam(groups, betas=(args.adam_beta1, ADAM_BETA2), fused=True)
    if args.schedule == "cosine":
        return optimizer, one_cycle(optimizer, steps)
    if args.schedule == "constant":
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", PLATEAU_FACTOR, PLATEAU_PATIENCE - 1, threshold=0, min_lr=PLATEAU_FLOOR
    )


def build_objective(captioner, dataset, args):
    """What the mode minimises; see objectives.py."""
    if args.mode == "cross_entropy" or args.mode == "lrp_tune" and args.lrp_lambda == 1:
        return CrossEntropy(captioner, args.captions_per_image, args.ss_prob, args.label_smoothing)
    if args.mode == "lrp_tune":
        form = ImageLRPInference if args.lrp_form == "image" else LRPInference
        return form(captioner, args.captions_per_image, args.lrp_lambda)
    inference = LRPInference(captioner) if args.mode == "lrp_cider_tune" else None
    references = [entry["captions"] for entry in dataset.entries]
    return SCST(
        captioner, references, args.samples, args.scst_baseline, args.bleu_weight, inference
    )


def load_datasets(args, folder, image_size, trained=None):
    """The train and val split: of cached features if there are some, of the weights of a `trained` captioner's encoder if there is
    one, and no pixels are needed; else of images."""
    needs_pixels = args.finetune_encoder or args.mode == "lrp_tune" and args.lrp_form == "image"
    if needs_pixels and image_size is None:
        raise UserError(
            f"--{'finetune_encoder' if args.finetune_encoder else 'lrp_form image'} needs pixels, and {args.encoder} features come without them"
        )
    if features_path(folder, args.encoder).exists() and not needs_pixels:
        versions = versions_of(folder, args.encoder) if args.augment else 0
        train_set = CaptionDataset(folder, "train", features=args.encoder, versions=versions)
        if trained is None or is_of_encoder(train_set, trained.encoder):
            return train_set, CaptionDataset(folder, "val", features=args.encoder)
        if distributed.is_main():
            print(
                f"the cached {args.encoder} features come from other weights than this captioner's, so the images are read"
            )
    if image_size is None:
        raise UserError(
            f"{args.encoder} features have to be cached first: preparedataset.py --features {args.encoder} --regions FOLDER"
        )
    train_set = CaptionDataset(folder, "train", image_transform(image_size, args.augment))
    train_set.augmentation_seed = args.seed
    return train_set, CaptionDataset(folder, "val", image_transform(image_size))


def cache_in_memory(datasets, device):
    """Read cached features into the device's memory or, if they do not fit there, into the machine's; UserError if not there either."""
    need = sum(dataset.features_bytes() for dataset in datasets)
    for place in dict.fromkeys((device, torch.device("cpu"))):
        machine = (
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / distributed.processes_here()
        )
        if need < MEMORY_SHARE * (
            torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else machine
        ):
            for dataset in datasets:
                dataset.load(place)
            return
    raise UserError(
        f"the features take {need / 1e9:.1f} GB, more than there is memory; do without --cache_in_memory"
    )


def is_of_encoder(dataset, encoder):
    """Whether the cached features are those of this encoder's weights."""
    return dataset.features_attributes.get("weights_hash") == encoder.weights_hash()


def check_cache(dataset, encoder):
    """UserError if the dataset is of cached features, but not of this encoder's weights."""
    if dataset.features and not is_of_encoder(dataset, encoder):
        raise UserError(
            f"the cached {encoder.name} features come from other weights; give the same --encoder_weights"
        )


def validate(captioner, dataset, objective, args):
    """Caption the validation images, with 3 beams as the paper does unless flags say otherwise -> BLEU-1..4 and CIDEr, for SCST
    also CIDEr-D by the document frequencies of the reward."""
    predictions = decode_split(captioner, dataset, workers=args.workers, **decoding_options(args))
    metrics = caption_metrics(predictions, dataset.references())
    if isinstance(objective, SCST):
        metrics["CIDEr-D"] = objective.score_words(predictions, dataset.references())
    return metrics


class TrainingStep(nn.Module):
    """What one step computes of a batch: encoder if it is needed, and objective. DistributedDataParallel wraps this."""

    def __init__(self, captioner, objective, cached, bfloat16):
        super().__init__()
        self.captioner, self.objective, self.cached, self.bfloat16 = (
            captioner,
            objective,
            cached,
            bfloat16,
        )

    def forward(self, inputs, captions, indices):
        """Images (B, 3, H, W) or cached features (B, L, D), captions (B, 5, length + 2), indices (B,) -> what the objective returns."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.objective(
                inputs,
                inputs.float() if self.cached else self.captioner.encoder(inputs),
                captions,
                indices,
            )


class WeightAverage:
    """What is validated and kept of a training: the exponential moving average of the captioner's weights, which captions better
    than the last of them, and in fine-tuning `start_share` of the weights that it started from (Wortsman et al. 2022), which makes
    up for learning the few training images by heart. The average forgets faster at first, when there is little worth remembering."""

    def __init__(self, captioner, decay, start_share=0.0):
        self.source, self.decay, self.start_share = captioner, decay, start_share
        self.average = copy.deepcopy(captioner).requires_grad_(False) if decay else captioner
        self.start = copy.deepcopy(captioner).requires_grad_(False) if start_share else None
        self._pair = self._moving(self.average), self._moving(captioner)

    def captioner(self):
        """The captioner to keep: the very one that is trained if neither is wanted."""
        if not self.start_share:
            return self.average
        kept = copy.deepcopy(self.average).requires_grad_(False)
        torch._foreach_lerp_(self._moving(kept), self._moving(self.start), self.start_share)
        return kept

    def _moving(self, captioner):
        """What training moves, of a copy of the captioner: the trained parameters, and the statistics of batch-norms that are trained."""
        parts = []
        for module, source in zip(captioner.modules(), self.source.modules()):
            pairs = zip(module.parameters(recurse=False), source.parameters(recurse=False))
            trained = [own for own, theirs in pairs if theirs.requires_grad]
            parts += trained + [
                buffer
                for buffer in module.buffers(recurse=False)
                if trained and buffer.is_floating_point()
            ]
        return parts

    @torch.no_grad()
    def update(self, steps):
        """Take in the weights after so many steps."""
        if self.decay:
            torch._foreach_lerp_(*self._pair, 1 - min(self.decay, (1 + steps) / (10 + steps)))

    def _parts(self):
        return {"average": self.average if self.decay else None, "start": self.start}

    def state_dict(self):
        """What is there of average and start."""
        return {name: part.state_dict() for name, part in self._parts().items() if part}

    def load_state_dict(self, state):
        """Put back what `state_dict` gave. KeyError if that was of other flags."""
        for name, part in self._parts().items():
            if part:
                part.load_state_dict(state[name])


class Progress:
    """How far a training has come; with the states of model, optimizer and schedule it is a checkpoint that a killed training goes
    on from to the same end.

    epoch: the one under way, from 1; step: its steps done; iterations: all steps done; sums: of the figures of this epoch's
    steps; history: the rows of the epochs done.
    """

    def __init__(self):
        self.epoch, self.step, self.iterations, self.best, self.sums, self.history = (
            1,
            0,
            0,
            -1.0,
            {},
            [],
        )
        self._recent = []  # figures of steps that were not looked at yet, on the device

    def add(self, figures):
        """Count a step with these figures, tensors () without gradient."""
        self.step, self.iterations = self.step + 1, self.iterations + 1
        self._recent.append(figures)

    def look(self):
        """Add up the recent steps' figures, means over processes; UserError if a loss of them is not finite."""
        for name in self._recent[0] if self._recent else ():
            values = distributed.averaged(
                torch.stack([figures[name] for figures in self._recent])
            ).tolist()
            if name == "loss" and not all(map(math.isfinite, values)):
                bad = next(place for place, value in enumerate(values) if not math.isfinite(value))
                step = self.step - len(values) + bad
                raise UserError(
                    f"the loss is {values[bad]} in epoch {self.epoch}, step {step}; the last checkpoint is whole; try a lower --decoder_lr"
                )
            self.sums[name] = sum(values, self.sums.get(name, 0.0))
        self._recent = []

    def finish_epoch(self, metrics, seconds):
        """The row of the epoch: means of its steps' figures, and the validation metrics."""
        means = {name: value / self.step for name, value in self.sums.items()}
        self.history.append(
            {
                "epoch": self.epoch,
                "iterations": self.iterations,
                **means,
                **metrics,
                "seconds": seconds,
            }
        )
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        return self.history[-1]

    def state(self):
        """What a checkpoint holds of it."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def fit(captioner, train_set, val_set, args):
    """Train to args.epochs or args.max_iterations, going on from args.resume if it is of this very training; write checkpoints
    and figures as we go. UserError if the loss stops being finite."""
    output, objective = Path(args.output), build_objective(captioner, train_set, args)
    steps = args.epochs * max(1, len(train_set) // args.batch_size)
    optimizer, scheduler = build_optimizer(
        captioner, args, min(steps, args.max_iterations or steps)
    )
    step = distributed.parallel(
        TrainingStep(captioner, objective, bool(train_set.features), args.bfloat16)
    )
    average = WeightAverage(
        captioner, args.ema_decay, args.start_share
    )  # of weights that are the same in all processes by now
    progress, last = Progress(), output.with_suffix(".last.pt")
    if args.goes_on:
        progress = restore(
            read_checkpoint(args.resume), captioner, average, optimizer, scheduler, args
        )
    elif args.mode != "cross_entropy":
        progress.history.append(
            {"epoch": 0, "iterations": 0, **validate(captioner, val_set, objective, args)}
        )
        show(progress.history[-1])
    for path in output.parent.glob(".*") if distributed.is_main() else ():
        if re.fullmatch(
            rf"\.{re.escape(output.stem)}(\.last|\.training)?\.\d+\.(pt|jsonl|png)", path.name
        ):
            path.unlink()  # of a training killed while it wrote
    if not args.goes_on and distributed.is_main():
        last.unlink(
            missing_ok=True
        )  # of an earlier training, with which this one, started anew by torchrun, would go on

    def save(captioner, path, **extra):
        metrics = progress.history[-1] if progress.history else {}
        about = {
            "dataset": val_set.info["name"],
            "val": metrics,
            "mode": args.mode,
            "provenance": provenance(args.seed),
        }
        if distributed.is_main():
            captioner.save(path, about=about, **extra)

    def save_last():
        progress.look()
        states = {
            name: part.state_dict()
            for name, part in (
                ("average", average),
                ("optimizer", optimizer),
                ("scheduler", scheduler),
            )
        }
        flags = {name: getattr(args, name) for name in SAME_FLAGS}
        save(
            captioner,
            last,
            training={**progress.state(), "mode": args.mode, "flags": flags, **states},
        )

    most = args.max_iterations or math.inf
    while progress.epoch <= args.epochs and (
        progress.step or progress.iterations < most
    ):  # an epoch under way wants its end
        started = time.perf_counter()
        train_epoch(step, train_set, average, optimizer, scheduler, progress, args, save_last)
        kept = average.captioner()
        metrics = validate(kept, val_set, objective, args)
        if args.schedule == "plateau":
            scheduler.step(metrics["CIDEr"])
        show(progress.finish_epoch(metrics, time.perf_counter() - started))
        if metrics["CIDEr"] > progress.best or args.mode != "cross_entropy" or not output.exists():
            progress.best = metrics["CIDEr"]
            save(kept, output)
        save_last()
        if distributed.is_main():
            write_history(output, progress.history)
    if distributed.is_main():
        print(f"the captioner (val CIDEr {progress.best:.4f}) is {output}")


def epoch_batches(images, batch_size, seed, epoch):
    """The batches of an epoch: lists of indices in an order that depends on nothing but seed and epoch."""
    order = torch.randperm(
        images, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    ).tolist()
    batches = [order[first : first + batch_size] for first in range(0, images, batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches


def train_epoch(step, dataset, average, optimizer, scheduler, progress, args, save_last):
    """What is left of an epoch, counted in `progress`; `save_last()` every args.checkpoint_every steps.

    Of each batch every process takes its share. Random numbers depend on nothing but seed, step and process, so that a step can be
    made again."""
    captioner = getattr(step, "module", step).captioner
    captioner.train()
    captioner.encoder.train(args.finetune_encoder)
    dataset.epoch = progress.epoch
    batches = epoch_batches(len(dataset), args.batch_size, args.seed, progress.epoch)[
        progress.step :
    ]
    if args.max_iterations:
        batches = batches[: args.max_iterations - progress.iterations]
    pinned = (
        captioner.device.type == "cuda" and args.workers > 0
    )  # without workers the features may be on the GPU already
    loader = DataLoader(
        dataset,
        batch_sampler=list(map(distributed.shared, batches)),
        num_workers=args.workers,
        pin_memory=pinned,
    )
    bar = tqdm(
        loader, desc=f"epoch {progress.epoch}", leave=False, disable=not distributed.is_main()
    )
    for inputs, captions, indices in bar:
        set_seed(distributed.seed_of(args.seed, progress.iterations))
        loss, figures = step(inputs.to(captioner.device, non_blocking=True), captions, indices)
        loss = loss * distributed.share(figures["words"], captioner.device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip(optimizer, args)
        optimizer.step()
        average.update(progress.iterations)
        if args.schedule == "cosine":
            scheduler.step()
        progress.add(
            {
                "loss": loss.detach(),
                **figures,
                "words": torch.tensor(float(figures["words"] * distributed.world_size())),
            }
        )
        if progress.iterations % CHECK_EVERY == 0:
            progress.look()
            bar.set_postfix(loss=f"{progress.sums['loss'] / progress.step:.3f}")
        if progress.iterations % args.checkpoint_every == 0:
            save_last()
    progress.look()


def clip(optimizer, args):
    """Limit the gradients as the flags say."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if args.grad_clip:
        torch.nn.utils.clip_grad_value_(parameters, args.grad_clip)
    if args.grad_norm:
        torch.nn.utils.clip_grad_norm_(parameters, args.grad_norm)


def show(row):
    """Print the figures of an epoch."""
    if distributed.is_main():
        print(
            "  ".join(
                f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}"
                for name, value in row.items()
            )
        )


def write_history(output, history):
    """The figures of all epochs, as JSON lines and as curves."""
    with write_atomically(output.with_suffix(".jsonl")) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in history))
    figure = Figure(figsize=(8, 3), layout="constrained")
    loss, metrics = figure.subplots(1, 2)
    for axes, names in (
        (loss, ("loss", "reward", "baseline")),
        (metrics, ("CIDEr", "CIDEr-D", "BLEU-4")),
    ):
        for name in names:
            points = [(row["iterations"], row[name]) for row in history if name in row]
            if points:
                axes.plot(*zip(*points), marker=".", label=name)
        axes.set_xlabel("steps")
        axes.legend()
    with write_atomically(output.with_suffix(".training.png")) as temporary:
        figure.savefig(temporary, dpi=120)


def is_of_this_training(args):
    """Whether --resume names an interrupted training of this mode, rather than a captioner to fine-tune. UserError if it can be
    neither."""
    if args.mode != "cross_entropy" and not Path(args.resume).name.endswith(".last.pt"):
        return False
    training = read_checkpoint(args.resume).get("training")
    if args.mode == "cross_entropy" and training is None:
        raise UserError(
            "--resume wants the .last.pt file of an interrupted training; a finished captioner is fine-tuned with --cider_tune or --lrp_tune"
        )
    if args.mode == "cross_entropy" and training["mode"] != args.mode:
        raise UserError(
            f"{args.resume} is of a fine-tuning; to go on with it give --{training['mode']} too"
        )
    return training is not None and training["mode"] == args.mode


def restore(checkpoint, captioner, average, optimizer, scheduler, args):
    """Put a snapshot's state back; returns its Progress. UserError if the checkpoint is of another model, vocabulary or dataset, of a
    training with other flags, or of a longer or shorter one whose learning rates fall from its first step to its last."""
    training, steps = checkpoint["training"], getattr(scheduler, "total_steps", None)
    for name, value in training.get("flags", {}).items():
        if value != getattr(args, name, None):
            raise UserError(
                f"--resume: that training had --{name} {value}, not {getattr(args, name)}; give the flags it was trained with"
            )
    if (
        "flags" not in training
        or checkpoint["vocabulary"] != captioner.vocabulary.words
        or checkpoint["config"] != asdict(captioner.config)
    ):
        raise UserError(
            "--resume: the checkpoint is of another captioner, vocabulary or version; give the flags and the dataset it was trained with"
        )
    try:
        captioner.load_state_dict(checkpoint["state_dict"])
        average.load_state_dict(training["average"])
        optimizer.load_state_dict(training["optimizer"])
        scheduler.load_state_dict(training["scheduler"])
    except (RuntimeError, ValueError, KeyError):
        raise UserError(
            "--resume: the checkpoint is of another captioner; give the flags it was trained with"
        ) from None
    if getattr(scheduler, "total_steps", None) != steps:
        raise UserError(
            f"--resume: that training's cosine takes {scheduler.total_steps} steps, these flags {steps}; give the flags it was trained with"
        )
    progress = Progress()
    vars(progress).update({name: training[name] for name in progress.state()})
    return progress


def add_model_flags(parser):
    """What the captioner is built of."""
    flag = parser.add_argument
    flag(
        "--model_type",
        default="gridtd",
        choices=MODELS,
        help="the captioner (default: %(default)s)",
    )
    flag("--encoder", choices=ENCODERS, help="the image encoder (default: %(default)s)")
    flag(
        "--encoder_weights",
        help="state dict file, or 'random' (default: those of the cached features, else ImageNet's where there are some)",
    )
    flag(
        "--num_head",
        type=int,
        default=8,
        help="attention heads of the multi-head captioner (default: %(default)s)",
    )
    flag("--embed_dim", type=int, help="word embedding dimensions (default: %(default)s)")
    flag("--hidden_dim", type=int, help="LSTM and attention dimensions (default: %(default)s)")
    flag(
        "--dropout",
        type=float,
        help="dropout probability before the last layer (default: %(default)s)",
    )
    flag("--embed_dropout", type=float, help="of the word embeddings (default: %(default)s)")
    flag("--region_dropout", type=float, help="of the regions' features (default: %(default)s)")
    flag(
        "--attention_dropout",
        type=float,
        help="of the multi-head attention's weights (default: %(default)s)",
    )


def add_tuning_flags(tuning):
    """What only fine-tuning asks for, to a group of the parser."""
    modes = tuning.add_mutually_exclusive_group()
    modes.add_argument(
        "--cider_tune", action="store_true", help="SCST: CIDEr-D of sampled captions as reward"
    )
    modes.add_argument("--lrp_tune", action="store_true", help="LRP-inference with cross-entropy")
    modes.add_argument("--lrp_cider_tune", action="store_true", help="LRP-inference with SCST")
    flag = tuning.add_argument
    flag(
        "--start_share",
        type=float,
        default=0.0,
        help="of the weights that are validated and kept, the share of those that fine-tuning started from (default: %(default)s)",
    )
    flag(
        "--lrp_lambda",
        type=float,
        default=0.5,
        help="share of the plain cross-entropy, 0 to 1; 1 is the baseline without LRP (default: %(default)s)",
    )
    flag(
        "--lrp_form",
        choices=("last_layer", "image"),
        default="last_layer",
        help="weights from the last layer's relevance, or from the image's heat map as in the paper's earlier version (default: %(default)s)",
    )
    flag(
        "--samples",
        type=int,
        default=5,
        help="captions that SCST draws of an image (default: %(default)s)",
    )
    flag(
        "--scst_baseline",
        choices=("greedy", "others"),
        default="greedy",
        help="reward to beat: of the greedy caption, or the mean of the other samples (default: %(default)s)",
    )
    flag(
        "--bleu_weight",
        type=float,
        default=0.0,
        help="weight of BLEU-4 beside CIDEr-D in the reward (default: %(default)s)",
    )


def build_parser(defaults):
    """The command line, with the defaults of a preset."""
    parser = CommandLine(description=__doc__)
    flag = parser.add_argument
    flag(
        "--dataset",
        default="scenes",
        help="name of a folder under data/, or its path (default: %(default)s)",
    )
    flag(
        "--preset",
        choices=PRESETS,
        help="a set of defaults (default: scenes for the scenes, else paper)",
    )
    add_model_flags(parser)
    flag("--epochs", type=int, help="passes over the training images (default: %(default)s)")
    flag("--batch_size", type=int, help="images a step (default: %(default)s)")
    flag(
        "--captions_per_image",
        type=int,
        default=5,
        help="captions of each image a step, 1 to 5 (default: %(default)s)",
    )
    flag(
        "--decoder_lr",
        type=float,
        help="learning rate of all but the encoder (default: %(default)s)",
    )
    flag(
        "--encoder_lr",
        type=float,
        help="learning rate of the encoder if it is tuned (default: %(default)s)",
    )
    flag(
        "--schedule",
        choices=("plateau", "cosine", "constant"),
        help="plateau: x0.8 after 2 epochs without a gain in CIDEr; cosine: one cycle (default: %(default)s)",
    )
    flag(
        "--adam_beta1", type=float, help="Adam's decay of the mean gradient (default: %(default)s)"
    )
    flag("--max_iterations", type=int, help="stop after so many steps (default: %(default)s)")
    flag(
        "--grad_clip",
        type=float,
        help="clamp every gradient to +- this value, 0 for not (default: %(default)s)",
    )
    flag(
        "--grad_norm",
        type=float,
        help="scale the gradients down to this norm, 0 for not (default: %(default)s)",
    )
    flag(
        "--ema_decay",
        type=float,
        help="validate and keep the exponential moving average of the weights, 0 for the weights themselves (default: %(default)s)",
    )
    flag(
        "--label_smoothing",
        type=float,
        help="share of the target's probability that goes to all words alike (default: %(default)s)",
    )
    flag(
        "--ss_prob",
        type=float,
        default=0.0,
        help="scheduled sampling: probability of feeding back a predicted word (default: %(default)s)",
    )
    flag(
        "--finetune_encoder",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train the encoder too (default: %(default)s)",
    )
    flag(
        "--pretrain_epochs",
        type=int,
        help="epochs in which the encoder first learns to name the annotated objects (default: %(default)s)",
    )
    flag(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="jitter and mirror the training images; of cached features, take those of preparedataset.py --augment K in turn (default: %(default)s)",
    )
    flag(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute in bfloat16 where it is safe: twice as fast on CPUs and GPUs that have it (default: %(default)s)",
    )
    flag("--workers", type=int, default=2, help="processes that read images (default: %(default)s)")
    flag(
        "--cache_in_memory",
        action="store_true",
        help="read all cached features first, onto the GPU if they fit (default: read them step by step)",
    )
    flag(
        "--output",
        help="where the captioner goes (default: checkpoints/DATASET-MODEL_TYPE[-MODE].pt; of LRP-inference also its form and lambda if others than usual)",
    )
    flag(
        "--checkpoint_every",
        type=int,
        default=500,
        help="steps after which a training can be gone on with (default: %(default)s)",
    )
    flag(
        "--resume",
        help="the .last.pt file of a training to go on with, or a captioner to fine-tune (default: checkpoints/DATASET-MODEL_TYPE.pt)",
    )
    add_tuning_flags(parser.add_argument_group("fine-tuning of a trained captioner"))
    add_decoding_flags(parser, max_length=20)
    add_common_flags(parser)
    parser.set_defaults(**defaults)
    return parser


def parse_arguments(arguments=None):
    """The flags, with the defaults of preset and mode where nothing is given."""
    first = CommandLine(add_help=False)
    first.add_argument("--dataset", default="scenes")
    first.add_argument("--preset", choices=PRESETS)
    first.add_argument("--model_type", choices=MODELS, default="gridtd")
    for mode in MODES:
        first.add_argument(f"--{mode}", action="store_true")
    chosen, _ = first.parse_known_args(arguments)
    mode = next((mode for mode in MODES if getattr(chosen, mode)), "cross_entropy")
    folder = dataset_folder(chosen.dataset)
    preset = chosen.preset or ("scenes" if folder.name == "scenes" else "paper")
    defaults = PRESETS[preset] | (PAPER_MODELS[chosen.model_type] if preset == "paper" else {})
    if mode != "cross_entropy":
        defaults |= TUNING_COMMON | TUNING[mode]
        if mode == "lrp_tune" and folder.name.startswith("flickr"):
            defaults["max_iterations"] = FLICKR_ITERATIONS
    parser = build_parser(defaults)
    args = parser.parse_args(arguments)
    args.given = parser.given(args)
    for name, modes in ONLY_WITH.items():
        if mode not in modes and name in args.given:
            kinds = [
                "training by cross-entropy" if mode == "cross_entropy" else f"--{mode}"
                for mode in modes
            ]
            raise UserError(f"--{name} goes with {' or '.join(kinds)} only")
    args.mode, trained = mode, f"checkpoints/{folder.name}-{args.model_type}"
    args.resume = args.resume or (None if mode == "cross_entropy" else f"{trained}.pt")
    args.goes_on = bool(args.resume) and is_of_this_training(args)
    changed = [
        f"{name.removeprefix('lrp_')}_{getattr(args, name)}"
        for name in ("lrp_form", "lrp_lambda")
        if getattr(args, name) != parser.get_default(name)
    ]
    args.output = args.output or default_output(args, trained, changed)
    check_arguments(args)
    return args


def default_output(args, trained, changed):
    """Where the captioner goes: on with the file of the training that is resumed, else a name made of what it starts from."""
    start = args.resume.removesuffix(".pt").removesuffix(".last") if args.resume else trained
    return f"{'-'.join([start, *([] if args.goes_on or args.mode == 'cross_entropy' else [args.mode, *changed])])}.pt"


def check_arguments(args):
    """UserError for values that make no sense, told before anything is read."""
    decoding_options(args)
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise UserError(
                f"--{name} must be at least {least}{f' and at most {most}' if most < math.inf else ''}, not {value}"
            )
    if Path(args.output).suffix != ".pt" or Path(args.output).is_dir():
        raise UserError(f"--output {args.output} is not the name of a .pt file")
    if args.scst_baseline == "others" and args.samples < 2:
        raise UserError("--scst_baseline others needs at least 2 --samples")


def new_captioner(args, folder, train_set, device):
    """A captioner to train from the start; its encoder has learnt before, or does so now."""
    weights = args.encoder_weights
    if train_set.features and weights is None:
        weights = encoder_path(folder, args.encoder)
    encoder = build_encoder(args.encoder, weights).to(memory_format=torch.channels_last)
    check_cache(train_set, encoder)
    learnt, asked_for = (
        train_set.features or has_learnt(args.encoder, weights),
        "pretrain_epochs" in args.given,
    )
    if train_set.features and args.pretrain_epochs and asked_for:
        raise UserError(
            "--pretrain_epochs needs images, and there are cached features, of an encoder that has learnt"
        )
    if args.pretrain_epochs and not args.resume and (asked_for or not learnt):
        pretrain_encoder(encoder.requires_grad_(True), train_set, args, device)
    names = CaptionerConfig.__dataclass_fields__.keys()
    config = CaptionerConfig(**{name: getattr(args, name) for name in names})
    return build_captioner(config, train_set.vocabulary, encoder).to(device)


def main():
    """Read the data, build or load the captioner, and train."""
    args = parse_arguments()
    device = distributed.own_device(args.device)
    with distributed.job(device):
        train(args, device)


def train(args, device):
    """Train as the flags say."""
    set_seed(args.seed)
    if args.batch_size < distributed.world_size():
        raise UserError(
            f"--batch_size {args.batch_size} is less than the {distributed.world_size()} processes that share a batch"
        )
    with tempfile.TemporaryFile(
        dir=next(folder for folder in Path(args.output).absolute().parents if folder.exists())
    ):
        pass  # that nothing can be written there should not be found out after the first epoch
    last = Path(args.output).with_suffix(".last.pt")
    if (
        distributed.restarted()
        and last.exists()
        and read_checkpoint(last)["about"]["provenance"]["command"] == provenance()["command"]
    ):
        args.resume, args.goes_on = last, True
    folder, trained = dataset_folder(args.dataset), None
    if args.mode != "cross_entropy":
        trained = load_captioner(args.resume, device)
        if "model_type" in args.given and trained.config.model_type != args.model_type:
            raise UserError(
                f"{args.resume} is not of --model_type {args.model_type}, but {trained.config.model_type}"
            )
        args.encoder, args.model_type = trained.config.encoder, trained.config.model_type
        for name in DROPOUTS:
            getattr(trained, name).p = getattr(args, name)
    train_set, val_set = load_datasets(args, folder, ENCODERS[args.encoder].image_size, trained)
    if trained and trained.vocabulary.words != train_set.vocabulary.words:
        raise UserError(f"{args.resume} was not trained on {folder}: its vocabulary is another")
    captioner = trained or new_captioner(args, folder, train_set, device)
    captioner.encoder.requires_grad_(args.finetune_encoder)
    if args.cache_in_memory:
        if not train_set.features:
            raise UserError(
                f"--cache_in_memory needs cached features; run preparedataset.py --features {args.encoder}"
            )
        cache_in_memory((train_set, val_set), device)
        args.workers = 0  # they would copy what is at hand
    if (
        args.augment
        and train_set.features
        and not versions_of(folder, args.encoder)
        and distributed.is_main()
    ):
        print(
            "no augmented features are cached, so no image is augmented; preparedataset.py --augment K would cache some"
        )
    fit(captioner, train_set, val_set, args)


if __name__ == "__main__":
    run(main)
