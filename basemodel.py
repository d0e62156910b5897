"""What all captioners share: the configuration, the base class, the LSTM, the checkpoint file.

A model is a subclass of `Captioner` that defines four methods; their docstrings there are the
contract:

    image_memory(features, rules)           what every step needs of the image, computed once
    initial_state(memory, captions)         the state before the first word
    word_inputs(embeddings, memory)         the part of a step's input that only the word decides
    step(word_input, state, memory, rules)  one word further

The same forward serves training, decoding, gradients and LRP; they differ in `rules`
(lrp_utils.py). Shapes: B images, N captions (or beams) of each, T words, L regions of D channels,
E embedding and H hidden units, V words of the vocabulary.
"""

import zipfile
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import decoding
import explanation
from commandline import UserError, find_checkpoint, write_tensors
from encoder import eval_view
from images import image_transform, is_photograph, photographs_of
from lrp_utils import TRUE_GRADIENT, summed

CHECKPOINT_FORMAT = "image captioner 1"
LARGEST_SIZE = 10**6  # of what a config says
# What a checkpoint holds; "training" only if it is of an interrupted one.
CHECKPOINT_PARTS = {"config": dict, "vocabulary": list, "state_dict": dict, "training": dict}
CAPTIONED_AT_ONCE = 64  # images
# Images that the encoder takes at once without gradients; more of them leave a CPU's cache.
IMAGES_PER_BATCH = {"cpu": 8}


@dataclass
class CaptionerConfig:
    """The sizes of a captioner, saved in its checkpoint.

    model_type         one of captioner.MODELS
    encoder            an encoder's name, as encoder.encoder_spec has it
    embed_dim          E, the size of a word embedding
    hidden_dim         H, the size of the LSTMs' states and of the attention
    num_head           attention heads of the multi-head captioner
    dropout            of what goes into the last layer
    max_length         words of the longest caption that the captioner may say
    embed_dropout      of the word embeddings
    region_dropout     of the regions' features
    attention_dropout  of the multi-head attention's weights
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


class StepOutput(NamedTuple):
    """What one step of a captioner gives.

    addends    tuple of (B, N, H), any number of them; their sum goes into the last layer. Where a
               captioner gives `Captioner` an output_dim, it takes the place of H
    state      tuple of tensors (B, N, ...) for the next step
    attention  (B, N, heads, L)
    beta       (B, N), the weight of the visual sentinel, or None for a captioner without one
    """

    addends: tuple
    state: tuple
    attention: torch.Tensor
    beta: torch.Tensor | None


class Unrolled(NamedTuple):
    """What all steps of a caption give: a `StepOutput` with T after N, and without the state."""

    addends: tuple
    attention: torch.Tensor
    beta: torch.Tensor | None


@dataclass(frozen=True)
class Memory:
    """What a captioner keeps of a batch of images, so that no step computes it again.

    of_image  {name: tensor (B, ...) or None}
    weights   {name: anything} that is the same for all images
    """

    of_image: dict
    weights: dict = field(default_factory=dict)

    def __getitem__(self, name):
        return self.of_image[name]

    def __len__(self):
        return next(len(part) for part in self.of_image.values() if part is not None)

    def of_images(self, index):
        """The memory of some of the images. index: what picks rows of a tensor."""
        picked = {}
        for name, part in self.of_image.items():
            picked[name] = None if part is None else part[index]
        return Memory(picked, self.weights)


def lstm_cell(gates, cell, rules):
    """One LSTM update from pre-activations `gates` (..., 4H), in PyTorch's order i, f, g, o.

    Returns the new cell m (..., H), tanh(m) and the output gate. For LRP the gates are constants;
    the candidate g and the sum i*tanh(g) + f*m are epsilon-rule sites (Arras et al. 2017).
    """
    i, f, g, o = gates.chunk(4, dim=-1)
    input_gate = rules.constant(torch.sigmoid(i))
    forget_gate = rules.constant(torch.sigmoid(f))
    output_gate = rules.constant(torch.sigmoid(o))
    candidate = rules.tanh(rules.epsilon(g))
    cell = rules.epsilon(input_gate * candidate + forget_gate * cell)
    return cell, rules.tanh(cell), output_gate


def additive_scores(keys, query, layer, mask):
    """The scores of additive attention, layer(tanh(key + query)), up to a constant: (B, N, L).

    keys (B, L, H), query (B, N, H): twice the regions' and the hidden state's parts; layer: a
    Linear (H -> 1) without bias; mask: bool (B, L), True for real regions, or None. Padded regions
    get -inf.

    tanh(x) = 2 sigmoid(2x) - 1, and a CPU takes the sigmoid six times faster. The -1 is the same
    for all scores, so softmax does not notice it.
    """
    # (B, N, L, H); in place, for it is the largest tensor of a step.
    units = (keys.unsqueeze(1) + query.unsqueeze(2)).sigmoid_()
    scores = 2 * layer(units).squeeze(-1)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
    return scores


class StepWeight:
    """A weight matrix (O, I) that every step multiplies by: x (..., I) -> x @ weight.T (..., O).

    In training its gradient is made once, of the inputs and output gradients of all steps together.
    Otherwise each step would make a matrix, and these would be added up. Under autocast the weight
    is rounded once, too, and not in each step.
    """

    def __init__(self, weight, training):
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            weight = weight.to(torch.get_autocast_dtype(device))
        self.weight = weight
        self.pairs = []
        self.token = None
        if training and torch.is_grad_enabled():
            self.token = _AllSteps.apply(weight, self.pairs)

    def __call__(self, x):
        """x (..., I) -> x @ weight.T (..., O)."""
        if self.token is None:
            return F.linear(x, self.weight)
        return _OneStep.apply(x.to(self.weight.dtype), self.weight.detach(), self.token, self.pairs)


class _AllSteps(torch.autograd.Function):
    """Going forward, a token that each step takes. Going back, the weight's gradient of all steps.

    Autograd calls this backward after that of the last step, since all of them took the token.
    """

    @staticmethod
    def forward(ctx, weight, pairs):
        ctx.pairs = pairs
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        inputs = torch.cat([pair[0] for pair in ctx.pairs])
        gradients = torch.cat([pair[1] for pair in ctx.pairs])
        ctx.pairs.clear()
        return gradients.T @ inputs, None


class _OneStep(torch.autograd.Function):
    """x (..., I), weight (O, I) -> x @ weight.T; its backward leaves the rest to _AllSteps."""

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
    """nn.LSTM over sequences (M, T, I) -> its h (M, T, H).

    lengths: M numbers of any shape, on the CPU: how many inputs of each sequence count. On a CPU h
    after them is zero and is not computed.

    On a GPU packing would make the GPU wait, so there all inputs are computed. They are of the
    weights' type even under autocast, since cuDNN's LSTM would take float16 whatever autocast was
    told.
    """
    if inputs.is_cuda:
        with torch.autocast("cuda", enabled=False):
            return lstm(inputs.to(lstm.weight_ih_l0.dtype))[0]
    if lengths is None:
        return lstm(inputs)[0]
    lengths = lengths.flatten().clamp(min=1)
    packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    hidden, _ = lstm(packed)
    return pad_packed_sequence(hidden, batch_first=True, total_length=inputs.shape[1])[0]


class Captioner(nn.Module, ABC):
    """An encoder, a word embedding, the projection of the regions, and the last layer.

    A model adds what lies between; see the top of this file.
    """

    methods = explanation.METHODS  # {name: Method} of explaining it
    # Whether the attention scores are products of queries and keys, which AttnLRP has rules for.
    dot_product_attention = False
    # The weight of `objectives.doubly_stochastic_loss` in training by cross-entropy.
    attention_penalty = 0.0

    def __init__(self, config, vocabulary, encoder, output_dim=None):
        """output_dim: how many numbers go into the last layer; None: hidden_dim."""
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.encoder = encoder
        self.embedding = nn.Embedding(len(vocabulary), config.embed_dim)
        self.image_projection = nn.Linear(encoder.out_channels, config.hidden_dim)
        self.fc = nn.Linear(output_dim or config.hidden_dim, len(vocabulary))
        self.dropout = nn.Dropout(config.dropout)
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        self.region_dropout = nn.Dropout(config.region_dropout)
        self.attention_dropout = nn.Dropout(config.attention_dropout)
        # Added to the log-probabilities of the next word, so that some are never said.
        silence = torch.zeros(len(vocabulary))
        silence[[vocabulary.pad, vocabulary.start, vocabulary.unk]] = -torch.inf
        self.register_buffer("silence", silence, persistent=False)

    # ------------------------------------------------------------------- what a model has to offer

    @abstractmethod
    def image_memory(self, features, rules=TRUE_GRADIENT):
        """What every step needs of the image, computed once: features (B, L, D) -> a Memory."""

    @abstractmethod
    def initial_state(self, memory, captions=1):
        """The state before the first word: a tuple of tensors (B, N, ...), N = captions."""

    @abstractmethod
    def word_inputs(self, embeddings, memory):
        """The part of a step's input that depends on nothing but the word: (..., E) -> (..., I)."""

    @abstractmethod
    def step(self, word_input, state, memory, rules=TRUE_GRADIENT):
        """One word further: word_input (B, N, I) of the word just said -> a StepOutput.

        Everything that has a rule in LRP goes through `rules` (lrp_utils.Rules).
        """

    # ------------------------------------------------------------------------------------- forward

    @property
    def device(self):
        """Where the captioner's parameters are."""
        return self.fc.weight.device

    def zeros(self, memory, captions):
        """A hidden state or memory cell before the first word: (B, N, H)."""
        return self.fc.weight.new_zeros(len(memory), captions, self.config.hidden_dim)

    def decoder_parameters(self):
        """All parameters but the encoder's."""
        named = self.named_parameters()
        return [parameter for name, parameter in named if not name.startswith("encoder.")]

    def eval_view(self):
        """This captioner in eval mode, sharing its parameters; its own mode is not touched."""
        return eval_view(self)

    @staticmethod
    def mean_region(regions, mask):
        """The mean over the real regions: (B, L, H), bool (B, L) or None -> (B, H)."""
        if mask is None:
            return regions.mean(dim=1)
        return (regions * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)

    def unroll(self, embeddings, memory, rules=TRUE_GRADIENT, lengths=None):
        """Teacher forcing: embeddings (B, N, T, E) of the inputs -> an Unrolled.

        lengths: (B, N) on the CPU, how many inputs of each caption count. What follows them is
        arbitrary. Most of it is not computed if each image's captions are sorted by falling length.
        """
        captions = embeddings.shape[1]
        state = self.initial_state(memory, captions)
        outputs = []
        for position, word_input in enumerate(self.word_inputs(embeddings, memory).unbind(dim=2)):
            if lengths is not None:
                going_on = (lengths > position).any(dim=0)
                captions = int(going_on.nonzero().max()) + 1
                word_input = word_input[:, :captions]
                state = tuple(part[:, :captions] for part in state)
            output = self.step(word_input, state, memory, rules)
            state = output.state
            outputs.append(output)
        return stacked(outputs, embeddings.shape[1])

    def all_at_once(self, rules):
        """Whether an LSTM that does not wait for the attention may take a whole caption at once.

        LRP's rules act inside the LSTM, and cuDNN's has a backward in training mode only.
        """
        return not rules.stepwise and (self.training or not torch.is_grad_enabled())

    def last_layer(self, addends):
        """addends, a tuple of (..., H) -> logits (..., V) of the next words."""
        return self.fc(self.dropout(summed(addends)))

    def forward(self, features, inputs, ss_prob=0.0, last_layer=None, lengths=None):
        """features (B, L, D), inputs (B, N, T) token ids -> logits (B, N, T, V) of the next words.

        last_layer: a function to call instead of the method of that name; the rest is as of
        `teacher_forced`.
        """
        addends = self.teacher_forced(features, inputs, ss_prob, lengths).addends
        return (last_layer or self.last_layer)(addends)

    def teacher_forced(self, features, inputs, ss_prob=0.0, lengths=None):
        """features (B, L, D), inputs (B, N, T) token ids -> the Unrolled of all steps.

        ss_prob: probability that an input is replaced by the captioner's own last prediction;
        lengths: see `unroll`.
        """
        memory = self.image_memory(self.region_dropout(features))
        if ss_prob:
            inputs = self._scheduled_inputs(memory, inputs, ss_prob)
        embeddings = self.embed_dropout(self.embedding(inputs))
        return self.unroll(embeddings, memory, lengths=lengths)

    @torch.no_grad()
    def _scheduled_inputs(self, memory, inputs, ss_prob):
        """Scheduled sampling (Bengio et al. 2015): a coin is tossed for every word.

        As in the original, not before the fourth input.
        """
        inputs = inputs.clone()
        predicted = inputs[:, :, 0]
        state = self.initial_state(memory, inputs.shape[1])
        for position in range(inputs.shape[2]):
            given = inputs[:, :, position]
            if position > 2:
                replaced = torch.rand(predicted.shape, device=inputs.device) < ss_prob
                replaced &= given != self.vocabulary.pad
                inputs[:, :, position] = torch.where(replaced, predicted, given)
            log_probabilities, state = self.next_words(inputs[:, :, position], state, memory)
            predicted = log_probabilities.argmax(-1)
        return inputs

    def next_words(self, token_ids, state, memory, last_layer=None):
        """One step of decoding: the token ids (B, N) just said -> log-probabilities (B, N, V) of
        the next word, and the new state.

        `<pad>`, `<start>` and `<unk>` are never said (-inf), so that every word of a caption can be
        explained. last_layer: a function to call instead of the method of that name.
        """
        word_input = self.word_inputs(self.embedding(token_ids), memory)
        output = self.step(word_input, state, memory)
        logits = (last_layer or self.last_layer)(output.addends)
        return logits.log_softmax(dim=-1) + self.silence, output.state

    # ----------------------------------------------------------------------- captions, explanations

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

        method: one of decoding.DECODERS, whose own `options` it takes; beam_size: for those that
        have beams; max_length: words (default: the captioner's own); every: for each image a list
        of all captions that the decoder found; strip: names of decoding.STRIP to apply.
        UserError for an unknown method, or an option that it does not have.
        """
        if "beam_size" in decoding.options_of(method):
            options["beam_size"] = beam_size
        decoding.check_options(method, options)
        if not len(features):
            return []
        self.encoder.check_regions(features)
        longest = max_length or self.config.max_length
        found = decoding.decode(self.eval_view(), features, method, longest, **options)
        captions = []
        for image in found:
            words = [decoding.stripped(self.vocabulary.decode(ids), strip) for ids in image]
            captions.append(words if every else words[0])
        return captions

    @torch.no_grad()
    def caption(self, images, method="beam", beam_size=3, max_length=None, **options):
        """Images (B, 3, S, S), ImageNet-normalised -> B captions, each a list of words.

        images: also a list of photographs, which are names of files or PIL images; of a single
        photograph the result is its caption. The other arguments are those of `decode`. UserError
        as there, for images of another shape, and for a file that cannot be read.
        """
        pixels = self.pixels_of(images)
        self.encoder.check_inputs(pixels)
        captions = []
        for batch in pixels.split(CAPTIONED_AT_ONCE):
            features = self.encode(batch)
            captions += self.decode(features, method, beam_size, max_length, **options)
        return captions[0] if is_photograph(images) else captions

    def pixels_of(self, images):
        """Photographs as images (B, 3, S, S), ImageNet-normalised; anything else as it is."""
        photographs = None if self.encoder.given else photographs_of(images)
        if not photographs:
            return images
        transform = image_transform(self.encoder.image_size)
        return torch.stack([transform(photograph) for photograph in photographs])

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, S, S) -> region features (B, L, D).

        UserError for images of another shape.
        """
        self.encoder.check_inputs(images)
        encoder = eval_view(self.encoder)
        size = IMAGES_PER_BATCH.get(self.device.type, CAPTIONED_AT_ONCE)
        dtype = self.fc.weight.dtype
        return torch.cat([encoder(part.to(self.device, dtype)) for part in images.split(size)])

    @property
    def model_type(self):
        """Which captioner it is, a name of captioner.MODELS."""
        return self.config.model_type

    def check_words(self, words):
        """Raise a UserError unless a caption of these words can be explained."""
        explanation.explainable_ids(self.vocabulary, words)

    def explain(self, images, captions=None, method="lrp"):
        """Explain every word of a caption of every image; see explanation.explain.

        images: also a list of photographs, which the Explanations then know. For a single
        photograph, `captions` is its caption, and the result its Explanation.
        """

        def explained(images, captions):
            return explanation.explain(self, self.pixels_of(images), captions, method)

        return explanation.explain_photographs(images, captions, explained)

    def save(self, path, **extra):
        """Write one self-contained file that `load_captioner` reads.

        extra: plain values and tensors that the file shall also hold.
        """
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "config": asdict(self.config),
            "vocabulary": list(self.vocabulary.words),
            "state_dict": self.state_dict(),
            **extra,
        }
        write_tensors(path, checkpoint)


def stacked(outputs, captions):
    """The StepOutputs of T steps as an Unrolled of so many captions.

    Where a step has computed fewer captions, the others are zero.
    """
    addends = []
    for parts in zip(*(output.addends for output in outputs)):
        addends.append(torch.stack(widened(parts, captions), dim=2))
    attention = torch.stack(widened([output.attention for output in outputs], captions), dim=2)
    beta = None
    if outputs[0].beta is not None:
        beta = torch.stack(widened([output.beta for output in outputs], captions), dim=2)
    return Unrolled(tuple(addends), attention, beta)


def widened(parts, width):
    """Tensors (B, n, ...) of different n, made (B, width, ...) by zeros."""
    result = []
    for part in parts:
        missing = part.new_zeros(len(part), width - part.shape[1], *part.shape[2:])
        result.append(torch.cat([part, missing], dim=1))
    return result


def read_checkpoint(path, device="cpu"):
    """The dict in a checkpoint file; UserError if there is none, it is something else, or damaged.

    The path is looked up by `find_checkpoint`.
    """
    try:
        file = find_checkpoint(path)
        require_intact(file)
        checkpoint = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; {checkpoints_beside(path)}") from None
    except Exception:  # torch.load raises many kinds for a file that is no checkpoint
        message = f"{path} is not a checkpoint of this project, or is damaged"
        raise UserError(message) from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project")
    problem = what_is_wrong(checkpoint)
    if problem:
        raise UserError(f"{path} is damaged, or of another version: {problem}")
    return checkpoint


def require_intact(path):
    """Raise a BadZipFile unless all parts of a checkpoint file have the checksums in it.

    PyTorch writes them (CRC-32) and does not look at them when it loads.
    """
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile(path)


def _is_size(value, kind):
    """Whether a value of a checkpoint's config is of the kind of its field, and not absurd."""
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_SIZE
    if kind is float:  # an int is as good
        return isinstance(value, (int, float)) and 0 <= value <= 1  # a probability
    return isinstance(value, kind)


def what_is_wrong(checkpoint):
    """What is wrong with the dict of a checkpoint, as the end of a message, or None."""
    for name, kind in CHECKPOINT_PARTS.items():
        if not isinstance(checkpoint.get(name, kind() if name == "training" else None), kind):
            return f"its {name} is no {kind.__name__}"
    known = {row.name: row for row in fields(CaptionerConfig)}
    for name, value in checkpoint["config"].items():
        if name not in known or not _is_size(value, known[name].type):
            return f"its config has {name} {value!r}"
    if not all(isinstance(word, str) for word in checkpoint["vocabulary"]):
        return "its vocabulary holds what is no word"
    for name, tensor in checkpoint["state_dict"].items():
        if not isinstance(tensor, torch.Tensor):
            return f"its state_dict has no tensor {name}"
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"the weights {name} hold a value that is no finite number (NaN or infinity)"
    return None


def checkpoints_beside(path):
    """Which .pt files are in the folder of a missing one, as the end of a message."""
    folder = Path(path).parent
    names = sorted(file.name for file in folder.glob("*.pt"))
    if names:
        return f"the folder {folder} has {', '.join(names)}"
    return f"the folder {folder} has none"
