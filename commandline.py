"""What every command shares, so that no script repeats it: one-line errors, the table of flags, the
device, the seed, safe files, and what a result needs to be made again.

A script ends with `run(main)`. A mistake of its user is raised as `UserError` anywhere below, and
becomes one line and exit code 2.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import random
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# PyTorch takes more than a second to import, so only what needs it imports it. Nothing that has to
# be installed is imported here, so that `run` can say that it is not.

# The weights that are in the repository, by their paths in it: two captioners and an inpainter.
SHIPPED = (
    "checkpoints/flickr8k.pt",
    "checkpoints/scenes-gridtd.pt",
    "checkpoints/inpainting-flickr8k.pt",
)


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do."""

    def __str__(self):
        # A DataLoader's worker puts its traceback before the message, and the class's name too.
        name = f"{type(self).__module__}.{type(self).__qualname__}: "
        lines = super().__str__().splitlines() or [""]
        return lines[-1].removeprefix(name)


def run(main):
    """Call `main()` and turn what the user can mend into one line on stderr and exit code 2.

    That is a UserError, an OSError (a full disk, a folder that cannot be written), a package that
    is not installed, and a lack of memory. An interruption ends with exit code 130.
    """
    os.environ.pop("MPLBACKEND", None)  # no window is opened, and an unknown one is an error
    try:
        main()
    except (UserError, OSError) as error:
        _exit_with_error((str(error) or repr(error)).splitlines()[-1])
    except ModuleNotFoundError as error:
        _exit_with_error(
            f"{error.name} is not installed for this Python; call `make` once and then "
            "`. .venv/bin/activate`, or `pip install .`"
        )
    except RuntimeError as error:
        import torch

        # On a CPU the lack of memory has no class of its own.
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if not out_of_memory and "not enough memory" not in str(error):
            raise
        _exit_with_error(
            "there is not enough memory; try a smaller --batch_size, or another --device"
        )
    except KeyboardInterrupt:
        sys.exit(130)


def _exit_with_error(message):
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


@dataclass(frozen=True)
class Flag:
    """One flag of a command. A command declares its flags once, in a table of these.

    name      without the dashes; also the attribute of the parsed arguments
    help      one line, to which the default is added
    default   the value if the flag is not given. Unless `type` says otherwise, its type is the
              flag's type; False or True makes a pair --name and --no-name
    switch    whether there is only --name, which turns False into True
    type      a function of the text, where the default does not tell it
    choices   the values that are allowed
    limits    the least and the greatest value that are allowed
    nargs, metavar   as argparse has them
    shown     what the help says of the default, where the value itself would not help
    modes     the modes of the command that read this flag; empty: all of them
    repeated  whether a run that goes on with an interrupted one has to repeat the value
    alias     another spelling, without the dashes: the one that another command has
    """

    name: str
    help: str
    default: object = None
    switch: bool = False
    type: object = None
    choices: object = None
    limits: tuple = (-math.inf, math.inf)
    nargs: str | None = None
    metavar: str | None = None
    shown: str | None = None
    modes: tuple = ()
    repeated: bool = False
    alias: str | None = None


def add_flags(parser, flags):
    """Give an argparse parser, or a group of one, the flags of a table."""
    for flag in flags:
        shown = "%(default)s" if flag.shown is None else flag.shown
        options = {"default": flag.default, "help": f"{flag.help} (default: {shown})"}
        if flag.switch:
            options = {"action": "store_true", "help": flag.help}
        elif isinstance(flag.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = flag.type or (str if flag.default is None else type(flag.default))
            options["choices"] = flag.choices
            options["nargs"] = flag.nargs
            options["metavar"] = flag.metavar
        spellings = [f"--{flag.name}"]
        if flag.alias:
            spellings.append(f"--{flag.alias}")
        parser.add_argument(*spellings, **options)


def check_limits(values, flags):
    """Raise a UserError for a number outside of its flag's limits.

    values: {name: value}, of which only numbers have limits.
    """
    for flag in flags:
        least, greatest = flag.limits
        value = values.get(flag.name)
        if not isinstance(value, (int, float)) or least <= value <= greatest:
            continue
        if greatest == math.inf:
            raise UserError(f"--{flag.name} must be at least {least}, not {value}")
        raise UserError(f"--{flag.name} must be from {least} to {greatest}, not {value}")


def check_modes(given, flags, mode, names):
    """Raise a UserError for a flag that the mode does not read.

    given: names of the flags that the user gave; names: {mode: how the message calls it}.
    """
    for flag in flags:
        if flag.name in given and flag.modes and mode not in flag.modes:
            readers = " or ".join(names[reader] for reader in flag.modes)
            raise UserError(f"--{flag.name} goes with {readers} only")


class CommandLine(argparse.ArgumentParser):
    """A parser whose complaints are one line; argparse's own usage would fill a screen."""

    def __init__(self, **options):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    def given(self, args):
        """The names of the flags whose value is not their default."""
        return [name for name, value in vars(args).items() if value != self.get_default(name)]

    def error(self, message):
        """Raise the complaint as a UserError."""
        raise UserError(f"{message}; --help lists all flags")


def random_seed(text):
    """The seed that a text spells; an argparse error if PyTorch would not take it."""
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**63 - 1")
    return int(text)


COMMON_FLAGS = [
    Flag(
        "device",
        "where to compute, e.g. cpu, cuda, cuda:1",
        shown="cuda if there is one, else cpu",
    ),
    Flag("seed", "the one source of randomness", default=0, type=random_seed, repeated=True),
]


def add_common_flags(parser):
    """Give an argparse parser the flags that all commands understand alike: --device and --seed."""
    add_flags(parser, COMMON_FLAGS)


def choose_device(name=None):
    """The torch device called `name`; by default the first GPU if there is one, else the CPU.

    UserError if it cannot be used on this machine.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the device "meta" has no values
    except (RuntimeError, AssertionError):
        message = f"device '{name}' cannot be used on this machine; try --device cpu"
        raise UserError(message) from None
    return device


def set_seed(seed):
    """Seed Python, NumPy and PyTorch (all devices)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def extended(stem, ending):
    """The path `stem` with an ending added to its name.

    (Path.with_suffix would cut off what follows the last dot of IMG.1 or lrp0.5.)
    """
    return stem.with_name(stem.name + ending)


def temporary_path(path):
    """Where this process writes a file before it is renamed to `path`."""
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


def remove_leftovers(path):
    """Remove the temporary files that killed processes left of `path`."""
    for leftover in path.parent.glob(".*"):
        stem, _, process = leftover.stem.rpartition(".")
        if stem == f".{path.stem}" and process.isdigit() and leftover.suffix == path.suffix:
            leftover.unlink()


@contextmanager
def write_atomically(path):
    """Yield a temporary path beside `path`; rename it on success, remove it on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output_folder(folder):
    """Raise a UserError unless files can be written into `folder`, which need not exist yet.

    It is found out by trying, in the folder or in the nearest one above it that exists.
    """
    folder = Path(folder)
    nearest = folder
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"{nearest} is not a folder, so nothing can be written into {folder}")
    try:
        with tempfile.TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"nothing can be written into {folder} ({error.strerror})") from None


def require_writable(path):
    """UserError unless a file can be written at `path`, whose folder need not be there yet.

    Nothing is left behind. It is for a command that writes late, to complain early.
    """
    path = Path(path)
    try:
        path.exists()  # fails for a name that is too long
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None
    check_output_folder(path.parent)


def write_tensors(path, value):
    """Save to `path`, whole or not at all, what `torch.load(weights_only=True)` reads again.

    UserError if there is no room for it.
    """
    import torch

    with write_atomically(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # PyTorch's word for a full disk
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be written ({reason})") from None


def write_json(path, value, indent=1):
    """Write `value` as JSON to `path`, whole or not at all."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    with write_atomically(path) as temporary:
        # A file's name may hold bytes that are no UTF-8; they become question marks.
        temporary.write_text(text, encoding="utf-8", errors="replace")


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


def find_checkpoint(path):
    """The path of a checkpoint: as given, or, where no such file is, that of the one that ships.

    So the files of SHIPPED are found from any folder by the names that they have in the
    repository. A file that a user has under such a name comes first.
    """
    path = Path(path)
    if path.as_posix() in SHIPPED and not path.exists():
        return Path(__file__).parent / path
    return path


def checkpoint_hash(path):
    """The hash of a checkpoint, of all files of a folder, or None for what is not on this disk."""
    path = Path(path)
    if not path.is_dir():
        return file_hash(path) if path.exists() else None
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file():
            digest.update(f"{file.name} {file_hash(file)}".encode())
    return digest.hexdigest()[:16]


def provenance(seed=None, checkpoint=None):
    """What a result needs to be made again, as a dict.

    It holds the command line, the seed, the versions, and the checkpoint's path and hash.
    """
    import numpy
    import torch

    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": numpy.__version__,
        },
        "checkpoint": str(checkpoint) if checkpoint else None,
        "checkpoint_sha256": checkpoint_hash(find_checkpoint(checkpoint)) if checkpoint else None,
    }
