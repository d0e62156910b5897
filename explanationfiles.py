"""The files of explanations: what they are called, and what they hold."""

import hashlib
import os
from collections import Counter

import numpy as np
import torch

from commandline import UserError, extended, write_atomically, write_json

LONGEST_MARK = 60  # characters that words may add to a file's name
# What the arrays' file says of where an explanation comes from, as far as that is known.
ABOUT = ("checkpoint", "checkpoint_sha256", "model_type", "encoder", "image", "caption", "method")


def output_names(paths):
    """{path: what the names of its results begin with}, another one for each.

    It is the file's name without its ending; with it where two would be the same; and with the
    folders that tell them apart where these would be, too.
    """
    if not paths:
        return {}
    absolute = {path: os.path.abspath(path) for path in paths}
    folder = os.path.commonpath([os.path.dirname(path) for path in absolute.values()])
    names = {path: path.stem for path in paths}
    tell_apart(names, lambda path: path.name)
    tell_apart(names, lambda path: os.path.relpath(absolute[path], folder).replace(os.sep, "-"))
    if len(set(names.values())) < len(names):
        raise UserError(
            "the results of two of the files would have the same name; "
            "explain them into two --output folders"
        )
    return names


def tell_apart(names, longer_name):
    """Give those of {path: name} that share a name a longer one, a function of the path."""
    counts = Counter(names.values())
    for path, name in names.items():
        if counts[name] > 1:
            names[path] = longer_name(path)


def marked(stem, marks):
    """The beginning of files' names, with what tells it from others; empty marks are left out."""
    return extended(stem, "".join(f"-{mark}" for mark in marks if mark))


def mark_of(words, mark=None):
    """What the names of files say of words that were asked for; empty if they are None.

    mark: what it begins with.
    """
    if words is None:
        return ""
    text = "_".join([mark, *words] if mark else words)
    if len(text) <= LONGEST_MARK:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[:LONGEST_MARK]}_{digest}"


def write_arrays(path, explanation, about):
    """Write all tensors of an explanation, its words and what `about` says, as a NumPy archive.

    about: a dict of what ABOUT names; what it lacks is left out.
    """
    arrays = {name: np.array(about[name]) for name in ABOUT if name in about}
    for name, value in {**vars(explanation), **explanation.extra}.items():
        if isinstance(value, torch.Tensor):
            arrays[name] = value.numpy()
    if explanation.instead_of is not None:
        arrays["instead_of"] = np.array(explanation.instead_of)
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
    if explanation.image_relevance is not None:
        sums = explanation.image_relevance.numpy().sum(axis=(1, 2))
        numbers["image_relevance_sum"] = sums.tolist()
    write_json(path, numbers)
