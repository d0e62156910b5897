"""The experiment's table, from results written by hand."""

import json
import sys
from types import SimpleNamespace

import pytest

import tuning_experiment
from commandline import UserError
from tuning_experiment import METRICS, RATES, spread, stem, table

LENGTH = {"epochs": 4, "iterations": 150}


def write(folder, model, seed, setting, value, rate=None):
    metrics = {part: dict.fromkeys(METRICS, value) for part in ("val", "habit", "chance")}
    (folder / f"{stem(model, seed, setting, rate)}.json").write_text(
        json.dumps({"length": LENGTH, "metrics": metrics})
    )


@pytest.fixture
def done(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning_experiment, "FOLDER", tmp_path)
    for rate, value in zip(RATES, (0.1, 0.3, 0.2)):
        write(tmp_path, "gridtd", 0, "LRP-inference", value, rate)
    for seed, (plain, tuned) in enumerate(((0.5, 0.6), (0.3, 0.5))):
        write(tmp_path, "gridtd", seed, "continued cross-entropy", plain, RATES[1])
        write(tmp_path, "gridtd", seed, "SCST", tuned)
        write(tmp_path, "gridtd", seed, "LRP-inference, image", tuned, RATES[1])
        write(tmp_path, "gridtd", seed, "continued cross-entropy, one caption", 0.4, RATES[1])
    return tmp_path


def test_the_rate_is_chosen_on_val(done):
    assert tuning_experiment.chosen_rate() == RATES[1]


def test_means_spreads_and_paired_differences(done):
    rows = table(3).splitlines()
    scst = rows.index(next(row for row in rows if "| SCST |" in row))
    assert "| gridtd | SCST | 2 | 0.550 ± 0.071 |" in rows[scst]
    assert "| *difference* | 2 | 0.150 ± 0.071 |" in rows[scst + 1]
    image = rows.index(next(row for row in rows if "| LRP-inference, image |" in row))
    assert (
        "| *difference* | 2 | 0.150 ± 0.071 |" in rows[image + 1]
    )  # 0.6 and 0.5 against 0.4 of one caption
    assert (
        sum("difference" in row for row in rows) == 2 * 3
    )  # of LRP-inference and its image form and SCST, on both test sets
    assert any("| LRP-inference | 1 | 0.300 |" in row for row in rows) and not any(
        "aoa" in row for row in rows
    )
    assert spread([1.0]) == "1.000"


def test_what_is_done_is_not_done_again(done, monkeypatch, capsys):
    monkeypatch.setattr(
        tuning_experiment, "call", lambda *arguments, **options: pytest.fail(f"{arguments} was run")
    )
    tuning_experiment.train_and_measure("gridtd", 0, "SCST", SimpleNamespace(**LENGTH))
    with pytest.raises(UserError, match="of other --epochs or --iterations"):
        tuning_experiment.train_and_measure(
            "gridtd", 0, "SCST", SimpleNamespace(epochs=4, iterations=10)
        )
    monkeypatch.setattr(sys, "argv", ["tuning_experiment.py", "--table"])
    tuning_experiment.main()
    assert "chosen on val: 1e-5" in capsys.readouterr().out and (done / "table.md").exists()
