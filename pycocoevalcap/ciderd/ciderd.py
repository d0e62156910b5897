"""CIDEr-D (Vedantam et al. 2015) with the document frequencies of a training corpus, as tensors.

pycocoevalcap's `Cider` computes the same formula one caption at a time, with the document
frequencies of the very references that it scores against. Here the corpus is given once and whole
batches are scored on any device, so the scorer serves as a reward too.
"""

import torch

from vocabulary import padded

# So many hypotheses are scored at once; this bounds the memory of comparing n-grams.
ROWS = 256
# Odd numbers without a pattern, those of the generator splitmix64.
MULTIPLIERS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


class CiderD:
    """The scorer of one corpus. A document is the set of references of one image.

    documents: for each image a list of references, each a list of token ids from 1 (0 is padding).
    sigma: of the Gaussian penalty on a difference of lengths, in words.
    """

    def __init__(self, documents, n=4, sigma=6.0, device="cpu"):
        self.n = n
        self.sigma = sigma
        self.device = torch.device(device)
        captions = []
        owners = []  # the index of each caption's document
        for index, references in enumerate(documents):
            captions += references
            owners += [index] * len(references)
        captions = padded(captions)
        owners = torch.tensor(owners)
        number = torch.tensor(float(len(documents)), dtype=torch.float64)
        self.log_documents = number.log().to(self.device)
        self.frequencies = [
            self._frequencies(self.keys(captions, order), owners) for order in range(1, n + 1)
        ]
        self.vocabulary = None

    @classmethod
    def of_sentences(cls, corpus, **options):
        """The scorer of {key: list of tokenised reference sentences}, for `compute_score`."""
        vocabulary = {}
        documents = []
        for sentences in corpus.values():
            documents.append([_encode(sentence, vocabulary) for sentence in sentences])
        scorer = cls(documents, **options)
        scorer.vocabulary = vocabulary
        return scorer

    @staticmethod
    def keys(captions, order):
        """A number for each n-gram of this order: (..., T) -> (..., max(T - order + 1, 0)).

        It is 0 if the n-gram contains padding, else a 64-bit hash: among the 25 million n-grams of
        COCO the chance of a single collision is about 2e-5.
        """
        if captions.shape[-1] < order:
            return captions.new_zeros((*captions.shape[:-1], 0))
        mixed = captions * MULTIPLIERS[0]
        mixed = (mixed ^ (mixed >> 29)) * MULTIPLIERS[1]
        mixed = mixed ^ (mixed >> 32)
        key = torch.zeros_like(captions[..., order - 1 :])
        for offset in range(order):
            key = key * MULTIPLIERS[2] + mixed[..., offset : offset + key.shape[-1]]
        contains_padding = (captions.unfold(-1, order, 1) == 0).any(-1)
        return key.masked_fill(contains_padding, 0)

    def _frequencies(self, keys, owners):
        """The document frequencies of one order, from the n-grams (captions, P) of the corpus.

        Returns the different n-grams, sorted (K,), and the logarithm of the number of documents
        that contain each (K,).
        """
        owners = owners.unsqueeze(1).expand_as(keys)[keys != 0]
        known, index = keys[keys != 0].unique(return_inverse=True)
        pairs = (owners * max(len(known), 1) + index).unique()  # of a document and an n-gram
        counts = torch.bincount(pairs % max(len(known), 1), minlength=len(known))
        return known.to(self.device), counts.double().log().to(self.device)

    def _idf(self, keys, order):
        """The inverse document frequency (nats) of each n-gram; log N if the corpus lacks it."""
        known, log_counts = self.frequencies[order - 1]
        if not len(known):
            return self.log_documents.expand(keys.shape)
        index = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
        return self.log_documents - torch.where(known[index] == keys, log_counts[index], 0.0)

    def score(self, hypotheses, references, number=None):
        """The CIDEr-D of each hypothesis, 0 to 10: (B, S).

        hypotheses (B, S, T) and references (B, M, T') of the same B images are token ids, padded
        with 0. number (B,): how many references each image has; None: those that are not padding
        only.
        """
        hypotheses = hypotheses.to(self.device)
        references = references.to(self.device)
        if number is None:
            number = (references != 0).any(-1).sum(-1)
        step = max(1, ROWS // hypotheses.shape[1])
        parts = zip(hypotheses.split(step), references.split(step))
        scores = [self._score(*part) for part in parts]
        return torch.cat(scores) / number.to(self.device).clamp(min=1).unsqueeze(-1)

    def _score(self, hypotheses, references):
        """As `score`, but the sum over the references instead of their mean."""
        hypotheses = trimmed(hypotheses)
        references = trimmed(references)
        own = number_of_bigrams(hypotheses).unsqueeze(-1)
        theirs = number_of_bigrams(references).unsqueeze(-2)
        difference = (own - theirs).double()  # (B, S, M)
        penalty = torch.exp(-(difference**2) / (2 * self.sigma**2))
        total = sum(
            self._similarity(self.keys(hypotheses, n), self.keys(references, n), n)
            for n in range(1, self.n + 1)
        )
        return 10 / self.n * (total * penalty).sum(-1)

    def _similarity(self, hypotheses, references, order):
        """The clipped cosine of tf-idf vectors: n-grams (B, S, P) and (B, M, Q) -> (B, S, M).

        The formula sums over different n-grams. Here the sum runs over all positions, and each
        term is divided by how often its n-gram occurs.
        """
        counts, weights, norm = self._vector(hypotheses, order)
        _, _, norm_of_references = self._vector(references, order)
        equal = hypotheses[:, :, None, :, None] == references[:, None, :, None, :]
        found = equal.sum(-1)  # (B, S, M, P): how often a reference contains each n-gram
        counts = counts.unsqueeze(2)  # (B, S, 1, P)
        clipped = torch.minimum(found, counts) * found / counts.clamp(min=1).double()
        product = (clipped * weights.square().unsqueeze(2)).sum(-1)
        norms = norm.unsqueeze(-1) * norm_of_references.unsqueeze(-2)
        return torch.where(norms > 0, product / norms.clamp(min=1e-300), 0.0)

    def _vector(self, keys, order):
        """What the tf-idf vectors of captions are made of, from their n-grams (B, S, P).

        Returns how often each n-gram occurs in its caption and its idf, both (B, S, P) and 0 for
        padding, and the norm of the vector (B, S).
        """
        valid = keys != 0
        counts = (keys.unsqueeze(-1) == keys.unsqueeze(-2)).sum(-1) * valid
        weights = self._idf(keys, order) * valid
        return counts, weights, (counts * weights.square()).sum(-1).sqrt()

    def score_ids(self, captions, references):
        """As `score`, of lists of token ids: (B, S).

        captions: for each of B images a list of S captions; references: for each a list of
        references, any number of them.
        """
        number = torch.tensor([len(image) for image in references])
        most = int(number.max())
        reference_rows = []
        for image in references:
            reference_rows += image + [[]] * (most - len(image))
        caption_rows = []
        for image in captions:
            caption_rows += image
        hypotheses = padded(caption_rows).unflatten(0, (len(captions), -1))
        return self.score(hypotheses, padded(reference_rows).unflatten(0, (-1, most)), number)

    def compute_score(self, gts, res):
        """The mean score and a list of each image's, for a scorer made by `of_sentences`.

        gts: {key: reference sentences}; res: {key: [sentence]}; all are tokenised.
        """
        vocabulary = dict(self.vocabulary)  # a copy, which takes up the new words
        hypotheses = [[_encode(res[key][0], vocabulary)] for key in gts]
        references = []
        for sentences in gts.values():
            references.append([_encode(sentence, vocabulary) for sentence in sentences])
        scores = self.score_ids(hypotheses, references)
        return scores.mean().item(), scores.squeeze(1).tolist()


def number_of_bigrams(captions):
    """The length of captions (..., T) as pycocoevalcap counts it: (...)."""
    return (captions != 0).sum(-1).sub(1).clamp(min=0)


def trimmed(captions):
    """captions (..., T) without the columns that are padding in all of them."""
    longest = int((captions != 0).sum(-1).max())
    return captions[..., :longest]


def _encode(sentence, vocabulary):
    """The token ids of a sentence; new words are added to the vocabulary {word: id}."""
    return [vocabulary.setdefault(word, len(vocabulary) + 1) for word in sentence.split()]
