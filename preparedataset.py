"""Raw images and captions -> data/<name>/: vocabulary, encoded captions, splits, boxes and, on
demand, cached features.

    python preparedataset.py                                      # draws and prepares the scenes
    python preparedataset.py --dataset coco2017 --root ~/coco2017
    python preparedataset.py --dataset flickr30k --root ~/flickr30k --features vgg16
    python preparedataset.py --dataset csv --root ~/pets --captions pets.csv       # one's own
    python preparedataset.py --dataset karpathy --root ~/pets        # its dataset_*.json

A file of one's own captions has the columns image (a file in ROOT) and caption, a row a caption,
and if need be split (train, val or test). It is a .csv, a .tsv, or a .jsonl with an object a line.
Without splits a tenth of the images is val and a tenth is test, as --seed draws them.

The raw files are read by readers/, and what is written here is read by captiondata.py.
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
    check_modes,
    choose_device,
    require_writable,
    run,
    set_seed,
)
from lateimports import after_parsing, import_what_waits
from prepared import read_info, source_of

with after_parsing(globals()):
    from captiondata import cache_features, write_dataset
    from encoder import CutEncoder, build_encoder
    from readers import SOURCES, read_raw, require_folder
    from scenes import draw_scenes

DROPPED = {  # the counts of what is left out, and why
    "captions_dropped_empty": "captions without a word",
    "captions_dropped_too_long": "captions longer than --max_length",
    "images_dropped_without_caption": "images left without a caption",
}
MANY_UNKNOWN = 0.1  # the share of <unk> among the words of train that is worth a remark


def prepare(
    name, root, output, min_word_freq=None, max_length=None, seed=0, regions=None, captions=None
):
    """Read the dataset `name` (of readers.SOURCES) in the folder `root` and write it into `output`,
    all but the feature cache; returns its info.

    min_word_freq, max_length: by default the dataset's own; captions: the file of one's own, whose
    dataset is called as `output` is. See `captiondata.write_dataset`.
    """
    source = SOURCES[name]
    output = Path(output)
    if output.exists():
        require_folder(output, "the folder to write")
    if captions and Path(captions).resolve().parent == output.resolve():
        require_kept(Path(captions))
    raw = read_raw(name, root, captions, seed)
    min_word_freq = min_word_freq or source.min_word_freq
    max_length = max_length or source.max_length
    title = output.resolve().name if source.own else name
    return write_dataset(output, title, raw, min_word_freq, max_length, seed, regions, name)


def require_kept(captions):
    """UserError if a prepared dataset in the folder of the file `captions` would replace it."""
    if captions.name in [f"{part}.json" for part in ("info", "vocabulary", "train", "val", "test")]:
        raise UserError(f"{captions} would be replaced; choose another folder to write")


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
    train = summary["train"]
    if train["words_unknown"] > MANY_UNKNOWN * train["words"]:
        share = train["words_unknown"] / train["words"]
        yield (
            f"{share:.0%} of the words in train are <unk>, which no caption can say; "
            "--min_word_freq 1 keeps them all"
        )


FLAGS = [
    Flag("dataset", "what to prepare", default="scenes", choices=names.SOURCES),
    Flag("root", "folder of the raw dataset", type=Path, shown="for scenes the output folder"),
    Flag(
        "captions",
        "file of the captions of one's own images",
        type=Path,
        metavar="FILE",
        shown="for karpathy ROOT/dataset_*.json",
        modes=names.OWN_SOURCES,
    ),
    Flag(
        "output",
        "folder to write",
        type=Path,
        shown=f"data/DATASET; for {' and '.join(names.OWN_SOURCES)} data/NAME, "
        "where NAME is ROOT's name",
    ),
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
        shown="50, coco2017 and scenes 30",
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
        "stage",
        "cache what this stage of the encoder is given, for train.py --finetune_from STAGE",
        metavar="STAGE",
        shown="the features",
    ),
    Flag(
        "augment",
        "also cache K jittered and mirrored versions of the train images",
        default=0,
        limits=(0, math.inf),
        metavar="K",
    ),
    Flag(
        "smallest_crop",
        "those versions show a random part of the image, of at least this share of its area",
        default=1.0,
        limits=(0.01, 1),
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
SCENES = ("scenes",)
SCENES_FLAGS = [
    Flag("train", "images to draw for train", default=5000, limits=(1, math.inf), modes=SCENES),
    Flag("val", "images to draw for val", default=500, limits=(1, math.inf), modes=SCENES),
    Flag("test", "images to draw for test", default=500, limits=(1, math.inf), modes=SCENES),
    Flag(
        "image_size",
        "side of a scene in pixels",
        default=128,
        limits=(1, math.inf),
        modes=SCENES,
    ),
    Flag(
        "bias",
        "probability in train that a planted pair's second object joins the first",
        default=0.9,
        modes=SCENES,
    ),
    Flag("test_bias", "the same in val and test", default=0.6, modes=SCENES),
]


def parse_arguments(argv=None):
    """The command line, see --help. UserError for flags that do not go together."""
    parser = CommandLine(description=__doc__)
    add_flags(parser, FLAGS)
    add_flags(parser.add_argument_group("scenes only"), SCENES_FLAGS)
    add_common_flags(parser)
    args = parser.parse_args(argv)
    check_limits(vars(args), FLAGS + SCENES_FLAGS)
    titles = {name: f"--dataset {name}" for name in names.SOURCES}
    check_modes(parser.given(args), FLAGS + SCENES_FLAGS, args.dataset, titles)
    if args.dataset == "csv" and not args.captions:
        raise UserError("--dataset csv needs --captions, the file with the columns image, caption")
    if (args.features == "bottom_up") != bool(args.regions):
        raise UserError("--features bottom_up and --regions FOLDER belong together")
    for name in ("encoder_weights", "augment", "stage"):
        if getattr(args, name) and not args.features:
            raise UserError(f"--{name} goes with --features ENCODER")
    if args.smallest_crop < 1 and not args.augment:
        raise UserError("--smallest_crop goes with --augment K")
    if args.augment and args.regions:
        raise UserError("--augment needs images to jitter, and bottom_up features come without")
    import_what_waits()
    if args.dataset != "scenes" and not args.root:
        layout = SOURCES[args.dataset].layout
        raise UserError(f"--dataset {args.dataset} needs --root, the folder with {layout}")
    return args


def default_output(dataset, root):
    """The folder in which a dataset is prepared unless the user names one.

    UserError if that of one's own images holds another dataset, which would be replaced.
    """
    if not SOURCES[dataset].own:
        return Path("data") / dataset
    output = Path("data") / root.resolve().name
    if (output / "info.json").exists():
        info = read_info(output)
        images = (output / info["images_root"]).resolve()
        if source_of(info) != dataset or not images.is_relative_to(root.resolve()):
            raise UserError(
                f"{output} holds another dataset; choose the folder to write by --output"
            )
    return output


def draw(root, output, args):
    """Draw the scenes into the folder `root`, unless they are there."""
    if root.exists():
        require_folder(root, "where the scenes are drawn")
    require_writable(root / "drawn.json")
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


def chosen_output(args):
    """The folder to write, as asked for or by default. UserError if it cannot be written."""
    output = args.output or default_output(args.dataset, args.root)
    if output.exists():
        require_folder(output, "the folder to write")
    require_writable(output / "info.json")
    return output


def main():
    """Draw if need be, prepare, and cache features if asked to."""
    args = parse_arguments()
    set_seed(args.seed)
    # What is wrong with the encoder or the device is told before anything is written.
    encoder = build_encoder(args.features, args.encoder_weights) if args.features else None
    cut = CutEncoder(encoder, args.stage) if args.stage else None
    device = choose_device(args.device)
    output = chosen_output(args)
    root = args.root or output
    if args.dataset == "scenes":
        draw(root, output, args)
    info = prepare(
        args.dataset,
        root,
        output,
        args.min_word_freq,
        args.max_length,
        args.seed,
        args.regions,
        args.captions,
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
            args.smallest_crop,
            args.seed,
            cut,
        )


def command():
    """The command `lrp-prepare` of an installation."""
    run(main)


if __name__ == "__main__":
    command()
