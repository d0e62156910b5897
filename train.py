"""Train a captioner with cross-entropy; an encoder without ImageNet weights first learns to name
the objects in the images. Fine-tune a trained captioner by SCST, by LRP-inference, or by both.

    python train.py                             # the embedded scenes, a few minutes on 2 cores
    python train.py --dataset flickr8k --encoder squeezenet1_1    # on cached features, if
                                                # preparedataset.py made them
    python train.py --dataset coco2017 --encoder vgg16 --finetune_encoder     # from the images
    python train.py --dataset flickr8k --encoder inception_v3 --model_type aoa --preset flickr8k
                                                # docs/datasets.md
    python train.py --model_type soft           # Show, Attend and Tell, with its doubly stochastic
                                                # loss
    python train.py --model_type clipmapper     # has flags of its own: train_clipmapper.py --help
    python train.py --resume checkpoints/scenes-gridtd.last.pt
                                                # go on where it stopped, to the same end
    python train.py --cider_tune                # SCST from checkpoints/scenes-gridtd.pt, or
                                                # --resume CKPT
    python train.py --lrp_tune                  # LRP-inference fine-tuning
    python train.py --lrp_tune --lrp_lambda 1   # its baseline: as many steps without LRP
    python train.py --lrp_tune --lrp_control random    # the same weights in random order
    python train.py --lrp_cider_tune            # LRP-inference with SCST
    torchrun --nproc_per_node=4 train.py ...    # the same steps, each divided among 4 processes

After every epoch the validation images are captioned. The captioner, the best by CIDEr or after
fine-tuning the last, is written to checkpoints/NAME.pt, and the last one, with all that is needed
to go on, to checkpoints/NAME.last.pt. The figures of each epoch are a line of
checkpoints/NAME.jsonl and a point of the curves in checkpoints/NAME.training.png.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from commandline import (
    COMMON_FLAGS,
    CommandLine,
    Flag,
    UserError,
    add_common_flags,
    add_flags,
    check_limits,
    check_modes,
    provenance,
    require_writable,
    run,
    set_seed,
)
from decodingflags import add_decoding_flags, decoding_options
from lateimports import after_parsing, import_what_waits
from names import CROSS_ENTROPY, DROPOUTS, ENCODERS, LRP_CONTROLS, MODELS, SCHEDULES, TUNING_MODES
from prepared import dataset_folder, folder_of, read_info, source_of

with after_parsing(globals()):
    import torch

    import distributed
    import train_clipmapper
    from basemodel import read_checkpoint
    from captiondata import CaptionDataset
    from captioner import (
        CaptionerConfig,
        build_captioner,
        load_captioner,
    )
    from encoder import CutEncoder, build_encoder, encoder_spec, has_learnt
    from featurecache import cached_encoders, encoder_path, features_path, versions_of
    from images import image_transform
    from objectives import (
        ObjectiveConfig,
        build_objective,
    )
    from trainer import (
        Trainer,
        TrainingConfig,
        cache_in_memory,
        pretrain_encoder,
        show_overview,
    )

FROM_START = (CROSS_ENTROPY,)
SCST_MODES = ("cider_tune", "lrp_cider_tune")
MODE_NAMES = {  # what messages call the modes
    CROSS_ENTROPY: "training by cross-entropy",
    "cider_tune": "--cider_tune",
    "lrp_tune": "--lrp_tune",
    "lrp_cider_tune": "--lrp_cider_tune",
}
AT_LEAST_1 = (1, math.inf)
AT_LEAST_0 = (0, math.inf)
FRACTION = (0, 1)


def known_encoder(name):
    """The name of an encoder; UserError if there is none of that name."""
    if name not in ENCODERS:
        encoder_spec(name)
    return name


# What overrides the defaults of the flags. The flags are declared below, and their own defaults
# are those of the authors' code (§4 and the final version).
PRESETS = {
    "paper": {},
    "scenes": {  # smaller and quicker, for an encoder that learns from nothing in a few minutes
        "encoder": "scenes_vgg",
        "embed_dim": 128,
        "hidden_dim": 192,
        "dropout": 0.3,
        "epochs": 4,
        "decoder_lr": 3e-3,
        "encoder_lr": 2e-3,
        "schedule": "cosine",
        "augment": False,
        "pretrain_epochs": 4,
    },
    # For few photographs and cached features, as one trains a captioner today: more dropout, a
    # higher learning rate for fewer epochs, and the average of the weights.
    "flickr8k": {
        "encoder": "inception_v3",
        "epochs": 10,
        "batch_size": 16,
        "decoder_lr": 1e-3,
        "schedule": "cosine",
        "embed_dropout": 0.5,
        "region_dropout": 0.2,
        "attention_dropout": 0.0,
        "adam_beta1": 0.9,
        "grad_clip": 0.0,
        "grad_norm": 5.0,
        "ema_decay": 0.999,
        "label_smoothing": 0.1,
    },
}
# What the authors' code sets for one captioner only. It has no soft attention.
PAPER_MODELS = {
    "adaptive": {"epochs": 30, "ss_prob": 0.2},
    "gridtd": {},
    "aoa": {"epochs": 50, "dropout": 0.3},
    "soft": {},
}
# What fine-tuning changes. The paper's LRP-inference: 1e-6, 320 steps on Flickr30k, 500 on COCO
# (§4.4). There is no dropout: the captions that SCST samples come from the distribution whose
# log-probability is raised.
TUNING_COMMON = dict.fromkeys(DROPOUTS, 0.0) | {
    "epochs": 10_000,
    "schedule": "constant",
    "pretrain_epochs": 0,
    "ss_prob": 0.0,
    "ema_decay": 0.0,
    "label_smoothing": 0.0,
    "max_length": None,
}
TUNING = {
    "lrp_tune": {"decoder_lr": 1e-6, "encoder_lr": 1e-6, "max_iterations": 500},
    "cider_tune": {"decoder_lr": 5e-5, "encoder_lr": 5e-5, "max_iterations": 1000},
    "lrp_cider_tune": {"decoder_lr": 5e-5, "encoder_lr": 5e-5, "max_iterations": 1000},
}
FLICKR_ITERATIONS = 320

DECIDING_FLAGS = [  # the defaults of the other flags depend on these
    Flag(
        "dataset",
        "name of a folder under data/, or its path",
        shown="that of the captioner to --resume, else scenes",
    ),
    Flag(
        "preset",
        "a set of defaults",
        choices=PRESETS,
        shown="scenes for the scenes, else paper",
    ),
    Flag("model_type", "the captioner", "gridtd", choices=MODELS),
    Flag(
        "resume",
        "the .last.pt file of a training to go on with, or a captioner to fine-tune",
        shown="checkpoints/DATASET-MODEL_TYPE.pt",
    ),
]
ENCODER = "vgg16"  # unless the preset has another
MODEL_FLAGS = [
    Flag(
        "encoder",
        f"the image encoder: {', '.join(ENCODERS)}, or timm/NAME for any network of timm",
        type=known_encoder,
        metavar="NAME",
        shown=f"the preset's, or {ENCODER}; if only another's features are cached, that one",
    ),
    Flag(
        "encoder_weights",
        "state dict file, or 'random'",
        shown="those of the cached features, else ImageNet's where there are some",
        modes=FROM_START,
    ),
    Flag(
        "num_head",
        "attention heads of the multi-head captioner",
        8,
        limits=AT_LEAST_1,
        modes=FROM_START,
    ),
    Flag("embed_dim", "word embedding dimensions", 512, limits=AT_LEAST_1, modes=FROM_START),
    Flag("hidden_dim", "LSTM and attention dimensions", 512, limits=AT_LEAST_1, modes=FROM_START),
    Flag(
        "dropout", "dropout probability before the last layer", 0.5, limits=FRACTION, repeated=True
    ),
    Flag("embed_dropout", "of the word embeddings", 0.0, limits=FRACTION, repeated=True),
    Flag("region_dropout", "of the regions' features", 0.0, limits=FRACTION, repeated=True),
    Flag(
        "attention_dropout",
        "of the multi-head attention's weights",
        0.1,
        limits=FRACTION,
        repeated=True,
    ),
]
TRAINING_FLAGS = [
    Flag("epochs", "passes over the training images", 20, limits=AT_LEAST_1),
    Flag("batch_size", "images in a step", 32, limits=AT_LEAST_1, repeated=True),
    Flag(
        "captions_per_image",
        "captions of each image in a step, 1 to 5",
        5,
        limits=(1, 5),
        modes=(CROSS_ENTROPY, "lrp_tune"),
        repeated=True,
    ),
    Flag(
        "decoder_lr", "learning rate of all but the encoder", 5e-4, limits=AT_LEAST_0, repeated=True
    ),
    Flag(
        "encoder_lr",
        "learning rate of the encoder if it is trained",
        1e-4,
        limits=AT_LEAST_0,
        repeated=True,
    ),
    Flag(
        "schedule",
        "plateau: x0.8 after 2 epochs without a gain in CIDEr; cosine: one cycle",
        "plateau",
        choices=SCHEDULES,
        repeated=True,
    ),
    Flag("adam_beta1", "Adam's decay of the mean gradient", 0.8, limits=(0, 0.9999), repeated=True),
    Flag(
        "max_iterations",
        "stop after so many steps",
        type=int,
        limits=AT_LEAST_1,
        shown="after the epochs; in fine-tuning LRP-inference 500, on Flickr 320, SCST 1000",
    ),
    Flag(
        "grad_clip",
        "clamp every gradient to +- this value; 0: do not",
        0.1,
        limits=AT_LEAST_0,
        repeated=True,
    ),
    Flag(
        "grad_norm",
        "scale the gradients down to this norm; 0: do not",
        0.0,
        limits=AT_LEAST_0,
        repeated=True,
    ),
    Flag(
        "ema_decay",
        "validate and keep the exponential moving average of the weights; "
        "0: the weights themselves",
        0.0,
        limits=FRACTION,
        repeated=True,
    ),
    Flag(
        "label_smoothing",
        "how much of the target's probability goes to all words alike",
        0.0,
        limits=FRACTION,
        modes=FROM_START,
        repeated=True,
    ),
    Flag(
        "ss_prob",
        "scheduled sampling: probability of feeding back a predicted word",
        0.0,
        limits=FRACTION,
        modes=FROM_START,
        repeated=True,
    ),
    Flag("finetune_encoder", "train the encoder too", False, repeated=True),
    Flag(
        "finetune_from",
        "train the encoder from this stage on, on what preparedataset.py --stage cached or on the "
        "images; the statistics of its batch-norms stay as they are",
        metavar="STAGE",
        shown="the encoder is frozen",
        repeated=True,
    ),
    Flag(
        "pretrain_epochs",
        "epochs in which the encoder first learns to name the annotated objects",
        0,
        limits=AT_LEAST_0,
        modes=FROM_START,
    ),
    Flag(
        "augment",
        "jitter and mirror the training images; of cached features, take those of "
        "preparedataset.py --augment K in turn",
        True,
        repeated=True,
    ),
    Flag(
        "bfloat16",
        "compute in bfloat16 where it is safe: twice as fast on CPUs and GPUs that have it",
        False,
        repeated=True,
    ),
    Flag("workers", "processes that read images", 2, limits=AT_LEAST_0),
    Flag(
        "cache_in_memory",
        "read all cached features first, onto the GPU if they fit; else they are read step by step",
        False,
        switch=True,
    ),
    Flag(
        "output",
        "where the captioner goes",
        shown="checkpoints/DATASET-MODEL_TYPE[-MODE].pt; for LRP-inference also its form, control "
        "and lambda if they are not the usual ones",
    ),
    Flag(
        "checkpoint_every",
        "steps from one checkpoint to the next, from which a training can be resumed",
        500,
        limits=AT_LEAST_1,
    ),
]
MODE_FLAGS = [
    Flag("cider_tune", "SCST: CIDEr-D of sampled captions as reward", False, switch=True),
    Flag("lrp_tune", "LRP-inference with cross-entropy", False, switch=True),
    Flag("lrp_cider_tune", "LRP-inference with SCST", False, switch=True),
]
TUNING_FLAGS = [
    Flag(
        "start_share",
        "how much of the weights that are validated and kept comes from those that fine-tuning "
        "started from, 0 to 1",
        0.0,
        limits=FRACTION,
        modes=TUNING_MODES,
        repeated=True,
    ),
    Flag(
        "lrp_lambda",
        "weight of the plain cross-entropy, 0 to 1; 1 is the baseline without LRP",
        0.5,
        limits=FRACTION,
        modes=("lrp_tune",),
        repeated=True,
    ),
    Flag(
        "lrp_form",
        "weights from the last layer's relevance, or from the image's heat map as in the paper's "
        "earlier version",
        "last_layer",
        choices=("last_layer", "image"),
        modes=("lrp_tune",),
        repeated=True,
    ),
    Flag(
        "lrp_control",
        "what takes the place of relevance in the last layer: nothing does; the same weights, "
        "permuted over the units, or of another word; the size of the unit; one number a word",
        "none",
        choices=LRP_CONTROLS,
        modes=("lrp_tune",),
        repeated=True,
    ),
    Flag(
        "samples",
        "captions that SCST draws of an image",
        5,
        limits=AT_LEAST_1,
        modes=SCST_MODES,
        repeated=True,
    ),
    Flag(
        "scst_baseline",
        "reward to beat: of the greedy caption, or the mean of the other samples",
        "greedy",
        choices=("greedy", "others"),
        modes=SCST_MODES,
        repeated=True,
    ),
    Flag(
        "bleu_weight",
        "weight of BLEU-4 beside CIDEr-D in the reward",
        0.0,
        limits=AT_LEAST_0,
        modes=SCST_MODES,
        repeated=True,
    ),
]
FLAGS = [*DECIDING_FLAGS, *MODEL_FLAGS, *TRAINING_FLAGS, *MODE_FLAGS, *TUNING_FLAGS]


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    mode         CROSS_ENTROPY or one of TUNING_MODES
    folder       the prepared dataset
    output       where the captioner goes
    resume       the captioner to fine-tune, or the .last.pt file of a training to go on with
    continues    whether `resume` is an interrupted training of this very mode
    given        names of the flags that were given another value than their default
    device       its name, or None for the default
    captioner    sizes of a captioner that is trained from the start
    encoder_weights, pretrain_epochs    how its encoder begins
    augment, cache_in_memory            how the data are read
    objective, training                 their settings
    decoding     options of the validation's captions
    settings     {name: value} of the flags that a resumed run has to repeat
    """

    mode: str
    folder: Path
    output: Path
    resume: Path | None
    continues: bool
    given: frozenset
    device: str | None
    captioner: CaptionerConfig
    encoder_weights: str | None
    pretrain_epochs: int
    augment: bool
    cache_in_memory: bool
    objective: ObjectiveConfig
    training: TrainingConfig
    decoding: dict
    settings: dict

    @property
    def needs_pixels(self):
        """The flag for which cached features do not suffice, or None."""
        if self.training.finetune_encoder:
            return "--finetune_encoder"
        if self.mode == "lrp_tune" and self.objective.lrp_form == "image":
            return "--lrp_form image"
        return None


def parse_arguments(arguments=None):
    """The Options of a command line, with the defaults of preset and mode where nothing is given.

    arguments: a list of texts; None: those of this process. UserError for what makes no sense.
    """
    mode, folder, defaults = choose_defaults(arguments)
    default_encoder = defaults.pop("encoder", ENCODER)
    parser = build_parser(defaults)
    args = parser.parse_args(arguments)
    given = frozenset(parser.given(args))
    args.encoder = args.encoder or default_encoder
    check_modes(given, FLAGS, mode, MODE_NAMES)
    if mode != CROSS_ENTROPY and "max_length" in given:
        raise UserError(f"--max_length goes with {MODE_NAMES[CROSS_ENTROPY]} only")
    check_limits(vars(args), FLAGS)
    if args.finetune_encoder and args.finetune_from:
        raise UserError("choose --finetune_encoder, for all of it, or --finetune_from STAGE")
    if args.lrp_control != "none" and args.lrp_form != "last_layer":
        raise UserError("--lrp_control goes with --lrp_form last_layer only")
    if args.scst_baseline == "others" and args.samples < 2:
        raise UserError("--scst_baseline others needs at least 2 --samples")
    import_what_waits()
    return build_options(args, mode, folder, given)


def choose_defaults(arguments):
    """The mode, the dataset's folder and the defaults that a command line's choices bring along."""
    parser = CommandLine(add_help=False)
    add_flags(parser, DECIDING_FLAGS)
    add_flags(parser, MODE_FLAGS)
    chosen, _ = parser.parse_known_args(arguments)
    mode = chosen_mode(vars(chosen))
    folder = chosen_folder(chosen.dataset, chosen.resume)
    source = source_in(folder)
    preset = chosen.preset or ("scenes" if source == "scenes" else "paper")
    defaults = dict(PRESETS[preset])
    if preset == "paper":
        defaults |= PAPER_MODELS[chosen.model_type]
    if mode != CROSS_ENTROPY:
        defaults |= TUNING_COMMON | TUNING[mode]
        if mode == "lrp_tune" and source.startswith("flickr"):
            defaults["max_iterations"] = FLICKR_ITERATIONS
    return mode, folder, defaults


def chosen_folder(dataset, resume):
    """The folder of the prepared dataset: as it is named, or that of the captioner `resume`."""
    if dataset is None and resume is not None:
        return folder_of(read_checkpoint(resume).get("about", {}))
    return dataset_folder(dataset or "scenes")


def source_in(folder):
    """What the dataset in a folder was read by; the folder's name if none is prepared there."""
    return source_of(read_info(folder)) if (folder / "info.json").exists() else folder.name


def chosen_mode(values):
    """The mode whose flag is set; values: {name of a flag: its value}."""
    for mode in TUNING_MODES:
        if values[mode]:
            return mode
    return CROSS_ENTROPY


def build_parser(defaults):
    """The command line; defaults override those of the tables."""
    parser = CommandLine(description=__doc__)
    add_flags(parser, DECIDING_FLAGS)
    add_flags(parser, MODEL_FLAGS)
    add_flags(parser, TRAINING_FLAGS)
    tuning = parser.add_argument_group("fine-tuning of a trained captioner")
    add_flags(tuning.add_mutually_exclusive_group(), MODE_FLAGS)
    add_flags(tuning, TUNING_FLAGS)
    add_decoding_flags(parser, max_length=20)
    add_common_flags(parser)
    parser.set_defaults(**defaults)
    return parser


def build_options(args, mode, folder, given):
    """The Options of parsed flags; UserError for files that make no sense."""
    values = vars(args) | {"mode": mode}
    decoding = decoding_options(args)
    resume = args.resume
    if resume is None and mode != CROSS_ENTROPY:
        resume = f"checkpoints/{folder.name}-{args.model_type}.pt"
    continues = resume is not None and is_interrupted_training(resume, mode)
    output = Path(args.output or default_output(args, mode, folder, resume, continues, given))
    if output.suffix != ".pt" or output.is_dir():
        raise UserError(f"--output {output} is not the name of a .pt file")
    if was_restarted(output):
        resume = output.with_suffix(".last.pt")
        continues = True
    repeated = [flag.name for flag in [*FLAGS, *COMMON_FLAGS] if flag.repeated]
    return Options(
        mode=mode,
        folder=folder,
        output=output,
        resume=None if resume is None else Path(resume),
        continues=continues,
        given=given,
        device=args.device,
        captioner=config_of(CaptionerConfig, values),
        encoder_weights=args.encoder_weights,
        pretrain_epochs=args.pretrain_epochs,
        augment=args.augment,
        cache_in_memory=args.cache_in_memory,
        objective=config_of(ObjectiveConfig, values),
        training=config_of(TrainingConfig, values),
        decoding=decoding,
        settings={name: values[name] for name in repeated},
    )


def config_of(config_class, values):
    """The instance of a config dataclass whose fields have the values of these names."""
    return config_class(**{field.name: values[field.name] for field in fields(config_class)})


def default_output(args, mode, folder, resume, continues, given):
    """Where the captioner goes, as text.

    A resumed training goes on in its own file. A fine-tuning's name is made of what it starts from,
    its mode, and what is unusual in LRP-inference.
    """
    if resume is None:
        stem = f"checkpoints/{folder.name}-{args.model_type}"
    else:
        stem = resume.removesuffix(".pt").removesuffix(".last")
    parts = [stem]
    if mode != CROSS_ENTROPY and not continues:
        parts.append(mode)
        if "lrp_form" in given:
            parts.append(f"form_{args.lrp_form}")
        if "lrp_control" in given:
            parts.append(f"control_{args.lrp_control}")
        if "lrp_lambda" in given:
            parts.append(f"lambda_{args.lrp_lambda}")
    return "-".join(parts) + ".pt"


def is_interrupted_training(path, mode):
    """Whether --resume names an interrupted training of this mode, not a captioner to fine-tune.

    UserError if it can be neither.
    """
    if mode != CROSS_ENTROPY and not Path(path).name.endswith(".last.pt"):
        return False
    training = read_checkpoint(path).get("training")
    if mode != CROSS_ENTROPY:
        return training is not None and training.get("mode") == mode
    if training is None:
        raise UserError(
            "--resume wants the .last.pt file of an interrupted training; "
            "a finished captioner is fine-tuned with --cider_tune or --lrp_tune"
        )
    if training.get("mode") != mode:
        raise UserError(
            f"{path} is of a fine-tuning; to go on with it give --{training.get('mode')} too"
        )
    return True


def was_restarted(output):
    """Whether torchrun has started this very command again, after it had written checkpoints."""
    last = output.with_suffix(".last.pt")
    if not distributed.restarted() or not last.exists():
        return False
    return read_checkpoint(last)["about"]["provenance"]["command"] == provenance()["command"]


def check_surroundings(output, batch_size):
    """Raise an error now, not after the first epoch, where a training could not succeed."""
    if batch_size < distributed.world_size():
        raise UserError(
            f"--batch_size {batch_size} is less than the {distributed.world_size()} processes "
            "that divide a batch"
        )
    require_writable(output)


def choose_encoder(options):
    """The Options with another encoder if the user left it open.

    It is that of the training to go on with. Else it is the default, unless features of one other
    encoder only are cached. UserError if there are those of several others.
    """
    if "encoder" in options.given or options.mode != CROSS_ENTROPY:
        return options
    cached = cached_encoders(options.folder)
    name = options.captioner.encoder
    if options.continues:
        name = read_checkpoint(options.resume)["config"]["encoder"]
    elif cached and name not in cached and not needs_images(options):
        if len(cached) > 1:
            raise UserError(
                f"{options.folder} holds cached features of {', '.join(cached)}; "
                "choose one of them by --encoder"
            )
        name = cached[0]
        tell(f"the encoder is {name}, whose features are cached in {options.folder}")
    return replace(options, captioner=replace(options.captioner, encoder=name))


def needs_images(options):
    """Whether a flag asks for something that cached features do not give."""
    return bool(options.needs_pixels or {"encoder_weights", "pretrain_epochs"} & options.given)


def load_trained(options, device):
    """The captioner to fine-tune, with the dropouts of this training.

    UserError if it is of another model_type or encoder than the one that was asked for.
    """
    trained = load_captioner(options.resume, device, pretrained=False)
    sizes = asdict(options.captioner)
    for name in ("model_type", "encoder"):
        own = getattr(trained.config, name)
        if name in options.given and own != sizes[name]:
            raise UserError(f"{options.resume} is not of --{name} {sizes[name]}, but {own}")
    for name in DROPOUTS:
        trained.get_submodule(name).p = sizes[name]
    return trained


def load_datasets(options, trained=None):
    """The train and val split: of cached features where these suffice, else of images.

    trained: the captioner to fine-tune, if there is one. Cached features suffice if they are of its
    encoder's weights and no pixels are needed. UserError if neither is possible.
    """
    folder = options.folder
    encoder = trained.config.encoder if trained else options.captioner.encoder
    image_size = encoder_spec(encoder).image_size
    if options.needs_pixels and image_size is None:
        raise UserError(
            f"{options.needs_pixels} needs pixels, and {encoder} features come without them"
        )
    stage = options.training.finetune_from
    if features_path(folder, encoder, stage=stage).exists() and not options.needs_pixels:
        cached = {"features": encoder, "stage": stage}
        versions = versions_of(folder, encoder, stage) if options.augment else 0
        train_set = CaptionDataset(folder, "train", versions=versions, **cached)
        if trained is None or is_of_encoder(train_set, trained.encoder):
            return train_set, CaptionDataset(folder, "val", **cached)
        tell(
            f"the cached {encoder} features come from other weights than this captioner's, "
            "so the images are read"
        )
    if image_size is None:
        raise UserError(
            f"{encoder} features have to be cached first: "
            f"preparedataset.py --features {encoder} --regions FOLDER"
        )
    train_set = CaptionDataset(folder, "train", image_transform(image_size, options.augment))
    train_set.augmentation_seed = options.training.seed
    return train_set, CaptionDataset(folder, "val", image_transform(image_size))


def is_of_encoder(dataset, encoder):
    """Whether the cached features are those of this encoder's weights."""
    weights = CutEncoder(encoder, dataset.stage) if dataset.stage else encoder
    return dataset.features_attributes.get("weights_hash") == weights.weights_hash()


def check_cache(dataset, encoder):
    """UserError if the dataset is of cached features, but not of this encoder's weights."""
    if dataset.features and not is_of_encoder(dataset, encoder):
        raise UserError(
            f"the cached {encoder.name} features come from other weights; "
            "give the same --encoder_weights"
        )


def tell(message):
    """Print a message, in one of the processes only."""
    if distributed.is_main():
        print(message)


def new_captioner(options, train_set, device):
    """A captioner to train from the start; its encoder has learnt before, or does so now."""
    name = options.captioner.encoder
    weights = options.encoder_weights
    if train_set.features and weights is None:
        weights = encoder_path(options.folder, name, train_set.stage)
    encoder = build_encoder(name, weights).to(memory_format=torch.channels_last)
    check_cache(train_set, encoder)
    asked_for = "pretrain_epochs" in options.given
    if train_set.features and options.pretrain_epochs and asked_for:
        raise UserError(
            "--pretrain_epochs needs images, and there are cached features, "
            "of an encoder that has learnt"
        )
    learnt = train_set.features or has_learnt(name, weights)
    if options.pretrain_epochs and not options.resume and (asked_for or not learnt):
        encoder.requires_grad_(True)
        pretrain_encoder(encoder, train_set, options.pretrain_epochs, options.training, device)
    return build_captioner(options.captioner, train_set.vocabulary, encoder).to(device)


def tell_of_augmentation(options, train_set):
    """Say so if cached features were to be augmented, but no augmented ones are there."""
    if not options.augment or not train_set.features:
        return
    if not versions_of(options.folder, train_set.features, train_set.stage):
        tell(
            "no augmented features are cached, so no image is augmented; "
            "preparedataset.py --augment K would cache some"
        )


def open_captioner_and_data(options, device):
    """The captioner to train, on its device, and the train and val split."""
    trained = None
    if options.mode != CROSS_ENTROPY:
        trained = load_trained(options, device)
    train_set, val_set = load_datasets(options, trained)
    if trained and trained.vocabulary.words != train_set.vocabulary.words:
        raise UserError(
            f"{options.resume} was not trained on {options.folder}: its vocabulary is another"
        )
    captioner = trained or new_captioner(options, train_set, device)
    captioner.encoder.requires_grad_(options.training.finetune_encoder)
    if options.training.finetune_from:
        CutEncoder(captioner.encoder, options.training.finetune_from).after.requires_grad_(True)
    return captioner, train_set, val_set


def train(options, device):
    """Read the data, build or load the captioner, and train."""
    config = options.training
    set_seed(config.seed)
    check_surroundings(options.output, config.batch_size)
    options = choose_encoder(options)
    captioner, train_set, val_set = open_captioner_and_data(options, device)
    if options.cache_in_memory:
        if not train_set.features:
            raise UserError(
                "--cache_in_memory needs cached features; "
                f"run preparedataset.py --features {captioner.encoder.name}"
            )
        cache_in_memory((train_set, val_set), device)
        config = replace(config, workers=0)  # workers would copy what is in memory already
    tell_of_augmentation(options, train_set)
    references = [entry["captions"] for entry in train_set.entries]
    objective = build_objective(options.mode, captioner, references, options.objective)
    trainer = Trainer(
        captioner,
        objective,
        train_set,
        val_set,
        options.output,
        config,
        options.decoding,
        options.settings,
    )
    show_overview(trainer.overview())
    if options.continues:
        trainer.resume(read_checkpoint(options.resume))
    else:
        trainer.begin()
    trainer.fit()


def wants_clipmapper(arguments):
    """Whether the flags ask for the captioner that train_clipmapper.py trains."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_type")
    return parser.parse_known_args(arguments)[0].model_type == "clipmapper"


def main():
    """Train as the command line says."""
    if wants_clipmapper(sys.argv[1:]):
        train_clipmapper.main()
        return
    options = parse_arguments()
    device = distributed.own_device(options.device)
    with distributed.job(device):
        train(options, device)


def command():
    """The command `lrp-train` of an installation."""
    run(main)


if __name__ == "__main__":
    command()
