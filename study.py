"""Run the replication of docs/PROTOCOL.md: train, caption and explain its units, make its tables.

    python study.py --prepared data/flickr8k-dev --list             # what is done, what is missing
    python study.py --prepared data/flickr8k-dev --units gridtd-0   # train, fine-tune, caption dev
    python study.py --prepared data/flickr8k-dev --units gridtd-0 --final     # caption final too
    python study.py --prepared data/flickr8k-dev --units gridtd-0 --final --explain
    python study.py --prepared data/flickr8k-dev --report           # the tables and the verdicts

A unit is one captioner with one seed. Its cross-entropy captioner is trained first, and every arm
goes on from it. The unit of seed 0 chooses the learning rates of its captioner, so it comes first.
What is done is kept run by run in checkpoints/study, and a killed unit goes on where it stopped. A
finished unit is one file of results/study, from which the tables are made.

In a prepared folder the split val is dev, and test is final.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from commandline import (
    CommandLine,
    Flag,
    UserError,
    add_flags,
    check_limits,
    choose_device,
    file_hash,
    provenance,
    read_json,
    run,
    write_atomically,
    write_json,
)
from lateimports import after_parsing, import_what_waits
from prepared import dataset_folder

with after_parsing(globals()):
    import train
    from captiondata import CaptionDataset, open_split
    from captioner import load_captioner
    from captionmetrics import frequent_words
    from decoding import decode_split
    from experiments import EXPERIMENTS, sign
    from experiments.captions import captions_of, training_captions
    from experiments.captionscores import image_records
    from experiments.case import Setting
    from experiments.hypotheses import METRICS, explained_record
    from experiments.records import examine_split, header_of
    from experiments.report import report
    from plots import save_figure
    from pycocoevalcap.chair.chair import object_phrases

RESULTS = Path("results/study")
WORK = Path("checkpoints/study")
SPLITS = {"dev": "val", "final": "test"}
CROSS_ENTROPY = "cross_entropy"
EPOCHS = {"aoa": 10, "gridtd": 8, "adaptive": 6}  # of photographs; scenes: as the preset has it
TUNING_STEPS = 320
SCST_STEPS = 900
CHECKPOINT_EVERY = 100  # steps, of which a kill loses no more
RATES = ("1e-6", "1e-5", "1e-4")  # the first is the paper's
SCST_RATE = "1e-4"
# The flags of train.py of each arm.
ARMS = {
    "continued": ["--lrp_tune", "--lrp_lambda", "1"],
    "lrp": ["--lrp_tune"],
    "random": ["--lrp_tune", "--lrp_control", "random"],
    "shuffled": ["--lrp_tune", "--lrp_control", "shuffled"],
    "magnitude": ["--lrp_tune", "--lrp_control", "magnitude"],
    "temperature": ["--lrp_tune", "--lrp_control", "temperature"],
    "scst": ["--cider_tune"],
    "lrp_scst": ["--lrp_cider_tune"],
}
SCST_FLAGS = ["--scst_baseline", "others", "--batch_size", "20"]
SCST_ARMS = ("scst", "lrp_scst")
AT_PAPERS_RATE = ("continued", "lrp")  # always run at the paper's rate too
METHODS = ["lrp", "gradcam", "guided_gradcam", "attention"]
EXPLAINED = ("word_ablation", "correctness", "hallucination")  # and the sign of relevance
CRITERION = "micro F1"  # on dev, for the learning rates
FLAGS = [
    Flag("prepared", "the prepared folder, or its name under data/", "flickr8k-dev"),
    Flag("units", "what to run: CAPTIONER-SEED, such as gridtd-0", [], type=str, nargs="+"),
    Flag(
        "arms",
        "the arms to run, beside cross-entropy",
        list(ARMS),
        type=str,
        nargs="+",
        choices=tuple(ARMS),
        shown="all",
    ),
    Flag("final", "also caption the final split, of finished units", False, switch=True),
    Flag("explain", "also explain the final split; goes with --final", False, switch=True),
    Flag("list", "say what is done and what is missing, and run nothing", False, switch=True),
    Flag("report", "make the tables from the finished units", False, switch=True),
    Flag("seeds", "seeds 0, 1, ... that are planned", 5, limits=(1, math.inf)),
    Flag(
        "epochs",
        "epochs of cross-entropy",
        type=int,
        limits=(1, math.inf),
        shown="those of the protocol",
    ),
    Flag(
        "iterations",
        "steps of every arm",
        type=int,
        limits=(1, math.inf),
        shown="those of the protocol",
    ),
    Flag("device", "where to compute", shown="cuda if there is one, else cpu"),
]


@dataclass(frozen=True)
class Plan:
    """What all units of a study share.

    folder      the prepared dataset, whose features are cached
    scenes      whether it is of drawn scenes
    arms        names of ARMS
    epochs, iterations    of a training; None: the protocol's
    device      its name, or None
    """

    folder: Path
    scenes: bool
    arms: list
    epochs: int | None = None
    iterations: int | None = None
    device: str | None = None

    @property
    def encoder(self):
        """The name of the encoder whose features are taken."""
        return "scenes_vgg" if self.scenes else "timm/tf_efficientnet_lite2"

    def result(self, unit):
        """The file of a unit's results."""
        return RESULTS / f"{self.folder.name}-{unit}.json"

    def explained(self, unit):
        """The file of what its explanations found."""
        return RESULTS / f"{self.folder.name}-{unit}-explanations.json"

    def work(self, unit):
        """The folder of its checkpoints."""
        return WORK / f"{self.folder.name}-{unit}"


@dataclass(frozen=True)
class Unit:
    """One captioner, a name of EPOCHS, with one seed."""

    captioner: str
    seed: int

    def __str__(self):
        return f"{self.captioner}-{self.seed}"

    @classmethod
    def named(cls, text):
        """The unit that is called so; UserError if it is none."""
        captioner, _, seed = text.rpartition("-")
        if captioner not in EPOCHS or not seed.isdecimal():
            raise UserError(f"{text} is no unit; one is called {next(iter(EPOCHS))}-0")
        return cls(captioner, int(seed))


@dataclass(frozen=True)
class Training:
    """One training of a unit: CROSS_ENTROPY, or an arm of ARMS at a learning rate, a text."""

    arm: str
    rate: str | None = None

    @property
    def name(self):
        """What its files are called, and its results in the unit's."""
        return self.arm if self.rate is None else f"{self.arm}@{self.rate}"


# ------------------------------------------------------------------------------------ what to run


def trainings_of(unit, plan):
    """The Trainings of a unit in their order, cross-entropy first.

    UserError if the learning rates have not been chosen, by the unit of seed 0.
    """
    trainings = [Training(CROSS_ENTROPY)]
    for arm in plan.arms:
        trainings += [Training(arm, rate) for rate in rates_of(arm, unit, plan)]
    return trainings


def rates_of(arm, unit, plan):
    """The learning rates at which a unit runs an arm."""
    if arm in SCST_ARMS:
        return [SCST_RATE]
    if unit.seed == 0:
        return RATES
    rates = [chosen_rate(arm, unit.captioner, plan)]
    if arm in AT_PAPERS_RATE and RATES[0] not in rates:
        rates.insert(0, RATES[0])
    return rates


def chosen_rate(arm, captioner, plan):
    """The learning rate at which all arms of a captioner are compared.

    It is the one with the best mean dev score of all arms but SCST's in the captioner's unit of
    seed 0, and the lower one of equals. UserError if that unit is not finished, or lacks the arm.
    """
    if arm in SCST_ARMS:
        return SCST_RATE
    first = Unit(captioner, 0)
    path = plan.result(first)
    if not path.exists():
        raise UserError(f"run unit {first} first: it chooses the learning rates")
    runs = read_json(path)["runs"]
    scores = dict.fromkeys(RATES, 0.0)
    for rate in RATES:
        if Training(arm, rate).name not in runs:
            raise UserError(f"unit {first} has no {arm}@{rate} yet: run it with --arms {arm}")
        own = [run for run in runs.values() if run.get("rate") == rate]
        compared = [run for run in own if run["arm"] not in SCST_ARMS]
        scores[rate] = mean(run["metrics"]["dev"][CRITERION] for run in compared)
    return max(RATES, key=scores.get)  # the first of equals


def compared_runs(unit, plan):
    """{arm: name of its run} at the chosen rates, cross-entropy included.

    "ARM 1e-6" is an arm at the paper's rate. Only arms that the unit has finished are there, and
    that the captioner's unit of seed 0 has too.
    """
    names = {CROSS_ENTROPY: CROSS_ENTROPY}
    for arm in plan.arms:
        try:
            names[arm] = Training(arm, chosen_rate(arm, unit.captioner, plan)).name
        except UserError:
            continue
        if arm in AT_PAPERS_RATE:
            names[f"{arm} {RATES[0]}"] = Training(arm, RATES[0]).name
    finished = read_json(plan.result(unit))["runs"]
    return {arm: name for arm, name in names.items() if name in finished}


def settings_of(training, unit, plan):
    """The flags of train.py that say how a training is done, without any path."""
    flags = ["--model_type", unit.captioner, "--seed", unit.seed]
    flags += ["--preset", "scenes" if plan.scenes else "flickr8k", "--no-augment"]
    if not plan.scenes:
        flags.append("--bfloat16")
    if training.arm == CROSS_ENTROPY:
        flags += ["--encoder", plan.encoder]
        epochs = plan.epochs or (None if plan.scenes else EPOCHS[unit.captioner])
        if epochs:
            flags += ["--epochs", epochs]
    else:
        steps = SCST_STEPS if training.arm in SCST_ARMS else TUNING_STEPS
        flags += [*ARMS[training.arm], "--decoder_lr", training.rate]
        flags += ["--max_iterations", plan.iterations or steps]
        if training.arm in SCST_ARMS:
            flags += SCST_FLAGS
    return [str(flag) for flag in flags]


def training_flags(training, unit, plan):
    """All flags of train.py for a training, which go on with it if it was interrupted."""
    work = plan.work(unit)
    flags = settings_of(training, unit, plan)
    flags += ["--dataset", os.path.join(".", plan.folder)]  # a bare name would be one of data/
    flags += ["--output", work / f"{training.name}.pt", "--workers", 0]
    flags += ["--checkpoint_every", CHECKPOINT_EVERY]
    if plan.device:
        flags += ["--device", plan.device]
    if training.arm != CROSS_ENTROPY:
        flags += ["--resume", work / f"{CROSS_ENTROPY}.pt"]
    last = last_checkpoint(training, unit, plan)
    if last.exists():
        flags += ["--resume", last]
    return [str(flag) for flag in flags]


def last_checkpoint(training, unit, plan):
    """The file that an interrupted training is resumed from."""
    return plan.work(unit) / f"{training.name}.last.pt"


# ------------------------------------------------------------------------------------ running it


def run_unit(unit, plan):
    """Run what is missing of a unit, and write its results when all of it is done.

    UserError if a part of it was done in another way, or if its checkpoints are gone.
    """
    if plan.result(unit).exists() and not list(plan.work(unit).glob("*.json")):
        raise UserError(
            f"{plan.result(unit)} is finished, but its checkpoints are not in {plan.work(unit)}; "
            "delete the file to run the unit anew"
        )
    for training in trainings_of(unit, plan):
        done = plan.work(unit) / f"{training.name}.json"
        if done.exists():
            if read_json(done)["flags"] != " ".join(settings_of(training, unit, plan)):
                raise UserError(f"{done} is of other settings; delete it to train that anew")
            continue
        print(f"{unit}: {training.name}")
        flags = training_flags(training, unit, plan)
        train.train(train.parse_arguments(flags), choose_device(plan.device))
        write_json(done, run_result(training, unit, plan))
        last_checkpoint(training, unit, plan).unlink(missing_ok=True)
    write_result(unit, plan)


def run_result(training, unit, plan):
    """What is kept of a finished run: its flags, how long it took, and dev's records."""
    checkpoint = plan.work(unit) / f"{training.name}.pt"
    history = checkpoint.with_suffix(".jsonl").read_text().splitlines()
    seconds = [json.loads(line).get("seconds", 0) for line in history]
    return {
        "arm": training.arm,
        "rate": training.rate,
        "flags": " ".join(settings_of(training, unit, plan)),
        "seconds": round(sum(seconds), 1),
        "checkpoint_sha256": file_hash(checkpoint),
        "records": {"dev": caption_records(checkpoint, "dev", plan)},
    }


def caption_records(checkpoint, split, plan):
    """The caption of each image of a split with its image record, in order."""
    captioner = load_captioner(checkpoint, choose_device(plan.device))
    dataset = CaptionDataset(plan.folder, SPLITS[split], features=plan.encoder)
    decoded = decode_split(captioner, dataset, workers=0)
    predictions = {index: " ".join(words) for index, words in decoded.items()}
    corpus = training_captions(dataset)
    words = frequent_words(corpus, dataset.info["categories"])
    captions = captions_of(dataset, predictions, corpus, words, use_java=False)
    records = []
    for index, record in image_records(captions).items():
        records.append({"caption": predictions[index], **record})
    return records


def write_result(unit, plan):
    """Write the results of a unit's finished trainings.

    Equal captions of an image are kept once: "captions" has of each split and image the different
    ones with their records, and of each training the number of its own.
    """
    pool = {}
    runs = {}
    for path in sorted(plan.work(unit).glob("*.json")):
        found = read_json(path)
        found["metrics"] = {}
        found["captions"] = {}
        for split, records in found.pop("records").items():
            if split != "final":  # it is measured by --report, when all units are finished
                found["metrics"][split] = metrics_of(records)
            found["captions"][split] = put_into(pool.setdefault(split, []), records)
        runs[path.stem] = found
    result = {
        **provenance(unit.seed),
        "captioner": unit.captioner,
        "dataset": dataset_hashes(plan),
        "runs": runs,
        "captions": pool,
    }
    write_json(plan.result(unit), result, indent=None)


def dataset_hashes(plan):
    """{file: hash} of what the results depend on in the prepared folder, and its name."""
    hashes = {"folder": plan.folder.name}
    for name in ("info", "train", *SPLITS.values()):
        hashes[name] = file_hash(plan.folder / f"{name}.json")
    return hashes


def put_into(pool, records):
    """The numbers of the records in `pool`, which gets those that it lacks.

    pool: of each image a list of records; empty at first.
    """
    if not pool:
        pool += [[] for _ in records]
    numbers = []
    for known, record in zip(pool, records, strict=True):
        if record not in known:
            known.append(record)
        numbers.append(known.index(record))
    return numbers


def metrics_of(records):
    """{name of METRICS: value} of a split's records; None where nothing can be measured."""
    metrics = {}
    for name, (columns, statistic) in METRICS.items():
        value = float(statistic(columns(records).sum(axis=0)))
        metrics[name] = value if math.isfinite(value) else None
    return metrics


# ------------------------------------------------------------------------------ the final split


def caption_final(unit, plan):
    """Caption the final split by all runs of a finished unit, once each."""
    if not plan.result(unit).exists():
        raise UserError(f"unit {unit} is not finished; run it without --final first")
    for name in sorted(read_json(plan.result(unit))["runs"]):
        path = plan.work(unit) / f"{name}.json"
        found = read_json(path)
        if "final" not in found["records"]:
            checkpoint = path.with_name(f"{name}.pt")
            found["records"]["final"] = caption_records(checkpoint, "final", plan)
            write_json(path, found)
    write_result(unit, plan)


def explain_final(unit, plan):
    """Explain the final split by the cross-entropy captioner, and keep what H1 to H4 need."""
    checkpoint = plan.work(unit) / f"{CROSS_ENTROPY}.pt"
    captioner = load_captioner(checkpoint, choose_device(plan.device))
    dataset = open_split(plan.folder, SPLITS["final"], captioner.encoder)
    categories = dataset.info["categories"]
    words = frequent_words(training_captions(dataset), categories)
    setting = Setting(captioner, METHODS, object_phrases(categories), words)
    experiments = {name: EXPERIMENTS[name] for name in EXPLAINED} | {"sign": sign.EXPERIMENT}
    header = header_of(checkpoint, dataset, experiments, setting)
    path = plan.work(unit) / "explanations.jsonl"
    records = examine_split(dataset, experiments, setting, path, header, workers=0)
    result = {
        **provenance(unit.seed),
        "captioner": unit.captioner,
        "dataset": dataset_hashes(plan),
        "checkpoint_sha256": file_hash(checkpoint),
        "images": [explained_record(record) for record in records],
    }
    write_json(plan.explained(unit), result, indent=None)


# ------------------------------------------------------------------------------------ the command


def list_units(plan, seeds):
    """Print of each planned unit which runs are done and missing, and whether final is done."""
    for captioner in EPOCHS:
        for seed in range(seeds):
            unit = Unit(captioner, seed)
            print(f"{unit}: {state_of(unit, plan)}")


def state_of(unit, plan):
    """What is done and missing of a unit, as text."""
    if plan.result(unit).exists():
        result = read_json(plan.result(unit))
        final = "final captioned" if "final" in result["captions"] else "final not captioned"
        explained = "explained" if plan.explained(unit).exists() else "not explained"
        return f"{len(result['runs'])} runs finished; {final}, {explained}"
    done = sorted(path.stem for path in plan.work(unit).glob("*.json"))
    try:
        wanted = [training.name for training in trainings_of(unit, plan)]
    except UserError as reason:
        return str(reason)
    missing = [name for name in wanted if name not in done]
    return f"done: {', '.join(done) or 'nothing'}; missing: {', '.join(missing)}"


def read_units(plan, seeds):
    """{captioner: for each seed {arm: records of final}} of the units that are captioned.

    Seeds count up to the first that is missing.
    """
    units = {}
    for captioner in EPOCHS:
        found = []
        for seed in range(seeds):
            path = plan.result(Unit(captioner, seed))
            result = read_json(path) if path.exists() else {"captions": {}}
            if "final" not in result["captions"]:
                break
            arms = {}
            for arm, name in compared_runs(Unit(captioner, seed), plan).items():
                if "final" in result["runs"][name]["captions"]:
                    arms[arm] = records_of(result, name)
            found.append(arms)
        if found:
            units[captioner] = found
    return units


def records_of(result, name, split="final"):
    """The records of a run, from the pool of its unit's results."""
    numbers = result["runs"][name]["captions"][split]
    return [known[number] for known, number in zip(result["captions"][split], numbers)]


def read_explanations(plan, seeds):
    """{captioner: records of the images} of each captioner's first unit that is explained."""
    found = {}
    for captioner in EPOCHS:
        paths = [plan.explained(Unit(captioner, seed)) for seed in range(seeds)]
        explained = [path for path in paths if path.exists()]
        if explained:
            found[captioner] = read_json(explained[0])["images"]
    return found


def write_report(plan, seeds):
    """Print the tables and the verdicts, and write them and their figure beside the units."""
    rates = {}
    units = read_units(plan, seeds)
    for captioner in units:
        first = plan.result(Unit(captioner, 0))
        for arm, name in compared_runs(Unit(captioner, 0), plan).items():
            rates[f"{captioner}, {arm}"] = read_json(first)["runs"][name]["rate"]
    text, words, figure = report(units, read_explanations(plan, seeds), rates)
    print(text)
    stem = RESULTS / f"{plan.folder.name}-report"
    with write_atomically(stem.with_suffix(".md")) as temporary:
        temporary.write_text(text)
    with write_atomically(stem.with_suffix(".csv")) as temporary:
        temporary.write_text(words)
    if figure:
        save_figure(figure, stem.with_suffix(".png"))


def parse_arguments(arguments=None):
    """The parsed flags and the units; UserError for flags that make no sense together."""
    parser = CommandLine(description=__doc__)
    add_flags(parser, FLAGS)
    args = parser.parse_args(arguments)
    check_limits(vars(args), FLAGS)
    units = [Unit.named(text) for text in args.units]
    if args.explain and not args.final:
        raise UserError("--explain goes with --final, the split that is explained")
    if not (units or args.list or args.report):
        raise UserError("give --units to run, or --list, or --report")
    return args, units


def main(arguments=None):
    """Run the units, list them, or report."""
    args, units = parse_arguments(arguments)
    import_what_waits()
    folder = dataset_folder(args.prepared)
    # The tables need no prepared folder: they are made from the results alone.
    scenes = bool(units) and read_json(folder / "info.json")["name"] == "scenes"
    plan = Plan(folder, scenes, args.arms, args.epochs, args.iterations, args.device)
    if args.list:
        list_units(plan, args.seeds)
        return
    for unit in units:
        run_unit(unit, plan)
        if args.final:
            caption_final(unit, plan)
        if args.explain:
            explain_final(unit, plan)
    if args.report:
        write_report(plan, args.seeds)


if __name__ == "__main__":
    run(main)
