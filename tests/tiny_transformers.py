"""Tiny captioners of transformers with random weights, saved as their publishers save them."""

import json

import torch
import transformers
from torch import nn

WORDS = ["a", "dog", "##gy", "on", "the", "gr", "##ass", "red", "ball", "##s", ".", "'"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
BERT_VOCABULARY = SPECIAL + WORDS
GPT2_PIECES = ["a", "d", "o", "g", "r", "s", "Ġ", "do", "dog", "Ġd", "Ġdo", "Ġdog", "Ġa", "Ġr"]
GPT2_MERGES = ["d o", "do g", "Ġ d", "Ġd o", "Ġdo g", "Ġ a", "Ġ r"]
SIZE = 8
PATCH = 4  # so a grid of 2 x 2
VISION = {"image_size": SIZE, "patch_size": PATCH, "num_hidden_layers": 2}
SMALL = {"hidden_size": 12, "intermediate_size": 16, "num_attention_heads": 3}
IMAGES = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]}


def bert_tokenizer(folder):
    path = folder / "vocab.txt"
    path.write_text("\n".join(BERT_VOCABULARY))
    return transformers.BertTokenizerFast(str(path), bos_token="[DEC]")


def gpt2_tokenizer(folder):
    pieces = {piece: index for index, piece in enumerate([*GPT2_PIECES, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(pieces))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *GPT2_MERGES]))
    return transformers.GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))


def blip(folder):
    sizes = {"vocab_size": len(BERT_VOCABULARY), "encoder_hidden_size": 12, "num_hidden_layers": 2}
    ids = {"bos_token_id": 5, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    config = transformers.BlipConfig(
        text_config={**SMALL, **sizes, **ids, "max_position_embeddings": 20},
        vision_config={**SMALL, **VISION},
    )
    size = {"height": SIZE, "width": SIZE}
    processor = transformers.BlipImageProcessor(size=size, **IMAGES)
    return transformers.BlipForConditionalGeneration(config), bert_tokenizer(folder), processor


def git(folder):
    config = transformers.GitConfig(
        vision_config={**SMALL, **VISION},
        vocab_size=len(BERT_VOCABULARY),
        num_hidden_layers=2,
        max_position_embeddings=20,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        **SMALL,
    )
    size = {"height": SIZE, "width": SIZE}
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=size, **IMAGES
    )
    return transformers.GitForCausalLM(config), bert_tokenizer(folder), processor


def vit_gpt2(folder):
    tokenizer = gpt2_tokenizer(folder)
    end = tokenizer.eos_token_id
    config = transformers.VisionEncoderDecoderConfig(
        encoder={"model_type": "vit", **SMALL, **VISION},
        decoder={
            "model_type": "gpt2",
            "vocab_size": len(tokenizer),
            "n_embd": 12,
            "n_layer": 2,
            "n_head": 3,
            "n_positions": 20,
            "bos_token_id": end,
            "eos_token_id": end,
            "is_decoder": True,
            "add_cross_attention": True,
        },
        decoder_start_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    size = {"height": SIZE, "width": SIZE}
    processor = transformers.ViTImageProcessor(size=size, **IMAGES)
    return transformers.VisionEncoderDecoderModel(config), tokenizer, processor


FAMILIES = {"blip": blip, "git": git, "vit_gpt2": vit_gpt2}


def save(name, folder):
    """Save a captioner of a family into a folder, its weights large enough that all is used."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer, processor = FAMILIES[name](folder)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
        elif not parameter_name.endswith("weight"):
            nn.init.normal_(parameter, std=0.3)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder
