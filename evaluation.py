"""Measure a captioner on a split of a prepared dataset, or anybody's captions in COCO's results format; run the paper's
experiments on it.

    python evaluation.py                                    # the shipped captioner on the test split of the scenes
    python evaluation.py --experiment all                   # also the ablations, correctness and hallucination (experiments.py)
    python evaluation.py --checkpoint checkpoints/flickr8k-gridtd.pt --dataset flickr8k --split val
    python evaluation.py --predictions results.json --annotations annotations/captions_val2017.json
    torchrun --nproc_per_node=4 evaluation.py ...           # the same figures, the images shared by 4 processes

Prints a table and writes it, with the captions, as JSON. A metric that lacks a tool (Java, SPICE's jars, a BERT) is shown with the
reason and the command that mends it. What the experiments find is kept image by image, so that an interrupted run goes on.
"""

import json
import re
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
from captiondata import CaptionDataset
from captioner import METHODS, load_captioner
from captionmetrics import FREQUENT_OBJECT_WORDS, METRICS, Captions, frequent_words, measure
from commandline import (
    CommandLine,
    UserError,
    add_common_flags,
    choose_device,
    extended,
    file_hash,
    provenance,
    read_json,
    run,
    set_seed,
    write_atomically,
    write_json,
)  # fmt: skip
from decoding import OPTIONS, add_decoding_flags, captioned, decoding_options
from experiments import SUMMARIES, THRESHOLDS, Examiner
from images import image_transform
from pycocoevalcap.chair.chair import object_phrases
from readers.coco import coco_categories, read_coco_json
from vocabulary import padded

EXAMINED_AT_ONCE = 16  # images


@torch.no_grad()
def word_scores(captioner, features, captions, words):
    """The largest probability that each of `words` had while a captioner said a caption: features (B, L, D), B lists of words
    -> (B, len(words)) on the CPU."""
    vocabulary = captioner.vocabulary
    inputs = padded([[vocabulary.start, *vocabulary.encode(caption)] for caption in captions]).to(
        features.device
    )
    captioner = captioner.eval_view()
    probabilities = captioner(features, inputs.unsqueeze(1)).squeeze(1).softmax(-1)  # (B, T, V)
    probabilities = probabilities[..., vocabulary.encode(words)].masked_fill(
        (inputs == vocabulary.pad).unsqueeze(-1), 0
    )
    unknown = torch.tensor(
        [word not in vocabulary for word in words], dtype=torch.bool, device=features.device
    )
    return probabilities.amax(dim=1).masked_fill(unknown, 0).cpu()


def caption_split(captioner, dataset, args):
    """The Captions of a captioner on a split, and the list of all captions found for each image."""
    train = read_json(dataset.folder / "train.json")
    corpus = {index: entry["captions"] for index, entry in enumerate(train)}
    words = choose_object_words(
        args.object_words, dataset.info["name"], corpus, dataset.info["categories"]
    )
    found, scores = {}, {}
    options = decoding_options(args)
    for indices, features, captions in captioned(
        captioner, dataset, args.batch_size, args.workers, every=True, **options
    ):
        found.update(zip(indices, captions))
        if words:
            scores.update(
                zip(
                    indices,
                    word_scores(captioner, features, [first for first, *_ in captions], words),
                )
            )
    found, scores = distributed.gathered(found), distributed.gathered(scores)
    predictions = {index: " ".join(captions[0]) for index, captions in found.items()}
    return captions_of(
        dataset, predictions, corpus, words, word_scores=scores if words else None, **tools(args)
    ), found


def captions_of(dataset, predictions, corpus, object_words, **rest):
    """The Captions of a CaptionDataset: {index: predicted sentence}, {key: raw training captions}, frequent object words."""
    things = {index: entry["objects"] for index, entry in enumerate(dataset.entries)}
    categories = dataset.info["categories"]
    return Captions(
        predictions=predictions,
        references=dataset.references(),
        annotated={
            index: {thing["category"] for thing in objects} for index, objects in things.items()
        }
        if categories
        else None,
        categories=categories,
        corpus=corpus,
        object_words=object_words,
        main_objects={
            index: thing["category"]
            for index, objects in things.items()
            for thing in objects
            if thing.get("main")
        },
        planted_pairs=dataset.info.get("planted_pairs", []),
        **rest,
    )


def choose_object_words(choice, name, corpus, categories):
    """The frequent object words: of the paper's list for COCO or Flickr, or of the training captions. By default a dataset's own."""
    own = next((known for known in FREQUENT_OBJECT_WORDS if name.startswith(known)), "train")
    choice = choice or own
    return (
        frequent_words(corpus, categories)
        if choice == "train"
        else FREQUENT_OBJECT_WORDS[choice].split()
    )


def tools(args):
    """What the metrics need to know of the flags."""
    return {
        "java_memory": args.java_memory,
        "bert_model": args.bert_model,
        "bert_layer": args.bert_layer,
        "device": choose_device(args.device),
    }


def read_captions(args):
    """The Captions of --predictions and --annotations, by image id. UserError for files of another kind or that do not match."""
    if not args.annotations:
        raise UserError(
            "--predictions needs --annotations, the references in COCO's format (captions_val2017.json)"
        )
    predictions = read_predictions(args.predictions)
    references = sentences_of(args.annotations)
    strangers = [key for key in predictions if key not in references]
    if strangers:
        raise UserError(
            f"{args.predictions} has a caption of image {strangers[0]}, of which {args.annotations} has none ({len(strangers)} such)"
        )
    annotated, categories = read_instances(args, predictions)
    corpus = sentences_of(args.train_annotations) if args.train_annotations else None
    references = {key: references[key] for key in predictions}
    words = choose_object_words(args.object_words, "coco", corpus, categories)
    return Captions(predictions, references, annotated, categories, corpus, words, **tools(args))


def read_predictions(path):
    """{image id: caption} of a file in COCO's results format, or of a result of this script."""
    rows = read_json(path)
    rows = rows.get("captions") if isinstance(rows, dict) else rows
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and is_result(row) for row in rows)
    ):
        raise UserError(
            f"{path} is not in COCO's results format: it needs a list of objects with image_id and caption, a text"
        )
    predictions = {row["image_id"]: valid_text(row["caption"]) for row in rows}
    if len(predictions) < len(rows):
        raise UserError(f"{path} has more than one caption of an image")
    return predictions


def is_result(row):
    """Whether a dict is one image's caption in COCO's results format."""
    return isinstance(row.get("image_id"), (int, str)) and isinstance(row.get("caption"), str)


def valid_text(text):
    """The text with a question mark for each half of a character (a lone surrogate), which JSON allows and UTF-8 does not."""
    return text.encode(errors="replace").decode()


def sentences_of(path):
    """{image id: raw captions} of a COCO captions file."""
    sentences = {}
    for annotation in read_coco_json(Path(path), "captions")["annotations"]:
        sentences.setdefault(annotation["image_id"], []).append(valid_text(annotation["caption"]))
    return sentences


def read_instances(args, keys):
    """{image id: categories of the annotated objects} and {category: its words}, of --instances or of the file beside the
    captions; (None, {}) if there is none."""
    path = args.instances or Path(args.annotations).with_name(
        Path(args.annotations).name.replace("captions", "instances")
    )
    if not args.instances and (not path.is_file() or path == Path(args.annotations)):
        return None, {}
    data = read_coco_json(Path(path), "instances")
    names = {category["id"]: category["name"] for category in data["categories"]}
    annotated = {image["id"]: set() for image in data["images"]}
    for annotation in data["annotations"]:
        annotated[annotation["image_id"]].add(names[annotation["category_id"]])
    missing = [key for key in keys if key not in annotated]
    if missing:
        raise UserError(
            f"{path} does not list image {missing[0]} ({len(missing)} such); its objects are needed for CHAIR"
        )
    return annotated, coco_categories(data)


def examine_split(captioner, dataset, names, args, stem):
    """Run the named experiments on a split; returns the records of all images, which are kept in STEM.jsonl as they come."""
    if captioner.encoder.given:
        raise UserError(
            "the experiments need the images' pixels, and bottom-up features come without them"
        )
    path, decoding = extended(stem, ".jsonl"), decoding_options(args)
    train = {
        index: entry["captions"]
        for index, entry in enumerate(read_json(dataset.folder / "train.json"))
    }
    categories = dataset.info["categories"]
    words = choose_object_words(args.object_words, dataset.info["name"], train, categories)
    header = {
        "checkpoint": file_hash(args.checkpoint), "dataset": [file_hash(dataset.folder / f"{name}.json") for name in (dataset.split, "info")],
        "methods": args.methods, "experiments": names, "object_words": words, "decoding": decoding, "seed": args.seed
    }  # fmt: skip
    records = distributed.from_main(
        collect_records(path, header) if distributed.is_main() else None
    )
    own = path if distributed.is_main() else path.with_suffix(f".{distributed.rank()}.jsonl")
    write_lines(own, [json.dumps(header)] if own != path else [], "a")
    examiner = Examiner(
        captioner, args.methods, object_phrases(categories), words, names, decoding, args.seed
    )
    rest = torch.tensor(
        [index for index in range(len(dataset)) if index not in records], dtype=torch.long
    ).split(EXAMINED_AT_ONCE)
    loader = DataLoader(
        dataset,
        batch_sampler=[batch.tolist() for batch in distributed.shared(rest) if len(batch)],
        num_workers=args.workers,
    )
    with tqdm(
        total=len(dataset),
        initial=len(dataset) - sum(map(len, rest)),
        desc="explaining",
        unit="image",
        leave=False,
        disable=not distributed.is_main(),
    ) as bar:
        for images, _, indices in loader:
            found = examiner(
                images, indices.tolist(), [dataset.entries[index] for index in indices]
            )
            records |= {record["index"]: record for record in found}
            write_lines(own, [json.dumps(record) for record in found], "a")
            bar.update(len(found) * distributed.world_size())
    records = distributed.gathered(records)
    if distributed.is_main():
        collect_records(path, header)
    return [records[index] for index in range(len(dataset))]


def collect_records(path, header):
    """{index: record} of what was kept under this header by earlier runs, whatever their number of processes; it is then in the one
    file `path`, of complete lines. UserError if something else was kept there."""
    others = [
        part
        for part in path.parent.glob("*.jsonl")
        if re.fullmatch(rf"{re.escape(path.stem)}\.\d+\.jsonl", part.name)
    ]
    parts, records = [path, *others], {}
    for part in parts:
        *lines, _ = (
            part.read_text().split("\n") if part.exists() else [""]
        )  # the last is empty, or was cut by a kill
        if lines and json.loads(lines[0]) != header:
            raise UserError(
                f"{part} keeps what was found with other flags, or by another captioner; delete it, or give another --output"
            )
        records |= {record["index"]: record for record in map(json.loads, lines[1:])}
    with write_atomically(path) as temporary:
        write_lines(temporary, map(json.dumps, [header, *records.values()]))
    for part in others:
        part.unlink()
    return records


def write_lines(path, lines, mode="w"):
    """Write or append lines."""
    with open(path, mode) as file:
        file.write("".join(f"{line}\n" for line in lines))


def report(records, names, captioner, args, stem):
    """The tables of the experiments as JSON and Markdown, printed too, and the curves of correctness as PNG."""
    tables = {name: SUMMARIES[name](records, captioner.config.model_type) for name in names}
    text = "\n\n".join(
        f"**{name.replace('_', ' ')}**\n\n{markdown(rows)}" for name, rows in tables.items()
    )
    print(text)
    write_json(
        extended(stem, ".json"), {**provenance(args.seed, args.checkpoint), "tables": tables}
    )
    with write_atomically(extended(stem, ".md")) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    curves = [row for row in tables.get("correctness", []) if "curves" in row]
    if curves:
        with write_atomically(extended(stem, ".png")) as temporary:
            correctness_figure(curves).savefig(temporary, dpi=120)
    print(
        f"\n{len(records)} images; these tables are in {stem}.json and .md{f', the curves in {stem}.png' if curves else ''}"
    )


def markdown(rows):
    """Rows, dicts of the same keys, as a Markdown table; what is not a number or a text is left out."""
    if not rows:
        return "nothing to measure"
    names = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if not any(isinstance(row.get(name), dict) for row in rows)
    ]

    def cell(value):
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [
        " | ".join(names),
        "|".join(["---"] * len(names)),
        *(" | ".join(cell(row.get(name)) for name in names) for row in rows),
    ]
    return "\n".join(f"| {line} |" for line in lines)


def correctness_figure(rows):
    """Figure 3 of the paper: correctness over the threshold, for each method; of the negative relevance dashed."""
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    kinds = [
        kind
        for kind in ("union", "best box", "segmentation")
        if all(kind in row["curves"] for row in rows)
    ]
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds):
        for row in rows:
            negative = row["method"].startswith("negative ")
            colour = (
                f"C{[one['method'] for one in rows].index(row['method'].removeprefix('negative '))}"
            )
            axes.plot(
                THRESHOLDS,
                row["curves"][kind],
                "--" if negative else "-",
                color=colour,
                label=row["method"],
            )
        axes.set(xlabel="threshold", ylabel="correctness", title=kind, ylim=(0, 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def build_parser():
    """The command line."""
    parser = CommandLine(description=__doc__)
    flag = parser.add_argument
    flag(
        "--checkpoint",
        default="checkpoints/scenes-gridtd.pt",
        help="the captioner (default: %(default)s)",
    )
    flag(
        "--dataset",
        default="scenes",
        help="name of a folder under data/, or its path (default: %(default)s)",
    )
    flag("--split", default="test", help="train, val or test (default: %(default)s)")
    flag(
        "--experiment",
        nargs="+",
        choices=("captions", *SUMMARIES, "all"),
        default=["captions"],
        help="what to measure, one or more (default: captions)",
    )
    flag(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["lrp", "gradcam", "guided_gradcam", "attention"],
        help="explanations for the experiments (default: %(default)s)",
    )
    flag("--limit", type=int, help="only the first so many images (default: all)")
    flag(
        "--batch_size", type=int, default=64, help="images captioned at once (default: %(default)s)"
    )
    flag("--workers", type=int, default=2, help="processes that read images (default: %(default)s)")
    flag(
        "--output",
        help="JSON file of the results (default: results/CHECKPOINT-DATASET-SPLIT.json, or results/PREDICTIONS-metrics.json)",
    )
    group = parser.add_argument_group("captions from elsewhere")
    group.add_argument(
        "--predictions",
        metavar="JSON",
        help="score these captions, in COCO's results format, instead of a captioner's",
    )
    group.add_argument(
        "--annotations", metavar="JSON", help="their references, in COCO's captions format"
    )
    group.add_argument(
        "--instances",
        metavar="JSON",
        help="their objects, for CHAIR (default: instances_X.json beside captions_X.json)",
    )
    group.add_argument(
        "--train_annotations",
        metavar="JSON",
        help="training captions, for the document frequencies of CIDEr-D",
    )
    group = parser.add_argument_group("caption metrics")
    group.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=list(METRICS),
        metavar="NAME",
        help=f"of {', '.join(METRICS)} (default: all)",
    )
    group.add_argument("--object_words", choices=(*FREQUENT_OBJECT_WORDS, "train"),
                       help="frequent object words: the paper's lists, or those of the training captions (default: by dataset)")  # fmt: skip
    group.add_argument(
        "--java_memory",
        metavar="SIZE",
        help="Java's memory, as in -Xmx (default: 2G, for SPICE 4G)",
    )
    group.add_argument(
        "--bert_model",
        default="roberta-large",
        help="BERTScore's model, a name or a folder (default: %(default)s)",
    )
    group.add_argument(
        "--bert_layer",
        type=int,
        help="its layer (default: bert-score's choice for the name, else the last)",
    )
    add_decoding_flags(parser)
    add_common_flags(parser)
    return parser


def dataset_folder(name):
    """data/NAME for a bare name, else the path itself."""
    return Path("data") / name if Path(name).name == name else Path(name)


def output_stem(args, name):
    """What the names of the results begin with: --output less its .json, or results/NAME."""
    return Path((args.output or f"results/{name}").removesuffix(".json"))


def open_split(folder, split, encoder):
    """The split as the encoder wants it: images, or cached features where no image is looked at."""
    if encoder.given:
        return CaptionDataset(folder, split, features=encoder.name)
    return CaptionDataset(folder, split, image_transform(encoder.image_size))


def show(values, unavailable, tokens):
    """Print the table."""
    for name, value in values.items():
        print(f"{name:24s} {value:.4f}")
    for name, reason in unavailable.items():
        print(f"{name:24s} unavailable: {reason}")
    print(f"tokens: {tokens}")


def main():
    """Caption a split or read captions, measure, print and write; run the experiments that were asked for."""
    parser = build_parser()
    args = parser.parse_args()
    check_arguments(args, parser)
    set_seed(args.seed)
    if args.predictions:
        captions = read_captions(args)
        rows = [
            {"image_id": key, "caption": sentence} for key, sentence in captions.predictions.items()
        ]
        score(captions, rows, args, output_stem(args, f"{Path(args.predictions).stem}-metrics"))
        return
    device = distributed.own_device(args.device)
    with distributed.job(device):
        evaluate(args, device)


def evaluate(args, device):
    """Measure a captioner on a split of a dataset."""
    folder = dataset_folder(args.dataset)
    captioner = load_captioner(args.checkpoint, device)
    dataset = open_split(folder, args.split, captioner.encoder)
    dataset.entries = dataset.entries[: args.limit]
    stem = output_stem(args, f"{Path(args.checkpoint).stem}-{folder.name}-{args.split}")
    chosen = ["captions", *SUMMARIES] if "all" in args.experiment else args.experiment
    names = [name for name in SUMMARIES if name in chosen]
    if names:
        own = extended(stem, f"-{'all' if names == list(SUMMARIES) else '-'.join(names)}")
        records = examine_split(
            captioner, dataset, names, args, own
        )  # first, for it may find records of other flags
        if distributed.is_main():
            report(records, names, captioner, args, own)
    if "captions" in chosen:
        captions, found = caption_split(captioner, dataset, args)
        rows = [
            {"image_id": entry["image_id"], "caption": captions.predictions[index]}
            for index, entry in enumerate(dataset.entries)
        ]
        for index, row in enumerate(rows):
            row |= (
                {"others": [" ".join(words) for words in found[index][1:]]}
                if len(found[index]) > 1
                else {}
            )
        if distributed.is_main():
            score(captions, rows, args, stem)


def check_arguments(args, parser):
    """UserError for flags that make no sense, or not together."""
    for name, least in (("limit", 1), ("batch_size", 1), ("workers", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}")
    if args.output is not None and (not output_stem(args, "").name or Path(args.output).is_dir()):
        raise UserError(f"--output {args.output} is not the name of a .json file")
    given = set(parser.given(args))
    of_predictions = {"annotations", "instances", "train_annotations"} & given
    of_captioner = {
        "checkpoint",
        "dataset",
        "split",
        "experiment",
        "limit",
        "batch_size",
        "workers",
        "decoding",
        "max_length",
        "strip",
        *OPTIONS,
    } & given
    if of_predictions and not args.predictions:
        raise UserError(f"--{min(of_predictions)} goes with --predictions, the captions to score")
    if of_captioner and args.predictions:
        raise UserError(
            f"--{min(of_captioner)} goes with a captioner; --predictions are captions already"
        )
    if "methods" in given and args.experiment == ["captions"]:
        raise UserError("--methods goes with --experiment, what to do with the explanations")
    if args.predictions and args.object_words == "train" and not args.train_annotations:
        raise UserError(
            "--object_words train needs --train_annotations, the captions to count the words of"
        )
    decoding_options(args)


def score(captions, rows, args, stem):
    """Measure captions, print the table, and write it with their rows."""
    values, unavailable, tokens = measure(captions, args.metrics)
    show(values, unavailable, tokens)
    result = {
        "metrics": values,
        "unavailable": unavailable,
        "tokens": tokens,
        "object_words": captions.object_words,
        "captions": rows,
    }
    write_json(
        extended(stem, ".json"),
        {**provenance(args.seed, None if args.predictions else args.checkpoint), **result},
    )
    print(f"{len(rows)} captions and these figures are in {extended(stem, '.json')}")


if __name__ == "__main__":
    run(main)
