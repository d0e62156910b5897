"""The caption metrics, one function a family, and what to say when one cannot be computed. Apart from evaluation.py because
train.py validates with them too.

A family takes a `Captions` and returns {name: value}; one that lacks a tool raises ScorerUnavailable with the reason, and
`measure` goes on with the rest.
"""

import functools
from dataclasses import dataclass, field

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
    "flickr": "dogs building person background field women hat ball children child water street boy dog girl men shirt people woman man",
    "coco": "clock kitchen picture water food pizza grass building bus sign bathroom baseball dog room cat plate train field tennis "
    "person table street woman people man",
}
LEAST_FREQUENCY = (
    50  # training captions that a word must be in to be frequent; the paper's for Flickr30k
)


@dataclass
class Captions:
    """What the metrics look at, by image key: predicted sentences and, all raw, what they are compared with.

    predictions       {key: sentence}
    references        {key: list of raw sentences}
    annotated         {key: categories of the annotated objects}, or None where nobody has annotated any
    categories        {category: words and phrases that name it}
    corpus            {key: list of raw training sentences}, for document frequencies, or None
    object_words      the frequent object words
    word_scores       {key: (len(object_words),) the captioner's largest probability of each while it spoke}, or None
    main_objects      {key: category} and
    planted_pairs     (A, B): only where the dataset says so
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
    java_memory: str | None = None
    bert_model: str = "roberta-large"
    bert_layer: int | None = None
    device: str = "cpu"

    def __post_init__(self):
        if self.predictions.keys() != self.references.keys():
            raise ValueError("predictions and references are not of the same images")
        self.words = {key: tokenize(sentence) for key, sentence in self.predictions.items()}
        self.reference_words = {
            key: list(map(tokenize, self.references[key])) for key in self.predictions
        }

    @functools.cached_property
    def ptb(self):
        """(references, predictions, training references) by the PTB tokenizer. ScorerUnavailable without Java."""
        predictions = {key: [sentence] for key, sentence in self.predictions.items()}
        return PTBTokenizer(self.java_memory).tokenize(
            self.references, predictions, self.corpus or {}
        )

    @functools.cached_property
    def tokenised(self):
        """As `ptb`, or by `\\w+` where there is no Java, and the name of what was used."""
        try:
            return *self.ptb, "PTB"
        except ScorerUnavailable as reason:
            groups = (
                self.references,
                {key: [sentence] for key, sentence in self.predictions.items()},
                self.corpus or {},
            )
            return *map(by_words, groups), f"\\w+, since {reason}"

    @functools.cached_property
    def phrases(self):
        """The words and phrases that name an object."""
        return object_phrases(self.categories)

    @property
    def some_object_words(self):
        """The frequent object words; ScorerUnavailable if there is none."""
        if not self.object_words:
            raise ScorerUnavailable(
                f"no object word is in {LEAST_FREQUENCY} training captions; choose a list with --object_words"
            )
        return self.object_words


def by_words(group):
    """{key: raw sentences} -> {key: sentences of lower-case `\\w+` tokens}."""
    return {
        key: [" ".join(tokenize(sentence)) for sentence in sentences]
        for key, sentences in group.items()
    }


def bleu(captions):
    """BLEU-1..4 (Papineni et al. 2002), closest reference length."""
    references, predictions, *_ = captions.tokenised
    scores, _ = Bleu(4).compute_score(references, predictions, verbose=0)
    return {f"BLEU-{n}": score for n, score in enumerate(scores, start=1)}


def meteor(captions):
    """METEOR 1.5."""
    references, predictions, _ = captions.ptb
    return {"METEOR": Meteor(captions.java_memory).compute_score(references, predictions)[0]}


def rouge(captions):
    """ROUGE-L (Lin 2004), beta 1.2."""
    references, predictions, *_ = captions.tokenised
    return {"ROUGE-L": Rouge().compute_score(references, predictions)[0]}


def cider(captions):
    """CIDEr (Vedantam et al. 2015) as COCO's server computes it: document frequencies of these references."""
    references, predictions, *_ = captions.tokenised
    return {"CIDEr": Cider().compute_score(references, predictions)[0]}


def cider_d(captions):
    """CIDEr-D with the document frequencies of the training captions."""
    if not captions.corpus:
        raise ScorerUnavailable(
            "CIDEr-D needs the training captions; give --train_annotations captions_train2017.json"
        )
    references, predictions, corpus, _ = captions.tokenised
    return {
        "CIDEr-D": CiderD.of_sentences(corpus, device=captions.device).compute_score(
            references, predictions
        )[0]
    }


def spice(captions):
    """SPICE (Anderson et al. 2016)."""
    scorer = Spice(captions.java_memory)
    references, predictions, _ = captions.ptb
    return {"SPICE": scorer.compute_score(references, predictions)[0]}


def bertscore(captions):
    """BERTScore F with idf over all pairs (the paper's), by the best reference, and over all pairs without idf."""
    references, predictions, *_ = captions.tokenised
    scorer = BertScore(captions.bert_model, captions.bert_layer, device=captions.device)
    mean, each = scorer.compute_score(references, predictions)
    scorer.idf = False
    return {
        "BERTScore": mean,
        "BERTScore-best": each[:, 1].mean().item(),
        "BERTScore-noidf": scorer.compute_score(references, predictions)[0],
    }


def hallucination(captions):
    """CHAIR-i and CHAIR-s, ground truth = annotated objects and those that the references name."""
    if captions.annotated is None:
        raise ScorerUnavailable(
            "CHAIR needs to know the objects; give --instances instances_val2017.json, or prepare the dataset again"
        )
    truth = true_objects(captions.reference_words, captions.annotated, captions.phrases)
    per_object, per_caption, _ = chair(captions.words, truth, captions.phrases)
    if per_object is None:
        raise ScorerUnavailable("CHAIR: no caption names an object")
    return {"CHAIR-i": per_object, "CHAIR-s": per_caption}


def object_words(captions):
    """Mean precision, recall and F1 of the frequent object words (what the paper calls mAP is their mean precision): a word
    that a caption says is right if a reference of that image says it. A word that no caption says has precision 0."""
    words = captions.some_object_words
    references = {
        key: set().union(*sentences) for key, sentences in captions.reference_words.items()
    }
    rows = []
    for word in words:
        said = {key for key, caption in captions.words.items() if word in caption}
        true = {key for key, known in references.items() if word in known}
        precision, recall = (len(said & true) / max(len(part), 1) for part in (said, true))
        rows.append((precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)))
    names = ("object-word precision", "object-word recall", "object-word F1")
    return {name: sum(values) / len(rows) for name, values in zip(names, zip(*rows))}


def object_word_ap(captions):
    """Mean over the frequent object words of the average precision of finding the images whose references say the word, by the
    largest probability that the captioner gave it while it spoke. Words that no reference says are left out."""
    words = captions.some_object_words
    if captions.word_scores is None:
        raise ScorerUnavailable(
            "the average precision needs the captioner's probabilities; give --checkpoint instead of --predictions"
        )
    keys = list(captions.predictions)
    references = [set().union(*captions.reference_words[key]) for key in keys]
    scores = torch.stack([captions.word_scores[key] for key in keys])
    values = []
    for column, word in enumerate(words):
        true = [word in known for known in references]
        if any(true):
            values.append(average_precision_score(true, scores[:, column].tolist()))
    if not values:
        raise ScorerUnavailable("no reference says one of the frequent object words")
    return {"object-word AP": sum(values) / len(values)}


def diversity(captions):
    """Distinct-1 and -2 (Li et al. 2016): different n-grams over all n-grams of the captions, the words of a caption, and how
    many words are in use."""
    sentences = captions.words.values()
    grams = {
        n: [tuple(words[i : i + n]) for words in sentences for i in range(len(words) - n + 1)]
        for n in (1, 2)
    }
    distinct = {f"distinct-{n}": len(set(found)) / max(len(found), 1) for n, found in grams.items()}
    return {
        **distinct,
        "words per caption": len(grams[1]) / len(captions.words),
        "different words": float(len(set(grams[1]))),
    }


def planted(captions):
    """Only for datasets that know: the share of captions that name the main object; and, of the images with A as main object
    and no B, of captions that name B, over all planted pairs (A, B)."""
    named = {
        key: mentioned_objects(words, captions.phrases) for key, words in captions.words.items()
    }
    main = [category in named[key] for key, category in captions.main_objects.items()]
    tempted = [
        b in named[key]
        for a, b in captions.planted_pairs
        for key, category in captions.main_objects.items()
        if category == a and b not in captions.annotated[key]
    ]
    found = {"names main object": main, "planted hallucination": tempted}
    return {name: sum(flags) / len(flags) for name, flags in found.items() if flags}


METRICS = {
    "bleu": bleu, "meteor": meteor, "rouge": rouge, "cider": cider, "ciderd": cider_d, "spice": spice, "bertscore": bertscore,
    "chair": hallucination, "object_words": object_words, "object_word_ap": object_word_ap, "diversity": diversity, "planted": planted,
}  # fmt: skip


def measure(captions, names=tuple(METRICS)):
    """Compute the named families of METRICS -> ({metric: float}, {family: why it is unavailable}, the tokens used)."""
    values, unavailable = {}, {}
    for name in names:
        try:
            values |= {metric: float(value) for metric, value in METRICS[name](captions).items()}
        except ScorerUnavailable as reason:
            unavailable[name] = str(reason)
    return values, unavailable, captions.tokenised[-1]


def caption_metrics(predictions, references):
    """BLEU-1..4 and CIDEr without Java, for validation: {key: list of words}, {key: raw sentences} -> dict of floats."""
    captions = Captions({key: " ".join(words) for key, words in predictions.items()}, references)
    captions.tokenised = (
        by_words(captions.references),
        {key: [s] for key, s in captions.predictions.items()},
        {},
        "\\w+",
    )
    return {name: float(value) for name, value in {**bleu(captions), **cider(captions)}.items()}


def frequent_words(corpus, categories, least=LEAST_FREQUENCY):
    """The single words of the categories that are in at least `least` training captions, the most frequent first."""
    candidates = {word for words in categories.values() for word in words if " " not in word}
    counts = {}
    for sentences in corpus.values():
        for sentence in sentences:
            for word in candidates.intersection(tokenize(sentence)):
                counts[word] = counts.get(word, 0) + 1
    return sorted(
        (word for word, count in counts.items() if count >= least),
        key=lambda word: (-counts[word], word),
    )
