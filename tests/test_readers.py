"""readers: COCO's files for whoever scores captions without a dataset. How whole datasets are read
is in test_preparedataset.py, what is refused in test_bad_input.py."""

import json

import pytest
from fixtures import write_coco

from commandline import UserError, write_json
from readers import SOURCES, read_raw
from readers.coco import read_instances, read_predictions, read_references


@pytest.fixture
def annotations(tmp_path):
    return write_coco(tmp_path / "coco", "val2017", [5, 6]) / "annotations"


def test_references_are_the_raw_captions(annotations):
    references = read_references(annotations / "captions_val2017.json")
    assert references.keys() == {5, 6}
    assert references[6] == [f"A dog, no. {k} \n" for k in range(5)]


def test_instances_are_the_categories_of_an_image_and_their_words(annotations):
    annotated, categories = read_instances(annotations / "instances_val2017.json")
    assert annotated == {5: {"dog", "bus"}, 6: {"dog"}}
    assert {"dog", "dogs", "puppies"} <= set(categories["dog"])


def test_instances_have_to_list_the_images_that_are_asked_for(annotations):
    path = annotations / "instances_val2017.json"
    assert read_instances(path, [5]) == read_instances(path)
    with pytest.raises(UserError, match="does not list image 7 .2 such.; its objects are needed"):
        read_instances(path, [5, 7, 8])


def test_predictions_of_a_results_file_and_of_evaluation(tmp_path):
    rows = [{"image_id": 5, "caption": "a dog"}, {"image_id": "x", "caption": "half \ud83d"}]
    expected = {5: "a dog", "x": "half ?"}
    for content in (rows, {"metrics": {}, "captions": rows}):
        (tmp_path / "results.json").write_text(json.dumps(content))
        assert read_predictions(tmp_path / "results.json") == expected


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "not in COCO's results format"),
        ({"captions": None}, "not in COCO's results format"),
        ([1], "not in COCO's results format"),
        ([{"image_id": 1.5, "caption": "a dog"}], "not in COCO's results format"),
        ([{"image_id": 1, "caption": None}], "needs a list of objects with image_id and caption"),
        ([{"image_id": 1, "caption": "a dog"}] * 2, "more than one caption of an image"),
    ],
)
def test_other_predictions_are_refused(content, message, tmp_path):
    write_json(tmp_path / "results.json", content)
    with pytest.raises(UserError, match=f"results.json .*{message}"):
        read_predictions(tmp_path / "results.json")


def test_a_reader_is_all_that_a_new_dataset_needs(tmp_path, monkeypatch):
    source = SOURCES["scenes"]._replace(layout="three splits in COCO's layout")
    monkeypatch.setitem(SOURCES, "mine", source)
    for split, ids in (("train", [1, 2]), ("val", [3]), ("test", [4])):
        write_coco(tmp_path / "mine", split, ids)
    raw = read_raw("mine", tmp_path / "mine")
    assert [entry["image_id"] for entry in raw.splits["train"]] == [1, 2]
    with pytest.raises(UserError, match="there is no folder .*three splits in COCO's layout"):
        read_raw("mine", tmp_path / "yours")
