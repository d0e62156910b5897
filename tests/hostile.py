"""Hundreds of bad inputs and kills in one command: does a traceback reach the user, is a file torn?

    python tests/hostile.py                              # 500 bad inputs and 60 kills
    python tests/hostile.py --cases 40 --kills 0 --seed 3

A bad input is a file that is damaged at random, or a flag that makes no sense, given to a command
that runs in this process. It passes if the command ends well, or with exit code 2 and a last line
on stderr that says what is wrong; and if it leaves no file that cannot be read. What ended well is
counted as "accepted": a flipped bit of a photograph is still a photograph.

A kill is a signal, SIGKILL, SIGTERM or SIGINT, at a random moment of a command of its own. It
passes if no traceback is printed (SIGKILL prints nothing), every file that is there can be read,
no process is left behind, and the same command runs to its end afterwards. Of a file that was being
written when SIGKILL came, a hidden temporary file stays.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fixtures import write_coco2017, write_flickr  # noqa: E402
from helpers import random_captioner  # noqa: E402

import evaluation  # noqa: E402 (the path comes first)
import explain  # noqa: E402
import preparedataset  # noqa: E402
import train  # noqa: E402
from commandline import run  # noqa: E402

COMMANDS = {
    "explain": explain,
    "evaluation": evaluation,
    "preparedataset": preparedataset,
    "train": train,
}
EXPLAIN = ["photo.png", "--checkpoint", "it.pt", "--caption", "w1 w2", "--output", "out"]
PREPARE = ["--root", "raw", "--output", "out", "--workers", "0", "--min_word_freq", "1"]
FEATURES = ["--features", "scenes_vgg", "--encoder_weights", "random"]
TRAIN = ["--dataset", "./ready", "--output", "out/new.pt", "--epochs", "1", "--workers", "0"]
TRAIN += ["--batch_size", "2", "--hidden_dim", "16", "--embed_dim", "8", "--num_head", "4"]
EVALUATE = ["--dataset", "./ready", "--checkpoint", "it.pt", "--workers", "0", "--output", "out/it"]
EVALUATE += ["--metrics", "diversity"]


# ---------------------------------------------------------------------------------------- material


def write_material(folder):
    """What the cases damage: a photograph, a captioner, raw datasets, a prepared one."""
    os.chdir(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save("photo.png")
    write_coco2017(Path("coco"))
    write_flickr(Path("flickr"))
    Path("pets").mkdir()
    rows = ["image,caption,split"]
    for number in range(6):
        Image.fromarray(pixels + number).save(f"pets/{number}.png")
        split = ("train", "train", "train", "train", "val", "test")[number]
        rows.append(f'{number}.png,"A dog, no. {number}.",{split}')
    Path("pets/captions.csv").write_text("\n".join(rows) + "\n")
    captions = ["--dataset", "csv", "--root", "pets", "--captions", "pets/captions.csv"]
    small = ["--min_word_freq", "1", "--workers", "0", "--output", "ready"]
    outcome, text = call("preparedataset", [*captions, *small, *FEATURES])
    assert outcome == "accepted", text
    random_captioner().float().save("it.pt")


def call(command, arguments):
    """Run a command in this process: (outcome, what it printed)."""
    module = COMMANDS[command]
    printed = io.StringIO()
    complaints = io.StringIO()
    before = list(sys.argv)
    sys.argv = [f"{command}.py", *map(str, arguments), "--device", "cpu"]
    outcome = "accepted"
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
            run(module.main)
    except SystemExit as ending:
        last = complaints.getvalue().rstrip().splitlines()[-1:]
        told = ending.code == 2 and last and "error: " in last[0]
        outcome = "accepted" if ending.code in (0, None) else "refused" if told else "odd ending"
    except BaseException:
        outcome = "traceback"
        complaints.write(traceback.format_exc())
    finally:
        sys.argv = before
    return outcome, complaints.getvalue()


def unreadable(folder):
    """The files of a folder that are torn: temporary ones, and those that cannot be read."""
    torn = []
    for path in sorted(Path(folder).rglob("*")):
        if path.is_dir():
            continue
        try:
            if path.name.startswith("."):
                raise ValueError("a temporary file")
            read(path)
        except Exception as error:
            torn.append(f"{path}: {error}")
    return torn


def read(path):
    """Read a file by its ending; any error if it is torn."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        for line in path.read_text().splitlines():
            json.loads(line)
    elif path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".pt":
        torch.load(path, weights_only=True)
    elif path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    elif path.suffix == ".h5":
        with h5py.File(path) as file:
            assert list(file)


# ----------------------------------------------------------------------------------------- damages


def flipped(content, rng):
    """Some bits of it are others."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def shortened(content, rng):
    """Its end is missing."""
    return content[: rng.randrange(len(content))]


def zeroed(content, rng):
    """A part of it is zeros."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 64, 4096)))
    return content[:start] + bytes(end - start) + content[end:]


def doubled(content, rng):
    """A part of it stands there twice."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.randrange(1, 200))
    return content[:end] + content[start:]


def other_text(content, rng):
    """Something else altogether."""
    odd = (b"", b"\n", b"{}", b"[]", b"null", b"\xff\xfe\x00", b"PK\x03\x04", b"[" * 5000, b"1e999")
    return rng.choice(odd)


BYTES = (flipped, shortened, zeroed, doubled, other_text)
ODD_VALUES = (
    None, True, -1, 0, 10**400, 1.5, float("nan"), float("inf"), "", "x", "\ud800", "../../etc",
    "a " * 5000, [], {}, [[]], [1, 2], {"a": 1},
)  # fmt: skip


def odd_json(content, rng):
    """A value somewhere in a JSON file is another, or missing."""
    data = json.loads(content)
    place = data
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = rng.choice(keys)
        deeper = place[key]
        if isinstance(deeper, (dict, list)) and deeper and rng.random() < 0.85:
            place = deeper
            continue
        if rng.random() < 0.15:
            del place[key]
        else:
            place[key] = rng.choice(ODD_VALUES)
        break
    return json.dumps(data).encode()


def odd_rows(content, rng):
    """A row of a CSV file is another."""
    rows = content.decode().splitlines()
    odd = ["", ",", '"', "9.png,A dog.,train", "../x.png,A dog.,val", "0.png,,train"]
    odd += ["0.png,a,nowhere", "0.png,\x00,train", "image,caption"]
    odd.append("0.png," + "dog " * 5000 + ",train")
    rows[rng.randrange(len(rows))] = rng.choice(odd)
    return "\n".join(rows).encode()


# ------------------------------------------------------------------------------------------- cases


def damaged_file(name, damages, command, arguments):
    """A case in which a file of the material is damaged before a command reads it."""

    def case(rng):
        path = Path(name)
        path.write_bytes(rng.choice(damages)(path.read_bytes(), rng))
        return command, arguments

    return case


def odd_image(rng):
    """A photograph of an unusual kind."""
    size = rng.choice(((1, 1), (1, 900), (3000, 2), (33, 47)))
    mode = rng.choice(("1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "F", "YCbCr"))
    ending = rng.choice((".png", ".tiff", ".gif", ".jpg", ".webp", ".bmp"))
    made = Image.new("RGB", size, "red")
    image = Image.new(mode, size) if mode in ("I;16", "F") else made.convert(mode)
    with contextlib.suppress(OSError, ValueError, KeyError):
        image.save(f"odd{ending}")
    more = rng.choice((".", "nowhere.png", "it.pt", "pipe"))
    if more == "pipe":
        os.mkfifo("pipe")
    named = f"odd{ending}" if Path(f"odd{ending}").exists() else more
    return "explain", [named, *EXPLAIN[1:]]


def odd_checkpoint(rng):
    """A captioner whose file holds an odd value."""
    checkpoint = torch.load("it.pt", weights_only=True)
    part = rng.choice(
        ("config", "config", "vocabulary", "state_dict", "training", "about", "format")
    )
    odd = (None, True, -1, 10**9, "x", [], {}, [1], {"a": 1}, float("nan"), torch.zeros(2))
    whole = checkpoint.get(part)
    if isinstance(whole, dict) and whole and rng.random() < 0.8:
        key = rng.choice(list(whole))
        if rng.random() < 0.2:
            del whole[key]
        elif isinstance(whole[key], torch.Tensor) and rng.random() < 0.5:
            whole[key] = whole[key] * float("nan")
        else:
            whole[key] = rng.choice(odd)
    elif isinstance(whole, list) and rng.random() < 0.8:
        whole[rng.randrange(len(whole))] = rng.choice(odd)
    else:
        checkpoint[part] = rng.choice(odd)
    torch.save(checkpoint, "it.pt")
    return rng.choice((("explain", EXPLAIN), ("evaluation", EVALUATE),
                       ("train", [*TRAIN, "--resume", "it.pt", "--cider_tune"])))  # fmt: skip


def odd_cache(rng):
    """Cached features of another shape or kind."""
    (path,) = Path("ready").glob("features-*.h5")
    with h5py.File(path, "a") as file:
        names = [name for name in file if isinstance(file[name], h5py.Dataset)]
        name = rng.choice(names)
        values = file[name][()]
        del file[name]
        odd = rng.choice(("missing", "shorter", "regions", "text", "nan", "float"))
        if odd == "shorter":
            file[name] = values[:1]
        elif odd == "regions" and values.ndim > 1:
            file[name] = values[:, :3]
        elif odd == "text":
            file[name] = "text"
        elif odd == "nan" and values.dtype.kind == "f":
            file[name] = np.full_like(values, np.nan)
        elif odd == "float":
            file[name] = values.astype(np.float64)
    return "train", TRAIN


def odd_flags(rng):
    """A value of a flag that makes no sense, or flags that do not go together."""
    command = rng.choice(("explain", "evaluation", "train", "preparedataset"))
    flags = {
        "explain": (EXPLAIN, ("--beam_size", "--max_length", "--method", "--words", "--figure",
                              "--html", "--target", "--position", "--scale", "--regions")),
        "evaluation": (EVALUATE, ("--limit", "--split", "--metrics", "--experiment", "--beam_size",
                                  "--decoding", "--temperature", "--workers", "--images")),
        "train": (TRAIN, ("--epochs", "--batch_size", "--decoder_lr", "--dropout", "--hidden_dim",
                          "--num_head", "--encoder", "--model_type", "--lrp_lambda", "--resume")),
        "preparedataset": (["--dataset", "csv", *PREPARE, "--captions", "raw/captions.csv"],
                           ("--max_length", "--min_word_freq", "--augment", "--stage", "--features",
                            "--batch_size", "--smallest_crop", "--root", "--captions")),
    }  # fmt: skip
    if command == "preparedataset":
        shutil.copytree("pets", "raw")
    arguments, names = flags[command]
    values = ("-1", "0", "x", "", "1e99", "nan", "999999999999", "../..", "lrp", "--", "é\u0301")
    return command, [*arguments, rng.choice(names), rng.choice(values)]


def moved(folder, name, damages, arguments):
    """A case of a raw dataset one of whose files is damaged."""

    def case(rng):
        shutil.copytree(folder, "raw")
        path = Path("raw") / name
        path.write_bytes(rng.choice(damages)(path.read_bytes(), rng))
        return "preparedataset", [*arguments, *PREPARE]

    return case


def prepared_files(rng):
    """A JSON file of a prepared folder is odd."""
    path = Path("ready") / rng.choice(("info.json", "train.json", "val.json", "vocabulary.json"))
    path.write_bytes(rng.choice((odd_json, odd_json, *BYTES))(path.read_bytes(), rng))
    return rng.choice((("train", TRAIN), ("evaluation", EVALUATE)))


def predictions(rng):
    """Captions from elsewhere, or their references, are odd."""
    write_predictions()
    name = rng.choice(("predictions.json", "references.json"))
    content = Path(name).read_bytes()
    Path(name).write_bytes(rng.choice((odd_json, odd_json, *BYTES))(content, rng))
    scored = ["--predictions", "predictions.json", "--annotations", "references.json"]
    return "evaluation", [*scored, "--metrics", "diversity", "--output", "out/scored"]


def write_predictions():
    """Captions in COCO's results format, and references in COCO's captions format."""
    ids = range(3)
    found = [{"image_id": number, "caption": f"a dog no {number}"} for number in ids]
    Path("predictions.json").write_text(json.dumps(found))
    sentences = []
    for number in ids:
        sentences.append({"image_id": number, "id": number, "caption": "A dog sits."})
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in ids]
    Path("references.json").write_text(json.dumps({"images": images, "annotations": sentences}))


COCO = ["--dataset", "coco2017"]
FLICKR = ["--dataset", "flickr8k"]
CSV = ["--dataset", "csv", "--captions", "raw/captions.csv"]
CASES = {
    "photograph, damaged": damaged_file("photo.png", BYTES, "explain", EXPLAIN),
    "photograph, unusual": odd_image,
    "checkpoint, damaged": damaged_file("it.pt", BYTES, "explain", EXPLAIN),
    "checkpoint, odd values": odd_checkpoint,
    "cache, odd": odd_cache,
    "prepared folder": prepared_files,
    "COCO captions": moved(
        "coco", "annotations/captions_train2017.json", (odd_json, odd_json, *BYTES), COCO
    ),
    "COCO instances": moved(
        "coco", "annotations/instances_train2017.json", (odd_json, odd_json, *BYTES), COCO
    ),
    "Karpathy's file": moved("flickr", "dataset_flickr8k.json", (odd_json, *BYTES), FLICKR),
    "captions, CSV": moved("pets", "captions.csv", (odd_rows, odd_rows, *BYTES), CSV),
    "predictions": predictions,
    "flags": odd_flags,
}


def try_case(material, kind, seed):
    """(outcome, what was printed) of a case, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        shutil.copytree(material, place)
        os.chdir(place)
        command, arguments = CASES[kind](random.Random(f"{kind} {seed}"))
        outcome, text = call(command, arguments)
        torn = unreadable("out") if Path("out").exists() else []
        os.chdir(material)
    line = f"{command} {' '.join(map(str, arguments))}"
    if torn:
        return "torn file", f"{line}\n{torn}"
    return outcome, f"{line}\n{text}"


# ------------------------------------------------------------------------------------------- kills

KILLED = {
    "explain": ["photo.png", "pets", "--checkpoint", "it.pt", "--output", "out"],
    "evaluation": [*EVALUATE, "--experiment", "word_ablation"],
    "preparedataset": [*PREPARE[2:], "--dataset", "csv", "--root", "pets", "--captions",
                       "pets/captions.csv", *FEATURES],
    "train": [*TRAIN, "--epochs", "30", "--checkpoint_every", "1"],
}  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
OWN_FILES = (".json", ".jsonl", ".pt", ".png", ".npz", ".h5", ".csv", ".html")


def try_kill(material, command, number, duration, rng):
    """(outcome, what was printed) of one kill; duration: of the whole command, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        shutil.copytree(material, place)
        line = [sys.executable, ROOT / f"{command}.py", *KILLED[command], "--device", "cpu"]
        process = subprocess.Popen(
            line,
            cwd=place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        time.sleep(duration * rng.uniform(0.3, 1))
        process.send_signal(SIGNALS[number % len(SIGNALS)])
        _, complaints = process.communicate(timeout=60)
        text = complaints.decode(errors="replace")
        left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout
        if left:
            return "process left", text
        if "Traceback" in text:
            return "traceback", text
        torn = [path for path in unreadable(place / "out") if "temporary" not in path]
        if torn:
            return "torn file", f"{torn}"
        again = subprocess.run(line, cwd=place, capture_output=True, text=True)
        torn = [path for path in unreadable(place / "out") if "temporary" not in path]
        if again.returncode or torn:
            return "not to be run again", f"{again.stderr}\n{torn}"
    return "passed", ""


def duration_of(material, command):
    """How long a whole command takes, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        shutil.copytree(material, place)
        line = [sys.executable, ROOT / f"{command}.py", *KILLED[command], "--device", "cpu"]
        started = time.perf_counter()
        done = subprocess.run(line, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return time.perf_counter() - started


# ------------------------------------------------------------------------------------- the command


def try_all(cases, kills, seed):
    """{kind: Counter of outcomes}; prints what went wrong, and a table."""
    table = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as material:
        write_material(material)
        kinds = list(CASES)
        for number in range(cases):
            kind = kinds[number % len(kinds)]
            outcome, text = try_case(material, kind, seed + number // len(kinds))
            table[kind][outcome] += 1
            if outcome not in ("accepted", "refused"):
                print(f"--- {kind}, {outcome}: {text}")
        rng = random.Random(seed)
        durations = {command: duration_of(material, command) for command in KILLED if kills}
        for number in range(kills):
            command = list(KILLED)[number % len(KILLED)]
            outcome, text = try_kill(
                material, command, number // len(KILLED), durations[command], rng
            )
            table[f"kill: {command}"][outcome] += 1
            if outcome != "passed":
                print(f"--- kill of {command}, {outcome}: {text}")
        os.chdir(ROOT)
    return table


def main():
    """Try all, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    table = try_all(args.cases, args.kills, args.seed)
    print("\n| what | tried | outcomes |\n|---|---|---|")
    for kind, outcomes in table.items():
        counts = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
        print(f"| {kind} | {outcomes.total()} | {counts} |")
    failed = 0
    for outcomes in table.values():
        failed += sum(outcomes.values()) - sum(outcomes[name] for name in GOOD)
    print(f"{failed} failed")
    return 1 if failed else 0


GOOD = ("accepted", "refused", "passed")

if __name__ == "__main__":
    sys.exit(main())
