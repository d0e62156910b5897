"""A split's captions with what the metrics compare them with: a `Captions` of captionmetrics.py.

This is what evaluation.py does by default. It is no `Experiment`, for it explains nothing.
"""

import distributed
from captionmetrics import FREQUENT_OBJECT_WORDS, Captions, frequent_words
from commandline import read_json
from decoding import captioned
from experiments.probabilities import word_scores


def training_captions(dataset):
    """{index: raw captions} of the training split of a CaptionDataset's folder."""
    entries = read_json(dataset.folder / "train.json")
    return {index: entry["captions"] for index, entry in enumerate(entries)}


def choose_object_words(choice, name, corpus, categories):
    """The frequent object words: the paper's for COCO or Flickr, or those of training captions.

    choice: a key of FREQUENT_OBJECT_WORDS, "train", or None for the list of the dataset called
    `name`, which is "train" where the paper has none; corpus: {key: raw training captions};
    categories: {category: words and phrases that name it}.
    """
    if choice is None:
        known = [dataset for dataset in FREQUENT_OBJECT_WORDS if name.startswith(dataset)]
        choice = known[0] if known else "train"
    if choice == "train":
        return frequent_words(corpus, categories)
    return FREQUENT_OBJECT_WORDS[choice].split()


def caption_split(captioner, dataset, decoding, object_words=(), batch_size=64, workers=2):
    """Caption the images of a CaptionDataset.

    decoding: arguments of the captioner's `decode`; object_words: whose largest probabilities are
    wanted. Returns {index: all captions that the decoder found, the best first, as lists of words}
    and {index: (len(object_words),) as of `word_scores`, for the best caption}, or None without
    object words. Both are of the images of all processes.
    """
    found = {}
    scores = {}
    batches = captioned(captioner, dataset, batch_size, workers, every=True, **decoding)
    for indices, features, captions in batches:
        found.update(zip(indices, captions))
        if object_words:
            best = [image[0] for image in captions]
            scores.update(zip(indices, word_scores(captioner, features, best, object_words)))
    found = distributed.gathered(found)
    scores = distributed.gathered(scores)
    return found, scores if object_words else None


def captions_of(dataset, predictions, corpus, object_words, **options):
    """The Captions of a CaptionDataset.

    predictions: {index: sentence}; corpus: {key: raw training captions}; object_words: the frequent
    ones; options: further fields of Captions.
    """
    annotated = {}
    main_objects = {}
    for index, entry in enumerate(dataset.entries):
        annotated[index] = {thing["category"] for thing in entry["objects"]}
        for thing in entry["objects"]:
            if thing.get("main"):
                main_objects[index] = thing["category"]
    categories = dataset.info["categories"]
    return Captions(
        predictions=predictions,
        references=dataset.references(),
        annotated=annotated if categories else None,
        categories=categories,
        corpus=corpus,
        object_words=object_words,
        main_objects=main_objects,
        planted_pairs=dataset.info.get("planted_pairs", []),
        **options,
    )
