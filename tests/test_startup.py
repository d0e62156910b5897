"""Starting: --help and a wrong flag wait for no import that takes long, and the names that flags
offer are those of the tables."""

import subprocess
import sys

import pytest
from test_house import ROOT

import lateimports
import names
from captioner import METHODS, MODELS
from captionmetrics import FREQUENT_OBJECT_WORDS, METRICS
from clipmappermodel import TASKS
from decoding import DECODERS, STRIP
from encoder import ENCODERS
from experiments import EXPERIMENTS
from importance import DISTANCES
from inpainting import INPAINTERS
from objectives import LRP_CONTROLS
from pretrainedmodel import METHODS as PRETRAINED_METHODS
from readers import SOURCES

COMMANDS = "preparedataset train evaluation explain counterfactual".split()
COMMANDS += "perturbation train_inpainter train_clip train_clipmapper".split()
COMMANDS += "bench study tuning_experiment".split()
SLOW = {"torch", "cv2", "torchvision", "timm", "scipy", "sklearn", "matplotlib", "nltk", "h5py"}
TABLES = {
    "METHODS": METHODS,
    "PRETRAINED_METHODS": PRETRAINED_METHODS,
    "CLIPMAPPER_TASKS": TASKS,
    "MODELS": MODELS,
    "ENCODERS": ENCODERS,
    "DECODERS": DECODERS,
    "STRIP": STRIP,
    "LRP_CONTROLS": LRP_CONTROLS,
    "METRICS": METRICS,
    "FREQUENT_OBJECT_WORDS": FREQUENT_OBJECT_WORDS,
    "EXPERIMENTS": EXPERIMENTS,
    "INPAINTERS": INPAINTERS,
    "DISTANCES": DISTANCES,
    "SOURCES": SOURCES,
    "OWN_SOURCES": [name for name, source in SOURCES.items() if source.own],
}


@pytest.mark.parametrize("name", TABLES)
def test_the_names_of_flags_are_those_of_the_tables(name):
    assert getattr(names, name) == tuple(TABLES[name])


def packages_imported_by(*arguments):
    """The exit code, the last line that is no report of an import, and the imported packages."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    imported = set()
    said = done.stdout.splitlines()
    for line in done.stderr.splitlines():
        if line.startswith("import time:"):
            imported.add(line.rpartition("|")[2].strip().split(".")[0])
        else:
            said.append(line)
    return done.returncode, said[-1], imported


@pytest.mark.parametrize("command", COMMANDS)
def test_help_waits_for_no_slow_import(command):
    code, _, imported = packages_imported_by(f"{command}.py", "--help")
    assert code == 0
    assert "argparse" in imported
    assert imported & SLOW == set()


@pytest.mark.parametrize("command", ["explain", "train_clip"])
def test_a_python_without_the_packages_is_told_what_to_do(command):
    arguments = "photo.jpg" if command == "explain" else "--dataset scenes"
    done = subprocess.run(
        [sys.executable, "-S", f"{command}.py", *arguments.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "is not installed for this Python; call `make` once and then" in line


WRONG = {
    "preparedataset": "--batch_size 0",
    "train": "--samples 3",
    "evaluation": "--methods lrp",
    "explain": "photo.jpg --target cat",
    "counterfactual": "photo.jpg",
    "train_inpainter": "--width 5",
    "perturbation": "--items 3",
    "train_clip": "--heads 7",
    "train_clipmapper": "--heads 7",
    "bench": "all --repeats 0",
    "study": "--explain",
    "tuning_experiment": "--no_such_flag",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_waits_for_no_slow_import(command):
    code, line, imported = packages_imported_by(f"{command}.py", *WRONG[command].split())
    assert code == 2
    assert line.startswith(f"{command}.py: error: ")
    assert imported & SLOW == set()


LATE = """
with after_parsing(globals()):
    import colorsys
    from wave import open as open_wave
    from xml import sax
"""


def run_as(name):
    """The namespace of a module of this name that holds LATE."""
    namespace = {"__name__": name, "after_parsing": lateimports.after_parsing}
    exec(LATE, namespace)
    return namespace


def test_an_imported_module_imports_at_once():
    import colorsys

    assert run_as("explain")["colorsys"] is colorsys


@pytest.mark.parametrize("program", ["explain.py", "lrp-explain"])
def test_a_command_imports_after_parsing(monkeypatch, program):
    import colorsys
    import wave
    from xml import sax

    monkeypatch.setattr(sys, "argv", [f"/somewhere/{program}"])
    namespace = run_as("__main__" if program == "explain.py" else "explain")
    waiting = [namespace[name] for name in ("colorsys", "open_wave", "sax")]
    assert {type(value) for value in waiting} == {lateimports.StandIn}
    lateimports.import_what_waits()
    assert namespace["colorsys"] is colorsys
    assert namespace["open_wave"] is wave.open
    assert namespace["sax"] is sax


def test_a_stand_in_that_is_called_does_what_it_stands_for():
    namespace = run_as("__main__")
    assert namespace["colorsys"].rgb_to_hsv(1, 0, 0) == (0, 1, 1)
    assert not isinstance(namespace["sax"], lateimports.StandIn)


def test_a_failed_block_leaves_pythons_imports_as_they_were():
    before = __import__
    with pytest.raises(ZeroDivisionError), lateimports.after_parsing({"__name__": "__main__"}):
        raise ZeroDivisionError
    assert __import__ is before
