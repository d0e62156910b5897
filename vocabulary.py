"""Words and token ids: how a caption is taken apart, and which words a captioner knows.

vocabulary = Vocabulary.build(map(tokenize, captions), min_word_freq=3)
vocabulary.decode(vocabulary.encode(["a", "dog"]))          # ["a", "dog"]
"""

from collections import Counter
from difflib import get_close_matches

import regex
import torch

from commandline import UserError, read_json, write_json

# As NLTK's RegexpTokenizer(r"\w+"), which takes a second to import. Unlike re, regex does not cut
# words at vowel signs and accents that are characters of their own.
_WORD = regex.compile(r"\w+")
# NLTK's English stop words, which NLTK would have to download: its list of before 2024, 179 words.
# The later list of 198 adds nothing but contractions such as "they're", which `tokenize` takes
# apart.
_STOP_WORDS = """
i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself
yourselves he him his himself she she's her hers herself it it's its itself they them their
theirs themselves what which who whom this that that'll these those am is are was were be been
being have has had having do does did doing a an the and but if or because as until while of at
by for with about against between into through during before after above below to from up down
in out on off over under again further then once here there when where why how all any both each
few more most other some such no nor not only own same so than too very s t can will just don
don't should should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn
doesn't hadn hadn't hasn hasn't haven haven't isn isn't ma mightn mightn't mustn mustn't needn
needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won won't wouldn wouldn't
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def tokenize(caption):
    """The words of a caption: lower case, punctuation separates ("A man's hat." -> a, man, s,
    hat)."""
    return _WORD.findall(caption.lower())


class Vocabulary:
    """Words and their token ids: <pad> is 0, then the kept words, <unk>, <start>, <end>.

    `words` is that full list; `pad`, `unk`, `start` and `end` are token ids.
    """

    def __init__(self, words):
        self.words = list(words)
        if self.words[:1] != ["<pad>"] or self.words[-3:] != ["<unk>", "<start>", "<end>"]:
            raise UserError(
                "this is not a vocabulary: it must begin with <pad> and end with "
                "<unk>, <start>, <end>"
            )
        self._ids = {word: token_id for token_id, word in enumerate(self.words)}
        self.pad = 0
        self.unk, self.start, self.end = range(len(self.words) - 3, len(self.words))

    @classmethod
    def build(cls, token_lists, min_word_freq):
        """The vocabulary of the words that occur at least `min_word_freq` times, in the order in
        which they are first seen."""
        counts = Counter()
        for tokens in token_lists:
            counts.update(tokens)
        kept = [word for word, count in counts.items() if count >= min_word_freq]
        return cls(["<pad>", *kept, "<unk>", "<start>", "<end>"])

    @property
    def kept(self):
        """The words of the captions, without the four that stand for something else."""
        return self.words[1:-3]

    def __len__(self):
        return len(self.words)

    def __contains__(self, word):
        return word in self._ids

    def nearest(self, word):
        """The kept words, at most three, that are spelt most like `word`, the nearest first."""
        return get_close_matches(word, self.kept)

    def encode(self, tokens):
        """The token id of each word, <unk>'s for an unknown one; no <start> or <end> is added."""
        return [self._ids.get(token, self.unk) for token in tokens]

    def decode(self, ids):
        """The words of `ids` (ints or a 1-d tensor) up to <end>, without <start> and <pad>; <unk>
        stays."""
        words = []
        for token_id in map(int, ids):
            if token_id == self.end:
                break
            if token_id not in (self.start, self.pad):
                words.append(self.words[token_id])
        return words

    def save(self, path):
        """Write the list of words as JSON."""
        write_json(path, self.words)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; UserError if `path` is missing or holds no vocabulary."""
        words = read_json(path)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            words = []  # which is no vocabulary either
        try:
            return cls(words)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def padded(captions):
    """Lists of token ids -> long (captions, longest), padded with 0, which is <pad> in every
    vocabulary."""
    longest = max(map(len, captions), default=0)
    result = torch.zeros(len(captions), longest, dtype=torch.long)
    for row, caption in zip(result, captions):
        row[: len(caption)] = torch.tensor(caption, dtype=torch.long)
    return result
