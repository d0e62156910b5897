"""docs/tour.ipynb: its cells run one after another, and its outputs are small."""

import ast
import json
from pathlib import Path

import pytest

from captioner import METHODS

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs" / "tour.ipynb"


@pytest.fixture
def methods():
    """METHODS, which the notebook adds to, as they were."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def shown(cell, names):
    """Run a cell; returns the value of its last line, as a notebook shows it, or None."""
    tree = ast.parse("".join(cell["source"]))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(TOUR), "exec"), names)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), str(TOUR), "eval"), names)


def test_the_tour_runs(monkeypatch, methods, capsys):
    monkeypatch.chdir(ROOT / "docs")
    cells = json.loads(TOUR.read_text())["cells"]
    names = {}
    values = [shown(cell, names) for cell in cells if cell["cell_type"] == "code"]
    pictures = [value for value in values if hasattr(value, "_repr_png_")]
    assert len(pictures) == 4
    assert all(picture._repr_png_().startswith(b"\x89PNG") for picture in pictures)
    assert "positive_gradient" in methods
    assert "camera" in capsys.readouterr().out


def test_the_tours_outputs_are_small_and_there():
    assert TOUR.stat().st_size < 400_000
    cells = json.loads(TOUR.read_text())["cells"]
    pictures = 0
    for cell in cells:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error"
            pictures += "image/png" in output.get("data", {})
    assert pictures == 4
