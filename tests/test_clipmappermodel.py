"""CLIPmapper against a slow one in float64; its explanations against the rules, entry by entry."""

import json

import numpy as np
import oracle_clipmapper as oracle
import oracle_relevancy
import pytest
import tiny_clip
import torch
import torch.nn.functional as F
from fixtures import command
from helpers import relative_difference
from PIL import Image
from torch.overrides import TorchFunctionMode

import explain as explain_script
from captioner import load_captioner
from clipmappermodel import TASKS, is_clipmapper, load_clipmapper
from commandline import UserError
from contrastive import image_tokens
from lrp_utils import TransformerLRP, attention_in_steps
from pretrainedmodel import METHODS
from relevancy_utils import AttentionRecorder

CAPTION = ["is", "the", "dog", "red"]
QUESTION = "is there a red dog ?"
TOKENS = 5  # of the image, with the class token
PREFIX = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("clipmapper")
    tiny_clip.save_clip(root / "clip")
    return {task: tiny_clip.save_mapper(task, root / "clip", root / task) for task in TASKS}


@pytest.fixture(scope="module", autouse=True)
def float64():
    """transformers makes CLIP's causal mask of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def captioners(folders):
    """In float64, so that what is computed in another order still agrees."""
    found = {task: load_captioner(folder) for task, folder in folders.items()}
    for captioner in found.values():
        captioner.model.double()
    return found


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


class Case:
    """A text that is explained, and the oracle's forward pass of it."""

    def __init__(self, captioner, images):
        self.captioner = captioner
        self.pixels = captioner.pixels_of(images[:1])
        if captioner.task == "vqa":
            self.ids = captioner.question_ids([QUESTION])
            self.targets = [2]
            self.rows = [0]
        else:
            self.targets = captioner.sub_words(CAPTION)
            self.ids = torch.tensor([[captioner.start, *self.targets[:-1]]])
            self.rows = [PREFIX + position for position in range(len(self.targets))]
        self.logits, self.blocks = oracle.forward(captioner.model, self.pixels[0], self.ids[0])
        self.text_tokens = PREFIX + self.ids.shape[1]

    def explanation(self, images, method):
        """(P, n) of the image's tokens and (P, K) of the inputs, as the captioner finds them."""
        targets = torch.tensor([self.targets])
        chosen = METHODS[method]
        with torch.enable_grad():
            forward = self.captioner.recorded(self.pixels, self.ids, targets, chosen.rules)
            found = self.captioner._propagate(forward, chosen)
        return found["tokens"], found["words"]

    def gradients(self, position, of):
        """The gradients of an explained logit with respect to a part of each Seen."""
        score = self.logits[position, self.targets[position]]
        return torch.autograd.grad(score, [of(block) for block in self.blocks], retain_graph=True)

    def assert_rows(self, found, matrices, position, tolerance=1e-9):
        """The oracle's rows (M, n) and (M, M) are what was found for a target."""
        of_image, of_text = matrices
        row = self.rows[position]
        tokens, inputs = found
        truth = np.concatenate([of_image[row], of_text[row, PREFIX:]])
        ours = torch.cat([tokens[position], inputs[position]])
        assert np.abs(array(ours) - truth).max() <= tolerance * np.abs(truth).max()


@pytest.fixture(params=TASKS)
def case(request, captioners, images):
    return Case(captioners[request.param], images)


def array(tensor):
    return tensor.detach().numpy()


# ------------------------------------------------------------------------------------- the network


def test_the_network_is_the_slow_one(case):
    model = case.captioner.model
    logits = model(model.image_tokens(case.pixels), case.ids)
    assert relative_difference(logits.reshape(case.logits.shape), case.logits) < 1e-9


def test_the_recorder_sees_each_block(case):
    forward = case.captioner.recorded(case.pixels, case.ids, torch.tensor([case.targets]))
    assert [block.kind for block in forward.blocks] == [block.kind for block in case.blocks]
    for block, truth in zip(forward.blocks, case.blocks):
        assert relative_difference(block.seen.weights[0], truth.weights) < 1e-9
        assert relative_difference(block.seen.residual[0], truth.residual) < 1e-9
        assert relative_difference(block.seen.added[0], truth.added) < 1e-9
        assert relative_difference(block.seen.total[0], truth.total) < 1e-9


def test_several_questions_about_an_image_share_its_layers(captioners, images):
    captioner = captioners["vqa"]
    model = captioner.model
    tokens = model.image_tokens(captioner.pixels_of(images))
    ids = captioner.question_ids([QUESTION, "a doggy", "what colour is the ball ?"])
    owner = torch.tensor([1, 0, 1])
    words = model.text_tokens(ids)
    shared = model.read(tokens, words, model.seen(ids), owner)
    assert relative_difference(shared, model(tokens[owner], ids)) < 1e-9


def test_a_patch_keeps_its_place_when_others_go(captioners, images):
    captioner = captioners["vqa"]
    maps = captioner.pixels_of(images)
    kept = torch.tensor([[1, 3], [0, 2]])
    model = captioner.model
    without = image_tokens(model.clip, maps, kept)
    code = oracle.place_of_each(2, 12)
    for row, left in enumerate(kept.tolist()):
        expected = without[row] + code[[0, *[1 + place for place in left]]]
        assert relative_difference(model.image_tokens(maps, kept)[row], expected) < 1e-6


def test_padding_is_no_part_of_a_question(captioners, images):
    captioner = captioners["vqa"]
    model = captioner.model
    tokens = model.image_tokens(captioner.pixels_of(images))
    both = captioner.question_ids([QUESTION, "a doggy"])
    together = model(tokens, both)
    for row, question in enumerate([QUESTION, "a doggy"]):
        alone = model(tokens[row : row + 1], captioner.question_ids([question]))
        assert relative_difference(together[row], alone[0]) < 1e-9


def test_word_by_word_is_all_at_once(captioners, images):
    model = captioners["caption"].model
    tokens = model.image_tokens(captioners["caption"].pixels_of(images))
    ids = torch.tensor([[2, 5, 7, 6], [2, 9, 4, 8]])
    whole = model(tokens, ids)
    states = model.image_states(tokens)
    for length in range(1, 5):
        ours = model.next_logits(states, ids[:, :length])
        assert relative_difference(ours, whole[:, length - 1]) < 1e-9


def test_beam_search_of_two_images_is_that_of_each(captioners, images):
    captioner = captioners["caption"]
    model = captioner.model
    tokens = model.image_tokens(captioner.pixels_of(images))
    together = captioner.decoded_tokens(tokens, "beam", 6, beam_size=4)
    for row in range(2):
        alone = captioner.decoded_tokens(tokens[row : row + 1], "beam", 6, beam_size=4)
        assert together[row] == alone[0]
    assert together == captioner._decoded(captioner.pixels_of(images), "beam", 4, 6)


# ---------------------------------------------------------------------------------------- relevancy


@pytest.mark.parametrize(
    "method", ["relevancy", "weighted_relevancy", "gradient_weighted_relevancy"]
)
def test_relevancy_equals_the_oracle(case, method, images):
    found = case.explanation(images, method)
    for position in range(len(case.targets)):
        slopes = case.gradients(position, lambda block: block.weights)
        of_totals = case.gradients(position, lambda block: block.total)
        steps = []
        for block, slope, of_total in zip(case.blocks, slopes, of_totals):
            cam = oracle_relevancy.average_heads(array(block.weights), array(slope))
            values = (array(block.residual), array(block.added))
            before = after = np.ones(len(cam))
            if method == "weighted_relevancy":
                before, after = oracle_relevancy.norm_weights(*values)
            elif method == "gradient_weighted_relevancy":
                before, after = oracle_relevancy.gradient_weights(*values, array(of_total))
            steps.append((block.kind, cam, before, after))
        matrices = oracle.relevancy(steps, TOKENS, case.text_tokens, PREFIX)
        case.assert_rows(found, matrices, position)


def test_rollout_equals_the_oracle(case, images):
    steps = [(block.kind, array(block.weights).mean(0)) for block in case.blocks]
    matrices = oracle.one_sequence(steps, TOKENS, case.text_tokens, PREFIX, oracle.rollout_row)
    found = case.explanation(images, "rollout")
    for position in range(len(case.targets)):
        case.assert_rows(found, matrices, position)


def relevance_of_weights(case, position):
    """Of each block AttnLRP's relevance of its attention weights (heads, S, Q)."""
    captioner = case.captioner
    targets = torch.tensor([case.targets])
    with torch.enable_grad():
        forward = captioner.recorded(case.pixels, case.ids, targets, TransformerLRP)
        weights = [block.seen.weights for block in forward.blocks]
        slopes = torch.autograd.grad(forward.scores[0, position], weights)
    return [array(part * slope)[0] for part, slope in zip(weights, slopes)]


def test_transformer_attribution_equals_the_oracle(case, images):
    found = case.explanation(images, "transformer_attribution")
    for position in range(len(case.targets)):
        slopes = case.gradients(position, lambda block: block.weights)
        steps = []
        for block, relevance, slope in zip(
            case.blocks, relevance_of_weights(case, position), slopes
        ):
            steps.append((block.kind, oracle_relevancy.average_heads(relevance, array(slope))))
        matrices = oracle.one_sequence(
            steps, TOKENS, case.text_tokens, PREFIX, oracle.attribution_row
        )
        case.assert_rows(found, matrices, position)


@pytest.mark.parametrize("method", ["attention", "partial_lrp", "attention_gradcam"])
def test_methods_of_the_last_layer_equal_the_oracle(case, method, images):
    found = case.explanation(images, method)
    numbers = {block.kind: number for number, block in enumerate(case.blocks)}  # the last of each
    for position in range(len(case.targets)):
        slopes = case.gradients(position, lambda block: block.weights)
        relevances = relevance_of_weights(case, position)

        def value_of(number, slopes=slopes, relevances=relevances):
            weights = array(case.blocks[number].weights)
            if method == "partial_lrp":
                return relevances[number].mean(0)
            if method == "attention":
                return weights.mean(0)
            return oracle_relevancy.attention_grad_cam(weights, array(slopes[number]))

        matrices = (value_of(numbers["cross"]), value_of(numbers["text"]))
        case.assert_rows(found, matrices, position)


@pytest.mark.parametrize("method", ["gradient", "input_x_gradient"])
def test_gradients_equal_the_oracles(case, method, images):
    """By the finite difference of the slow network, at the first and the last pixel."""
    targets = torch.tensor([case.targets])
    with torch.enable_grad():
        forward = case.captioner.recorded(case.pixels, case.ids, targets)
        found = case.captioner._propagate(forward, METHODS[method])["image"]
    step = 1e-5
    for place in ((0, 0), (7, 7)):
        for position, target in enumerate(case.targets):
            total = 0.0
            for channel in range(3):
                scores = []
                for sign in (1, -1):
                    pixels = case.pixels[0].clone()
                    pixels[(channel, *place)] += sign * step
                    with torch.no_grad():
                        logits, _ = oracle.forward(case.captioner.model, pixels, case.ids[0])
                    scores.append(logits[position, target].item())
                slope = (scores[0] - scores[1]) / (2 * step)
                value = 1.0 if method == "gradient" else case.pixels[(0, channel, *place)].item()
                total += slope * value
            assert found[(position, *place)].item() == pytest.approx(total, rel=1e-4, abs=1e-7)


class SoftmaxWatch(TorchFunctionMode):
    """What softmax is given, and what it returns."""

    def __init__(self):
        super().__init__()
        self.before = []
        self.after = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            with self:
                return attention_in_steps(*args, **(kwargs or {}))
        output = function(*args, **(kwargs or {}))
        if function in AttentionRecorder.SOFTMAX:
            self.before.append(args[0])
            self.after.append(output)
        return output


def test_attnlrp_conserves_relevance_but_for_what_softmax_absorbs(folders):
    """Without biases the logit is what image tokens, words and prefix have together."""
    for task in TASKS:
        model = load_clipmapper(folders[task]).model.double()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
        prefix = model.prefix.detach().requires_grad_()  # the rules pass by parameters
        del model.prefix
        model.prefix = prefix
        ids = torch.tensor([[2, 5, 7, 3]])
        image = torch.randn(1, TOKENS, 12, requires_grad=True)
        words = torch.randn(1, 4, 12, requires_grad=True)
        watched = SoftmaxWatch()
        with TransformerLRP(epsilon=0), watched:
            logits = model.read(image, words, model.seen(ids))
        score = logits.flatten()[1]
        leaves = [image, words, prefix, *watched.before, *watched.after]
        relevance = []
        for leaf, slope in zip(leaves, torch.autograd.grad(score, leaves)):
            relevance.append((leaf.clamp(min=-1e9) * slope).sum().item())
        count = len(watched.before)
        assert count == (9 if task == "caption" else 10)
        absorbed = sum(relevance[3 + count :]) - sum(relevance[3 : 3 + count])
        assert sum(relevance[:3]) + absorbed == pytest.approx(score.item(), rel=1e-6)


# ------------------------------------------------------------------------------- as users have them


@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_captions_and_answers(method, captioners, images):
    captioner = captioners["caption"]
    first, second = captioner.explain(images, [CAPTION, ["a", "doggy"]], method)
    assert first.words == CAPTION and second.words == ["a", "doggy"]
    assert first.image_relevance.shape == (4, 8, 8)
    assert first.region_relevance.shape == (4, 4)
    assert first.word_relevance.shape == (4, 4)
    assert second.extra["class_relevance"].shape == (2,)
    assert first.kind == METHODS[method].kind
    answerer = captioners["vqa"]
    one, other = answerer.explain_answers(
        images, [QUESTION, "what colour is the ball ?"], ["yes", "blue"], method
    )
    assert one.words == ["is", "there", "a", "red", "dog", "?", "yes"]
    assert other.words[-1] == "blue"
    assert one.given == 6 and one.positions_of(None) == [6]
    assert one.image_relevance.shape == (7, 8, 8)
    assert one.word_relevance.shape == (7, 7)
    assert not one.image_relevance[:6].any() and not one.word_relevance[:6].any()
    for explanation in (first, one):
        assert torch.isfinite(explanation.image_relevance).all()
        # The ReLU of Grad-CAM may leave nothing.
        assert explanation.image_relevance.any() or method == "attention_gradcam"


def test_captions_and_answers_are_the_likeliest(captioners, images):
    captioner = captioners["caption"]
    captions = captioner.caption(images, "greedy", max_length=4)
    model = captioner.model
    tokens = model.image_tokens(captioner.pixels_of(images))
    silent = sorted(set(captioner.tokenizer.all_special_ids) - {captioner.end})
    for row, words in enumerate(captions):
        ids = [captioner.start]
        while len(ids) < 5:
            logits = model(tokens[row : row + 1], torch.tensor([ids]))[0, -1]
            logits[silent] = -torch.inf
            best = logits.argmax().item()
            if best == captioner.end:
                break
            ids.append(best)
        assert captioner.tokenizer.convert_ids_to_tokens(ids[1:]) == words
    answerer = captioners["vqa"]
    (answer,) = answerer.answer(images[:1], [QUESTION])
    logits, _ = oracle.forward(
        answerer.model, answerer.pixels_of(images)[0], answerer.question_ids([QUESTION])[0]
    )
    assert answer == tiny_clip.ANSWERS[logits[0].argmax()]
    (explained,) = answerer.explain_answers(images[:1], [QUESTION])
    assert explained.words[-1] == answer
    assert explained.probabilities[-1].item() == pytest.approx(logits[0].softmax(0).max().item())
    assert explained.scores[-1].item() == pytest.approx(logits[0].max().item())


def test_what_is_saved_is_what_is_loaded(folders):
    assert is_clipmapper(folders["vqa"])
    assert not is_clipmapper(folders["vqa"].parent / "clip")
    found = load_captioner(folders["vqa"])
    assert found.answers == tiny_clip.ANSWERS
    assert found.task == "vqa"
    assert found.encoder.grid == (2, 2)
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_the_command_explains_with_a_folder(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    arguments = ["photo.png", "--checkpoint", str(folders["caption"]), "--caption", "a red dog"]
    methods = ["relevancy", "transformer_attribution"]
    command(monkeypatch, explain_script, *arguments, "--method", *methods, "--device", "cpu")
    explain_script.main()
    assert "photo.png: a red dog" in capsys.readouterr().out
    stem = "explanations/photo-caption-a_red_dog"
    assert np.load(f"{stem}-relevancy.npz")["image_relevance"].shape == (3, 8, 8)


def test_the_command_explains_an_answer(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    arguments = ["photo.png", "--checkpoint", str(folders["vqa"]), "--method", "relevancy", "lrp"]
    arguments += ["--device", "cpu"]
    command(monkeypatch, explain_script, *arguments, "--question", QUESTION)
    explain_script.main()
    answerer = load_captioner(folders["vqa"])
    (answer,) = answerer.answer([Image.open("photo.png")], [QUESTION])
    assert f"photo.png: is there a red dog? {answer}" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "explanations").iterdir()}
    stem = "photo-vqa-is_there_a_red_dog"
    expected = {f"{stem}-lrp.png", f"{stem}-relevancy.npz", f"{stem}-methods.png", f"{stem}.html"}
    assert expected <= written
    for more, message in [
        (["--question", " "], "no word in an empty question"),
        (["--question", QUESTION, "--words", "dog"], "--question and --words do not go together"),
        (["--question", QUESTION, "--caption", "a"], "--question and --caption do not go together"),
        ([], "it has not learnt the task 'caption'"),
    ]:
        command(monkeypatch, explain_script, *arguments, *more)
        with pytest.raises(UserError, match=message):
            explain_script.main()
    arguments[2] = str(folders["caption"])
    command(monkeypatch, explain_script, *arguments, "--question", QUESTION)
    with pytest.raises(UserError, match="it has not learnt the task 'vqa'"):
        explain_script.main()


def test_mistakes_are_one_line(captioners, images):
    captioner = captioners["caption"]
    answerer = captioners["vqa"]
    for function, arguments, message in [
        (captioner.answer, (images[:1], [QUESTION]), "captions images; it has not learnt .*'vqa'"),
        (answerer.caption, (images[:1],), "answers questions; it has not learnt .*'caption'"),
        (answerer.explain, (images[:1], [CAPTION]), "has not learnt the task 'caption'"),
        (answerer.explain, (images[:1],), "has not learnt the task 'caption'"),
        (answerer.answer, (images[:1], ["  "]), "no word in an empty question"),
        (answerer.answer, (images[:1], ["a dog " * 9]), "18 sub-words, and 10 can be asked"),
        (answerer.answer, (images, [QUESTION]), "2 images need as many questions, not 1"),
        (
            answerer.explain_answers,
            (images, [QUESTION]),
            "2 images need as many questions, not 1",
        ),
        (
            answerer.explain_answers,
            (images[:1], [QUESTION], ["green"]),
            "'green' is none of the 4 answers",
        ),
        (captioner.caption, (images, "nucleus"), "no decoding 'nucleus', only beam and greedy"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            function(*arguments)
        assert "\n" not in str(error.value)


def edited(folder, target, change):
    """A copy of a folder with another configuration."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("width"), "holds no whole CLIPmapper"),
        (lambda config: config.update(task="dance"), "there is no task 'dance'"),
        (lambda config: config.update(width="wide"), "holds no whole CLIPmapper"),
        (lambda config: config.update(width=24), "does not hold the weights"),
        (lambda config: config.update(answers=["yes"]), "does not hold the weights"),
        (lambda config: config.update(stem="no-network"), "no-network"),
    ],
)
def test_a_damaged_folder_is_one_line(change, message, folders, tmp_path):
    folder = edited(folders["vqa"], tmp_path / "mapper", change)
    with pytest.raises(UserError, match=message) as error:
        load_captioner(folder)
    assert "\n" not in str(error.value)


def test_cut_weights_are_one_line(folders, tmp_path):
    folder = edited(folders["vqa"], tmp_path / "mapper", lambda config: None)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="does not hold the weights"):
        load_captioner(folder)
