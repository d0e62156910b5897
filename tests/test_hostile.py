"""A few of the cases of hostile.py; the whole takes minutes."""

import os

import hostile
import pytest


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    before = os.getcwd()
    folder = tmp_path_factory.mktemp("material")
    hostile.write_material(folder)
    yield folder
    os.chdir(before)


@pytest.mark.parametrize("kind", hostile.CASES)
def test_bad_input_is_refused_in_one_line_or_accepted(material, kind):
    for seed in range(3):
        outcome, text = hostile.try_case(material, kind, seed)
        assert outcome in hostile.GOOD, text


def test_what_is_torn_is_noticed(tmp_path):
    (tmp_path / "whole.json").write_text("{}")
    assert hostile.unreadable(tmp_path) == []
    (tmp_path / "torn.json").write_text('{"a": ')
    (tmp_path / ".it.123.png").write_bytes(b"")
    assert len(hostile.unreadable(tmp_path)) == 2


def test_a_traceback_is_noticed(monkeypatch):
    def main():
        raise KeyError("surprise")

    monkeypatch.setattr(hostile.explain, "main", main)
    outcome, text = hostile.call("explain", [])
    assert outcome == "traceback"
    assert "surprise" in text
