"""The experiment's table, from results written by hand."""

import json

import pytest
from fixtures import command

import tuning_experiment
from commandline import UserError
from tuning_experiment import METRICS, RATES, Length, Training, spread, table, training_flags

LENGTH = Length(epochs=4, iterations=150)


def write(model, seed, setting, value, rate=None):
    metrics = {part: dict.fromkeys(METRICS, value) for part in ("val", "habit", "chance")}
    result = {"length": {"epochs": 4, "iterations": 150}, "metrics": metrics}
    Training(model, seed, setting, rate).result.write_text(json.dumps(result))


@pytest.fixture
def done(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning_experiment, "FOLDER", tmp_path)
    for rate, value in zip(RATES, (0.1, 0.3, 0.2)):
        write("gridtd", 0, "LRP-inference", value, rate)
    for seed, (plain, tuned) in enumerate(((0.5, 0.6), (0.3, 0.5))):
        write("gridtd", seed, "continued cross-entropy", plain, RATES[1])
        write("gridtd", seed, "SCST", tuned)
        write("gridtd", seed, "LRP-inference, image", tuned, RATES[1])
        write("gridtd", seed, "continued cross-entropy, one caption", 0.4, RATES[1])
    return tmp_path


def test_the_rate_is_chosen_on_val(done):
    assert tuning_experiment.chosen_rate() == RATES[1]


def row_of(rows, setting):
    """The number of the first row of a setting."""
    return next(number for number, row in enumerate(rows) if f"| {setting} |" in row)


def test_means_spreads_and_paired_differences(done):
    rows = table(3).splitlines()
    scst = row_of(rows, "SCST")
    assert "| gridtd | SCST | 2 | 0.550 ± 0.071 |" in rows[scst]
    assert rows[scst + 1].startswith("| | *difference* | 2 | 0.150 ± 0.071 |")
    # 0.6 and 0.5 against 0.4 of one caption
    image = row_of(rows, "LRP-inference, image")
    assert "| *difference* | 2 | 0.150 ± 0.071 |" in rows[image + 1]
    # of LRP-inference, its image form and SCST, on both test sets
    assert sum("difference" in row for row in rows) == 2 * 3
    assert any("| LRP-inference | 1 | 0.300 |" in row for row in rows)
    assert not any("aoa" in row for row in rows)
    assert spread([1.0]) == "1.000"


def test_what_is_done_is_not_done_again(done, monkeypatch, capsys):
    def refuse(*arguments, **options):
        pytest.fail(f"{arguments} was run")

    monkeypatch.setattr(tuning_experiment, "call", refuse)
    tuning_experiment.train_and_measure(Training("gridtd", 0, "SCST"), LENGTH)
    with pytest.raises(UserError, match="of other --epochs or --iterations"):
        tuning_experiment.train_and_measure(Training("gridtd", 0, "SCST"), Length(4, 10))
    command(monkeypatch, tuning_experiment, "--table")
    tuning_experiment.main()
    assert "chosen on val: 1e-5" in capsys.readouterr().out
    assert (done / "table.md").exists()


def test_a_training_is_called_as_its_setting_says(done):
    training = Training("aoa", 1, "LRP-inference, image", "1e-5")
    assert training.name == "aoa-1-LRP-inference-image-1e-5"
    flags = " ".join(map(str, training_flags(training, LENGTH)))
    assert "--model_type aoa --seed 1 --workers 0" in flags
    assert "--lrp_tune --lrp_form image --captions_per_image 1" in flags
    start = f"--resume {done}/aoa-1-cross-entropy.pt"
    assert f"{start} --max_iterations 150 --decoder_lr 1e-5" in flags
    (done / f"{training.name}.last.pt").touch()
    flags = training_flags(training, LENGTH)
    assert flags[-2:] == ["--resume", done / f"{training.name}.last.pt"]


def test_trainings_go_from_cross_entropy_to_the_rest(done, monkeypatch):
    run = []
    monkeypatch.setattr(tuning_experiment, "prepare", lambda: None)
    monkeypatch.setattr(
        tuning_experiment, "train_and_measure", lambda training, length: run.append(training.name)
    )
    tuning_experiment.run_missing(["aoa"], ["SCST", "LRP-SCST"], 1, 1, LENGTH)
    assert run[0] == "gridtd-0-cross-entropy"
    assert len(run[1:7]) == len({name for name in run[1:7] if name.startswith("gridtd-0-")})
    assert run[7:] == [
        "aoa-0-cross-entropy",
        "aoa-0-continued-cross-entropy-1e-5",
        "aoa-0-LRP-inference-1e-5",
        "aoa-0-continued-cross-entropy-one-caption-1e-5",
        "aoa-0-LRP-inference-image-1e-5",
    ]


def test_no_number_of_flags_is_below_one(monkeypatch):
    command(monkeypatch, tuning_experiment, "--seeds", 0)
    with pytest.raises(UserError, match="--seeds must be at least 1, not 0"):
        tuning_experiment.main()
