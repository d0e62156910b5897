"""Captioners of transformers: tiny ones of each family against the model's own autograd."""

import sys
from contextlib import nullcontext

import numpy as np
import oracle_relevancy as oracle
import pytest
import tiny_transformers
import torch
import transformers
from fixtures import command
from helpers import relative_difference
from PIL import Image

import explain as explain_script
import pretrainedmodel
from captioner import load_captioner
from commandline import UserError
from images import renormalized
from lrp_utils import TransformerLRP
from pretrainedmodel import METHODS, is_pretrained

FAMILIES = list(tiny_transformers.FAMILIES)
CAPTIONS = {  # in both, the second word has two sub-words or more
    "blip": ["a", "doggy", "on", "grass"],
    "git": ["a", "doggy", "on", "grass"],
    "vit_gpt2": ["dog", "dogs", "a"],
}
OWNERS = {"blip": [0, 1, 1, 2, 3, 3], "git": [0, 1, 1, 2, 3, 3], "vit_gpt2": [0, 1, 1, 1, 2]}
PATCHES = 4
TOKENS = 5  # with the class token


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("transformers")
    return {name: tiny_transformers.save(name, root / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def captioners(folders):
    """In float64, so that what is computed in another order still agrees."""
    found = {}
    for name, folder in folders.items():
        found[name] = load_captioner(folder)
        found[name].model.double()
    return found


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, tiny_transformers.SIZE, tiny_transformers.SIZE, dtype=torch.float64)


def official_logits(captioner, pixels, ids):
    """The logits (1, K, V) of the model as transformers' documentation calls it."""
    model = captioner.model
    if isinstance(model, transformers.VisionEncoderDecoderModel):
        return model(pixel_values=pixels, decoder_input_ids=ids).logits
    return model(pixel_values=pixels, input_ids=ids).logits[:, -ids.shape[1] :]


def image_tokens_module(captioner):
    """The module whose output are the tokens that the decoder is given."""
    model = captioner.model
    if isinstance(model, transformers.GitForCausalLM):
        return model.git.visual_projection
    if isinstance(model, transformers.BlipForConditionalGeneration):
        return model.vision_model
    return model.encoder


class Watched:
    """The model's inner values in one forward pass, by hooks on its modules."""

    def __init__(self, captioner):
        self.captioner = captioner
        self.attentions = []

    def see_words(self, module, inputs, output):
        self.words = output.detach().requires_grad_()
        return self.words.clone()

    def see_tokens(self, module, inputs, output):
        self.tokens = output if isinstance(output, torch.Tensor) else output.last_hidden_state

    def see_attention(self, module, inputs, output):
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        known = any(weights is seen for seen in self.attentions)
        if isinstance(weights, torch.Tensor) and weights.dim() == 4 and not known:
            self.attentions.append(weights)

    def run(self, pixels, ids, rules=nullcontext):
        """The logits (1, K, V)."""
        self.pixels = pixels.clone().requires_grad_()
        handles = [
            self.captioner.word_embedding.register_forward_hook(self.see_words),
            image_tokens_module(self.captioner).register_forward_hook(self.see_tokens),
        ]
        for module in self.captioner.model.modules():
            handles.append(module.register_forward_hook(self.see_attention))
        with rules():
            logits = official_logits(self.captioner, self.pixels, ids)
        for handle in handles:
            handle.remove()
        return logits


def sub_words(name, captioner):
    """The inputs (1, K) and the targets, a list, of the caption of a family."""
    targets = captioner.sub_words(CAPTIONS[name])
    assert len(targets) == len(OWNERS[name])
    return torch.tensor([[captioner.start, *targets[:-1]]]), targets


def joined(name, parts):
    """What was found of sub-words, summed up to words, one by one."""
    words = [0.0] * len(CAPTIONS[name])
    for owner, part in zip(OWNERS[name], parts):
        words[owner] = words[owner] + part
    return torch.stack(words)


def joined_words(name, rows):
    """Relevance of inputs for sub-words (K, K) as word_relevance and own_relevance."""
    owners = OWNERS[name]
    words = torch.zeros(len(CAPTIONS[name]), len(CAPTIONS[name]), dtype=torch.float64)
    own = torch.zeros(len(words), dtype=torch.float64)
    for target, row in zip(owners, rows):
        words[target, 0] += row[0]
        for source, value in zip(owners, row[1:]):
            if source == target:
                own[target] += value
            elif source + 1 < len(words):
                words[target, source + 1] += value
    return words, own


def assert_same(ours, truth, tolerance=1e-9):
    assert relative_difference(ours, truth) < tolerance


@pytest.mark.parametrize("method", ["gradient", "input_x_gradient", "attnlrp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_the_models_own_one_sub_word_at_a_time(name, method, captioners, images):
    captioner = captioners[name]
    (ours,) = captioner.explain(images[:1], [CAPTIONS[name]], method)
    ids, targets = sub_words(name, captioner)
    rules = TransformerLRP if method == "attnlrp" else nullcontext
    found = {"image": [], "tokens": [], "words": [], "score": [], "chance": []}
    for position, target in enumerate(targets):
        watched = Watched(captioner)
        pixels = renormalized(images[:1], **_normalisation())
        logits = watched.run(pixels, ids, rules)
        score = logits[0, position, target]
        leaves = {"image": watched.pixels, "tokens": watched.tokens, "words": watched.words}
        gradients = torch.autograd.grad(score, list(leaves.values()))
        for (part, leaf), gradient in zip(leaves.items(), gradients):
            relevance = gradient if method == "gradient" else leaf.detach() * gradient
            found[part].append(relevance.sum(1 if part == "image" else -1)[0])
        found["score"].append(score.detach())
        found["chance"].append(logits.softmax(-1)[0, position, target].detach().log())
    assert ours.words == CAPTIONS[name]
    assert_same(ours.scores, joined(name, found["score"]))
    assert_same(ours.probabilities, joined(name, found["chance"]).exp())
    assert_same(ours.image_relevance, joined(name, found["image"]))
    tokens = joined(name, found["tokens"])
    assert_same(ours.region_relevance, tokens[:, 1:])
    assert_same(ours.extra["class_relevance"], tokens[:, 0])
    words, own = joined_words(name, found["words"])
    if method == "gradient":  # behind BERT's first layer norm a sum over channels is 0
        torch.testing.assert_close(ours.word_relevance, words, rtol=1e-9, atol=1e-9)
        return
    assert_same(ours.word_relevance, words)
    assert_same(ours.extra["own_relevance"], own)


def _normalisation():
    values = tiny_transformers.IMAGES
    return {"mean": values["image_mean"], "std": values["image_std"]}


def with_weights(weights, tokens):
    """Weights as the oracle wants them: of all tokens, 1 for those of which there are none."""
    if weights is None:
        return np.ones(tokens), np.ones(tokens)
    return tuple(np.append(part, np.ones(tokens - len(part))) for part in weights)


def oracle_relevancy(name, blocks):
    """The relevancy of image and text to the inputs, but for what residual connections alone leave
    of a token in itself: (K, n), (K, K).

    blocks: (averaged attention, weights or None) in the order in which they run.
    """
    count = len(OWNERS[name])
    if name == "git":
        length = TOKENS + count
        whole = np.eye(length)
        kept = np.ones(length)
        nothing = np.zeros((length, 0))
        for cam, weights in blocks:
            padded = np.zeros((length, length))
            padded[: len(cam), : len(cam)] = cam
            weights = with_weights(weights, length)
            whole, _ = oracle.self_attention(whole, nothing, padded, *weights)
            kept = kept * weights[0]
        whole = whole - np.diag(kept)
        return whole[TOKENS:, :TOKENS], whole[TOKENS:, TOKENS:]
    image = np.eye(TOKENS)
    kept_image = np.ones(TOKENS)
    for cam, weights in blocks[:2]:
        weights = with_weights(weights, TOKENS)
        image, _ = oracle.self_attention(image, np.zeros((TOKENS, 0)), cam, *weights)
        kept_image = kept_image * weights[0]
    text = np.eye(count)
    other = np.zeros((count, TOKENS))
    none = np.zeros((TOKENS, count))
    kept = np.ones(count)
    for index, (cam, weights) in enumerate(blocks[2:]):
        weights = with_weights(weights, count)
        if index % 2 == 0:
            text, other = oracle.self_attention(text, other, cam, *weights)
        else:
            text, other = oracle.cross_attention(
                text, other, image, none, cam, *weights, kept, kept_image
            )
        kept = kept * weights[0]
    return other, text - np.diag(kept)


def assert_relevancy(name, ours, tokens, words, tolerance):
    """tokens, words: of each sub-word the rows for its own position."""
    truth = joined(name, tokens)
    assert_same(ours.region_relevance, truth[:, 1:], tolerance)
    assert_same(ours.extra["class_relevance"], truth[:, 0], tolerance)
    truth, own = joined_words(name, words)
    assert_same(ours.word_relevance, truth, tolerance)
    torch.testing.assert_close(ours.extra["own_relevance"], own, rtol=tolerance, atol=tolerance)


def row_of(tokens, words, position):
    """What is relevant to a position."""
    return torch.from_numpy(tokens[position]), torch.from_numpy(words[position])


@pytest.mark.parametrize("name", FAMILIES)
def test_relevancy_equals_the_oracle_on_the_models_own_attentions(name, folders, images):
    captioner = load_captioner(folders[name])
    captioner.model.double()
    (ours,) = captioner.explain(images[:1], [CAPTIONS[name]], "relevancy")
    ids, targets = sub_words(name, captioner)
    captioner.model.set_attn_implementation("eager")
    if name == "git":
        captioner.model.git.image_encoder.vision_model.config.output_attentions = True
    rows = []
    for position, target in enumerate(targets):
        watched = Watched(captioner)
        pixels = renormalized(images[:1], **_normalisation())
        score = watched.run(pixels, ids)[0, position, target]
        blocks = []
        for weights, gradient in zip(
            watched.attentions, torch.autograd.grad(score, watched.attentions)
        ):
            cam = oracle.average_heads(weights[0].detach().numpy(), gradient[0].numpy())
            blocks.append((cam, None))
        assert len(blocks) == (4 if name == "git" else 6)
        rows.append(row_of(*oracle_relevancy(name, blocks), position))
    # Some of transformers' eager attentions take their softmax in float32.
    tokens, words = zip(*rows)
    assert_relevancy(name, ours, tokens, words, 1e-5)


@pytest.mark.parametrize("reading", ["weighted_relevancy", "gradient_weighted_relevancy"])
@pytest.mark.parametrize("name", FAMILIES)
def test_weighted_relevancy_equals_the_oracle(name, reading, captioners, images):
    captioner = captioners[name]
    (ours,) = captioner.explain(images[:1], [CAPTIONS[name]], reading)
    _, targets = sub_words(name, captioner)
    pixels = captioner.pixels_of(images[:1])
    rows = []
    for position, _ in enumerate(targets):
        forward = captioner.forward_pass(pixels, torch.tensor([targets]))
        seen = [block.seen for block in forward.blocks]
        weights = [block.weights for block in seen]
        wanted = weights + [block.total for block in seen]
        gradients = torch.autograd.grad(forward.scores[0, position], wanted)
        blocks = []
        for block, of_weights, of_total in zip(seen, gradients, gradients[len(seen) :]):
            values = [block.residual, block.added, of_total]
            values = [value[0].detach().numpy() for value in values]
            shares = oracle.gradient_weights(*values)
            if reading == "weighted_relevancy":
                shares = oracle.norm_weights(*values[:2])
            cam = oracle.average_heads(block.weights[0].detach().numpy(), of_weights[0].numpy())
            blocks.append((cam, shares))
        rows.append(row_of(*oracle_relevancy(name, blocks), position))
    tokens, words = zip(*rows)
    # GIT takes its softmax in float32.
    assert_relevancy(name, ours, tokens, words, 1e-6 if name == "git" else 1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_recorder_finds_what_each_attention_adds(name, captioners, images):
    """The output projections, in the order in which they run, give what is added."""
    captioner = captioners[name]
    ends = ("self_attn.projection", "out_proj", "attention.output.dense", "c_proj")
    added = []

    def see(module, inputs, output):
        added.append(output)

    handles = []
    for path, module in captioner.model.named_modules():
        if path.endswith(ends) and "mlp" not in path:
            handles.append(module.register_forward_hook(see))
    forward = captioner.forward_pass(captioner.pixels_of(images[:1]), torch.tensor([[3, 4]]))
    for handle in handles:
        handle.remove()
    assert len(forward.blocks) == len(added) == (4 if name == "git" else 6)
    for block, output in zip(forward.blocks, added):
        assert torch.equal(block.seen.added, output)
        torch.testing.assert_close(block.seen.total, block.seen.residual + output)


@pytest.mark.parametrize("name", FAMILIES)
def test_rollout_gives_shares_that_do_not_depend_on_what_follows(name, captioners, images):
    captioner = captioners[name]
    (longer,) = captioner.explain(images[:1], [CAPTIONS[name]], "rollout")
    (shorter,) = captioner.explain(images[:1], [CAPTIONS[name][:2]], "rollout")
    assert_same(longer.region_relevance[:2], shorter.region_relevance)
    assert_same(longer.word_relevance[:2, :2], shorter.word_relevance)
    # Of the first word, all that is not the image's is the start's own.
    assert (longer.region_relevance[0] > 0).all()
    assert longer.region_relevance[0].sum() < 1


@pytest.mark.parametrize("name", FAMILIES)
def test_occlusion_is_the_fall_of_the_logit(name, captioners, images):
    captioner = captioners[name]
    (ours,) = captioner.explain(images[:1], [CAPTIONS[name]], "occlusion")
    ids, targets = sub_words(name, captioner)
    pixels = renormalized(images[:1], **_normalisation())
    places = torch.arange(len(targets))

    @torch.no_grad()
    def scores(pixels, ids):
        return official_logits(captioner, pixels, ids)[0, places, targets]

    before = scores(pixels, ids)
    covered = pixels.clone()
    covered[:, :, 4:, :4] = 0
    assert_same(ours.region_relevance[:, 2], joined(name, before - scores(covered, ids)))
    changed = ids.clone()
    changed[0, 0] = captioner.padding
    fall = joined(name, before - scores(pixels, changed))
    torch.testing.assert_close(ours.word_relevance[:, 0], fall, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_that_of_the_last_layer(name, captioners, images):
    (ours,) = captioners[name].explain(images[:1], [CAPTIONS[name]], "attention")
    assert ours.attention.shape == (len(CAPTIONS[name]), 3, PATCHES)
    single = torch.tensor(OWNERS[name]).bincount() == 1
    assert_same(ours.region_relevance[single], ours.attention.mean(1)[single])
    # A word attends to the start and to the words before it.
    assert torch.equal(ours.word_relevance > 0, torch.ones_like(ours.word_relevance).tril() > 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_words_are_joined_of_sub_words(name, captioners):
    captioner = captioners[name]
    words, owners = captioner.words_of(captioner.sub_words(CAPTIONS[name]))
    assert words == CAPTIONS[name]
    assert owners == OWNERS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_captions_are_those_that_the_model_generates(name, folders, images):
    captioner = load_captioner(folders[name])
    images = images.float()
    pixels = renormalized(images, **_normalisation())
    for method, beams in (("beam", 3), ("greedy", 1)):
        generated = captioner.model.generate(
            pixel_values=pixels,
            num_beams=beams,
            do_sample=False,
            max_new_tokens=5,
            suppress_tokens=sorted({*captioner.tokenizer.all_special_ids} - {captioner.end}),
        )
        texts = captioner.tokenizer.batch_decode(
            generated, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        captions = captioner.caption(images, method, max_length=5)
        assert [" ".join(words) for words in captions] == [text.strip() for text in texts]
    found = captioner.explain(images)
    assert [one.words for one in found] == captioner.caption(images)


@pytest.mark.parametrize("method", METHODS)
def test_a_caption_without_words_has_an_explanation_without_words(method, captioners, images):
    captioner = captioners["blip"]
    targets = torch.tensor([[captioner.end]])
    forward = captioner.forward_pass(captioner.pixels_of(images[:1]), targets)
    found = captioner._propagate(forward, METHODS[method])
    with torch.no_grad():
        explanation = captioner._explanation(forward, found, [])
    assert explanation.words == []
    assert explanation.image_relevance.shape == (0, 8, 8)
    assert explanation.region_relevance.shape == (0, PATCHES)
    assert explanation.word_relevance.shape == (0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_parts_give_what_the_whole_gives(method, captioners, images, monkeypatch):
    captioner = captioners["git"]
    captions = [CAPTIONS["git"], ["a", "ball"]]
    whole = captioner.explain(images, captions, method)
    monkeypatch.setattr(pretrainedmodel, "GRADIENTS_PER_PASS", 1)
    for one, other in zip(whole, captioner.explain(images, captions, method)):
        torch.testing.assert_close(one.image_relevance, other.image_relevance)
        torch.testing.assert_close(one.word_relevance, other.word_relevance)


def test_photographs_are_prepared_as_the_model_was_published(captioners):
    captioner = captioners["git"]
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    photograph = Image.fromarray(pixels)
    prepared = captioner.pixels_of([photograph])
    truth = captioner.processor(photograph, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(prepared, truth.double())
    assert len(captioner.explain([photograph], [CAPTIONS["git"]])) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_command_explains_with_a_folder(name, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    caption = CAPTIONS[name][:2]
    arguments = ["photo.png", "--checkpoint", str(folders[name]), "--caption", " ".join(caption)]
    methods = ["lrp", "weighted_relevancy"]
    command(monkeypatch, explain_script, *arguments, "--method", *methods, "--device", "cpu")
    explain_script.main()
    assert f"photo.png: {' '.join(caption)}" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "explanations").iterdir()}
    stem = f"photo-{name}-{'_'.join(caption)}"
    assert {f"{stem}-lrp.png", f"{stem}-weighted_relevancy.npz", f"{stem}-methods.png"} <= written
    maps = np.load(f"explanations/{stem}-lrp.npz")
    assert maps["model_type"] == name.replace("vit_gpt2", "vision-encoder-decoder")
    assert maps["image_relevance"].shape == (2, 8, 8)
    assert maps["own_relevance"].shape == (2,)


@pytest.mark.parametrize("flag", ["--caption", "--words"])
def test_the_command_knows_which_words_a_folder_knows(folders, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20)).save("photo.png")
    arguments = ["photo.png", "--checkpoint", str(folders["blip"]), flag, "zebra"]
    command(monkeypatch, explain_script, *arguments)
    with pytest.raises(UserError, match="the word 'zebra' is not in this captioner's vocabulary"):
        explain_script.main()
    assert not (tmp_path / "explanations").exists()


def test_what_is_a_captioner_of_transformers(folders, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert is_pretrained(folders["git"])
    assert is_pretrained("Salesforce/blip-image-captioning-base")
    assert not is_pretrained(tmp_path)
    assert not is_pretrained(tmp_path / "checkpoints/missing.pt")
    assert not is_pretrained("checkpoints/missing.pt")
    assert not is_pretrained("missing.pt")


def test_a_name_without_a_network_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be downloaded") as error:
        load_captioner("Salesforce/no-such-captioner")
    assert "\n" not in str(error.value)


def test_what_needs_more_than_captions_and_explanations_refuses_it(folders):
    with pytest.raises(UserError, match="is not a checkpoint of this project"):
        load_captioner(folders["blip"], pretrained=False)


def test_a_folder_of_something_else_is_refused(folders, tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="type 'bert'.* are blip, git, vision-encoder-decoder"):
        load_captioner(tmp_path)
    (tmp_path / "config.json").write_text((folders["blip"] / "config.json").read_text())
    with pytest.raises(UserError, match="holds no captioner of transformers"):
        load_captioner(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="holds no captioner of transformers"):
        load_captioner(tmp_path)


def test_mistakes_are_one_line(captioners, images):
    captioner = captioners["blip"]
    caption = [CAPTIONS["blip"]]
    for arguments, message in [
        ((images[:1], caption, "gradcam"), "no explanation method 'gradcam'"),
        ((images[:1, :, :4], caption), r"images of shape \(B, 3, 8, 8\)"),
        ((images, caption), "2 images need as many captions, not 1"),
        ((images[:1], [["a", "cat"]]), "the word 'cat' is not in"),
        ((images[:1], [[]]), "no word to explain"),
        ((images[:1], [["a"] * 21]), "21 sub-words, and 20"),
    ]:
        with pytest.raises(UserError, match=message):
            captioner.explain(*arguments)
    with pytest.raises(UserError, match="no decoding 'nucleus', only beam and greedy"):
        captioner.caption(images, "nucleus")


def test_transformers_is_named_where_it_is_missing(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs the package transformers; pip install"):
        load_captioner(folders["blip"])
