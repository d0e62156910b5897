"""What all captioners share: look at an image, learn from captions, caption, explain, save and load.

    captioner = load_captioner("checkpoints/scenes-gridtd.pt", device="cpu")
    captions = captioner.caption(images, method="beam", beam_size=3)    # lists of words
    explanations = captioner.explain(images)                            # one Explanation an image

A model defines `look(features, rules)`, `start(memory, n)`, `word_inputs(embeddings, memory)` and `step(word_input, state,
memory, rules)`; the same forward serves training, decoding, gradients and LRP, which differ in `rules` (lrp_utils.py).
"""

import pkgutil
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import decoding
from commandline import UserError, write_tensors
from encoder import ENCODERS, Encoder
from gradient_utils import (
    GuidedReLU,
    attention_map,
    grad_cam,
    gradient,
    guided_grad_cam,
    input_x_gradient,
)
from lrp_utils import LRP, AlphaOneBetaZero, AttnLRP, TrueGradient
from vocabulary import Vocabulary, padded

CHECKPOINT_FORMAT = "image captioner 1"
CAPTIONED_AT_ONCE = 64  # images
IMAGES_PER_BATCH = {
    "cpu": 8
}  # of the encoder, when no gradient is wanted; on a CPU more of them leave its cache
DROPOUTS = ("dropout", "embed_dropout", "region_dropout", "attention_dropout")
PIXELS_PER_PASS = 1_000_000  # of relevance maps propagated at once (20 of 224x224); bounds the memory of `explain`


@dataclass(frozen=True)
class Method:
    """An explanation: the decoder's rules, what changes the encoder for its time, and what is made of the gradients."""

    rules: Callable  # () -> the decoder's rules
    encoder: Callable  # () -> a context manager
    relevance: Callable
    pixels: bool = True  # whether the gradient has to go through the encoder


MODELS = {  # by name, for the models build on this file
    "adaptive": "gridTDmodel:AdaptiveCaptioner",
    "gridtd": "gridTDmodel:GridTDCaptioner",
    "aoa": "aoamodel:AoACaptioner",
}
METHODS = {
    "lrp": Method(LRP, AlphaOneBetaZero, input_x_gradient),
    "gradcam": Method(TrueGradient, nullcontext, grad_cam, pixels=False),
    "guided_gradcam": Method(TrueGradient, GuidedReLU, guided_grad_cam),
    "guided_backprop": Method(TrueGradient, GuidedReLU, gradient),
    "gradient": Method(TrueGradient, nullcontext, gradient),
    "input_x_gradient": Method(TrueGradient, nullcontext, input_x_gradient),
    "attention": Method(TrueGradient, nullcontext, attention_map, pixels=False),
}


@dataclass
class CaptionerConfig:
    """The sizes of a captioner, saved in its checkpoint.

    num_head: attention heads of the multi-head captioner; max_length: the longest caption it may say, in words; the dropouts
    are of what goes into the last layer, of the word embeddings, of the regions' features and of the multi-head attention.
    """

    model_type: str = "gridtd"
    encoder: str = "vgg16"
    embed_dim: int = 512
    hidden_dim: int = 512
    num_head: int = 8
    dropout: float = 0.5
    max_length: int = 20
    embed_dropout: float = 0.0
    region_dropout: float = 0.0
    attention_dropout: float = 0.1


@dataclass
class Explanation:
    """Why a captioner said each of the T words of a caption. Tensors are on the CPU, in the captioner's precision (float32).

    words               T strings
    scores              (T,) the explained logits
    probabilities       (T,) softmax of the same
    image_relevance     (T, H, W) signed relevance of the pixels, channels summed, not normalised; None for bottom-up features
    region_relevance    (T, L) of the encoder's region features, channels summed
    word_relevance      (T, T) row t: of the inputs 0..t = `<start>`, word 0 .. word t-1; zero above the diagonal
    attention           (T, heads, L), and `beta` (T,) the share of the visual sentinel, or None
    """

    words: list
    scores: torch.Tensor
    probabilities: torch.Tensor
    image_relevance: torch.Tensor | None
    region_relevance: torch.Tensor
    word_relevance: torch.Tensor
    attention: torch.Tensor
    beta: torch.Tensor | None


def lstm_cell(gates, cell, rules):
    """One LSTM update from pre-activations `gates` (..., 4H), in PyTorch's order i, f, g, o.

    Returns the new cell m (..., H), tanh(m) and the output gate. For LRP the gates are constants, the candidate g and the
    sum i*tanh(g) + f*m are epsilon-rule sites (Arras et al. 2017).
    """
    i, f, g, o = gates.chunk(4, dim=-1)
    i, f, o = (rules.constant(torch.sigmoid(gate)) for gate in (i, f, o))
    cell = rules.epsilon(i * rules.tanh(rules.epsilon(g)) + f * cell)
    return cell, rules.tanh(cell), o


class StepWeight:
    """A weight matrix (O, I) that every step multiplies by, as x -> x @ weight.T for x (..., I).

    In training its gradient is made once, of the inputs and output gradients of all steps together, instead of as many matrices to
    be added up as there are steps; and autocast makes it coarser once.
    """

    def __init__(self, weight, training):
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        self.weight, self.pairs, self.token = weight, [], None
        if training and torch.is_grad_enabled():
            self.token = _AllSteps.apply(weight, self.pairs)

    def __call__(self, x):
        if self.token is None:
            return F.linear(x, self.weight)
        return _OneStep.apply(x.to(self.weight.dtype), self.weight.detach(), self.token, self.pairs)


class _AllSteps(torch.autograd.Function):
    """Going forward a token that each step takes; going back, after the last of them, the gradient of the weight."""

    @staticmethod
    def forward(ctx, weight, pairs):
        ctx.pairs = pairs
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        inputs, gradients = (torch.cat(parts) for parts in zip(*ctx.pairs))
        ctx.pairs.clear()
        return gradients.T @ inputs, None


class _OneStep(torch.autograd.Function):
    """x (..., I), weight (O, I) -> x @ weight.T; going back, it leaves input and gradient to `_AllSteps`."""

    @staticmethod
    def forward(ctx, x, weight, token, pairs):
        ctx.save_for_backward(x, weight)
        ctx.pairs = pairs
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        ctx.pairs.append((x.flatten(0, -2), gradient.flatten(0, -2)))
        return gradient @ weight, None, gradient.new_zeros(()), None


def run_lstm(lstm, inputs, lengths=None):
    """nn.LSTM over sequences (M, T, I) -> its h (M, T, H); lengths: M numbers of any shape, on the CPU, of the inputs that count:
    on a CPU h after them is zero and is not computed. Packing would make a GPU wait. There it is float32 under autocast too, which
    for cuDNN's LSTM means float16, whatever it was told."""
    if inputs.is_cuda:
        with torch.autocast("cuda", enabled=False):
            return lstm(inputs.float())[0]
    if lengths is None:
        return lstm(inputs)[0]
    packed = pack_padded_sequence(
        inputs, lengths.flatten().clamp(min=1), batch_first=True, enforce_sorted=False
    )
    return pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=inputs.shape[1])[0]


class Captioner(nn.Module):
    """An encoder, a word embedding, the projection of the regions and the last layer; models add what lies between."""

    def __init__(self, config, vocabulary, encoder):
        super().__init__()
        self.config, self.vocabulary, self.encoder = config, vocabulary, encoder
        self.embedding = nn.Embedding(len(vocabulary), config.embed_dim)
        self.image_projection = nn.Linear(encoder.out_channels, config.hidden_dim)
        self.fc = nn.Linear(config.hidden_dim, len(vocabulary))
        self.dropout, self.embed_dropout = (
            nn.Dropout(config.dropout),
            nn.Dropout(config.embed_dropout),
        )
        self.region_dropout, self.attention_dropout = (
            nn.Dropout(config.region_dropout),
            nn.Dropout(config.attention_dropout),
        )
        silence = torch.zeros(len(vocabulary))
        silence[[vocabulary.pad, vocabulary.start, vocabulary.unk]] = -torch.inf
        self.register_buffer(
            "silence", silence, persistent=False
        )  # added to the log-probabilities of what may be said

    @property
    def device(self):
        return self.fc.weight.device

    def zeros(self, memory, captions):
        """A hidden state or memory cell before the first word: (B, N, H)."""
        return self.fc.weight.new_zeros(len(memory["regions"]), captions, self.config.hidden_dim)

    def decoder_parameters(self):
        """All parameters but the encoder's."""
        return [
            parameter
            for name, parameter in self.named_parameters()
            if not name.startswith("encoder.")
        ]

    @staticmethod
    def mean_region(regions, mask):
        """The mean over the real regions: (B, L, H), bool (B, L) or None -> (B, H)."""
        if mask is None:
            return regions.mean(dim=1)
        return (regions * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)

    def unroll(self, embeddings, memory, rules=TrueGradient, lengths=None):
        """Teacher forcing: embeddings (B, N, T, E) of the inputs -> context and hidden (B, N, T, H), the sum of which goes into
        the last layer, attention (B, N, T, heads, L), beta (B, N, T) or None for a captioner without a sentinel.

        lengths: (B, N) on the CPU, the inputs of each caption that count; what follows them is arbitrary, and mostly not
        computed, the less the more the captions of each image are in falling order of length."""
        captions = embeddings.shape[1]
        state = self.start(memory, captions)
        steps = []
        for step, word_input in enumerate(self.word_inputs(embeddings, memory).unbind(dim=2)):
            if lengths is not None:
                captions = int((lengths > step).any(dim=0).nonzero().max()) + 1
                word_input, state = (
                    word_input[:, :captions],
                    tuple(part[:, :captions] for part in state),
                )
            context, hidden, state, *attention = self.step(word_input, state, memory, rules)
            steps.append((context, hidden, *attention))
        return tuple(
            None if parts[0] is None else torch.stack(widened(parts, embeddings.shape[1]), dim=2)
            for parts in zip(*steps)
        )

    def all_at_once(self, rules):
        """Whether an LSTM that does not wait for the attention may take a whole caption by nn.LSTM. LRP's rules act inside the
        LSTM, and cuDNN's has a backward in training mode only."""
        return not rules.stepwise and (self.training or not torch.is_grad_enabled())

    def last_layer(self, context, hidden):
        """context and hidden (..., H) -> logits (..., V) of the next words."""
        return self.fc(self.dropout(context + hidden))

    def forward(self, features, inputs, ss_prob=0.0, last_layer=None, lengths=None):
        """features (B, L, D), inputs (B, N, T) word ids, N captions an image -> logits (B, N, T, V) of the next words.

        ss_prob: the probability that an input is replaced by the captioner's own last prediction; last_layer: a function to take
        instead of the method of that name; lengths: see `unroll`.
        """
        memory = self.look(self.region_dropout(features))
        if ss_prob:
            inputs = self._scheduled_inputs(memory, inputs, ss_prob)
        embeddings = self.embed_dropout(self.embedding(inputs))
        return (last_layer or self.last_layer)(
            *self.unroll(embeddings, memory, lengths=lengths)[:2]
        )

    @torch.no_grad()
    def _scheduled_inputs(self, memory, inputs, ss_prob):
        """Scheduled sampling (Bengio et al. 2015), a coin for every word; as in the original not before the fourth input."""
        inputs, predicted = inputs.clone(), inputs[:, :, 0]
        state = self.start(memory, inputs.shape[1])
        for t in range(inputs.shape[2]):
            if t > 2:
                heads = torch.rand(predicted.shape, device=inputs.device) < ss_prob
                inputs[:, :, t] = torch.where(
                    heads & (inputs[:, :, t] != self.vocabulary.pad), predicted, inputs[:, :, t]
                )
            log_probabilities, state = self.next_words(inputs[:, :, t], state, memory)
            predicted = log_probabilities.argmax(-1)
        return inputs

    def next_words(self, words, state, memory, last_layer=None):
        """One decoding step: words (B, N) just said -> log-probabilities (B, N, V) of the next, and the new state.

        `<pad>`, `<start>` and `<unk>` are never said (-inf), so that every word of a caption can be explained.
        """
        context, hidden, state, *_ = self.step(
            self.word_inputs(self.embedding(words), memory), state, memory
        )
        return (last_layer or self.last_layer)(context, hidden).log_softmax(
            dim=-1
        ) + self.silence, state

    @torch.no_grad()
    def decode(
        self,
        features,
        method="beam",
        beam_size=3,
        max_length=None,
        every=False,
        strip=(),
        **options,
    ):
        """Region features (B, L, D) -> B captions, each a list of words.

        method: one of decoding.DECODERS, whose own `options` it takes; beam_size: for those that have beams; max_length: words;
        every: for each image a list of all the captions that the decoder found; strip: names of decoding.STRIP to apply.
        Raises UserError for an unknown method or an option that it does not have.
        """
        if "beam_size" in decoding.options_of(method):
            options["beam_size"] = beam_size
        for name, value in options.items():
            decoding.check_option(method, name, value)
        with evaluating(self):
            found = decoding.DECODERS[method](
                self, features, max_length or self.config.max_length, **options
            )
        captions = [
            [self._stripped(self.vocabulary.decode(ids), strip) for ids in image] for image in found
        ]
        return captions if every else [first for first, *_ in captions]

    @staticmethod
    def _stripped(words, names):
        for name in names:
            if name not in decoding.STRIP:
                raise UserError(
                    f"there is nothing called '{name}' to strip; choose from {', '.join(decoding.STRIP)}"
                )
            words = decoding.STRIP[name](words)
        return words

    @torch.no_grad()
    def caption(self, images, method="beam", beam_size=3, max_length=None, **options):
        """Images (B, 3, H, W), ImageNet-normalised -> B captions, each a list of words; arguments as of `decode`."""
        batches = images.split(CAPTIONED_AT_ONCE)
        return [
            words
            for batch in batches
            for words in self.decode(self.encode(batch), method, beam_size, max_length, **options)
        ]

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) -> region features (B, L, D)."""
        with evaluating(self):
            parts = images.split(IMAGES_PER_BATCH.get(self.device.type, CAPTIONED_AT_ONCE))
            return torch.cat([self.encoder(part.to(self.device)) for part in parts])

    def explain(self, images, captions=None, method="lrp", through_attention=False):
        """Explain every word of a caption of every image.

        images: (B, 3, H, W), ImageNet-normalised, or bottom-up features (B, L, D), padded with zeros; captions: B lists of
        words, or None to decode them first (3 beams); method: one of METHODS; through_attention: let LRP go through the
        attention scores of the multi-head captioner too (AttnLRP). Returns B Explanations. Raises UserError for another
        method, another number of captions, an empty caption or a word that the captioner cannot say.
        """
        if method not in METHODS:
            raise UserError(
                f"there is no explanation method '{method}'; choose from {', '.join(METHODS)}"
            )
        chosen = METHODS[method]
        if through_attention:
            if method != "lrp" or self.config.model_type != "aoa":
                raise UserError(
                    "only LRP of the multi-head captioner (aoa) can go through the attention scores"
                )
            chosen = replace(chosen, rules=AttnLRP)
        if self.encoder.given and chosen.encoder is GuidedReLU:
            raise UserError(
                f"{method} needs the CNN's pixels, and bottom-up features come without them"
            )
        captions = self.caption(images) if captions is None else captions
        if len(captions) != len(images):
            raise UserError(f"{len(images)} images need as many captions, not {len(captions)}")
        ids = [self._explainable_ids(words) for words in captions]
        encoder, explanations = self.encoder.folded(), []
        for chunk in self._chunks(images, ids):
            with evaluating(self):
                explanations += self._explain_chunk(
                    images[chunk].to(self.device), ids[chunk], chosen, encoder
                )
        return explanations

    def _explainable_ids(self, words):
        unknown = [
            word
            for word, index in zip(words, self.vocabulary.encode(words))
            if not 0 < index < self.vocabulary.unk
        ]
        if unknown:
            raise UserError(
                f"the word '{unknown[0]}' is not in this captioner's vocabulary, so it cannot be explained"
            )
        if not words:
            raise UserError("there is no word to explain in an empty caption")
        return self.vocabulary.encode(words)

    def _chunks(self, images, ids):
        """Slices of consecutive images small enough to be explained in one pass."""
        longest = max(map(len, ids), default=1)
        size = max(1, PIXELS_PER_PASS // (longest * images[0, 0].numel())) if len(images) else 1
        return [slice(first, first + size) for first in range(0, len(images), size)]

    def _explain_chunk(self, images, ids, method, encoder):
        """The Explanations of a few images for their captions, lists of word ids."""
        inputs, targets = self._padded(ids)
        words = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
        batch, beta = self.propagate(images, inputs, targets, words, method, encoder)
        return [self._explanation(row, caption, batch, beta) for row, caption in enumerate(ids)]

    def propagate(self, images, inputs, targets, words, method, encoder):
        """Explain, by one forward and one backward with K gradients an image, the logits of K words of each image's caption.

        images (B, 3, H, W) or features that are given; inputs and targets (B, T) word ids; words (B, K): which of the T;
        method: a Method; encoder: this captioner's, batch-norm folded. Returns a dict of the fields of Explanation, each with B
        first, relevance (B, K, ...), scores, probabilities and attention (B, T, ...), and beta (B, 1, T) or None.
        """
        rules, through = method.rules(), method.pixels and not encoder.given
        images = images.detach().requires_grad_(through)
        with torch.enable_grad(), exact_convolutions():
            with method.encoder():
                features = encoder(images)
            features = features if through else features.detach().requires_grad_()
            embeddings = self.embedding(inputs).detach().requires_grad_()
            parts = self.unroll(embeddings.unsqueeze(1), self.look(features, rules), rules)
            context, hidden, attention = (part.squeeze(1) for part in parts[:3])
            outputs = rules.epsilon(context + hidden)  # (B, T, H)
            scores = rules.epsilon(
                (outputs * self.fc.weight[targets]).sum(-1) + self.fc.bias[targets]
            )
            leaves = (None if encoder.given else images, features, embeddings)
            gradients = self._word_gradients(scores, words, leaves)
        with torch.no_grad():
            maps = method.relevance(leaves, gradients, attention.transpose(0, 1), encoder.grid)
            names = ("image_relevance", "region_relevance", "word_relevance")
            batch = {
                name: part.transpose(0, 1) for name, part in zip(names, maps) if part is not None
            }
            probabilities = (
                self.fc(outputs).softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            )
            batch |= {"scores": scores, "probabilities": probabilities, "attention": attention}
        return batch, parts[3]

    @staticmethod
    def _word_gradients(scores, words, leaves):
        """scores (B, T), words (B, K) -> for each leaf (B, ...) the gradients (K, B, ...) of the scores of these words, None for
        one that wants none."""
        seeds = F.one_hot(words, scores.shape[1]).to(scores).transpose(0, 1)  # (K, B, T)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(scores, wanted, seeds, is_grads_batched=True))
        return [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]

    def _explanation(self, row, ids, batch, beta):
        """The Explanation of one image, cut out of a padded batch."""
        length = len(ids)
        parts = {name: value[row, :length].detach().cpu() for name, value in batch.items()}
        parts["word_relevance"] = parts["word_relevance"][:, :length]
        parts.setdefault("image_relevance", None)
        beta = None if beta is None else beta[row, 0, :length].detach().cpu()
        return Explanation(words=self.vocabulary.decode(ids), beta=beta, **parts)

    def _padded(self, ids):
        """Lists of word ids -> inputs (B, T) = `<start>` and all but the last word, and targets (B, T), padded."""
        tokens = padded([[self.vocabulary.start, *caption] for caption in ids]).to(self.device)
        return tokens[:, :-1], tokens[:, 1:]

    def save(self, path, **extra):
        """Write one self-contained file that `load_captioner` reads; `extra` holds plain values and tensors."""
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "config": asdict(self.config),
            "vocabulary": list(self.vocabulary.words),
            "state_dict": self.state_dict(),
            **extra,
        }
        write_tensors(path, checkpoint)


def widened(parts, width):
    """Tensors (B, n, ...) of different n, made (B, width, ...) by zeros."""
    return [
        torch.cat([part, part.new_zeros(len(part), width - part.shape[1], *part.shape[2:])], dim=1)
        for part in parts
    ]


@contextmanager
def exact_convolutions():
    """Convolutions in float32 inside, which on a GPU would by default multiply in TF32, with 10 bits of mantissa."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def evaluating(module):
    """The module in eval mode inside, and in whatever mode it was afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        yield module.eval()
    finally:
        for child, training in modes:
            child.training = training


def model_class(model_type):
    """The class of a model_type; UserError if there is none."""
    if model_type not in MODELS:
        raise UserError(f"there is no model_type '{model_type}'; choose from {', '.join(MODELS)}")
    return pkgutil.resolve_name(MODELS[model_type])


def build_captioner(config, vocabulary, encoder):
    """A captioner with random decoder weights over the given encoder."""
    return model_class(config.model_type)(config, vocabulary, encoder)


def read_checkpoint(path, device="cpu"):
    """The dict in a checkpoint file; UserError if there is no such file or it is something else."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; make one with: python train.py") from None
    except Exception:  # torch.load raises many kinds for a file that is no checkpoint
        raise UserError(f"{path} is not a checkpoint of this project, or is damaged") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project")
    return checkpoint


def load_captioner(path, device="cpu"):
    """The captioner saved in `path`, in eval mode on `device`. UserError if the file is not one."""
    checkpoint = read_checkpoint(path, device)
    config = CaptionerConfig(**checkpoint["config"])
    if config.encoder not in ENCODERS:
        raise UserError(
            f"{path} uses an encoder '{config.encoder}' that this version does not have"
        )
    captioner = build_captioner(
        config, Vocabulary(checkpoint["vocabulary"]), Encoder(config.encoder)
    )
    captioner.load_state_dict(checkpoint["state_dict"])
    captioner.encoder.to(memory_format=torch.channels_last)  # twice as fast on CPUs
    return captioner.to(device).eval()
