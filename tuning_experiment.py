"""Does fine-tuning with explanations help? Trains and measures every captioner, setting and seed on the scenes, and makes the
table of RESULTS.md. A script of its own because it does nothing but call train.py many times and evaluation.py's functions.

    python tuning_experiment.py                     # what is not done yet, two trainings side by side
    python tuning_experiment.py --table             # only the table of what is done

All captioners look through the encoder of the captioner that ships, as the paper's do through one VGG16, so seeds vary the
decoders. The learning rate of LRP-inference is chosen on the val split (grid-TD, seed 0, F1 of the frequent object words).
Tested on 500 scenes in which planted pairs are as frequent as in training, and 500 in which the second object comes by chance.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from captiondata import CaptionDataset
from captioner import load_captioner
from captionmetrics import frequent_words, measure
from commandline import CommandLine, UserError, provenance, read_json, run, write_json
from evaluation import captions_of, decode_split
from featurecache import features_path

ENCODER, SOURCE = "scenes_vgg", "checkpoints/scenes-gridtd.pt"
FOLDER = Path("results/tuning")
DATA = Path("data/scenes")
TESTS = {
    "habit": 0.9,
    "chance": 0.0,
}  # probability that a planted pair's second object is drawn because of the first
MODELS = ("gridtd", "aoa", "adaptive")
BASELINE, OF_ONE_CAPTION = (
    "continued cross-entropy",
    "continued cross-entropy, one caption",
)  # of each image a step, as the image form
SETTINGS = {
    "cross-entropy": [],
    BASELINE: ["--lrp_tune", "--lrp_lambda", "1"],
    "LRP-inference": ["--lrp_tune"],
    OF_ONE_CAPTION: ["--lrp_tune", "--lrp_lambda", "1", "--captions_per_image", "1"],
    "LRP-inference, image": ["--lrp_tune", "--lrp_form", "image", "--captions_per_image", "1"],
    "SCST": ["--cider_tune"],
    "LRP-SCST": ["--lrp_cider_tune"],
}
RATES = ("1e-6", "1e-5", "1e-4")  # the paper's first
METRICS = (
    "CIDEr",
    "object-word precision",
    "object-word F1",
    "CHAIR-i",
    "CHAIR-s",
    "planted hallucination",
)


def stem(model, seed, setting, rate=None):
    """The name of a run."""
    return "-".join(
        [model, str(seed), setting.replace(", ", "-").replace(" ", "-"), *([rate] if rate else [])]
    )


def call(*arguments, threads=1):
    """Run one of the project's scripts on few threads; UserError with its last line if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(
            f"{arguments[0]} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
        )


def prepare():
    """The scenes, the two test sets, and the features of all of them."""
    weights = ["--features", ENCODER, "--encoder_weights", SOURCE]
    if not features_path(DATA, ENCODER).exists():
        call("preparedataset.py", *weights, threads=2)
    for name, bias in TESTS.items():
        folder = DATA.with_name(f"scenes-{name}")
        if not features_path(folder, ENCODER).exists():
            call(
                "preparedataset.py",
                "--output",
                folder,
                "--train",
                40,
                "--val",
                20,
                "--seed",
                1,
                "--test_bias",
                bias,
                *weights,
                threads=2,
            )


def train_and_measure(model, seed, setting, args, rate=None):
    """Train one captioner unless that is done, and write its figures on val and both test sets."""
    name = stem(model, seed, setting, rate)
    checkpoint, result = FOLDER / f"{name}.pt", FOLDER / f"{name}.json"
    length = {"epochs": args.epochs, "iterations": args.iterations}
    if result.exists():
        if read_json(result)["length"] != length:
            raise UserError(
                f"{result} is of other --epochs or --iterations; delete {FOLDER} to begin anew"
            )
        return
    flags = [
        "--model_type",
        model,
        "--seed",
        seed,
        "--output",
        checkpoint,
        "--workers",
        0,
        *SETTINGS[setting],
    ]
    if setting == "cross-entropy":
        flags += ["--epochs", args.epochs]
    else:
        flags += [
            "--resume",
            FOLDER / f"{stem(model, seed, 'cross-entropy')}.pt",
            "--max_iterations",
            args.iterations,
        ]
    if rate:
        flags += ["--decoder_lr", rate]
    last = checkpoint.with_suffix(".last.pt")
    if last.exists():
        flags += ["--resume", last]
    call("train.py", *flags)
    write_json(
        result,
        {
            **provenance(seed, checkpoint),
            "rate": rate,
            "length": length,
            "metrics": figures(checkpoint),
        },
    )
    last.unlink()


def figures(checkpoint):
    """{"val", "habit", "chance": {metric: value}} of a captioner."""
    captioner = load_captioner(checkpoint)
    corpus = {
        index: entry["captions"] for index, entry in enumerate(read_json(DATA / "train.json"))
    }
    splits = {"val": CaptionDataset(DATA, "val", features=ENCODER)}
    splits |= {
        name: CaptionDataset(DATA.with_name(f"scenes-{name}"), "test", features=ENCODER)
        for name in TESTS
    }
    found = {}
    for name, dataset in splits.items():
        predictions = {
            index: " ".join(words)
            for index, words in decode_split(captioner, dataset, workers=0).items()
        }
        captions = captions_of(
            dataset, predictions, corpus, frequent_words(corpus, dataset.info["categories"])
        )
        found[name], _, _ = measure(captions, ("cider", "object_words", "chair", "planted"))
    return found


def chosen_rate():
    """The learning rate of LRP-inference with the best F1 on val."""

    def value(rate):
        return read_json(FOLDER / f"{stem('gridtd', 0, 'LRP-inference', rate)}.json")["metrics"][
            "val"
        ]["object-word F1"]

    return max(RATES, key=value)


def jobs(args):
    """Run what is missing: cross-entropy first, then the pilot, then the rest."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    prepare()
    models = [model for model in MODELS if model in args.models]

    def all_of(tasks):
        with ThreadPoolExecutor(args.jobs) as pool:
            for future in [pool.submit(train_and_measure, *task) for task in tasks]:
                future.result()

    all_of([("gridtd", 0, "cross-entropy", args)])
    all_of(
        [
            ("gridtd", 0, setting, args, rate)
            for rate in RATES
            for setting in ("LRP-inference", BASELINE)
        ]
    )
    rate = chosen_rate()
    for model in models:
        all_of([(model, seed, "cross-entropy", args) for seed in range(args.seeds)])
        settings = [
            (setting, rate if "--lrp_tune" in flags else None)
            for setting, flags in SETTINGS.items()
            if setting != "cross-entropy"
        ]
        settings = [(setting, rate) for setting, rate in settings if setting not in args.without]
        all_of(
            [
                (model, seed, setting, args, rate)
                for setting, rate in settings
                for seed in range(args.seeds)
            ]
        )


def spread(values):
    """Mean and standard deviation as text."""
    return f"{statistics.mean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


def table(seeds):
    """Markdown of what is done: mean ± sd over seeds, and below it the paired difference to continued cross-entropy, of as many
    captions a step."""
    lines = []
    for test in TESTS:
        lines += [
            f"\n**{test}**\n",
            "| captioner | training | seeds | " + " | ".join(METRICS) + " |",
            "|---" * (3 + len(METRICS)) + "|",
        ]
        for model in MODELS:
            results = {setting: results_of(model, setting, seeds, test) for setting in SETTINGS}
            for setting, found in results.items():
                if not found:
                    continue
                cells = [spread([found[seed][metric] for seed in found]) for metric in METRICS]
                lines.append(f"| {model} | {setting} | {len(found)} | " + " | ".join(cells) + " |")
                baseline = results[
                    OF_ONE_CAPTION if setting == "LRP-inference, image" else BASELINE
                ]
                both = sorted(found.keys() & baseline.keys())
                if setting not in ("cross-entropy", BASELINE, OF_ONE_CAPTION) and both:
                    cells = [
                        spread([found[seed][metric] - baseline[seed][metric] for seed in both])
                        for metric in METRICS
                    ]
                    lines.append(
                        "| | *difference* | " + f"{len(both)} | " + " | ".join(cells) + " |"
                    )
    return "\n".join(lines)


def results_of(model, setting, seeds, test):
    """{seed: metrics on a test set} of the runs that are done, at the chosen learning rate."""
    rate = chosen_rate() if "--lrp_tune" in SETTINGS[setting] else None
    paths = {seed: FOLDER / f"{stem(model, seed, setting, rate)}.json" for seed in range(seeds)}
    return {
        seed: json.loads(path.read_text())["metrics"][test]
        for seed, path in paths.items()
        if path.exists()
    }


def main():
    """Train what is missing and print the table."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "--seeds", type=int, default=3, help="seeds 0, 1, ... (default: %(default)s)"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=list(MODELS),
        help="captioners; the pilot is of gridtd (default: all)",
    )
    parser.add_argument(
        "--without", nargs="+", choices=SETTINGS, default=[], help="settings to leave out"
    )
    parser.add_argument(
        "--epochs", type=int, default=4, help="of cross-entropy (default: %(default)s)"
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=150,
        help="steps of every fine-tuning (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        help="trainings side by side, each on one core (default: %(default)s)",
    )
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    for name in ("seeds", "epochs", "iterations", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    torch.set_num_threads(1)
    if not args.table:
        jobs(args)
    text = table(args.seeds)
    print(f"learning rate of LRP-inference, chosen on val: {chosen_rate()}\n{text}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "table.md").write_text(text + "\n")


if __name__ == "__main__":
    run(main)
