"""Imports that wait until a command has read its command line.

PyTorch and what is built on it take seconds to import, and neither --help nor a mistyped flag needs
any of it. A command lists such imports in a block at its top,

    with after_parsing(globals()):
        import torch
        from captioner import load_captioner

and when it is run, their names are stand-ins until it calls `import_what_waits()`, after it has
read and checked its flags. A stand-in that is called before that does the same. Where another
module or a test imports the command's module, the block does nothing, and these are imports like
any other.

Python 3.15 has this in the language, as `lazy import` (PEP 810).
"""

import builtins
import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

_waiting = []  # the namespaces of the modules in which names still are stand-ins


class StandIn:
    """What stands for a module, or for a name in it, that is not imported yet."""

    def __init__(self, module, name=None):
        self._module = module
        self._name = name

    def __getattr__(self, name):
        return StandIn(self._module, name)

    def __call__(self, *arguments, **options):
        """Import all that waits, and call what it stands for."""
        import_what_waits()
        return self._imported()(*arguments, **options)

    def _imported(self):
        """What it stands for."""
        if self._name is None:
            return importlib.import_module(self._module)
        # With a list of names, __import__ also imports one that is a module in a package.
        return getattr(__import__(self._module, fromlist=[self._name]), self._name)


@contextmanager
def after_parsing(namespace):
    """Make the imports inside wait, if the module is run as a command.

    namespace: the module's globals().
    """
    if not _is_command(namespace["__name__"]):
        yield
        return
    import_now = builtins.__import__
    builtins.__import__ = lambda module, *_, **__: StandIn(module)
    try:
        yield
    finally:
        builtins.__import__ = import_now
    _waiting.append(namespace)


def _is_command(module):
    """Whether a module of this name is what is run: `python explain.py`, or lrp-explain."""
    return module == "__main__" or Path(sys.argv[0]).name.startswith("lrp-")


def import_what_waits():
    """Import all that waits, and put it where the stand-ins are."""
    while _waiting:
        namespace = _waiting.pop()
        for name, value in list(namespace.items()):
            if isinstance(value, StandIn):
                namespace[name] = value._imported()
