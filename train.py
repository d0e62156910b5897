"""Train a captioner with cross-entropy; an encoder without ImageNet weights first learns to name the objects in the images.

    python train.py                                                       # the embedded scenes, a few minutes on 2 cores
    python train.py --dataset flickr8k --encoder squeezenet1_1            # on cached features, if preparedataset.py made them
    python train.py --dataset coco2017 --encoder vgg16 --finetune_encoder # from the images
    python train.py --resume checkpoints/scenes-gridtd.last.pt            # go on where it stopped

After every epoch the validation images are captioned; the best captioner by CIDEr is checkpoints/NAME.pt, the last one,
with all that is needed to go on, checkpoints/NAME.last.pt, and the figures of each epoch a line of checkpoints/NAME.jsonl.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from captiondata import CaptionDataset, encoder_path, features_path, image_transform
from captioner import MODELS, CaptionerConfig, build_captioner, evaluating, read_checkpoint
from captionmetrics import caption_metrics
from commandline import UserError, add_common_flags, choose_device, provenance, run, set_seed
from decoding import add_decoding_flags, decoding_options
from encoder import ENCODERS, build_encoder
from evaluation import dataset_folder, decode_split

# Two sets of defaults. "paper" is what the authors' code uses (§4 and the final version);
# "scenes" is smaller and quicker, for an encoder that learns from nothing in a few minutes.
PRESETS = {
    "paper": {
        "encoder": "vgg16", "embed_dim": 512, "hidden_dim": 512, "dropout": 0.5, "epochs": 20, "batch_size": 32,
        "decoder_lr": 5e-4, "encoder_lr": 1e-4, "schedule": "plateau", "augment": True, "pretrain_epochs": 0,
    },
    "scenes": {
        "encoder": "scenes_vgg", "embed_dim": 128, "hidden_dim": 192, "dropout": 0.3, "epochs": 4, "batch_size": 32,
        "decoder_lr": 3e-3, "encoder_lr": 2e-3, "schedule": "cosine", "augment": False, "pretrain_epochs": 4,
    },
}  # fmt: skip
PAPER_MODELS = {  # what the authors' code sets for one captioner only
    "adaptive": {"epochs": 30, "ss_prob": 0.2},
    "gridtd": {},
    "aoa": {"epochs": 50, "dropout": 0.3},
}
ADAM_BETAS = (0.8, 0.999)
PLATEAU_FACTOR, PLATEAU_PATIENCE, PLATEAU_FLOOR = 0.8, 2, 2e-5  # lr x 0.8 after 2 epochs without a gain in CIDEr


def object_targets(dataset):
    """Which categories each image of a dataset shows: float (n, categories) of 0 and 1."""
    columns = {category: column for column, category in enumerate(dataset.info["categories"])}
    targets = torch.zeros(len(dataset), len(columns))
    for row, entry in enumerate(dataset.entries):
        targets[row, [columns[thing["category"]] for thing in entry["objects"] if thing["category"] in columns]] = 1
    return targets


def pretrain_encoder(encoder, dataset, args, device):
    """Teach an encoder which objects are in an image, as ImageNet taught the paper's VGG16 before it met a caption.

    Binary cross-entropy of a linear layer over the mean region feature, args.pretrain_epochs epochs, one cycle of Adam.
    UserError if the dataset has no annotated objects.
    """
    targets = object_targets(dataset)
    if not targets.any():
        raise UserError("--pretrain_epochs needs annotated objects, and this dataset has none; use --pretrain_epochs 0")
    classifier = nn.Linear(encoder.out_channels, targets.shape[1]).to(device)
    encoder.to(device).train()
    parameters = [*encoder.parameters(), *classifier.parameters()]
    loader = DataLoader(dataset, args.batch_size, shuffle=True, num_workers=args.workers)
    optimizer = torch.optim.Adam(parameters, args.encoder_lr, ADAM_BETAS)
    scheduler = one_cycle(optimizer, args.pretrain_epochs * len(loader))
    for epoch in range(1, args.pretrain_epochs + 1):
        bar = tqdm(loader, desc=f"objects, epoch {epoch}", leave=False)
        for images, _, indices in bar:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bfloat16):
                logits = classifier(encoder(images.to(device)).mean(dim=1))
            loss = F.binary_cross_entropy_with_logits(logits.float(), targets[indices].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    encoder.eval()


def one_cycle(optimizer, steps):
    """Warm up over a tenth of the steps to the optimizer's learning rates, then down to nothing along a cosine."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1, cycle_momentum=False)


def caption_loss(logits, targets, pad):
    """Cross-entropy (nats), the mean over all words that are not padding: logits (..., V), targets (...)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=pad)


def training_batch(captions, captions_per_image, pad):
    """Captions (B, 5, L) -> inputs and targets (B, N, T): N of the five, drawn anew, cut to the longest."""
    if captions_per_image < captions.shape[1]:
        order = torch.rand(captions.shape[:2]).argsort(dim=1)[:, :captions_per_image]
        captions = captions.gather(1, order.unsqueeze(-1).expand(-1, -1, captions.shape[-1]))
    longest = int((captions != pad).sum(-1).max())
    return captions[..., : longest - 1], captions[..., 1:longest]


def train_epoch(captioner, loader, optimizer, scheduler, args, epoch):
    """One pass over the training images; returns the mean loss. UserError if the loss stops being finite."""
    captioner.train()
    captioner.encoder.train(args.finetune_encoder)
    pad, total = captioner.vocabulary.pad, torch.zeros(())
    bar = tqdm(loader, desc=f"epoch {epoch}", leave=False)
    for step, (inputs, captions, indices) in enumerate(bar):
        inputs = inputs.to(captioner.device, non_blocking=True)
        words, targets = training_batch(captions, args.captions_per_image, pad)
        words, targets = words.to(captioner.device), targets.to(captioner.device)
        with torch.autocast(captioner.device.type, torch.bfloat16, enabled=args.bfloat16):
            features = inputs if loader.dataset.features else captioner.encoder(inputs)
            logits = captioner(features, words, args.ss_prob)
        loss = caption_loss(logits.float(), targets, pad)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(f"the loss is {value} in epoch {epoch}, step {step} (images {indices.tolist()}); try a lower --decoder_lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_value_((p for group in optimizer.param_groups for p in group["params"]), args.grad_clip)
        optimizer.step()
        if args.schedule == "cosine":
            scheduler.step()
        total += value
        bar.set_postfix(loss=f"{value:.3f}")
    return float(total / len(loader))


def build_optimizer(captioner, args, steps):
    """Adam over the decoder and, if it is tuned, the encoder, and the schedule of their learning rates."""
    groups = [{"params": captioner.decoder_parameters(), "lr": args.decoder_lr}]
    if args.finetune_encoder:
        groups.append({"params": list(captioner.encoder.parameters()), "lr": args.encoder_lr})
    optimizer = torch.optim.Adam(groups, betas=ADAM_BETAS)
    if args.schedule == "cosine":
        return optimizer, one_cycle(optimizer, steps)
    return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", PLATEAU_FACTOR, PLATEAU_PATIENCE - 1, threshold=0, min_lr=PLATEAU_FLOOR
    )


def load_datasets(args, folder, image_size):
    """The train and val split: of cached features if there are some and the encoder is frozen, else of images."""
    cached = features_path(folder, args.encoder).exists() and not args.finetune_encoder
    if cached:
        return tuple(CaptionDataset(folder, split, features=args.encoder) for split in ("train", "val"))
    if image_size is None:
        raise UserError(f"{args.encoder} features have to be cached first: preparedataset.py --features {args.encoder} --regions FOLDER")
    transforms = image_transform(image_size, args.augment), image_transform(image_size)
    return tuple(CaptionDataset(folder, split, transform) for split, transform in zip(("train", "val"), transforms))


def check_cache(dataset, encoder):
    """UserError if the cached features are not those of this encoder's weights."""
    if dataset.features and dataset.features_attributes["weights_hash"] != encoder.weights_hash():
        raise UserError(f"the cached {encoder.name} features come from other weights; give the same --encoder_weights")


def validate(captioner, dataset, args):
    """Caption the validation images, with 3 beams as the paper does unless flags say otherwise -> BLEU-1..4 and CIDEr."""
    predictions = decode_split(captioner, dataset, workers=args.workers, **decoding_options(args))
    return caption_metrics(predictions, dataset.references())


def fit(captioner, train_set, val_set, args):
    """Train for args.epochs epochs, going on from args.resume if given; write checkpoints and figures as we go."""
    loader = DataLoader(train_set, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=len(train_set) > args.batch_size)
    optimizer, scheduler = build_optimizer(captioner, args, args.epochs * len(loader))
    progress = {"epoch": 0, "best": -1.0}
    if args.resume:
        progress = restore(read_checkpoint(args.resume), captioner, optimizer, scheduler)
    output = Path(args.output)
    for epoch in range(progress["epoch"] + 1, args.epochs + 1):
        started = time.perf_counter()
        loss = train_epoch(captioner, loader, optimizer, scheduler, args, epoch)
        metrics = validate(captioner, val_set, args)
        if args.schedule == "plateau":
            scheduler.step(metrics["CIDEr"])
        row = {"epoch": epoch, "loss": loss, **metrics, "seconds": time.perf_counter() - started}
        about = {"dataset": val_set.info["name"], "val": metrics, "epoch": epoch, "provenance": provenance(args.seed)}
        if metrics["CIDEr"] > progress["best"]:
            progress["best"] = metrics["CIDEr"]
            captioner.save(output, about=about)
        progress["epoch"] = epoch
        captioner.save(output.with_suffix(".last.pt"), about=about, training=snapshot(progress, optimizer, scheduler))
        with open(output.with_suffix(".jsonl"), "a" if epoch > 1 else "w") as log:
            log.write(json.dumps(row) + "\n")
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    print(f"the best captioner (val CIDEr {progress['best']:.4f}) is {output}")


def snapshot(progress, optimizer, scheduler):
    """What --resume needs beside the weights."""
    states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "random": torch.get_rng_state()}
    return {**progress, **states}


def restore(checkpoint, captioner, optimizer, scheduler):
    """Put a snapshot's state back; returns its progress. UserError if the checkpoint has none or is of another model."""
    if "training" not in checkpoint:
        raise UserError("--resume wants the .last.pt file of an interrupted training")
    training = checkpoint["training"]
    try:
        captioner.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(training["optimizer"])
        scheduler.load_state_dict(training["scheduler"])
    except (RuntimeError, ValueError, KeyError):
        raise UserError("--resume: the checkpoint is of another captioner; give the flags it was trained with") from None
    torch.set_rng_state(training["random"].cpu())
    return {"epoch": training["epoch"], "best": training["best"]}


def build_parser(defaults):
    """The command line, with the defaults of a preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--dataset", default="scenes", help="name of a folder under data/, or its path (default: %(default)s)")
    flag("--preset", choices=PRESETS, help="a set of defaults (default: scenes for the scenes, else paper)")
    flag("--model_type", default="gridtd", choices=MODELS, help="the captioner (default: %(default)s)")
    flag("--encoder", choices=ENCODERS, help="the image encoder (default: %(default)s)")
    flag("--encoder_weights", help="state dict file, or 'random' (default: those of the cached features, else ImageNet's where there are some)")
    flag("--num_head", type=int, default=8, help="attention heads of the multi-head captioner (default: %(default)s)")
    flag("--embed_dim", type=int, help="word embedding dimensions (default: %(default)s)")
    flag("--hidden_dim", type=int, help="LSTM and attention dimensions (default: %(default)s)")
    flag("--dropout", type=float, help="dropout probability before the last layer (default: %(default)s)")
    flag("--epochs", type=int, help="passes over the training images (default: %(default)s)")
    flag("--batch_size", type=int, help="images a step (default: %(default)s)")
    flag("--captions_per_image", type=int, default=5, help="captions of each image a step, 1 to 5 (default: %(default)s)")
    flag("--decoder_lr", type=float, help="learning rate of all but the encoder (default: %(default)s)")
    flag("--encoder_lr", type=float, help="learning rate of the encoder if it is tuned (default: %(default)s)")
    flag("--schedule", choices=("plateau", "cosine"), help="plateau: x0.8 after 2 epochs without a gain in CIDEr; cosine: one cycle (default: %(default)s)")
    flag("--grad_clip", type=float, default=0.1, help="clamp every gradient to +- this value (default: %(default)s)")
    flag("--ss_prob", type=float, default=0.0, help="scheduled sampling: probability of feeding back a predicted word (default: %(default)s)")
    flag("--finetune_encoder", action=argparse.BooleanOptionalAction, default=False, help="train the encoder too (default: %(default)s)")
    flag("--pretrain_epochs", type=int, help="epochs in which the encoder first learns to name the annotated objects (default: %(default)s)")
    flag("--augment", action=argparse.BooleanOptionalAction, help="jitter and mirror the training images (default: %(default)s)")
    flag("--bfloat16", action=argparse.BooleanOptionalAction, default=False, help="compute in bfloat16 where it is safe: twice as fast on CPUs and GPUs that have it (default: %(default)s)")
    flag("--workers", type=int, default=2, help="processes that read images (default: %(default)s)")
    flag("--output", help="where the best captioner goes (default: checkpoints/DATASET-MODEL_TYPE.pt)")
    flag("--resume", help="the .last.pt file of a training to go on with")
    add_decoding_flags(parser, max_length=20)
    add_common_flags(parser)
    parser.set_defaults(**defaults)
    return parser


def parse_arguments(arguments=None):
    """The flags, with the preset's defaults where nothing is given."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--dataset", default="scenes")
    first.add_argument("--preset", choices=PRESETS)
    first.add_argument("--model_type", choices=MODELS, default="gridtd")
    chosen, _ = first.parse_known_args(arguments)
    preset = chosen.preset or ("scenes" if dataset_folder(chosen.dataset).name == "scenes" else "paper")
    defaults = PRESETS[preset] | (PAPER_MODELS[chosen.model_type] if preset == "paper" else {})
    args = build_parser(defaults).parse_args(arguments)
    args.output = args.output or f"checkpoints/{dataset_folder(args.dataset).name}-{args.model_type}.pt"
    return args


def main():
    """Read the data, build or pretrain the encoder, and train."""
    args = parse_arguments()
    decoding_options(args)  # a wrong one is told before the training, not after its first epoch
    device = choose_device(args.device)
    set_seed(args.seed)
    folder = dataset_folder(args.dataset)
    train_set, val_set = load_datasets(args, folder, ENCODERS[args.encoder].image_size)
    weights = args.encoder_weights
    if train_set.features and weights is None:
        weights = encoder_path(folder, args.encoder)
    encoder = build_encoder(args.encoder, weights).to(memory_format=torch.channels_last)
    check_cache(train_set, encoder)
    if args.pretrain_epochs and not args.resume and not train_set.features:
        pretrain_encoder(encoder.requires_grad_(True), train_set, args, device)
    encoder.requires_grad_(args.finetune_encoder)
    names = CaptionerConfig.__dataclass_fields__.keys()
    config = CaptionerConfig(**{name: getattr(args, name) for name in names})
    captioner = build_captioner(config, train_set.vocabulary, encoder).to(device)
    fit(captioner, train_set, val_set, args)


if __name__ == "__main__":
    run(main)
