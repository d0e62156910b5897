"""Train a small image and text encoder of CLIP's form on a prepared dataset, from nothing.

    python train_clip.py --dataset scenes --stem scenes_vgg \
        --stem_weights checkpoints/scenes-gridtd.pt           # checkpoints/clip-scenes
    python train_clip.py --dataset flickr8k --stem timm/tf_efficientnet_lite2

It is what a CLIPmapper needs where CLIP's own weights cannot be had (see contrastive.py), and **is
not CLIP**. An image's partner in a step is one of its captions; of the drawn scenes also a question
with its answer, unless that is "no". The loss is the mean of CLIP's and of that of FILIP (Yao et
al. 2022), in which words look for patches. The folder that is written is of the epoch with the best
recall on the split val. OUTPUT/training.pt holds what is needed to go on: the same command goes on
where an interrupted one stopped.
"""

import math
from pathlib import Path

from commandline import (
    CommandLine,
    Flag,
    UserError,
    add_common_flags,
    add_flags,
    check_limits,
    choose_device,
    provenance,
    require_writable,
    run,
    set_seed,
    write_json,
)
from lateimports import after_parsing, import_what_waits
from prepared import dataset_folder, read_info

with after_parsing(globals()):
    import torch

    from captiondata import CaptionDataset
    from contrastive import (
        build_stem,
        contrastive_loss,
        image_tokens,
        new_clip,
        patches_of_split,
        similarities,
        similarity,
    )
    from epochtraining import Epochs
    from questions import read_questions

AT_LEAST_1 = (1, math.inf)
LARGEST_SCALE = 100  # by which similarities are multiplied, as in CLIP
RECALLED = (1, 5)  # the k of R@k
FLAGS = [
    Flag("dataset", "the prepared dataset, by its name under data/ or its folder", "scenes"),
    Flag("stem", "the encoder whose regions are the patches", "scenes_vgg"),
    Flag(
        "stem_weights",
        "its weights: a state dict's file, a captioner, or 'random'",
        metavar="FILE",
        shown="the published ones",
    ),
    Flag(
        "stem_stages",
        "stages of it; what these are given is pooled and stands beside the regions",
        (),
        type=str,
        nargs="*",
        metavar="STAGE",
        shown="none",
    ),
    Flag("output", "the folder", type=Path, metavar="FOLDER", shown="checkpoints/clip-DATASET"),
    Flag("epochs", "passes over the training images", 60, limits=AT_LEAST_1),
    Flag("batch_size", "images in a step", 250, limits=(2, math.inf)),
    Flag("lr", "the highest learning rate", 1e-3, limits=(0, 1)),
    Flag("weight_decay", "of AdamW", 0.1, limits=(0, 1)),
    Flag("patch_dropout", "the share of patches that a step takes away", 0.25, limits=(0, 0.9)),
    Flag("width", "channels of both transformers", 192, limits=AT_LEAST_1),
    Flag("layers", "layers of both transformers", 4, limits=AT_LEAST_1),
    Flag("heads", "attention heads of a layer", 6, limits=AT_LEAST_1),
    Flag("projection", "dimensions in which images and texts are compared", 128, limits=AT_LEAST_1),
]
REPEATED = ("epochs", "batch_size", "lr", "weight_decay", "patch_dropout", "width", "layers")
REPEATED += ("heads", "projection", "seed", "stem", "stem_stages")


def parse_arguments(arguments=None):
    """The parsed flags; UserError for those that do not go together."""
    parser = CommandLine(description=__doc__)
    add_flags(parser, FLAGS)
    add_common_flags(parser)
    args = parser.parse_args(arguments)
    check_limits(vars(args), FLAGS)
    if args.width % args.heads:
        raise UserError(f"--width {args.width} is no multiple of --heads {args.heads}")
    return args


def texts_of(folder, split):
    """Of each image of a split the texts that are true of it, in order: lists of strings."""
    dataset = CaptionDataset(folder, split)
    texts = [list(entry["captions"]) for entry in dataset.entries]
    if dataset.info["name"] == "scenes":
        place = {entry["file"]: number for number, entry in enumerate(dataset.entries)}
        for question in read_questions(folder, split):
            if question.answer == "no":
                continue  # it tells what is not there
            texts[place[question.file]].append(f"{question.text} {question.answer}")
    return texts


def are_equal(texts):
    """Which of some texts are the same text: bool (B, B)."""
    number_of = {}
    for text in texts:
        number_of.setdefault(text, len(number_of))
    numbers = torch.tensor([number_of[text] for text in texts])
    return numbers.unsqueeze(1) == numbers


class Training:
    """A Clip, and the images and texts of a dataset.

    maps: of each split (N, C, h, w), half precision, on the device; texts: of each split and image
    a list; settings: the flags that a resumed training has to repeat.
    """

    def __init__(self, clip, maps, texts, settings, device):
        steps = settings["epochs"] * max(1, len(maps["train"]) // settings["batch_size"])
        self.clip = clip
        self.model = clip.model.to(device)
        self.settings = settings
        self.device = device
        self.epochs = Epochs(self.model, self.model.parameters(), settings, steps, device)
        self.maps = maps
        self.texts = texts

    def train_epoch(self):
        """One pass over the training images; returns the mean loss in nats."""
        size = self.settings["batch_size"]
        generator = self.epochs.generator()
        order = torch.randperm(len(self.maps["train"]), generator=generator)
        losses = []
        self.model.train()
        for batch in order.split(size):
            if len(batch) == size or len(order) < size:
                losses.append(self.train_step(batch, generator))
        return float(torch.stack(losses).mean())

    def train_step(self, batch, generator):
        """One step on the images of these numbers; returns the loss."""
        texts = []
        for index in batch.tolist():
            known = self.texts["train"][index]
            texts.append(known[int(torch.randint(len(known), (), generator=generator))])
        same = are_equal(texts).to(self.device)
        maps = self.maps["train"][batch.to(self.device)].float()
        kept = self.kept_patches(len(batch), generator)
        with self.epochs.autocast():
            tokens = image_tokens(self.model, maps, kept)
            ids = self.clip.token_ids(texts).to(self.device)
            whole, fine = similarities(self.model, tokens, ids)
        losses = [contrastive_loss(scores.float(), same) for scores in (whole, fine)]
        loss = self.epochs.descend(sum(losses) / 2)
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        return loss

    def kept_patches(self, images, generator):
        """Which patches of so many images a step leaves, at random: long (B, k), rising."""
        height, width = self.maps["train"].shape[2:]
        count = height * width
        left = count - round(self.settings["patch_dropout"] * count)
        order = torch.rand(images, count, generator=generator).argsort(dim=1)
        return order[:, :left].sort(dim=1).values.to(self.device)

    def measured(self, split):
        """How often an image's first caption is found among all of the split, as {"R@k": share}."""
        self.model.eval()
        texts = [known[0] for known in self.texts[split]]
        token_ids = self.clip.token_ids(texts).to(self.device)
        scores = []
        for maps in self.maps[split].split(250):
            with torch.no_grad():
                tokens = image_tokens(self.model, maps.float())
                scores.append(similarity(self.model, tokens, token_ids))
        scores = torch.cat(scores)
        own = scores.diagonal().unsqueeze(1)
        better = (scores > own) & ~are_equal(texts).to(self.device)
        ranks = better.sum(dim=1)
        return {f"R@{k}": float((ranks < k).float().mean()) for k in RECALLED}


def train_clip(args, folder, output, device):
    """Train into the folder `output`, or go on with that."""
    texts = {split: texts_of(folder, split) for split in ("train", "val")}
    stem = build_stem(args.stem, args.stem_weights, args.stem_stages).to(device)
    everything = [text for known in texts["train"] for text in known]
    clip = new_clip(stem, everything, args.width, args.layers, args.heads, args.projection)
    maps = {}
    for split in texts:
        parts = [part.half() for part in patches_of_split(clip, folder, split, device)]
        maps[split] = torch.cat(parts)
    settings = {name: vars(args)[name] for name in REPEATED} | {"dataset": folder.name}
    training = Training(clip, maps, texts, settings, device)
    parameters = sum(weight.numel() for weight in training.model.parameters())
    print(f"{len(maps['train'])} images, {parameters:,} parameters, on {device}")
    last = output / "training.pt"
    training.epochs.fit(training, last, "R@1", lambda: clip.save(output))
    report = {
        **provenance(args.seed),
        "val": training.epochs.best,
        "history": training.epochs.history,
    }
    write_json(output / "about.json", report)
    last.unlink()
    print(f"val R@1 {training.epochs.best:.3f}; the encoders are {output}")


def main(arguments=None):
    """Train, as the command line says."""
    args = parse_arguments(arguments)
    import_what_waits()
    set_seed(args.seed)
    folder = dataset_folder(args.dataset)
    read_info(folder)
    output = args.output or Path(f"checkpoints/clip-{folder.name}")
    require_writable(output / "config.json")
    train_clip(args, folder, output, choose_device(args.device))


def command():
    """The command `lrp-train-clip` of an installation."""
    run(main)


if __name__ == "__main__":
    run(main)
