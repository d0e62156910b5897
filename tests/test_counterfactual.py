"""counterfactual.py: photographs, splits that go on after a kill, and what a user may do wrong."""

import json
import shutil

import numpy as np
import pytest
from fixtures import REPOSITORY, command, prepared_scenes, refused
from PIL import Image

import counterfactual
from commandline import run
from experiments import counterfactual as experiment
from importance import DISTANCES
from readers.objects import box_mask, read_objects

CHECKPOINT = REPOSITORY / "checkpoints" / "scenes-gridtd.pt"
LAMB = REPOSITORY / "data" / "demo" / "lamb.jpg"


@pytest.fixture(autouse=True)
def without_bert(monkeypatch):
    """The default model is taken for missing, so that the tests are fast and need no package."""

    def missing(model, device):
        raise counterfactual.ScorerUnavailable(f"the model {model} is not on this machine; get it")

    monkeypatch.setattr(counterfactual, "SentenceModel", missing)


@pytest.fixture
def boxes(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"lamb": [20, 30, 60, 90], "ball": [[70, 70, 90, 90]]}))
    return path


def arguments(boxes, tmp_path, *more):
    always = [LAMB, "--objects", boxes, "--checkpoint", CHECKPOINT, "--max_area", "0.3"]
    return [*always, "--output", tmp_path / "out", *more]


# ------------------------------------------------------------------------------------ a photograph


def test_a_photograph(boxes, tmp_path, monkeypatch, capsys):
    boxes.write_text(json.dumps({"lamb": [20, 30, 60, 90], "sky": [0, 0, 128, 60]}))
    command(monkeypatch, counterfactual, *arguments(boxes, tmp_path, "--inpainter", "mean", "blur"))
    run(counterfactual.main)
    out = capsys.readouterr().out
    assert "without each object, by mean" in out
    assert "1 of 2 objects are too large" in out
    assert "the model all-MiniLM-L6-v2 is not on this machine; get it" in out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    for filler in ("mean", "blur"):
        for name in ("importance", "removed", "attention-1-lamb"):
            assert f"lamb-{filler}-{name}.png" in written
    found = json.loads((tmp_path / "out" / "lamb-mean-importance.json").read_text())
    assert found["bert_model"] is None
    assert [thing["name"] for thing in found["objects"]] == ["lamb", "sky"]
    assert found["objects"][1]["removed"] is None
    assert found["nothing"]["probability"] == 0
    lamb = found["objects"][0]
    assert lamb["area"] == pytest.approx(40 * 60 / 128**2)
    drops = [drop for _, drop in lamb["removed"]["drops"]]
    assert lamb["removed"]["probability"] == pytest.approx(np.mean(drops))
    assert lamb["removed"]["sentence"] is None
    assert len(lamb["removed"]["drops"]) == len(found["caption"].split())


BAD = [
    ('{"lamb": [200, 200, 300, 300]}', "outside of the picture"),
    ('{"lamb": [20, 30, 10, 90]}', "needs a box"),
    ('{"lamb": "left"}', "needs a box"),
    ("[1]", "neither a COCO instances file"),
    ("{}", "no object"),
    ("{", "not a JSON file"),
    ('{"lamb": [0, 0, 128, 128]}', "cover more than"),
]


@pytest.mark.parametrize("text, complaint", BAD)
def test_bad_objects_are_one_line(text, complaint, boxes, tmp_path, monkeypatch, capsys):
    boxes.write_text(text)
    message = refused(counterfactual, arguments(boxes, tmp_path), monkeypatch, capsys)
    assert complaint in message
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_together_is_one_line(boxes, tmp_path, monkeypatch, capsys):
    def message(*given):
        return refused(counterfactual, given, monkeypatch, capsys)

    assert "--dataset" in message()
    assert "--objects" in message(LAMB)
    assert "--questions goes with" in message(LAMB, "--objects", boxes, "--questions")
    assert "no file" in message(LAMB, "--objects", tmp_path / "none.json")
    assert "no image" in message(tmp_path / "none.jpg", "--objects", boxes)
    assert "--dilation must be" in message(LAMB, "--objects", boxes, "--dilation", "-1")
    wrong = arguments(boxes, tmp_path, "--bert_model", "nobody/nothing")
    assert "nobody/nothing is not on this machine" in message(*wrong)
    assert "needs a BERT model" in message(*arguments(boxes, tmp_path, "--distance", "sentence"))
    assert "not a prepared dataset" in message("--dataset", tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_a_silent_captioner_is_one_line(boxes, tmp_path, monkeypatch, capsys):
    from captioner import load_captioner

    captioner = load_captioner(CHECKPOINT)
    captioner.decode = lambda features, **options: [[]] * len(features)
    monkeypatch.setattr(counterfactual, "load_captioner", lambda path, device: captioner)
    message = refused(counterfactual, arguments(boxes, tmp_path), monkeypatch, capsys)
    assert "says nothing" in message
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- its objects


def test_all_formats_give_the_same_objects(tmp_path):
    photograph = tmp_path / "photo.png"
    Image.new("RGB", (40, 30)).save(photograph)
    box = (5, 6, 20, 16)
    mask = box_mask(box, (40, 30))
    (tmp_path / "boxes.json").write_text(json.dumps({"dog": list(box)}))
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.uint8(255 * mask)).save(tmp_path / "masks" / "dog-1.png")
    corners = [5, 6, 20, 6, 20, 16, 5, 16]
    image = {"id": 7, "file_name": "photo.png", "width": 40, "height": 30}
    thing = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [5, 6, 15, 10], "iscrowd": 0}
    crowd = {**thing, "id": 2, "iscrowd": 1}
    instances = {"images": [image], "categories": [{"id": 3, "name": "dog"}]}
    instances["annotations"] = [{**thing, "segmentation": [corners]}, crowd]
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    edges = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    xml = "<annotation><size><width>40</width><height>30</height></size>"
    xml += f"<object><name>11</name><bndbox>{edges}</bndbox></object></annotation>"
    for part in ("Annotations", "Sentences"):
        (tmp_path / part).mkdir()
    (tmp_path / "Annotations" / "1.xml").write_text(xml)
    (tmp_path / "Sentences" / "1.txt").write_text("[/EN#11/animals A brown dog] runs .")
    for source in ("boxes.json", "masks", "instances.json", "Annotations/1.xml"):
        (found,) = read_objects(tmp_path / source, photograph)
        assert found.name == "dog"
        assert found.words == ("dog",)
        assert np.array_equal(found.mask, mask), source


def test_a_mask_or_image_of_another_size_is_refused(tmp_path):
    photograph = tmp_path / "photo.png"
    Image.new("RGB", (40, 30)).save(photograph)
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (30, 40), 255).save(masks / "dog.png")
    with pytest.raises(counterfactual.UserError, match="is 30x40 pixels, and its photograph 40x30"):
        read_objects(masks, photograph)
    Image.new("L", (40, 30), 0).save(masks / "dog.png")
    with pytest.raises(counterfactual.UserError, match="all black"):
        read_objects(masks, photograph)
    image = {"id": 7, "file_name": "photo.png", "width": 30, "height": 40}
    instances = {"images": [image], "categories": [], "annotations": []}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    with pytest.raises(counterfactual.UserError, match="is 30x40 pixels"):
        read_objects(tmp_path / "instances.json", photograph)


# ----------------------------------------------------------------------------------------- a split


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepared_scenes(tmp_path_factory.mktemp("scenes"), 6, 1, 4)


def examine(dataset, output, monkeypatch, *more):
    always = ["--dataset", dataset, "--checkpoint", CHECKPOINT, "--inpainter", "mean"]
    command(monkeypatch, counterfactual, *always, "--output", output, *more)
    counterfactual.main()
    return json.loads((output / "scenes.json").read_text())


def test_a_split_that_was_killed_goes_on(dataset, tmp_path, monkeypatch, capsys):
    whole = examine(dataset, tmp_path / "whole", monkeypatch)
    lines = (tmp_path / "whole" / "scenes-records.jsonl").read_text().splitlines(keepends=True)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "scenes-records.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    examined = []
    record_of = experiment.record_of

    def watched(dataset, index, study):
        examined.append(index)
        return record_of(dataset, index, study)

    monkeypatch.setattr(experiment, "record_of", watched)
    again = examine(dataset, killed, monkeypatch)
    assert examined == [2, 3]
    assert (killed / "scenes-records.jsonl").read_text() == "".join(lines)
    for name in ("images", "objects removed", "robustness"):
        assert again[name] == whole[name]
    assert whole["images"] == 4
    assert whole["largest change by removing nothing"] == 0
    other = ["--dilation", "0.2"]
    with pytest.raises(counterfactual.UserError, match="other settings"):
        examine(dataset, killed, monkeypatch, *other)


def test_a_shorter_run_is_a_part_of_the_whole(dataset, tmp_path, monkeypatch, capsys):
    some = examine(dataset, tmp_path, monkeypatch, "--images", "2")
    assert some["images"] == 2
    rows = {row["distance"] for row in some["robustness"]}
    assert rows <= set(DISTANCES)
    shutil.rmtree(tmp_path)
