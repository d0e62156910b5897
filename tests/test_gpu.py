"""What only a GPU can show: it finds what the CPU finds. Skipped without one."""

import pytest
import tiny_clip
import torch
from fixtures import command, prepared_scenes
from helpers import random_captioner

import explain
import train
from captiondata import cache_features
from captioner import MODELS, load_captioner
from encoder import build_encoder
from experiments import EXPERIMENTS, faithfulness, map_quality, sign
from experiments.case import Setting, examine
from explanation import METHODS, methods_of
from pretrainedmodel import METHODS as PRETRAINED_METHODS
from pycocoevalcap.chair.chair import object_phrases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CAPTION = ["w3", "w7", "w8"]
PHRASES = object_phrases({"dog": ["w3"], "bus": ["w7", "w8"]})
ENTRY = {
    "captions": ["w3 w4"],
    "width": 128,
    "height": 128,
    "objects": [{"category": "dog", "bbox": [16, 16, 64, 64]}],
}
PARTS = ("scores", "image_relevance", "region_relevance", "word_relevance")


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 3, 128, 128, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = prepared_scenes(tmp_path_factory.mktemp("data") / "scenes", 16, 4, 4)
    cache_features(folder, build_encoder("scenes_vgg", "random"), workers=0)
    return folder


def on_gpu(model_type):
    """Two equal captioners, the second one on the GPU."""
    here = random_captioner(model_type=model_type)
    there = random_captioner(model_type=model_type).to("cuda")
    there.load_state_dict(here.state_dict())
    return here, there


def is_close(found, truth, tolerance):
    """Whether two tensors on the CPU differ by no more than this part of the largest true value."""
    return (found - truth).abs().max() <= tolerance * truth.abs().max()


def assert_same(found, truth, tolerance):
    """That what two explanations hold differs by no more than `is_close` allows."""
    for name in PARTS:
        assert is_close(getattr(found, name), getattr(truth, name), tolerance), name


@pytest.fixture(scope="module")
def clipmappers(tmp_path_factory):
    """{task: the folder of a CLIPmapper}."""
    root = tmp_path_factory.mktemp("clipmapper")
    tiny_clip.save_clip(root / "clip")
    tasks = ("caption", "vqa")
    return {task: tiny_clip.save_mapper(task, root / "clip", root / task) for task in tasks}


@pytest.mark.parametrize("method", PRETRAINED_METHODS)
def test_a_clipmapper_explains_as_the_cpu_does(method, clipmappers):
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    caption = ["is", "the", "dog", "red"]
    questions = ["is there a red dog ?", "what colour is the ball ?"]
    for task, folder in clipmappers.items():
        found = []
        for device in ("cpu", "cuda"):
            captioner = load_captioner(folder, device)
            if task == "caption":
                found.append(captioner.explain(images, [caption, caption[:2]], method))
            else:
                answers = ["yes", "red"]
                found.append(captioner.explain_answers(images, questions, answers, method))
        for truth, there in zip(*found):
            assert_same(there, truth, 1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", MODELS)
def test_every_method_explains_as_the_cpu_does(model_type, method, images):
    here, there = on_gpu(model_type)
    if method not in methods_of(here):
        pytest.skip("this method is not for this captioner")
    # Methods that go over many copies of an image are slow on the CPU.
    captions = [CAPTION, CAPTION[:2]] if METHODS[method].one_pass else [CAPTION[:1]]
    chosen = images[: len(captions)]
    found = there.explain(chosen.to("cuda"), captions, method)
    for one, truth in zip(found, here.explain(chosen, captions, method)):
        assert_same(one, truth, 1e-9)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].one_pass])
def test_float32_stays_exact_though_the_gpu_may_use_tf32(method, images):
    here, there = on_gpu("aoa")
    (truth,) = here.explain(images[:1], [CAPTION], method)
    allowed = torch.backends.cudnn.allow_tf32
    (found,) = there.float().explain(images[:1].float().to("cuda"), [CAPTION], method)
    assert torch.backends.cudnn.allow_tf32 == allowed
    assert_same(found, truth, 1e-4)  # TF32 keeps 10 bits of a factor: some 1e-3


@pytest.mark.parametrize("model_type", MODELS)
def test_it_says_the_same_captions(model_type, images):
    here, there = on_gpu(model_type)
    for size in (1, 3):
        truth = here.decode(here.encode(images), beam_size=size)
        assert there.decode(there.encode(images.to("cuda")), beam_size=size) == truth


def test_every_experiment_finds_the_same(images, monkeypatch):
    monkeypatch.setattr(faithfulness, "FRACTIONS", (0.3,))
    monkeypatch.setattr(faithfulness, "SUBSETS", 4)
    monkeypatch.setattr(map_quality, "NOISY", 1)
    here, there = on_gpu("aoa")
    experiments = EXPERIMENTS | {"sign": sign.EXPERIMENT}
    found = []
    for captioner in (here, there):
        methods = ["lrp", "gradcam", "guided_gradcam", "attention"]
        setting = Setting(captioner, methods, PHRASES, ["w3", "w8"])
        placed = images.to(captioner.device)
        found.append(examine(placed, [0, 1], [ENTRY, ENTRY], experiments, setting))
    assert len(found[0]) == 2
    assert_equal_records(found[0], found[1])


def assert_equal_records(truth, found):
    """That two records are equal, numbers within a millionth of their size."""
    if isinstance(truth, dict):
        assert truth.keys() == found.keys()
        for name in truth:
            assert_equal_records(truth[name], found[name])
    elif isinstance(truth, (list, tuple)):
        assert len(truth) == len(found)
        for one, other in zip(truth, found):
            assert_equal_records(one, other)
    elif isinstance(truth, float):
        assert found == pytest.approx(truth, rel=1e-6, abs=1e-9)
    else:
        assert truth == found


@pytest.mark.parametrize("precision", ["--bfloat16", "--no-bfloat16"])
@pytest.mark.parametrize("model_type", MODELS)
def test_every_training_runs_there(model_type, precision, folder, tmp_path, monkeypatch):
    start = tmp_path / "ce.pt"
    common = ["--dataset", folder, "--preset", "scenes", "--device", "cuda", "--workers", 2]
    common += ["--model_type", model_type, "--batch_size", 4, "--max_iterations", 2, precision]
    trainings = {
        "ce": ["--encoder", "scenes_vgg", "--cache_in_memory"],
        "lrp": ["--lrp_tune", "--resume", start],
        "scst": ["--cider_tune", "--resume", start],
        "lrp_scst": ["--lrp_cider_tune", "--resume", start],
    }
    for name, flags in trainings.items():
        output = tmp_path / f"{name}.pt"
        command(monkeypatch, train, *common, *flags, "--output", output)
        train.main()
        for weight in load_captioner(output).parameters():
            assert torch.isfinite(weight).all()


def test_a_photograph_is_explained_there(tmp_path, monkeypatch):
    out = tmp_path / "out"
    flags = ["--device", "cuda", "--methods", "lrp", "guided_gradcam", "--output", out]
    command(monkeypatch, explain, "data/photographs/camera.jpg", *flags)
    explain.main()
    assert list(out.glob("*.png"))
