"""Explain each word of an image's caption: which pixels and words spoke for it, and which against.

    python explain.py photo.jpg
    python explain.py a.jpg b.jpg --checkpoint checkpoints/flickr8k-gridtd.pt --output explanations
    python explain.py photo.jpg --caption "a dog on the grass"      # not the captioner's own
    python explain.py photo.jpg --method lrp gradcam attention      # several methods side by side
    torchrun --nproc_per_node=4 explain.py *.jpg                    # 4 processes share the images

For each image and method it writes NAME-METHOD.png (a figure), NAME-METHOD.npz (the relevance maps,
not normalised) and NAME-METHOD.json; for several methods also NAME-methods.png.
"""

from pathlib import Path

import numpy as np
import torch

import distributed
from captiondata import load_regions
from captioner import METHODS, load_captioner
from commandline import (
    CommandLine,
    Flag,
    UserError,
    add_common_flags,
    add_flags,
    extended,
    provenance,
    run,
    set_seed,
    write_atomically,
    write_json,
)
from decoding import add_decoding_flags, decoding_options
from explanation import method_for
from images import image_transform, load_image
from plots import comparison_figure, explanation_figure, paint_boxes, save_figure
from vocabulary import tokenize

EXPLAINED_AT_ONCE = 8  # images
FLAGS = [
    Flag("checkpoint", "the captioner", default="checkpoints/flickr8k.pt"),
    Flag(
        "method",
        "how to explain",
        default=["lrp"],
        type=str,
        choices=tuple(METHODS),
        nargs="+",
        shown="lrp",
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
    Flag("output", "folder for what is written", default="explanations"),
]


def build_parser():
    """The command line."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("images", nargs="+", help="image files")
    add_flags(parser, FLAGS)
    add_decoding_flags(parser)
    add_common_flags(parser)
    return parser


def check_arguments(args, decoding):
    """Raise a UserError for flags that do not go together."""
    if args.caption is not None and decoding != {"method": "beam"}:
        raise UserError(
            "the flags of decoding are for the captioner's own caption, and --caption gives another"
        )
    if args.through_attention and "lrp" not in args.method:
        raise UserError("--through_attention goes with --method lrp")


def chosen_methods(args):
    """{name in the results: the method of METHODS}, as --method and --through_attention choose."""
    methods = {name: name for name in args.method}
    if args.through_attention:
        methods["lrp"] = "attnlrp"
    return methods


def main():
    """Caption the images if need be, explain the captions, and write the explanations."""
    args = build_parser().parse_args()
    decoding = decoding_options(args)
    check_arguments(args, decoding)
    methods = chosen_methods(args)
    words = None if args.caption is None else tokenize(args.caption)
    set_seed(args.seed)
    captioner = load_captioner(args.checkpoint, distributed.own_device(args.device))
    for method in methods.values():
        method_for(captioner, method)  # refuses one that is not for this captioner
    check_regions(captioner, args.images, args.regions)
    check_images(args.images)
    about = provenance(args.seed, args.checkpoint)
    starts = range(0, len(args.images), EXPLAINED_AT_ONCE)
    for start in distributed.shared(starts):
        batch = slice(start, start + EXPLAINED_AT_ONCE)
        paths = args.images[batch]
        regions = args.regions[batch] if args.regions else None
        explained = explain(captioner, paths, regions, methods, words, decoding)
        for path, image, explanations in explained:
            stem = Path(args.output) / Path(path).stem
            write_explanations(stem, image, explanations, {**about, "image": str(path)})


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


def check_images(paths):
    """Raise a UserError if an image is damaged, or if two of them have one name.

    It is called before anything is written, so that all images are explained or none.
    """
    for path in paths:
        load_image(path)
    names = set()
    for path in paths:
        name = Path(path).stem
        if name in names:
            raise UserError(
                f"two of the images are called {name}, and their explanations would be too; "
                "explain them into two --output folders"
            )
        names.add(name)


def explain(captioner, paths, regions, methods, words, decoding):
    """Explain the captions of a few images.

    regions: files of bottom-up features, or None; methods: {name in the results: method}; words:
    the caption of them all, or None for the captioner's own, decoded with the options `decoding`.
    Yields (path, image, {name: Explanation}) of each image that the captioner says something of.
    """
    images = [load_image(path) for path in paths]
    inputs, boxes = read_inputs(captioner.encoder, images, regions)
    if words is None:
        captions = captioner.caption(inputs, **decoding)
        spoken = [index for index, caption in enumerate(captions) if caption]
    else:
        captions = [words] * len(images)
        spoken = list(range(len(images)))
    for index in sorted(set(range(len(paths))) - set(spoken)):
        print(f"{paths[index]}: the captioner says nothing of it, so there is nothing to explain")
    if not spoken:
        return
    captions = [captions[index] for index in spoken]
    found = {}
    for name, method in methods.items():
        found[name] = captioner.explain(inputs[spoken], captions, method)
    for row, index in enumerate(spoken):
        explanations = {name: rows[row] for name, rows in found.items()}
        if regions:
            paint_regions(explanations, boxes[index], images[index])
        yield paths[index], images[index], explanations


def read_inputs(encoder, images, regions):
    """What the encoder takes, and each image's boxes, or None for a captioner of pixels.

    The inputs are (B, 3, S, S) of the images, or (B, L, D) of the files `regions`.
    """
    if not regions:
        transform = image_transform(encoder.image_size)
        return torch.stack([transform(image) for image in images]), None
    features, boxes = zip(*[load_regions(path) for path in regions])
    return torch.stack(features), boxes


def paint_regions(explanations, boxes, image):
    """Give the explanations of an image's regions maps of its pixels."""
    width, height = image.size
    for explanation in explanations.values():
        relevance = explanation.region_relevance
        explanation.image_relevance = paint_boxes(relevance, boxes, (height, width))


def write_explanations(stem, image, explanations, about):
    """Write the files of an image's explanations {name: Explanation}, and say so."""
    words = next(iter(explanations.values())).words
    print(f"{about['image']}: {' '.join(words)}")
    for name, explanation in explanations.items():
        own = extended(stem, f"-{name}")
        write_arrays(extended(own, ".npz"), explanation)
        write_numbers(extended(own, ".json"), explanation, {**about, "method": name})
        figure = save_figure(explanation_figure(image, explanation), extended(own, ".png"))
        print(f"  explained in {figure}")
    if len(explanations) > 1:
        comparison = comparison_figure(image, explanations)
        print(f"  side by side in {save_figure(comparison, extended(stem, '-methods.png'))}")


def write_arrays(path, explanation):
    """Write all tensors of an explanation, and its words, as a NumPy archive."""
    arrays = {}
    for name, value in {**vars(explanation), **explanation.extra}.items():
        if isinstance(value, torch.Tensor):
            arrays[name] = value.numpy()
    with write_atomically(path) as temporary:
        np.savez_compressed(temporary, words=np.array(explanation.words), **arrays)


def write_numbers(path, explanation, about):
    """Write what is small of an explanation as JSON, after the dict `about`."""
    numbers = {**about, "words": explanation.words}
    numbers["scores"] = explanation.scores.tolist()
    numbers["probabilities"] = explanation.probabilities.tolist()
    numbers["word_relevance"] = explanation.word_relevance.tolist()
    if explanation.beta is not None:
        numbers["beta"] = explanation.beta.tolist()
    sums = explanation.image_relevance.numpy().sum(axis=(1, 2))
    numbers["image_relevance_sum"] = sums.tolist()
    write_json(path, numbers)


if __name__ == "__main__":
    run(main)
