"""Published captioners of transformers, explained word by word: BLIP, GIT, ViT-GPT2 and the like.

    captioner = load_captioner("Salesforce/blip-image-captioning-base")    # or a folder
    captions = captioner.caption(images)
    explanations = captioner.explain(images, method="attnlrp")

A captioner is a subclass of `PretrainedCaptioner`, which says how its model of Hugging Face's
transformers is run; `FAMILIES` lists them. The model's own modules run unchanged: rules and
attention weights come by function modes (lrp_utils.TransformerLRP,
relevancy_utils.AttentionRecorder).

A model speaks in *sub-words*. A word is what stands between two spaces of the decoded text, and
what is said of it is gathered from its sub-words: its score is the sum of their logits, its
probability the product of theirs, and its relevance therefore the sum of theirs. As an input, a
word has the sum of the relevance of its sub-words, too. Attention weights are averaged. What an
earlier sub-word of a word does for a later one of the same word is `extra["own_relevance"]`.

Shapes: B images, K sub-words of a caption, T words, n image tokens, of which the last L = h * w
are patches, D channels. All of a forward pass is of one image, B = 1.
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from commandline import UserError
from decoding import stripped
from explanation import (
    Explanation,
    exact_convolutions,
    explain_photographs,
    method_for,
    word_gradients,
)
from images import is_photograph, photographs_of, renormalized
from relevancy_utils import AttentionRecorder
from transformermethods import METHODS, Block, ForwardPass

MAX_LENGTH = 30  # sub-words of a caption
DECODINGS = ("beam", "greedy")
# Values of gradients that are computed at once (0.4 GB in float32); bounds the memory.
GRADIENTS_PER_PASS = 100_000_000


# ------------------------------------------------------------------------------ what captioners use


class PatchEncoder(NamedTuple):
    """What a captioner's image encoder wants: the interface of encoder.Encoder that users read.

    name        what kind of network it is
    image_size  side of the square image, in pixels
    grid        (h, w) of the patches
    mean, std   three values each: how pixels are normalised
    """

    name: str
    image_size: int
    grid: tuple
    mean: tuple
    std: tuple

    given = False

    def own_pixels(self, images):
        """ImageNet-normalised images (B, 3, S, S) -> normalised as the model wants them."""
        return renormalized(images, self.mean, self.std)

    def check_inputs(self, images):
        """Raise a UserError unless `images` are (B, 3, S, S) of the size that the model takes."""
        shape = tuple(images.shape)
        size = self.image_size
        if len(shape) != 4 or shape[1:] != (3, size, size):
            raise UserError(
                f"this captioner wants images of shape (B, 3, {size}, {size}), not {shape}"
            )


class ForwardRecorder(AttentionRecorder):
    """Keeps attention blocks, and makes the word embeddings a leaf to get gradients of.

    word_weight: the matrix of word embeddings; watched: the weight of the layer norm whose output
    is kept as `features`, or None. `image_blocks` is the number of attention blocks before the
    decoder's.
    """

    def __init__(self, word_weight, watched=None):
        super().__init__()
        self.word_weight = word_weight
        self.watched = watched
        self.words = None
        self.features = None
        self.image_blocks = 0

    def keep_features(self, features):
        """Remember the image tokens, and that all blocks until now were the image's."""
        self.features = features
        self.image_blocks = len(self.blocks)
        return features

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = super().__torch_function__(function, types, args, kwargs)
        if function is F.embedding and args[1] is self.word_weight:
            self.words = output.detach().requires_grad_(torch.is_grad_enabled())
            return self.words.clone()  # models add to it in place
        if self.watched is not None and (kwargs or {}).get("weight") is self.watched:
            self.keep_features(output)
        return output


# ---------------------------------------------------------------------------------- the captioners


class PretrainedCaptioner(ABC):
    """A captioner of transformers. What a family has to offer are the methods at the top.

    model: in eval mode; tokenizer, processor: its tokenizer and image processor, as transformers
    loads them. UserError if its image encoder does not see a square grid of patches.
    """

    methods = METHODS
    prefix = 0  # text tokens before the inputs
    model_class: str  # the name of its model's class in transformers, which is loaded when needed

    @property
    @abstractmethod
    def vision_config(self):
        """The configuration of the image encoder."""

    @property
    @abstractmethod
    def text_config(self):
        """The configuration of the decoder."""

    @property
    @abstractmethod
    def word_embedding(self):
        """The nn.Embedding of the decoder."""

    @abstractmethod
    def run(self, pixels, ids, recorder):
        """The logits (1, K, V) that follow the inputs `ids` (1, K) of an image (1, 3, S, S).

        It runs inside `recorder`, and calls its `keep_features` if no layer is watched.
        """

    def recorder(self):
        """The ForwardRecorder for this family."""
        return ForwardRecorder(self.word_embedding.weight)

    @property
    def start(self):
        """The token id that every caption begins with."""
        return self.text_config.bos_token_id

    @property
    def end(self):
        """The token id that ends a caption."""
        return self.text_config.eos_token_id

    def decoder_kinds(self, count):
        """The kinds of the decoder's blocks, of which there are `count`; see `Block`."""
        return ["text", "cross"] * (count // 2)

    # ------------------------------------------------------------------------ what all have alike

    def __init__(self, model, tokenizer, processor):
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        size = self.vision_config.image_size
        patch = getattr(self.vision_config, "patch_size", None)
        if not isinstance(size, int) or not isinstance(patch, int):
            raise UserError(
                f"the image encoder {self.vision_config.model_type} has no square grid of patches "
                "to explain"
            )
        side = size // patch
        self.encoder = PatchEncoder(
            self.vision_config.model_type,
            size,
            (side, side),
            tuple(processor.image_mean),
            tuple(processor.image_std),
        )

    @property
    def model_type(self):
        """What transformers calls the kind of this captioner, such as "blip"."""
        return self.model.config.model_type

    @property
    def device(self):
        """Where the model is."""
        return self.model.device

    @property
    def padding(self):
        """The token id that says nothing."""
        known = self.tokenizer.pad_token_id
        return self.end if known is None else known

    @property
    def longest(self):
        """The sub-words of the longest caption that the decoder has positions for."""
        return self.text_config.max_position_embeddings

    def pixels_of(self, images):
        """The model's own pixels (B, 3, S, S) of ImageNet-normalised images, or of photographs.

        Photographs are cut and resized as the model was published, tensors are as they are.
        """
        photographs = photographs_of(images)
        if photographs is None:
            self.encoder.check_inputs(images)
            pixels = self.encoder.own_pixels(images.clone())
        else:
            pixels = self.processor(photographs, return_tensors="pt")["pixel_values"]
        return pixels.to(self.device, self.model.dtype)

    @torch.no_grad()
    def caption(self, images, method="beam", beam_size=3, max_length=None, strip=()):
        """Images (B, 3, S, S), ImageNet-normalised, or photographs -> B captions, lists of words.

        Photographs are a list of PIL images or of names of files; of a single one the result is its
        caption. method: "beam" or "greedy"; max_length: sub-words; strip: names of decoding.STRIP
        to apply.
        """
        captions = []
        for ids in self._decoded(self.pixels_of(images), method, beam_size, max_length):
            captions.append(stripped(self.words_of(ids)[0], strip))
        return captions[0] if is_photograph(images) else captions

    @torch.no_grad()
    def _decoded(self, pixels, method="beam", beam_size=3, max_length=None):
        """The sub-words of captions that the model makes of pixels: B lists of token ids.

        Of all special tokens only the end is ever said.
        """
        if method not in DECODINGS:
            known = " and ".join(DECODINGS)
            raise UserError(f"a pretrained captioner has no decoding '{method}', only {known}")
        silent = [token for token in self.tokenizer.all_special_ids if token != self.end]
        sequences = self.model.generate(
            pixel_values=pixels,
            num_beams=beam_size if method == "beam" else 1,
            do_sample=False,
            max_new_tokens=min(max_length or MAX_LENGTH, self.longest),
            suppress_tokens=sorted({*silent, self.start} - {self.end}),
        )
        captions = []
        for sequence in sequences.tolist():
            said = sequence[1:]  # after the start
            if self.end in said:
                said = said[: said.index(self.end)]
            captions.append(said)
        return captions

    def words_of(self, ids):
        """The words of sub-words, and for each sub-word the index of its word.

        A word is what stands between spaces once all sub-words up to there are decoded. A sub-word
        that is a space only belongs to the word that follows it.
        """
        owners = []
        words = []
        for count in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
            words = text.split()
            finished = text[-1:].isspace()
            owners.append(len(words) if finished else len(words) - 1)
        last = len(words) - 1
        return words, [min(max(owner, 0), last) for owner in owners]

    def check_words(self, words):
        """Raise a UserError unless a caption of these words can be explained."""
        self.sub_words(words)

    def sub_words(self, words):
        """The token ids of a caption's words; UserError if there is none, or one is not known."""
        words = words.split() if isinstance(words, str) else list(words)
        if not words:
            raise UserError("there is no word to explain in an empty caption")
        for word in words:
            known = self.tokenizer(word, add_special_tokens=False)["input_ids"]
            if not known or set(known) & set(self.tokenizer.all_special_ids):
                raise UserError(
                    f"the word '{word}' is not in this captioner's vocabulary, "
                    "so it cannot be explained"
                )
        ids = self.tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
        if len(ids) > self.longest:
            raise UserError(f"the caption has {len(ids)} sub-words, and {self.longest} can be said")
        return ids

    @torch.inference_mode(False)
    def explain(self, images, captions=None, method="attnlrp"):
        """Explain every word of a caption of every image: B Explanations.

        images: (B, 3, S, S), ImageNet-normalised, or photographs, as for `caption`; captions: B
        sequences of words, or None to decode them first (3 beams); of a single photograph its own
        caption, and the result is its Explanation; method: one of METHODS. See the top of this file
        for what is said of words of several sub-words, and explanation.Explanation for the fields.
        Heat maps are of the pixels that the model sees. `extra` holds "class_relevance" (T,), of
        image tokens that are no patch, and "own_relevance" (T,).

        UserError as of explanation.explain. The words of an Explanation are as the tokenizer takes
        a caption apart.
        """

        def explained(images, captions):
            return self._explain(images, captions, method)

        return explain_photographs(images, captions, explained)

    def _explain(self, images, captions, method):
        """The Explanations of several images; see `explain`."""
        chosen = method_for(self, method)
        pixels = self.pixels_of(images)
        if captions is None:
            token_ids = self._decoded(pixels)
        else:
            token_ids = [self.sub_words(words) for words in captions]
        if len(token_ids) != len(pixels):
            raise UserError(f"{len(pixels)} images need as many captions, not {len(token_ids)}")
        explanations = []
        for row, ids in enumerate(token_ids):
            explanations.append(self._explain_one(pixels[row : row + 1], ids, chosen))
            explanations[-1].method = method
        return explanations

    def _explain_one(self, pixels, ids, method):
        """The Explanation of one image (1, 3, S, S) for a list of sub-words."""
        # Without words there is still a forward pass, so that all fields have their shapes.
        targets = torch.tensor([ids or [self.end]], device=self.device)
        forward, found = self.relevance_of_caption(pixels, targets, method)
        with torch.no_grad():
            explanation = self._explanation(forward, found, ids)
        explanation.kind = method.kind
        explanation.additive = method.additive
        return explanation

    def relevance_of_caption(self, pixels, targets, method):
        """The ForwardPass of an image for sub-words (1, K), and what a TransformerMethod finds."""
        precise = torch.autocast(self.device.type, enabled=False)
        with precise, exact_convolutions(), torch.enable_grad():
            forward = self.forward_pass(pixels, targets, method.rules)
            return forward, self._propagate(forward, method)

    def forward_pass(self, pixels, targets, rules=nullcontext):
        """The ForwardPass of an image (1, 3, S, S), teacher-forced on sub-words (1, K)."""
        start = targets.new_full((1, 1), self.start)
        return self.recorded(pixels, torch.cat([start, targets[:, :-1]], dim=1), targets, rules)

    def recorded(self, pixels, ids, targets, rules=nullcontext):
        """The ForwardPass of an image (1, 3, S, S), the inputs `ids` and the targets."""
        pixels = pixels.detach().requires_grad_(torch.is_grad_enabled())
        recorder = self.recorder()
        with rules(), recorder:
            logits = self.run(pixels, ids, recorder)
        decoder = len(recorder.blocks) - recorder.image_blocks
        kinds = ["image"] * recorder.image_blocks + self.decoder_kinds(decoder)
        return ForwardPass(
            pixels=pixels,
            ids=ids,
            targets=targets,
            features=recorder.features,
            words=recorder.words,
            logits=logits,
            blocks=[Block(*pair) for pair in zip(kinds, recorder.blocks, strict=True)],
            rows=self.rows_of(targets),
            prefix=self.prefix,
        )

    def rows_of(self, targets):
        """The text token from whose state each of the targets (1, T) is predicted: long (T,)."""
        return torch.arange(targets.shape[1], device=targets.device)

    @torch.no_grad()
    def scores(self, pixels, ids, targets):
        """The logits (1, K) of sub-words that follow the inputs `ids` (1, K) of an image."""
        logits = self.run(pixels, ids, self.recorder())
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def _propagate(self, forward, method):
        """What a method says of all K sub-words, taken in parts: {name: (K, ...)}."""
        leaves = method.leaves(forward)
        values = 0
        for leaf in leaves.values():
            for tensor in leaf if isinstance(leaf, list) else [leaf]:
                values += tensor.numel()
        at_once = max(1, GRADIENTS_PER_PASS // max(1, values))
        parts = []
        for positions in torch.arange(forward.targets.shape[1], device=self.device).split(at_once):
            gradients = {}
            if leaves:
                gradients = word_gradients(
                    forward.scores, positions[None], leaves, retain_graph=True
                )
            with torch.no_grad():
                parts.append(method.relevance(self, forward, gradients, positions))
        found = {}
        for name in parts[0]:
            found[name] = torch.cat([part[name] for part in parts])
        return found

    def _explanation(self, forward, found, ids):
        """The Explanation of words, from what was found of their sub-words."""
        words, owners = self.words_of(ids)
        said = len(ids) if words else 0  # forward has one sub-word even if there is no word
        of_words = forward.logits.new_zeros(len(words), said)  # which sub-words a word has
        of_words[owners[:said], range(said)] = 1
        others = forward.features.shape[1] - self.encoder.grid[0] * self.encoder.grid[1]
        image = self.image_map(found, others)
        chances = forward.logits.log_softmax(-1)
        chances = chances.gather(-1, forward.targets.unsqueeze(-1))[0, :said, 0]
        tokens = of_words @ found["tokens"][:said]
        inputs = joined_inputs(found["words"][:said, :said], of_words)
        mean = of_words / of_words.sum(-1, keepdim=True)
        attention = forward.last_attention()[:, :said, others:]
        fields = {
            "scores": of_words @ forward.scores[0, :said],
            "probabilities": (of_words @ chances).exp(),
            "image_relevance": torch.einsum("tk,khw->thw", of_words, image[:said]),
            "region_relevance": tokens[:, others:],
            "word_relevance": inputs[:, : len(words)].tril(),
            "attention": torch.einsum("tk,hkl->thl", mean, attention),
        }
        extra = {
            "class_relevance": tokens[:, :others].sum(-1),
            "own_relevance": inputs.diagonal(1),
        }
        fields = {name: value.detach().cpu() for name, value in fields.items()}
        extra = {name: value.detach().cpu() for name, value in extra.items()}
        return Explanation(words=words, beta=None, extra=extra, **fields)

    def patch_relevance(self, found):
        """The relevance of patches (P, L): that of their pixels where a method has it."""
        height, width = self.encoder.grid
        maps = found.get("image")
        if maps is None:
            return found["tokens"][:, -height * width :]
        patches = maps.unflatten(2, (width, -1)).unflatten(1, (height, -1))
        return patches.sum(dim=(2, 4)).flatten(1)

    def image_map(self, found, others):
        """The maps (P, S, S) of what a method has found; patches are enlarged.

        others: image tokens that are no patch.
        """
        size = self.encoder.image_size
        maps = found.get("image")
        if maps is None:
            maps = found["tokens"][:, others:].unflatten(-1, self.encoder.grid)
        if maps.shape[-1] == size:
            return maps
        return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def joined_inputs(relevance, of_words):
    """The relevance of inputs (K, K) for sub-words, as that of words for words: (T, T + 1).

    of_words (T, K): which sub-words a word has. Column 0 is the start, column 1 + t is word t; so
    in row t, column 1 + t is what the word's own earlier sub-words do for it.
    """
    if not len(of_words):
        return of_words.new_zeros(0, 1)
    start = relevance[:, :1]
    # Input i + 1 is sub-word i, and the last sub-word is no input.
    inputs = torch.cat([start, relevance[:, 1:] @ of_words[:, :-1].T], dim=1)
    return of_words @ inputs


class BlipCaptioner(PretrainedCaptioner):
    """BLIP: a vision transformer, and a BERT that attends to its tokens."""

    model_class = "BlipForConditionalGeneration"
    vision_config = property(lambda self: self.model.config.vision_config)
    text_config = property(lambda self: self.model.config.text_config)
    end = property(lambda self: self.text_config.sep_token_id)

    @property
    def word_embedding(self):
        """The nn.Embedding of the decoder."""
        return self.model.text_decoder.get_input_embeddings()

    def run(self, pixels, ids, recorder):
        """See PretrainedCaptioner.run."""
        features = self.model.vision_model(pixel_values=pixels).last_hidden_state
        recorder.keep_features(features)
        return self.model.text_decoder(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),  # or padding, as of `occlusion`, gives a warning
            encoder_hidden_states=features,
            use_cache=False,
        ).logits


class GitCaptioner(PretrainedCaptioner):
    """GIT: one transformer of image tokens and words, behind CLIP's vision transformer."""

    model_class = "GitForCausalLM"
    vision_config = property(lambda self: self.model.config.vision_config)
    text_config = property(lambda self: self.model.config)

    @property
    def word_embedding(self):
        """The nn.Embedding of the decoder."""
        return self.model.git.get_input_embeddings()

    def recorder(self):
        """The image tokens come out of the layer norm of the visual projection."""
        projection = self.model.git.visual_projection.visual_projection
        return ForwardRecorder(self.word_embedding.weight, projection[-1].weight)

    def decoder_kinds(self, count):
        """Image tokens and words are one sequence."""
        return ["joint"] * count

    def run(self, pixels, ids, recorder):
        """See PretrainedCaptioner.run."""
        logits = self.model(pixel_values=pixels, input_ids=ids, use_cache=False).logits
        return logits[:, -ids.shape[1] :]


class EncoderDecoderCaptioner(PretrainedCaptioner):
    """Any vision transformer and any language model that attends to its tokens, as ViT-GPT2."""

    model_class = "VisionEncoderDecoderModel"
    vision_config = property(lambda self: self.model.config.encoder)
    text_config = property(lambda self: self.model.config.decoder)

    @property
    def word_embedding(self):
        """The nn.Embedding of the decoder."""
        return self.model.decoder.get_input_embeddings()

    @property
    def start(self):
        """The token id that every caption begins with."""
        return self.model.config.decoder_start_token_id

    @property
    def end(self):
        """The token id that ends a caption."""
        own = self.model.config.eos_token_id
        return self.text_config.eos_token_id if own is None else own

    def run(self, pixels, ids, recorder):
        """See PretrainedCaptioner.run."""
        features = self.model.encoder(pixel_values=pixels).last_hidden_state
        recorder.keep_features(features)
        return self.model(
            encoder_outputs=(features,), decoder_input_ids=ids, use_cache=False
        ).logits


# By the model_type of a configuration of transformers.
FAMILIES = {
    "blip": BlipCaptioner,
    "git": GitCaptioner,
    "vision-encoder-decoder": EncoderDecoderCaptioner,
}


def is_pretrained(path):
    """Whether `path` is a folder of transformers, or a name of its hub such as OWNER/MODEL.

    What lies in a folder that exists is a file that is missing, and no name.
    """
    path = Path(path)
    if path.exists():
        return (path / "config.json").is_file()
    return len(path.parts) == 2 and path.suffix != ".pt" and not path.parent.exists()


def load_pretrained(path, device="cpu"):
    """The PretrainedCaptioner in a folder, or of a name of the hub, in eval mode on `device`.

    A folder is read without a network. UserError if it holds no captioner that this file knows, or
    if a name cannot be downloaded.
    """
    try:
        import huggingface_hub  # these two take seconds, which no other captioner needs
        import transformers
        from safetensors import SafetensorError
    except ImportError:
        raise UserError(
            f"{path} needs the package transformers; pip install 'transformers<5'"
        ) from None
    # Their warnings, such as of each try to reach the hub, are for who writes programs on them.
    transformers.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    local = Path(path).is_dir()
    options = {"local_files_only": local}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
        if config.model_type not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise UserError(
                f"{path} is a model of type '{config.model_type}', and the captioners of "
                f"transformers that can be explained are {known}"
            )
        captioner = FAMILIES[config.model_type]
        model = getattr(transformers, captioner.model_class).from_pretrained(path, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        processor = transformers.AutoImageProcessor.from_pretrained(path, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if local:
            raise UserError(f"{path} holds no captioner of transformers: {reason}") from None
        raise UserError(
            f"{path} is neither a file nor a folder here, and cannot be downloaded; where there is "
            "a network, download it, and give its folder"
        ) from None
    return captioner(model.to(device).eval(), tokenizer, processor)
