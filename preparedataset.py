"""Raw images and captions -> data/<name>/: vocabulary, encoded captions, splits, boxes and, on
demand, cached features.

    python preparedataset.py                                      # draws and prepares the scenes
    python preparedataset.py --dataset coco2017 --root ~/coco2017
    python preparedataset.py --dataset flickr30k --root ~/flickr30k --features vgg16

The raw files are read by readers/, and what is written here is read by captiondata.py.
"""

import math
from pathlib import Path

from captiondata import cache_features, write_dataset
from commandline import (
    CommandLine,
    Flag,
    UserError,
    add_common_flags,
    add_flags,
    check_limits,
    choose_device,
    run,
    set_seed,
)
from encoder import build_encoder
from readers import SOURCES, read_raw, require_folder
from scenes import draw_scenes

DROPPED = {  # the counts of what is left out, and why
    "captions_dropped_empty": "captions without a word",
    "captions_dropped_too_long": "captions longer than --max_length",
    "images_dropped_without_caption": "images left without a caption",
}


def prepare(name, root, output, min_word_freq=None, max_length=None, seed=0, regions=None):
    """Read the dataset `name` (of readers.SOURCES) in the folder `root` and write it into `output`,
    all but the feature cache; returns its info.

    min_word_freq, max_length: by default the dataset's own. See `captiondata.write_dataset`.
    """
    source = SOURCES[name]
    output = Path(output)
    if output.exists():
        require_folder(output, "the folder to write")
    raw = read_raw(name, root)
    min_word_freq = min_word_freq or source.min_word_freq
    max_length = max_length or source.max_length
    return write_dataset(output, name, raw, min_word_freq, max_length, seed, regions)


def describe(info):
    """The lines that tell what was read, what was dropped and why, and what became of the words."""
    summary = info["summary"]
    for split, kept in info["splits"].items():
        counts = summary[split]
        reasons = [f"{counts[name]} {DROPPED[name]}" for name in DROPPED if counts[name]]
        dropped = ", ".join(reasons) or "nothing"
        yield (
            f"{split}: read {counts['images_read']} images, {counts['captions_read']} captions; "
            f"dropped {dropped}"
        )
        unknown = counts["words_unknown"]
        yield (
            f"    kept {kept} images, {counts['images_without_boxes']} without boxes of objects; "
            f"{counts['words']} words, {unknown} of them <unk> ({unknown / counts['words']:.1%})"
        )
    if summary["images_unused"]:
        yield f"in no split: {summary['images_unused']} images, more than train and val take"
    yield (
        f"vocabulary: {summary['vocabulary']} words that occur in train at least "
        f"{info['min_word_freq']} times, and <pad>, <unk>, <start>, <end>"
    )


FLAGS = [
    Flag("dataset", "what to prepare", default="scenes", choices=tuple(SOURCES)),
    Flag("root", "folder of the raw dataset", type=Path, shown="for scenes the output folder"),
    Flag("output", "folder to write", type=Path, shown="data/DATASET"),
    Flag(
        "min_word_freq",
        "occurrences in the train captions that a word needs",
        type=int,
        limits=(1, math.inf),
        metavar="N",
        shown="3, coco2017 4",
    ),
    Flag(
        "max_length",
        "words of the longest caption that is kept",
        type=int,
        limits=(1, math.inf),
        metavar="N",
        shown="Flickr 50, coco2017 and scenes 30",
    ),
    Flag(
        "features",
        "also cache the features of this encoder, e.g. vgg16",
        metavar="ENCODER",
        shown="none",
    ),
    Flag(
        "encoder_weights",
        "torchvision state dict for --features, or 'random'",
        metavar="FILE",
        shown="ImageNet's, downloaded",
    ),
    Flag(
        "augment",
        "also cache K jittered and mirrored versions of the train images",
        default=0,
        limits=(0, math.inf),
        metavar="K",
    ),
    Flag(
        "regions",
        "for --features bottom_up: its SPLIT/IMAGE.hdf5 hold image_features and image_boxes",
        type=Path,
        metavar="FOLDER",
        shown="none",
    ),
    Flag("batch_size", "images a step of --features", default=32, limits=(1, math.inf)),
    Flag(
        "workers",
        "processes that decode images, 0 for none beside this one",
        default=2,
        limits=(0, math.inf),
    ),
]
SCENES_FLAGS = [
    Flag("train", "images to draw for train", default=5000, limits=(1, math.inf)),
    Flag("val", "images to draw for val", default=500, limits=(1, math.inf)),
    Flag("test", "images to draw for test", default=500, limits=(1, math.inf)),
    Flag("image_size", "side of a scene in pixels", default=128, limits=(1, math.inf)),
    Flag(
        "bias",
        "probability in train that a planted pair's second object joins the first",
        default=0.9,
    ),
    Flag("test_bias", "the same in val and test", default=0.6),
]


def parse_arguments(argv=None):
    """The command line, see --help. UserError for flags that do not go together."""
    parser = CommandLine(description=__doc__)
    add_flags(parser, FLAGS)
    add_flags(parser.add_argument_group("scenes only"), SCENES_FLAGS)
    add_common_flags(parser)
    args = parser.parse_args(argv)
    check_limits(vars(args), FLAGS + SCENES_FLAGS)
    if args.dataset != "scenes" and not args.root:
        layout = SOURCES[args.dataset].layout
        raise UserError(f"--dataset {args.dataset} needs --root, the folder with {layout}")
    if (args.features == "bottom_up") != bool(args.regions):
        raise UserError("--features bottom_up and --regions FOLDER belong together")
    for name in ("encoder_weights", "augment"):
        if getattr(args, name) and not args.features:
            raise UserError(f"--{name} goes with --features ENCODER")
    if args.augment and args.regions:
        raise UserError("--augment needs images to jitter, and bottom_up features come without")
    return args


def main():
    """Draw if need be, prepare, and cache features if asked to."""
    args = parse_arguments()
    set_seed(args.seed)
    # What is wrong with the encoder or the device is told before anything is written.
    encoder = build_encoder(args.features, args.encoder_weights) if args.features else None
    device = choose_device(args.device)
    output = args.output or Path("data") / args.dataset
    root = args.root or output
    if args.dataset == "scenes":
        if root.exists():
            require_folder(root, "where the scenes are drawn")
        draw_scenes(
            root,
            output,
            train=args.train,
            val=args.val,
            test=args.test,
            size=args.image_size,
            bias=args.bias,
            test_bias=args.test_bias,
            seed=args.seed,
        )
    info = prepare(
        args.dataset, root, output, args.min_word_freq, args.max_length, args.seed, args.regions
    )
    print(*describe(info), sep="\n")
    images = ", ".join(f"{split} {count}" for split, count in info["splits"].items())
    print(f"{output} is ready: {images} images")
    if encoder:
        cache_features(
            output,
            encoder,
            args.batch_size,
            args.workers,
            device,
            args.regions,
            args.augment,
            args.seed,
        )


def command():
    """The command `lrp-prepare` of an installation."""
    run(main)


if __name__ == "__main__":
    command()
