"""BERTScore (Zhang et al. 2020) with the interface of pycocoevalcap's scorers, by the package bert-score.

The paper reports F with idf weights. Its authors' code takes the mean over all pairs of a caption and a reference; the package's
own convention is the best reference. Both are here.
"""

import json
from pathlib import Path

import torch

from pycocoevalcap.java import ScorerUnavailable


class BertScore:
    """model: the name of a Hugging Face model that is on this machine, or a folder; layer: whose embeddings are compared
    (default: the one that bert-score recommends for a model of this name, else the last); idf: weigh words by the inverse document
    frequency in the references. ScorerUnavailable if the package or the model is missing: nothing is downloaded unasked."""

    def __init__(self, model="roberta-large", layer=None, idf=True, device="cpu", batch_size=64):
        try:
            import bert_score
            from bert_score.utils import model2layers
        except ImportError:
            raise ScorerUnavailable(
                "the package bert-score is not installed; pip install bert-score==0.3.13"
            ) from None
        folder = local_model(model)
        if layer is None:
            config = json.loads((folder / "config.json").read_text())
            layer = (
                model2layers.get(model)
                or model2layers.get(folder.name)
                or config.get("num_hidden_layers")
                or config.get("n_layers")
            )
        self.idf, self.layer = idf, layer
        try:
            self.scorer = bert_score.BERTScorer(
                model_type=str(folder), num_layers=layer, device=str(device), batch_size=batch_size
            )
        except (OSError, ValueError, KeyError, AssertionError) as error:
            raise ScorerUnavailable(
                f"BERTScore cannot use {model} with layer {layer} ({str(error).split(chr(10))[0]})"
            ) from None

    def compute_score(self, gts, res):
        """{key: reference sentences}, {key: [sentence]} -> mean F over all pairs, and each image's mean and best (N, 2).

        A pair of which one side is empty scores 0.
        """
        pairs = [
            (index, res[key][0], reference)
            for index, key in enumerate(gts)
            for reference in gts[key]
        ]
        filled = [
            place
            for place, (_, caption, reference) in enumerate(pairs)
            if caption.strip() and reference.strip()
        ]
        self.scorer._idf = self.idf  # so that one loaded model serves both
        if self.idf:
            self.scorer.compute_idf([reference for _, _, reference in pairs if reference.strip()])
        values = torch.zeros(len(pairs))
        if filled:
            _, captions, references = zip(*(pairs[place] for place in filled))
            values[filled] = self.scorer.score(list(captions), list(references))[2]
        owners = torch.tensor([index for index, *_ in pairs])
        counts = torch.bincount(owners, minlength=len(gts))
        mean = torch.zeros(len(gts)).index_add(0, owners, values) / counts
        best = torch.full((len(gts),), -torch.inf).scatter_reduce(0, owners, values, "amax")
        return values.mean().item(), torch.stack([mean, best], dim=1)


def local_model(name):
    """The folder of a model: `name` itself, or where Hugging Face's cache keeps it. ScorerUnavailable if it is not here."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (
        Exception
    ):  # the kinds of errors differ between versions, and all mean that it is not here
        raise ScorerUnavailable(
            f"the model {name} is not on this machine; run: hf download {name}, or give --bert_model FOLDER"
        ) from None
