"""What all captioners share: batches equal single images, explaining changes nothing, checkpoints
are self-contained, and explaining works in whatever mode, thread and precision it is called.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_captioner

import train
from basemodel import read_checkpoint
from captioner import (
    METHODS,
    MODELS,
    CaptionerConfig,
    build_captioner,
    commands_for,
    load_captioner,
)
from commandline import SHIPPED, UserError, file_hash, find_checkpoint, provenance
from explanation import methods_of
from gatedconv import read_inpainter
from images import image_transform, load_image
from vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = [["w1", "w2", "w3", "w4", "w5"], ["w7", "w7"], ["w9", "w1", "w0"]]
ONE_PASS = [name for name, method in METHODS.items() if method.one_pass]


@pytest.fixture(scope="module", params=MODELS)
def captioner(request):
    return random_captioner(model_type=request.param).float()


@pytest.fixture(scope="module", params=MODELS)
def exact(request):
    """In float64, so that only a difference in what is computed shows, not in what is rounded."""
    return random_captioner(model_type=request.param)


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(0xD06))


def scenes():
    """The two drawings of the demo and their mirror images: (4, 3, 128, 128)."""
    paths = sorted((ROOT / "data/demo").glob("*.jpg"))
    images = torch.stack([image_transform(128)(load_image(path)) for path in paths])
    return torch.cat([images, images.flip(-1)])


def assert_same_explanation(one, other):
    assert one.words == other.words
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            tolerance = 1e-5 * float(value.abs().max())
            torch.testing.assert_close(value, getattr(other, name), rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("method", ONE_PASS)
def test_explaining_a_batch_equals_explaining_its_images_one_by_one(exact, images, method):
    if method not in methods_of(exact):
        pytest.skip(f"{method} is not for this captioner")
    images = images.double()
    for image, caption, ours in zip(images, CAPTIONS, exact.explain(images, CAPTIONS, method)):
        assert ours.words == caption
        assert_same_explanation(ours, exact.explain(image[None], [caption], method)[0])


def test_the_captioner_that_ships_explains_and_captions_batches_as_single_images():
    """In float32 rounding may let another pixel win a max-pool where several are all but equal."""
    captioner = load_captioner(ROOT / "checkpoints/scenes-gridtd.pt").double()
    images = scenes().double()
    captions = captioner.caption(images)
    assert len({len(caption) for caption in captions}) > 1
    for image, caption, ours in zip(images, captions, captioner.explain(images)):
        assert captioner.caption(image[None]) == [caption]
        assert_same_explanation(ours, captioner.explain(image[None])[0])


def test_chunking_does_not_change_explanations(exact, images, monkeypatch):
    whole = exact.explain(images.double(), CAPTIONS)
    monkeypatch.setattr("explanation.PIXELS_PER_PASS", 1)
    for one, other in zip(whole, exact.explain(images.double(), CAPTIONS)):
        assert_same_explanation(one, other)


def test_captioning_a_batch_equals_captioning_its_images_one_by_one(captioner, images):
    for method in ("beam", "greedy"):
        one_by_one = [captioner.caption(image[None], method)[0] for image in images]
        assert captioner.caption(images, method) == one_by_one


def test_an_explanation_has_the_documented_shapes(captioner, images):
    explanation = captioner.explain(images[:1], [["w1", "w2", "w3"]])[0]
    assert explanation.image_relevance.shape == (3, 128, 128)
    assert explanation.region_relevance.shape == (3, 64)
    assert explanation.word_relevance.shape == (3, 3)
    heads = 4 if captioner.config.model_type == "aoa" else 1
    assert explanation.attention.shape == (3, heads, 64)
    assert explanation.scores.shape == (3,)
    if captioner.config.model_type in ("aoa", "soft"):  # which have no sentinel
        assert explanation.beta is None
    else:
        assert explanation.beta.shape == (3,)
    assert explanation.word_relevance.triu(1).abs().max() == 0
    assert explanation.word_relevance.diagonal().abs().min() > 0
    torch.testing.assert_close(explanation.attention.sum(-1), torch.ones(3, heads))
    assert explanation.image_relevance.dtype == torch.float32
    assert explanation.image_relevance.min() < 0


def test_scores_and_probabilities_are_the_models(captioner, images):
    explanation = captioner.explain(images[:1], [["w1", "w2"]])[0]
    vocabulary = captioner.vocabulary
    ids = vocabulary.encode(["w1", "w2"])
    inputs = torch.tensor([[[vocabulary.start, ids[0]]]])
    with torch.no_grad():
        logits = captioner(captioner.encoder(images[:1]), inputs)[0, 0]
    probabilities = logits.softmax(-1)[[0, 1], ids]
    torch.testing.assert_close(explanation.scores, logits[[0, 1], ids], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(explanation.probabilities, probabilities, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ONE_PASS)
def test_explaining_does_not_change_the_model(images, method):
    captioner = random_captioner(model_type="aoa").float().train()
    captioner.encoder.eval()
    before = {name: value.clone() for name, value in captioner.state_dict().items()}
    modes = [module.training for module in captioner.modules()]
    captioner.explain(images[:1], [["w1", "w2"]], method=method)
    captioner.caption(images[:1])
    assert all(torch.equal(before[name], value) for name, value in captioner.state_dict().items())
    assert modes == [module.training for module in captioner.modules()]
    assert all(parameter.grad is None for parameter in captioner.parameters())
    for module in captioner.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks


def test_mistakes_in_explain_are_named(captioner, images):
    with pytest.raises(UserError, match="'zebra' is not in this captioner's vocabulary"):
        captioner.explain(images[:1], [["w1", "zebra"]])
    with pytest.raises(UserError, match="'<end>' is not in this captioner's vocabulary"):
        captioner.explain(images[:1], [["w1", "<end>", "w2"]])
    with pytest.raises(UserError, match="2 images need as many captions, not 1"):
        captioner.explain(images[:2], [["w1"]])
    with pytest.raises(UserError, match="nothing called 'r' to strip"):
        captioner.caption(images[:1], strip="repeats")
    with pytest.raises(UserError, match="empty caption"):
        captioner.explain(images[:1], [[]])
    with pytest.raises(UserError, match="no explanation method 'magic'"):
        captioner.explain(images[:1], method="magic")
    with pytest.raises(UserError, match="no decoding 'magic'"):
        captioner.caption(images[:1], "magic")


def test_all_unknown_words_are_named_with_the_nearest_known_ones(images):
    names = ["<pad>", "zebra", "zebras", "dog", "<unk>", "<start>", "<end>"]
    captioner = random_captioner(vocabulary=Vocabulary(names)).float()
    with pytest.raises(UserError) as caught:
        captioner.explain(images[:1], [["zebre", "dog", "qqq", "dogs", "qqq"]])
    assert str(caught.value) == (
        "the words 'zebre', 'qqq' and 'dogs' are not in this captioner's vocabulary, "
        "so it cannot explain them; instead of 'zebre' it knows zebra, zebras; "
        "instead of 'dogs' it knows dog"
    )


def test_a_checkpoint_is_self_contained(captioner, images, tmp_path):
    captioner.save(tmp_path / "it.pt", about={"epoch": 3})
    loaded = load_captioner(tmp_path / "it.pt")
    assert read_checkpoint(tmp_path / "it.pt")["about"] == {"epoch": 3}
    assert not loaded.training and loaded.config == captioner.config
    assert loaded.caption(images) == captioner.caption(images)
    assert [path.name for path in tmp_path.iterdir()] == ["it.pt"]


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    messages = {
        "text.pt": "not a checkpoint",
        "other.pt": "not a checkpoint",
        "missing.pt": "there is no checkpoint",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            load_captioner(tmp_path / name)


PREPARED = "python preparedataset.py --dataset"
TRAINED = "python train.py --dataset"


@pytest.mark.parametrize(
    "name, commands",
    [
        (
            "flickr8k-gridtd",
            f"{PREPARED} flickr8k --root FOLDER && {TRAINED} flickr8k --model_type gridtd",
        ),
        (
            "scenes-aoa-lrp_tune-form_image-lambda_1.0",
            f"{PREPARED} scenes && {TRAINED} scenes --model_type aoa && "
            f"{TRAINED} scenes --model_type aoa --lrp_tune --lrp_form image --lrp_lambda 1.0",
        ),
        (
            "mine-adaptive-cider_tune-lrp_tune",
            f"{TRAINED} mine --model_type adaptive --lrp_tune "
            "--resume checkpoints/mine-adaptive-cider_tune.pt",
        ),
    ],
)
def test_a_missing_checkpoint_names_the_commands_that_make_it(
    tmp_path, monkeypatch, name, commands
):
    monkeypatch.chdir(tmp_path)
    for made in ("checkpoints/mine-adaptive.pt", "checkpoints/mine-adaptive-cider_tune.pt"):
        (tmp_path / made).parent.mkdir(exist_ok=True)
        (tmp_path / made).touch()
    with pytest.raises(UserError) as caught:
        load_captioner(f"checkpoints/{name}.pt")
    message = f"there is no checkpoint checkpoints/{name}.pt; make it with: {commands}"
    assert str(caught.value) == message


def test_the_commands_for_a_fine_tuned_checkpoint_make_a_file_of_that_name(tmp_path, monkeypatch):
    """train.py takes the flags, and would write where the checkpoint was missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.is_interrupted_training", lambda path, mode: False)
    wanted = Path("checkpoints/scenes-gridtd-cider_tune-lrp_tune-form_image-lambda_0.25.pt")
    _, *trainings = commands_for(wanted)
    outputs = []
    for training in trainings:
        options = train.parse_arguments(training.split()[2:])
        outputs.append(str(options.output))
    assert outputs == [
        "checkpoints/scenes-gridtd.pt",
        "checkpoints/scenes-gridtd-cider_tune.pt",
        str(wanted),
    ]


@pytest.mark.parametrize("name", ["checkpoints/best.pt", "checkpoints/x-aoa-b.pt", "x-aoa.pt"])
def test_a_missing_checkpoint_of_another_name_names_those_beside_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "checkpoints"):
        folder.mkdir(exist_ok=True)
        (folder / "b.pt").touch()
        (folder / "a.pt").touch()
    with pytest.raises(UserError, match=f"no checkpoint {name}; the folder .* has a.pt, b.pt$"):
        load_captioner(name)
    with pytest.raises(UserError, match="the folder nowhere has none$"):
        load_captioner("nowhere/best.pt")


def test_an_unknown_model_type_is_named():
    captioner = random_captioner()
    config = CaptionerConfig(model_type="transformer")
    with pytest.raises(UserError, match="no model_type 'transformer'"):
        build_captioner(config, captioner.vocabulary, captioner.encoder)


def test_teacher_forcing_equals_step_by_step(captioner, images):
    captioner = captioner.double()
    inputs = torch.randint(1, 30, (3, 2, 6))
    with torch.no_grad():
        features = captioner.encoder(images.double())
        logits = captioner(features, inputs).log_softmax(-1)
        memory = captioner.image_memory(features)
        state = captioner.initial_state(memory, 2)
        for t in range(6):
            step, state = captioner.next_words(inputs[:, :, t], state, memory)
            said = step.isfinite()
            torch.testing.assert_close(step[said], logits[:, :, t][said], rtol=1e-9, atol=1e-9)
    captioner.float()


def test_scheduled_sampling_feeds_back_predictions(captioner, images):
    features = captioner.encoder(images)
    inputs = torch.randint(1, 30, (3, 2, 8))
    with torch.no_grad():
        memory = captioner.image_memory(features)
        mixed = captioner._scheduled_inputs(memory, inputs, ss_prob=1.0)
        predicted = captioner(features, mixed)
    silent = [captioner.vocabulary.pad, captioner.vocabulary.start, captioner.vocabulary.unk]
    predicted = predicted.index_fill(-1, torch.tensor(silent), -torch.inf).argmax(-1)
    assert torch.equal(mixed[..., :3], inputs[..., :3])
    assert torch.equal(mixed[..., 3:], predicted[..., 2:-1])


def equal_explanations(one, other):
    """Whether two explanations are the same bit for bit."""
    for name, value in vars(one).items():
        theirs = getattr(other, name)
        if isinstance(value, torch.Tensor):
            if not torch.equal(value, theirs):
                return False
        elif value != theirs:
            return False
    return True


def test_threads_may_explain_with_one_captioner_in_train_mode():
    captioner = random_captioner("resnet101", model_type="aoa").float().train()
    images = torch.randn(3, 3, 224, 224)
    allowed = torch.backends.cudnn.allow_tf32

    def explain(index):
        return captioner.explain(images[index : index + 1], CAPTIONS[index : index + 1])[0]

    alone = [explain(index) for index in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(explain, [0, 1, 2] * 2))
    for index, explanation in enumerate(together):
        assert equal_explanations(explanation, alone[index % 3])
    assert all(module.training for module in captioner.modules())
    assert torch.backends.cudnn.allow_tf32 == allowed


def test_explaining_works_inside_inference_mode(images, tmp_path):
    random_captioner().float().save(tmp_path / "it.pt")
    outside = load_captioner(tmp_path / "it.pt").explain(images[:1], CAPTIONS[:1])[0]
    with torch.inference_mode():
        captioner = load_captioner(tmp_path / "it.pt")
        inside = captioner.explain(images[:1].clone(), CAPTIONS[:1])[0]
        decoded = captioner.explain(images[:1])[0]
        gradient = captioner.explain(images[:1].clone(), CAPTIONS[:1], "gradient")[0]
    assert equal_explanations(inside, outside)
    assert equal_explanations(captioner.explain(images[:1], CAPTIONS[:1])[0], outside)
    assert equal_explanations(captioner.explain(images[:1], CAPTIONS[:1], "gradient")[0], gradient)
    assert decoded.words == captioner.caption(images[:1])[0]


def test_a_captioner_converted_inside_inference_mode_is_refused():
    captioner = random_captioner()
    with torch.inference_mode():
        captioner.float()
    with pytest.raises(UserError, match="converted inside torch.inference_mode"):
        captioner.explain(torch.randn(1, 3, 128, 128), [["w1"]])


def test_autocast_and_precision_do_not_reach_an_explanation(images):
    captioner = random_captioner(model_type="aoa").float()
    plain = captioner.explain(images[:1], CAPTIONS[:1])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert equal_explanations(captioner.explain(images[:1], CAPTIONS[:1])[0], plain)
    assert equal_explanations(captioner.explain(images[:1].double(), CAPTIONS[:1])[0], plain)
    assert captioner.caption(images[:1].double()) == captioner.caption(images[:1])


def test_an_empty_batch_has_no_explanations_and_no_captions(captioner, images):
    assert captioner.explain(images[:0], []) == []
    assert captioner.explain(images[:0]) == []
    assert captioner.caption(images[:0]) == []


def test_a_caption_may_be_any_sequence_of_words(captioner, images):
    expected = captioner.explain(images[:1], [["w1", "w2"]])[0]
    for caption in (("w1", "w2"), iter(["w1", "w2"]), "w1 w2"):
        assert equal_explanations(captioner.explain(images[:1], [caption])[0], expected)
    with pytest.raises(UserError, match="need a caption each, and 'w1 w2' is one text"):
        captioner.explain(images[:1], "w1 w2")


WRONG_INPUTS = {
    "shape": (torch.zeros(1, 3, 64, 64), r"not \(1, 3, 64, 64\)"),
    "no batch": (torch.zeros(3, 128, 128), r"not \(3, 128, 128\)"),
    "array": (np.zeros((1, 3, 128, 128), np.float32), "not a ndarray"),
    "bytes": (torch.zeros(1, 3, 128, 128, dtype=torch.uint8), "not torch.uint8"),
    "NaN": (torch.full((1, 3, 128, 128), torch.nan), "no finite number"),
    "infinity": (torch.full((1, 3, 128, 128), torch.inf), "no finite number"),
}


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_what_is_no_batch_of_images_is_refused_in_the_same_words(captioner, wrong):
    inputs, message = WRONG_INPUTS[wrong]
    for call in (captioner.caption, captioner.encode, captioner.explain):
        with pytest.raises(UserError, match=message):
            call(inputs)


@pytest.mark.parametrize("method", ["lrp", "gradcam", "attention"])
def test_images_of_another_size_are_refused_by_every_method(captioner, method):
    for shape in ((1, 3, 64, 64), (1, 3, 128, 96), (1, 1, 128, 128), (3, 128, 128)):
        with pytest.raises(UserError, match=r"wants images of shape \(B, 3, 128, 128\)"):
            captioner.explain(torch.randn(shape), [["w1"]], method)


def test_an_image_that_the_captioner_is_silent_about_does_not_stop_the_others(images, monkeypatch):
    captioner = random_captioner().float()
    captions = [["w1", "w2"], [], ["w3"]]
    monkeypatch.setattr(captioner, "caption", lambda images: captions)
    found = captioner.explain(images)
    assert [explanation.words for explanation in found] == captions
    silent = found[1]
    assert silent.scores.shape == (0,) and silent.word_relevance.shape == (0, 0)
    assert silent.image_relevance.shape == (0, 128, 128) and silent.beta.shape == (0,)
    expected = captioner.explain(images[2:], [["w3"]])[0]
    assert_same_explanation(found[2], expected)
    monkeypatch.setattr(captioner, "caption", lambda images: [[]])
    assert captioner.explain(images[:1])[0].words == []


def test_the_folded_encoder_is_made_once_for_the_same_weights(images):
    captioner = random_captioner("scenes_vgg").float()
    captioner.explain(images[:1], [["w1"]])
    first = captioner.encoder.folded()
    captioner.explain(images[:1], [["w1"]])
    assert captioner.encoder.folded() is first
    before = first(images[:1])
    with torch.no_grad():
        captioner.encoder.net[0].weight *= 2
    assert captioner.encoder.folded() is not first
    assert not torch.equal(captioner.encoder.folded()(images[:1]), before)


@pytest.mark.parametrize("fused", [False, True])
def test_the_folded_encoder_follows_an_optimizer(images, fused):
    captioner = random_captioner("scenes_vgg").float()
    captioner.encoder.requires_grad_(True)
    captioner.explain(images[:1], [["w1"]])
    optimizer = torch.optim.Adam(captioner.encoder.parameters(), lr=0.1, fused=fused)
    captioner.encoder(images[:1].float()).mean().backward()
    optimizer.step()
    torch.testing.assert_close(
        captioner.encoder.folded()(images[:1].float()),
        captioner.encoder(images[:1].float()),
        rtol=1e-3,
        atol=1e-4,
    )


def test_training_the_decoder_does_not_fold_the_encoder_again(images):
    captioner = random_captioner("scenes_vgg").float()
    captioner.encoder.requires_grad_(False)
    first = captioner.encoder.folded()
    optimizer = torch.optim.Adam(captioner.decoder_parameters(), fused=True)
    captioner.fc.weight.sum().backward()
    optimizer.step()
    assert captioner.encoder.folded() is first


INPAINTER = "checkpoints/inpainting-flickr8k.pt"


@pytest.mark.parametrize("path", SHIPPED)
def test_what_ships_is_found_from_any_folder(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(path) == ROOT / path
    if path == INPAINTER:
        assert read_inpainter(find_checkpoint(path)).width == 24
        with pytest.raises(UserError, match="inpainting-flickr8k.pt"):
            load_captioner(path)
    else:
        load_captioner(path)
    assert provenance(checkpoint=path)["checkpoint_sha256"] == file_hash(ROOT / path)


def test_a_users_own_file_comes_before_the_captioner_that_ships(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    own = Path(SHIPPED[0])
    own.parent.mkdir()
    own.write_text("mine")
    assert find_checkpoint(own).read_text() == "mine"


@pytest.mark.parametrize(
    "path", ["flickr8k.pt", "checkpoints/other.pt", "/checkpoints/flickr8k.pt"]
)
def test_other_checkpoints_are_where_their_path_says(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(path) == Path(path)


def test_the_captioner_for_photographs_that_ships_explains_them():
    captioner = load_captioner(ROOT / "checkpoints/flickr8k.pt")
    photograph = load_image(ROOT / "data/photographs/camera.jpg")
    image = image_transform(captioner.encoder.image_size)(photograph)[None]
    explanation = captioner.explain(image)[0]
    assert {"man", "camera"} <= set(explanation.words)
    positive = explanation.image_relevance.clamp(min=0)
    positive /= positive.sum((1, 2), keepdim=True)
    size = captioner.encoder.image_size
    right = positive[:, :, size // 2 :].sum((1, 2))  # where camera and tripod stand
    man = explanation.words.index("man")
    camera = explanation.words.index("camera")
    assert right[man] < 0.4 < right[camera]
