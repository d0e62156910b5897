"""bench.py: the benchmarks whose functions no other test runs, small; no time is judged."""

import tempfile
from pathlib import Path

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
