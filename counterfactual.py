"""How important is each object of an image to its caption? Takes the object out and captions again.

    python counterfactual.py photo.jpg --objects boxes.json     # {"man": [x0, y0, x1, y1], ...}
    python counterfactual.py photo.jpg --objects instances.json # COCO, by the file's name
    python counterfactual.py photo.jpg --objects 1001.xml       # Flickr30k Entities
    python counterfactual.py photo.jpg --objects masks          # a folder: man.png, dog.png
    python counterfactual.py photo.jpg --objects boxes.json --inpainter telea mean
    python counterfactual.py --dataset coco2017                 # a split of a prepared dataset
    python counterfactual.py --dataset scenes --questions       # docs/counterfactual.md: its tables
    python counterfactual.py --dataset flickr8k --questions

Of a photograph it writes NAME-importance.png (the objects shaded by importance, and the captions
without them), NAME-removed.png (what was filled), NAME-attention-OBJECT.png (where the captioner
looks before and after) and NAME-importance.json. Of a split it writes DATASET.json; what was found
of each image is kept beside it in DATASET.jsonl, so that an interrupted run goes on.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from commandline import (
    CommandLine,
    Flag,
    UserError,
    add_common_flags,
    add_flags,
    check_limits,
    check_modes,
    check_output_folder,
    find_checkpoint,
    provenance,
    run,
    set_seed,
    write_json,
)
from decodingflags import add_decoding_flags, decoding_options
from lateimports import after_parsing, import_what_waits
from names import DILATION, DISTANCES, INPAINTERS, MAX_AREA, NULLS, SENTENCE_MODEL
from prepared import dataset_folder, read_info, source_of

with after_parsing(globals()):
    import numpy as np
    from PIL import Image

    import distributed
    from bert.sentences import SentenceModel
    from captiondata import CaptionDataset
    from captioner import load_captioner
    from experiments.counterfactual import (
        METHODS,
        Study,
        caption_counter,
        examine_objects,
        header_of,
        nothing_changes,
        robustness,
    )
    from experiments.importance_questions import agreement, predictors, questions
    from experiments.tables import intervals_joined, markdown_table
    from images import load_image
    from importance import OBJECT, Removal, described, filler_of, importance
    from inpainting import load_inpainter
    from plots import Removed, attention_figure, importance_figure, removal_figure, save_figure
    from pycocoevalcap.java import ScorerUnavailable
    from readers.objects import read_objects
    from redrawing import Redrawer

PHOTOGRAPHS = ("photographs",)
SPLIT = ("split",)
MODES = {"photographs": "photographs", "split": "--dataset"}
CHECKPOINTS = {"scenes": "checkpoints/scenes-gridtd.pt"}  # by source; of all others:
DEFAULT_CHECKPOINT = "checkpoints/flickr8k.pt"
DEFAULT_INPAINTER = "checkpoints/inpainting-flickr8k.pt"  # of photographs
SPLITS = ("test", "val", "train")  # the first of them that a dataset has is examined
SHOWN = {  # distance: what a figure says of it
    "sentence": "1 − cosine of captions, {model}",
    "bertscore": "1 − BERTScore of captions, {model}",
    "probability": "mean drop of the words' probability",
    "attention": "change of the words' attention",
    "attention_sum": "change of the summed attention",
}
FLAGS = [
    Flag(
        "objects",
        "what is in the photographs: a COCO instances file, a Flickr30k Entities .xml, a folder of "
        'masks, or a JSON file of boxes {"man": [x0, y0, x1, y1]}',
        metavar="FILE",
        shown="none",
        modes=PHOTOGRAPHS,
    ),
    Flag(
        "distance",
        f"what the figures show of {', '.join(DISTANCES)}",
        choices=tuple(DISTANCES),
        metavar="NAME",
        shown="sentence, or probability without a BERT model",
        modes=PHOTOGRAPHS,
    ),
    Flag("dataset", "examine a prepared dataset, by its name or folder", shown="none", modes=SPLIT),
    Flag("split", "which split of it", shown="test, or val where there is none", modes=SPLIT),
    Flag(
        "images",
        "only so many images of the split, the first ones",
        type=int,
        limits=(1, 10**9),
        shown="all",
        modes=SPLIT,
    ),
    Flag(
        "questions",
        "also ask what makes an object important, and whether an explanation tells; of scenes also "
        "which inpainter can be trusted",
        default=False,
        switch=True,
        modes=SPLIT,
    ),
    Flag("checkpoint", "the captioner", metavar="FILE", shown=f"{DEFAULT_CHECKPOINT}, or the "
         "scenes' own"),
    Flag(
        "inpainter",
        f"what fills the hole, one or more of {', '.join(INPAINTERS)}",
        choices=tuple(INPAINTERS),
        nargs="+",
        metavar="NAME",
        shown="telea; of a split all",
    ),
    Flag(
        "inpainter_weights",
        "the generative inpainter's file, of train_inpainter.py",
        DEFAULT_INPAINTER,
        metavar="FILE",
    ),
    Flag(
        "bert_model",
        "the model that compares captions, a folder or a Hugging Face name",
        metavar="MODEL",
        shown=SENTENCE_MODEL,
    ),
    Flag("dilation", "how far masks grow, as a share of the root of their area",
         default=DILATION, limits=(0, 1)),
    Flag("max_area", "objects that cover more of the image are not removed",
         default=MAX_AREA, limits=(0, 1)),
    Flag("nulls", "null controls of each object: its mask where no object is",
         default=NULLS, limits=(0, 100)),
    Flag("output", "folder for what is written", shown="explanations, or results/counterfactual"),
]  # fmt: skip


@dataclass(frozen=True)
class Tools:
    """What both modes need: see `experiments.counterfactual.Study` for the fields.

    about: what the files hold of this run; notice: what the user is told at the end, or None.
    """

    captioner: object
    fillers: dict
    removal: Removal
    sentences: object
    decoding: dict
    about: dict
    notice: str | None


def build_parser():
    """The command line."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("photographs", nargs="*", help="image files")
    add_flags(parser, FLAGS)
    add_decoding_flags(parser)
    add_common_flags(parser)
    return parser


def parse_arguments():
    """The parsed flags, defaults of the mode filled in; UserError for what does not go together."""
    parser = build_parser()
    args = parser.parse_args()
    if bool(args.photographs) == (args.dataset is not None):
        raise UserError("give photographs with --objects, or --dataset")
    mode = "split" if args.dataset else "photographs"
    check_modes(parser.given(args), FLAGS, mode, MODES)
    check_limits(vars(args), FLAGS)
    if args.photographs and args.objects is None:
        raise UserError("--objects has to say what is in the photographs")
    if args.inpainter is None:
        args.inpainter = list(INPAINTERS) if args.dataset else ["telea"]
    if args.output is None:
        args.output = "results/counterfactual" if args.dataset else "explanations"
    if args.checkpoint is None:
        args.checkpoint = default_checkpoint(args.dataset)
    check_output_folder(args.output)
    return args


def default_checkpoint(dataset):
    """The captioner that ships for a dataset, or for photographs if that is None."""
    if dataset is None:
        return DEFAULT_CHECKPOINT
    source = source_of(read_info(dataset_folder(dataset)))
    return CHECKPOINTS.get(source, DEFAULT_CHECKPOINT)


def load_sentences(model, device):
    """The SentenceModel called `model`, and what to tell the user, if anything.

    None asks for the default one; without it there is no model, and the user is told how to get it.
    UserError if another one is missing.
    """
    try:
        return SentenceModel(model or SENTENCE_MODEL, device), None
    except ScorerUnavailable as error:
        if model is not None:
            raise UserError(str(error)) from None
        return None, f"sentence and bertscore are left out: {error}"


def chosen_distance(distance, sentences):
    """The distance that figures show; `distance` is the user's choice, or None.

    UserError if it needs a BERT model and `sentences` is None.
    """
    if sentences is None and distance in ("sentence", "bertscore"):
        raise UserError(f"--distance {distance} needs a BERT model")
    return distance or ("sentence" if sentences else "probability")


def main():
    """Measure the importance of objects, and write it."""
    args = parse_arguments()
    decoding = decoding_options(args)
    import_what_waits()
    set_seed(args.seed)
    device = distributed.own_device(args.device)
    jobs = []
    for path in map(Path, args.photographs):
        jobs.append((path, np.asarray(load_image(path)), read_objects(args.objects, path)))
    captioner = load_captioner(args.checkpoint, device)
    fillers = {}
    for name in args.inpainter:
        inpainter = load_inpainter(name, find_checkpoint(args.inpainter_weights), device)
        fillers[name] = filler_of(inpainter)
    removal = Removal(args.dilation, args.max_area, args.nulls, args.seed)
    sentences, notice = load_sentences(args.bert_model, device)
    about = provenance(args.seed, args.checkpoint)
    about |= {"model_type": captioner.model_type, "removal": vars(removal)}
    about["bert_model"] = sentences.name if sentences else None
    tools = Tools(captioner, fillers, removal, sentences, decoding, about, notice)
    if args.dataset:
        with distributed.job(device):
            examine_split(tools, args)
    distance = chosen_distance(args.distance, sentences)
    for path, image, objects in jobs:
        examine_photograph(tools, path, image, objects, distance, Path(args.output))
    if notice and distributed.is_main():
        print(notice)


# ------------------------------------------------------------------------------------ a photograph


def examine_photograph(tools, path, image, objects, distance, output):
    """Write the importance of a photograph's objects, its figures and JSON, into a folder.

    image: uint8 (H, W, 3); objects: its ImageObjects; distance: what the figures show.
    """
    found = importance(
        tools.captioner,
        image,
        objects,
        tools.fillers,
        tools.removal,
        tools.sentences,
        tools.decoding,
    )
    if not found.removed:
        raise UserError(
            f"{path}: all {len(objects)} objects cover more than --max_area "
            f"{tools.removal.max_area} of it"
        )
    print(f"{path}: {' '.join(found.original.caption)}")
    stay = len(objects) - len(found.removed)
    if stay:
        print(f"{stay} of {len(objects)} objects are too large to be removed (--max_area)")
    for filler in tools.fillers:
        mark = f"-{filler}" if len(tools.fillers) > 1 else ""
        numbers = described(found, objects, filler)
        print(f"\nwithout each object, by {filler}:\n{markdown_table(table_of(numbers))}")
        stem = output / f"{path.stem}{mark}"
        draw(tools, stem, Image.fromarray(image), objects, found, filler, distance)
        about = {**tools.about, "image": path.name, "inpainter": filler}
        write_json(stem.with_name(f"{stem.name}-importance.json"), {**about, **numbers})
    print(f"\nfigures and JSON are in {output}")


def table_of(numbers):
    """The rows of a photograph's table, of what `importance.described` returns."""
    rows = []
    for thing in numbers["objects"]:
        if thing["removed"] is None:
            continue
        row = {"object": thing["name"], "area": thing["area"]}
        row["caption without it"] = thing["removed"]["caption"]
        for name in DISTANCES:
            value = thing["removed"][name]
            if value is not None:
                row[name] = value
                controls = [one[name] for one in thing["nulls"] if one[name] is not None]
                row[f"{name}, null"] = float(np.mean(controls)) if controls else None
        rows.append(row)
    return rows


def draw(tools, stem, photograph, objects, found, filler, distance):
    """Write the figures of one filler; stem: what their names begin with."""
    shown = []
    strips = {}
    for area, picture, spoken, effect in zip(
        found.areas, found.images[filler], found.spoken[filler], found.effects[filler]
    ):
        if area.kind != OBJECT:
            continue
        thing = objects[area.number]
        value = effect.distances[distance]
        one = Removed(thing.name, thing.mask, value, area.mask, picture, effect.caption)
        shown.append(one)
        strips[area.number] = (f"without {thing.name}", picture, spoken)
    label = SHOWN[distance].format(model=tools.about["bert_model"])
    caption = found.original.caption
    figures = {
        "importance": importance_figure(photograph, caption, shown, label),
        "removed": removal_figure(photograph, shown),
    }
    grid = tools.captioner.encoder.grid
    for number, (title, picture, spoken) in strips.items():
        both = [("the photograph", photograph, found.original)]
        both.append((title, Image.fromarray(picture), spoken))
        name = f"attention-{number + 1}-" + re.sub(r"[^\w-]+", "_", objects[number].name)
        figures[name] = attention_figure([strip_of(*one, grid) for one in both])
    for name, figure in figures.items():
        save_figure(figure, stem.with_name(f"{stem.name}-{name}.png"))


def strip_of(title, picture, spoken, grid):
    """A strip of `plots.attention_figure`, of a picture and its Spoken."""
    maps = spoken.attention.reshape(len(spoken.caption), *grid)
    return title, picture, spoken.caption, maps


# ----------------------------------------------------------------------------------------- a split


def examine_split(tools, args):
    """Examine a split of a prepared dataset, print its tables, and write its JSON."""
    folder = dataset_folder(args.dataset)
    info = read_info(folder)
    split = args.split or next(name for name in SPLITS if name in info["splits"])
    dataset = CaptionDataset(folder, split)
    scenes = Redrawer(dataset) if args.questions and source_of(info) == "scenes" else None
    study = Study(
        tools.captioner,
        tools.fillers,
        tools.removal,
        tools.sentences,
        tools.decoding,
        METHODS if args.questions else (),
        caption_counter(CaptionDataset(folder, "train").entries),
        scenes,
    )
    count = min(args.images or len(dataset), len(dataset))
    stem = Path(args.output) / f"{info['name']}"
    header = header_of(args.checkpoint, dataset, study)
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_name(f"{stem.name}-records.jsonl")
    records = examine_objects(dataset, count, study, path, header)
    if distributed.is_main():
        tables = tables_of(records, args.questions, scenes is not None)
        for title, rows in tables.items():
            print(f"\n{title}\n{markdown_table(intervals_joined(rows))}")
        counted = counts_of(records)
        print("\n" + ", ".join(f"{name} {value}" for name, value in counted.items()))
        about = {**tools.about, "dataset": info["name"], "split": split}
        write_json(stem.with_name(f"{stem.name}.json"), {**about, **counted, **tables})


def tables_of(records, asked, exact):
    """The tables of a split: {title: rows}; asked: whether --questions was given."""
    tables = {"robustness": robustness(records)}
    if asked:
        if exact:
            tables["agreement"] = agreement(records)
        tables["questions"] = questions(records)
        tables["predictors"] = predictors(records)
    return tables


def counts_of(records):
    """How many images and objects there were, and what removing nothing changes at most."""
    objects = [thing for record in records for thing in record["objects"]]
    return {
        "images": len(records),
        "objects removed": len(objects),
        "objects too large": sum(record["too_large"] for record in records),
        "objects with null control": sum(bool(thing["nulls"]) for thing in objects),
        "largest change by removing nothing": nothing_changes(records),
    }


def command():
    """The command `lrp-counterfactual` of an installation."""
    run(main)


if __name__ == "__main__":
    command()
