"""The command that explains: its files, its figures, and what it says of a user's mistake."""

import io
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from fixtures import command, refused
from helpers import random_captioner
from PIL import Image

import evaluation
import explain as explain_script
from captioner import METHODS
from commandline import UserError, file_hash, run
from explain import progress_bar
from explanationfiles import mark_of, output_names
from plots import explanation_figure

ROOT = Path(__file__).resolve().parent.parent
OWN = ["--checkpoint", "it.pt", "--device", "cpu"]
ENDINGS = ("png", "npz", "json")
GRIDTD_METHODS = [name for name in METHODS if name != "attnlrp"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    random_captioner().float().save(folder / "it.pt")
    random_captioner(model_type="aoa").float().save(folder / "aoa.pt")
    pixels = np.random.default_rng(0xCAFE).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    Image.fromarray(pixels).save(folder / "copy.png")
    (folder / "empty").mkdir()
    (folder / "broken.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:900])
    return folder


def explain(workplace, monkeypatch, *arguments):
    """Run the command in the workplace."""
    monkeypatch.chdir(workplace)
    command(monkeypatch, explain_script, *arguments)
    explain_script.main()


def files_of(names):
    """The names of the three files of each explanation, and of the image's page."""
    files = set()
    for name in names:
        files.update(f"{name}.{ending}" for ending in ENDINGS)
        image, _ = name.rsplit("-", 1)
        files.add(f"{image}.html")
    return files


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_it_writes_figure_maps_and_numbers(workplace):
    line = [sys.executable, ROOT / "explain.py", "photo.jpg", *OWN]
    line += ["--caption", "w1 w2 w3", "--output", "out"]
    done = subprocess.run(line, cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stem = "out/photo-it-w1_w2_w3-lrp"
    assert f"{stem}.png" in done.stdout
    assert Image.open(workplace / f"{stem}.png").size[0] > 500
    numbers = json.loads((workplace / f"{stem}.json").read_text())
    maps = np.load(workplace / f"{stem}.npz")
    assert numbers["words"] == ["w1", "w2", "w3"] == maps["words"].tolist()
    about = {
        "checkpoint": "it.pt",
        "checkpoint_sha256": file_hash(workplace / "it.pt"),
        "model_type": "gridtd",
        "encoder": "scenes_vgg",
        "image": "photo.jpg",
        "caption": "w1 w2 w3",
        "method": "lrp",
    }
    assert {name: numbers[name] for name in about} == about
    assert {name: maps[name].item() for name in about} == about
    assert maps["image_relevance"].shape == (3, 128, 128)
    np.testing.assert_allclose(numbers["word_relevance"], maps["word_relevance"], rtol=1e-6)
    assert not [name for name in names_in(workplace / "out") if name.startswith(".")]


def test_an_image_of_which_the_captioner_says_nothing_does_not_stop_the_others(
    workplace, monkeypatch, capsys
):
    captioner = random_captioner().float()
    Image.new("RGB", (64, 64), "red").save(workplace / "red.jpg")
    monkeypatch.setattr(captioner, "caption", lambda pixels, **options: [[], ["w1", "w2"]])
    monkeypatch.setattr(explain_script, "load_captioner", lambda path, device: captioner)
    explain(workplace, monkeypatch, "photo.jpg", "red.jpg", *OWN, "--output", "told")
    assert "photo.jpg: the captioner says nothing of it" in capsys.readouterr().out
    assert names_in(workplace / "told") == files_of(["red-it-lrp"])


def test_nothing_is_written_if_the_captioner_says_nothing_at_all(workplace, monkeypatch, capsys):
    captioner = random_captioner().float()
    monkeypatch.setattr(captioner, "caption", lambda pixels, **options: [[]])
    monkeypatch.setattr(explain_script, "load_captioner", lambda path, device: captioner)
    explain(workplace, monkeypatch, "photo.jpg", *OWN, "--output", "silent")
    assert "photo.jpg: the captioner says nothing of it" in capsys.readouterr().out
    assert not (workplace / "silent").exists()


def test_several_methods_stand_side_by_side(workplace, monkeypatch):
    arguments = ["photo.jpg", *OWN, "--caption", "w1", "--method", *GRIDTD_METHODS]
    explain(workplace, monkeypatch, *arguments, "--output", "several")
    expected = files_of([f"photo-it-w1-{method}" for method in GRIDTD_METHODS])
    assert names_in(workplace / "several") == expected | {"photo-it-w1-methods.png"}


@pytest.mark.parametrize("ending, sign", [("png", b"PNG"), ("pdf", b"%PDF"), ("svg", b"<svg")])
def test_a_figure_of_words_and_methods_has_its_own_file(workplace, monkeypatch, ending, sign):
    line = ["photo.jpg", *OWN, "--caption", "w1 w2 w3", "--words", "w3", "--method", "lrp"]
    line += ["--figure", f"paper/figure.{ending}", "--output", "paper"]
    explain(workplace, monkeypatch, *line)
    written = (workplace / f"paper/figure.{ending}").read_bytes()
    assert sign in written
    if ending == "svg":
        text = written.decode()
        assert ">w3</text>" in text and ">w2</text>" not in text and ">lrp</text>" in text
        assert ">w1 w2 w3</text>" in text
    if ending == "pdf":
        assert b"/FontFile2" in written or b"/TrueType" in written
    assert not [name for name in names_in(workplace / "paper") if name.startswith(".")]


def test_through_attention_is_the_method_attnlrp_under_the_name_lrp(workplace, monkeypatch):
    arguments = ["photo.jpg", *OWN, "--checkpoint", "aoa.pt", "--caption", "w1 w2"]
    explain(workplace, monkeypatch, *arguments, "--through_attention", "--output", "through")
    explain(workplace, monkeypatch, *arguments, "--method", "lrp", "attnlrp", "--output", "both")
    stem = "photo-aoa-w1_w2"
    assert names_in(workplace / "through") == files_of([f"{stem}-lrp"])
    found = np.load(workplace / f"through/{stem}-lrp.npz")["image_relevance"]
    attnlrp = np.load(workplace / f"both/{stem}-attnlrp.npz")["image_relevance"]
    lrp = np.load(workplace / f"both/{stem}-lrp.npz")["image_relevance"]
    assert (found == attnlrp).all()
    assert (found != lrp).any()


def test_a_name_with_dots_stays_whole(workplace, monkeypatch):
    for name in ("a.1.jpg", "a.2.jpg"):
        (workplace / name).write_bytes((workplace / "photo.jpg").read_bytes())
    arguments = ["a.1.jpg", "a.2.jpg", *OWN, "--caption", "w1", "--output", "dots"]
    explain(workplace, monkeypatch, *arguments)
    assert names_in(workplace / "dots") == files_of(["a.1-it-w1-lrp", "a.2-it-w1-lrp"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.jpg"], "there is no image missing.jpg"),
        (["broken.jpg"], "broken.jpg cannot be read as an image"),
        (["nothing-*.jpg"], "there is no image nothing-*.jpg"),
        (["empty"], "there is no image in empty"),
        (["x-y/z.jpg", "x/y/z.jpg"], "would have the same name"),
        (["photo.jpg", "--checkpoint", "photo.jpg"], "photo.jpg is not a checkpoint"),
        (["photo.jpg", "--caption", "a zebra"], "vocabulary"),
        (["photo.jpg", "--words", "w1", "zebra"], "the word 'zebra' is not in this captioner's"),
        (["photo.jpg", "--words", "?"], "--words gives no word"),
        (["photo.jpg", "--caption", "w1", "--words", "w2"], "--caption has no word 'w2'"),
        (["photo.jpg", "--caption", ""], "empty caption"),
        (["photo.jpg", "--caption", "w1", "--beam_size", "2"], "--caption gives another"),
        (
            ["photo.jpg", "--method", "gradcam", "--through_attention"],
            "--through_attention goes with --method lrp",
        ),
        (["photo.jpg", "--method", "attnlrp"], "only LRP of the multi-head captioner"),
        (["photo.jpg", "--through_attention"], "only LRP of the multi-head captioner"),
        (
            ["photo.jpg", "--figure", "figure.doc"],
            "--figure 'figure.doc' is not the name of a file",
        ),
        (["photo.jpg", "--figure", "figure"], "that ends in .png, .pdf, .svg"),
        (["photo.jpg", "a.png", "--figure", "f.pdf"], "--figure is for one image"),
        (["copy.png", "--figure", "./copy.png"], "--figure 'copy.png' would overwrite the image"),
        (["photo.jpg", "--figure", "it.pt/f.pdf"], "it.pt is not a folder"),
        (["photo.jpg", "--device", "meta"], "cannot be used on this machine"),
    ],
)
def test_mistakes_are_one_line_exit_code_2_and_nothing_written(
    workplace, arguments, message, monkeypatch, capsys
):
    monkeypatch.chdir(workplace)
    line = [*OWN, *arguments, "--output", "nothing"]
    assert message in refused(explain_script, line, monkeypatch, capsys)
    assert not (workplace / "nothing").exists()


@pytest.fixture
def refused_output(workplace, monkeypatch, capsys):
    """A function: what is said of a value of --output, before a captioner is loaded."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(explain_script, "load_captioner", None)  # a call would fail
    return lambda output: refused(
        explain_script, ["photo.jpg", "--output", output], monkeypatch, capsys
    )


@pytest.mark.parametrize("output", ["figure.pdf", "a/figure.PNG", "", "photo.jpg", "it.pt"])
def test_an_output_that_is_no_folder_is_refused(refused_output, output):
    assert refused_output(output).startswith(f"--output '{output}' is not the name of a folder")


def test_an_output_that_cannot_be_written_is_told_at_once(refused_output, monkeypatch):
    assert "it.pt is not a folder" in refused_output("it.pt/deep/figures")

    def full(dir):
        raise OSError(30, "Read-only file system", dir)

    monkeypatch.setattr("commandline.tempfile.TemporaryDirectory", full)
    message = "nothing can be written into new/figures (Read-only file system)"
    assert refused_output("new/figures") == message


def test_folders_patterns_and_files_are_explained_together(workplace, monkeypatch):
    for name in ("album/b.jpg", "album/a.png", "album/note.txt", "more/c.jpg", "more/d.jpg"):
        (workplace / name).parent.mkdir(exist_ok=True)
        (workplace / name).write_bytes((workplace / "photo.jpg").read_bytes())
    arguments = ["album", "more/*.jpg", "more/c.jpg", "./photo.jpg", *OWN, "--caption", "w1"]
    explain(workplace, monkeypatch, *arguments, "--output", "all")
    stems = ("a", "b", "c", "d", "photo")
    assert names_in(workplace / "all") == files_of([f"{stem}-it-w1-lrp" for stem in stems])


def test_what_cannot_be_read_does_not_stop_the_others(workplace, monkeypatch, capsys):
    monkeypatch.setattr(explain_script, "EXPLAINED_AT_ONCE", 2)
    monkeypatch.chdir(workplace)
    names = ["missing.jpg", "broken.jpg", "photo.jpg", "empty", "a.1.jpg"]
    (workplace / "a.1.jpg").write_bytes((workplace / "photo.jpg").read_bytes())
    command(monkeypatch, explain_script, *names, *OWN, "--caption", "w1", "--output", "rest")
    with pytest.raises(SystemExit) as caught:
        run(explain_script.main)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("there is no image in empty")
    assert lines[1].startswith("broken.jpg cannot be read")
    assert lines[2] == "there is no image missing.jpg"
    assert lines[3].startswith("explain.py: error: 2 of 5 images were explained")
    assert names_in(workplace / "rest") == files_of(["photo-it-w1-lrp", "a.1-it-w1-lrp"])


def test_checkpoints_and_captions_have_files_of_their_own(workplace, monkeypatch):
    arguments = ["--checkpoint", "it.pt", "aoa.pt", "photo.jpg", "--device", "cpu"]
    for caption in ("w1 w2", "W2, w1!"):
        explain(workplace, monkeypatch, *arguments, "--caption", caption, "--output", "own")
    stems = ("photo-it-w1_w2", "photo-it-w2_w1", "photo-aoa-w1_w2", "photo-aoa-w2_w1")
    files = {f"{stem}-lrp.{ending}" for stem in stems for ending in ENDINGS}
    pages = {"photo-it-aoa-w1_w2.html", "photo-it-aoa-w2_w1.html"}
    assert names_in(workplace / "own") == files | pages
    page = (workplace / "own/photo-it-aoa-w1_w2.html").read_text()
    assert '"name":"lrp, it"' in page and '"name":"lrp, aoa"' in page
    ours = np.load(workplace / "own/photo-it-w1_w2-lrp.npz")
    others = np.load(workplace / "own/photo-aoa-w1_w2-lrp.npz")
    assert (ours["scores"] != others["scores"]).all()


def test_the_default_checkpoint_has_no_place_in_the_names(workplace, monkeypatch):
    monkeypatch.setattr(explain_script, "DEFAULT_CHECKPOINT", str(workplace / "it.pt"))
    monkeypatch.setattr(
        "basemodel.Captioner.caption", lambda captioner, images, **options: [["w1", "w2"]]
    )
    explain(workplace, monkeypatch, "photo.jpg", *OWN, "--output", "default")
    assert names_in(workplace / "default") == files_of(["photo-lrp"])


def test_a_word_that_was_not_said_is_explained_as_if_it_were(workplace, monkeypatch, capsys):
    caption = ["photo.jpg", *OWN, "--output", "target", "--caption"]
    explain(workplace, monkeypatch, *caption, "w1 w2 w3", "--target", "W5", "--position", "2")
    explain(workplace, monkeypatch, *caption, "w1 w5")
    found = np.load(workplace / "target/photo-it-w1_w2_w3-w5_at_2-lrp.npz")
    expected = np.load(workplace / "target/photo-it-w1_w5-lrp.npz")
    assert found["words"].tolist() == ["w1", "w5"]
    for name in ("scores", "image_relevance", "word_relevance"):
        assert (found[name] == expected[name]).all()
    wide = Image.open(workplace / "target/photo-it-w1_w5-lrp.png").size
    narrow = Image.open(workplace / "target/photo-it-w1_w2_w3-w5_at_2-lrp.png").size
    assert narrow[0] < wide[0]  # only the target is drawn
    assert "photo.jpg: w1 (w5) instead of w2" in capsys.readouterr().out
    assert found["instead_of"] == "w2"
    assert "instead_of" not in expected
    facts = json.loads((workplace / "target/photo-it-w1_w2_w3-w5_at_2-lrp.json").read_text())
    assert facts["instead_of"] == "w2"


def test_the_figures_of_a_target_say_which_word_it_replaces(workplace, monkeypatch):
    figure = workplace / "instead.svg"
    arguments = ["photo.jpg", *OWN, "--output", "instead", "--figure", figure]
    arguments += ["--caption", "w1 w2", "--target", "w5", "--position", "2"]
    explain(workplace, monkeypatch, *arguments)
    texts = re.findall("<text[^>]*>([^<]*)<", figure.read_text())
    assert "w1 (w5) instead of w2" in " ".join(texts)  # in as many lines as it needs


def test_a_caption_without_a_word_at_the_position_of_a_target_is_told(
    workplace, monkeypatch, capsys
):
    target = ["photo.jpg", *OWN, "--output", "short", "--target", "w5", "--position"]
    with pytest.raises(
        UserError, match="--caption ends with word 1, so it has no word --position 2"
    ):
        explain(workplace, monkeypatch, *target, "2", "--caption", "w1")
    explain(workplace, monkeypatch, *target, "99")
    assert "so it has no word 99" in capsys.readouterr().out
    assert not (workplace / "short").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--target", "w1"], "--target and --position go together"),
        (["--position", "1"], "--target and --position go together"),
        (["--target", "w1 w2", "--position", "1"], "--target 'w1 w2' is not one word"),
        (["--target", "cat", "--position", "1"], "the word 'cat' is not in this captioner's"),
        (["--target", "w1", "--position", "0"], "--position"),
        (["--target", "w1", "--position", "1", "--words", "w2"], "--target draws one word"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(workplace, monkeypatch, flags, message):
    with pytest.raises(UserError, match=message):
        explain(workplace, monkeypatch, "photo.jpg", *OWN, *flags)


def test_a_name_that_is_no_utf_8_and_an_unknown_backend_do_no_harm(workplace):
    name = os.fsencode("photo") + b"-\xff.jpg"
    (workplace / os.fsdecode(name)).write_bytes((workplace / "photo.jpg").read_bytes())
    line = [sys.executable, ROOT / "explain.py", name, *OWN, "--caption", "w1", "--output", "odd"]
    surroundings = {**os.environ, "MPLBACKEND": "nonsense", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(line, cwd=workplace, capture_output=True, env=surroundings)
    assert done.returncode == 0, done.stderr
    assert len(list((workplace / "odd").iterdir())) == 4


def test_the_figure_may_fit_a_column(workplace, monkeypatch):
    figure = workplace / "column.svg"
    arguments = ["photo.jpg", *OWN, "--caption", "w1 w2 w3", "--output", "column"]
    arguments += ["--method", "lrp", "gradcam", "--figure", figure]
    explain(workplace, monkeypatch, *arguments, "--figure_width", 85)
    assert f'width="{85 / 25.4 * 72:.1f}' in figure.read_text()
    with pytest.raises(UserError, match="the figure needs 81 mm at least; draw fewer words"):
        explain(workplace, monkeypatch, *arguments, "--figure_width", 60)
    with pytest.raises(UserError, match="--figure_width goes with --figure"):
        explain(workplace, monkeypatch, "photo.jpg", *OWN, "--figure_width", 85)


def test_one_page_may_hold_all_images(workplace, monkeypatch, capsys):
    page = workplace / "gallery" / "all.html"
    arguments = ["photo.jpg", "copy.png", *OWN, "--caption", "w1 w2", "--method", "lrp", "gradcam"]
    explain(workplace, monkeypatch, *arguments, "--output", "gallery", "--html", page)
    assert f"all images in {page}" in capsys.readouterr().out
    text = page.read_text()
    assert [text.count(f'"name":"{name}"') for name in ("photo.jpg", "copy.png")] == [1, 1]
    assert text.count('"name":"gradcam"') == 2
    for name in ("page.txt", "gallery"):
        with pytest.raises(UserError, match=f"--html '{name}' is not the name of a file that ends"):
            explain(workplace, monkeypatch, *arguments, "--html", name)


def test_long_captions_have_short_names_that_differ():
    names = {mark_of(["w1"] * 40), mark_of(["w1"] * 41), mark_of(["w1"] * 41, "only")}
    assert len(names) == 3
    assert max(map(len, names)) < 75


def test_files_of_one_name_get_names_that_differ():
    paths = [Path(path) for path in ("a/dog.jpg", "b/dog.jpg", "dog.png", "dog.jpg", "b/cat.jpg")]
    assert list(output_names(paths).values()) == [
        *("a-dog.jpg", "b-dog.jpg", "dog.png", "dog.jpg", "cat")
    ]
    assert output_names([]) == {}


def test_only_the_words_that_are_wanted_are_drawn(workplace, monkeypatch, capsys):
    captions = [["w1", "w2", "w1"], ["w3"]]
    monkeypatch.setattr(
        "basemodel.Captioner.caption", lambda captioner, images, **options: captions
    )
    drawn = []

    def remembered(image, explanation, positions, scale):
        drawn.append(positions)
        return explanation_figure(image, explanation, positions, scale)

    monkeypatch.setattr(explain_script, "explanation_figure", remembered)
    Image.new("RGB", (64, 64), "red").save(workplace / "red.jpg")
    arguments = ["photo.jpg", "red.jpg", *OWN, "--output", "words", "--words"]
    explain(workplace, monkeypatch, *arguments, "W1")
    assert drawn == [[0, 2]]
    assert "red.jpg: w3\n  not drawn, for it has no word w1" in capsys.readouterr().out
    assert names_in(workplace / "words") == files_of(["photo-it-only_w1-lrp"])
    with pytest.raises(UserError, match="no caption has the word w4"):
        explain(workplace, monkeypatch, *arguments, "w1", "w4")


def test_memory_does_not_grow_with_the_number_of_images(workplace, monkeypatch):
    """No explanation is kept once its files are written."""
    alive = []
    most = []

    def written(stem, photograph, explanations, wanted, about):
        alive.extend(weakref.ref(explanation) for explanation in explanations.values())
        most.append(sum(reference() is not None for reference in alive))
        return []

    monkeypatch.setattr(explain_script, "EXPLAINED_AT_ONCE", 2)
    monkeypatch.setattr(explain_script, "write_explanations", written)
    images = []
    for number in range(9):
        images.append(f"{number}.png")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(workplace / images[-1])
    explain(workplace, monkeypatch, *images, *OWN, "--caption", "w1")
    assert len(most) == 9
    assert max(most) <= 4  # those of a batch, and of the one before it


def test_many_images_have_a_progress_bar_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert progress_bar(500).disable
    terminal.isatty = lambda: True
    assert progress_bar(3).disable
    with progress_bar(500) as bar:
        bar.update(100)
    assert "explaining" in terminal.getvalue() and "500" in terminal.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (20000, 20)])
def test_an_image_of_any_shape_is_explained(workplace, monkeypatch, size):
    Image.new("RGB", size, "blue").save(workplace / "strange.png")
    explain(workplace, monkeypatch, "strange.png", *OWN, "--caption", "w1", "--output", "strange")
    maps = np.load(workplace / "strange/strange-it-w1-lrp.npz")["image_relevance"]
    assert maps.shape == (1, 128, 128) and np.isfinite(maps).all()


@pytest.mark.parametrize("spelling", ["--method", "--methods"])
def test_method_and_methods_mean_the_same(spelling):
    line = [spelling, "lrp", "gradcam"]
    assert explain_script.build_parser().parse_args(["x.jpg", *line]).method == ["lrp", "gradcam"]
    assert evaluation.build_parser().parse_args(line).methods == ["lrp", "gradcam"]


def test_a_method_that_does_not_suit_the_captioner_is_refused_before_anything_is_computed(
    workplace, monkeypatch, capsys
):
    captioner = random_captioner().float()
    monkeypatch.setattr(captioner, "caption", None)  # a call would fail
    monkeypatch.setattr(explain_script, "load_captioner", lambda path, device: captioner)
    monkeypatch.chdir(workplace)
    line = ["photo.jpg", *OWN, "--method", "lrp", "attnlrp"]
    assert "multi-head captioner" in refused(explain_script, line, monkeypatch, capsys)
