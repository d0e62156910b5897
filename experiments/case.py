"""What all experiments share: their one form, their setting, and the images that they examine."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from basemodel import Captioner
from pycocoevalcap.chair.chair import find_objects


@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper (§4).

    run     (cases, setting) -> for each Case a list of records, one for each word that the
            experiment asks about. A record is a dict of what JSON knows.
    table   (images, model_type) -> rows, dicts of the same keys. images: for each image of a split
            the list of its records, empty for an image without a caption; model_type: whose
            figures in the paper go beside ours.
    figure  (rows) -> the paper's figure of a table (a matplotlib Figure), or None if the table is
            empty. None for an experiment without a figure.
    """

    run: Callable
    table: Callable
    figure: Callable | None = None


@dataclass(frozen=True)
class Setting:
    """What the experiments may need besides their cases.

    captioner     the captioner that is examined
    methods       names of explanation.METHODS
    phrases       what names an object, as of chair.object_phrases
    object_words  the frequent object words
    decoding      arguments of the captioner's `decode`
    seed          of the random baselines, which depend on it and on the image only
    """

    captioner: Captioner
    methods: list
    phrases: dict
    object_words: list
    decoding: dict = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """One image with its caption and the explanations of it.

    pixels        (3, H, W), ImageNet-normalised
    features      (L, D) of its regions
    words         its caption, of at least one word
    explanations  {method: Explanation}
    entry         what the dataset says of the image: its captions, objects, width and height
    seed          of the random baselines, a text
    objects       the objects that the caption names, as of chair.find_objects
    """

    pixels: torch.Tensor
    features: torch.Tensor
    words: list
    explanations: dict
    entry: dict
    seed: str
    objects: list

    @property
    def named(self):
        """{position: category} of the words that name an object; of a compound its last word."""
        return {stop - 1: category for category, _, stop in self.objects}

    @property
    def annotated(self):
        """The categories of the annotated objects."""
        return {thing["category"] for thing in self.entry["objects"]}

    @property
    def any_explanation(self):
        """One of the explanations, for what they all agree on, such as the probabilities."""
        return next(iter(self.explanations.values()))


def examine(images, indices, entries, experiments, setting):
    """Caption images, explain every word by all methods, and run experiments on them.

    images (B, 3, H, W); indices and entries: of the images in their dataset; experiments:
    {name: Experiment}. Returns B records: {"index": int, "caption": list of words}, and under the
    name of each experiment what it found, unless the caption is empty.
    """
    features = setting.captioner.encode(images)
    captions = setting.captioner.decode(features, **setting.decoding)
    records = []
    for index, words in zip(indices, captions):
        records.append({"index": index, "caption": words})
    captioned = [row for row, words in enumerate(captions) if words]
    cases = cases_of(images, features, captions, entries, indices, captioned, setting)
    for name, experiment in experiments.items():
        if cases:
            for row, found in zip(captioned, experiment.run(cases, setting)):
                records[row][name] = found
    return records


def cases_of(images, features, captions, entries, indices, captioned, setting):
    """The Cases of a batch of images; `captioned`: the rows whose caption has a word."""
    if not captioned:
        return []
    chosen_captions = [captions[row] for row in captioned]
    explanations = {}
    for method in setting.methods:
        found = setting.captioner.explain(images[captioned], chosen_captions, method)
        explanations[method] = found
    cases = []
    for place, row in enumerate(captioned):
        case = Case(
            pixels=images[row],
            features=features[row],
            words=captions[row],
            explanations={method: found[place] for method, found in explanations.items()},
            entry=entries[row],
            seed=f"{setting.seed} {indices[row]}",
            objects=find_objects(captions[row], setting.phrases),
        )
        cases.append(case)
    return cases
