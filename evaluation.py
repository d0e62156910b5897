"""Measure a captioner on a split of a prepared dataset: caption metrics, and which objects its captions name.

    python evaluation.py                                    # the shipped captioner on the test split of the scenes
    python evaluation.py --checkpoint checkpoints/flickr8k-gridtd.pt --dataset flickr8k --split val

Prints a table and writes it, with the captions, as JSON.
"""

import argparse
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from torch.utils.data import DataLoader
from tqdm import tqdm

from captiondata import CaptionDataset, image_transform, tokenize
from captioner import load_captioner
from commandline import UserError, add_common_flags, choose_device, provenance, run, set_seed, write_json
from decoding import add_decoding_flags, decoding_options

EXPERIMENTS = ("captions",)


def caption_metrics(predictions, references):
    """BLEU-1..4 and CIDEr (pycocoevalcap) of captions against raw references, as a dict of floats.

    predictions: {key: list of words}, references: {key: list of raw sentences}; both are compared as lower-case `\\w+`
    tokens, so that no Java is needed.
    """
    if predictions.keys() != references.keys():
        raise ValueError("predictions and references are not of the same images")
    candidates = {key: [" ".join(words)] for key, words in predictions.items()}
    targets = {key: [" ".join(tokenize(sentence)) for sentence in references[key]] for key in predictions}
    bleu, _ = Bleu(4).compute_score(targets, candidates, verbose=0)
    cider, _ = Cider().compute_score(targets, candidates)
    return {**{f"BLEU-{n}": float(score) for n, score in enumerate(bleu, start=1)}, "CIDEr": float(cider)}


def object_phrases(categories):
    """{category: [its words]} -> {tuple of the tokens of each word or phrase: category}."""
    return {tuple(tokenize(phrase)): category for category, phrases in categories.items() for phrase in phrases}


def mentioned_objects(words, phrases):
    """The categories that a caption names, in its order; of overlapping phrases the longest counts ("hot dog", no dog)."""
    longest = max(map(len, phrases), default=0)
    named, position = [], 0
    while position < len(words):
        for length in range(longest, 0, -1):
            phrase = tuple(words[position : position + length])
            if len(phrase) == length and phrase in phrases:
                named.append(phrases[phrase])
                break
        else:
            length = 1
        position += length
    return named


def object_metrics(predictions, entries, info):
    """Which objects the captions name, against the annotated objects of each image; shares in 0..1, as a dict.

    names_main_object: captions that name the main object (where the dataset marks one);
    names_absent_object: captions that name at least one object that is not in the image (CHAIR-s of Rohrbach et al. 2018,
    with the annotations alone as truth); absent_object_words: object words that name none (CHAIR-i);
    planted_hallucination: of the images with A as main object and no B, captions that name B, over all planted pairs.
    """
    phrases = object_phrases(info["categories"])
    main, absent, counts, planted = [], [], [0, 0], []
    for index, words in predictions.items():
        objects = entries[index]["objects"]
        present = {thing["category"] for thing in objects}
        named = mentioned_objects(words, phrases)
        main += [thing["category"] in named for thing in objects if thing.get("main")][:1]
        missing = [category for category in named if category not in present]
        absent.append(bool(missing))
        counts[0] += len(missing)
        counts[1] += len(named)
        for a, b in info.get("planted_pairs", []):
            if b not in present and any(thing["category"] == a and thing.get("main") for thing in objects):
                planted.append(b in named)
    metrics = {"names_main_object": _mean(main), "names_absent_object": _mean(absent)}
    metrics |= {"absent_object_words": counts[0] / max(counts[1], 1), "planted_hallucination": _mean(planted)}
    return {name: value for name, value in metrics.items() if value is not None}


def _mean(flags):
    return sum(flags) / len(flags) if flags else None


def decode_split(captioner, dataset, batch_size=64, workers=2, **decoding):
    """Caption every image of a CaptionDataset (of images or of cached features) -> {index: list of words}."""
    captions = {}
    loader = DataLoader(dataset, batch_size, num_workers=workers)
    for inputs, _, indices in tqdm(loader, desc=f"captioning {dataset.split}", leave=False):
        if dataset.features:
            batch = captioner.decode(inputs.to(captioner.device), **decoding)
        else:
            batch = captioner.caption(inputs, **decoding)
        captions.update(zip(indices.tolist(), batch))
    return captions


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/scenes-gridtd.pt", help="the captioner (default: %(default)s)")
    parser.add_argument("--dataset", default="scenes", help="name of a folder under data/, or its path (default: %(default)s)")
    parser.add_argument("--split", default="test", help="train, val or test (default: %(default)s)")
    parser.add_argument("--experiment", choices=(*EXPERIMENTS, "all"), default="captions", help="what to measure (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first so many images (default: all)")
    parser.add_argument("--batch_size", type=int, default=64, help="images captioned at once (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images (default: %(default)s)")
    parser.add_argument("--output", help="JSON file of the results (default: results/CHECKPOINT-DATASET-SPLIT.json)")
    add_decoding_flags(parser)
    add_common_flags(parser)
    return parser


def dataset_folder(name):
    """data/NAME for a bare name, else the path itself."""
    return Path("data") / name if Path(name).name == name else Path(name)


def open_split(folder, split, encoder):
    """The split as the encoder wants it: images, or cached features where no image is looked at."""
    if encoder.given:
        return CaptionDataset(folder, split, features=encoder.name)
    return CaptionDataset(folder, split, image_transform(encoder.image_size))


def main():
    """Caption a split, measure, print and write."""
    args = build_parser().parse_args()
    if args.limit is not None and args.limit < 1:
        raise UserError("--limit must be at least 1")
    set_seed(args.seed)
    captioner = load_captioner(args.checkpoint, choose_device(args.device))
    folder = dataset_folder(args.dataset)
    dataset = open_split(folder, args.split, captioner.encoder)
    dataset.entries = dataset.entries[: args.limit]
    decoding = decoding_options(args)
    predictions = decode_split(captioner, dataset, args.batch_size, args.workers, **decoding)
    metrics = caption_metrics(predictions, dataset.references())
    if any(entry["objects"] for entry in dataset.entries):
        metrics |= object_metrics(predictions, dataset.entries, dataset.info)
    for name, value in metrics.items():
        print(f"{name:24s} {value:.4f}")
    output = args.output or Path("results") / f"{Path(args.checkpoint).stem}-{folder.name}-{args.split}.json"
    captions = [
        {"image_id": entry["image_id"], "caption": " ".join(predictions[index])} for index, entry in enumerate(dataset.entries)
    ]
    write_json(output, {**provenance(args.seed, args.checkpoint), "metrics": metrics, "captions": captions})
    print(f"{len(captions)} captions and these figures are in {output}")


if __name__ == "__main__":
    run(main)
