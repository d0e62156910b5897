"""The options of the decoders, as a table, and the flags of commands that are made of it.

decoding.py has the decoders themselves.
"""

from dataclasses import replace

from commandline import Flag, UserError, add_flags, check_limits
from names import DECODERS, STRIP

BEAMS = ("beam", "diverse_beam")
SAMPLING = ("multinomial", "gumbel", "top_k", "nucleus")
_OPTIONS = [
    Flag("beam_size", "beams, of each group", default=3, limits=(1, 10**6), modes=BEAMS),
    Flag(
        "groups",
        "groups of a diverse beam",
        default=3,
        limits=(1, 10**6),
        modes=("diverse_beam",),
    ),
    Flag(
        "diversity",
        "what a word loses for each beam of an earlier group that chose it at the same step",
        default=0.5,
        limits=(0, 10**6),
        modes=("diverse_beam",),
    ),
    Flag(
        "length_normalisation",
        "rank finished beams of n words by log-probability / n ** this",
        default=0.0,
        limits=(0, 100),
        modes=BEAMS,
    ),
    Flag(
        "num_captions",
        "captions drawn for an image; the first is used",
        default=1,
        limits=(1, 10**6),
        modes=SAMPLING,
    ),
    Flag(
        "temperature",
        "divides log-probabilities before a word is drawn",
        default=1.0,
        limits=(0.001, 10**6),
        modes=SAMPLING,
    ),
    Flag("top_k", "likeliest words to draw from", default=10, limits=(1, 10**6), modes=("top_k",)),
    Flag(
        "top_p",
        "probability of the likeliest words to draw from",
        default=0.9,
        limits=(0.001, 1),
        modes=("nucleus",),
    ),
]
# The options of the decoders by name, each with its default; `modes` are the decoders that take it.
OPTIONS = {option.name: option for option in _OPTIONS}


def options_of(method):
    """{name: row of OPTIONS} of a decoding method. UserError if there is no such method."""
    if method not in DECODERS:
        raise UserError(f"there is no decoding '{method}'; choose from {', '.join(DECODERS)}")
    return {name: option for name, option in OPTIONS.items() if method in option.modes}


def check_options(method, options):
    """Raise a UserError unless a decoding method takes these options. options: {name: value}."""
    own = options_of(method)
    for name, value in options.items():
        if name not in OPTIONS:
            raise UserError(
                f"there is no option '{name}' of decoding; there are {', '.join(OPTIONS)}"
            )
        if name not in own:
            raise UserError(
                f"the decoding method '{method}' has no option '{name}'; "
                f"that is an option of {', '.join(OPTIONS[name].modes)}"
            )
        least, greatest = own[name].limits
        if not least <= value <= greatest:
            raise UserError(f"{name} must be from {least} to {greatest}, not {value}")


def decoding_flags(max_length=None):
    """The table of a command's flags of how to caption.

    max_length: the default; None means the captioner's own. Only what a user gives of OPTIONS is
    passed on, so these flags have no value of their own.
    """
    flags = [
        Flag("decoding", "how to caption", default="beam", choices=DECODERS),
        Flag(
            "max_length",
            "words of the longest caption",
            default=max_length,
            type=int,
            limits=(1, 1000),
            shown="the captioner's own" if max_length is None else None,
        ),
    ]
    for option in OPTIONS.values():
        flags.append(
            replace(
                option,
                help=f"{option.help}, for {' or '.join(option.modes)}",
                default=None,
                type=type(option.default),
                shown=option.default,
                modes=(),
            )
        )
    flags.append(
        Flag(
            "strip",
            "drop repeated words, or prepositions and articles at the end",
            choices=STRIP,
            nargs="+",
            shown="nothing",
        )
    )
    return flags


def add_decoding_flags(parser, max_length=None):
    """Give an argparse parser a group of the flags of `decoding_flags`."""
    add_flags(parser.add_argument_group("decoding"), decoding_flags(max_length))


def decoding_options(args):
    """What a captioner's `caption` and `decode` take, of the flags of `add_decoding_flags`.

    It holds what the user gave. UserError for an option that the method does not have, or a value
    that makes no sense.
    """
    values = vars(args)
    given = {}
    for name in ("max_length", "strip", *OPTIONS):
        if values[name] is not None:
            given[name] = values[name]
    options = {name: value for name, value in given.items() if name in OPTIONS}
    check_limits({"max_length": args.max_length, **options}, decoding_flags())
    check_options(args.decoding, options)
    return {"method": args.decoding, **given}
