"""The house: imports point down its floors, functions are short, parsed flags stay in commands."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up. A module imports only from floors below its own, or from its own floor.
FLOORS = [
    ["lateimports", "names"],
    ["commandline", "distributed"],
    ["decodingflags", "prepared"],
    ["vocabulary", "images", "featurecache"],
    ["captiondata"],
    ["pycocoevalcap", "bert"],
    ["readers", "scenes", "redrawing", "questions"],
    ["encoder", "lrp_utils", "gradient_utils", "perturbation_utils", "relevancy_utils"],
    ["plots", "page", "explanationfiles", "gatedconv", "holes", "inpainting", "contrastive"],
    ["decoding", "explanation"],
    ["basemodel", "transformermethods"],
    ["gridTDmodel", "aoamodel", "softattentionmodel", "pretrainedmodel", "clipmappermodel"],
    ["captioner"],
    ["captionmetrics", "objectives", "importance"],
    ["experiments", "trainer", "epochtraining"],
    ["preparedataset", "evaluation", "explain", "counterfactual", "perturbation"],
    ["train", "train_inpainter", "train_clip", "train_clipmapper"],
    ["tuning_experiment", "study", "bench"],
]
LONGEST_FUNCTION = 40  # lines


def source_files():
    """Every Python file of the project but the tests."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if parts[0] not in ("tests", ".venv") and not parts[0].startswith("."):
            found.append(path)
    return found


def floor_of(module):
    """The number of a module's floor, or None if it is not the project's."""
    top = module.split(".")[0]
    for number, modules in enumerate(FLOORS):
        if top in modules:
            return number
    return None


def imported_modules(tree):
    """The names of all modules that a file imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    module = path.relative_to(ROOT).with_suffix("").parts[0]
    own = floor_of(module)
    assert own is not None, f"{module} has no floor yet: give it one"
    for name in imported_modules(ast.parse(path.read_text())):
        floor = floor_of(name)
        assert floor is None or floor <= own, f"{module} imports {name} from above"


def test_a_floor_has_no_circle():
    """Modules of one floor may import one another, but not in a circle."""
    imports = {}
    for path in source_files():
        module = path.relative_to(ROOT).with_suffix("").parts[0]
        known = {name.split(".")[0] for name in imported_modules(ast.parse(path.read_text()))}
        imports.setdefault(module, set()).update(known - {module})

    def reaches(module, goal, seen):
        for name in imports.get(module, ()):
            if name == goal:
                return True
            if name not in seen and reaches(name, goal, seen | {name}):
                return True
        return False

    assert [module for module in imports if reaches(module, module, set())] == []


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
    too_long = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                too_long.append(f"{node.name}: {lines} lines")
    assert not too_long


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_parsed_flags_stay_in_the_commands(path):
    """`args` is what main and the parsing helpers of a command have; nothing else takes it."""
    module = path.relative_to(ROOT).with_suffix("").parts[0]
    commands = {"preparedataset", "train", "evaluation", "explain", "counterfactual"}
    commands |= {"train_inpainter", "train_clip", "train_clipmapper", "perturbation"}
    commands |= {"tuning_experiment", "study", "bench"}
    # The last two turn parsed flags into plain values for the commands.
    if module in commands or module in ("commandline", "decodingflags"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
            names = [argument.arg for argument in node.args.args]
            assert "args" not in names, f"{node.name} takes args"
