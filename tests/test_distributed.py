"""Two processes (gloo, on the CPU) against one: the same training to 1e-5, the same evaluation and explanations to the last bit."""

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
from vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
NO_DROPOUT = [
    f"--{name}=0" for name in ("dropout", "embed_dropout", "region_dropout", "attention_dropout")
]
COMMON = ["--batch_size", 7, "--workers", 0, "--device", "cpu"]
SMALL = ["--embed_dim", 12, "--hidden_dim", 16, "--pretrain_epochs", 0, *COMMON]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared_scenes(tmp_path_factory.mktemp("distributed") / "scenes", 28, 6, 36)


def run(processes, script, *arguments, **environment):
    """Run a script of the project by so many processes; its standard output."""
    start = (
        [sys.executable]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [*start, script, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def speaker(folder, **sizes):
    return random_captioner(vocabulary=Vocabulary.load(folder / "vocabulary.json"), **sizes).float()


def rows(path):
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "model_type, flags", [("gridtd", []), ("adaptive", ["--lrp_tune", "--decoder_lr", 1e-3])]
)
def test_two_processes_train_as_one_does(folder, tmp_path, model_type, flags):
    arguments = [
        "--dataset",
        folder,
        *(COMMON if flags else SMALL),
        *NO_DROPOUT,
        "--model_type",
        model_type,
        "--epochs",
        2,
        *flags,
    ]
    if "--lrp_tune" in flags:
        speaker(folder, model_type=model_type).save(tmp_path / "start.pt")
        arguments += ["--resume", tmp_path / "start.pt", "--max_iterations", 8]
    for processes in (1, 2):
        output = run(processes, "train.py", *arguments, "--output", tmp_path / f"{processes}.pt")
        assert output.count("epoch 2") == 1  # only one of them talks
    one, two = (rows(tmp_path / f"{processes}.pt") for processes in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys() and first.get("words") == second.get("words")
        if "loss" in first:
            assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    states = [
        read_checkpoint(tmp_path / f"{processes}.last.pt")["state_dict"] for processes in (1, 2)
    ]
    assert all(torch.allclose(states[0][key], states[1][key], atol=1e-4) for key in states[0])


def test_two_processes_evaluate_as_one_does(folder, tmp_path):
    speaker(folder).save(tmp_path / "it.pt")
    arguments = ["--checkpoint", tmp_path / "it.pt", "--dataset", folder, "--experiment", "all", "--max_length", 8, "--workers", 0,
                 "--metrics", "bleu", "ciderd", "object_words", "object_word_ap", "--methods", "lrp", "gradcam", "--batch_size", 10]  # fmt: skip
    found = {}
    for processes in (1, 2):
        run(
            processes,
            "evaluation.py",
            *arguments,
            "--output",
            tmp_path / str(processes) / "it.json",
        )
        captions, tables = (
            json.loads((tmp_path / str(processes) / name).read_text())
            for name in ("it.json", "it-all.json")
        )
        found[processes] = captions["captions"], captions["metrics"], tables["tables"]
    assert (
        found[1] == found[2]
        and len(found[1][0]) == 36
        and found[1][2].keys() >= {"correctness", "hallucination"}
    )
    names = [{path.name for path in (tmp_path / str(processes)).iterdir()} for processes in (1, 2)]
    assert names[0] == names[1]  # nothing of a single process is left


def test_two_processes_explain_as_one_does(folder, tmp_path):
    speaker(folder).save(tmp_path / "it.pt")
    images = sorted((folder / "test").iterdir())[:10]
    for processes in (1, 2):
        run(
            processes,
            "explain.py",
            *images,
            "--checkpoint",
            tmp_path / "it.pt",
            "--max_length",
            6,
            "--output",
            tmp_path / str(processes),
        )
    for image in images:
        one, two = (
            np.load(tmp_path / str(processes) / f"{image.stem}-lrp.npz") for processes in (1, 2)
        )
        assert one.files == two.files and all(
            np.array_equal(one[name], two[name]) for name in one.files
        )


def test_a_restarted_job_goes_on_where_it_was(folder, tmp_path):
    """torchrun starts all processes anew with the same command; the second run stands for that."""
    arguments = ["--dataset", folder, *SMALL, "--epochs", 2, "--output", tmp_path / "it.pt"]
    run(1, "train.py", *arguments)
    before = rows(tmp_path / "it.pt")
    run(1, "train.py", *arguments, TORCHELASTIC_RESTART_COUNT="1")
    assert rows(tmp_path / "it.pt") == before  # all was done already, to the second
    run(1, "train.py", *arguments)
    assert [row["seconds"] for row in rows(tmp_path / "it.pt")] != [
        row["seconds"] for row in before
    ]


def test_the_parts_of_a_list_are_its_whole(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(distributed.shared(list(range(8))))
        assert distributed.is_main() == (rank == 0)
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="nproc_per_node"):
        distributed.own_device()
    assert distributed.own_device("cpu").type == "cpu"
