"""A slow CIDEr-D, written from the paper."""

import math
from collections import Counter


def slow_cider_d(candidate, references, corpus, n=4, sigma=6.0):
    """Eq. 2-4 of Vedantam et al. (2015), word by word.

    The document frequencies are those of `corpus`, the references of several images.
    """
    total = 0.0
    for order in range(1, n + 1):
        mine = weights(candidate, order, corpus)
        for reference in references:
            cosine = clipped_cosine(mine, weights(reference, order, corpus))
            difference = number_of_bigrams(candidate) - number_of_bigrams(reference)
            total += cosine * math.exp(-(difference**2) / (2 * sigma**2))
    return 10 * total / (n * len(references))


def grams(sentence, order):
    """How often each n-gram of this order occurs in a sentence."""
    words = sentence.split()
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def weights(sentence, order, corpus):
    """The tf-idf of each n-gram of a sentence."""
    found = {}
    for gram, count in grams(sentence, order).items():
        documents = sum(is_in(gram, references, order) for references in corpus)
        found[gram] = count * (math.log(len(corpus)) - math.log(max(1, documents)))
    return found


def is_in(gram, references, order):
    """Whether one of the references contains an n-gram."""
    return any(gram in grams(reference, order) for reference in references)


def clipped_cosine(mine, theirs):
    """The cosine of two tf-idf vectors, the first one's values clipped to the second one's."""
    product = sum(
        min(value, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, value in mine.items()
    )
    norms = norm(mine) * norm(theirs)
    return product / norms if norms else 0.0


def norm(vector):
    """The Euclidean norm of {n-gram: value}."""
    return math.sqrt(sum(value * value for value in vector.values()))


def number_of_bigrams(sentence):
    """The length of a sentence as pycocoevalcap counts it."""
    return max(len(sentence.split()) - 1, 0)
