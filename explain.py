"""Explain each word of an image's caption: which pixels and words spoke for it, and which against.

    python explain.py photo.jpg
    python explain.py photos "more/*.jpg"                           # folders, patterns in quotes
    python explain.py photo.jpg --checkpoint checkpoints/flickr8k.pt checkpoints/flickr8k-aoa.pt
    python explain.py photo.jpg --caption "a dog on the grass"      # not the captioner's own
    python explain.py photo.jpg --method lrp gradcam attention      # several methods side by side
    python explain.py photos --words dog ball                       # draws only these words
    python explain.py photo.jpg --target cat --position 2           # why not "a cat"?
    python explain.py photo.jpg --words dog --figure figure.pdf     # for a paper
    python explain.py scene.jpg --checkpoint checkpoints/clipmapper-scenes-vqa \
        --question "what colour is the dog?"                        # its answer
    torchrun --nproc_per_node=4 explain.py photos                   # 4 processes share the images

For each image and method it writes NAME-METHOD.png (a figure), NAME-METHOD.npz (the relevance maps,
not normalised) and NAME-METHOD.json; for several methods also NAME-methods.png. NAME.html is a page
to look at in a browser, of all words and methods. NAME is that of the image and, where they are
given, of the checkpoint, of the caption and of the words to draw.

An image that cannot be read does not stop the others. It is told at the end, with exit code 2.
"""

from __future__ import annotations

import glob
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from commandline import (
    CommandLine,
    Flag,
    UserError,
    add_common_flags,
    add_flags,
    check_limits,
    check_output_folder,
    extended,
    provenance,
    run,
    set_seed,
)
from decodingflags import add_decoding_flags, decoding_options
from lateimports import after_parsing, import_what_waits
from names import FIGURE_ENDINGS, IMAGE_ENDINGS, METHODS, PRETRAINED_METHODS, SCALES

with after_parsing(globals()):
    import torch
    from PIL import Image
    from tqdm import tqdm

    import distributed
    from basemodel import Captioner
    from captiondata import load_regions
    from captioner import load_captioner
    from clipmappermodel import ClipMapperCaptioner
    from explanation import method_for
    from explanationfiles import mark_of, marked, output_names, write_arrays, write_numbers
    from images import image_files, image_transform, load_image
    from page import Entry, entry_data, write_page
    from plots import (
        PRINTED_DOTS_PER_INCH,
        comparison_figure,
        explanation_figure,
        fit_width,
        paint_boxes,
        save_figure,
    )
    from pretrainedmodel import PretrainedCaptioner
    from vocabulary import tokenize

EXPLAINED_AT_ONCE = 8  # images
FILE_ENDINGS = (*IMAGE_ENDINGS, ".pdf", ".svg", ".npz", ".json", ".html")
DEFAULT_CHECKPOINT = "checkpoints/flickr8k.pt"
FLAGS = [
    Flag(
        "checkpoint",
        "the captioner, or several",
        default=[DEFAULT_CHECKPOINT],
        type=str,
        nargs="+",
        metavar="FILE",
        shown=DEFAULT_CHECKPOINT,
    ),
    Flag(
        "method",
        f"how to explain, one or more of {', '.join(METHODS)}",
        default=["lrp"],
        type=str,
        choices=tuple(dict.fromkeys(METHODS + PRETRAINED_METHODS)),
        nargs="+",
        metavar="NAME",
        shown="lrp",
        alias="methods",
    ),
    Flag(
        "regions",
        "bottom-up features of each image, for a captioner that wants them",
        nargs="+",
        metavar="HDF5",
        shown="none",
    ),
    Flag(
        "through_attention",
        "for the method lrp: go through the attention scores of a multi-head captioner too, as "
        "the method attnlrp does",
        default=False,
        switch=True,
    ),
    Flag("caption", "explain this caption", shown="the captioner's own"),
    Flag(
        "target",
        "explain this word instead of the caption's word at --position",
        metavar="WORD",
        shown="none",
    ),
    Flag(
        "position",
        "which word of the caption --target stands in for, counted from 1",
        type=int,
        limits=(1, math.inf),
        metavar="T",
        shown="none",
    ),
    Flag(
        "question",
        "explain the answer to this question, of a CLIPmapper that has learnt to answer",
        shown="none",
    ),
    Flag("words", "draw only these words of the captions", nargs="+", metavar="WORD", shown="all"),
    Flag(
        "scale",
        "what shares one scale of colours in a figure: the words of a caption, or each word alone",
        default="caption",
        choices=SCALES,
    ),
    Flag(
        "figure",
        "of one image: also write its words and methods side by side into this file, "
        + ", ".join(FIGURE_ENDINGS),
        metavar="FILE",
        shown="none",
    ),
    Flag(
        "figure_width",
        "the width of that figure in millimetres, such as 85 for one column",
        type=float,
        limits=(1, 1000),
        metavar="MM",
        shown="as its words need, 41 and 35 for each",
    ),
    Flag(
        "html",
        "also write one page of all images into this file, .html",
        metavar="FILE",
        shown="a page for each image",
    ),
    Flag("output", "folder for what is written", default="explanations"),
]


@dataclass(frozen=True)
class Wanted:
    """What is to be explained, and how.

    methods   {name in the results: method of METHODS}
    caption   the words of the caption, or None for the captioner's own
    target    (word, position): the word to explain instead of the caption's own, or None
    question  what is asked, if an answer is explained and no caption, else None
    words     the words to draw, or None for all
    scale     what shares one scale of colours, one of names.SCALES
    figure    the file of a figure of words and methods, or None
    width     of that figure, in millimetres, or None
    html      the file of a page of all images, or None
    decoding  options of the captioner's own caption
    """

    methods: dict
    caption: list | None
    target: tuple | None
    question: str | None
    words: list | None
    scale: str
    figure: Path | None
    width: float | None
    html: Path | None
    decoding: dict


@dataclass(frozen=True)
class Speaker:
    """A captioner to explain, one of this project's or a published one of transformers.

    mark   what the names of its files say of it; empty for the default one
    about  what its files hold of it and of this run: {name: value}
    """

    captioner: Captioner | PretrainedCaptioner
    mark: str
    about: dict


class Photograph(NamedTuple):
    """An image to explain; features (L, D) and boxes (n, 4) are None but for bottom-up features."""

    path: Path
    image: Image.Image
    features: torch.Tensor | None
    boxes: torch.Tensor | None


def build_parser():
    """The command line."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "images", nargs="+", help="image files, folders of them, or patterns such as 'photos/*.jpg'"
    )
    add_flags(parser, FLAGS)
    add_decoding_flags(parser)
    add_common_flags(parser)
    return parser


def images_first(arguments):
    """A command line in which the images that follow `--checkpoint FILE.pt` come first.

    Only the first word after --checkpoint, and .pt files, are checkpoints, so that the images may
    still stand behind a single one.
    """
    images = []
    others = []
    flag = None
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument
        elif flag == "--checkpoint" and others[-1] != flag and not argument.endswith(".pt"):
            images.append(argument)
            continue
        others.append(argument)
    return images + others


def check_arguments(args, decoding):
    """Raise a UserError for flags that do not go together, or a bad name of the output folder."""
    if args.caption is not None and decoding != {"method": "beam"}:
        raise UserError(
            "the flags of decoding are for the captioner's own caption, and --caption gives another"
        )
    if args.figure_width is not None and args.figure is None:
        raise UserError("--figure_width goes with --figure")
    if (args.target is None) != (args.position is None):
        raise UserError("--target and --position go together: which word, and in place of which")
    if args.target is not None and args.words is not None:
        raise UserError("--target draws one word, and --words asks for others")
    if args.through_attention and "lrp" not in args.method:
        raise UserError("--through_attention goes with --method lrp")
    if args.question is not None:
        others = {"--caption": args.caption, "--target": args.target, "--words": args.words}
        for name, value in others.items():
            if value is not None:
                raise UserError(f"--question and {name} do not go together")
    output = Path(args.output)
    names_file = output.suffix.lower() in FILE_ENDINGS and not output.is_dir()
    if not args.output or names_file or output.is_file():
        raise UserError(
            f"--output '{args.output}' is not the name of a folder; several files are written "
            "into a folder"
        )
    check_output_folder(output)
    check_limits(vars(args), FLAGS)


def check_figure(figure, paths, captioners):
    """Raise a UserError for a file that --figure must not name, or for more than one thing to draw.

    paths: of the images; captioners: how many there are.
    """
    if figure.suffix.lower() not in FIGURE_ENDINGS or figure.is_dir():
        endings = ", ".join(FIGURE_ENDINGS)
        raise UserError(f"--figure '{figure}' is not the name of a file that ends in {endings}")
    if len(paths) * captioners > 1:
        raise UserError("--figure is for one image and one captioner, and here are more")
    if figure.resolve() in [path.resolve() for path in paths]:
        raise UserError(f"--figure '{figure}' would overwrite the image")
    check_output_folder(figure.parent)


def check_page(path):
    """Raise a UserError for a file that --html must not name."""
    if path.suffix.lower() != ".html" or path.is_dir():
        raise UserError(f"--html '{path}' is not the name of a file that ends in .html")
    check_output_folder(path.parent)


def what_is_wanted(args, decoding):
    """The Wanted of parsed flags; UserError for words that are none, or not in --caption."""
    methods = {name: name for name in args.method}
    if args.through_attention:
        methods["lrp"] = "attnlrp"
    caption = None if args.caption is None else tokenize(args.caption)
    figure = None if args.figure is None else Path(args.figure)
    page = None if args.html is None else Path(args.html)
    target = None if args.target is None else target_of(args.target, args.position)
    if caption and target is not None and target[1] > len(caption):
        raise UserError(
            f"--caption ends with word {len(caption)}, so it has no word --position {target[1]}"
        )
    return Wanted(
        methods=methods,
        caption=caption,
        target=target,
        question=args.question,
        words=None if args.words is None else words_to_draw(args.words, caption),
        scale=args.scale,
        figure=figure,
        width=args.figure_width,
        html=page,
        decoding=decoding,
    )


def words_to_draw(texts, caption):
    """The words of --words; UserError if there is none, or one that a given caption lacks."""
    words = tokenize(" ".join(texts))
    if not words:
        raise UserError("--words gives no word to draw")
    if caption is not None:
        for word in words:
            if word not in caption:
                raise UserError(f"--caption has no word '{word}' to draw")
    return words


def target_of(text, position):
    """(word, position) of --target and --position; UserError for a text that is not one word."""
    words = tokenize(text)
    if len(words) != 1:
        raise UserError(f"--target '{text}' is not one word")
    return words[0], position


def main():
    """Caption the images if need be, explain the captions, and write the explanations."""
    args = build_parser().parse_args(images_first(sys.argv[1:]))
    decoding = decoding_options(args)
    check_arguments(args, decoding)
    import_what_waits()
    wanted = what_is_wanted(args, decoding)
    paths, failures = find_images(args.images)
    if wanted.figure is not None:
        check_figure(wanted.figure, paths, len(args.checkpoint))
    if wanted.html is not None:
        check_page(wanted.html)
    total = len(paths) + len(failures)
    set_seed(args.seed)
    device = distributed.own_device(args.device)
    speakers = load_speakers(args.checkpoint, args.seed, device)
    check_wanted(speakers, wanted)
    for speaker in speakers:
        check_regions(speaker.captioner, paths, args.regions)
    with distributed.job(device):
        failed, drawn, entries = explain_images(
            speakers, paths, args.regions, wanted, Path(args.output)
        )
        failures |= distributed.gathered(failed)
        drawn = distributed.gathered(drawn)
        entries = distributed.gathered(entries)
    if distributed.is_main():
        if entries:
            in_order = [entries[path] for path in paths if path in entries]
            print(f"all images in {write_page(wanted.html, in_order)}")
        undrawn = [word for word in wanted.words or [] if word not in drawn]
        report(failures, undrawn, total)


def find_images(arguments):
    """The image files that the command line names.

    An argument is a file, a folder, or a pattern that the shell has left to us. Returns the paths,
    each once, and {name of a folder: why it has none}.
    """
    paths = {}  # by their absolute form
    failures = {}
    for argument in arguments:
        for name in matches(argument):
            try:
                files = image_files(name) if os.path.isdir(name) else [Path(name)]
            except (UserError, OSError) as error:
                failures[name] = str(error)
                continue
            for file in files:
                paths.setdefault(os.path.abspath(file), file)
    return list(paths.values()), failures


def matches(pattern):
    """The names that fit a pattern; it stands for itself where none does, as in a shell."""
    if os.path.exists(pattern):
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True)) or [pattern]


def load_speakers(checkpoints, seed, device):
    """The Speakers of checkpoint files, each once."""
    paths = list(dict.fromkeys(Path(checkpoint) for checkpoint in checkpoints))
    default = Path(DEFAULT_CHECKPOINT).resolve()
    marks = output_names([path for path in paths if path.resolve() != default])
    speakers = []
    for path in paths:
        captioner = load_captioner(path, device)
        about = provenance(seed, path)
        about["model_type"] = captioner.model_type
        about["encoder"] = captioner.encoder.name
        speakers.append(Speaker(captioner, marks.get(path, ""), about))
    return speakers


def check_wanted(speakers, wanted):
    """Raise a UserError if a method is not for one of the captioners, if one of them does not know
    the caption's words, or none knows a word to draw.
    """
    for speaker in speakers:
        for method in wanted.methods.values():
            method_for(speaker.captioner, method)
        if wanted.question is not None:
            check_question(speaker.captioner, wanted.question)
        if wanted.caption is not None:
            speaker.captioner.check_words(wanted.caption)
        if wanted.target is not None:
            speaker.captioner.check_words([wanted.target[0]])
    for word in wanted.words or []:
        check_known(speakers, word)


def check_question(captioner, question):
    """Raise a UserError unless a captioner can answer this question."""
    if not isinstance(captioner, ClipMapperCaptioner):
        raise UserError("--question is for a CLIPmapper that has learnt to answer questions")
    captioner.require("vqa")
    captioner.question_ids([question])


def check_known(speakers, word):
    """Raise the UserError of the first captioner if none of them knows a word to draw."""
    complaints = []
    for speaker in speakers:
        try:
            speaker.captioner.check_words([word])
            return
        except UserError as error:
            complaints.append(error)
    raise complaints[0]


def check_regions(captioner, images, regions):
    """Raise a UserError unless there is a file of regions for each image, or for none if the
    captioner looks at pixels.
    """
    wanted = len(images) if captioner.encoder.given else 0
    if len(regions or []) != wanted:
        raise UserError(
            "a captioner of bottom-up features needs --regions with one HDF5 file for each image, "
            "and no other captioner takes them"
        )


def explain_images(speakers, paths, regions, wanted, output):
    """Explain this process's part of the images, and write the explanations into a folder.

    regions: files of bottom-up features, or None. Returns {path: why it was not explained}, {word:
    True} of the words that were drawn, and for a page of all images {path: its `page.entry_data`}.
    """
    names = output_names(paths)
    failures = {}
    drawn = {}
    entries = {}
    with progress_bar(len(paths)) as bar:
        for start in distributed.shared(range(0, len(paths), EXPLAINED_AT_ONCE)):
            batch = slice(start, start + EXPLAINED_AT_ONCE)
            own = regions[batch] if regions else None
            photographs, failed = read_photographs(paths[batch], own)
            failures |= failed
            stems = {path: output / names[path] for path in paths[batch]}
            words, shown = explain_few(speakers, photographs, stems, wanted)
            drawn |= dict.fromkeys(words, True)
            entries |= shown
            bar.update(len(paths[batch]) * distributed.world_size())
    return failures, drawn, entries


def explain_few(speakers, photographs, stems, wanted):
    """Explain a few Photographs by all Speakers, and write their files and pages.

    stems: {path: what the names of its files begin with}. Returns the words that were drawn, and
    for a page of all images {path: its `page.entry_data`}.
    """
    asked = [mark_of(wanted.caption), mark_of(wanted.words, "only")]
    if wanted.question is not None:
        asked.append(mark_of(tokenize(wanted.question)))
    if wanted.target is not None:
        asked.append("{}_at_{}".format(*wanted.target))
    drawn = []
    layers = {}  # {path: {what it is called on the page: Explanation}}
    for speaker in speakers:
        for photograph, found in explain(speaker.captioner, photographs, wanted):
            stem = marked(stems[photograph.path], [speaker.mark, *asked])
            words = write_explanations(stem, photograph, found, wanted, speaker.about)
            drawn += words
            for name, explanation in found.items() if words else ():
                if len(speakers) > 1:
                    name = f"{name}, {Path(speaker.about['checkpoint']).stem}"
                layers.setdefault(photograph.path, {})[name] = explanation
    marks = [speaker.mark for speaker in speakers]
    entries = {}
    for photograph in photographs:
        path = photograph.path
        if path not in layers:
            continue
        entry = entry_data(Entry(path.name, photograph.image, layers[path], page_boxes(photograph)))
        file = extended(marked(stems[path], [*marks, *asked]), ".html")
        tqdm.write(f"{path}: page for a browser in {write_page(file, [entry], path.name)}")
        if wanted.html is not None:
            entries[path] = entry
    return drawn, entries


def page_boxes(photograph):
    """The boxes of a Photograph of regions as a page shows them."""
    boxes = []
    for number, corners in enumerate([] if photograph.boxes is None else photograph.boxes.tolist()):
        boxes.append((str(number + 1), *corners))
    return boxes


def progress_bar(images):
    """A bar on stderr for more than a few images; the main process stands for all of them."""
    if images <= EXPLAINED_AT_ONCE or not distributed.is_main():
        return tqdm(disable=True)
    # None hides it unless stderr is a terminal.
    return tqdm(total=images, desc="explaining", unit="image", leave=False, disable=None)


def read_photographs(paths, regions):
    """The Photographs of a few files, and {path: what is wrong} of those that cannot be read.

    regions: files of their bottom-up features, or None.
    """
    photographs = []
    failures = {}
    for path, file in zip(paths, regions or [None] * len(paths)):
        try:
            features, boxes = load_regions(file) if file else (None, None)
            photographs.append(Photograph(path, load_image(path), features, boxes))
        except UserError as error:
            failures[str(path)] = str(error)
    return photographs, failures


def explain(captioner, photographs, wanted):
    """Explain the captions of a few Photographs.

    Yields (photograph, {name of a method in the results: Explanation}) of each that the captioner
    says something of.
    """
    if not photographs:
        return
    inputs = network_inputs(captioner.encoder, photographs)
    if wanted.question is not None:
        yield from explain_answers(captioner, photographs, inputs, wanted)
        return
    if wanted.caption is None:
        captions = captioner.caption(inputs, **wanted.decoding)
    else:
        captions = [wanted.caption] * len(photographs)
    spoken = []
    for index, caption in enumerate(captions):
        reason = why_unexplained(caption, wanted.target)
        if reason is None:
            spoken.append(index)
        else:
            tqdm.write(f"{photographs[index].path}: {reason}")
    if not spoken:
        return
    explained = [with_target(captions[index], wanted.target) for index in spoken]
    found = {}
    for name, method in wanted.methods.items():
        found[name] = captioner.explain(inputs[spoken], explained, method)
    for row, index in enumerate(spoken):
        explanations = {name: rows[row] for name, rows in found.items()}
        if wanted.target is not None:
            name_replaced(explanations, captions[index], wanted.target)
        if captioner.encoder.given:
            paint_regions(explanations, photographs[index])
        yield photographs[index], explanations


def explain_answers(captioner, photographs, inputs, wanted):
    """As `explain`, of the answers to a question; inputs: as of `network_inputs`."""
    questions = [wanted.question] * len(photographs)
    found = {}
    for name, method in wanted.methods.items():
        found[name] = captioner.explain_answers(inputs, questions, method=method)
    for row, photograph in enumerate(photographs):
        yield photograph, {name: rows[row] for name, rows in found.items()}


def why_unexplained(caption, target):
    """Why a caption cannot be explained, or None. target: see `Wanted`."""
    if not caption:
        return "the captioner says nothing of it, so there is nothing to explain"
    if target is not None and target[1] > len(caption):
        return f"the caption ends with word {len(caption)}, so it has no word {target[1]}"
    return None


def with_target(caption, target):
    """The caption up to its word at the position of a target, which is replaced; see `Wanted`.

    What follows does not matter, because a word is explained by the words before it.
    """
    if target is None:
        return caption
    word, position = target
    return [*caption[: position - 1], word]


def name_replaced(explanations, caption, target):
    """Tell the explanations of a target which word of the caption it stands in for."""
    _, position = target
    for explanation in explanations.values():
        explanation.instead_of = caption[position - 1]


def network_inputs(encoder, photographs):
    """What the encoder takes of Photographs: images (B, 3, S, S), or given features (B, L, D)."""
    if encoder.given:
        return torch.stack([photograph.features for photograph in photographs])
    transform = image_transform(encoder.image_size)
    return torch.stack([transform(photograph.image) for photograph in photographs])


def paint_regions(explanations, photograph):
    """Give the explanations of a photograph's regions maps of its pixels."""
    width, height = photograph.image.size
    for explanation in explanations.values():
        relevance = explanation.region_relevance
        explanation.image_relevance = paint_boxes(relevance, photograph.boxes, (height, width))


def write_explanations(stem, photograph, explanations, wanted, about):
    """Write the files of a photograph's explanations {name: Explanation}, and say so.

    wanted: the Wanted; nothing is written where the caption has none of the words to draw. about:
    what the files hold besides. Returns the words that were drawn.
    """
    first = next(iter(explanations.values()))
    caption = first.words
    tqdm.write(f"{photograph.path}: {first.title()}")
    positions = []
    for position in first.positions_of(None):
        if wanted.words is None or caption[position] in wanted.words:
            positions.append(position)
    if wanted.target is not None:
        positions = positions[-1:]
    if not positions:
        tqdm.write(f"  not drawn, for it has no word {' or '.join(wanted.words)}")
        return []
    about = {**about, "image": str(photograph.path), "caption": " ".join(caption)}
    if first.instead_of is not None:
        about["instead_of"] = first.instead_of
    for name, explanation in explanations.items():
        own = extended(stem, f"-{name}")
        about["method"] = name
        write_arrays(extended(own, ".npz"), explanation, about)
        write_numbers(extended(own, ".json"), explanation, about)
        figure = explanation_figure(photograph.image, explanation, positions, wanted.scale)
        tqdm.write(f"  explained in {save_figure(figure, extended(own, '.png'))}")
    if len(explanations) > 1:
        figure = comparison_figure(photograph.image, explanations, positions, wanted.scale)
        tqdm.write(f"  side by side in {save_figure(figure, extended(stem, '-methods.png'))}")
    if wanted.figure is not None:
        figure = comparison_figure(photograph.image, explanations, positions, wanted.scale)
        if wanted.width is not None:
            fit_width(figure, wanted.width / 25.4)
        path = save_figure(figure, wanted.figure, PRINTED_DOTS_PER_INCH)
        tqdm.write(f"  side by side in {path}")
    return [caption[position] for position in positions]


def report(failures, undrawn, total):
    """Raise a UserError if some images were not explained, or some words drawn of none.

    failures: {image: why it was not}; undrawn: words that no caption has; total: how many images
    there were. If there is more than one thing to say, each is a line of its own before the error.
    """
    complaints = list(failures.values())
    explained = total - len(failures)
    if undrawn and explained:
        complaints.append(f"no caption has the word {' or '.join(undrawn)}")
    if failures and total > 1:
        complaints.append(f"{explained} of {total} images were explained, the others are above")
    if not complaints:
        return
    *lines, last = complaints
    for line in lines:
        print(line, file=sys.stderr)
    raise UserError(last)


def command():
    """The command `lrp-explain` of an installation."""
    run(main)


if __name__ == "__main__":
    command()
