"""CLIPmapper: a frozen CLIP, and behind it a mapper that answers questions or captions.

After Huang, Jia, Zhang and Zhang (2023, arXiv 2308.10240), of whose paper only the abstract was at
hand: "a unified CLIP-based two-stage model ... CLIP encoder and a following mapper", with "self-
attention, cross-attention, single-modality, and cross-modality attention". What it leaves open is
our reading.

    captioner = load_captioner("checkpoints/clipmapper-flickr8k")     # a folder
    captions = captioner.caption(["photo.jpg"])
    answerer = load_captioner("checkpoints/clipmapper-scenes-vqa")
    answers = answerer.answer(images, ["what colour is the dog?"])
    explanations = answerer.explain_answers(images, questions, method="relevancy")

Stage one gives tokens of the image (a class token and patches) and of the text. Stage two has two
streams of tokens of W channels: the image's, and the text's behind a learned prefix. In each of its
layers both streams attend to themselves, and the text attends to the image. If the answer to a
question is wanted, the image also attends to the text (co-attention) in the second half of the
layers, and the first token of the prefix is classified. If a caption is wanted, the text is what
has been said so far; each word sees the prefix and the words before it, and its state gives the
next word.

Shapes: B images, n = 1 + L image tokens, K inputs, P tokens of the prefix, M = P + K, V outputs.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import decoding
from commandline import UserError, read_json, write_atomically
from contrastive import (
    Clip,
    image_tokens,
    load_tensors,
    patches,
    stem_config,
    stem_of_config,
    write_weights,
)
from explanation import Explanation, exact_convolutions, method_for
from pretrainedmodel import (
    DECODINGS,
    MAX_LENGTH,
    ForwardRecorder,
    PatchEncoder,
    PretrainedCaptioner,
)

MODEL_TYPE = "clipmapper"
TASKS = ("caption", "vqa")


@dataclass
class ClipMapperConfig:
    """The sizes of a mapper, saved in its config.json.

    task      one of TASKS
    answers   of a question answerer: the answers that it chooses from; else empty
    width     W, channels of the mapper's tokens
    layers, heads    of the mapper
    prefix    P, learned tokens before the text
    dropout   of what attention and MLPs add to the tokens
    places    whether the mapper is told again where each patch is
    """

    task: str = "caption"
    answers: tuple = ()
    width: int = 256
    layers: int = 4
    heads: int = 8
    prefix: int = 10
    dropout: float = 0.1
    places: bool = False


class Attention(nn.Module):
    """Multi-head attention of tokens that are normalised first."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens, asked=None, seen=None, owner=None):
        """What attending adds to the tokens (B, S, W).

        asked: the tokens (B, Q, W) that are attended to, as their own layer norm leaves them; None:
        the same. seen: bool, of the shape (..., S, Q), what a token may attend to; None: all.
        owner: long (B,), which row of `asked` belongs to each; None: the same row.
        """
        tokens = self.norm(tokens)
        asked = tokens if asked is None else asked
        query = self._by_head(self.query(tokens))
        key_value = self.key_value(asked)
        if owner is not None:
            key_value = key_value[owner]
        key, value = key_value.chunk(2, dim=-1)
        context = F.scaled_dot_product_attention(
            query, self._by_head(key), self._by_head(value), attn_mask=seen
        )
        return self.dropout(self.output(context.transpose(1, 2).flatten(2)))

    def _by_head(self, tokens):
        """(B, S, W) -> (B, heads, S, W / heads)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Mlp(nn.Sequential):
    """The MLP of a layer: what it adds to the tokens (B, S, W)."""

    def __init__(self, width, dropout):
        super().__init__(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )


class MapperLayer(nn.Module):
    """A layer of both streams.

    mutual: whether the image attends to the text, too; last: whether nothing needs the image's
    tokens any more.
    """

    def __init__(self, width, heads, dropout, mutual, last):
        super().__init__()
        self.image_self = Attention(width, heads, dropout)
        self.text_self = Attention(width, heads, dropout)
        self.text_to_image = Attention(width, heads, dropout)
        self.image_norm = nn.LayerNorm(width)
        self.text_mlp = Mlp(width, dropout)
        self.image_to_text = None
        self.text_norm = None
        if mutual and not last:
            self.image_to_text = Attention(width, heads, dropout)
            self.text_norm = nn.LayerNorm(width)
        self.image_mlp = None if last else Mlp(width, dropout)

    def forward(self, image, text, seen, owner=None):
        """Tokens of the image (B, n, W) and the text (B, M, W) -> those after this layer.

        seen: bool (..., M, M), which text tokens attend to which; owner: as of ClipMapper.read.
        """
        image = self.looked_at(image)
        text = text + self.text_self(text, seen=seen)
        asked = text
        text = text + self.text_to_image(text, self.image_norm(image), owner=owner)
        if self.image_to_text is not None:
            image = image if owner is None else image[owner]
            known = seen[..., :1, :]  # padding is no part of the text
            image = image + self.image_to_text(image, self.text_norm(asked), known)
        return self.finished(image), text + self.text_mlp(text)

    def looked_at(self, image):
        """The image's tokens when the text attends to them."""
        return image + self.image_self(image)

    def finished(self, image):
        """The image's tokens after the layer."""
        return image if self.image_mlp is None else image + self.image_mlp(image)


class ClipMapper(nn.Module):
    """The network: CLIP, which is frozen, with its stem, and the mapper.

    config: a ClipMapperConfig; clip: a contrastive.Clip.
    """

    def __init__(self, config, clip):
        super().__init__()
        self.config = config
        self.clip = clip.model
        self.stem = clip.stem
        sizes = clip.model.config
        width = config.width
        self.image_in = _entrance(sizes.vision_config.hidden_size, width)
        self.text_in = _entrance(sizes.text_config.hidden_size, width)
        self.prefix = nn.Parameter(0.02 * torch.randn(config.prefix, width))
        layers = []
        for number in range(config.layers):
            last = number == config.layers - 1
            mutual = config.task == "vqa" and number >= config.layers // 2
            layers.append(MapperLayer(width, config.heads, config.dropout, mutual, last))
        self.layers = nn.ModuleList(layers)
        outputs = len(config.answers) or sizes.text_config.vocab_size
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))
        self.end = sizes.text_config.eos_token_id
        vision = sizes.vision_config
        side = vision.image_size // vision.patch_size
        code = place_code(side, vision.hidden_size) if config.places else None
        self.register_buffer("places", code, persistent=False)

    @property
    def device(self):
        """Where the weights are."""
        return self.prefix.device

    @property
    def dtype(self):
        """Their type."""
        return self.prefix.dtype

    def train(self, mode=True):
        """Stage one stays in eval mode."""
        super().train(mode)
        self.clip.eval()
        if self.stem is not None:
            self.stem.eval()
        return self

    def mapper_parameters(self):
        """What is trained."""
        frozen = ("clip.", "stem.")
        named = self.named_parameters()
        return [parameter for name, parameter in named if not name.startswith(frozen)]

    def image_tokens(self, maps, kept=None):
        """Stage one of images: what `contrastive.patches` returns -> (B, n, D); kept: as there.

        If the mapper is told places, they are added: a CLIP that has learnt of the class token
        alone need not have kept them.
        """
        tokens = image_tokens(self.clip, maps, kept)
        if self.places is None:
            return tokens
        places = self.places.to(tokens).expand(len(tokens), -1, -1)
        if kept is not None:
            rows = torch.arange(len(kept), device=kept.device).unsqueeze(1)
            places = places[rows, kept]
        return tokens + F.pad(places, (0, 0, 1, 0))

    def text_tokens(self, ids):
        """Stage one of texts: token ids (B, K) -> (B, K, E). It sees no later token."""
        return self.clip.text_model(input_ids=ids).last_hidden_state

    def forward(self, image, ids):
        """Tokens of the image (B, n, D) and token ids (B, K) -> logits.

        (B, V) of the answers to questions, or of captions (B, K, V) of the words that follow.
        """
        return self.read(image, self.text_tokens(ids), self.seen(ids))

    def read(self, image, words, seen, owner=None):
        """As `forward`, of the tokens (B, K, E) of the text.

        owner: long (B,), the row of the image that each text is about, where several are about one:
        then layers in which the image does not attend to the text run once an image.
        """
        image = self.image_in(image)
        text = self.with_prefix(words)
        for layer in self.layers:
            image, text = layer(image, text, seen, owner)
            if layer.image_to_text is not None:
                owner = None
        return self.outputs(text)

    def with_prefix(self, words):
        """Stage one's tokens of texts (B, K, E) -> the text's stream (B, M, W)."""
        prefix = self.prefix.expand(len(words), -1, -1)
        return torch.cat([prefix, self.text_in(words)], dim=1)

    def outputs(self, text):
        """The text's stream (B, M, W) after the last layer -> logits, as of `forward`."""
        if self.config.task == "vqa":
            return self.head(text[:, 0])
        return self.head(text[:, self.config.prefix :])

    def seen(self, ids):
        """Which text tokens attend to which: bool, broadcast over (B, heads, M, M).

        Of questions, all see all up to the first end; of captions, none sees what follows it.
        """
        prefix = self.config.prefix
        if self.config.task == "vqa":
            ends = (ids == self.end).cumsum(dim=1)
            within = (ends == 0) | ((ends == 1) & (ids == self.end))
            known = F.pad(within, (prefix, 0), value=True)
            return known[:, None, None].expand(-1, 1, known.shape[1], -1)
        length = prefix + ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        seen[:prefix, :prefix] = True
        return seen

    # ------------------------------------------------------------------------------ word by word

    def image_states(self, image):
        """Of a captioner: what the text attends to in each layer, from tokens (B, n, D).

        It does not depend on the text. Returns layers of (B, n, W).
        """
        image = self.image_in(image)
        states = []
        for layer in self.layers:
            image = layer.looked_at(image)
            states.append(layer.image_norm(image))
            image = layer.finished(image)
        return states

    def next_logits(self, states, ids):
        """Of a captioner: logits (B, V) of the word after the inputs (B, K); states: as above."""
        text = self.with_prefix(self.text_tokens(ids))
        seen = self.seen(ids)
        for layer, state in zip(self.layers, states):
            text = text + layer.text_self(text, seen=seen)
            text = text + layer.text_to_image(text, state)
            text = text + layer.text_mlp(text)
        return self.outputs(text)[:, -1]


def _entrance(channels, width):
    """From stage one's tokens to the mapper's."""
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))


def place_code(side, channels):
    """Sines and cosines that tell the row and the column of each of side * side patches: (L, D).

    Half of the channels are of the row, half of the column, each with periods from one to eight
    sides; as of Vaswani et al. (2017), of a picture.
    """
    pairs = channels // 4
    periods = 8 ** (torch.arange(pairs) / max(1, pairs - 1))
    angles = 2 * torch.pi * (torch.arange(side)[:, None] + 0.5) / side / periods  # (side, pairs)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves[:, None].expand(-1, side, -1)
    columns = waves[None].expand(side, -1, -1)
    code = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return F.pad(code, (0, channels - code.shape[1]))


# --------------------------------------------------------------------------------- saving, loading


def save_clipmapper(folder, model, clip):
    """Write a ClipMapper with its Clip's tokenizer and processor, config.json last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clip.tokenizer.save_pretrained(folder)
    clip.processor.save_pretrained(folder)
    write_weights(folder / "model.safetensors", model)
    config = {
        "model_type": MODEL_TYPE,
        **asdict(model.config),
        "clip": clip.model.config.to_dict(),
        **stem_config(clip.stem),
    }
    with write_atomically(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1, default=str))


def is_clipmapper(path):
    """Whether a path is a folder that `save_clipmapper` has written."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return False
    found = read_json(config)
    return isinstance(found, dict) and found.get("model_type") == MODEL_TYPE


def load_clipmapper(path, device="cpu"):
    """The ClipMapperCaptioner in a folder, in eval mode on `device`.

    UserError if a part of it is missing, or does not fit.
    """
    import transformers

    path = Path(path)
    found = read_json(path / "config.json")
    try:
        sizes = {row.name: found[row.name] for row in fields(ClipMapperConfig)}
        clip_config = transformers.CLIPConfig.from_dict(found["clip"])
        stem = stem_of_config(found)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, config=clip_config, local_files_only=True
        )
        processor = transformers.CLIPImageProcessor.from_pretrained(path, local_files_only=True)
        clip = Clip(transformers.CLIPModel(clip_config), stem, tokenizer, processor)
        config = ClipMapperConfig(**sizes)
        if config.task not in TASKS:
            raise ValueError(f"there is no task '{config.task}'")
        config.answers = tuple(config.answers)
        model = ClipMapper(config, clip)
    except (KeyError, TypeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} holds no whole CLIPmapper: {reason}") from None
    load_tensors(model, path / "model.safetensors")
    return ClipMapperCaptioner(model.to(device).eval().requires_grad_(False), clip)


# ----------------------------------------------------------------------------------- the captioner


class ClipMapperCaptioner(PretrainedCaptioner):
    """A CLIPmapper that captions, or answers questions, and explains what it says.

    model: a ClipMapper in eval mode; clip: its Clip. What is called pixels here is what the patches
    are made of: with a stem, what its `maps` returns, (B, C, h, w).
    """

    model_type = MODEL_TYPE
    vision_config = property(lambda self: self.clip.model.config.vision_config)
    text_config = property(lambda self: self.clip.model.config.text_config)
    start = property(lambda self: self.tokenizer.bos_token_id)
    end = property(lambda self: self.tokenizer.eos_token_id)
    prefix = property(lambda self: self.model.config.prefix)

    def __init__(self, model, clip):
        self.clip = clip
        super().__init__(model, clip.tokenizer, clip.processor)
        if clip.stem:
            stem = clip.stem
            normalised = (stem.mean, stem.std)
            self.encoder = PatchEncoder(stem.name, stem.image_size, stem.grid, *normalised)

    @property
    def task(self):
        """One of TASKS."""
        return self.model.config.task

    @property
    def answers(self):
        """The answers that a question answerer chooses from; none for a captioner."""
        return self.model.config.answers

    @property
    def word_embedding(self):
        """The nn.Embedding of CLIP's text encoder."""
        return self.model.clip.text_model.embeddings.token_embedding

    @property
    def longest(self):
        """The sub-words of the longest text, without the start and the end."""
        return self.text_config.max_position_embeddings - 2

    @torch.no_grad()
    def pixels_of(self, images):
        """See above; images: as of PretrainedCaptioner.pixels_of."""
        return patches(self.model.stem, super().pixels_of(images))

    def run(self, pixels, ids, recorder):
        """See PretrainedCaptioner.run."""
        image = recorder.keep_features(self.model.image_tokens(pixels))
        logits = self.model(image, ids)
        return logits.unsqueeze(1) if self.task == "vqa" else logits

    def recorder(self):
        """The ForwardRecorder of CLIP's word embeddings."""
        return ForwardRecorder(self.word_embedding.weight)

    def decoder_kinds(self, count):
        """The kinds of the blocks behind the image encoder."""
        kinds = ["words"] * self.text_config.num_hidden_layers
        for layer in self.model.layers:
            kinds += ["image", "text", "cross"]
            if layer.image_to_text is not None:
                kinds.append("mutual")
        return kinds

    def rows_of(self, targets):
        """The text token from whose state each of the targets (1, T) is predicted: long (T,)."""
        if self.task == "vqa":
            return targets.new_zeros(1)
        return self.prefix + super().rows_of(targets)

    def require(self, task):
        """Raise a UserError unless this CLIPmapper has learnt the task."""
        if self.task != task:
            learnt = "answers questions" if self.task == "vqa" else "captions images"
            raise UserError(f"this CLIPmapper {learnt}; it has not learnt the task '{task}'")

    # ------------------------------------------------------------------------------------ captions

    def explain(self, images, captions=None, method="attnlrp"):
        """See PretrainedCaptioner.explain. UserError if this one answers questions."""
        self.require("caption")
        return super().explain(images, captions, method)

    @torch.no_grad()
    def _decoded(self, pixels, method="beam", beam_size=3, max_length=None):
        """The sub-words of captions that the model makes of pixels: B lists of token ids."""
        self.require("caption")
        if method not in DECODINGS:
            known = " and ".join(DECODINGS)
            raise UserError(f"a CLIPmapper has no decoding '{method}', only {known}")
        longest = min(max_length or MAX_LENGTH, self.longest)
        options = {"beam_size": beam_size} if method == "beam" else {}
        return self.decoded_tokens(self.model.image_tokens(pixels), method, longest, **options)

    @torch.no_grad()
    def decoded_tokens(self, image, method="beam", max_length=MAX_LENGTH, **options):
        """As `_decoded`, of stage one's tokens (B, n, D) of images; options: of the decoder."""
        speaker = Speaker(self.model, self.tokenizer)
        found = decoding.decode(speaker, image, method, max_length, **options)
        return [captions[0] for captions in found]

    # ------------------------------------------------------------------------------------- answers

    def question_ids(self, questions):
        """The token ids (B, K) of questions; UserError for one that is empty or too long."""
        for question in questions:
            if not question.strip():
                raise UserError("there is no word in an empty question")
            length = len(self.tokenizer(question, add_special_tokens=False)["input_ids"])
            if length > self.longest:
                raise UserError(
                    f"the question '{question[:60]}' has {length} sub-words, and {self.longest} "
                    "can be asked"
                )
        return self.clip.token_ids(questions).to(self.device)

    @torch.no_grad()
    def answer(self, images, questions):
        """Images (B, 3, S, S) or photographs, and B questions -> B answers."""
        self.require("vqa")
        ids = self.question_ids(questions)
        pixels = self.pixels_of(images)
        if len(pixels) != len(ids):
            raise UserError(f"{len(pixels)} images need as many questions, not {len(ids)}")
        best = self.model(self.model.image_tokens(pixels), ids).argmax(dim=-1)
        return [self.answers[index] for index in best.tolist()]

    def explain_answers(self, images, questions, answers=None, method="attnlrp"):
        """Explain an answer to a question of each image: B Explanations.

        answers: what to explain, of `answers`; None: what the model says. The `words` of an
        Explanation are the sub-words of the question, which are `given`, and the answer; only of
        that something is said, so its row is the last one. UserError for an answer that the model
        does not know.
        """
        chosen = method_for(self, method)
        answers = self.answer(images, questions) if answers is None else answers
        pixels = self.pixels_of(images)
        explanations = []
        for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            forward, found = self.question_relevance(
                pixels[row : row + 1], question, answer, chosen
            )
            with torch.no_grad():
                explanations.append(self._answer_explanation(forward, found, answer))
            explanations[-1].method = method
            explanations[-1].kind = chosen.kind
            explanations[-1].additive = chosen.additive
        return explanations

    def question_relevance(self, pixels, question, answer, method):
        """The ForwardPass of a question, and what a TransformerMethod says of it: {name: (1, ...)}.

        pixels: of one image, as of `pixels_of`.
        """
        self.require("vqa")
        if answer not in self.answers:
            raise UserError(f"'{answer}' is none of the {len(self.answers)} answers that are known")
        ids = self.question_ids([question])
        targets = torch.tensor([[self.answers.index(answer)]], device=self.device)
        with exact_convolutions(), torch.enable_grad(), torch.inference_mode(False):
            forward = self.recorded(pixels, ids, targets, method.rules)
            return forward, self._propagate(forward, method)

    def _answer_explanation(self, forward, found, answer):
        """The Explanation of an answer, behind the question's words, which have zeros."""
        others = forward.image_tokens - self.encoder.grid[0] * self.encoder.grid[1]
        probabilities = forward.logits.softmax(-1).gather(-1, forward.targets.unsqueeze(-1))
        question = self.tokenizer.convert_ids_to_tokens(forward.ids[0, 1:-1].tolist())
        fields = {
            "scores": forward.scores[0],
            "probabilities": probabilities.flatten(),
            "image_relevance": self.image_map(found, others),
            "region_relevance": found["tokens"][:, others:],
            "word_relevance": found["words"][:, :-1],  # of the start, and of the question
            "attention": forward.last_attention()[:, :, others:].transpose(0, 1),
        }
        extra = {"class_relevance": found["tokens"][:, :others].sum(-1)}
        for values in (fields, extra):
            for name, value in values.items():
                before = value.new_zeros(len(question), *value.shape[1:])
                values[name] = torch.cat([before, value]).detach().cpu()
        return Explanation(
            words=[*question, answer], beta=None, extra=extra, given=len(question), **fields
        )


class Speaker:
    """A captioning ClipMapper as decoding.py wants captioners; the state are the words so far."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.vocabulary = SimpleNamespace(
            start=tokenizer.bos_token_id, end=tokenizer.eos_token_id, pad=tokenizer.pad_token_id
        )
        silent = set(tokenizer.all_special_ids) - {self.vocabulary.end}
        self.silent = sorted(silent)

    def image_memory(self, features):
        """Tokens of images (B, n, D) -> what the text attends to in each layer, layers apart."""
        return States(self.model.image_states(features))

    def initial_state(self, memory, captions):
        """No word: (B, N, 0)."""
        first = memory.layers[0]
        return (torch.empty(len(first), captions, 0, dtype=torch.long, device=first.device),)

    def next_words(self, token_ids, state, memory):
        """The token ids (B, N) just said -> log-probabilities (B, N, V) of the next, new state."""
        said = torch.cat([state[0], token_ids.unsqueeze(-1)], dim=-1)
        captions = said.shape[1]
        states = [layer.repeat_interleave(captions, dim=0) for layer in memory.layers]
        logits = self.model.next_logits(states, said.flatten(0, 1))
        logits[:, self.silent] = -torch.inf
        return logits.log_softmax(-1).unflatten(0, (-1, captions)), (said,)


class States:
    """The layers' image tokens, (B, n, W) each, as decoding.py wants a captioner's memory."""

    def __init__(self, layers):
        self.layers = layers

    def of_images(self, index):
        """Those of some of the images."""
        return States([layer[index] for layer in self.layers])
