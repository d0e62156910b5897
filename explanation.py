"""Why a captioner said each word of a caption: the methods, and the pass that explains all words.

    explanations = captioner.explain(images)                    # one Explanation an image
    explanations = captioner.explain(images, method="gradcam")

A method is a row of `METHODS`. `propagate` runs it: one forward, teacher-forced on the captions,
and one backward for all words of all images of a batch.
"""

import html
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from commandline import UserError
from explanationfiles import write_arrays, write_numbers
from gradient_utils import (
    NON_NEGATIVE,
    SIGNED,
    SIZE,
    GuidedReLU,
    attention_map,
    grad_cam,
    gradient,
    guided_grad_cam,
    input_x_gradient,
    layer_cam,
    noisy_copies,
    path_from_nothing,
)
from images import is_photograph, photographs_of
from lrp_utils import (
    LRP,
    AlphaOneBetaZero,
    AlphaTwoBetaOne,
    AttnLRP,
    EpsilonConvolutions,
    GammaConvolutions,
    TrueGradient,
    summed,
)
from names import FIGURE_ENDINGS
from perturbation_utils import as_measured, occlusion, rise
from vocabulary import padded, tokenize

# Values of relevance maps that are propagated at once (20 maps of 224x224); bounds the memory.
PIXELS_PER_PASS = 1_000_000


def needs_any_captioner(captioner):
    """The check of a method that is for every captioner."""


@dataclass(frozen=True)
class Method:
    """A way to explain.

    rules      () -> the decoder's rules (lrp_utils.Rules)
    encoder    () -> a context manager in which the encoder runs, and which may change it
    relevance  a function of (leaves, gradients, attention, grid), see gradient_utils.py, that
               returns fields of `Explanation`; any other name goes into its `extra`
    pixels     whether the gradient has to go through the encoder
    backward   whether it needs gradients at all
    samples    None, or a function () -> functions of (images, word embeddings) that change both;
               the gradients are then the mean over all of them
    perturb    None, or a function of perturbation_utils.py, whose maps are then handed to
               `relevance` instead of gradients
    leaves     names of further inner values of the captioner (`Rules.leaf`) to get gradients of
    check      a function of a captioner that raises a UserError if the method is not for it
    kind       SIGNED, SIZE or NON_NEGATIVE: how the image maps are to be read
    additive   whether relevance is a share of the score, so that its sums over the image and over
               the preceding words can be compared
    """

    rules: Callable
    encoder: Callable
    relevance: Callable
    pixels: bool = True
    backward: bool = True
    samples: Callable | None = None
    perturb: Callable | None = None
    leaves: tuple = ()
    check: Callable = needs_any_captioner
    kind: str = SIGNED
    additive: bool = False

    @property
    def one_pass(self):
        """Whether one forward and at most one backward suffice."""
        return self.samples is None and self.perturb is None


def needs_pixels(captioner):
    """Raise a UserError for a captioner that is given features instead of images."""
    if captioner.encoder.given:
        raise UserError("this method needs pixels, and bottom-up features come without them")


def needs_lrp_rules(captioner):
    """Raise a UserError for a captioner whose encoder LRP has no rules for."""
    captioner.encoder.check_lrp_rules()


def needs_dot_product_attention(captioner):
    """Raise a UserError for a captioner that AttnLRP has no rules for."""
    needs_lrp_rules(captioner)
    if not captioner.dot_product_attention:
        raise UserError(
            "only LRP of the multi-head captioner (aoa) can go through the attention scores"
        )


METHODS = {
    "lrp": Method(LRP, AlphaOneBetaZero, input_x_gradient, check=needs_lrp_rules, additive=True),
    "attnlrp": Method(
        AttnLRP,
        AlphaOneBetaZero,
        input_x_gradient,
        check=needs_dot_product_attention,
        additive=True,
    ),
    "gradcam": Method(TrueGradient, nullcontext, grad_cam, pixels=False, kind=NON_NEGATIVE),
    "guided_gradcam": Method(
        TrueGradient, GuidedReLU, guided_grad_cam, check=needs_pixels, kind=SIZE
    ),
    "guided_backprop": Method(TrueGradient, GuidedReLU, gradient, check=needs_pixels, kind=SIZE),
    "gradient": Method(TrueGradient, nullcontext, gradient),
    "input_x_gradient": Method(TrueGradient, nullcontext, input_x_gradient),
    "lrp_alpha2beta1": Method(
        LRP, AlphaTwoBetaOne, input_x_gradient, check=needs_lrp_rules, additive=True
    ),
    "lrp_gamma": Method(
        LRP, GammaConvolutions, input_x_gradient, check=needs_lrp_rules, additive=True
    ),
    "lrp_epsilon": Method(
        LRP, EpsilonConvolutions, input_x_gradient, check=needs_lrp_rules, additive=True
    ),
    "layercam": Method(TrueGradient, nullcontext, layer_cam, pixels=False, kind=NON_NEGATIVE),
    "integrated_gradients": Method(
        TrueGradient, nullcontext, input_x_gradient, samples=path_from_nothing
    ),
    "smoothgrad": Method(
        TrueGradient, nullcontext, gradient, samples=noisy_copies, check=needs_pixels
    ),
    "occlusion": Method(
        TrueGradient, nullcontext, as_measured, perturb=occlusion, check=needs_pixels
    ),
    "rise": Method(TrueGradient, nullcontext, as_measured, perturb=rise, check=needs_pixels),
    "attention": Method(
        TrueGradient,
        nullcontext,
        attention_map,
        pixels=False,
        backward=False,
        kind=NON_NEGATIVE,
    ),
}


WRITERS = {".npz": write_arrays, ".json": write_numbers}  # of files of numbers


@dataclass
class Explanation:
    """Why a captioner said each of the T words of a caption.

    Tensors are on the CPU, in the captioner's precision (float32).

    words             T strings
    scores            (T,) the explained logits
    probabilities     (T,) the softmax of the same
    image_relevance   (T, H, W) signed relevance of the pixels, channels summed, not normalised;
                      None for bottom-up features
    region_relevance  (T, L) of the encoder's region features, channels summed
    word_relevance    (T, T) row t: of the inputs 0..t = `<start>`, word 0 .. word t-1; zero above
                      the diagonal
    attention         (T, heads, L)
    beta              (T,) the weight of the visual sentinel, or None
    extra             {name: tensor (T, ...)}: what only this method says
    kind, additive    those of the Method
    method            its name
    photograph        a PIL image, if the captioner was given one or its file, else None
    instead_of        the word that the caption has where the last of `words` stands, if that is one
                      that was not said, else None
    given             so many of `words` were not said but given, a question; nothing is said of
                      them, and what follows is the answer

    In a notebook it shows itself as a page, in which one points at words.
    """

    words: list
    scores: torch.Tensor
    probabilities: torch.Tensor
    image_relevance: torch.Tensor | None
    region_relevance: torch.Tensor
    word_relevance: torch.Tensor
    attention: torch.Tensor
    beta: torch.Tensor | None
    extra: dict = field(default_factory=dict)
    kind: str = SIGNED
    additive: bool = False
    method: str = ""
    photograph: Image.Image | None = None
    instead_of: str | None = None
    given: int = 0

    def title(self):
        """The caption in one line; it tells where the last word is not the caption's own."""
        if self.instead_of is None:
            return " ".join(self.words).replace(" ?", "?")
        *before, target = self.words
        return " ".join([*before, f"({target}) instead of {self.instead_of}"])

    def __repr__(self):
        words = []
        for word, score in zip(self.words, self.scores.tolist()):
            words.append(f"{word} ({score:.1f})")
        return f"<Explanation by {self.method or 'no method'}: {' '.join(words)}>"

    def plot(self, words=None, scale="caption", photograph=None):
        """A matplotlib Figure: the photograph, then a heat map for each word.

        words: strings, those to draw, or None for all; scale: "caption" if all words share one
        scale of colours, "word" if each has its own; photograph: a PIL image to draw over, if the
        captioner was given a tensor. UserError without a photograph, or for a word that the caption
        does not have.
        """
        from plots import explanation_figure  # matplotlib is slow to import, and often not needed

        return explanation_figure(
            self._drawn_over(photograph), self, self.positions_of(words), scale
        )

    def save(self, path, words=None, scale="caption", photograph=None):
        """Write the figure of `plot` into a .png, .pdf or .svg file, the page of `to_html` into a
        .html file, all tensors into a .npz file, or what is small into a .json file; returns the
        path.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending in WRITERS:
            WRITERS[ending](path, self, {"method": self.method, "caption": self.title()})
            return path
        if ending == ".html":
            from page import Entry, write_page

            entry = Entry(path.stem, self._drawn_over(photograph), {self.method: self})
            return write_page(path, [entry], path.stem)
        if ending not in FIGURE_ENDINGS:
            endings = ", ".join((*FIGURE_ENDINGS, ".html", *WRITERS))
            raise UserError(f"'{path}' is not the name of a file that ends in {endings}")
        from plots import save_figure

        return save_figure(self.plot(words, scale, photograph), path)

    def to_html(self, photograph=None):
        """A page to look at in a browser, as text: one file that needs no other."""
        from page import Entry, page

        caption = " ".join(self.words)
        return page([Entry(caption, self._drawn_over(photograph), {self.method: self})], caption)

    def _repr_html_(self):
        """What a notebook shows: the page, or the text if there is no photograph to draw over."""
        if self.photograph is None or not self.words:
            return None
        return f'<iframe srcdoc="{html.escape(self.to_html())}" width="100%" height="720"></iframe>'

    def _drawn_over(self, photograph):
        """The photograph to draw over, a PIL image; UserError if there is none."""
        photograph = photograph or self.photograph
        if photograph is None:
            raise UserError(
                "this explanation knows no photograph to draw over, because the captioner was "
                "given a tensor; give one as photograph=..."
            )
        return photograph

    def positions_of(self, words):
        """The positions of these words in the caption, or of all that were said for None.

        UserError for a word that the caption does not have.
        """
        if words is None:
            return list(range(self.given, len(self.words)))
        for word in words:
            if word not in self.words:
                raise UserError(f"the caption has no word '{word}': {' '.join(self.words)}")
        return [position for position, word in enumerate(self.words) if word in words]

    def score_shares(self):
        """How much of each word's score the image has, and how much the words before it: (T, 2).

        These are sums of relevance, so they mean something if the method is `additive`. Biases have
        the rest of the score. The image's share is what reaches the encoder's features, for in a
        deep encoder much of it does not arrive at the pixels.
        """
        image = self.region_relevance.sum(dim=1)
        if "class_relevance" in self.extra:  # that of the image tokens that are no region
            image = image + self.extra["class_relevance"]
        return torch.stack([image, self.word_relevance.sum(dim=1)], dim=1)


def method_for(captioner, name):
    """The Method called `name`; UserError if there is none, or it is not for this captioner."""
    methods = captioner.methods
    if name not in methods:
        known = ", ".join(methods)
        raise UserError(f"there is no explanation method '{name}'; choose from {known}")
    methods[name].check(captioner)
    return methods[name]


def methods_of(captioner):
    """The names of the methods that are for this captioner."""
    names = []
    for name, method in captioner.methods.items():
        try:
            method.check(captioner)
        except UserError:
            continue
        names.append(name)
    return names


@torch.inference_mode(False)
def explain(captioner, images, captions=None, method="lrp"):
    """Explain every word of a caption of every image.

    images: (B, 3, S, S), ImageNet-normalised, or bottom-up features (B, L, D), padded with zeros;
    captions: B sequences of words, or None to decode them first (3 beams); method: one of METHODS.

    Returns B Explanations. If the captioner says nothing of an image, its Explanation has no words.
    UserError for an unknown method or one that does not suit the captioner, images of another
    shape, another number of captions, an empty caption, or a word that the captioner cannot say.

    May be called from several threads, and of a captioner in train mode.
    """
    if any(parameter.is_inference() for parameter in captioner.parameters()):
        raise UserError(
            "the captioner was moved or converted inside torch.inference_mode(), so it has no "
            "gradients; do that outside"
        )
    chosen = method_for(captioner, method)
    captioner.encoder.check_inputs(images)
    images = images.clone() if images.is_inference() else images
    if captions is None:
        captions = captioner.caption(images)
        token_ids = [captioner.vocabulary.encode(words) for words in captions]
    else:
        token_ids = [explainable_ids(captioner.vocabulary, words) for words in captions]
    if len(token_ids) != len(images):
        raise UserError(f"{len(images)} images need as many captions, not {len(token_ids)}")
    explanations = []
    for part in _parts(images, token_ids):
        explanations += explain_batch(captioner, images[part], token_ids[part], chosen)
    for found in explanations:
        found.method = method
    return explanations


def explain_photographs(images, captions, explain):
    """Explain a single photograph, a list of them, or a tensor of images.

    captions: of each image, of a single photograph its own, or None; explain: a function of (PIL
    images or tensor, captions) that returns B Explanations. They get their photographs. Of a single
    one the result is its Explanation. UserError for one text as the captions of several images.
    """
    photographs = photographs_of(images)
    if is_photograph(images):
        captions = None if captions is None else [captions]
    elif isinstance(captions, str):
        raise UserError(f"several images need a caption each, and '{captions}' is one text")
    found = explain(images if photographs is None else photographs, captions)
    for explanation, photograph in zip(found, photographs or []):
        explanation.photograph = photograph
    return found[0] if is_photograph(images) else found


def explainable_ids(vocabulary, words):
    """The token ids of a caption's words, a sequence of strings or one text.

    UserError if there is no word, or for all words that the captioner cannot say, each with those
    of its words that are spelt most like it.
    """
    words = tokenize(words) if isinstance(words, str) else list(words)
    if not words:
        raise UserError("there is no word to explain in an empty caption")
    token_ids = vocabulary.encode(words)
    unknown = []
    for word, token_id in zip(words, token_ids):
        if not 0 < token_id < vocabulary.unk and word not in unknown:
            unknown.append(word)
    if unknown:
        raise UserError(unknown_words_message(vocabulary, unknown))
    return token_ids


def unknown_words_message(vocabulary, words):
    """What to tell a user of words that are not in a captioner's vocabulary."""
    *others, last = [f"'{word}'" for word in words]
    if others:
        message = f"the words {', '.join(others)} and {last} are not in this captioner's vocabulary"
    else:
        message = f"the word {last} is not in this captioner's vocabulary"
    message += ", so it cannot explain " + ("them" if others else "it")
    for word in words:
        nearest = vocabulary.nearest(word)
        if nearest:
            message += f"; instead of '{word}' it knows {', '.join(nearest)}"
    return message


def _parts(images, token_ids):
    """Slices of consecutive images, each small enough to be explained in one pass."""
    if not len(images):
        return []
    longest = max(1, max(map(len, token_ids)))
    size = max(1, PIXELS_PER_PASS // (longest * images[0, 0].numel()))
    return [slice(first, first + size) for first in range(0, len(images), size)]


def explain_batch(captioner, images, token_ids, method):
    """The Explanations of a few images for their captions, B lists of token ids; see `explain`."""
    images = images.to(captioner.device, captioner.fc.weight.dtype)
    # An image without words still needs a place in the batch; what is found there is cut off.
    vocabulary = captioner.vocabulary
    tokens = padded([[vocabulary.start, *(ids or [vocabulary.end])] for ids in token_ids])
    tokens = tokens.to(captioner.device)
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:]
    positions = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    found = propagate(captioner, images, inputs, targets, positions, method)
    explanations = []
    for row, ids in enumerate(token_ids):
        of_image = {name: value[row] for name, value in found.items()}
        explanations.append(_explanation(captioner, ids, of_image, method))
    return explanations


class Forward(NamedTuple):
    """What the forward pass of an explanation leaves for the way back.

    leaves     {name: tensor (B, ...), None or a list of tensors} that gradients are wanted of
    outputs    (B, T, H), the sums that go into the last layer
    scores     (B, T), the explained logits
    attention  (B, T, heads, L)
    beta       (B, T) or None
    """

    leaves: dict
    outputs: torch.Tensor
    scores: torch.Tensor
    attention: torch.Tensor
    beta: torch.Tensor | None


def propagate(captioner, images, inputs, targets, positions, method):
    """Explain, by one forward and one backward, the logits of K words of each image's caption.

    images (B, 3, H, W), or features where these are given; inputs and targets (B, T) token ids;
    positions (B, K): which of the T words; method: a Method. Returns a dict of fields of
    `Explanation`, and of what else the method says, each with B first: relevance (B, K, ...),
    scores, probabilities, attention and, if there is one, beta (B, T, ...).
    """
    precise = torch.autocast(images.device.type, enabled=False)
    with precise, exact_convolutions(), torch.enable_grad():
        forward = explained_forward(captioner, images, inputs, targets, method)
        gradients = {}
        if method.samples is not None:
            gradients = mean_gradients(captioner, images, inputs, targets, positions, method)
        elif method.perturb is not None:
            gradients = perturbed(captioner, images, inputs, targets, positions, method)
        elif method.backward:
            gradients = word_gradients(forward.scores, positions, forward.leaves)
    with precise, torch.no_grad():
        attention = forward.attention.transpose(0, 1)
        found = method.relevance(forward.leaves, gradients, attention, captioner.encoder.grid)
        batch = {name: part.transpose(0, 1) for name, part in found.items() if part is not None}
        probabilities = captioner.fc(forward.outputs).softmax(-1)
        batch["scores"] = forward.scores
        batch["probabilities"] = probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        batch["attention"] = forward.attention
        if forward.beta is not None:
            batch["beta"] = forward.beta
    return batch


def mean_gradients(captioner, images, inputs, targets, positions, method):
    """The mean of the gradients of image, regions and words over a method's samples."""
    totals = {}
    count = 0
    for change in method.samples():
        forward = explained_forward(captioner, images, inputs, targets, method, change)
        count += 1
        for name, found in word_gradients(forward.scores, positions, forward.leaves).items():
            totals[name] = found if totals.get(name) is None else totals[name] + found
    return {name: None if total is None else total / count for name, total in totals.items()}


@torch.no_grad()
def perturbed(captioner, images, inputs, targets, positions, method):
    """What a method of perturbation_utils.py finds of the words at the positions (B, K)."""

    def score(changed, embeddings):
        forward = explained_forward(
            captioner, images, inputs, targets, method, lambda *_: (changed, embeddings)
        )
        return forward.scores.gather(1, positions)

    # What the network sees of the images is what is changed.
    seen = captioner.encoder.folded().own_pixels(images)
    return method.perturb(seen, captioner.eval_view().embedding(inputs), score)


def explained_forward(captioner, images, inputs, targets, method, change=None):
    """The captioner's forward under the rules of a method, teacher-forced; see `propagate`.

    change: one of the method's samples, or None.
    """
    encoder = captioner.encoder.folded()
    captioner = captioner.eval_view()
    rules = method.rules()
    rules.watched = {name: [] for name in method.leaves}
    through_encoder = method.pixels and not encoder.given
    # The relevance of a pixel is that of what the network sees of it.
    images = encoder.own_pixels(images)
    embeddings = captioner.embedding(inputs)
    if change is not None:
        images, embeddings = change(images, embeddings)
    images = images.detach().requires_grad_(through_encoder)
    embeddings = embeddings.detach().requires_grad_()
    with method.encoder():
        features = encoder.regions(images)
    if not through_encoder:
        features = features.detach().requires_grad_()
    memory = captioner.image_memory(features, rules)
    unrolled = captioner.unroll(embeddings.unsqueeze(1), memory, rules)
    outputs = rules.epsilon(summed([addend.squeeze(1) for addend in unrolled.addends]))
    rows = captioner.fc.weight[targets]
    scores = rules.epsilon((outputs * rows).sum(-1) + captioner.fc.bias[targets])
    leaves = {"image": None if encoder.given else images, "regions": features}
    leaves |= {"words": embeddings, **rules.watched}
    beta = None if unrolled.beta is None else unrolled.beta.squeeze(1)
    return Forward(leaves, outputs, scores, unrolled.attention.squeeze(1), beta)


def word_gradients(scores, positions, leaves, retain_graph=False):
    """The gradients of the scores (B, T) at the positions (B, K) with respect to the leaves.

    leaves: {name: tensor (B, ...), None, or a list of tensors}. Returns {name: tensor (K, B, ...)},
    None for a leaf that wants no gradient or on which the scores do not depend, or a list of these.
    retain_graph: whether the backward will be called once more.
    """
    seeds = F.one_hot(positions, scores.shape[1]).to(scores).transpose(0, 1)  # (K, B, T)
    wanted = []
    for leaf in leaves.values():
        for tensor in leaf if isinstance(leaf, list) else [leaf]:
            if tensor is not None and tensor.requires_grad:
                wanted.append(tensor)
    results = torch.autograd.grad(
        scores, wanted, seeds, retain_graph, is_grads_batched=True, allow_unused=True
    )
    gradients = iter(results)

    def gradient_of(tensor):
        return next(gradients) if tensor is not None and tensor.requires_grad else None

    found = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, list):
            found[name] = [gradient_of(tensor) for tensor in leaf]
        else:
            found[name] = gradient_of(leaf)
    return found


def _explanation(captioner, token_ids, parts, method):
    """The Explanation of one image by a Method, cut to the length of its caption.

    parts: what `propagate` found for it.
    """
    length = len(token_ids)
    cut = {name: value[:length].detach().cpu() for name, value in parts.items()}
    cut["word_relevance"] = cut["word_relevance"][:, :length]
    fields = {"image_relevance": None, "beta": None}
    fields |= {"kind": method.kind, "additive": method.additive}
    extra = {}
    for name, value in cut.items():
        if name in Explanation.__dataclass_fields__:
            fields[name] = value
        else:
            extra[name] = value
    words = captioner.vocabulary.decode(token_ids)
    return Explanation(words=words, extra=extra, **fields)


class _ExactConvolutions:
    """How many explanations are under way, and how the switch for TF32 was set before the first."""

    def __init__(self):
        self.lock = threading.Lock()
        self.under_way = 0
        self.allowed = None

    def begin(self):
        """The first one switches TF32 off."""
        with self.lock:
            if not self.under_way:
                self.allowed = torch.backends.cudnn.allow_tf32
                torch.backends.cudnn.allow_tf32 = False
            self.under_way += 1

    def end(self):
        """The last one leaves the switch as the first has found it."""
        with self.lock:
            self.under_way -= 1
            if not self.under_way:
                torch.backends.cudnn.allow_tf32 = self.allowed


_EXACT_CONVOLUTIONS = _ExactConvolutions()


@contextmanager
def exact_convolutions():
    """Convolutions in float32 inside. By default a GPU would multiply in TF32, 10 bits of mantissa.

    The switch is global, so threads that explain at the same time share it.
    """
    _EXACT_CONVOLUTIONS.begin()
    try:
        yield
    finally:
        _EXACT_CONVOLUTIONS.end()
