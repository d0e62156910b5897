"""Measure a captioner on a split of a prepared dataset, or anybody's captions in COCO's format.

    python evaluation.py                              # the shipped captioner, the drawn scenes
    python evaluation.py --experiment all             # also the paper's experiments (experiments/)
    python evaluation.py --checkpoint checkpoints/flickr8k-aoa.pt --split val
    python evaluation.py --predictions results.json --annotations captions_val2017.json
    python evaluation.py --checkpoint checkpoints/flickr8k.pt --images FOLDER   # only captions
    torchrun --nproc_per_node=4 evaluation.py ...     # the same figures, by four processes

Prints a table and writes it, with the captions, as JSON. A metric that lacks a tool (Java, SPICE's
jars, a BERT) is shown with the reason and the command that mends it. What the experiments find is
kept image by image, so that an interrupted run goes on.
"""

import math
from dataclasses import replace
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
    extended,
    provenance,
    require_writable,
    run,
    set_seed,
    write_atomically,
    write_json,
)
from decodingflags import add_decoding_flags, decoding_flags, decoding_options
from lateimports import after_parsing, import_what_waits
from prepared import dataset_folder, folder_of, source_of

with after_parsing(globals()):
    import distributed
    from basemodel import read_checkpoint
    from captiondata import open_split
    from captioner import load_captioner
    from captionmetrics import Captions, measure, meteor_started
    from decoding import caption_files
    from experiments import EXPERIMENTS
    from experiments.captions import (
        caption_split,
        captions_of,
        choose_object_words,
        training_captions,
    )
    from experiments.case import Setting
    from experiments.records import examine_split, header_of
    from experiments.tables import markdown_table, tables_of
    from images import image_files
    from plots import save_figure
    from pycocoevalcap.chair.chair import object_phrases
    from readers.coco import read_instances, read_predictions, read_references

# A mode is what is measured; the values are what messages call it.
MODES = {
    "captioner": "a captioner of a dataset",
    "images": "--images",
    "predictions": "--predictions",
}
CAPTIONER = ("captioner",)
SPEAKING = ("captioner", "images")
PREDICTIONS = ("predictions",)

FLAGS = [
    Flag("checkpoint", "the captioner", "checkpoints/scenes-gridtd.pt", modes=SPEAKING),
    Flag(
        "dataset",
        "name of a folder under data/, or its path",
        shown="what the captioner was trained on",
        modes=CAPTIONER,
    ),
    Flag("split", "train, val or test", "test", modes=CAPTIONER),
    Flag(
        "experiment",
        "what to measure, one or more",
        default=["captions"],
        type=str,
        choices=("captions", *names.EXPERIMENTS, "all"),
        nargs="+",
        shown="captions",
        modes=CAPTIONER,
    ),
    Flag(
        "methods",
        f"explanations for the experiments, of {', '.join(names.METHODS)}",
        default=["lrp", "gradcam", "guided_gradcam", "attention"],
        type=str,
        choices=names.METHODS,
        nargs="+",
        metavar="NAME",
        shown="lrp gradcam guided_gradcam attention",
        modes=CAPTIONER,
        alias="method",
    ),
    Flag(
        "limit",
        "only the first so many images; the results get -limitN into their names",
        type=int,
        limits=(1, math.inf),
        metavar="N",
        shown="all",
        modes=SPEAKING,
    ),
    Flag("batch_size", "images captioned at once", 64, limits=(1, math.inf), modes=SPEAKING),
    Flag("workers", "processes that read images", 2, limits=(0, math.inf), modes=CAPTIONER),
    Flag(
        "images",
        "only caption the images of this folder, and write the captions in COCO's results format",
        metavar="FOLDER",
        shown="none",
    ),
    Flag(
        "output",
        "JSON file of the results",
        shown="results/CHECKPOINT-DATASET-SPLIT.json, results/CHECKPOINT-FOLDER-captions.json, or "
        "results/PREDICTIONS-metrics.json",
    ),
]
PREDICTIONS_FLAGS = [
    Flag(
        "predictions",
        "score these captions, in COCO's results format, instead of a captioner's",
        metavar="JSON",
        shown="none",
    ),
    Flag(
        "annotations",
        "their references, in COCO's captions format",
        metavar="JSON",
        shown="none",
        modes=PREDICTIONS,
    ),
    Flag(
        "instances",
        "their objects, for CHAIR",
        metavar="JSON",
        shown="instances_X.json beside captions_X.json",
        modes=PREDICTIONS,
    ),
    Flag(
        "train_annotations",
        "training captions, for the document frequencies of CIDEr-D",
        metavar="JSON",
        shown="none",
        modes=PREDICTIONS,
    ),
]
METRIC_FLAGS = [
    Flag(
        "metrics",
        f"of {', '.join(names.METRICS)}",
        default=list(names.METRICS),
        type=str,
        choices=names.METRICS,
        nargs="+",
        metavar="NAME",
        shown="all",
    ),
    Flag(
        "object_words",
        "frequent object words: the paper's lists, or those of the training captions",
        choices=(*names.FREQUENT_OBJECT_WORDS, "train"),
        shown="by dataset",
    ),
    Flag(
        "java_memory",
        "Java's memory, as in -Xmx",
        metavar="SIZE",
        shown="2G, for SPICE 4G",
    ),
    Flag("bert_model", "BERTScore's model, a name or a folder", "roberta-large"),
    Flag(
        "bert_layer",
        "its layer",
        type=int,
        shown="bert-score's choice for the name, else the last",
    ),
]


def build_parser():
    """The command line."""
    parser = CommandLine(description=__doc__)
    add_flags(parser, FLAGS)
    add_flags(parser.add_argument_group("captions from elsewhere"), PREDICTIONS_FLAGS)
    add_flags(parser.add_argument_group("caption metrics"), METRIC_FLAGS)
    add_decoding_flags(parser)
    add_common_flags(parser)
    return parser


def parse_arguments():
    """The parsed flags; UserError for flags that make no sense, or not together."""
    parser = build_parser()
    args = parser.parse_args()
    check_limits(vars(args), FLAGS)
    if args.output is not None and (not stem_of(args.output).name or Path(args.output).is_dir()):
        raise UserError(f"--output {args.output} is not the name of a .json file")
    given = set(parser.given(args))
    if args.predictions and args.images:
        raise UserError("--images are to be captioned, and --predictions are captions already")
    mode = chosen_mode(args)
    of_decoding = [replace(flag, modes=SPEAKING) for flag in decoding_flags()]
    of_metrics = [replace(flag, modes=("captioner", "predictions")) for flag in METRIC_FLAGS]
    check_modes(given, [*FLAGS, *PREDICTIONS_FLAGS, *of_decoding, *of_metrics], mode, MODES)
    if "methods" in given and args.experiment == ["captions"]:
        raise UserError("--methods goes with --experiment, what to do with the explanations")
    if args.predictions and args.object_words == "train" and not args.train_annotations:
        raise UserError(
            "--object_words train needs --train_annotations, the captions to count the words of"
        )
    if args.predictions and not args.annotations:
        raise UserError(
            "--predictions needs --annotations, the references in COCO's format "
            "(captions_val2017.json)"
        )
    decoding_options(args)  # which checks them
    return args


def chosen_mode(args):
    """Which of MODES the flags ask for."""
    if args.predictions:
        return "predictions"
    return "images" if args.images else "captioner"


def stem_of(output):
    """The path --output less its .json."""
    return Path(output.removesuffix(".json"))


def results_stem(args, name):
    """What the names of the results begin with: --output, or a name of its own in results/.

    With --limit that is another one than without, so that no part replaces the whole.
    """
    if args.output is not None:
        return stem_of(args.output)
    limited = f"-limit{args.limit}" if args.limit else ""
    return Path("results") / f"{name}{limited}"


def chosen_folder(args):
    """The folder of the prepared dataset: as it is named, else what the captioner was trained on.

    UserError if the checkpoint does not say that, or it is not there.
    """
    if args.dataset is not None:
        return dataset_folder(args.dataset)
    folder = folder_of(read_checkpoint(args.checkpoint).get("about", {}))
    if distributed.is_main():
        print(f"the dataset is {folder}, what the captioner was trained on")
    return folder


def chosen_experiments(args):
    """The names of the experiments that --experiment asks for; "all" are the paper's."""
    chosen = set(args.experiment)
    if "all" in chosen:
        chosen |= set(names.PAPER_EXPERIMENTS)
    return [name for name in names.EXPERIMENTS if name in chosen]


def wants_captions(args):
    """Whether --experiment asks for the captions and their metrics."""
    return "captions" in args.experiment or "all" in args.experiment


def metric_options(args):
    """What the metrics need to know: further fields of Captions."""
    return {
        "java_memory": args.java_memory,
        "bert_model": args.bert_model,
        "bert_layer": args.bert_layer,
        "device": choose_device(args.device),
    }


def main():
    """Caption a split or a folder, or read captions; measure, print and write; run experiments."""
    args = parse_arguments()
    import_what_waits()
    set_seed(args.seed)
    if args.predictions:
        evaluate_predictions(args)
        return
    device = distributed.own_device(args.device)
    with distributed.job(device):
        captioner = load_captioner(args.checkpoint, device, pretrained=False)
        if args.images:
            name = f"{Path(args.checkpoint).stem}-{Path(args.images).resolve().name}-captions"
            path = extended(results_stem(args, name), ".json")
            require_writable(path)
            decoding = decoding_options(args)
            caption_folder(captioner, args.images, args.limit, args.batch_size, decoding, path)
        else:
            evaluate_split(captioner, args)


def evaluate_predictions(args):
    """Measure captions from elsewhere."""
    stem = results_stem(args, f"{Path(args.predictions).stem}-metrics")
    require_writable(extended(stem, ".json"))
    predictions, references, unscored = matching_captions(args.predictions, args.annotations)
    captions = captions_with_objects(
        predictions,
        references,
        args.instances or instances_beside(args.annotations),
        args.train_annotations,
        args.object_words,
        metric_options(args),
    )
    rows = [{"image_id": key, "caption": text} for key, text in predictions.items()]
    score(captions, rows, args.metrics, stem, {**provenance(args.seed), **unscored})


def evaluate_split(captioner, args):
    """Measure a captioner on a split of a prepared dataset, or run experiments with it there."""
    folder = chosen_folder(args)
    name = f"{Path(args.checkpoint).stem}-{folder.name}-{args.split}"
    stem = results_stem(args, name)
    require_writable(extended(stem, ".json"))
    dataset = open_split(folder, args.split, captioner.encoder)
    dataset.entries = dataset.entries[: args.limit]
    corpus = training_captions(dataset)
    categories = dataset.info["categories"]
    words = choose_object_words(args.object_words, source_of(dataset.info), corpus, categories)
    decoding = decoding_options(args)
    chosen = chosen_experiments(args)
    if chosen:  # before the captions, for it may find records of other settings
        phrases = object_phrases(categories)
        setting = Setting(captioner, args.methods, phrases, words, decoding, args.seed)
        # A record is of one image, and does not depend on how many there are.
        records = stem if args.output else Path("results") / name
        run_experiments(dataset, chosen, setting, args.checkpoint, stem, records, args.workers)
    if wants_captions(args):
        options = {"batch_size": args.batch_size, "workers": args.workers}
        source = provenance(args.seed, args.checkpoint)
        measured = args.metrics if distributed.is_main() else ()
        with meteor_started(measured, args.java_memory) as meteor:
            found, scores = caption_split(captioner, dataset, decoding, words, **options)
            about = {"word_scores": scores, "meteor": meteor, **metric_options(args)}
            score_split(dataset, found, corpus, words, about, args.metrics, stem, source)


def score_split(dataset, found, corpus, words, about, metrics, stem, source):
    """Measure the captions of a split, print the table and write it.

    found: {index: its captions, best first}; corpus: the training captions; words: the frequent
    object words; about: further fields of Captions; the rest: as of `score`.
    """
    rows = rows_of(dataset, found)
    predictions = {index: row["caption"] for index, row in enumerate(rows)}
    captions = captions_of(dataset, predictions, corpus, words, **about)
    score(captions, rows, metrics, stem, source)


def caption_folder(captioner, folder, limit, batch_size, decoding, path):
    """Caption the images of a folder and write the captions to `path` in COCO's results format.

    An image is called by its file's name, for it has no number.
    """
    files = image_files(folder)[:limit]
    found = caption_files(captioner, files, batch_size, **decoding)
    rows = [{"image_id": file.name, "caption": " ".join(found[file])} for file in files]
    if distributed.is_main():
        write_json(path, rows)
        print(f"{len(rows)} captions are in {path}")


def matching_captions(predictions, annotations):
    """The captions of two files in COCO's formats that belong together, by image id.

    Returns {id: caption}, {id: its references} of the images that both have, and {what is not
    scored: how many}; says how many, too. UserError for a file of another kind, or if no image is
    in both.
    """
    predicted = read_predictions(predictions)
    references = read_references(annotations)
    scored = [key for key in predicted if key in references]
    strangers = len(predicted) - len(scored)
    if not scored:
        first = next(iter(predicted))
        raise UserError(
            f"{annotations} has no reference of any image of {predictions}; the first is "
            f"image {first!r} ({strangers} such)"
        )
    silent = len(references) - len(scored)
    if distributed.is_main():
        if silent:
            print(f"{silent} of {len(references)} images of {annotations} have no prediction")
        if strangers:
            print(
                f"{strangers} of {len(predicted)} predictions have no reference, and do not count"
            )
    unscored = {
        "images_without_prediction": silent,
        "predictions_without_reference": strangers,
    }
    return (
        {key: predicted[key] for key in scored},
        {key: references[key] for key in scored},
        unscored,
    )


def captions_with_objects(predictions, references, instances, train_annotations, choice, options):
    """The Captions of {image id: caption} and {image id: references}.

    instances, train_annotations: files in COCO's formats, or None; choice: of
    `choose_object_words`; options: further fields of Captions. UserError for a file of another
    kind, or instances that do not list these images.
    """
    annotated = None
    categories = {}
    if instances:
        annotated, categories = read_instances(instances, predictions)
    corpus = read_references(train_annotations) if train_annotations else None
    return Captions(
        predictions=predictions,
        references=references,
        annotated=annotated,
        categories=categories,
        corpus=corpus,
        object_words=choose_object_words(choice, "coco", corpus, categories),
        **options,
    )


def instances_beside(annotations):
    """The file instances_X.json beside a file captions_X.json, or None if there is none."""
    path = Path(annotations)
    beside = path.with_name(path.name.replace("captions", "instances"))
    return beside if beside != path and beside.is_file() else None


def rows_of(dataset, found):
    """The captions of a split as the result lists them.

    found: {index: its captions, the best first}.
    """
    rows = []
    for index, entry in enumerate(dataset.entries):
        best, *others = [" ".join(words) for words in found[index]]
        row = {"image_id": entry["image_id"], "caption": best}
        if others:
            row["others"] = others
        rows.append(row)
    return rows


def score(captions, rows, metrics, stem, source):
    """Measure captions, print the table, and write it to STEM.json with their rows.

    metrics: names of METRICS; source: as of `provenance`. One process does it for all.
    """
    if not distributed.is_main():
        return
    values, unavailable, tokens = measure(captions, metrics)
    for name, value in values.items():
        print(f"{name:24s} {value:10.4f}")
    for name, reason in unavailable.items():
        print(f"{name:24s} unavailable: {reason}")
    print(f"tokens: {tokens}")
    result = {
        **source,
        "metrics": values,
        "unavailable": unavailable,
        "tokens": tokens,
        "object_words": captions.object_words,
        "captions": rows,
    }
    path = extended(stem, ".json")
    write_json(path, result)
    print(f"{len(rows)} captions and these figures are in {path}")


def run_experiments(dataset, chosen, setting, checkpoint, stem, records_stem, workers):
    """Run the named experiments on a split, keep their records, print and write their tables.

    stem, records_stem: what the names of the tables and of the file of records begin with.
    """
    experiments = {name: EXPERIMENTS[name] for name in chosen}
    ending = "-all" if chosen == list(names.PAPER_EXPERIMENTS) else f"-{'-'.join(chosen)}"
    header = header_of(checkpoint, dataset, chosen, setting)
    path = extended(records_stem, f"{ending}.jsonl")
    records = examine_split(dataset, experiments, setting, path, header, workers)
    if distributed.is_main():
        tables = tables_of(records, experiments, setting.captioner.config.model_type)
        source = provenance(setting.seed, checkpoint)
        report(tables, len(records), extended(stem, ending), source)


def report(tables, images, stem, source):
    """Print the tables of so many images, and write them as JSON and Markdown, figures as PNG."""
    parts = []
    for name, rows in tables.items():
        parts.append(f"**{name.replace('_', ' ')}**\n\n{markdown_table(rows)}")
    text = "\n\n".join(parts)
    print(text)
    write_json(extended(stem, ".json"), {**source, "tables": tables})
    with write_atomically(extended(stem, ".md")) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    message = f"\n{images} images; these tables are in {stem}.json and .md"
    if write_figure(tables, extended(stem, ".png")):
        message += f", the curves in {stem}.png"
    print(message)


def write_figure(tables, path):
    """Draw the figure of the experiments (one of them has any); returns whether there is one."""
    drawn = False
    for name, rows in tables.items():
        draw = EXPERIMENTS[name].figure
        figure = draw(rows) if draw else None
        if figure:
            drawn = True
            save_figure(figure, path, dots_per_inch=120)
    return drawn


def command():
    """The command `lrp-evaluate` of an installation."""
    run(main)


if __name__ == "__main__":
    command()
