"""Words and token ids: how a caption is taken apart, and which words a captioner knows.

vocabulary = Vocabulary.build(map(tokenize, captions), min_word_freq=3)
vocabulary.decode(vocabulary.encode(["a", "dog"]))          # ["a", "dog"]
"""

from collections import Counter

import torch
from nltk.tokenize import RegexpTokenizer

from commandline import UserError, read_json, write_json

_TOKENIZER = RegexpTokenizer(r"\w+")
# NLTK's list of English stop words, which wants a download there: its 179 words of before 2024. The 198 of later add nothing but
# contractions such as "they're", which `tokenize` takes apart.
STOP_WORDS = frozenset(
    """
i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his himself she she's her
hers herself it it's its itself they them their theirs themselves what which who whom this that that'll these those am is are was
were be been being have has had having do does did doing a an the and but if or because as until while of at by for with about
against between into through during before after above below to from up down in out on off over under again further then once here
there when where why how all any both each few more most other some such no nor not only own same so than too very s t can will
just don don't should should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn
hasn't haven haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren
weren't won won't wouldn wouldn't
""".split()
)


def tokenize(caption):
    """The words of a caption: lower case, punctuation separates ("A man's hat." -> a, man, s, hat)."""
    return _TOKENIZER.tokenize(caption.lower())


class Vocabulary:
    """Words and their indices: <pad> is 0, then the kept words, <unk>, <start>, <end>. `words` is that full list."""

    def __init__(self, words):
        self.words = list(words)
        if self.words[:1] != ["<pad>"] or self.words[-3:] != ["<unk>", "<start>", "<end>"]:
            raise UserError(
                "this is not a vocabulary: it must begin with <pad> and end with <unk>, <start>, <end>"
            )
        self._index = {word: index for index, word in enumerate(self.words)}
        self.pad = 0
        self.unk, self.start, self.end = range(len(self.words) - 3, len(self.words))

    @classmethod
    def build(cls, token_lists, min_word_freq):
        """The vocabulary of the words that occur at least `min_word_freq` times, in first-seen order."""
        counts = Counter(token for tokens in token_lists for token in tokens)
        kept = [word for word, count in counts.items() if count >= min_word_freq]
        return cls(["<pad>", *kept, "<unk>", "<start>", "<end>"])

    @property
    def kept(self):
        """The words of the captions, without the four that stand for something else."""
        return self.words[1:-3]

    def __len__(self):
        return len(self.words)

    def __contains__(self, word):
        return word in self._index

    def encode(self, tokens):
        """The index of each token, <unk>'s for an unknown one; no <start> or <end> is added."""
        return [self._index.get(token, self.unk) for token in tokens]

    def decode(self, ids):
        """The words of `ids` (ints or a 1-d tensor) up to <end>, without <start> and <pad>; <unk> stays."""
        words = []
        for index in map(int, ids):
            if index == self.end:
                break
            if index not in (self.start, self.pad):
                words.append(self.words[index])
        return words

    def save(self, path):
        """Write the list of words as JSON."""
        write_json(path, self.words)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; UserError if `path` is missing or holds no vocabulary."""
        words = read_json(path)
        try:
            return cls(
                words
                if isinstance(words, list) and all(isinstance(word, str) for word in words)
                else []
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def padded(captions):
    """Lists of word ids -> long (captions, longest), padded with 0, which is <pad> in every vocabulary."""
    result = torch.zeros(len(captions), max(map(len, captions), default=0), dtype=torch.long)
    for row, caption in zip(result, captions):
        row[: len(caption)] = torch.tensor(caption, dtype=torch.long)
    return result
