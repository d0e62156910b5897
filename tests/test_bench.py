"""bench.py: the benchmarks whose functions no other test runs, small; no time is judged."""

import functools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from captioner import MODELS


@pytest.mark.parametrize("model_type", MODELS)
def test_training_at_cocos_size_reads_the_feature_file(monkeypatch, model_type):
    for name, value in {"VOCABULARY": 50, "REGIONS": (4, 512), "COCO_TRAIN": 3600}.items():
        monkeypatch.setattr(bench, name, value)
    parse = bench.parse_arguments
    small = ["--batch_size", "4", "--workers", "0"]
    monkeypatch.setattr(bench, "parse_arguments", lambda flags: parse([*flags, *small]))
    with tempfile.TemporaryDirectory() as folder:
        bench.write_random_dataset(Path(folder), 12)
        at_hand, from_file = bench.coco_rows(folder, model_type, torch.device("cpu"))
    numbers = from_file["numbers"]
    assert from_file["ratio"] == pytest.approx(from_file["seconds"] / at_hand["seconds"])
    assert numbers["captions/s"] == pytest.approx(5 * numbers["images/s"])
    assert numbers["captions/s"] == pytest.approx(20 / from_file["seconds"])
    hours = 900 * from_file["seconds"] / 3600
    assert numbers["hours for an epoch of 110,000 images"] == pytest.approx(hours)
    assert 0 <= numbers["share of time waiting for data"] < 1


def test_a_ratio_is_the_median_of_the_rounds():
    times = np.array([2.0, 9.0, 4.0])
    reference = np.array([1.0, 3.0, 4.0])
    row = bench.ratio_row("it", times, reference, "that")
    # 2 / 1, 9 / 3 and 4 / 4; the ratio of the medians would be 4 / 3
    assert (row["seconds"], row["ratio"], row["spread"]) == (4, 2, [1, 3])
    assert bench.ratio_row("it", 3.0, 2.0, "that")["spread"] == [1.5, 1.5]


def test_functions_are_called_in_turn_and_the_first_round_does_not_count():
    called = []
    functions = {name: functools.partial(called.append, name) for name in "ab"}
    times = bench.seconds(functions, torch.device("cpu"), 3)
    assert called == list("abababab")
    assert [len(values) for values in times.values()] == [3, 3]


def test_growth_compares_every_size_with_the_smallest(monkeypatch):
    sizes = {"EXPLAINED_WORDS": (1, 2), "EXPLAINED_IMAGES": (1, 2), "DECODED_IMAGES": (1, 3)}
    for name, value in {**sizes, "BATCHES": (1, 2), "VOCABULARY": 50}.items():
        monkeypatch.setattr(bench, name, value)
    build = bench.random_captioner
    small = {"encoder": "scenes_vgg", "embed_dim": 8, "hidden_dim": 8}
    monkeypatch.setattr(bench, "random_captioner", lambda device, **_: build(device, **small))
    monkeypatch.setattr(bench, "REGIONS", (4, 256))
    rows = bench.bench_growth(torch.device("cpu"), 1)
    assert [row["name"].rpartition(": ")[2] for row in rows] == list("12121312")
    for smallest, larger in zip(rows[::2], rows[1::2]):
        assert smallest["ratio"] is None
        assert larger["against"] == smallest["name"]
        size = int(larger["name"].rpartition(": ")[2])
        assert larger["numbers"]["seconds each"] == pytest.approx(larger["seconds"] / size)
        assert larger["ratio"] == pytest.approx(larger["seconds"] / smallest["seconds"])


def test_the_table_is_printed_with_its_machine(monkeypatch, capsys, tmp_path):
    row = bench.ratio_row("it", np.array([2.0, 3.0]), np.array([1.0, 1.0]), "that")
    rows = [bench.reference_row("that", np.array([1.0, 1.0])), row]
    monkeypatch.setitem(bench.BENCHMARKS, "explain", lambda device, repeats: rows)
    path = tmp_path / "bench.json"
    arguments = ["explain", "--device", "cpu", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    bench.main()
    printed = capsys.readouterr().out
    assert "2.50 [2.00, 3.00] x that" in printed
    assert f"torch: {torch.__version__}" in printed
    written = json.loads(path.read_text())
    assert written["rows"] == rows
    assert written["device"] == "cpu" and written["cores"] >= 1
