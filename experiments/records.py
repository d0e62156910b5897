"""The records of a split's images, kept in a file as they come, so that an interrupted run goes on.

The file holds one JSON object a line: first a header, what the records depend on, then a record of
each image as of `examine`. Where several processes share the job each has a file of its own, and at
the start and the end they are put into one.
"""

import json

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
from commandline import UserError, file_hash, find_checkpoint, write_atomically
from experiments.case import examine
from explanation import method_for

EXAMINED_AT_ONCE = 16  # images


def header_of(checkpoint, dataset, experiments, setting):
    """What the records of a captioner's split depend on; they are kept under it.

    checkpoint: the captioner's file; dataset: a CaptionDataset; experiments: names; setting: a
    Setting.
    """
    files = [dataset.folder / f"{name}.json" for name in (dataset.split, "info")]
    return {
        "checkpoint": file_hash(find_checkpoint(checkpoint)),
        "dataset": [file_hash(file) for file in files],
        "methods": list(setting.methods),
        "experiments": list(experiments),
        "object_words": list(setting.object_words),
        "decoding": setting.decoding,
        "seed": setting.seed,
    }


def examine_split(dataset, experiments, setting, path, header, workers=2):
    """Run experiments on the images of a CaptionDataset whose record is not kept already.

    experiments: {name: Experiment}; path: a .jsonl file; header: as of `header_of`; workers:
    processes that read images. Returns the records of all images, in every process. UserError for
    bottom-up features, for a method that is not for this captioner, or if `path` holds records of
    another header.
    """
    if setting.captioner.encoder.given:
        raise UserError(
            "the experiments need the images' pixels, and bottom-up features come without them"
        )
    for method in setting.methods:
        method_for(setting.captioner, method)

    def find(missing):
        for images, _, indices in batches_of(dataset, missing, workers):
            entries = [dataset.entries[index] for index in indices]
            yield examine(images, indices.tolist(), entries, experiments, setting)

    return resumed_records(len(dataset), path, header, find)


def resumed_records(count, path, header, find, title="explaining"):
    """The records of images 0 to count - 1, of which those that `path` keeps are not made again.

    path: a .jsonl file; header: what the records depend on; find: a function of the list of the
    missing images' indices, that yields lists of records of this process's share of them; title: of
    the progress bar. Returns the records of all images, in every process. UserError if `path` holds
    records of another header.
    """
    kept = collect_records(path, header) if distributed.is_main() else None
    records = distributed.from_main(kept)
    part = path
    if not distributed.is_main():
        part = part_path(path, distributed.rank())
        append_lines(part, [header])
    missing = [index for index in range(count) if index not in records]
    progress = tqdm(
        total=count,
        initial=count - len(missing),
        desc=title,
        unit="image",
        leave=False,
        disable=not distributed.is_main(),
    )
    with progress:
        for found in find(missing):
            append_lines(part, found)
            records |= {record["index"]: record for record in found}
            progress.update(len(found) * distributed.world_size())
    records = distributed.gathered(records)
    if distributed.is_main():
        collect_records(path, header)
    return [records[index] for index in range(count)]


def batches_of(dataset, indices, workers):
    """A loader of these images, in batches, of which it takes this process's."""
    batches = []
    if indices:
        batches = torch.tensor(indices).split(EXAMINED_AT_ONCE)
    own = [batch.tolist() for batch in distributed.shared(batches)]
    return DataLoader(dataset, batch_sampler=own, num_workers=workers)


def collect_records(path, header):
    """{index: record} of what earlier runs kept under this header, however many processes they had.

    Afterwards all of it is in the one file `path`, in complete lines. UserError if records of
    another header are kept there.
    """
    parts = parts_of(path)
    records = {}
    for file in [path, *parts]:
        records |= read_records(file, header)
    with write_atomically(path) as temporary:
        temporary.write_text(lines_of([header, *records.values()]))
    for part in parts:
        part.unlink()
    return records


def part_path(path, rank):
    """Where the process of this rank keeps its records until they are put into `path`."""
    return path.with_suffix(f".{rank}.jsonl")


def parts_of(path):
    """The files of `part_path` that there are."""
    parts = []
    for file in sorted(path.parent.glob("*.jsonl")):
        rank = file.stem.removeprefix(f"{path.stem}.")
        if rank.isdecimal() and file == part_path(path, rank):
            parts.append(file)
    return parts


def read_records(file, header):
    """{index: record} of one file, {} if it is missing; UserError if its header is another."""
    if not file.exists():
        return {}
    lines = file.read_text().split("\n")[:-1]  # a kill may have cut off what follows the last one
    if not lines:
        return {}
    if json.loads(lines[0]) != header:
        raise UserError(
            f"{file} keeps what was found with other settings, or by another captioner; "
            "delete it, or choose another output"
        )
    records = map(json.loads, lines[1:])
    return {record["index"]: record for record in records}


def append_lines(file, values):
    """Append each of these values to a file as a line of JSON."""
    with open(file, "a") as opened:
        opened.write(lines_of(values))


def lines_of(values):
    """Values as lines of JSON."""
    return "".join(f"{json.dumps(value)}\n" for value in values)
