"""Encoders of CLIP's form: as transformers runs them, without patches, trained, saved."""

import json
import math

import numpy as np
import pytest
import tiny_clip
import torch
import transformers
from fixtures import command, prepared_scenes
from helpers import relative_difference

import train_clip
from commandline import UserError
from contrastive import (
    build_stem,
    contrastive_loss,
    image_tokens,
    load_clip,
    new_clip,
    patches_of_split,
    similarities,
    similarity,
    word_tokenizer,
)
from questions import read_questions

SMALL = ["--width", 8, "--layers", 1, "--heads", 2, "--projection", 4, "--batch_size", 4]
SMALL += ["--stem_weights", "random", "--device", "cpu"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(tiny_clip.save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return prepared_scenes(tmp_path_factory.mktemp("data") / "scenes", 8, 4, 4)


def test_similarities_are_those_that_transformers_computes(clip):
    model = clip.model
    images = torch.randn(3, 3, 8, 8)
    ids = clip.token_ids(tiny_clip.TEXTS)
    official = model(input_ids=ids, pixel_values=images).logits_per_image
    ours = similarity(model, image_tokens(model, images), ids)
    torch.testing.assert_close(ours, official)


def test_words_look_for_their_patch(clip):
    model = clip.model
    images = torch.randn(2, 3, 8, 8)
    ids = clip.token_ids(tiny_clip.TEXTS)
    tokens = image_tokens(model, images)
    whole, fine = similarities(model, tokens, ids)
    torch.testing.assert_close(whole, similarity(model, tokens, ids))
    hidden = model.text_model(input_ids=ids).last_hidden_state
    for i in range(2):
        for t, text in enumerate(tiny_clip.TEXTS):
            best = []
            for k in range(1, 1 + len(text.split())):
                word = model.text_projection(hidden[t, k])
                cosines = []
                for p in range(1, 5):
                    patch = model.vision_model.post_layernorm(tokens[i, p])
                    patch = model.visual_projection(patch)
                    cosines.append(torch.dot(word / word.norm(), patch / patch.norm()))
                best.append(max(cosines))
            expected = model.logit_scale.exp() * sum(best) / len(best)
            torch.testing.assert_close(fine[i, t], expected)


def test_an_image_without_patches_is_one_that_never_had_them(clip):
    """Layer by layer on the tokens that are left, each with the position that it had."""
    vision = clip.model.vision_model
    images = torch.randn(2, 3, 8, 8)
    kept = torch.tensor([[0, 3], [2, 1]])
    ours = image_tokens(clip.model, images, kept)
    for image, left, found in zip(images, kept.tolist(), ours):
        patches = vision.embeddings.patch_embedding(image[None]).flatten(2)[0].T
        tokens = [vision.embeddings.class_embedding] + [patches[place] for place in left]
        places = [0] + [1 + place for place in left]
        tokens = torch.stack(tokens) + vision.embeddings.position_embedding.weight[places]
        hidden = vision.pre_layrnorm(tokens[None])
        for layer in vision.encoder.layers:
            hidden = layer(hidden, None, None)[0]
        torch.testing.assert_close(found, hidden[0])


def test_all_patches_are_the_image(clip):
    images = torch.randn(2, 3, 8, 8)
    everything = torch.arange(4).expand(2, -1)
    torch.testing.assert_close(
        image_tokens(clip.model, images, everything), image_tokens(clip.model, images)
    )


def test_the_loss_leaves_out_what_is_as_true():
    scores = torch.randn(4, 4, dtype=torch.float64)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    total = 0.0
    for i in range(4):
        to_texts = sum(math.exp(scores[i, j]) for j in range(4) if j == i or not same[i, j])
        to_images = sum(math.exp(scores[j, i]) for j in range(4) if j == i or not same[j, i])
        total += math.log(to_texts) - scores[i, i] + math.log(to_images) - scores[i, i]
    assert contrastive_loss(scores, same).item() == pytest.approx(total.item() / 8, rel=1e-12)


def test_words_are_tokens_and_rare_ones_unknown():
    tokenizer = word_tokenizer(["A dog, a cat", "the dog"], min_count=2)
    ids = tokenizer("A dog and cat")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|startoftext|>",
        "a",
        "dog",
        "<|unknown|>",
        "<|unknown|>",
        "<|endoftext|>",
    ]


def test_long_texts_are_cut_and_still_end(clip):
    (ids,) = clip.token_ids(["a dog " * 20])
    assert len(ids) == 12
    assert ids[-1] == clip.tokenizer.eos_token_id


def test_what_is_saved_is_what_is_loaded(tmp_path):
    torch.manual_seed(0)
    stem = build_stem("scenes_vgg", "random")
    made = new_clip(stem, tiny_clip.TEXTS * 3, 8, 1, 2, 4)
    made.save(tmp_path)
    made.model.eval()
    found = load_clip(tmp_path)
    assert found.stem.name == "scenes_vgg"
    assert found.image_size == 128
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    maps = torch.randn(2, 256, 8, 8)
    ids = found.token_ids(tiny_clip.TEXTS)
    assert torch.equal(ids, made.token_ids(tiny_clip.TEXTS))
    before = similarity(made.model, image_tokens(made.model, maps), ids)
    after = similarity(found.model, image_tokens(found.model, maps), ids)
    assert relative_difference(after, before) < 0.01  # it was saved in half precision
    # transformers itself reads the folder, too.
    other = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(other(input_ids=ids, pixel_values=maps).logits_per_image, after)


def test_beside_each_region_stands_what_the_first_stages_were_given_there():
    torch.manual_seed(0)
    stem = build_stem("scenes_vgg", "random", ["7", "3"])
    pixels = torch.randn(2, 3, 128, 128)
    maps = stem.maps(pixels)
    assert maps.shape == (2, stem.patch_channels, 8, 8) == (2, 256 + 2 * 16 + 2 * 32, 8, 8)
    assert torch.equal(maps[:, :256].flatten(2).transpose(1, 2), stem.regions(pixels))
    after = 256
    for number in (3, 7):
        given = stem.net[:number](pixels)
        side = given.shape[-1] // 8
        channels = given.shape[1]
        for row, column in ((0, 0), (2, 5), (7, 7)):
            rows = slice(row * side, (row + 1) * side)
            columns = slice(column * side, (column + 1) * side)
            inside = given[:, :, rows, columns].flatten(2)
            found = maps[:, after : after + 2 * channels, row, column] / stem.scale
            torch.testing.assert_close(found[:, :channels], inside.mean(-1))
            torch.testing.assert_close(found[:, channels:], inside.amax(-1))
        after += 2 * channels


def test_the_stages_of_a_stem_are_saved_with_it(tmp_path):
    torch.manual_seed(0)
    made = new_clip(build_stem("scenes_vgg", "random", ["3"]), tiny_clip.TEXTS * 3, 8, 1, 2, 4)
    made.save(tmp_path)
    found = load_clip(tmp_path)
    assert found.stem.first == ("3",)
    pixels = torch.randn(1, 3, 128, 128)
    difference = relative_difference(found.stem.maps(pixels), made.stem.maps(pixels))
    assert difference < 0.01  # half precision
    image_tokens(found.model, found.stem.maps(pixels))


@pytest.mark.parametrize("stages", [5, None, ["99"]])
def test_a_configuration_of_odd_stages_is_one_line(stages, tmp_path):
    clip = new_clip(build_stem("scenes_vgg", "random", ["3"]), tiny_clip.TEXTS * 3, 8, 1, 2, 4)
    clip.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"stem_stages": stages}))
    with pytest.raises(UserError) as error:
        load_clip(tmp_path)
    assert "\n" not in str(error.value)


def test_a_stage_that_is_none_is_one_line():
    with pytest.raises(UserError, match="cannot be cut at '99'; choose from 1, 2"):
        build_stem("scenes_vgg", "random", ["99"])


@pytest.mark.parametrize("file", ["model.safetensors", "stem.safetensors", "config.json"])
def test_a_damaged_folder_is_one_line(file, tmp_path):
    made = new_clip(build_stem("scenes_vgg", "random"), tiny_clip.TEXTS * 3, 8, 1, 2, 4)
    made.save(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        load_clip(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_no_clip_is_one_line(tmp_path, monkeypatch):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="type 'bert', and not CLIP"):
        load_clip(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no CLIP can be loaded from nobody/clip") as error:
        load_clip("nobody/clip")
    assert "\n" not in str(error.value)


def test_texts_of_scenes_are_captions_and_questions_with_answers(scenes):
    texts = train_clip.texts_of(scenes, "train")
    assert len(texts) == 8
    for question in read_questions(scenes, "train"):
        told = any(f"{question.text} {question.answer}" in known for known in texts)
        assert told == (question.answer != "no")


def test_training_writes_a_clip_and_learns(scenes, tmp_path, monkeypatch, capsys):
    flags = ["--dataset", scenes, *SMALL, "--epochs", 6, "--output", tmp_path / "clip"]
    command(monkeypatch, train_clip, *flags)
    train_clip.main()
    assert "the encoders are" in capsys.readouterr().out
    report = json.loads((tmp_path / "clip" / "about.json").read_text())
    losses = [row["loss"] for row in report["history"]]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert not (tmp_path / "clip" / "training.pt").exists()
    clip = load_clip(tmp_path / "clip")
    assert next(patches_of_split(clip, scenes, "val", torch.device("cpu"))).shape == (4, 256, 8, 8)


def test_recall_counts_who_is_better_than_ones_own(scenes, tmp_path):
    torch.manual_seed(0)
    clip = new_clip(build_stem("scenes_vgg", "random"), tiny_clip.TEXTS * 3, 8, 1, 2, 4)
    maps = {split: torch.randn(6, 256, 8, 8).half() for split in ("train", "val")}
    known = ["a dog", "the ball", "is there", "what colour", "a dog", "on the grass"]
    texts = {split: [[text] for text in known] for split in maps}
    settings = dict.fromkeys(train_clip.REPEATED, 1) | {"patch_dropout": 0.25}
    training = train_clip.Training(clip, maps, texts, settings, torch.device("cpu"))
    found = training.measured("val")
    with torch.no_grad():
        tokens = image_tokens(clip.model.eval(), maps["val"].float())
        scores = similarity(clip.model, tokens, clip.token_ids(known)).numpy()
    for k in (1, 5):
        hits = 0
        for i in range(6):
            others = [j for j in range(6) if known[j] != known[i]]
            hits += sum(scores[i, j] > scores[i, i] for j in others) < k
        assert found[f"R@{k}"] == pytest.approx(hits / 6)


def test_an_interrupted_training_goes_on_bit_for_bit(scenes, tmp_path, monkeypatch):
    flags = ["--dataset", scenes, *SMALL, "--epochs", 3]
    command(monkeypatch, train_clip, *flags, "--output", tmp_path / "whole")
    train_clip.main()
    epoch = train_clip.Training.train_epoch

    def killed(self):
        if self.epochs.epoch == 2:
            raise KeyboardInterrupt
        return epoch(self)

    monkeypatch.setattr(train_clip.Training, "train_epoch", killed)
    command(monkeypatch, train_clip, *flags, "--output", tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        train_clip.main()
    monkeypatch.setattr(train_clip.Training, "train_epoch", epoch)
    command(monkeypatch, train_clip, *flags, "--lr", 0.5, "--output", tmp_path / "cut")
    with pytest.raises(UserError, match="other settings"):
        train_clip.main()
    command(monkeypatch, train_clip, *flags, "--output", tmp_path / "cut")
    train_clip.main()
    histories = []
    for name in ("whole", "cut"):
        histories.append(json.loads((tmp_path / name / "about.json").read_text())["history"])
    assert histories[0] == histories[1]
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert first.read_bytes() == second.read_bytes()


def test_steps_do_not_see_patches_that_they_take_away():
    torch.manual_seed(0)
    clip = new_clip(build_stem("scenes_vgg", "random"), tiny_clip.TEXTS * 3, 8, 1, 2, 4)
    maps = {"train": torch.zeros(5, 1, 8, 8)}
    settings = dict.fromkeys(train_clip.REPEATED, 1) | {"patch_dropout": 0.25}
    training = train_clip.Training(clip, maps, {}, settings, torch.device("cpu"))
    kept = training.kept_patches(200, torch.Generator().manual_seed(0))
    assert kept.shape == (200, 48)
    assert (kept.diff(dim=1) > 0).all()
    share = np.bincount(kept.flatten(), minlength=64) / 200
    assert share.min() > 0.6 and share.max() < 0.9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", 9], "--width 9 is no multiple of --heads 2"),
        (["--stem", "nothing"], "nothing"),
        (["--stem_stages", "99"], "cannot be cut at '99'"),
        (["--dataset", "no-such-folder"], "no-such-folder"),
        (["--patch_dropout", 1.5], "patch_dropout"),
    ],
)
def test_mistakes_are_one_line(flags, message, scenes, tmp_path, monkeypatch):
    output = tmp_path / "clip"
    command(monkeypatch, train_clip, "--dataset", scenes, *SMALL, "--output", output, *flags)
    with pytest.raises(UserError, match=message) as error:
        train_clip.main()
    assert "\n" not in str(error.value)
    assert not (output / "config.json").exists()
