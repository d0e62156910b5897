"""The caption metrics, and what to say when one cannot be computed.

Related metrics form a family: a function that takes a `Captions` and returns {metric: value}. A
family that lacks a tool raises ScorerUnavailable with the reason, and `measure` goes on with the
others. A training validates with `caption_metrics`, which needs no Java.
"""

import functools
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from sklearn.metrics import average_precision_score

from bert.bertscore import BertScore
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.chair.chair import chair, mentioned_objects, object_phrases, true_objects
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.ciderd.ciderd import CiderD
from pycocoevalcap.java import Meteor, PTBTokenizer, ScorerUnavailable, Spice
from pycocoevalcap.rouge.rouge import Rouge
from vocabulary import tokenize

# The frequent object words of the paper's Table 5, as its authors' code lists them.
FREQUENT_OBJECT_WORDS = {
    "flickr": "dogs building person background field women hat ball children child water street "
    "boy dog girl men shirt people woman man",
    "coco": "clock kitchen picture water food pizza grass building bus sign bathroom baseball dog "
    "room cat plate train field tennis person table street woman people man",
}
# A word is frequent if at least so many training captions contain it; the paper's for Flickr30k.
LEAST_FREQUENCY = 50


class Tokens(NamedTuple):
    """The sentences of a `Captions`, split into tokens and joined again by single spaces.

    references    {key: list of sentences}
    predictions   {key: list of one sentence}
    corpus        {key: list of sentences}, empty if there are no training captions
    tokenizer     what split them: "PTB", or `\\w+` with the reason
    """

    references: dict
    predictions: dict
    corpus: dict
    tokenizer: str


@dataclass
class Captions:
    """Predicted captions and all that the metrics compare them with, by image key.

    predictions       {key: sentence}
    references        {key: list of raw sentences}
    annotated         {key: categories of the annotated objects}; None: nobody has annotated any
    categories        {category: words and phrases that name it}
    corpus            {key: list of raw training sentences}, for document frequencies, or None
    object_words      the frequent object words
    word_scores       {key: (len(object_words),)}, the largest probability that the captioner gave
                      to each of these words during the caption, or None
    main_objects      {key: category of the main object}, if the dataset knows it
    planted_pairs     list of (A, B): categories that the training images often show together, if
                      the dataset has planted any
    use_java          False: split every sentence by `\\w+`; the metrics that need Java are then
                      unavailable
    java_memory       the limit of Java's heap, as in -Xmx; None: each scorer's own
    meteor            a Meteor that is started already, as of `meteor_started`, or None
    bert_model        the model of BERTScore, and
    bert_layer        the layer whose embeddings it compares (None: the recommended one)
    device            where the tensors are
    """

    predictions: dict
    references: dict
    annotated: dict | None = None
    categories: dict = field(default_factory=dict)
    corpus: dict | None = None
    object_words: list = field(default_factory=list)
    word_scores: dict | None = None
    main_objects: dict = field(default_factory=dict)
    planted_pairs: list = field(default_factory=list)
    use_java: bool = True
    java_memory: str | None = None
    meteor: Meteor | None = None
    bert_model: str = "roberta-large"
    bert_layer: int | None = None
    device: str = "cpu"

    def __post_init__(self):
        if self.predictions.keys() != self.references.keys():
            raise ValueError("predictions and references are not of the same images")
        self.words = {key: tokenize(sentence) for key, sentence in self.predictions.items()}
        self.reference_words = {}
        for key in self.predictions:
            self.reference_words[key] = [tokenize(sentence) for sentence in self.references[key]]

    @functools.cached_property
    def ptb_tokens(self):
        """The `Tokens` of the Penn Treebank tokenizer. ScorerUnavailable without Java."""
        if not self.use_java:
            raise ScorerUnavailable("Java is switched off (use_java=False)")
        tokenizer = PTBTokenizer(self.java_memory)
        return Tokens(*tokenizer.tokenize(*self._sentences()), tokenizer="PTB")

    @functools.cached_property
    def tokens(self):
        """The `Tokens` of the Penn Treebank tokenizer, or, without Java, those of `\\w+`."""
        try:
            return self.ptb_tokens
        except ScorerUnavailable as reason:
            groups = [split_into_words(group) for group in self._sentences()]
            return Tokens(*groups, tokenizer=f"\\w+, since {reason}")

    def _sentences(self):
        """The raw references, predictions and training captions, each {key: list of sentences}."""
        predictions = {key: [sentence] for key, sentence in self.predictions.items()}
        return self.references, predictions, self.corpus or {}

    @functools.cached_property
    def phrases(self):
        """The words and phrases that name an object, as `find_objects` takes them."""
        return object_phrases(self.categories)

    @functools.cached_property
    def words_of_references(self):
        """{key: the set of all words of all references of this image}."""
        return {key: set().union(*sentences) for key, sentences in self.reference_words.items()}


def split_into_words(group):
    """{key: raw sentences} -> {key: sentences of lower-case `\\w+` tokens}."""
    found = {}
    for key, sentences in group.items():
        found[key] = [" ".join(tokenize(sentence)) for sentence in sentences]
    return found


def bleu(captions):
    """BLEU-1 to BLEU-4 (Papineni et al. 2002) with the closest reference length."""
    tokens = captions.tokens
    scores, _ = Bleu(4).compute_score(tokens.references, tokens.predictions, verbose=0)
    return {f"BLEU-{n}": score for n, score in enumerate(scores, start=1)}


@contextmanager
def meteor_started(names, java_memory=None):
    """Start METEOR, if it is one of these names of METRICS, while the captions are being made.

    It loads its tables for seconds. Yields the Meteor, or None if it cannot be started; the metric
    then says why.
    """
    with ExitStack() as stack:
        scorer = None
        if "meteor" in names:
            with suppress(ScorerUnavailable):
                scorer = stack.enter_context(Meteor(java_memory).started())
        yield scorer


def meteor(captions):
    """METEOR 1.5 (Denkowski and Lavie 2014)."""
    tokens = captions.ptb_tokens
    scorer = captions.meteor or Meteor(captions.java_memory)
    score, _ = scorer.compute_score(tokens.references, tokens.predictions)
    return {"METEOR": score}


def rouge(captions):
    """ROUGE-L (Lin 2004) with beta 1.2."""
    tokens = captions.tokens
    score, _ = Rouge().compute_score(tokens.references, tokens.predictions)
    return {"ROUGE-L": score}


def cider(captions):
    """CIDEr as COCO's server computes it (Vedantam et al. 2015).

    The document frequencies are those of the references.
    """
    tokens = captions.tokens
    score, _ = Cider().compute_score(tokens.references, tokens.predictions)
    return {"CIDEr": score}


def cider_d(captions):
    """CIDEr-D with the document frequencies of the training captions."""
    if not captions.corpus:
        raise ScorerUnavailable("CIDEr-D needs the training captions (captions_train2017.json)")
    tokens = captions.tokens
    scorer = CiderD.of_sentences(tokens.corpus, device=captions.device)
    score, _ = scorer.compute_score(tokens.references, tokens.predictions)
    return {"CIDEr-D": score}


def spice(captions):
    """SPICE (Anderson et al. 2016)."""
    scorer = Spice(captions.java_memory)
    tokens = captions.ptb_tokens
    score, _ = scorer.compute_score(tokens.references, tokens.predictions)
    return {"SPICE": score}


def bertscore(captions):
    """BERTScore F (Zhang et al. 2020) in three versions.

    "BERTScore" is the paper's, with idf and as the mean over all pairs of a caption and a
    reference; "BERTScore-best" takes the best reference; "BERTScore-noidf" is the mean without idf.
    """
    references = captions.tokens.references
    predictions = captions.tokens.predictions
    scorer = BertScore(captions.bert_model, captions.bert_layer, device=captions.device)
    mean, each = scorer.compute_score(references, predictions, idf=True)
    mean_without_idf, _ = scorer.compute_score(references, predictions, idf=False)
    return {
        "BERTScore": mean,
        "BERTScore-best": each[:, 1].mean().item(),
        "BERTScore-noidf": mean_without_idf,
    }


def chair_metrics(captions):
    """CHAIR-i and CHAIR-s (Rohrbach et al. 2018).

    An object is in the image if it is annotated or if a reference names it.
    """
    if captions.annotated is None:
        raise ScorerUnavailable(
            "CHAIR needs to know the objects; "
            "give an instances file (instances_val2017.json), or prepare the dataset again"
        )
    truth = true_objects(captions.reference_words, captions.annotated, captions.phrases)
    per_object, per_caption, _ = chair(captions.words, truth, captions.phrases)
    if per_object is None:
        raise ScorerUnavailable("CHAIR: no caption names an object")
    return {"CHAIR-i": per_object, "CHAIR-s": per_caption}


def chosen_object_words(captions):
    """The frequent object words of the captions. ScorerUnavailable if there are none."""
    if not captions.object_words:
        raise ScorerUnavailable(
            f"no object word is in {LEAST_FREQUENCY} training captions; "
            "choose a list of object words"
        )
    return captions.object_words


def object_word_accuracy(captions):
    """Mean precision, recall and F1 of the frequent object words.

    A word that a caption says is right if a reference of that image says it. A word that no
    caption says has precision 0. What the paper calls mAP is this mean precision.
    """
    words = chosen_object_words(captions)
    precisions = []
    recalls = []
    f1s = []
    for word in words:
        said = images_with(word, captions.words)
        true = images_with(word, captions.words_of_references)
        right = len(said & true)
        precision = right / max(len(said), 1)
        recall = right / max(len(true), 1)
        precisions.append(precision)
        recalls.append(recall)
        f1s.append(2 * precision * recall / max(precision + recall, 1e-12))
    return {
        "object-word precision": sum(precisions) / len(words),
        "object-word recall": sum(recalls) / len(words),
        "object-word F1": sum(f1s) / len(words),
    }


def images_with(word, words):
    """The set of the keys of `words`, {key: words}, whose words contain this one."""
    return {key for key, own in words.items() if word in own}


def object_word_ap(captions):
    """Mean average precision of finding the images whose references say a frequent object word.

    The images are ranked by the largest probability that the captioner gave to the word during the
    caption. Words that no reference says are left out of the mean.
    """
    words = chosen_object_words(captions)
    if captions.word_scores is None:
        raise ScorerUnavailable(
            "the average precision needs the captioner's probabilities; "
            "score a checkpoint instead of a file of predictions"
        )
    keys = list(captions.predictions)
    scores = torch.stack([captions.word_scores[key] for key in keys])  # (images, words)
    values = []
    for column, word in enumerate(words):
        true = [word in captions.words_of_references[key] for key in keys]
        if any(true):
            values.append(average_precision_score(true, scores[:, column].tolist()))
    if not values:
        raise ScorerUnavailable("no reference says one of the frequent object words")
    return {"object-word AP": sum(values) / len(values)}


def diversity(captions):
    """Distinct-1 and distinct-2 (Li et al. 2016), the mean length and the number of words in use.

    Distinct-n is the number of different n-grams over the number of all n-grams.
    """
    unigrams = all_ngrams(captions.words.values(), 1)
    bigrams = all_ngrams(captions.words.values(), 2)
    return {
        "distinct-1": len(set(unigrams)) / max(len(unigrams), 1),
        "distinct-2": len(set(bigrams)) / max(len(bigrams), 1),
        "words per caption": len(unigrams) / len(captions.words),
        "different words": float(len(set(unigrams))),
    }


def all_ngrams(captions, n):
    """The n-grams of all captions (lists of words) as tuples, repeated ones included."""
    ngrams = []
    for words in captions:
        last = len(words) - n + 1
        ngrams += [tuple(words[position : position + n]) for position in range(last)]
    return ngrams


def planted(captions):
    """What a dataset with planted hallucinations tells.

    "names main object": the share of captions that name the main object. "planted hallucination":
    of the images with A as main object and without B, the share of captions that name B, over all
    planted pairs (A, B). A value is left out if there is no such image.
    """
    named = {
        key: mentioned_objects(words, captions.phrases) for key, words in captions.words.items()
    }
    names_main = [category in named[key] for key, category in captions.main_objects.items()]
    names_absent = []
    for main, companion in captions.planted_pairs:
        for key, category in captions.main_objects.items():
            if category == main and companion not in captions.annotated[key]:
                names_absent.append(companion in named[key])
    values = {}
    if names_main:
        values["names main object"] = sum(names_main) / len(names_main)
    if names_absent:
        values["planted hallucination"] = sum(names_absent) / len(names_absent)
    return values


METRICS = {
    "bleu": bleu,
    "meteor": meteor,
    "rouge": rouge,
    "cider": cider,
    "ciderd": cider_d,
    "spice": spice,
    "bertscore": bertscore,
    "chair": chair_metrics,
    "object_words": object_word_accuracy,
    "object_word_ap": object_word_ap,
    "diversity": diversity,
    "planted": planted,
}


def measure(captions, names=tuple(METRICS)):
    """Compute the named families of METRICS.

    Returns {metric: float}, {family: why it is unavailable}, and the name of the tokenizer used.
    """
    values = {}
    unavailable = {}
    for name in names:
        try:
            found = METRICS[name](captions)
        except ScorerUnavailable as reason:
            unavailable[name] = str(reason)
        else:
            values |= {metric: float(value) for metric, value in found.items()}
    return values, unavailable, captions.tokens.tokenizer


def caption_metrics(predictions, references):
    """BLEU-1 to BLEU-4 and CIDEr without Java, for validation.

    predictions: {key: list of words}; references: {key: raw sentences}. Returns {metric: float}.
    """
    sentences = {key: " ".join(words) for key, words in predictions.items()}
    values, _, _ = measure(Captions(sentences, references, use_java=False), ("bleu", "cider"))
    return values


def frequent_words(corpus, categories, least=LEAST_FREQUENCY):
    """The single words of the categories that at least `least` training captions contain.

    corpus: {key: raw sentences}; categories: {category: words and phrases}. The most frequent word
    comes first; words of equal frequency are in alphabetical order.
    """
    candidates = set()
    for phrases in categories.values():
        candidates.update(phrase for phrase in phrases if " " not in phrase)
    counts = Counter()
    for sentences in corpus.values():
        for sentence in sentences:
            counts.update(candidates.intersection(tokenize(sentence)))
    frequent = [word for word, count in counts.items() if count >= least]
    return sorted(frequent, key=lambda word: (-counts[word], word))
