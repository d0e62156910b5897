"""What a training step minimises: cross-entropy, LRP-inference with cross-entropy (both published
forms), SCST, and SCST of LRP-inference. trainer.py is the loop around it.

An objective is called with the encoder's inputs, the region features, the captions (on the CPU) and
the indices of a batch. It returns the loss, a mean over words, and a dict of figures to log, among
them "words", the number of these words. The objectives of given captions also have `loss`, which
takes the inputs and targets of teacher forcing instead of choosing among captions. Nothing in a
step of cross-entropy waits for the device.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from decoding import greedy, multinomial
from explanation import METHODS, PIXELS_PER_PASS, propagate
from lrp_utils import inference_weights, safe_ratio, summed
from names import CROSS_ENTROPY
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.ciderd.ciderd import CiderD
from vocabulary import STOP_WORDS, padded, tokenize


@dataclass(frozen=True)
class ObjectiveConfig:
    """The settings of all objectives; each reads those that concern it.

    captions_per_image   captions of each image that a step of cross-entropy or LRP-inference sees
    ss_prob              scheduled sampling: probability of feeding back a predicted word
    label_smoothing      how much of the target's probability goes to all words alike
    lrp_lambda           weight of the plain cross-entropy in LRP-inference, 0 to 1
    lrp_form             "last_layer" or "image", the two published forms of LRP-inference
    lrp_control          of LRP_CONTROLS: what takes the place of relevance in the last layer's form
    samples              captions that SCST draws for an image
    scst_baseline        reward to beat: "greedy", of the greedy caption, or "others", the mean of
                         the other samples
    bleu_weight          weight of BLEU-4 beside CIDEr-D in SCST's reward
    """

    captions_per_image: int = 5
    ss_prob: float = 0.0
    label_smoothing: float = 0.0
    lrp_lambda: float = 0.5
    lrp_form: str = "last_layer"
    lrp_control: str = "none"
    samples: int = 5
    scst_baseline: str = "greedy"
    bleu_weight: float = 0.0


def build_objective(mode, captioner, references, config):
    """The objective of a mode: CROSS_ENTROPY or one of names.TUNING_MODES.

    references: for each training image its raw captions, from which SCST's reward is made.
    LRP-inference with lambda 1 is cross-entropy, its baseline. As LRP-inference itself, this has no
    doubly stochastic loss, which belongs to the first training.
    """
    if mode == CROSS_ENTROPY or (mode == "lrp_tune" and config.lrp_lambda == 1):
        return CrossEntropy(
            captioner,
            config.captions_per_image,
            config.ss_prob,
            config.label_smoothing,
            captioner.attention_penalty if mode == CROSS_ENTROPY else 0.0,
        )
    if mode == "lrp_tune" and config.lrp_form == "image":
        return ImageLRPInference(captioner, config.captions_per_image, config.lrp_lambda)
    if mode == "lrp_tune":
        return LRPInference(
            captioner, config.captions_per_image, config.lrp_lambda, config.lrp_control
        )
    inference = LRPInference(captioner) if mode == "lrp_cider_tune" else None
    return SCST(
        captioner,
        references,
        config.samples,
        config.scst_baseline,
        config.bleu_weight,
        inference,
    )


def precise(x):
    """x in float32 if autocast made it coarser."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def training_batch(captions, captions_per_image, pad):
    """Captions (B, 5, L) -> inputs and targets (B, N, T) of teacher forcing.

    N of the five captions are drawn anew. They come in falling order of length, and are cut to the
    longest one.
    """
    order = torch.rand(captions.shape[:2]).argsort(dim=1)[:, :captions_per_image]
    lengths = (captions != pad).sum(-1)
    by_length = lengths.gather(1, order).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, by_length)
    captions = captions.gather(1, order.unsqueeze(-1).expand(-1, -1, captions.shape[-1]))
    longest = int(lengths.gather(1, order).max())
    return captions[..., : longest - 1], captions[..., 1:longest]


class TeacherForcing:
    """The inputs of a batch on a device, and the positions whose targets count.

    inputs      (B, N, T) token ids, on the device
    counted     (B, N, T) whether a position counts, on the device
    lengths     (B, N) the inputs of each caption that count, on the CPU
    rows        (M,) where the M positions that count lie among all B*N*T, on the device
    target_ids  (M,) the tokens to be said there, on the device

    Padding is only looked for on the CPU, where a GPU need not be waited for.
    """

    def __init__(self, inputs, targets, pad, device):
        mask = targets != pad
        rows = mask.flatten().nonzero().flatten()
        self.lengths = mask.sum(-1).cpu()
        self.inputs = inputs.to(device, non_blocking=True)
        self.counted = mask.to(device, non_blocking=True)
        self.rows = rows.to(device, non_blocking=True)
        self.target_ids = targets[mask].to(device, non_blocking=True)

    def pick(self, values):
        """(B, N, T, H) -> (M, H), those of the positions that count."""
        return values.flatten(0, -2)[self.rows]

    def pick_all(self, addends):
        """As `pick`, of every addend."""
        return [self.pick(addend) for addend in addends]


def doubly_stochastic_loss(attention, counted, regions=None):
    """The sum over captions and regions i of (1 - sum_t alpha_ti)^2, () (Xu et al. 2015, eq. 14).

    It is least where a caption has looked at each region alike.

    attention: (B, N, T, heads, L), of which the mean over heads counts; counted: bool (B, N, T),
    the steps that count; regions: bool (B, L), those that are no padding, or None if all are.
    """
    weights = precise(attention).mean(dim=3) * counted.unsqueeze(-1)
    missing = 1 - weights.sum(dim=2)  # (B, N, L)
    if regions is not None:
        missing = missing * regions.unsqueeze(1)
    return missing.square().sum()


class CrossEntropy:
    """The cross-entropy of given captions.

    captions_per_image: how many of an image's five captions a step draws; ss_prob: the probability
    of scheduled sampling; label_smoothing: how much of the target's probability goes to all words;
    attention_penalty: the weight of `doubly_stochastic_loss`. That is divided by the number of
    words, as the cross-entropy is, so both keep the proportion that they have in a caption's loss.
    """

    def __init__(
        self,
        captioner,
        captions_per_image=5,
        ss_prob=0.0,
        label_smoothing=0.0,
        attention_penalty=0.0,
    ):
        self.captioner = captioner
        self.captions_per_image = captions_per_image
        self.ss_prob = ss_prob
        self.label_smoothing = label_smoothing
        self.attention_penalty = attention_penalty
        self.pad = captioner.vocabulary.pad

    def __call__(self, images, features, captions, indices):
        """Draw captions and return their loss, as `loss` does.

        images: what the encoder was given (B, ...); features: float (B, L, D); captions: long
        (B, 5, L), `<start>` first, padded, on the CPU; indices: long (B,), of the images.
        """
        inputs, targets = training_batch(captions, self.captions_per_image, self.pad)
        return self.loss(features, inputs, targets, images)

    def loss(self, features, inputs, targets, images=None):
        """The loss () of teacher forcing and the figures of the step.

        features: float (B, L, D); inputs and targets: long (B, N, T), on any device, targets
        padded; images: needed by the image form of LRP-inference only. With an attention_penalty
        the figure "attention_loss" says how much of the loss that is.
        """
        batch = TeacherForcing(inputs, targets, self.pad, self.captioner.device)
        unrolled = self.captioner.teacher_forced(
            features, batch.inputs, self.ss_prob, batch.lengths
        )
        losses = self.losses(batch.pick_all(unrolled.addends), batch.target_ids)
        words = len(batch.target_ids)
        if not self.attention_penalty:
            return losses.mean(), {"words": words}
        regions = self.captioner.encoder.region_mask(features)
        unevenness = doubly_stochastic_loss(unrolled.attention, batch.counted, regions)
        penalty = self.attention_penalty * unevenness / words
        return losses.mean() + penalty, {"words": words, "attention_loss": penalty.detach()}

    def losses(self, addends, target_ids):
        """Cross-entropy (M,) in nats of the targets (M,), from the last layer's addends (M, H)."""
        return F.cross_entropy(
            precise(self.captioner.last_layer(addends)),
            target_ids,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )


def quiet_words(vocabulary):
    """Which words are never re-weighted: bool (V,), the special tokens and NLTK's stop words."""
    specials = {vocabulary.pad, vocabulary.unk, vocabulary.start, vocabulary.end}
    quiet = [
        token_id in specials or word in STOP_WORDS for token_id, word in enumerate(vocabulary.words)
    ]
    return torch.tensor(quiet)


# The controls of LRP-inference take the place of `inference_weights`, and have its arguments: the
# addends (M, H) of the last layer's input, the rows (M, H) of its weights for the M predicted
# words, and the words' logits (M,). Each returns a weight (M, H) for every addend.


def random_weights(addends, rows, scores):
    """LRP-inference's weights, permuted over the units: for each word and addend another order."""
    weights = []
    for omega in inference_weights(addends, rows, scores):
        order = torch.rand_like(omega).argsort(dim=-1)
        weights.append(omega.gather(-1, order))
    return weights


def shuffled_weights(addends, rows, scores):
    """LRP-inference's weights, each word having those of another word of the batch.

    The words are put in a circle in random order, and each gets the weights of the one before it,
    so that no word keeps its own unless it is the only one.
    """
    omegas = inference_weights(addends, rows, scores)
    circle = torch.randperm(len(scores), device=scores.device)
    before = torch.empty_like(circle)
    before[circle] = circle.roll(1)
    return [omega[before] for omega in omegas]


def magnitude_weights(addends, rows, scores):
    """1 + |z| / max|z|, where z is the addend: its size takes the place of its relevance."""
    weights = []
    for addend in addends:
        size = addend.abs()
        weights.append(1 + safe_ratio(size, size.amax(-1, keepdim=True)))
    return weights


def temperature_weights(addends, rows, scores):
    """One number for all units of a word, as a temperature is for its logits.

    It is such that the predicted word's logit, less its bias, is what LRP-inference's weights make
    of it, but from 0 to 2, as those weights are.
    """
    weighted = 0
    for omega, addend in zip(inference_weights(addends, rows, scores), addends):
        weighted = weighted + (omega * addend * rows).sum(-1, keepdim=True)
    plain = (summed(addends) * rows).sum(-1, keepdim=True)
    factor = safe_ratio(weighted, plain).clamp(0, 2)
    return [factor.expand_as(addend) for addend in addends]


LRP_CONTROLS = {
    "none": inference_weights,
    "random": random_weights,
    "shuffled": shuffled_weights,
    "magnitude": magnitude_weights,
    "temperature": temperature_weights,
}


class LRPInference(CrossEntropy):
    """LRP-inference fine-tuning (paper §4.4 and the final version).

    L = lambda * CE(p) + (1 - lambda) * CE(p_hat), where p_hat are the logits after the relevance of
    the *predicted* word, unless that is a stop word, has re-weighted what supports it.

    Here the final version's form: p_hat = fc(omega_c * c + omega_h * h), omega = 1 + R / max|R| of
    the word's relevance at the last layer; likewise for any other number of addends than two. No
    gradient goes through omega. One dropout mask serves both logits.

    control: of LRP_CONTROLS. Any other than "none" puts weights in the place of omega that know
    less, to tell whether relevance matters or whether any re-weighting would do.
    """

    def __init__(self, captioner, captions_per_image=5, lrp_lambda=0.5, control="none"):
        super().__init__(captioner, captions_per_image)
        self.lrp_lambda = lrp_lambda
        self.weights = LRP_CONTROLS[control]
        self.quiet = quiet_words(captioner.vocabulary).to(captioner.device)

    def eval_view(self):
        """The same objective of the captioner's eval view, whose dropout is off."""
        view = copy.copy(self)
        view.captioner = self.captioner.eval_view()
        return view

    def reweighted(self, addends, scores, token_ids):
        """What goes into the last layer for p_hat, (M, H).

        addends (M, H): those of the last layer's input; scores, token_ids (M,): the logits of the
        predicted words, and these words.
        """
        with torch.no_grad():
            rows = self.captioner.fc.weight[token_ids]
            omegas = self.weights([precise(addend) for addend in addends], rows, scores)
            quiet = self.quiet[token_ids].unsqueeze(-1)
            omegas = [torch.where(quiet, 1, omega) for omega in omegas]
        return summed([omega * addend for omega, addend in zip(omegas, addends)])

    def last_layer(self, addends):
        """The addends (..., H) of the last layer's input -> p_hat (..., V).

        It takes the place of a captioner's last layer in SCST.
        """
        shape = addends[0].shape[:-1]
        addends = self._dropped(addends)
        with torch.no_grad():
            scores, predicted = self.captioner.fc(summed(addends)).max(dim=-1)
        inputs = self.reweighted(addends, scores, predicted)
        return self.captioner.fc(inputs).unflatten(0, shape)

    def _dropped(self, addends):
        """(..., H) -> (M, H) each, under one dropout mask."""
        mask = self.captioner.dropout(torch.ones_like(addends[0]))
        return [(addend * mask).flatten(0, -2) for addend in addends]

    def losses(self, addends, target_ids):
        """As of CrossEntropy; p_hat is computed only where it is not p."""
        addends = self._dropped(addends)
        logits = precise(self.captioner.fc(summed(addends)))
        plain = F.cross_entropy(logits, target_ids, reduction="none")
        scores, predicted = logits.detach().max(dim=-1)
        rows = (~self.quiet[predicted]).nonzero().flatten()
        picked = [addend[rows] for addend in addends]
        inputs = self.reweighted(picked, scores[rows], predicted[rows])
        p_hat = precise(self.captioner.fc(inputs))
        other = F.cross_entropy(p_hat, target_ids[rows], reduction="none")
        return self._combined(plain, plain.index_copy(0, rows, other))

    def _combined(self, plain, inferred):
        return self.lrp_lambda * plain + (1 - self.lrp_lambda) * inferred


class ImageLRPInference(LRPInference):
    """The earlier form of LRP-inference (paper_v3, eqs. 10-12).

    p_hat is p, but for the logit of the predicted word, which is multiplied by m = 1 + mean(E).
    E is the word's LRP heat map of the image, divided by its largest absolute value.
    """

    def loss(self, features, inputs, targets, images=None):
        """As of CrossEntropy; images: (B, 3, H, W), ImageNet-normalised, on any device."""
        batch = TeacherForcing(inputs, targets, self.pad, self.captioner.device)
        logits = precise(self.captioner(features, batch.inputs, lengths=batch.lengths))
        scores, predicted = logits.max(dim=-1)  # (B, N, T)
        wanted = batch.counted & ~self.quiet[predicted]
        factors = self.image_factors(images.to(features.device), batch.inputs, predicted, wanted)
        inferred = logits.scatter(-1, predicted.unsqueeze(-1), (scores * factors).unsqueeze(-1))
        plain_losses = self._picked_losses(logits, batch)
        inferred_losses = self._picked_losses(inferred, batch)
        losses = self._combined(plain_losses, inferred_losses)
        return losses.mean(), {"words": len(batch.target_ids)}

    @staticmethod
    def _picked_losses(logits, batch):
        """Cross-entropy (M,) of logits (B, N, T, V) at the positions that count."""
        return F.cross_entropy(batch.pick(logits), batch.target_ids, reduction="none")

    def image_factors(self, images, inputs, predicted, wanted):
        """m (B, N, T) of the words predicted after the inputs; 1 where it is not wanted.

        images (B, 3, H, W); inputs and predicted: token ids (B, N, T); wanted: bool (B, N, T).
        """
        factors = torch.ones(predicted.shape, dtype=images.dtype, device=images.device)
        for caption in range(predicted.shape[1]):
            factors[:, caption] = self._caption_factors(
                images, inputs[:, caption], predicted[:, caption], wanted[:, caption]
            )
        return torch.where(wanted, factors, 1.0)

    def _caption_factors(self, images, inputs, predicted, wanted):
        """As `image_factors`, of one caption an image: (B, T), arbitrary where it is not wanted."""
        factors = torch.ones(predicted.shape, dtype=images.dtype, device=images.device)
        most = max(1, int(wanted.sum(-1).max()))
        # (B, K) positions, those that are wanted first
        positions = wanted.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
        images_per_pass = max(1, PIXELS_PER_PASS // (most * images[0, 0].numel()))
        for first in range(0, len(images), images_per_pass):
            part = slice(first, first + images_per_pass)
            found = propagate(
                self.captioner,
                images[part],
                inputs[part],
                predicted[part],
                positions[part],
                METHODS["lrp"],
            )
            maps = found["image_relevance"].flatten(2)  # (B, K, pixels)
            largest = maps.abs().amax(-1).clamp(min=torch.finfo(maps.dtype).tiny)
            factors[part] = factors[part].scatter(1, positions[part], 1 + maps.mean(-1) / largest)
        return factors


class Speaker:
    """A captioner as the decoders see it, whose words come from another last layer.

    last_layer: a function of the addends (..., H) of the last layer's input -> logits (..., V).
    """

    def __init__(self, captioner, last_layer):
        self.captioner = captioner
        self.last_layer = last_layer
        self.vocabulary = captioner.vocabulary

    def image_memory(self, features):
        """Region features (B, L, D) -> the captioner's Memory of the images."""
        return self.captioner.image_memory(features)

    def initial_state(self, memory, captions):
        """The captioner's state before the first word of so many captions of each image."""
        return self.captioner.initial_state(memory, captions)

    def next_words(self, token_ids, state, memory):
        """As the captioner's `next_words`, of the other last layer."""
        return self.captioner.next_words(token_ids, state, memory, self.last_layer)


class SCST:
    """Self-critical sequence training (Rennie et al. 2017).

    It raises the log-probability of sampled captions by how much more reward they get than a
    baseline. Captions are drawn in eval mode, step by step; their log-probabilities come from one
    teacher-forced pass.

    references     for each image its raw captions
    samples        captions drawn for an image
    baseline       "greedy", the reward of the greedy caption, or "others", the mean reward of the
                   other samples
    bleu_weight    the reward is CIDEr-D (document frequencies of all references) + bleu_weight *
                   BLEU-4, with `<end>` counted on both sides
    inference      an LRPInference, whose p_hat is then sampled from and trained; or None
    """

    def __init__(
        self, captioner, references, samples=5, baseline="greedy", bleu_weight=0.0, inference=None
    ):
        self.captioner = captioner
        self.samples = samples
        self.baseline = baseline
        self.bleu_weight = bleu_weight
        self.inference = inference
        self.references = [self._encoded(captions) for captions in references]
        self.scorer = CiderD(self.references, device=captioner.device)

    def _encoded(self, captions):
        """Raw captions -> lists of token ids that end with `<end>`."""
        vocabulary = self.captioner.vocabulary
        return [[*vocabulary.encode(tokenize(raw)), vocabulary.end] for raw in captions]

    def __call__(self, images, features, captions, indices):
        """Sample captions and return the loss of the step, and figures with reward and baseline.

        features: float (B, L, D); indices: long (B,), of the images; images and captions, which the
        other objectives read, are not used.
        """
        sampled, rewards, baseline = self.draw(features.detach(), indices.tolist())
        losses = self.losses(features, sampled, rewards - baseline)
        figures = {"words": len(losses), "reward": rewards.mean(), "baseline": baseline.mean()}
        return losses.mean(), figures

    def losses(self, features, sampled, advantages):
        """Negative log-probability times advantage of each of the M sampled tokens, (M,).

        features (B, L, D); sampled: token ids with `<end>`, S captions an image; advantages (B, S).
        """
        vocabulary = self.captioner.vocabulary
        flat = [token_ids for image in sampled for token_ids in image]
        targets = padded(flat).unflatten(0, (-1, self.samples))  # (B, S, T)
        inputs = F.pad(targets[..., :-1], (1, 0), value=vocabulary.start)
        batch = TeacherForcing(inputs, targets, vocabulary.pad, features.device)
        unrolled = self.captioner.teacher_forced(features, batch.inputs, lengths=batch.lengths)
        addends = batch.pick_all(unrolled.addends)
        last_layer = self.inference.last_layer if self.inference else self.captioner.last_layer
        logits = precise(last_layer(addends)) + self.captioner.silence
        advantages = advantages.unsqueeze(-1).expand(targets.shape).unsqueeze(-1)
        advantages = batch.pick(advantages).squeeze(-1)
        return F.cross_entropy(logits, batch.target_ids, reduction="none") * advantages

    @torch.no_grad()
    def draw(self, features, indices):
        """Sample captions of each image.

        Returns the captions (token ids with `<end>`), their rewards (B, S) and the baseline, (B, 1)
        of a greedy caption or (B, S) of the other samples.
        """
        captioner = self.captioner.eval_view()
        longest = captioner.config.max_length
        speaker = captioner
        if self.inference:
            speaker = Speaker(captioner, self.inference.eval_view().last_layer)
        drawn = multinomial(speaker, features, longest, self.samples, temperature=1.0)
        sampled = self._ended(drawn)
        rewards = self.rewards(sampled, indices).to(features.device)
        if self.baseline == "greedy":
            likeliest = self._ended(greedy(captioner, features, longest))
            baseline = self.rewards(likeliest, indices).to(features.device)
        else:
            baseline = (rewards.sum(1, keepdim=True) - rewards) / (self.samples - 1)
        return sampled, rewards, baseline

    def _ended(self, captions):
        """Captions with the `<end>` that they said; one of the full length said none."""
        ended = []
        for image in captions:
            ended.append([self._with_end(token_ids) for token_ids in image])
        return ended

    def _with_end(self, token_ids):
        if len(token_ids) < self.captioner.config.max_length:
            return [*token_ids, self.captioner.vocabulary.end]
        return token_ids

    def rewards(self, captions, indices):
        """Captions (token ids) of the images of these indices -> float (B, captions an image)."""
        references = [self.references[index] for index in indices]
        rewards = self.scorer.score_ids(captions, references).float()
        if self.bleu_weight:
            rewards = rewards + self.bleu_weight * self._bleu(captions, references).to(rewards)
        return rewards

    def score_words(self, predictions, references):
        """Mean CIDEr-D of captions as the reward counts it.

        predictions: {key: list of words}; references: {key: raw captions}.
        """
        vocabulary = self.captioner.vocabulary
        known = [self._encoded(references[key]) for key in predictions]
        captions = self._ended([[vocabulary.encode(words)] for words in predictions.values()])
        return self.scorer.score_ids(captions, known).mean().item()

    @staticmethod
    def _bleu(captions, references):
        """Sentence BLEU-4 (pycocoevalcap's) of each caption: (B, captions an image)."""
        gts = {}
        res = {}
        for row, image in enumerate(captions):
            known = [_as_text(token_ids) for token_ids in references[row]]
            for column, token_ids in enumerate(image):
                gts[row, column] = known
                res[row, column] = [_as_text(token_ids)]
        _, scores = Bleu(4).compute_score(gts, res, verbose=0)
        return torch.tensor(scores[3]).view(len(captions), -1)


def _as_text(token_ids):
    return " ".join(map(str, token_ids))
