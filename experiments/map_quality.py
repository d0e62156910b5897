"""What maps are like, whatever they explain: simple or not, stable or not, and whether they depend
on what the captioner has learnt.

* sparseness: the Gini index of the sizes (Chalasani et al. 2020); complexity: the entropy of their
  shares, in nats (Bhatt et al. 2020).
* sensitivity: the largest relative change of the map when noise is added to the image (Yeh et al.
  2019).
* randomisation (Adebayo et al. 2018): the map of the same word by the captioner with a random
  decoder, or with all weights random. Both maps are means over noisy images, which takes the
  shattering of gradients out of the comparison (smooth MPRT), and are compared by SSIM. Beside it,
  the rise of the complexity by random weights (efficient MPRT; Hedström et al. 2024).
"""

import copy

import numpy as np
import torch
from skimage.metrics import structural_similarity

from experiments.case import Experiment
from experiments.faithfulness import chosen_positions
from experiments.statistics import draw_images, flattened, mean_with_interval

NOISY = 4  # images with noise
NOISE = 0.02  # of the range of an image's values: the most that is added to one of them
ENCODER = "encoder."
RANDOMISED = ("decoder", "everything")
MEASURES = ("sparseness", "complexity", "sensitivity", "SSIM decoder", "SSIM everything")
MEASURES += ("complexity rise",)


def run(cases, setting):
    """A record of each examined word: {"word", and of each of MEASURES {method: float}}.

    A measure is None for a map that is zero everywhere.
    """
    explained = [case for case in cases if chosen_positions(case)]
    found = {}
    if explained:
        captioners = {"": setting.captioner}
        for part in RANDOMISED:
            captioners[part] = randomised(setting.captioner, part, setting.seed)
        for method in setting.methods:
            found[method] = maps_of(explained, captioners, method, setting.seed)
    records = []
    for case in cases:
        records.append(
            [record_of(case, place, found, explained) for place in chosen_positions(case)]
        )
    return records


def maps_of(cases, captioners, method, seed):
    """{name of a captioner: for each case ("plain", "noisy")}, maps (T, H, W) of its words.

    "noisy": a list of the maps of the noisy images.
    """
    captions = [case.words for case in cases]
    images = torch.stack([case.pixels for case in cases])
    found = {}
    for name, captioner in captioners.items():
        plain = captioner.explain(images, captions, method)
        noisy = []
        for draw in range(NOISY):
            noisy.append(captioner.explain(with_noise(images, seed, draw), captions, method))
        found[name] = []
        for place, explanation in enumerate(plain):
            others = [draw[place].image_relevance.double() for draw in noisy]
            found[name].append((explanation.image_relevance.double(), others))
    return found


def with_noise(images, seed, draw):
    """Images (B, 3, H, W) with uniform noise, the same for each of them."""
    generator = torch.Generator().manual_seed(1000 * seed + draw)
    noise = 2 * torch.rand(images.shape[1:], generator=generator) - 1
    spread = images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)
    return images + NOISE * spread * noise.to(images)


def randomised(captioner, part, seed):
    """A copy of a captioner whose weights of two dimensions or more are drawn anew, of the same
    mean and deviation: all of them, or those of the decoder."""
    copied = copy.deepcopy(captioner)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in copied.named_parameters():
            of_part = part == "everything" or not name.startswith(ENCODER)
            if of_part and weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.copy_(noise * weight.std() + weight.mean())
    return copied


def record_of(case, position, found, explained):
    """The record of one word. found: {method: as of `maps_of`}; explained: the cases in it."""
    record = {"word": case.words[position]} | {measure: {} for measure in MEASURES}
    place = next(number for number, other in enumerate(explained) if other is case)
    for method, maps in found.items():
        plain, noisy = word_maps(maps[""][place], position)
        record["sparseness"][method] = sparseness(plain)
        record["complexity"][method] = complexity(plain)
        record["sensitivity"][method] = sensitivity(plain, noisy)
        for part in RANDOMISED:
            _, others = word_maps(maps[part][place], position)
            similar = similarity(np.mean(noisy, axis=0), np.mean(others, axis=0))
            record[f"SSIM {part}"][method] = similar
        random_map, _ = word_maps(maps["everything"][place], position)
        record["complexity rise"][method] = rise(complexity(plain), complexity(random_map))
    return record


def word_maps(maps, position):
    """The plain map of one word and a list of the noisy ones, arrays (H, W)."""
    plain, noisy = maps
    return plain[position].numpy(), [other[position].numpy() for other in noisy]


def sparseness(values):
    """The Gini index of the sizes of an array: 0 if all are alike, towards 1 if one is all.

    None if all are zero.
    """
    sizes = np.sort(np.abs(values), axis=None)
    if not sizes[-1]:
        return None
    ranks = np.arange(1, sizes.size + 1)
    return float(((2 * ranks - sizes.size - 1) * sizes).sum() / (sizes.size * sizes.sum()))


def complexity(values):
    """The entropy, in nats, of each value's share of the sum of all sizes; None if all are zero."""
    sizes = np.abs(values).ravel()
    if not sizes.any():
        return None
    shares = sizes[sizes > 0] / sizes.sum()
    return float(-(shares * np.log(shares)).sum())


def sensitivity(plain, noisy):
    """The largest |other - plain| / |plain|, Euclidean norms; None for a plain map of zeros."""
    size = np.linalg.norm(plain)
    if not size:
        return None
    return float(max(np.linalg.norm(other - plain) for other in noisy) / size)


def similarity(first, second):
    """The SSIM of two maps, each divided by its root mean square; None if one is all zeros."""
    scaled = []
    for values in (first, second):
        size = np.sqrt((values**2).mean())
        if not size:
            return None
        scaled.append(values / size)
    span = max(values.max() for values in scaled) - min(values.min() for values in scaled)
    return float(structural_similarity(*scaled, data_range=span))


def rise(before, after):
    """By what share of itself a number rises; None if either is missing, or it is 0."""
    return (after - before) / before if before and after is not None else None


def table(images, model_type):
    """Rows, for each method: method, words, and of each of MEASURES the mean and its confidence
    interval (low, high), of the words whose map is not zero."""
    records, numbers = flattened(images)
    if not records:
        return []
    counts = draw_images(len(images))
    rows = []
    for method in records[0]["sparseness"]:
        row = {"method": method, "words": len(records)}
        for measure in MEASURES:
            values = []
            places = []
            for record, number in zip(records, numbers):
                if record[measure][method] is not None:
                    values.append(record[measure][method])
                    places.append(number)
            if values:
                value, low, high = mean_with_interval(values, places, counts)
                row |= {measure: value, f"{measure} low": low, f"{measure} high": high}
        rows.append(row)
    return rows


EXPERIMENT = Experiment(run, table)
