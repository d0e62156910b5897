"""Does fine-tuning with explanations help? Trains and measures every captioner, setting and seed on
the scenes, and makes the table of docs/exploratory.md. It is a script of its own because it does
nothing but call train.py many times and measure.

    python tuning_experiment.py             # what is not done yet, two trainings side by side
    python tuning_experiment.py --table     # only the table of what is done

All captioners look through the encoder of the captioner that ships, as the paper's do through one
VGG16, so seeds vary the decoders. The learning rate of LRP-inference is chosen on the val split
(grid-TD, seed 0, F1 of the frequent object words). The captioners are tested on 500 scenes in which
planted pairs are as frequent as in training, and on 500 in which the second object comes by chance.
"""

import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from commandline import (
    CommandLine,
    Flag,
    UserError,
    add_flags,
    check_limits,
    provenance,
    read_json,
    run,
    write_json,
)
from lateimports import after_parsing, import_what_waits

with after_parsing(globals()):
    import torch

    from captiondata import CaptionDataset
    from captioner import load_captioner
    from captionmetrics import frequent_words, measure
    from decoding import decode_split
    from experiments.captions import captions_of, training_captions
    from featurecache import features_path

ENCODER = "scenes_vgg"
SOURCE = "checkpoints/scenes-gridtd.pt"
FOLDER = Path("results/tuning")
DATA = Path("data/scenes")
# Test set: probability that a planted pair's second object is drawn because of the first
TESTS = {"habit": 0.9, "chance": 0.0}
MODELS = ("gridtd", "aoa", "adaptive")
CROSS_ENTROPY = "cross-entropy"
LRP_INFERENCE = "LRP-inference"
LRP_IMAGE = "LRP-inference, image"
BASELINE = "continued cross-entropy"
# A step takes one caption of each image, as a step of LRP-inference's image form does.
ONE_CAPTION_BASELINE = "continued cross-entropy, one caption"
SETTINGS = {
    CROSS_ENTROPY: [],
    BASELINE: ["--lrp_tune", "--lrp_lambda", "1"],
    LRP_INFERENCE: ["--lrp_tune"],
    ONE_CAPTION_BASELINE: ["--lrp_tune", "--lrp_lambda", "1", "--captions_per_image", "1"],
    LRP_IMAGE: ["--lrp_tune", "--lrp_form", "image", "--captions_per_image", "1"],
    "SCST": ["--cider_tune"],
    "LRP-SCST": ["--lrp_cider_tune"],
}
RATES = ("1e-6", "1e-5", "1e-4")  # learning rates to choose from; the first is the paper's
METRICS = (
    "CIDEr",
    "object-word precision",
    "object-word F1",
    "CHAIR-i",
    "CHAIR-s",
    "planted hallucination",
)
FLAGS = [
    Flag("seeds", "seeds 0, 1, ...", 3, limits=(1, math.inf)),
    Flag(
        "models",
        "captioners; the pilot is of gridtd",
        list(MODELS),
        type=str,
        nargs="+",
        choices=MODELS,
        shown="all",
    ),
    Flag(
        "without",
        "settings to leave out",
        [],
        type=str,
        nargs="+",
        choices=SETTINGS,
        shown="none",
    ),
    Flag("epochs", "epochs of cross-entropy", 4, limits=(1, math.inf)),
    Flag("iterations", "steps of every fine-tuning", 150, limits=(1, math.inf)),
    Flag("jobs", "trainings side by side, each on one core", 2, limits=(1, math.inf)),
    Flag("table", "train nothing", False, switch=True),
]


@dataclass(frozen=True)
class Length:
    """How long the captioners are trained: epochs of cross-entropy, iterations of a fine-tuning."""

    epochs: int
    iterations: int


@dataclass(frozen=True)
class Training:
    """One training: a captioner, a seed, a setting of SETTINGS, and a learning rate or None.

    rate: of the decoder, as text; None: the usual one.
    """

    model: str
    seed: int
    setting: str
    rate: str | None = None

    @property
    def name(self):
        """What its files are called."""
        setting = self.setting.replace(", ", "-").replace(" ", "-")
        parts = [self.model, str(self.seed), setting]
        if self.rate:
            parts.append(self.rate)
        return "-".join(parts)

    @property
    def checkpoint(self):
        """Where its captioner goes."""
        return FOLDER / f"{self.name}.pt"

    @property
    def result(self):
        """Where its metrics go."""
        return FOLDER / f"{self.name}.json"


def call(*arguments, threads=1):
    """Run one of the project's scripts on few threads; UserError with its last line if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"{arguments[0]} failed: {lines[-1]}")


def folder_of_test(name):
    """Where a test set of TESTS is prepared."""
    return DATA.with_name(f"scenes-{name}")


def prepare():
    """Draw the scenes and the two test sets, and cache the features of all of them."""
    encoder = ["--features", ENCODER, "--encoder_weights", SOURCE]
    if not features_path(DATA, ENCODER).exists():
        call("preparedataset.py", *encoder, threads=2)
    for name, bias in TESTS.items():
        folder = folder_of_test(name)
        if features_path(folder, ENCODER).exists():
            continue
        scenes = ["--output", folder, "--train", 40, "--val", 20, "--seed", 1, "--test_bias", bias]
        call("preparedataset.py", *scenes, *encoder, threads=2)


def train_and_measure(training, length):
    """Train one captioner unless that is done, and write its metrics on val and both test sets.

    UserError if it was trained for another Length before.
    """
    lengths = {"epochs": length.epochs, "iterations": length.iterations}
    if training.result.exists():
        if read_json(training.result)["length"] != lengths:
            raise UserError(
                f"{training.result} is of other --epochs or --iterations; "
                f"delete {FOLDER} to begin anew"
            )
        return
    call("train.py", *training_flags(training, length))
    result = {
        **provenance(training.seed, training.checkpoint),
        "rate": training.rate,
        "length": lengths,
        "metrics": metrics_of(training.checkpoint),
    }
    write_json(training.result, result)
    training.checkpoint.with_suffix(".last.pt").unlink()


def training_flags(training, length):
    """The flags of train.py; they go on with the training if it was interrupted."""
    flags = ["--model_type", training.model, "--seed", training.seed, "--workers", 0]
    flags += ["--output", training.checkpoint, *SETTINGS[training.setting]]
    if training.setting == CROSS_ENTROPY:
        flags += ["--epochs", length.epochs]
    else:
        trained = Training(training.model, training.seed, CROSS_ENTROPY)
        flags += ["--resume", trained.checkpoint, "--max_iterations", length.iterations]
    if training.rate:
        flags += ["--decoder_lr", training.rate]
    last = training.checkpoint.with_suffix(".last.pt")
    if last.exists():
        flags += ["--resume", last]
    return flags


def metrics_of(checkpoint):
    """{"val", "habit", "chance": {metric: value}} of a captioner."""
    captioner = load_captioner(checkpoint)
    splits = {"val": CaptionDataset(DATA, "val", features=ENCODER)}
    for name in TESTS:
        splits[name] = CaptionDataset(folder_of_test(name), "test", features=ENCODER)
    corpus = training_captions(splits["val"])
    metrics = {}
    for name, dataset in splits.items():
        decoded = decode_split(captioner, dataset, workers=0)
        predictions = {index: " ".join(words) for index, words in decoded.items()}
        object_words = frequent_words(corpus, dataset.info["categories"])
        captions = captions_of(dataset, predictions, corpus, object_words)
        metrics[name], _, _ = measure(captions, ("cider", "object_words", "chair", "planted"))
    return metrics


def chosen_rate():
    """The learning rate of LRP-inference with the best F1 on val."""

    def f1_on_val(rate):
        result = read_json(Training("gridtd", 0, LRP_INFERENCE, rate).result)
        return result["metrics"]["val"]["object-word F1"]

    return max(RATES, key=f1_on_val)


def rate_of(setting):
    """The learning rate of a setting: the chosen one for LRP-inference, else None."""
    return chosen_rate() if "--lrp_tune" in SETTINGS[setting] else None


def pilot():
    """The trainings from which the learning rate is chosen, and their baselines."""
    trainings = []
    for rate in RATES:
        for setting in (LRP_INFERENCE, BASELINE):
            trainings.append(Training("gridtd", 0, setting, rate))
    return trainings


def fine_tunings(model, seeds, without):
    """All trainings of a captioner that go on from cross-entropy, in order."""
    trainings = []
    for setting in SETTINGS:
        if setting == CROSS_ENTROPY or setting in without:
            continue
        rate = rate_of(setting)
        trainings += [Training(model, seed, setting, rate) for seed in range(seeds)]
    return trainings


def run_missing(models, without, seeds, jobs, length):
    """Run what is missing: cross-entropy first, then the pilot, then the rest.

    models, without: which of MODELS to train, which of SETTINGS to leave out; jobs: trainings side
    by side; length: a Length.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    prepare()

    def run_all(trainings):
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(train_and_measure, training, length) for training in trainings]
            for future in futures:
                future.result()

    run_all([Training("gridtd", 0, CROSS_ENTROPY)])
    run_all(pilot())
    for model in MODELS:
        if model in models:
            run_all([Training(model, seed, CROSS_ENTROPY) for seed in range(seeds)])
            run_all(fine_tunings(model, seeds, without))


def spread(values):
    """Mean and standard deviation as text."""
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.3f}"
    return text


def table(seeds):
    """Markdown of what is done, for seeds 0, 1, ...

    It has mean ± sd over seeds, and below it the paired difference to continued cross-entropy of as
    many captions a step.
    """
    lines = []
    for test in TESTS:
        header = ["captioner", "training", "seeds", *METRICS]
        lines += [f"\n**{test}**\n", markdown_row(header), "|---" * len(header) + "|"]
        for model in MODELS:
            lines += model_rows(model, seeds, test)
    return "\n".join(lines)


def model_rows(model, seeds, test):
    """The rows of a captioner on a test set."""
    rows = []
    results = {setting: results_of(model, setting, seeds, test) for setting in SETTINGS}
    for setting, found in results.items():
        if not found:
            continue
        cells = []
        for metric in METRICS:
            cells.append(spread([figures[metric] for figures in found.values()]))
        rows.append(markdown_row([model, setting, len(found), *cells]))
        baseline = results[baseline_of(setting)]
        both = sorted(found.keys() & baseline.keys())
        if both and setting not in (CROSS_ENTROPY, BASELINE, ONE_CAPTION_BASELINE):
            cells = differences(found, baseline, both)
            rows.append(markdown_row(["", "*difference*", len(both), *cells]))
    return rows


def baseline_of(setting):
    """The setting whose steps see as many captions, without an explanation."""
    return ONE_CAPTION_BASELINE if setting == LRP_IMAGE else BASELINE


def differences(found, baseline, seeds):
    """For each metric the spread over seeds of one {seed: metrics} less another."""
    cells = []
    for metric in METRICS:
        cells.append(spread([found[seed][metric] - baseline[seed][metric] for seed in seeds]))
    return cells


def markdown_row(cells):
    """A row of a Markdown table."""
    parts = [f" {cell} " if cell != "" else " " for cell in cells]
    return "|" + "|".join(parts) + "|"


def results_of(model, setting, seeds, test):
    """{seed: metrics on a test set} of the runs that are done, at the chosen learning rate."""
    rate = rate_of(setting)
    results = {}
    for seed in range(seeds):
        path = Training(model, seed, setting, rate).result
        if path.exists():
            results[seed] = read_json(path)["metrics"][test]
    return results


def main():
    """Train what is missing and print the table."""
    parser = CommandLine(description=__doc__)
    add_flags(parser, FLAGS)
    args = parser.parse_args()
    check_limits(vars(args), FLAGS)
    import_what_waits()
    torch.set_num_threads(1)
    if not args.table:
        length = Length(args.epochs, args.iterations)
        run_missing(args.models, args.without, args.seeds, args.jobs, length)
    text = table(args.seeds)
    print(f"learning rate of LRP-inference, chosen on val: {chosen_rate()}\n{text}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "table.md").write_text(text + "\n")


if __name__ == "__main__":
    run(main)
