"""CIDEr-D (Vedantam et al. 2015) with the document frequencies of a training corpus, as tensor operations.

pycocoevalcap's `Cider` computes the same formula with document frequencies of the very references that it scores against, one
caption at a time. Here the corpus is given once and whole batches are scored on any device, so it serves as a reward too.
"""

import torch

from vocabulary import padded

ROWS = 256  # hypotheses scored at once; bounds the memory of comparing n-grams
MULTIPLIERS = (
    -7046029254386353131,
    -4658895280553007687,
    -7723592293110705685,
)  # odd numbers without a pattern (splitmix64's)


class CiderD:
    """The scorer of one corpus. A document is the set of references of one image.

    documents: for each image a list of references, each a list of word ids from 1 (0 is padding); sigma: of the penalty on lengths
    that differ, in words.
    """

    def __init__(self, documents, n=4, sigma=6.0, device="cpu"):
        self.n, self.sigma, self.device = n, sigma, torch.device(device)
        owners = torch.tensor(
            [index for index, references in enumerate(documents) for _ in references]
        )
        captions = padded([caption for references in documents for caption in references])
        self.log_documents = (
            torch.tensor(float(len(documents)), dtype=torch.float64).log().to(self.device)
        )
        self.frequencies = [
            self._frequencies(self.keys(captions, order), owners) for order in range(1, n + 1)
        ]
        self.vocabulary = None

    @classmethod
    def of_sentences(cls, corpus, **options):
        """The scorer of {key: list of tokenised reference sentences}, for `compute_score`."""
        vocabulary = {}
        documents = [
            [_encode(sentence, vocabulary) for sentence in sentences]
            for sentences in corpus.values()
        ]
        scorer = cls(documents, **options)
        scorer.vocabulary = vocabulary
        return scorer

    @staticmethod
    def keys(captions, order):
        """captions (..., T) -> a number (..., max(T - order + 1, 0)) that stands for each n-gram of this order, 0 where it is cut.

        A 64-bit hash: among the 25 million n-grams of COCO the chance of a single collision is about 2e-5.
        """
        if captions.shape[-1] < order:
            return captions.new_zeros((*captions.shape[:-1], 0))
        mixed = captions * MULTIPLIERS[0]
        mixed = (mixed ^ (mixed >> 29)) * MULTIPLIERS[1]
        mixed = mixed ^ (mixed >> 32)
        key = torch.zeros_like(captions[..., order - 1 :])
        for place in range(order):
            key = key * MULTIPLIERS[2] + mixed[..., place : place + key.shape[-1]]
        return key.masked_fill((captions.unfold(-1, order, 1) == 0).any(-1), 0)

    def _frequencies(self, keys, owners):
        """The n-grams of the corpus, sorted, and the logarithm of the number of documents that each is in."""
        owners = owners.unsqueeze(1).expand_as(keys)[keys != 0]
        known, index = keys[keys != 0].unique(return_inverse=True)
        pairs = (owners * max(len(known), 1) + index).unique()
        counts = torch.bincount(pairs % max(len(known), 1), minlength=len(known))
        return known.to(self.device), counts.double().log().to(self.device)

    def _idf(self, keys, order):
        """The inverse document frequency (nats) of each n-gram; that of one not in the corpus is log N."""
        known, log_counts = self.frequencies[order - 1]
        if not len(known):
            return self.log_documents.expand(keys.shape)
        place = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
        return self.log_documents - torch.where(known[place] == keys, log_counts[place], 0.0)

    def score(self, hypotheses, references, number=None):
        """hypotheses (B, S, T) and references (B, M, T') of the same B images, word ids padded with 0 -> scores (B, S), 0..10.

        A reference of padding only does not count, unless `number` (B,) tells how many references each image has.
        """
        hypotheses, references = hypotheses.to(self.device), references.to(self.device)
        number = (references != 0).any(-1).sum(-1) if number is None else number.to(self.device)
        step = max(1, ROWS // hypotheses.shape[1])
        scores = [
            self._score(*part) for part in zip(hypotheses.split(step), references.split(step))
        ]
        return torch.cat(scores) / number.clamp(min=1).unsqueeze(-1)

    def _score(self, hypotheses, references):
        """As `score`, the sum over the references."""
        hypotheses, references = trimmed(hypotheses), trimmed(references)
        lengths = [
            (captions != 0).sum(-1).sub(1).clamp(min=0) for captions in (hypotheses, references)
        ]  # in bigrams, as pycocoevalcap
        difference = (lengths[0].unsqueeze(-1) - lengths[1].unsqueeze(-2)).double()  # (B, S, M)
        total = sum(
            self._similarity(self.keys(hypotheses, n), self.keys(references, n), n)
            for n in range(1, self.n + 1)
        )
        penalty = torch.exp(-(difference**2) / (2 * self.sigma**2))
        return 10 / self.n * (total * penalty).sum(-1)

    def _similarity(self, hypotheses, references, order):
        """n-grams (B, S, P) and (B, M, Q) -> clipped cosine of their tf-idf vectors (B, S, M). A sum over different n-grams is
        taken over all positions, each divided by how often its n-gram occurs."""
        (counts, weights, norm), (_, _, norm_of_references) = (
            self._vector(keys, order) for keys in (hypotheses, references)
        )
        found = (hypotheses[:, :, None, :, None] == references[:, None, :, None, :]).sum(
            -1
        )  # (B, S, M, P)
        clipped = (
            torch.minimum(found, counts.unsqueeze(2))
            * found
            / counts.clamp(min=1).unsqueeze(2).double()
        )
        product = (clipped * weights.square().unsqueeze(2)).sum(-1)
        norms = norm.unsqueeze(-1) * norm_of_references.unsqueeze(-2)
        return torch.where(norms > 0, product / norms.clamp(min=1e-300), 0.0)

    def _vector(self, keys, order):
        """n-grams (B, S, P) -> how often each occurs in its caption, its idf (0 where it is cut), and the norms (B, S)."""
        valid = keys != 0
        counts = (keys.unsqueeze(-1) == keys.unsqueeze(-2)).sum(-1) * valid
        weights = self._idf(keys, order) * valid
        return counts, weights, (counts * weights.square()).sum(-1).sqrt()

    def score_ids(self, captions, references):
        """As `score`, of lists of word ids: the captions of each image, as many for all of them, and its references -> (B, S)."""
        number = torch.tensor(list(map(len, references)))
        most = int(number.max())
        rows = padded(
            [words for image in references for words in image + [[]] * (most - len(image))]
        ).unflatten(0, (-1, most))
        hypotheses = padded([words for image in captions for words in image]).unflatten(
            0, (len(captions), -1)
        )
        return self.score(hypotheses, rows, number)

    def compute_score(self, gts, res):
        """{key: reference sentences}, {key: [sentence]}, tokenised -> the mean and a list of each image's score."""
        known = dict(self.vocabulary)
        hypotheses = [[_encode(res[key][0], known)] for key in gts]
        references = [[_encode(sentence, known) for sentence in gts[key]] for key in gts]
        scores = self.score_ids(hypotheses, references)
        return scores.mean().item(), scores.squeeze(1).tolist()


def trimmed(captions):
    """captions (..., T) without the columns that are padding in all of them."""
    return captions[..., : int((captions != 0).sum(-1).max())]


def _encode(sentence, vocabulary):
    """The ids of a sentence's words; new words are added to the vocabulary."""
    return [vocabulary.setdefault(word, len(vocabulary) + 1) for word in sentence.split()]
