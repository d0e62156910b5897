"""A checkpoint file that is damaged, or not what it says, is refused in one line."""

import pickle

import pytest
import torch
from helpers import random_captioner

from basemodel import read_checkpoint
from captioner import load_captioner
from commandline import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint file that is right."""
    path = tmp_path_factory.mktemp("checkpoint") / "whole.pt"
    random_captioner(model_type="aoa").float().save(path)
    return path


def test_a_right_one_is_loaded(whole):
    assert load_captioner(whole).model_type == "aoa"


@pytest.mark.parametrize("part", range(1, 12))
def test_a_flipped_byte_is_found_wherever_it_is(whole, tmp_path, part):
    content = bytearray(whole.read_bytes())
    content[part * len(content) // 12] ^= 0xFF
    (tmp_path / "it.pt").write_bytes(content)
    with pytest.raises(UserError, match="is not a checkpoint of this project, or is damaged"):
        load_captioner(tmp_path / "it.pt")


def test_zeros_in_the_middle_and_a_cut_are_found(whole, tmp_path):
    content = bytearray(whole.read_bytes())
    middle = len(content) // 2
    zeroed = content[:middle] + bytes(4096) + content[middle + 4096 :]
    for damaged in (zeroed, content[:middle], b""):
        (tmp_path / "it.pt").write_bytes(damaged)
        with pytest.raises(UserError, match="or is damaged"):
            load_captioner(tmp_path / "it.pt")


class Evil:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return (open, ("evil.txt", "w"))


def test_no_code_of_a_file_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "image captioner 1", "config": Evil()}, "it.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("it.pt", "pickle.pt"):
        with pytest.raises(UserError, match="or is damaged"):
            load_captioner(name)
    assert not (tmp_path / "evil.txt").exists()


def set_config(**values):
    return lambda checkpoint: checkpoint["config"].update(values)


def set_part(name, value):
    return lambda checkpoint: checkpoint.update({name: value})


def set_weight(change):
    def changed(checkpoint):
        weights = checkpoint["state_dict"]
        weights["fc.weight"] = change(weights["fc.weight"])

    return changed


WRONG = {
    "huge": (set_config(hidden_dim=10**9), "its config has hidden_dim 1000000000"),
    "large": (set_config(hidden_dim=10**6), r"not \(1000000, "),
    "none": (set_config(embed_dim=0), "its config has embed_dim 0"),
    "true": (set_config(embed_dim=True), "its config has embed_dim True"),
    "text": (set_config(num_head="8"), "its config has num_head '8'"),
    "probability": (set_config(dropout=7), "its config has dropout 7"),
    "unknown field": (set_config(depth=3), "its config has depth 3"),
    "model": (set_config(model_type="gridtd"), "against what its config says"),
    "no model": (set_config(model_type="lstm"), "no model_type 'lstm'"),
    "encoder": (set_config(encoder="squeezenet1_1"), "against what its config says"),
    "no encoder": (set_config(encoder="../vgg"), "no encoder '../vgg'"),
    "config": (set_part("config", []), "its config is no dict"),
    "vocabulary": (set_part("vocabulary", None), "its vocabulary is no list"),
    "numbers": (set_part("vocabulary", [1, 2]), "its vocabulary holds what is no word"),
    "words": (set_part("vocabulary", ["a", "dog"]), "this is not a vocabulary"),
    "cut": (lambda checkpoint: checkpoint["vocabulary"].pop(2), "have the shape"),
    "weights": (set_part("state_dict", {}), "it lacks the weights"),
    "list": (set_part("state_dict", [1]), "its state_dict is no dict"),
    "training": (set_part("training", [1]), "its training is no dict"),
    "NaN": (set_weight(lambda weight: weight * torch.nan), "the weights fc.weight hold a value"),
    "infinity": (set_weight(lambda weight: weight / 0), "the weights fc.weight hold a value"),
    "no tensor": (set_weight(lambda weight: "weight"), "its state_dict has no tensor fc.weight"),
    "shape": (set_weight(lambda weight: weight[1:]), "the weights fc.weight have the shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_told_in_one_line(whole, tmp_path, name):
    change, message = WRONG[name]
    checkpoint = torch.load(whole, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "it.pt")
    with pytest.raises(UserError, match=message) as error:
        load_captioner(tmp_path / "it.pt")
    assert "\n" not in str(error.value)


def test_a_file_of_something_else_is_told_from_a_damaged_one(tmp_path):
    torch.save({"weights": torch.ones(3)}, tmp_path / "it.pt")
    with pytest.raises(UserError, match="is not a checkpoint of this project$"):
        read_checkpoint(tmp_path / "it.pt")
