"""What a training step minimises: cross-entropy, LRP-inference with cross-entropy (both published forms), SCST, and SCST of
LRP-inference. train.py is the loop around it.

An objective is called with the encoder's inputs, the region features, the captions (on the CPU) and the indices of a batch, and
returns the loss, a mean over words, and a dict of figures to log, among them the number of these words. Nothing in a step of
cross-entropy waits for the device.
"""

import copy
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from decoding import greedy, multinomial
from explanation import METHODS, PIXELS_PER_PASS, propagate
from lrp_utils import inference_weights, summed
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.ciderd.ciderd import CiderD
from vocabulary import STOP_WORDS, padded, tokenize


def precise(x):
    """x in float32 if autocast made it coarser."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def training_batch(captions, captions_per_image, pad):
    """Captions (B, 5, L) -> inputs and targets (B, N, T): N of the five, drawn anew, the longest first, cut to the longest."""
    order = torch.rand(captions.shape[:2]).argsort(dim=1)[:, :captions_per_image]
    lengths = (captions != pad).sum(-1)
    order = order.gather(1, lengths.gather(1, order).argsort(dim=1, descending=True, stable=True))
    captions = captions.gather(1, order.unsqueeze(-1).expand(-1, -1, captions.shape[-1]))
    longest = int(lengths.gather(1, order).max())
    return captions[..., : longest - 1], captions[..., 1:longest]


class TeacherForcing:
    """Inputs (B, N, T) on a device, and where they count: `lengths` (B, N) on the CPU, and `rows`, the places of the M target words
    among all B*N*T; `targets` (M,) are these words. Padding is only looked for on the CPU, where a GPU need not be waited for."""

    def __init__(self, inputs, targets, pad, device):
        mask = targets != pad
        self.lengths = mask.sum(-1).cpu()
        parts = inputs, mask.flatten().nonzero().flatten(), targets[mask]
        self.inputs, self.rows, self.targets = (
            part.to(device, non_blocking=True) for part in parts
        )

    def pick(self, parts):
        """Parts (B, N, T, H) -> (M, H) each."""
        return tuple(part.flatten(0, -2)[self.rows] for part in parts)


class CrossEntropy:
    """The cross-entropy of the five captions, with scheduled sampling and label smoothing if asked for."""

    def __init__(self, captioner, captions_per_image=5, ss_prob=0.0, label_smoothing=0.0):
        self.captioner, self.captions_per_image, self.ss_prob, self.label_smoothing = (
            captioner,
            captions_per_image,
            ss_prob,
            label_smoothing,
        )
        self.pad = captioner.vocabulary.pad

    def words(self, captions):
        """Inputs and targets (B, N, T)."""
        return training_batch(captions, self.captions_per_image, self.pad)

    def __call__(self, images, features, captions, indices):
        words = TeacherForcing(*self.words(captions), self.pad, self.captioner.device)
        losses = self.losses(
            words, self.captioner(features, words.inputs, self.ss_prob, words.pick, words.lengths)
        )
        return losses.mean(), {"words": len(words.targets)}

    def losses(self, words, parts):
        """Cross-entropy (M,) in nats of the target words, from parts context and hidden (M, H)."""
        return F.cross_entropy(
            precise(self.captioner.last_layer(parts)),
            words.targets,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )


def quiet_words(vocabulary):
    """Which words are never re-weighted: bool (V,), the special tokens and NLTK's English stop words."""
    specials = {vocabulary.pad, vocabulary.unk, vocabulary.start, vocabulary.end}
    return torch.tensor(
        [index in specials or word in STOP_WORDS for index, word in enumerate(vocabulary.words)]
    )


class LRPInference(CrossEntropy):
    """LRP-inference fine-tuning (paper §4.4 and the final version): L = share * CE(p) + (1 - share) * CE(p_hat), where p_hat are
    the logits after the relevance of the *predicted* word, unless that is a stop word, has re-weighted what speaks for it.

    Here the final version's form: p_hat = fc(omega_c * c + omega_h * h), omega = 1 + R / max|R| of the word's relevance at the
    last layer. No gradient goes through omega. One dropout mask serves both logits.
    """

    def __init__(self, captioner, captions_per_image=5, share=0.5):
        super().__init__(captioner, captions_per_image)
        self.share, self.quiet = share, quiet_words(captioner.vocabulary).to(captioner.device)

    def weighted(self, addends, scores, words):
        """addends (M, H) each, predicted words and their logits (M,) -> what goes into the last layer for p_hat, (M, H)."""
        with torch.no_grad():
            omegas = inference_weights(
                [precise(addend) for addend in addends], self.captioner.fc.weight[words], scores
            )
            omegas = [torch.where(self.quiet[words].unsqueeze(-1), 1, omega) for omega in omegas]
        return summed([omega * addend for omega, addend in zip(omegas, addends)])

    def last_layer(self, addends):
        """addends (..., H) -> p_hat (..., V), for SCST; a captioner's `last_layer`."""
        shape = addends[0].shape[:-1]
        addends = self._dropped(addends)
        with torch.no_grad():
            predicted = self.captioner.fc(summed(addends)).max(dim=-1)
        return self.captioner.fc(self.weighted(addends, *predicted)).unflatten(0, shape)

    def _dropped(self, addends):
        """(..., H) -> (M, H) each, under one dropout mask."""
        mask = self.captioner.dropout(torch.ones_like(addends[0]))
        return [(addend * mask).flatten(0, -2) for addend in addends]

    def losses(self, words, parts):
        """As of CrossEntropy; p_hat is computed only where it is not p."""
        addends = self._dropped(parts)
        logits = precise(self.captioner.fc(summed(addends)))
        plain = F.cross_entropy(logits, words.targets, reduction="none")
        scores, predicted = logits.detach().max(dim=-1)
        rows = (~self.quiet[predicted]).nonzero().flatten()
        inferred = self.captioner.fc(
            self.weighted([addend[rows] for addend in addends], scores[rows], predicted[rows])
        )
        return self._combined(
            plain,
            plain.index_copy(
                0, rows, F.cross_entropy(precise(inferred), words.targets[rows], reduction="none")
            ),
        )

    def _combined(self, plain, inferred):
        return self.share * plain + (1 - self.share) * inferred


class ImageLRPInference(LRPInference):
    """The earlier form of LRP-inference (paper_v3, eqs. 10-12): p_hat is p, but for the logit of the predicted word, which is
    multiplied by m = 1 + mean(E), E its LRP heat map of the image divided by its largest size."""

    def __call__(self, images, features, captions, indices):
        words = TeacherForcing(*self.words(captions), self.pad, self.captioner.device)
        logits = precise(self.captioner(features, words.inputs, lengths=words.lengths))
        scores, predicted = logits.max(dim=-1)
        wanted = (
            torch.zeros_like(predicted, dtype=torch.bool)
            .flatten()
            .index_fill(0, words.rows, True)
            .view_as(predicted)
        )
        factors = self.image_weights(
            images.to(features.device), words.inputs, predicted, wanted & ~self.quiet[predicted]
        )
        inferred = logits.scatter(-1, predicted.unsqueeze(-1), (scores * factors).unsqueeze(-1))
        losses = (
            F.cross_entropy(*words.pick([part]), words.targets, reduction="none")
            for part in (logits, inferred)
        )
        return self._combined(*losses).mean(), {"words": len(words.targets)}

    def image_weights(self, images, inputs, words, wanted):
        """m (B, N, T) of the words predicted after inputs (B, N, T), 1 where it is not wanted (bool)."""
        factors = torch.ones(words.shape, dtype=images.dtype, device=images.device)
        for caption in range(words.shape[1]):
            most = max(1, int(wanted[:, caption].sum(-1).max()))
            places = (
                wanted[:, caption].int().argsort(dim=-1, descending=True, stable=True)[:, :most]
            )  # (B, K), those wanted first
            step = max(1, PIXELS_PER_PASS // (most * images[0, 0].numel()))
            for first in range(0, len(images), step):
                part = slice(first, first + step)
                found = propagate(
                    self.captioner,
                    images[part],
                    inputs[part, caption],
                    words[part, caption],
                    places[part],
                    METHODS["lrp"],
                )
                maps = found["image_relevance"].flatten(2)  # (B, K, pixels)
                mean = maps.mean(-1) / maps.abs().amax(-1).clamp(min=torch.finfo(maps.dtype).tiny)
                factors[part, caption] = factors[part, caption].scatter(1, places[part], 1 + mean)
        return torch.where(wanted, factors, 1.0)


class SCST:
    """Self-critical sequence training (Rennie et al. 2017): raise the log-probability of sampled captions by how much more
    reward they get than a baseline.

    references: for each image its raw captions; samples: captions drawn for an image; baseline: "greedy", the greedy caption, or
    "others", the mean of the other samples; the reward is CIDEr-D (document frequencies of all references) + bleu_weight *
    BLEU-4, with `<end>` counted on both sides; inference: an LRPInference, whose p_hat is then sampled from and trained.

    Captions are drawn in eval mode, step by step; their log-probabilities come from one teacher-forced pass.
    """

    def __init__(
        self, captioner, references, samples=5, baseline="greedy", bleu_weight=0.0, inference=None
    ):
        self.captioner, self.samples, self.baseline, self.bleu_weight = (
            captioner,
            samples,
            baseline,
            bleu_weight,
        )
        self.inference = inference
        self.last_layer = inference.last_layer if inference else None
        vocabulary = captioner.vocabulary
        self.references = [
            [[*vocabulary.encode(tokenize(raw)), vocabulary.end] for raw in image]
            for image in references
        ]
        self.scorer = CiderD(self.references, device=captioner.device)

    def __call__(self, images, features, captions, indices):
        sampled, rewards, baseline = self.draw(features.detach(), indices.tolist())
        vocabulary = self.captioner.vocabulary
        targets = padded([words for image in sampled for words in image]).unflatten(
            0, (-1, self.samples)
        )
        words = TeacherForcing(
            F.pad(targets[..., :-1], (1, 0), value=vocabulary.start),
            targets,
            vocabulary.pad,
            features.device,
        )
        parts = self.captioner(features, words.inputs, last_layer=words.pick, lengths=words.lengths)
        logits = (
            precise((self.last_layer or self.captioner.last_layer)(parts)) + self.captioner.silence
        )
        (advantages,) = words.pick(
            [(rewards - baseline).unsqueeze(-1).expand(targets.shape).unsqueeze(-1)]
        )
        losses = F.cross_entropy(logits, words.targets, reduction="none") * advantages.squeeze(-1)
        return losses.mean(), {
            "words": len(words.targets),
            "reward": rewards.mean(),
            "baseline": baseline.mean(),
        }

    @torch.no_grad()
    def draw(self, features, indices):
        """Sampled captions (word ids with `<end>`) of each image, their rewards (B, S) and the baseline (B, 1) or (B, S)."""
        captioner, longest = self.captioner.eval_view(), self.captioner.config.max_length
        speaker = captioner
        if self.inference:
            inference = copy.copy(self.inference)  # its dropout has to be off too
            inference.captioner = captioner
            next_words = partial(captioner.next_words, last_layer=inference.last_layer)
            speaker = SimpleNamespace(
                vocabulary=captioner.vocabulary,
                image_memory=captioner.image_memory,
                initial_state=captioner.initial_state,
                next_words=next_words,
            )
        sampled = self._ended(multinomial(speaker, features, longest, self.samples))
        likeliest = (
            self._ended(greedy(captioner, features, longest)) if self.baseline == "greedy" else None
        )
        rewards = self.rewards(sampled, indices).to(features.device)
        if likeliest is not None:
            return sampled, rewards, self.rewards(likeliest, indices).to(features.device)
        return sampled, rewards, (rewards.sum(1, keepdim=True) - rewards) / (self.samples - 1)

    def _ended(self, captions):
        """Captions with the `<end>` that they said; one of the full length said none."""
        longest, end = self.captioner.config.max_length, self.captioner.vocabulary.end
        return [[words + [end] * (len(words) < longest) for words in image] for image in captions]

    def rewards(self, captions, indices):
        """Captions (word ids) of the images of these indices -> float (B, number of captions of an image)."""
        references = [self.references[index] for index in indices]
        rewards = self.scorer.score_ids(captions, references).float()
        return (
            rewards + self.bleu_weight * self._bleu(captions, references).to(rewards)
            if self.bleu_weight
            else rewards
        )

    def score_words(self, predictions, references):
        """Mean CIDEr-D of captions as the reward counts it: {key: words}, {key: raw sentences}."""
        vocabulary = self.captioner.vocabulary
        known = [
            [[*vocabulary.encode(tokenize(raw)), vocabulary.end] for raw in references[key]]
            for key in predictions
        ]
        captions = self._ended([[vocabulary.encode(words)] for words in predictions.values()])
        return self.scorer.score_ids(captions, known).mean().item()

    @staticmethod
    def _bleu(captions, references):
        """Sentence BLEU-4 (pycocoevalcap's) of each caption."""
        text = [[" ".join(map(str, words)) for words in image] for image in captions]
        known = [[" ".join(map(str, words)) for words in image] for image in references]
        gts = {
            (row, column): known[row]
            for row, image in enumerate(text)
            for column in range(len(image))
        }
        res = {
            (row, column): [sentence]
            for row, image in enumerate(text)
            for column, sentence in enumerate(image)
        }
        _, each = Bleu(4).compute_score(gts, res, verbose=0)
        return torch.tensor(each[3]).view(len(captions), -1)
