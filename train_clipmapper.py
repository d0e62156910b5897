"""Train a CLIPmapper on a prepared dataset: to caption its images, or to answer questions on them.

    python train.py --model_type clipmapper --task caption --dataset flickr8k \
        --clip openai/clip-vit-base-patch32          # checkpoints/clipmapper-flickr8k-caption
    python train_clipmapper.py --task vqa --dataset scenes --clip checkpoints/clip-scenes
    python train_clipmapper.py --task vqa --dataset scenes --clip checkpoints/clip-scenes --blind

`train.py --model_type clipmapper` is this command. CLIP is frozen, so its image tokens are computed
once. The folder that is written is of the epoch with the best CIDEr, or accuracy, on the split val;
about.json in it says how it did there and, once, on the split test. OUTPUT/training.pt holds what
is needed to go on: the same command goes on where an interrupted one stopped.

Questions are those of questions.py, about the drawn scenes. --blind takes the image away, in
training and in measuring, and so tells what the wording of the questions alone gives.
"""

import math
from pathlib import Path

import names
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
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    from captiondata import CaptionDataset
    from captionmetrics import caption_metrics
    from clipmappermodel import (
        ClipMapper,
        ClipMapperCaptioner,
        ClipMapperConfig,
        save_clipmapper,
    )
    from contrastive import load_clip, load_tensors, patches_of_split
    from epochtraining import Epochs
    from questions import answers_of, chance, read_questions

AT_LEAST_1 = (1, math.inf)
FLAGS = [
    Flag("task", "what to learn", "caption", choices=names.CLIPMAPPER_TASKS),
    Flag("dataset", "the prepared dataset, by its name under data/ or its folder", "scenes"),
    Flag(
        "clip",
        "a CLIP of Hugging Face's hub, or a folder such as train_clip.py makes",
        metavar="NAME",
        shown="checkpoints/clip-DATASET",
    ),
    Flag(
        "output",
        "the folder",
        type=Path,
        metavar="FOLDER",
        shown="checkpoints/clipmapper-DATASET-TASK[-blind]",
    ),
    Flag("epochs", "passes over the training images, or questions", 20, limits=AT_LEAST_1),
    Flag("batch_size", "captions, or questions, in a step", 128, limits=AT_LEAST_1),
    Flag("lr", "the highest learning rate", 5e-4, limits=(0, 1)),
    Flag("weight_decay", "of AdamW", 0.05, limits=(0, 1)),
    Flag("label_smoothing", "how much of the target goes to all alike", 0.0, limits=(0, 1)),
    Flag("width", "channels of the mapper", 256, limits=AT_LEAST_1),
    Flag("layers", "layers of the mapper", 4, limits=AT_LEAST_1),
    Flag("heads", "attention heads of a layer", 8, limits=AT_LEAST_1),
    Flag("prefix", "learned tokens before the text", 10, limits=AT_LEAST_1),
    Flag("dropout", "of what attention and MLPs add to the tokens", 0.1, limits=(0, 0.9)),
    Flag(
        "start",
        "begin with the mapper of this folder, which has to be of the same sizes",
        metavar="FOLDER",
        shown="random weights",
    ),
    Flag("places", "tell the mapper again where each patch is", False, switch=True),
    Flag("blind", "take the image away", False, switch=True),
    Flag("model_type", "as train.py has it", "clipmapper", choices=("clipmapper",)),
]
REPEATED = ("task", "epochs", "batch_size", "lr", "weight_decay", "label_smoothing", "width")
REPEATED += ("layers", "heads", "prefix", "dropout", "places", "start", "blind", "seed")


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


# ------------------------------------------------------------------------------------ the examples


class Captions:
    """The captions of a split, to be said word by word."""

    def __init__(self, folder, split, clip):
        self.dataset = CaptionDataset(folder, split)
        self.clip = clip

    def __len__(self):
        return len(self.dataset)

    def order(self, generator):
        """All images in random order: long (N,)."""
        return torch.randperm(len(self), generator=generator)

    def batch(self, chosen, generator):
        """Of these images the numbers, the inputs and the targets (B, K) of a caption each.

        Where nothing follows, the target is -100.
        """
        texts = []
        for number in chosen:
            captions = self.dataset.entries[number]["captions"]
            texts.append(captions[int(torch.randint(len(captions), (), generator=generator))])
        ids = self.clip.token_ids(texts)
        targets = ids[:, 1:].clone()
        after_end = (targets == self.clip.tokenizer.eos_token_id).cumsum(dim=1)
        after_end -= (targets == self.clip.tokenizer.eos_token_id).long()
        targets[after_end > 0] = -100
        return chosen, ids[:, :-1], targets

    def measured(self, captioner, tokens):
        """CIDEr and BLEU of what a captioner says; tokens: (N, n, D) of all images."""
        said = {}
        for start in range(0, len(tokens), 100):
            part = tokens[start : start + 100].to(captioner.device).float()
            for number, ids in enumerate(captioner.decoded_tokens(part), start):
                said[number] = captioner.words_of(ids)[0]
        return caption_metrics(said, self.dataset.references())


class Questions:
    """The questions on a split of the scenes, each with its answer."""

    def __init__(self, folder, split, clip):
        self.questions = read_questions(folder, split)
        self.clip = clip
        self.answers = ()  # those that can be given, in order
        entries = CaptionDataset(folder, split).entries
        place = {entry["file"]: number for number, entry in enumerate(entries)}
        self.images = [place[question.file] for question in self.questions]

    def __len__(self):
        return len(self.questions)

    def order(self, generator):
        """The images in random order, each with all of its questions: long (N,)."""
        images = torch.tensor(self.images)
        rank = torch.randperm(int(images.max()) + 1, generator=generator)
        return rank[images].argsort(stable=True)

    def batch(self, chosen, generator=None):
        """Of these questions the images' numbers, the token ids (B, K), the answers' (B,)."""
        asked = [self.questions[number] for number in chosen]
        ids = self.clip.token_ids([question.text for question in asked])
        targets = torch.tensor([self.number_of(question.answer) for question in asked])
        return [self.images[number] for number in chosen], ids, targets

    def number_of(self, answer):
        """Which of the answers it is; -100 for one that cannot be given."""
        return self.answers.index(answer) if answer in self.answers else -100

    def measured(self, captioner, tokens):
        """The share of right answers, of all and of each kind, and what chance gives."""
        right = {}
        for start in range(0, len(self), 500):
            chosen = range(start, min(start + 500, len(self)))
            images, ids, targets = self.batch(chosen)
            part, owner = tokens_and_owner(tokens, images, captioner.device)
            ids = ids.to(captioner.device)
            model = captioner.model
            with torch.no_grad():
                logits = model.read(part, model.text_tokens(ids), model.seen(ids), owner)
            best = logits.argmax(dim=-1).cpu()
            for number, hit in zip(chosen, (best == targets).tolist()):
                right.setdefault(self.questions[number].kind, []).append(hit)
        found = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
        everything = [hit for hits in right.values() for hit in hits]
        accuracy = sum(everything) / len(everything)
        return {"accuracy": accuracy, **found, "chance": chance(self.questions)}


EXAMPLES = {"caption": Captions, "vqa": Questions}
CRITERION = {"caption": "CIDEr", "vqa": "accuracy"}


# ---------------------------------------------------------------------------------------- training


class Training:
    """A ClipMapper on the examples of a dataset.

    examples: of each split; tokens: of each split stage one's image tokens (N, n, D) in half
    precision; settings: the flags that a resumed training has to repeat.
    """

    def __init__(self, model, clip, examples, tokens, settings, device):
        steps = settings["epochs"] * -(-len(examples["train"]) // settings["batch_size"])
        self.epochs = Epochs(model, model.mapper_parameters(), settings, steps, device)
        self.model = model
        self.captioner = ClipMapperCaptioner(model, clip)
        self.settings = settings
        self.device = device
        self.examples = examples
        self.tokens = tokens

    def train_epoch(self):
        """One pass over the training examples; returns the mean loss in nats."""
        examples = self.examples["train"]
        generator = self.epochs.generator()
        losses = []
        self.model.train()
        order = examples.order(generator)
        for batch in tqdm(order.split(self.settings["batch_size"]), leave=False, unit="step"):
            losses.append(self.train_step(*examples.batch(batch.tolist(), generator)))
        return float(torch.stack(losses).mean())

    def train_step(self, images, ids, targets):
        """One step; returns the loss."""
        tokens, owner = tokens_and_owner(self.tokens["train"], images, self.device)
        ids = ids.to(self.device)
        targets = targets.to(self.device)
        with self.epochs.autocast():
            with torch.no_grad():
                words = self.model.text_tokens(ids)
            logits = self.model.read(tokens, words.float(), self.model.seen(ids), owner)
        loss = cross_entropy(
            logits.float().flatten(0, -2),
            targets.flatten(),
            label_smoothing=self.settings["label_smoothing"],
        )
        return self.epochs.descend(loss)

    def measured(self, split):
        """The figures of a split."""
        self.model.eval()
        return self.examples[split].measured(self.captioner, self.tokens[split])


def tokens_and_owner(tokens, images, device):
    """The tokens of images, each once, and which row each place has: None if all are different.

    tokens (N, n, D) of all images; images: B numbers.
    """
    known, owner = torch.tensor(images).unique(return_inverse=True)
    if len(known) == len(images):
        return tokens[images].to(device).float(), None
    return tokens[known].to(device).float(), owner.to(device)


def tokens_of(clip, model, folder, splits, blind, device):
    """Stage one's image tokens of each split, (N, n, D) in half precision; zeros if blind."""
    vision = clip.model.config.vision_config
    shape = (1 + (vision.image_size // vision.patch_size) ** 2, vision.hidden_size)
    tokens = {}
    for split in splits:
        if blind:
            count = len(CaptionDataset(folder, split))
            tokens[split] = torch.zeros(count, *shape, dtype=torch.float16)
            continue
        parts = []
        for maps in patches_of_split(clip, folder, split, device):
            with torch.inference_mode():
                parts.append(model.image_tokens(maps).half().cpu())
        tokens[split] = torch.cat(parts).clone()
    return tokens


def train_clipmapper(args, folder, output, device):
    """Train into the folder `output`, or go on with that."""
    clip = load_clip(args.clip or f"checkpoints/clip-{folder.name}")
    splits = [split for split in ("train", "val", "test") if split in read_info(folder)["splits"]]
    examples = {split: EXAMPLES[args.task](folder, split, clip) for split in splits}
    answers = ()
    if args.task == "vqa":
        answers = tuple(answers_of(examples["train"].questions))
        for part in examples.values():
            part.answers = answers
    sizes = (args.width, args.layers, args.heads, args.prefix, args.dropout, args.places)
    model = ClipMapper(ClipMapperConfig(args.task, answers, *sizes), clip).to(device)
    if args.start:
        load_tensors(model, Path(args.start) / "model.safetensors")
    tokens = tokens_of(clip, model, folder, splits, args.blind, device)
    settings = {name: vars(args)[name] for name in REPEATED} | {"dataset": folder.name}
    training = Training(model, clip, examples, tokens, settings, device)
    trained = sum(weight.numel() for weight in training.epochs.parameters)
    print(f"{len(examples['train'])} examples, {trained:,} parameters to train, on {device}")
    last = output / "training.pt"
    training.epochs.fit(
        training, last, CRITERION[args.task], lambda: save_clipmapper(output, model, clip)
    )
    report = {**provenance(args.seed), "settings": settings, "history": training.epochs.history}
    load_tensors(model, output / "model.safetensors")  # those of the best epoch
    report["measured"] = {split: training.measured(split) for split in splits[1:]}
    write_json(output / "about.json", report)
    last.unlink()
    for split, found in report["measured"].items():
        figures = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        print(f"{split}: {figures}")
    print(f"the CLIPmapper is {output}")


def main(arguments=None):
    """Train, as the command line says."""
    args = parse_arguments(arguments)
    import_what_waits()
    set_seed(args.seed)
    folder = dataset_folder(args.dataset)
    info = read_info(folder)
    if args.task == "vqa" and info["name"] != "scenes":
        raise UserError("--task vqa wants the drawn scenes, of which questions.py asks")
    blind = "-blind" if args.blind else ""
    output = args.output or Path(f"checkpoints/clipmapper-{folder.name}-{args.task}{blind}")
    require_writable(output / "config.json")
    train_clipmapper(args, folder, output, choose_device(args.device))


def command():
    """The command `lrp-train-clipmapper` of an installation."""
    run(main)


if __name__ == "__main__":
    run(main)
