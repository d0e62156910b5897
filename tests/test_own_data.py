"""One's own images and captions: how a file of rows, or any JSON in Karpathy's format, becomes a
prepared dataset, and what is refused."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from fixtures import REAL, REPOSITORY, command, draw, refused, write_flickr

import preparedataset
from captiondata import CaptionDataset
from commandline import UserError, read_json
from preparedataset import describe, prepare
from readers.pairs import divided, read_pairs

SPLIT = ("image", "caption", "split")
IMAGES = ("dogs/1.jpg", "dogs/2.jpg", "cat.png", "3.jpg")
ROWS = [
    ("dogs/1.jpg", 'A dog, "Rex", runs.'),
    ("dogs/2.jpg", "A wet dog."),
    ("dogs/1.jpg", "A dog."),
    ("cat.png", "Eine süße Katze 🐱"),
    ("3.jpg", "A dog\tand a cat."),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with four images in pets/."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(IMAGES):
        draw(Path("pets") / name, seed=seed)
    return tmp_path


def quoted(value):
    return '"' + value.replace('"', '""') + '"'


def table(rows, delimiter=",", columns=("image", "caption"), line_end="\n"):
    """The text of a table all of whose values are in quotes."""
    lines = [delimiter.join(columns)]
    for row in rows:
        lines.append(delimiter.join(quoted(value) for value in row))
    return line_end.join(lines) + line_end


def json_lines(rows, columns=("image", "caption")):
    return "".join(json.dumps(dict(zip(columns, row))) + "\n" for row in rows)


CAPTIONS_OF = {
    "dogs/1.jpg": ['A dog, "Rex", runs.', "A dog."],
    "dogs/2.jpg": ["A wet dog."],
    "cat.png": ["Eine süße Katze 🐱"],
    "3.jpg": ["A dog\tand a cat."],
}


@pytest.mark.parametrize(
    "file, content",
    [
        ("pets.csv", table(ROWS).encode()),
        ("pets.csv", table(ROWS).encode("utf-8-sig")),
        ("PETS.CSV", table(ROWS, line_end="\r\n").encode()),
        ("pets.tsv", table(ROWS, "\t").encode()),
        ("pets.csv", table(ROWS).replace("image,caption", " Image,CAPTION ").encode()),
        (
            "pets.csv",
            table([(*row, "me") for row in ROWS], columns=("image", "caption", "by")).encode(),
        ),
        ("pets.csv", table(ROWS).replace("\n", "\n\n").encode()),
        ("pets.jsonl", json_lines(ROWS).encode()),
        ("pets.jsonl", json_lines(ROWS).replace("\n", "\r\n\n").encode("utf-8-sig")),
    ],
)
def test_every_kind_of_file_says_the_same(place, file, content):
    Path(file).write_bytes(content)
    raw = read_pairs(Path("pets"), file, seed=0)
    found = {}
    for entries in raw.splits.values():
        found |= {entry["file"]: entry["captions"] for entry in entries}
        assert all(entry["image_id"] == entry["file"] for entry in entries)
    assert found == CAPTIONS_OF


def test_an_image_has_one_spelling(place):
    inside = str(place / "pets/3.jpg")
    rows = [*ROWS, ("./dogs//2.jpg", "One more."), (inside, "The last.")]
    Path("pets.csv").write_text(table(rows))
    raw = read_pairs(Path("pets"), "pets.csv", seed=0)
    found = {}
    for entries in raw.splits.values():
        found |= {entry["file"]: entry["captions"] for entry in entries}
    assert found.keys() == CAPTIONS_OF.keys()
    assert found["dogs/2.jpg"] == ["A wet dog.", "One more."]
    assert found["3.jpg"][1] == "The last."


def test_the_splits_of_the_file_are_kept(place):
    splits = {"dogs/1.jpg": "val", "dogs/2.jpg": "train", "cat.png": "train", "3.jpg": "test"}
    rows = [(*row, splits[row[0]]) for row in ROWS]
    for file, content in (
        ("p.csv", table(rows, columns=SPLIT)),
        ("p.jsonl", json_lines(rows, SPLIT)),
    ):
        Path(file).write_text(content)
        raw = read_pairs(Path("pets"), file, seed=0)
        for split, entries in raw.splits.items():
            assert [splits[entry["file"]] for entry in entries] == [split] * len(entries)
        assert [entry["file"] for entry in raw.splits["train"]] == ["dogs/2.jpg", "cat.png"]


def test_images_are_divided_by_the_seed_and_not_by_their_order():
    images = [f"{number}.jpg" for number in range(57)]
    splits = divided(images, seed=3)
    counts = {split: list(splits.values()).count(split) for split in ("train", "val", "test")}
    assert counts == {"train": 45, "val": 6, "test": 6}
    assert divided(images[::-1], seed=3) == splits
    assert divided(images, seed=4) != splits
    assert sorted(divided(images[:3], seed=0).values()) == ["test", "train", "val"]


def test_any_number_of_captions_is_five_to_train_on(place):
    """Of more than five, five are drawn; of fewer, some are taken again. All are references."""
    many = [("3.jpg", f"{word} dog") for word in ("a", "the", "one", "my", "your", "his", "no")]
    rows = [(*row, "train") for row in [*ROWS[:3], *many]] + [("cat.png", "a cat", "val")]
    Path("pets.csv").write_text(table(rows, columns=SPLIT))
    prepare("csv", "pets", "out", min_word_freq=1, captions="pets.csv")
    train_set = CaptionDataset("out", "train")
    assert [len(entry["captions"]) for entry in train_set.entries] == [2, 1, 7]
    for index, entry in enumerate(train_set.entries):
        rows_of_ids = train_set.captions(index)
        assert rows_of_ids.shape[0] == 5
        said = {" ".join(train_set.vocabulary.decode(ids)) for ids in rows_of_ids}
        assert len(said) == min(5, len(entry["captions"]))
    assert train_set.info["categories"]["dog"]  # so that references tell which objects there are


def test_many_unknown_words_are_told(place):
    rows = [("3.jpg", "A dog and a cat", "train"), ("cat.png", "A cat", "val")]
    Path("pets.csv").write_text(table(rows, columns=SPLIT))
    info = prepare("csv", "pets", "out", min_word_freq=2, captions="pets.csv")
    *_, last = describe(info)
    assert re.match(r"60% of the words in train are <unk>, .* --min_word_freq 1 keeps", last)
    info = prepare("csv", "pets", "out", min_word_freq=1, captions="pets.csv")
    assert not any("% of the words" in line for line in describe(info))


def run_prepare(monkeypatch, *arguments):
    command(monkeypatch, preparedataset, *arguments)
    preparedataset.main()


def test_the_dataset_is_called_like_its_folder(place, monkeypatch, capsys):
    Path("pets.csv").write_text(table(ROWS))
    flags = ["--dataset", "csv", "--captions", place / "pets.csv", "--min_word_freq", 1]
    run_prepare(monkeypatch, *flags, "--root", "pets")
    assert "data/pets is ready: train 2, val 1, test 1 images" in capsys.readouterr().out
    info = read_json("data/pets/info.json")
    assert (info["name"], info["source"]) == ("pets", "csv")
    run_prepare(monkeypatch, *flags, "--root", "pets")  # again
    run_prepare(monkeypatch, *flags, "--root", "pets", "--output", "data/mine")
    assert read_json("data/mine/info.json")["name"] == "mine"
    shutil.copytree("pets", "other/pets")
    capsys.readouterr()
    told = refused(preparedataset, [*flags, "--root", "other/pets"], monkeypatch, capsys)
    assert told == "data/pets holds another dataset; choose the folder to write by --output"


# -------------------------------------------------------------------------------- Karpathy's format


def write_karpathy(root, folder="images", **more):
    """As `write_flickr`, by another name; more: further fields of each image, of its number."""
    write_flickr(root)
    data = json.loads((root / "dataset_flickr8k.json").read_text())
    for number, image in enumerate(data["images"]):
        image |= {name: value(number) for name, value in more.items()}
    (root / "dataset_flickr8k.json").unlink()
    (root / "dataset_mine.json").write_text(json.dumps({**data, "dataset": "mine"}))
    if folder != "images":
        (root / "images").rename(root / folder)
    return root


def test_any_json_in_karpathys_format(place, monkeypatch):
    write_karpathy(Path("mine"))
    run_prepare(monkeypatch, "--dataset", "karpathy", "--root", "mine")
    info = read_json("data/mine/info.json")
    assert (info["name"], info["source"]) == ("mine", "karpathy")
    assert info["splits"] == {"train": 3, "val": 1}
    assert CaptionDataset("data/mine", "val").image(0).size == (20, 10)


@pytest.mark.parametrize("above", [".", "images"])
def test_karpathys_coco_lies_in_folders_and_has_numbers(place, above):
    def half(number):
        return f"val{number % 2}"

    root = write_karpathy(Path("mine"), filepath=half, cocoid=lambda number: 900 + number)
    top = root / "kept" / above
    for number, file in enumerate(sorted((root / "images").iterdir())):
        (top / half(number)).mkdir(parents=True, exist_ok=True)
        file.rename(top / half(number) / file.name)
    shutil.rmtree(root / "images")
    for path in (root / "kept").iterdir():
        path.rename(root / path.name)
    prepare("karpathy", root, "out", captions=root / "dataset_mine.json")
    val = CaptionDataset("out", "val")
    assert val.entries[0]["image_id"] == 902
    assert val.entries[0]["file"].startswith("val0/")
    assert val.image(0).size == (20, 10)


def test_several_files_in_karpathys_format_are_not_guessed(place):
    root = write_karpathy(Path("mine"))
    shutil.copy(root / "dataset_mine.json", root / "dataset_yours.json")
    with pytest.raises(UserError, match="dataset_mine.json, dataset_yours.json; name one of them"):
        prepare("karpathy", root, "out")
    prepare("karpathy", root, "out", captions=root / "dataset_yours.json")
    for path in root.glob("*.json"):
        path.unlink()
    with pytest.raises(UserError, match="there is no dataset_.*; name the file as captions"):
        prepare("karpathy", root, "out")


def test_no_file_of_captions_is_replaced(place):
    root = write_karpathy(Path("mine"))
    named = (root / "dataset_mine.json").rename(root / "train.json")
    before = named.read_bytes()
    with pytest.raises(UserError, match="train.json would be replaced"):
        prepare("karpathy", root, root, captions=named)
    assert named.read_bytes() == before


# ---------------------------------------------------------------------------------------- mistakes
# what is wrong: (the name of the file, its content, the line)
BAD_FILES = {
    "no such file": ("no.csv", None, "there is no file no.csv"),
    "a folder": ("pets.csv", "folder", "pets.csv is a folder, not a file"),
    "a kind that is not read": ("pets.xlsx", "x",
        "pets.xlsx is not of a kind that is read: .csv, .tsv"),
    "not UTF-8": ("pets.csv", "image,caption\n3.jpg,süß\n".encode("latin-1"),
        "pets.csv is not a text in UTF-8"),
    "a zip": ("pets.csv", b"PK\x03\x04\xff\xfe", "pets.csv is not a text in UTF-8"),
    "empty": ("pets.csv", "", "has no column 'image'; .*, and names nothing"),
    "without a header": ("pets.csv", table(ROWS).partition("\n")[2],
        "pets.csv has no column 'image'; its first line has to name the columns, and names dogs/1"),
    "without captions": ("pets.csv", "image,text\n3.jpg,A dog\n",
        "has no column 'caption'; .* and names image, text"),
    "semicolons": ("pets.csv", "image;caption\n3.jpg;A dog\n", "and names image;caption"),
    "five columns of captions": ("pets.csv", "image,caption,caption\n3.jpg,A dog,A cat\n",
        "more than one column 'caption'; each caption has a row"),
    "a header only": ("pets.csv", "image,caption\n", "pets.csv has no rows"),
    "a comma outside of quotes": ("pets.csv", "image,caption\n3.jpg,A dog\ncat.png,A cat, too\n",
        "pets.csv, line 3: there are 3 values for 2 columns; a value that has ',' in it stands in"),
    "a row too short": ("pets.csv", "image,caption\n3.jpg\n", "line 2: there are 1 values for 2"),
    "a quote that does not end": ("pets.csv", 'image,caption\n3.jpg,"A dog\n',
        "line 2: unexpected"),
    "an empty caption": ("pets.csv", "image,caption\n3.jpg,A dog\n3.jpg,  \n",
        "pets.csv, line 3: the caption is empty"),
    "an empty image": ("pets.csv", "image,caption\n,A dog\n", "line 2: the image is empty"),
    "out of the folder": ("pets.csv", "image,caption\n../../etc/passwd,A dog\n",
        "line 2: the image is '../../etc/passwd', not a file name inside the images folder"),
    "elsewhere": ("pets.csv", "image,caption\n/etc/passwd,A dog\n", "is '/etc/passwd', not a file"),
    "an image that is not there": ("pets.csv", table([*ROWS, ("no.jpg", "A dog")]),
        "1 of 5 images are missing, the first is pets/no.jpg"),
    "two splits": ("pets.csv",
        table([("3.jpg", "A", "train"), ("3.jpg", "C", "val")], columns=SPLIT),
        "line 3: 3.jpg is in the split 'val', and in 'train' on line 2"),
    "a split unknown": ("pets.csv", table([("3.jpg", "A", "dev")], columns=SPLIT),
        "line 2: the split is 'dev', not of train, val, test"),
    "a split empty": ("pets.csv", table([("3.jpg", "A", "")], columns=SPLIT),
        "line 2: the split is empty"),
    "nothing for val": ("pets.csv", table([("3.jpg", "A", "train")], columns=SPLIT),
        "split 'val' is empty: pets lists no images for it"),
    "too few to divide": ("pets.csv", table(ROWS[:3]), "2 images are too few; train, val and test"),
    "JSON broken": ("pets.jsonl", json_lines(ROWS[:2]) + "{oops}\n",
        "pets.jsonl, line 3: this is not JSON"),
    "JSON a list": ("pets.jsonl", '["3.jpg", "A dog"]\n',
        "line 1: this is not an object with image"),
    "JSON of one document": ("pets.jsonl", "[\n{}\n]\n", "line 1: this is not JSON"),
    "JSON without a caption": ("pets.jsonl", '\n{"image": "3.jpg"}\n',
        "line 2: there is no 'caption'"),
    "JSON's caption a list": ("pets.jsonl", '{"image": "3.jpg", "caption": ["A dog"]}\n',
        r"line 1: the caption is \['A dog'\], not a text"),
    "JSON's half a letter": ("pets.jsonl", '{"image": "3.jpg", "caption": "\\ud83d"}\n',
        "not a text"),
    "a split in some lines": ("pets.jsonl",
        json_lines(ROWS[:1]) + json_lines([("3.jpg", "A dog", "val")], SPLIT),
        "line 2: there is a 'split', and the lines before have none"),
    "a split in other lines": ("pets.jsonl",
        json_lines([("3.jpg", "A dog", "val")], SPLIT) + json_lines(ROWS[:1]),
        "line 2: there is no 'split'"),
}  # fmt: skip


@pytest.mark.parametrize("file, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_told_in_one_line(file, content, message, place, monkeypatch, capsys):
    if content == "folder":
        Path(file).mkdir()
    elif content is not None:
        Path(file).write_bytes(content.encode() if isinstance(content, str) else content)
    flags = ["--dataset", "csv", "--root", "pets", "--captions", file, "--min_word_freq", 1]
    assert re.search(message, refused(preparedataset, flags, monkeypatch, capsys))
    assert not Path("data").exists()


# -------------------------------------------------------------------------------- from end to end

# What is smaller here than in the README: a random encoder, and a captioner of few numbers.
SMALLER = {
    "preparedataset": ["--encoder_weights", "random", "--workers", 0],
    "train": ["--embed_dim", 16, "--hidden_dim", 32, "--batch_size", 4, "--decoder_lr", 0.02]
    + ["--epochs", 3, "--workers", 0],
    "evaluation": ["--metrics", "diversity", "--workers", 0],
    "explain": [],
}


def commands_in_readme(title):
    """The commands in the code block of a section, each a list: script, flags."""
    section = (REPOSITORY / "docs/datasets.md").read_text().partition(f"## {title}\n")[2]
    block = section.split("```")[1].replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in block.strip().splitlines()]


def write_forty_drawings(folder):
    rows = []
    for number in range(40):
        name = f"beach/{number}.jpg"
        draw(folder / name, size=(40, 30), seed=number)
        animal = ("dog", "cat", "duck")[number % 3]
        rows += [(name, f"A wet {animal}, and a ball."), (name, f"A wet {animal}.")]
    return rows


def write_forty_photographs(folder):
    rows = []
    (folder / "beach").mkdir(parents=True)
    images = read_json(REAL / "flickr8k/dataset_flickr8k.json")["images"][:40]
    for number, image in enumerate(images):
        name = f"beach/{number}.jpg"
        shutil.copy(REAL / "flickr8k/images" / image["filename"], folder / name)
        rows += [(name, sentence["raw"]) for sentence in image["sentences"]]
    return rows


@pytest.mark.parametrize("write", [write_forty_drawings, write_forty_photographs])
def test_the_commands_of_the_readme(write, tmp_path, monkeypatch, capsys):
    """Forty images and a CSV go through all of them."""
    if write is write_forty_photographs and not (REAL / "flickr8k").exists():
        pytest.skip("wants ../shared/data/flickr8k")
    monkeypatch.chdir(tmp_path)
    rows = write(Path("PETS"))
    Path("PETS/captions.csv").write_text(table(rows))
    scripts = []
    for script, *flags in commands_in_readme("Your own photographs and captions"):
        name = script.removesuffix(".py")
        module = importlib.import_module(name)
        smaller = ["scenes_vgg" if flag == "inception_v3" else flag for flag in flags]
        command(monkeypatch, module, *smaller, *SMALLER[name], "--device", "cpu")
        module.main()
        scripts.append(name)
    assert scripts == list(SMALLER)
    out = capsys.readouterr().out
    assert "data/PETS is ready: train 32, val 4, test 4 images" in out
    assert "the encoder is scenes_vgg, whose features are cached in data/PETS" in out
    assert "the dataset is data/PETS" in out
    assert len(read_json("results/PETS-aoa-PETS-test.json")["captions"]) == 4
    if write is write_forty_drawings:  # so few photographs teach it nothing to say
        (explained,) = Path("explanations").glob("1-*-lrp.npz")  # with the checkpoint's name
        assert np.load(explained)["image_relevance"].ndim == 3
