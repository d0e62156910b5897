"""Do the bars below the words tell a planted hallucination from the objects that were seen?

    python tests/planted_bars.py

A planted hallucination is a word for the companion of a scene's main object, where the companion is
not in the scene (scenes.py). The bars say how much of a word's score comes from the image and how
much from the words before. Their answer is the object word with the smallest share from the image;
it is right if that is the hallucinated word. Only captions that also name an object that is there
count, for otherwise there is nothing to tell apart.

The six captions that are told one by one are the first of each planted pair in the test split, in
the order of its images. They are not chosen by what the bars say. Another count is that of the
first six captions, whichever their pairs. The script needs the scenes (`python preparedataset.py`)
and takes some minutes.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captiondata import open_split  # noqa: E402 (the path comes first)
from captioner import load_captioner  # noqa: E402
from pycocoevalcap.chair.chair import find_objects, object_phrases  # noqa: E402

CHECKPOINT = "checkpoints/scenes-gridtd.pt"
AT_ONCE = 16  # images


def image_parts(explanation):
    """Which part of each word's score, less what biases have, is the image's: (T,)."""
    image, words = explanation.score_shares().unbind(dim=1)
    return image / (image + words)


def named_objects(caption, entry, pairs, phrases):
    """({position: category} of the words that name objects, position of the planted one or None).

    entry: the image's, of a CaptionDataset; pairs: {main object: companion}.
    """
    present = {thing["category"] for thing in entry["objects"]}
    mains = [thing["category"] for thing in entry["objects"] if thing.get("main")]
    companions = {pairs[category] for category in mains if category in pairs} - present
    named = {}
    planted = None
    for category, _, end in find_objects(caption, phrases):
        named[end - 1] = category
        if category in companions:
            planted = end - 1
    if not present & set(named.values()):
        planted = None  # nothing that is there is named, so there is nothing to tell apart
    return named, planted


def tell(entry, explanation, named, planted, parts, answer):
    """Print a caption, and what the bars say of its object words."""
    told = [f"{explanation.words[place]} {parts[place]:.2f}" for place in named]
    verdict = "right" if answer == planted else "wrong"
    print(f"{entry['file']}: {' '.join(explanation.words)}")
    print(f"    planted: {named[planted]}; image's part: {', '.join(told)}; {verdict}")


def main():
    """Print the first caption of each planted pair, and the count over all."""
    captioner = load_captioner(CHECKPOINT)
    dataset = open_split(Path("data/scenes"), "test", captioner.encoder)
    phrases = object_phrases(dataset.info["categories"])
    pairs = dict(dataset.info["planted_pairs"])
    told = set()
    right = []
    for start in range(0, len(dataset), AT_ONCE):
        entries = dataset.entries[start : start + AT_ONCE]
        images = torch.stack([dataset[start + row][0] for row in range(len(entries))])
        for entry, explanation in zip(entries, captioner.explain(images)):
            named, planted = named_objects(explanation.words, entry, pairs, phrases)
            if planted is None:
                continue
            parts = image_parts(explanation)
            answer = min(named, key=lambda place: float(parts[place]))
            right.append(answer == planted)
            if named[planted] not in told:
                told.add(named[planted])
                tell(entry, explanation, named, planted, parts, answer)
    print(f"the first six: {sum(right[:6])} right")
    print(f"all: {sum(right)} of {len(right)} right")


if __name__ == "__main__":
    main()
