"""A slow CIDEr-D, written from the paper."""

import math
from collections import Counter


def slow_cider_d(candidate, references, corpus, n=4, sigma=6.0):
    """Eq. 2-4 of Vedantam et al. (2015), word by word, with document frequencies of `corpus` (images' references)."""

    def grams(sentence, order):
        words = sentence.split()
        return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))

    def weights(sentence, order):
        found = {}
        for gram, count in grams(sentence, order).items():
            documents = sum(
                any(gram in grams(reference, order) for reference in image) for image in corpus
            )
            found[gram] = count * (math.log(len(corpus)) - math.log(max(1, documents)))
        return found

    total = 0.0
    for order in range(1, n + 1):
        mine = weights(candidate, order)
        for reference in references:
            theirs = weights(reference, order)
            product = sum(
                min(value, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0)
                for gram, value in mine.items()
            )
            norms = math.sqrt(sum(v * v for v in mine.values())) * math.sqrt(
                sum(v * v for v in theirs.values())
            )
            difference = max(len(candidate.split()) - 1, 0) - max(len(reference.split()) - 1, 0)
            total += (product / norms if norms else 0.0) * math.exp(
                -(difference**2) / (2 * sigma**2)
            )
    return 10 * total / (n * len(references))
