"""An image and a text encoder of CLIP's form (Radford et al. 2021): loaded, or built to be trained.

    clip = load_clip("openai/clip-vit-base-patch32")    # downloaded once; or a folder
    clip = load_clip("checkpoints/clip-scenes")         # what train_clip.py has made

`train_clip.py` trains small ones from nothing on a captioned dataset. **These are not CLIP**: CLIP
has seen 400 million pairs, they a few thousand. But they have its form, are saved in transformers'
format, and whatever loads them loads CLIP.

A small one has a *stem*: its patches are the regions of one of encoder.py's networks instead of
pixels, so that a few thousand images are enough (the hybrid of Dosovitskiy et al. 2021). Its name
and stages are in config.json as "stem" and "stem_stages", its weights are in stem.safetensors.

Shapes: B images, n = 1 + h * w image tokens, of which the first is the class token, K text tokens,
D channels of an image token, E of a text token.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from captiondata import CaptionDataset
from commandline import UserError, write_atomically
from encoder import Encoder, build_encoder, encoder_spec, require_stage, stages
from featurecache import features_path
from images import image_transform, renormalized

SPECIAL_TOKENS = ("<|pad|>", "<|unknown|>", "<|startoftext|>", "<|endoftext|>")
LONGEST_TEXT = 32  # tokens, special ones included
STEM_FILE = "stem.safetensors"


@dataclass
class Clip:
    """An image and a text encoder, and what they need.

    model      transformers' CLIPModel
    stem       the Stem whose regions are the patches; None: the patches are pixels
    tokenizer, processor    of texts and of images, as transformers has them
    """

    model: nn.Module
    stem: "Stem | None"
    tokenizer: object
    processor: object

    @property
    def image_size(self):
        """The side of the square image in pixels."""
        return self.stem.image_size if self.stem else self.model.config.vision_config.image_size

    def token_ids(self, texts):
        """Texts -> token ids (B, K) with a start and an end, padded at the end; too long ones are
        cut."""
        longest = self.model.config.text_config.max_position_embeddings
        return self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )["input_ids"]

    def save(self, folder):
        """Write all of it into a folder, the configuration last: it stands for a whole one."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        write_weights(folder / "model.safetensors", self.model)
        if self.stem:
            write_weights(folder / STEM_FILE, self.stem)
        config = self.model.config.to_dict() | stem_config(self.stem)
        with write_atomically(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=1, sort_keys=True, default=str))


class Stem(Encoder):
    """An Encoder whose regions can tell, too, what its first stages were given.

    The last map of a network has forgotten much of what the first ones knew, such as colours. So
    beside each region stand the mean and the maximum, within it, of what each of `first` was given
    (hypercolumns, Hariharan et al. 2015).

    name: as `encoder_spec` has it; first: names of stages, as `encoder.stages` lists them.
    UserError if there is no such stage, or the network is no chain of stages.
    """

    def __init__(self, name, first=()):
        super().__init__(name)
        self.first = tuple(first)
        parts = stages(self) if self.first else {}
        for stage in self.first:
            require_stage(self, parts, stage)
        self.parts = list(parts.items())  # a list, so that their weights are not listed twice

    @property
    def patch_channels(self):
        """The channels C of `maps`."""
        size = self.image_size
        weight = next(self.parameters())
        with torch.no_grad():
            return self.maps(weight.new_zeros(1, 3, size, size)).shape[1]

    def maps(self, pixels):
        """What `own_pixels` returns -> the regions and what stands beside them: (B, C, h, w)."""
        if not self.first:
            return as_map(self.regions(pixels), self.grid)
        beside = []
        maps = pixels
        for name, part in self.parts:
            if name in self.first:
                beside.append(F.adaptive_avg_pool2d(maps, self.grid))
                beside.append(F.adaptive_max_pool2d(maps, self.grid))
            maps = part(maps)
        return self.scale * torch.cat([maps, *beside], dim=1)


def build_stem(name, weights=None, first=()):
    """The Stem called `name`, in eval mode and frozen, with weights as `build_encoder` has them."""
    stem = Stem(name, first)
    stem.load_state_dict(build_encoder(name, weights).state_dict())
    return stem.eval().requires_grad_(False)


def stem_config(stem):
    """What a configuration has to tell of a Stem, or of None."""
    if stem is None:
        return {"stem": None, "stem_stages": []}
    return {"stem": stem.name, "stem_stages": list(stem.first)}


def stem_of_config(config):
    """The Stem, with random weights, that `stem_config` has told of; None if it was None."""
    if not config.get("stem"):
        return None
    return Stem(config["stem"], config.get("stem_stages", ()))


def write_weights(path, module):
    """Write the state dict of a module in half precision, as transformers reads it."""
    from safetensors.torch import save

    tensors = {}
    for name, value in module.state_dict().items():
        value = value.detach().cpu().clone()  # or safetensors refuses what shares memory
        tensors[name] = value.half() if value.is_floating_point() else value
    with write_atomically(path) as temporary:
        temporary.write_bytes(save(tensors, {"format": "pt"}))


def patches(stem, pixels):
    """What CLIP's image encoder takes its patches from: pixels (B, 3, S, S) as the processor
    normalises them, or with a stem what its `maps` returns, (B, C, h, w).
    """
    return pixels if stem is None else stem.maps(pixels)


def as_map(regions, grid):
    """Regions (B, L, C), row by row, as a map (B, C, h, w)."""
    return regions.transpose(1, 2).unflatten(2, grid)


def image_tokens(model, maps, kept=None):
    """The tokens (B, n, D) of CLIP's image encoder, from what `patches` returns.

    kept: long (B, k), the patches that are left; the others are taken away before the first layer,
    and there are 1 + k tokens.
    """
    vision = model.vision_model
    embedded = vision.embeddings(maps)
    if kept is not None:
        rows = torch.arange(len(kept), device=kept.device).unsqueeze(1)
        embedded = torch.cat([embedded[:, :1], embedded[rows, 1 + kept]], dim=1)
    return vision.encoder(inputs_embeds=vision.pre_layrnorm(embedded)).last_hidden_state


def similarity(model, tokens, token_ids):
    """exp(t) times the cosine of each image and each text: (B, B').

    tokens (B, n, D), as of `image_tokens`; token_ids (B', K), padded at the end.
    """
    return _whole_similarity(model, tokens, model.text_model(input_ids=token_ids))


def similarities(model, tokens, token_ids):
    """`similarity`, and the fine-grained one (Yao et al. 2022): (B, B') each.

    In the latter each word looks for the patch that is most like it, and the mean is taken over the
    words, without start and end. It teaches patches what is in them, which CLIP's own loss, of the
    class token alone, does not.
    """
    text = model.text_model(input_ids=token_ids)
    patches = model.visual_projection(model.vision_model.post_layernorm(tokens[:, 1:]))
    words = model.text_projection(text.last_hidden_state[:, 1:])
    cosines = torch.einsum(
        "bpd,tkd->btkp", F.normalize(patches, dim=-1), F.normalize(words, dim=-1)
    )
    ends = token_ids == model.config.text_config.eos_token_id
    inner = ends.cumsum(dim=1)[:, 1:] == 0  # the first end is no word, nor what follows it
    best = cosines.amax(dim=-1) * inner
    fine = best.sum(dim=-1) / inner.sum(dim=-1).clamp(min=1)
    return _whole_similarity(model, tokens, text), model.logit_scale.exp() * fine


def _whole_similarity(model, tokens, text):
    """Of the class tokens and the texts' ends; text: what the text encoder returns."""
    vision = model.visual_projection(model.vision_model.post_layernorm(tokens[:, 0]))
    text = model.text_projection(text.pooler_output)
    scale = model.logit_scale.exp()
    return scale * F.normalize(vision, dim=-1) @ F.normalize(text, dim=-1).T


def contrastive_loss(scores, same):
    """The mean over images and texts of the cross-entropy of finding one's partner, in nats.

    scores (B, B): of image i and text j; same, bool (B, B): whether text j is as true of image i as
    its own. Such pairs are no negatives: equal captions, or two of one image.
    """
    own = torch.arange(len(scores), device=scores.device)
    apart = same & (own.unsqueeze(1) != own)
    scores = scores.masked_fill(apart, -torch.inf)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


# ------------------------------------------------------------------------------- loading, building


def load_clip(path):
    """The Clip in a folder, or of a name of Hugging Face's hub, in eval mode and frozen.

    UserError if it is none, or cannot be downloaded.
    """
    import transformers
    from safetensors import SafetensorError

    transformers.logging.set_verbosity_error()
    local = Path(path).is_dir()
    try:
        config = transformers.CLIPConfig.from_pretrained(path, local_files_only=local)
        if config.model_type != "clip":
            raise UserError(f"{path} is a model of type '{config.model_type}', and not CLIP")
        model = transformers.CLIPModel.from_pretrained(path, local_files_only=local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=local)
        processor = transformers.CLIPImageProcessor.from_pretrained(path, local_files_only=local)
        stem = stem_of_config(config.to_dict())
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no CLIP can be loaded from {path}: {reason}") from None
    if stem:
        load_tensors(stem, Path(path) / STEM_FILE)
        stem.eval().requires_grad_(False)
    return Clip(model.eval().requires_grad_(False), stem, tokenizer, processor)


def load_tensors(module, path):
    """Load a .safetensors file into a module; UserError if it is not that module's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} does not hold the weights that belong there: {reason}") from None


def new_clip(stem, texts, width, layers, heads, projection):
    """A small Clip with random weights over a frozen Stem.

    texts: of which the vocabulary is made; width, layers, heads: of both of its transformers;
    projection: dimensions in which images and texts are compared.
    """
    import transformers

    tokenizer = word_tokenizer(texts)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LONGEST_TEXT, **sizes, **ids}
    vision = {
        "image_size": stem.grid[0],
        "patch_size": 1,
        "num_channels": stem.patch_channels,
        **sizes,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=projection
    )
    return Clip(transformers.CLIPModel(config), stem, tokenizer, image_processor(stem.name))


def image_processor(encoder):
    """transformers' processor of images for one of encoder.py's networks, by its name."""
    import transformers

    spec = encoder_spec(encoder)
    size = {"height": spec.image_size, "width": spec.image_size}
    return transformers.CLIPImageProcessor(
        size=size,
        do_center_crop=False,
        resample=2,  # bilinear
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )


def word_tokenizer(texts, min_count=3):
    """A tokenizer of whole words, in transformers' form, of the words that texts have often enough.

    Words are what stands between spaces and punctuation, in lower case.
    """
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL_TOKENS[1]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        min_frequency=min_count, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    start, end = SPECIAL_TOKENS[2:]
    places = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=places
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[0],
        unk_token=SPECIAL_TOKENS[1],
        bos_token=start,
        eos_token=end,
    )


# ------------------------------------------------------------------------------- a dataset's images


@torch.no_grad()
def patches_of_split(clip, folder, split, device, batch_size=64):
    """Yields what `patches` returns of the images of a prepared dataset's split, in order.

    The regions of a stem are read if preparedataset.py has cached them with the stem's weights.
    """
    dataset = _cached_regions(clip.stem, folder, split)
    if dataset is None:
        dataset = CaptionDataset(folder, split, image_transform(clip.image_size))
    mean = clip.processor.image_mean
    std = clip.processor.image_std
    starts = range(0, len(dataset), batch_size)
    for start in tqdm(starts, f"reading {split}", unit="batch", leave=False):
        chosen = range(start, min(start + batch_size, len(dataset)))
        inputs = torch.stack([dataset[index][0] for index in chosen]).to(device).float()
        if dataset.features:
            yield as_map(inputs, clip.stem.grid)
        else:
            yield patches(clip.stem, renormalized(inputs, mean, std))


def _cached_regions(stem, folder, split):
    """The CaptionDataset of a stem's cached regions, or None."""
    if stem is None or stem.first or not features_path(folder, stem.name).exists():
        return None
    dataset = CaptionDataset(folder, split, features=stem.name)
    return dataset if dataset.features_attributes["weights_hash"] == stem.weights_hash() else None
