"""Two processes (gloo, on the CPU) against one: the same training to 1e-5, and the same evaluation
and explanations to the last bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import prepared_scenes
from helpers import random_captioner

import distributed
from basemodel import read_checkpoint
from commandline import UserError
from names import DROPOUTS
from vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
NO_DROPOUT = [f"--{name}=0" for name in DROPOUTS]
COMMON = ["--batch_size", 7, "--workers", 0, "--device", "cpu"]
SMALL = ["--embed_dim", 12, "--hidden_dim", 16, "--pretrain_epochs", 0, *COMMON]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared_scenes(tmp_path_factory.mktemp("distributed") / "scenes", 28, 6, 36)


def run(processes, script, *arguments, **environment):
    """Run a script of the project by so many processes; its standard output."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def speaker(folder, **sizes):
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    return random_captioner(vocabulary=vocabulary, **sizes).float()


def rows_of(path):
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


def assert_close_trainings(one, two):
    """Whether two trainings have the same figures and weights, to rounding."""
    for first, second in zip(rows_of(one), rows_of(two), strict=True):
        assert first.keys() == second.keys()
        assert first.get("words") == second.get("words")
        if "loss" in first:
            assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    first = read_checkpoint(one.with_suffix(".last.pt"))["state_dict"]
    second = read_checkpoint(two.with_suffix(".last.pt"))["state_dict"]
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-4), name


def trained_by_one_and_two(folder, tmp_path, *flags):
    """Where the captioners of one and of two processes are."""
    paths = []
    for processes in (1, 2):
        paths.append(tmp_path / f"{processes}.pt")
        flags_here = ["--dataset", folder, *NO_DROPOUT, "--epochs", 2, *flags]
        output = run(processes, "train.py", *flags_here, "--output", paths[-1])
        assert output.count("the captioner (val CIDEr") == 1  # only one of them talks
    return paths


def test_two_processes_train_as_one_does(folder, tmp_path):
    paths = trained_by_one_and_two(folder, tmp_path, *SMALL, "--model_type", "gridtd")
    assert_close_trainings(*paths)


def test_two_processes_tune_as_one_does(folder, tmp_path):
    start = tmp_path / "start.pt"
    speaker(folder, model_type="adaptive").save(start)
    flags = ["--lrp_tune", "--decoder_lr", 1e-3, "--max_iterations", 8, "--resume", start]
    paths = trained_by_one_and_two(folder, tmp_path, *COMMON, "--model_type", "adaptive", *flags)
    assert_close_trainings(*paths)


def evaluated(folder, tmp_path, processes):
    """Captions, metrics and the experiments' tables, by so many processes; written files' names."""
    output = tmp_path / str(processes)
    flags = ["--checkpoint", tmp_path / "it.pt", "--dataset", folder, "--experiment", "all"]
    flags += ["--max_length", 8, "--workers", 0, "--methods", "lrp", "gradcam"]
    flags += ["--metrics", "bleu", "ciderd", "object_words", "object_word_ap"]
    flags += ["--batch_size", 10, "--output", output / "it.json"]
    run(processes, "evaluation.py", *flags)
    captions = json.loads((output / "it.json").read_text())
    tables = json.loads((output / "it-all.json").read_text())["tables"]
    names = {path.name for path in output.iterdir()}
    return captions["captions"], captions["metrics"], tables, names


def test_two_processes_evaluate_as_one_does(folder, tmp_path):
    speaker(folder).save(tmp_path / "it.pt")
    one = evaluated(folder, tmp_path, 1)
    assert one == evaluated(folder, tmp_path, 2)  # and nothing of a single process is left
    captions, _, tables, _ = one
    assert len(captions) == 36
    assert tables.keys() >= {"correctness", "hallucination"}


def test_two_processes_explain_as_one_does(folder, tmp_path):
    speaker(folder).save(tmp_path / "it.pt")
    images = sorted((folder / "test").iterdir())[:10]
    flags = ["--checkpoint", tmp_path / "it.pt", "--max_length", 6]
    for processes in (1, 2):
        run(processes, "explain.py", *images, *flags, "--output", tmp_path / str(processes))
    for image in images:
        one = np.load(tmp_path / "1" / f"{image.stem}-it-lrp.npz")
        two = np.load(tmp_path / "2" / f"{image.stem}-it-lrp.npz")
        assert one.files == two.files
        for name in one.files:
            assert np.array_equal(one[name], two[name])


def test_two_processes_perturb_as_one_does(folder, tmp_path):
    checkpoint = tmp_path / "it.pt"
    speaker(folder).save(checkpoint)
    tables = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        flags = ["--checkpoint", checkpoint, "--dataset", folder, "--items", 5, "--device", "cpu"]
        run(processes, "perturbation.py", *flags, "--methods", "lrp", "--output", output)
        tables.append(json.loads((output / "it-test.json").read_text())["table"])
    assert tables[0] == tables[1]


def test_a_restarted_job_goes_on_where_it_was(folder, tmp_path):
    """torchrun starts all processes again with the same command; the second run stands for that."""
    output = tmp_path / "it.pt"
    arguments = ["--dataset", folder, *SMALL, "--epochs", 2, "--output", output]
    run(1, "train.py", *arguments)
    before = rows_of(output)
    run(1, "train.py", *arguments, TORCHELASTIC_RESTART_COUNT="1")
    assert rows_of(output) == before  # all was done already, to the second
    run(1, "train.py", *arguments)
    assert [row["seconds"] for row in rows_of(output)] != [row["seconds"] for row in before]


def test_the_parts_of_a_list_are_its_whole(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(distributed.shared(list(range(8))))
        assert distributed.is_main() == (rank == 0)
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.fixture
def second_of_two(monkeypatch):
    """This process is the second of two on a machine with one GPU."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_more_processes_than_gpus_are_refused(second_of_two):
    with pytest.raises(UserError, match="nproc_per_node"):
        distributed.own_device()
    assert distributed.own_device("cpu").type == "cpu"


def test_one_gpu_for_all_processes_is_refused(second_of_two):
    with pytest.raises(UserError, match="2 processes would share the device 'cuda:0'"):
        distributed.own_device("cuda:0")


@pytest.mark.parametrize(
    "name, value", [("RANK", "x"), ("RANK", "-1"), ("WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "")]
)
def test_what_torchrun_would_not_set_is_told(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    asked = {"RANK": distributed.rank, "WORLD_SIZE": distributed.world_size}
    with pytest.raises(UserError, match=f"the environment has {name}={value}; unset it"):
        asked.get(name, distributed.processes_here)()


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_several_processes_need_to_find_one_another(monkeypatch, missing):
    values = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with (
        pytest.raises(UserError, match=f"WORLD_SIZE=2 and no {missing}"),
        distributed.job(torch.device("cpu")),
    ):
        pass
