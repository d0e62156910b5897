"""The paper's experiments (§4) as functions over what `captioner.explain` returned: which words and patches mattered, where the
relevance lies, and whether it tells supported words from hallucinated ones. evaluation.py runs them on a split.

No function changes a map that it is given.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as rle
from sklearn.metrics import roc_auc_score

from gradient_utils import enlarge
from pycocoevalcap.chair.chair import find_objects
from vocabulary import STOP_WORDS, tokenize

FIRST_TARGET = 5  # the first five words of a caption are left out (§4.1)
DELETED_WORDS = 3
PATCH, PATCHES, PATCH_IMAGE = 8, 20, 224  # the 20 best patches of 8x8 pixels of a 224x224 image
SHARES = tuple(step / 10 for step in range(11))  # of the patches deleted or inserted
THRESHOLDS = tuple(step / 10 for step in range(10))  # Figure 3
NEVER_NEGATIVE = ("attention", "gradcam")  # maps
SIGNED_WORDS = ("lrp",)  # whose largest word relevance counts, not its largest size


# -------------------------------------------------------------------------------------------------------- word ablation


def related_words(relevance, position, signed, count=DELETED_WORDS):
    """The `count` preceding words that matter most for the word at `position`, as sorted positions; never `<start>`.

    relevance (T,): a row of Explanation.word_relevance, of `<start>`, word 0, word 1 ...; signed: the highest scores count (LRP),
    else the highest absolute ones (gradients).
    """
    scores = relevance[1 : position + 1]
    scores = scores if signed else scores.abs()
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def random_words(position, generator, count=DELETED_WORDS):
    """As many preceding words drawn without replacement from the same candidates."""
    return sorted(generator.sample(range(position), min(count, position)))


def without(words, positions):
    """The words but for those at `positions`."""
    return [word for place, word in enumerate(words) if place not in set(positions)]


@torch.no_grad()
def last_word_probabilities(captioner, features, sequences):
    """features (B, L, D), for each image a list of sequences of word ids -> for each image the probabilities of the last word of
    each sequence after the words before it, as lists of floats. One forward pass for all of them."""
    vocabulary = captioner.vocabulary
    most, longest = (
        max(map(len, sequences)),
        max((len(ids) for image in sequences for ids in image), default=0),
    )
    if not most:
        return [[] for _ in sequences]
    inputs = torch.full((len(sequences), most, longest), vocabulary.pad)
    last, targets = (
        torch.zeros(len(sequences), most, dtype=torch.long),
        torch.zeros(len(sequences), most, dtype=torch.long),
    )
    for image, row in enumerate(sequences):
        for place, ids in enumerate(row):
            inputs[image, place, : len(ids)] = torch.tensor([vocabulary.start, *ids[:-1]])
            last[image, place], targets[image, place] = len(ids) - 1, ids[-1]
    inputs, last, targets = (part.to(features.device) for part in (inputs, last, targets))
    captioner = captioner.eval_view()
    embeddings = captioner.embedding(inputs)
    parts = captioner.unroll(embeddings, captioner.image_memory(features)).addends
    parts = [
        part.gather(2, last[..., None, None].expand(-1, -1, 1, part.shape[-1])).squeeze(2)
        for part in parts
    ]  # (B, N, H)
    found = captioner.last_layer(parts).softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return [row[: len(image)] for row, image in zip(found.tolist(), sequences)]


# ------------------------------------------------------------------------------------------------------- image ablation


def patch_count(height, width):
    """How many patches of an image of this size are as large a share of it as 20 of 224x224."""
    return max(1, round(PATCHES * height * width / PATCH_IMAGE**2))


def patch_order(relevance):
    """The patches of 8x8 pixels of a map (H, W), numbered row by row, by falling sum; pixels beyond the last whole patch belong to
    none."""
    rows, columns = (side // PATCH for side in relevance.shape)
    sums = (
        relevance[: rows * PATCH, : columns * PATCH]
        .reshape(rows, PATCH, columns, PATCH)
        .sum(dim=(1, 3))
    )
    return sums.flatten().argsort(descending=True, stable=True).tolist()


def random_order(shape, generator):
    """All patches in random order."""
    patches = (shape[0] // PATCH) * (shape[1] // PATCH)
    return generator.sample(range(patches), patches)


def patches_mask(indices, shape):
    """These patches as a mask bool (H, W)."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for index in indices:
        row, column = divmod(index, shape[1] // PATCH)
        mask[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = True
    return mask


def blanked(image, mask):
    """An ImageNet-normalised image (3, H, W) with the pixels of a mask at the mean colour, that is 0."""
    return image.masked_fill(mask, 0)


# ----------------------------------------------------------------------------------------------------------- correctness


def box_masks(boxes, size, shape):
    """Boxes x1 y1 x2 y2 in an image of `size` (width, height) as masks bool (N, H, W) of a map of `shape` (H, W): the pixels
    whose centre lies inside."""
    height, width = shape
    x = (torch.arange(width) + 0.5) * size[0] / width
    y = (torch.arange(height) + 0.5) * size[1] / height
    masks = [
        ((y >= y1) & (y < y2)).unsqueeze(1) & ((x >= x1) & (x < x2)).unsqueeze(0)
        for x1, y1, x2, y2 in boxes
    ]
    return torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)


def segmentation_mask(segmentation, size, shape):
    """A COCO segmentation (polygons or run-length code) of an image of `size` (width, height) as a mask bool (H, W) of `shape`."""
    if isinstance(segmentation, list):
        segmentation = rle.merge(rle.frPyObjects(segmentation, size[1], size[0]))
    elif isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, *segmentation["size"])
    mask = torch.from_numpy(rle.decode(segmentation).astype(bool))
    rows, columns = ((torch.arange(new) + 0.5) * old / new for new, old in zip(shape, mask.shape))
    return mask[rows.long()][:, columns.long()]


def correctness(relevance, masks, thresholds=THRESHOLDS):
    """The share of a map's positive relevance that lies inside (eq. 9), for each threshold on the map divided by its maximum.

    relevance (H, W); masks bool (N, H, W): one result for each. Returns (N, thresholds), 0 where nothing is above a threshold.
    """
    positive = relevance.clamp(min=0)
    positive = positive / positive.max().clamp(min=torch.finfo(positive.dtype).tiny)
    results = []
    for threshold in thresholds:
        kept = torch.where(positive > threshold, positive, 0)
        results.append(
            (kept * masks).sum(dim=(1, 2)) / kept.sum().clamp(min=torch.finfo(positive.dtype).tiny)
        )
    return torch.stack(results, dim=1)


def hits(relevance, mask):
    """The pointing game (Zhang et al. 2018): whether the highest point of a map (H, W) lies in a mask; False for a map without any
    positive relevance."""
    return bool(relevance.max() > 0 and mask.flatten()[relevance.argmax()])


def rank_accuracy(relevance, mask):
    """The share of the K highest pixels of a map (H, W) that lie in a mask of K pixels (Arras et al. 2022)."""
    count = int(mask.sum())
    return (
        mask.flatten()[relevance.flatten().argsort(descending=True, stable=True)[:count]]
        .float()
        .mean()
        .item()
        if count
        else 0.0
    )


def localisation(relevance, boxes, outline):
    """All of these for a map (H, W), masks of boxes (N, H, W), and the objects' outline (H, W) or None."""
    union = boxes.any(0)
    found = {
        "union": correctness(relevance, union.unsqueeze(0))[0].tolist(),
        "best box": correctness(relevance, boxes).amax(0).tolist(),
    }
    if outline is not None:
        found["segmentation"] = correctness(relevance, outline.unsqueeze(0))[0].tolist()
    return {
        **found,
        "pointing game": hits(relevance, union),
        "rank accuracy": rank_accuracy(relevance, union),
    }


# --------------------------------------------------------------------------------------------------------- hallucination


def statistics_of(relevance, method="lrp"):
    """What a method's map may say about whether its word is supported, {name: float}: max, mean, mean of the positives, mean of the sizes,
    quantiles; no means of attention, which sums to 1 for every word. `relevance`: any tensor, taken as it is, not normalised."""
    values = relevance.flatten().double()
    positive = values[values > 0]
    means = {
        "mean": values.mean(),
        "mean positive": positive.mean() if len(positive) else torch.zeros(()),
        "mean size": values.abs().mean(),
    }
    names = {
        "max": values.max(),
        **(means if method != "attention" else {}),
        **{f"quantile {q}": values.quantile(q) for q in (0.1, 0.25, 0.5, 0.75, 0.9)},
    }
    return {name: value.item() for name, value in names.items()}


def auc(scores, labels):
    """The area under the ROC curve of telling labels 1 from 0 by score; None if there is only one kind."""
    return float(roc_auc_score(labels, scores)) if len(set(labels)) == 2 else None


def bootstrap(statistic, groups, draws=1000, seed=0, level=0.95):
    """The statistic of all rows, and its confidence interval by drawing groups (images) with replacement: (value, low, high).

    groups: a list of lists of rows; statistic: a function of a list of rows, which may return None.
    """
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        rows = [
            row
            for index in generator.integers(len(groups), size=len(groups))
            for row in groups[index]
        ]
        values.append(statistic(rows) if rows else None)
    values = [value for value in values if value is not None]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) if values else (None, None)
    return statistic([row for group in groups for row in group]), low, high


# ------------------------------------------------------------------------------------------------- all of them, on a batch


class Examiner:
    """Runs the experiments on batches of one dataset.

    methods: names of captioner.METHODS; phrases: what names an object (chair.object_phrases); object_words: the frequent ones;
    wanted: which experiments; seed: of the random baselines, which depend on it and the image only.
    """

    def __init__(self, captioner, methods, phrases, object_words, wanted, decoding, seed=0):
        self.captioner, self.methods, self.phrases, self.object_words = (
            captioner,
            methods,
            phrases,
            set(object_words),
        )
        self.wanted, self.decoding, self.seed = wanted, decoding, seed

    def __call__(self, images, indices, entries):
        """images (B, 3, H, W), their indices and entries -> a record of what each experiment found for each image."""
        features = self.captioner.encode(images)
        captions = self.captioner.decode(features, **self.decoding)
        spoken = [place for place, words in enumerate(captions) if words]
        explained = {
            method: self.captioner.explain(
                images[spoken], [captions[place] for place in spoken], method
            )
            for method in self.methods
        }
        records = [{"index": index, "caption": words} for index, words in zip(indices, captions)]
        cases = [
            Case(images[place], features[place], captions[place], {method: found[row] for method, found in explained.items()},
                 entries[place], f"{self.seed} {indices[place]}", find_objects(captions[place], self.phrases))
            for row, place in enumerate(spoken)
        ]  # fmt: skip
        for name in self.wanted:
            for place, found in zip(spoken, getattr(self, name)(cases)):
                records[place][name] = found
        return records

    def word_ablation(self, cases):
        """For each stop and object word from the sixth on: how much its probability drops without the words that mattered."""
        rows, sequences = [], []
        for case in cases:
            rows.append([])
            sequences.append([])
            ids, generator = (
                self.captioner.vocabulary.encode(case.words),
                random.Random(f"words {case.seed}"),
            )
            for position, kind in sorted(
                {**case.stop_words(), **dict.fromkeys(case.named, "object")}.items()
            ):
                if position < FIRST_TARGET:
                    continue
                deleted = {"random": random_words(position, generator)}
                for method, explanation in case.explained.items():
                    if method != "attention":  # it says nothing of words
                        deleted[method] = related_words(
                            explanation.word_relevance[position], position, method in SIGNED_WORDS
                        )
                sequences[-1] += [
                    ids[: position + 1],
                    *(without(ids[: position + 1], places) for places in deleted.values()),
                ]
                rows[-1].append({"word": case.words[position], "kind": kind, "drop": list(deleted)})
        probabilities = (
            last_word_probabilities(
                self.captioner, torch.stack([case.features for case in cases]), sequences
            )
            if cases
            else []
        )
        for image, found in zip(rows, map(iter, probabilities)):
            for row in image:
                before = next(found)
                row["drop"] = {method: before - next(found) for method in row["drop"]}
        return rows

    def image_ablation(self, cases):
        """For each object word: whether it is gone from the new caption without the patches that mattered, else how much its
        probability drops there; and its mean probability while the patches are deleted, or inserted, best first."""
        rows, changed = [[] for _ in cases], []
        for image, case in zip(rows, cases):
            shape, generator = case.pixels.shape[1:], random.Random(f"patches {case.seed}")
            for position in case.named:
                orders = {
                    method: patch_order(explanation.image_relevance[position])
                    for method, explanation in case.explained.items()
                }
                orders["random"] = random_order(shape, generator)
                before = next(iter(case.explained.values())).probabilities[position].item()
                image.append({"word": case.words[position], "gone": {}, "drop": {}})
                image[-1] |= self._deletion_and_insertion(case, position, orders)
                for method, order in orders.items():
                    mask = patches_mask(order[: patch_count(*shape)], shape)
                    changed.append((image[-1], method, before, blanked(case.pixels, mask)))
        for first in range(0, len(changed), 64):
            part = changed[first : first + 64]
            features = self.captioner.encode(torch.stack([pixels for *_, pixels in part]))
            captions = self.captioner.decode(features, **self.decoding)
            sequences = [[self.captioner.vocabulary.encode(words[: words.index(row["word"]) + 1])] if row["word"] in words else []
                         for (row, *_), words in zip(part, captions)]  # fmt: skip
            after = last_word_probabilities(self.captioner, features, sequences)
            for (row, method, before, _), found in zip(part, after):
                row["gone"][method] = not found
                row["drop"][method] = before - found[0] if found else None
        return rows

    def _deletion_and_insertion(self, case, position, orders):
        """{"deletion": {method: mean probability of the word of the same caption}, "insertion": likewise} (Petsiuk et al. 2018)."""
        ids = self.captioner.vocabulary.encode(case.words)[: position + 1]
        variants, shape = [], case.pixels.shape[1:]
        for order in orders.values():
            masks = [patches_mask(order[: round(share * len(order))], shape) for share in SHARES]
            variants += [blanked(case.pixels, mask) for mask in masks] + [
                blanked(case.pixels, ~mask) for mask in masks
            ]
        features = self.captioner.encode(torch.stack(variants))
        found = last_word_probabilities(self.captioner, features, [[ids]] * len(variants))
        means = iter(np.array(found).reshape(-1, len(SHARES)).mean(1).tolist())
        pairs = {method: (next(means), next(means)) for method in orders}
        return {
            "deletion": {method: pair[0] for method, pair in pairs.items()},
            "insertion": {method: pair[1] for method, pair in pairs.items()},
        }

    def correctness(self, cases):
        """For each word that names an annotated object: where the positive and the negative relevance lies."""
        return [
            [
                self._localised(case, position, category)
                for position, category in case.named.items()
                if category in case.annotated
            ]
            for case in cases
        ]

    def _localised(self, case, position, category):
        things = [thing for thing in case.entry["objects"] if thing["category"] == category]
        size, shape = (case.entry["width"], case.entry["height"]), case.pixels.shape[1:]
        boxes = box_masks([thing["bbox"] for thing in things], size, shape)
        union = boxes.any(0)
        outlines = [
            segmentation_mask(thing["segmentation"], size, shape)
            for thing in things
            if thing.get("segmentation")
        ]
        row = {"word": case.words[position], "area": union.float().mean().item(), "methods": {}}
        maps = {
            method: explanation.image_relevance[position]
            for method, explanation in case.explained.items()
        }
        maps |= {
            f"negative {method}": -relevance
            for method, relevance in maps.items()
            if method not in NEVER_NEGATIVE
        }
        outline = torch.stack(outlines).any(0) if len(outlines) == len(things) else None
        row["methods"] = {
            method: localisation(relevance, boxes, outline) for method, relevance in maps.items()
        }
        if "attention" in maps:
            heads = case.explained["attention"].attention[position]  # (heads, L)
            if len(heads) > 1:
                found = [
                    localisation(relevance[0], boxes, outline)
                    for relevance in enlarge(
                        heads.unsqueeze(1), self.captioner.encoder.grid, case.pixels
                    )
                ]
                row["methods"]["attention, best head"] = {
                    name: np.max([one[name] for one in found], axis=0).tolist() for name in found[0]
                }
        return row

    def hallucination(self, cases):
        """For each occurrence of a frequent object word: whether a reference says it (and, where objects are annotated, whether
        the image shows it), and what the maps say."""
        rows = []
        for case in cases:
            references = {
                word for sentence in case.entry["captions"] for word in tokenize(sentence)
            }
            rows.append([])
            for position, word in enumerate(case.words):
                if word in self.object_words:
                    scores = {
                        method: statistics_of(explanation.image_relevance[position], method)
                        for method, explanation in case.explained.items()
                    }
                    beta = next(iter(case.explained.values())).beta
                    scores |= (
                        {"1 - beta": {"value": 1 - beta[position].item()}}
                        if beta is not None
                        else {}
                    )
                    shown = (
                        case.named[position] in case.annotated
                        if case.annotated and position in case.named
                        else None
                    )
                    rows[-1].append(
                        {
                            "word": word,
                            "supported": word in references,
                            "shown": shown,
                            "scores": scores,
                        }
                    )
        return rows


@dataclass
class Case:
    """One image, its caption and what explains it; `seed` of the random baselines, `objects` as of find_objects."""

    pixels: torch.Tensor
    features: torch.Tensor
    words: list
    explained: dict
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

    def stop_words(self):
        """{position: "stop"} of the stop words."""
        return {position: "stop" for position, word in enumerate(self.words) if word in STOP_WORDS}


# ---------------------------------------------------------------------------------------------------------------- tables

# What the paper's earlier version reports on other data (COCO, Flickr30k; VGG16; grid-TD and adaptive captioner).
PAPER = {
    "word_ablation": {"gridtd": {("stop", "lrp"): 0.7121, ("stop", "gradient"): 0.7365, ("stop", "random"): 0.1749, ("object", "lrp"): 0.5487,
                                 ("object", "gradient"): 0.4804, ("object", "random"): 0.1176},
                      "adaptive": {("stop", "lrp"): 0.9032, ("stop", "gradient"): 0.9025, ("stop", "random"): 0.7832, ("object", "lrp"): 0.9206,
                                   ("object", "gradient"): 0.9297, ("object", "random"): 0.8430}},
    "hallucination": {"gridtd": {("lrp", "max"): 0.61, ("lrp", "mean"): 0.64, ("guided_gradcam", "mean size"): 0.54, ("1 - beta", "value"): 0.54, ("guided_gradcam", "mean"): 0.45},
                      "adaptive": {("lrp", "max"): 0.66, ("lrp", "mean"): 0.64, ("guided_gradcam", "mean size"): 0.58, ("1 - beta", "value"): 0.53, ("guided_gradcam", "mean"): 0.42}},
}  # fmt: skip
WORD_GRADIENTS = (
    "gradient",
    "gradcam",
    "guided_gradcam",
    "guided_backprop",
)  # they differ in the encoder only: one word relevance


def share(flags):
    """The share of true ones, None of nothing."""
    return sum(flags) / len(flags) if flags else None


def mean(values):
    """The mean, None of nothing."""
    return sum(values) / len(values) if values else None


def summarise_word_ablation(records, model_type):
    """Rows of Table 2: kind of word, method, words, share of them whose probability drops with its confidence interval, mean drop."""
    rows = []
    found = [record.get("word_ablation", []) for record in records]
    for kind in ("stop", "object"):
        words = [[row["drop"] for row in image if row["kind"] == kind] for image in found]
        for method in dict.fromkeys(
            method for image in words for drops in image for method in drops
        ):
            drops = [[row[method] for row in image] for image in words]
            value, low, high = bootstrap(lambda flat: share([drop > 0 for drop in flat]), drops)
            paper = (
                PAPER["word_ablation"]
                .get(model_type, {})
                .get((kind, "gradient" if method in WORD_GRADIENTS else method))
            )
            flat = sum(drops, [])
            rows.append(
                {
                    "kind": kind,
                    "method": method,
                    "words": len(flat),
                    "drops": value,
                    "low": low,
                    "high": high,
                    "mean drop": mean(flat),
                    "paper": paper,
                }
            )
    return rows


def summarise_image_ablation(records, model_type):
    """Rows: method, words, share gone from the new caption with its interval, share and size of the drops of those still there,
    deletion (lower is better) and insertion (higher is better)."""
    words = [record.get("image_ablation", []) for record in records]
    flat, rows = sum(words, []), []
    for method in flat[0]["gone"] if flat else ():
        value, low, high = bootstrap(
            share, [[row["gone"][method] for row in image] for image in words]
        )
        drops = [row["drop"][method] for row in flat if row["drop"][method] is not None]
        areas = {
            name: mean([row[name][method] for row in flat]) for name in ("deletion", "insertion")
        }
        rows.append({"method": method, "words": len(flat), "gone": value, "low": low, "high": high, "drops of the rest": share([drop > 0 for drop in drops]),
                     "mean drop": mean(drops), **areas})  # fmt: skip
    return rows


def summarise_correctness(records, model_type):
    """Rows: method, words, correctness without threshold in the union of boxes with its interval, in the best box and in the
    segmentation, pointing game, rank accuracy, and the curves over THRESHOLDS. "area" is what a map of one value would get."""
    words = [record.get("correctness", []) for record in records]
    flat = sum(words, [])
    rows = (
        [{"method": "area", "words": len(flat), "union": mean([row["area"] for row in flat])}]
        if flat
        else []
    )
    for method in flat[0]["methods"] if flat else ():
        found = [[row["methods"][method] for row in image] for image in words]
        one = sum(found, [])
        curves = {
            name: np.mean([row[name] for row in one], axis=0).tolist()
            for name in ("union", "best box", "segmentation")
            if all(name in row for row in one)
        }
        value, low, high = bootstrap(mean, [[row["union"][0] for row in image] for image in found])
        rows.append({"method": method, "words": len(one), "union": value, "low": low, "high": high,
                     **{name: curve[0] for name, curve in curves.items() if name != "union"},
                     "pointing game": share([row["pointing game"] for row in one]), "rank accuracy": mean([row["rank accuracy"] for row in one]), "curves": curves})  # fmt: skip
    return rows


def summarise_hallucination(records, model_type):
    """Rows: method, statistic of its map, AUC of telling words that a reference says from those that none does with its interval,
    the same by what the image shows, and how many of either there are."""
    words = [record.get("hallucination", []) for record in records]
    flat, rows = sum(words, []), []
    for method, names in {
        name: values for row in flat for name, values in row["scores"].items()
    }.items():
        for statistic in names:
            row = {"method": method, "statistic": statistic}
            for label in ("supported", "shown"):
                pairs = [
                    [
                        (one["scores"][method][statistic], int(one[label]))
                        for one in image
                        if one[label] is not None
                    ]
                    for image in words
                ]
                value, low, high = bootstrap(
                    lambda chosen: auc(*zip(*chosen)) if chosen else None, pairs, draws=200
                )
                labels = [flag for image in pairs for _, flag in image]
                row |= {
                    f"AUC {label}": value,
                    f"low {label}": low,
                    f"high {label}": high,
                    f"{label} yes/no": f"{sum(labels)}/{len(labels) - sum(labels)}",
                }
            rows.append(
                {
                    **row,
                    "paper": PAPER["hallucination"].get(model_type, {}).get((method, statistic)),
                }
            )
    return rows


SUMMARIES = {
    "word_ablation": summarise_word_ablation, "image_ablation": summarise_image_ablation,
    "correctness": summarise_correctness, "hallucination": summarise_hallucination,
}  # fmt: skip
