"""A tiny random CLIP as it is published, and CLIPmappers behind it."""

import tiny_transformers
import torch
import transformers
from torch import nn

from clipmappermodel import ClipMapper, ClipMapperConfig, save_clipmapper
from contrastive import load_clip, word_tokenizer

SIZES = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
TEXTS = ["is there a red dog on the grass ?", "what colour is the ball ?", "a doggy"]
ANSWERS = ("blue", "no", "red", "yes")


def save_clip(folder):
    """Save a CLIPModel of 8 x 8 pixels in patches of 4 x 4, with transformers' own functions."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(TEXTS, min_count=1)
    config = transformers.CLIPConfig(
        text_config={
            **SIZES,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 12,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **SIZES,
            "image_size": tiny_transformers.SIZE,
            "patch_size": tiny_transformers.PATCH,
        },
        projection_dim=8,
    )
    model = transformers.CLIPModel(config)
    enliven(model)
    size = {"height": tiny_transformers.SIZE, "width": tiny_transformers.SIZE}
    processor = transformers.CLIPImageProcessor(
        size=size, do_center_crop=False, **tiny_transformers.IMAGES
    )
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


def enliven(model):
    """Give a model weights so large that every nonlinearity is used."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
        elif not name.endswith(("weight", "scale")):
            nn.init.normal_(parameter, std=0.3)


def save_mapper(task, clip_folder, folder, answers=ANSWERS):
    """Save a CLIPmapper of three layers behind the CLIP of a folder."""
    clip = load_clip(clip_folder)
    torch.manual_seed(1)
    answers = answers if task == "vqa" else ()
    config = ClipMapperConfig(
        task, answers, width=12, layers=3, heads=3, prefix=2, dropout=0.1, places=task == "vqa"
    )
    model = ClipMapper(config, clip)
    for name, part in model.named_children():
        if name not in ("clip", "stem"):
            enliven(part)
    nn.init.normal_(model.prefix)
    save_clipmapper(folder, model, clip)
    return folder
