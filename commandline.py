"""What every command shares, so that no script repeats it: one-line errors, device, seed, safe files, provenance.

A script ends with `run(main)`; a mistake of its user is raised as `UserError` anywhere below and becomes one line and exit code 2.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch


class UserError(Exception):
    """Something the user can mend; the message is one line that says what is wrong and what to do."""

    def __str__(self):
        return (
            super().__str__().splitlines()[-1].removeprefix("commandline.UserError: ")
        )  # a DataLoader worker adds its traceback


def run(main):
    """Call `main()`; print a UserError, or an OSError (a full disk, a folder that cannot be written), as one line on stderr and
    exit with 2, an interruption with 130."""
    try:
        main()
    except (UserError, OSError) as error:
        message = (str(error) or repr(error)).splitlines()[-1]
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(
            error
        ):  # on a CPU it has no class
            raise
        print(
            f"{Path(sys.argv[0]).name}: error: there is not enough memory; try a smaller --batch_size, or another --device",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class CommandLine(argparse.ArgumentParser):
    """A parser whose complaints are one line too, without the usage: that of a script of ours fills the screen."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def given(self, args):
        """The names of the flags that have another value than their default."""
        return [name for name, value in vars(args).items() if value != self.get_default(name)]

    def error(self, message):
        raise UserError(f"{message}; --help lists all flags")


def random_seed(text):
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**63 - 1")
    return int(text)


def add_common_flags(parser, seed=0):
    """Give an argparse parser the flags that all commands understand alike: --device and --seed."""
    parser.add_argument(
        "--device",
        help="where to compute, e.g. cpu, cuda, cuda:1 (default: cuda if there is one, else cpu)",
    )
    parser.add_argument(
        "--seed",
        type=random_seed,
        default=seed,
        help="the one source of randomness (default: %(default)s)",
    )


def choose_device(name=None):
    """The torch device called `name`; None means cuda if there is one, else cpu. UserError if it is not usable here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which "meta" has not
    except (RuntimeError, AssertionError):
        raise UserError(
            f"device '{name}' cannot be used on this machine; try --device cpu"
        ) from None
    return device


def set_seed(seed):
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def extended(stem, ending):
    """A path whose name goes on with `ending`. (Path.with_suffix would cut what follows the last dot of IMG.1 or lrp0.5.)"""
    return stem.with_name(stem.name + ending)


@contextmanager
def write_atomically(path):
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path, value):
    """Save what `torch.load(weights_only=True)` reads again to `path`, whole or not at all. UserError if there is no room for it."""
    with write_atomically(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # what PyTorch makes of a full disk
            raise UserError(f"{path} cannot be written ({str(error).splitlines()[0]})") from None


def write_json(path, value, indent=1):
    """Write `value` as JSON to `path`, whole or not at all."""
    with write_atomically(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_json(path):
    """The JSON in `path`, UTF-8 or UTF-16; UserError if it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise UserError(f"{path} is not a JSON file, or is cut off ({error})") from None


def file_hash(path):
    """The first 16 hex digits of the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def provenance(seed=None, checkpoint=None):
    """What a result needs to be made again: command line, seed, versions and the checkpoint's hash, as a dict."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "checkpoint": str(checkpoint) if checkpoint else None,
        "checkpoint_sha256": file_hash(checkpoint) if checkpoint else None,
    }
