"""BERTScore (Zhang et al. 2020) by the package bert-score, with the interface of pycocoevalcap.

The paper reports F with idf weights. Its authors' code takes the mean over all pairs of a caption
and a reference; the convention of the package is the best reference. Both are here.
"""

import json
from pathlib import Path

import torch

from pycocoevalcap.java import ScorerUnavailable


class BertScore:
    """The scorer of one language model.

    model: the name of a Hugging Face model that is on this machine, or a folder. layer: the layer
    whose embeddings are compared; None: the one that bert-score recommends for a model of this
    name, else the last. Nothing is downloaded: ScorerUnavailable if the package or the model is
    missing.
    """

    def __init__(self, model="roberta-large", layer=None, device="cpu", batch_size=64):
        try:
            import bert_score
        except ImportError:
            raise ScorerUnavailable(
                "the package bert-score is not installed; "
                "pip install bert-score==0.3.13 'transformers<5'"
            ) from None
        folder = local_model(model)
        if layer is None:
            layer = recommended_layer(model, folder)
        self.layer = layer
        try:
            self.scorer = bert_score.BERTScorer(
                model_type=str(folder), num_layers=layer, device=str(device), batch_size=batch_size
            )
        except (OSError, ValueError, KeyError, AssertionError) as error:
            first_line = str(error).split("\n")[0]
            raise ScorerUnavailable(
                f"BERTScore cannot use {model} with layer {layer} ({first_line})"
            ) from None

    def compute_score(self, gts, res, idf=True):
        """F of every caption with its references.

        gts: {key: reference sentences}; res: {key: [sentence]}; idf: weigh words by their inverse
        document frequency in the references. Returns the mean over all pairs, and for each of the
        N images the mean and the best over its references, (N, 2). A pair scores 0 if one of its
        two sentences is empty.
        """
        captions = []
        references = []
        owners = []  # the index of each pair's image
        for index, (key, own_references) in enumerate(gts.items()):
            for reference in own_references:
                captions.append(res[key][0])
                references.append(reference)
                owners.append(index)
        values = self._score_pairs(captions, references, idf)
        owners = torch.tensor(owners)
        counts = torch.bincount(owners, minlength=len(gts))
        mean = torch.zeros(len(gts)).index_add(0, owners, values) / counts
        best = torch.full((len(gts),), -torch.inf).scatter_reduce(0, owners, values, "amax")
        return values.mean().item(), torch.stack([mean, best], dim=1)

    def _score_pairs(self, captions, references, idf):
        """F of each pair of a caption and a reference: (pairs,)."""
        filled_captions = []
        filled_references = []
        positions = []
        for position, (caption, reference) in enumerate(zip(captions, references)):
            if caption.strip() and reference.strip():
                filled_captions.append(caption)
                filled_references.append(reference)
                positions.append(position)
        # bert-score fixes this when it loads a model; set here, one loaded model serves both ways.
        self.scorer._idf = idf
        if idf:
            self.scorer.compute_idf([reference for reference in references if reference.strip()])
        values = torch.zeros(len(captions))
        if positions:
            _, _, f_scores = self.scorer.score(filled_captions, filled_references)
            values[positions] = f_scores
        return values


def recommended_layer(model, folder):
    """The layer that bert-score recommends for a model of this name, else the model's last one."""
    from bert_score.utils import model2layers

    config = json.loads((folder / "config.json").read_text())
    return (
        model2layers.get(model)
        or model2layers.get(folder.name)
        or config.get("num_hidden_layers")
        or config.get("n_layers")
    )


def local_model(name):
    """The folder of a model: `name` itself, or the one in Hugging Face's cache.

    ScorerUnavailable if the model is not on this machine.
    """
    if (Path(name) / "config.json").is_file():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    # The kinds of errors differ between versions, and all mean that the model is not here.
    except Exception:
        raise ScorerUnavailable(
            f"the model {name} is not on this machine; run: hf download {name}, or name its folder"
        ) from None
