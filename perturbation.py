"""Perturbation tests: what becomes of answers and captions while tokens are removed, by relevance.

    python perturbation.py --checkpoint checkpoints/clipmapper-scenes-vqa --dataset scenes
    python perturbation.py --checkpoint checkpoints/clipmapper-flickr8k --dataset flickr8k-dev
    python perturbation.py --checkpoint checkpoints/flickr8k.pt --dataset flickr8k-dev
    torchrun --nproc_per_node=4 perturbation.py ...         # 4 processes share the items

Of a CLIPmapper that answers questions the right answers are counted; of captioners the probability
of a word is told, and CIDEr. The table says for each method the area under the curve while the most
relevant tokens go first (positive: lower is better), while the least relevant go first (negative:
higher is better), and the gap between them. OUTPUT/NAME.json holds the table, the differences of
each pair of methods and the mean curves, NAME-areas.json the areas of each item, and NAME.png shows
the gaps; NAME.jsonl lets an interrupted run go on. See docs/clipmapper.md.
"""

from pathlib import Path

import names
from commandline import (
    CommandLine,
    Flag,
    UserError,
    add_common_flags,
    add_flags,
    check_limits,
    provenance,
    require_writable,
    run,
    set_seed,
    write_json,
)
from lateimports import after_parsing, import_what_waits
from prepared import dataset_folder, read_info

with after_parsing(globals()):
    import distributed
    from basemodel import Captioner
    from captioner import load_captioner
    from clipmappermodel import ClipMapperCaptioner
    from experiments import perturbation
    from experiments.perturbed import Answers, ClipMapperSentences, LstmSentences
    from experiments.tables import intervals_joined, markdown_table
    from explanation import method_for, methods_of
    from plots import gaps_figure, save_figure

QUESTIONS = 1000
CAPTIONS = 500
FLAGS = [
    Flag(
        "checkpoint",
        "a CLIPmapper's folder, or a captioner's file",
        type=str,
        metavar="FILE",
        shown="required",
    ),
    Flag("dataset", "the prepared dataset, by its name under data/ or its folder", "scenes"),
    Flag("split", "of it", "test"),
    Flag(
        "items",
        "how many questions, or captions",
        type=int,
        limits=(1, 10**9),
        shown=f"{QUESTIONS} questions, {CAPTIONS} captions",
    ),
    Flag(
        "methods",
        f"of {', '.join(names.PERTURBED_METHODS)}, and those of the captioner",
        type=str,
        nargs="+",
        metavar="NAME",
        shown="these",
    ),
    Flag("output", "the folder", Path("results/perturbation"), metavar="FOLDER"),
]


def parse_arguments(arguments=None):
    """The parsed flags; UserError for those that do not go together."""
    parser = CommandLine(description=__doc__)
    add_flags(parser, FLAGS)
    add_common_flags(parser)
    args = parser.parse_args(arguments)
    if args.checkpoint is None:
        raise UserError("--checkpoint has to say what is tested")
    check_limits(vars(args), FLAGS)
    return args


def subject_of(captioner, folder, split, items, seed):
    """The subject of perturbed.py for a captioner; UserError for one that cannot be tested."""
    if isinstance(captioner, ClipMapperCaptioner):
        if captioner.task == "vqa":
            return Answers(captioner, folder, split, items or QUESTIONS, seed)
        return ClipMapperSentences(captioner, folder, split, items or CAPTIONS, seed)
    if isinstance(captioner, Captioner):
        if captioner.encoder.given:
            raise UserError("bottom-up features come without an encoder that could be run here")
        return LstmSentences(captioner, folder, split, items or CAPTIONS, seed)
    raise UserError(
        f"patches can be removed from a CLIPmapper and from a captioner of this project, and not "
        f"from one of type '{captioner.model_type}'"
    )


def default_methods(captioner):
    """The methods that are tested if none is named: those of names.py that are for a captioner.

    Of a transformer, "attnlrp" and "lrp" are two names of one method.
    """
    known = methods_of(captioner)
    chosen = {}
    for name in names.PERTURBED_METHODS:
        if name in known and captioner.methods[name] not in chosen.values():
            chosen[name] = captioner.methods[name]
    return list(chosen)


def main(arguments=None):
    """Test, print the table, and write it."""
    args = parse_arguments(arguments)
    import_what_waits()
    set_seed(args.seed)
    folder = dataset_folder(args.dataset)
    info = read_info(folder)
    if args.split not in info["splits"]:
        raise UserError(f"{folder} has no split '{args.split}', but {', '.join(info['splits'])}")
    device = distributed.own_device(args.device)
    captioner = load_captioner(args.checkpoint, device)
    methods = args.methods or default_methods(captioner)
    for name in methods:
        method_for(captioner, name)
    output = args.output / f"{Path(args.checkpoint).stem}-{args.split}.json"
    require_writable(output)
    subject = subject_of(captioner, folder, args.split, args.items, args.seed)
    header = {"methods": methods, "items": len(subject), "seed": args.seed, "split": args.split}
    made_by = provenance(args.seed, args.checkpoint)
    header |= {name: made_by[name] for name in ("checkpoint", "checkpoint_sha256")}
    header["dataset"] = folder.name
    with distributed.job(device):
        kept = output.with_suffix(".jsonl")
        records = perturbation.examine(subject, methods, kept, header, args.seed)
    if distributed.is_main():
        report(records, subject, {**made_by, **header}, output)


def report(records, subject, about, output):
    """Print the table of records, and write it, the curves, the areas and the figure.

    about: what the file says of where they come from; output: the .json file.
    """
    rows = perturbation.table(records, subject)
    print(markdown_table(intervals_joined(rows)))
    found = {**about, "images": subject.images, "table": rows, "shares": perturbation.SHARES}
    areas = perturbation.areas_of_all(records)
    found["pairs"] = perturbation.pairs(areas, subject.images)
    found["curves"] = perturbation.mean_curves(records)
    write_json(output, found)
    write_json(output.with_name(f"{output.stem}-areas.json"), areas, indent=None)
    figure = save_figure(gaps_figure(rows), output.with_suffix(".png"))
    print(f"written to {output}, the gaps drawn in {figure}")


def command():
    """The command `lrp-perturb` of an installation."""
    run(main)


if __name__ == "__main__":
    run(main)
