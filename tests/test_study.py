"""The runner of the replication: a tiny study that is killed and goes on, and what it keeps."""

import functools
import json

import numpy as np
import pytest
from fixtures import command, prepared_scenes
from helpers import unpadded

import study
from captiondata import cache_features
from captionmetrics import frequent_words
from commandline import UserError
from encoder import build_encoder
from experiments.captionscores import chair_s_of
from experiments.inference import ratio
from study import Plan, Training, Unit
from trainer import Trainer

ARMS = ["continued", "lrp", "random"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = prepared_scenes(tmp_path_factory.mktemp("data") / "scenes-tiny", 60, 2, 2)
    cache_features(folder, build_encoder("scenes_vgg", "random"), workers=0)
    return folder


@pytest.fixture
def small(folder, tmp_path, monkeypatch):
    """Call study.py on the tiny dataset, with its results and checkpoints in tmp_path."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "WORK", tmp_path / "work")
    monkeypatch.setattr(study, "RATES", ("1e-3",))
    monkeypatch.setattr(study, "frequent_words", functools.partial(frequent_words, least=5))

    def call(*flags):
        small = ["--epochs", 1, "--iterations", 1, "--arms", *ARMS, "--device", "cpu"]
        command(monkeypatch, study, "--prepared", folder, *small, *flags)
        study.main()

    return call


def killed_in(name, monkeypatch):
    """Interrupt the training of this name in its only step."""
    step = Trainer.train_step

    def killed(self, *batch):
        if self.output.stem == name:
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", killed)
    return step


def test_a_killed_unit_goes_on_and_final_is_captioned_only_when_asked(
    small, tmp_path, monkeypatch, capsys
):
    step = killed_in("lrp@1e-3", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        small("--units", "gridtd-0")
    work = tmp_path / "work" / "scenes-tiny-gridtd-0"
    first = (work / "cross_entropy.pt").stat().st_mtime_ns
    assert not (tmp_path / "results").exists()  # a unit is written when it is finished
    monkeypatch.setattr(Trainer, "train_step", step)
    small("--units", "gridtd-0")
    assert (work / "cross_entropy.pt").stat().st_mtime_ns == first
    assert not list(work.glob("*.last.pt"))
    path = tmp_path / "results" / "scenes-tiny-gridtd-0.json"
    result = json.loads(path.read_text())
    assert result["captions"].keys() == {"dev"}
    expected = ["cross_entropy", *(f"{arm}@1e-3" for arm in ARMS)]
    assert sorted(result["runs"]) == sorted(expected)
    own = study.records_of(result, "lrp@1e-3", "dev")
    assert len(own) == 2
    value = result["runs"]["lrp@1e-3"]["metrics"]["dev"]["CHAIR-s"]
    assert value == pytest.approx(ratio(chair_s_of(own).sum(axis=0)))

    small("--units", "gridtd-0", "--final", "--explain")
    result = json.loads(path.read_text())
    assert all(run["metrics"].keys() == {"dev"} for run in result["runs"].values())
    for name in expected:
        assert len(study.records_of(result, name)) == 2
    explained = path.with_name("scenes-tiny-gridtd-0-explanations.json")
    images = json.loads(explained.read_text())["images"]
    assert len(images) == 2
    assert any(image["frequent"] for image in images)

    capsys.readouterr()
    small("--report", "--list")
    small("--report")
    printed = unpadded(capsys.readouterr().out)
    assert "gridtd-0: 4 runs finished; final captioned, explained" in printed
    assert "gridtd-1: done: nothing; missing: cross_entropy, " in printed
    assert "adaptive-1: run unit adaptive-0 first" in printed
    assert "| H8 | the adaptive captioner gains more than grid-TD | | | not tested |" in printed
    assert (tmp_path / "results" / "scenes-tiny-report.md").exists()


def test_units_are_called_by_captioner_and_seed():
    assert Unit.named("gridtd-12") == Unit("gridtd", 12)
    for text in ("gridtd", "gridtd-x", "other-1", "-1", "gridtd--1"):
        with pytest.raises(UserError, match="is no unit"):
            Unit.named(text)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A plan whose unit gridtd-0 has dev scores."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "WORK", tmp_path / "work")
    plan = Plan(tmp_path / "data", False, ["continued", "lrp", "scst"])
    runs = {"cross_entropy": {}}
    for arm, scores in {"continued": (3, 5, 4), "lrp": (8, 7, 8)}.items():
        for rate, score in zip(study.RATES, scores):
            metrics = {"dev": {study.CRITERION: score}}
            runs[f"{arm}@{rate}"] = {"arm": arm, "rate": rate, "metrics": metrics}
    runs["scst@1e-4"] = {"arm": "scst", "rate": "1e-4", "metrics": {"dev": {study.CRITERION: 99}}}
    plan.result(Unit("gridtd", 0)).parent.mkdir()
    plan.result(Unit("gridtd", 0)).write_text(json.dumps({"runs": runs}))
    return plan


def test_all_arms_have_one_rate_and_the_papers_is_always_run(plan):
    for arm in ("continued", "lrp"):
        assert study.chosen_rate(arm, "gridtd", plan) == "1e-5"  # the lower one of equals
    names = [training.name for training in study.trainings_of(Unit("gridtd", 1), plan)]
    tuned = ["continued@1e-6", "continued@1e-5", "lrp@1e-6", "lrp@1e-5"]
    assert names == ["cross_entropy", *tuned, "scst@1e-4"]
    first = [training.name for training in study.trainings_of(Unit("gridtd", 0), plan)]
    assert first[1:4] == [f"continued@{rate}" for rate in study.RATES]
    with pytest.raises(UserError, match="run unit aoa-0 first"):
        study.trainings_of(Unit("aoa", 1), plan)


def test_the_compared_runs_are_those_of_the_chosen_rates(plan):
    assert study.compared_runs(Unit("gridtd", 0), plan) == {
        "cross_entropy": "cross_entropy",
        "continued": "continued@1e-5",
        "continued 1e-6": "continued@1e-6",
        "lrp": "lrp@1e-5",
        "lrp 1e-6": "lrp@1e-6",
        "scst": "scst@1e-4",
    }


def test_the_first_explained_unit_of_a_captioner_is_taken(plan):
    assert study.read_explanations(plan, 3) == {}
    for seed in (2, 1):
        images = [{"drops": [seed]}]
        plan.explained(Unit("aoa", seed)).write_text(json.dumps({"images": images}))
    assert study.read_explanations(plan, 3) == {"aoa": [{"drops": [1]}]}
    assert study.read_explanations(plan, 1) == {}


def test_a_unit_without_its_checkpoints_or_of_other_settings_is_refused(plan):
    unit = Unit("gridtd", 0)
    with pytest.raises(UserError, match="is finished, but its checkpoints are not in"):
        study.run_unit(unit, plan)
    plan.work(unit).mkdir(parents=True)
    (plan.work(unit) / "cross_entropy.json").write_text('{"flags": "--epochs 1"}')
    with pytest.raises(UserError, match="is of other settings; delete it"):
        study.run_unit(unit, plan)


def test_a_training_goes_on_from_cross_entropy_with_the_flags_of_its_arm(plan):
    unit = Unit("gridtd", 1)
    flags = " ".join(study.training_flags(Training("lrp", "1e-5"), unit, plan))
    assert "--preset flickr8k --no-augment" in flags
    assert "--lrp_tune --decoder_lr 1e-5 --max_iterations 320" in flags
    assert flags.endswith("cross_entropy.pt")
    flags = " ".join(study.settings_of(Training("scst", "1e-4"), unit, plan))
    assert "--cider_tune --decoder_lr 1e-4 --max_iterations 900" in flags
    assert "--scst_baseline others --batch_size 20" in flags
    assert "/" not in flags  # it goes into the results, which are no place for paths
    training = Training("cross_entropy")
    assert "--epochs 8" in " ".join(study.settings_of(training, unit, plan))
    last = study.last_checkpoint(training, unit, plan)
    last.parent.mkdir(parents=True)
    last.touch()
    assert study.training_flags(training, unit, plan)[-2:] == ["--resume", str(last)]


def test_equal_captions_are_kept_once():
    pool = []
    assert study.put_into(pool, [{"caption": "a"}, {"caption": "b"}]) == [0, 0]
    assert study.put_into(pool, [{"caption": "c"}, {"caption": "b"}]) == [1, 0]
    result = {"captions": {"final": pool}, "runs": {"it": {"captions": {"final": [1, 0]}}}}
    assert study.records_of(result, "it") == [{"caption": "c"}, {"caption": "b"}]
    assert np.array_equal([len(known) for known in pool], [2, 1])
