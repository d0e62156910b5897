"""Turning a captioner's word probabilities into captions, for a batch of images at once.

Each decoder takes a captioner, region features (B, L, D) and the longest length in words, and returns for each of the B images a list of
captions: one, or several where it looks for several (a diverse beam one a group, sampling `num_captions`), each a list of word
ids without `<start>` and `<end>`. A captioner offers `look(features)`, `start(memory, n)` and `next_words(words, state, memory)`;
see captioner.py.
"""

import inspect

import torch
import torch.nn.functional as F

from commandline import UserError

BAD_ENDINGS = (
    "with",
    "in",
    "on",
    "of",
    "a",
    "at",
    "to",
    "for",
    "an",
    "this",
    "his",
    "her",
    "that",
    "the",
    "and",
)
COMPACT_BELOW = (
    0.75  # share of images still being captioned below which the others are dropped from the batch
)


@torch.no_grad()
def beam_search(captioner, features, max_length=20, beam_size=3, length_normalisation=0.0):
    """Beam search by total log-probability, as the paper decodes (3 beams, no length normalisation).

    A hypothesis that says `<end>` is set aside and its image goes on with one beam fewer. An image is done when no live
    hypothesis can still beat its best finished one. Without a finished one the best of `max_length` words is returned.
    length_normalisation: a finished hypothesis of n words, `<end>` included, is ranked by log-probability / n ** this.
    """
    return diverse_beam_search(
        captioner, features, max_length, beam_size, 1, 0.0, length_normalisation
    )


@torch.no_grad()
def diverse_beam_search(
    captioner, features, max_length=20, beam_size=3, groups=3, diversity=0.5, length_normalisation=0.0
):  # fmt: skip
    """Diverse beam search (Vijayakumar et al. 2016) with Hamming diversity: one caption a group, the best group's first.

    Each group is a beam search of `beam_size` beams. At every step the groups choose one after another, and a word counts
    `diversity` less for each beam of an earlier group that has chosen it at this very step. As in the authors' code what it lost stays
    lost, so captions are ranked by their log-probability less all of that.
    """
    batch, device, end = len(features), features.device, captioner.vocabulary.end
    memory = captioner.image_memory(features)
    state = captioner.initial_state(memory, groups)
    scores = torch.zeros(
        batch, groups, 1, device=device
    )  # one empty hypothesis; its `beam_size` best successors become the beams
    words = torch.full((batch, groups), captioner.vocabulary.start, device=device)
    sequences = words.new_empty(*words.shape, 0)
    live = words.new_full((batch, groups, 1), beam_size)
    best, best_scores = (
        words.new_full((batch, groups, max_length), end),
        scores.new_full((batch, groups), -torch.inf),
    )
    images = torch.arange(batch, device=device)  # those in the batch still
    for length in range(1, max_length + 1):
        log_probabilities, state = captioner.next_words(words, state, memory)
        scores, parents, words = _best_successors(
            scores, log_probabilities, live, beam_size, diversity
        )
        state = of_rows(state, torch.arange(len(parents), device=device).unsqueeze(1), parents)
        sequences = torch.cat([reorder(sequences, parents), words.unsqueeze(-1)], dim=-1)
        ended = (words == end).view_as(scores) & scores.isfinite()
        if ended.any():
            ranks = (scores * length**-length_normalisation).masked_fill(~ended, -torch.inf)
            _set_aside(best, best_scores, images, sequences, ranks)
            live, scores = live - ended.sum(-1, keepdim=True), scores.masked_fill(ended, -torch.inf)
        attainable = scores.amax(-1) * max_length**-length_normalisation
        going = (best_scores[images] < attainable).any(1)
        remaining = going.sum()
        if not remaining:
            break
        if remaining <= COMPACT_BELOW * len(going):
            images, words, sequences, scores, live = (
                part[going] for part in (images, words, sequences, scores, live)
            )
            memory, state = memory.of_images(going), of_rows(state, going)
    unfinished = best_scores[images].isinf().unsqueeze(-1)
    _set_aside(best, best_scores, images, sequences, scores.masked_fill(~unfinished, -torch.inf))
    best = reorder(best, best_scores.argsort(dim=1, descending=True))
    return [[_until(ids, end) for ids in captions] for captions in best.tolist()]


def _best_successors(scores, log_probabilities, live, beam_size, diversity):
    """scores (B, G, K) of the hypotheses and log-probabilities (B, G*K, V) of their next words -> the `beam_size` best of each
    group: scores (B, G, beam_size), -inf beyond its `live` (B, G, 1), and parents and words (B, G*beam_size)."""
    batch, groups, beams = scores.shape
    vocabulary = log_probabilities.shape[-1]
    totals = (scores.to(log_probabilities).flatten(1).unsqueeze(-1) + log_probabilities).view(
        batch, groups, -1
    )
    taken = totals.new_zeros(
        batch, vocabulary
    )  # how often earlier groups have chosen a word at this step
    chosen = []
    for group in range(groups):
        penalty = (diversity * taken).repeat(1, beams) if group else 0
        values, index = (totals[:, group] - penalty).topk(min(beam_size, totals.shape[-1]))
        missing = (
            0,
            beam_size - values.shape[-1],
        )  # a small vocabulary has not that many words to begin with
        values, index = F.pad(values, missing, value=-torch.inf), F.pad(index, missing)
        values = values.masked_fill(
            torch.arange(beam_size, device=live.device) >= live[:, group], -torch.inf
        )
        words = index % vocabulary
        if group < groups - 1:
            taken.scatter_add_(1, words, values.isfinite().to(taken))
        chosen.append((values, index // vocabulary + group * beams, words))
    values, parents, words = zip(*chosen)
    return torch.stack(values, dim=1), torch.cat(parents, dim=1), torch.cat(words, dim=1)


def _set_aside(best, best_scores, images, sequences, candidates):
    """Where a group's best candidate (B, G, K; -inf = none) beats its best so far, remember its sequence and score."""
    values, beams = candidates.max(dim=-1)
    rows, groups = (values > best_scores[images]).nonzero(as_tuple=True)
    best_scores[images[rows], groups] = values[rows, groups].to(best_scores)
    beams = beams[rows, groups] + groups * candidates.shape[-1]
    best[images[rows], groups, : sequences.shape[-1]] = sequences[rows, beams]


@torch.no_grad()
def say(captioner, features, max_length, num_captions, choose):
    """Say `num_captions` captions of every image word by word: `choose` maps log-probabilities (B, N, V) to words (B, N)."""
    batch, end = len(features), captioner.vocabulary.end
    memory = captioner.image_memory(features)
    state = captioner.initial_state(memory, num_captions)
    words = torch.full((batch, num_captions), captioner.vocabulary.start, device=features.device)
    ended, images = (
        torch.zeros_like(words, dtype=torch.bool),
        torch.arange(batch, device=features.device),
    )
    said = words.new_full((batch, num_captions, max_length), end)
    for position in range(max_length):
        log_probabilities, state = captioner.next_words(words, state, memory)
        words = choose(log_probabilities)
        said[images, :, position] = words
        ended |= words == end
        going = ~ended.all(1)
        remaining = going.sum()
        if not remaining:
            break
        if remaining <= COMPACT_BELOW * len(going):
            images, words, ended = images[going], words[going], ended[going]
            memory, state = memory.of_images(going), of_rows(state, going)
    return [[_until(ids, end) for ids in captions] for captions in said.tolist()]


def greedy(captioner, features, max_length=20):
    """The likeliest next word at every step, until `<end>` or `max_length` words."""
    return say(
        captioner, features, max_length, 1, lambda log_probabilities: log_probabilities.argmax(-1)
    )


def multinomial(captioner, features, max_length=20, num_captions=1, temperature=1.0):
    """Words drawn from p ** (1 / temperature), renormalised."""
    return say(captioner, features, max_length, num_captions, lambda logp: draw(logp / temperature))


def gumbel(captioner, features, max_length=20, num_captions=1, temperature=1.0):
    """As `multinomial`, by the likeliest word under Gumbel noise: argmax of log p / temperature + noise."""

    def choose(log_probabilities):
        noise = -torch.empty_like(log_probabilities).exponential_().log()
        return (log_probabilities / temperature + noise).argmax(-1)

    return say(captioner, features, max_length, num_captions, choose)


def top_k(captioner, features, max_length=20, num_captions=1, temperature=1.0, top_k=10):
    """Words drawn from the `top_k` likeliest (Fan et al. 2018)."""
    return say(
        captioner,
        features,
        max_length,
        num_captions,
        lambda logp: draw(keep_top_k(logp / temperature, top_k)),
    )


def nucleus(captioner, features, max_length=20, num_captions=1, temperature=1.0, top_p=0.9):
    """Words drawn from the fewest likeliest ones that together have the probability `top_p` (Holtzman et al. 2020)."""
    return say(
        captioner,
        features,
        max_length,
        num_captions,
        lambda logp: draw(keep_nucleus(logp / temperature, top_p)),
    )


def draw(logits):
    """Words (B, N) drawn from the softmax of logits (B, N, V). UserError if they are not numbers: a training has diverged."""
    probabilities = logits.softmax(-1).flatten(0, 1)
    if probabilities.isnan().any():
        raise UserError(
            "the captioner's probabilities are not numbers; the last checkpoint is whole; try a lower --decoder_lr"
        )
    return torch.multinomial(probabilities, 1).view(logits.shape[:-1])


def keep_top_k(logits, k):
    """logits (..., V) with all but the k largest at -inf."""
    values, index = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, values)


def keep_nucleus(logits, p):
    """logits (..., V) with -inf outside of the nucleus: the shortest prefix of the words by falling probability whose mass
    reaches p; the first word is always in it."""
    values, index = logits.sort(dim=-1, descending=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return torch.full_like(logits, -torch.inf).scatter(
        -1, index, values.masked_fill(before >= p, -torch.inf)
    )


def reorder(sequences, index):
    """sequences (..., K, T) with the second last dimension picked by index (..., K)."""
    return sequences.gather(-2, index.unsqueeze(-1).expand(*index.shape, sequences.shape[-1]))


def of_rows(state, *index):
    """A state, a tuple of tensors (B, ...), with every tensor indexed."""
    return tuple(part[index] for part in state)


def strip_bad_endings(words):
    """The words without a preposition, article or "and" at their end; unchanged if nothing else would be left."""
    stripped = list(words)
    while stripped and stripped[-1] in BAD_ENDINGS:
        stripped.pop()
    return stripped or words


def strip_repeats(words):
    """The words without those that only repeat the word before them."""
    return [word for index, word in enumerate(words) if index == 0 or word != words[index - 1]]


def _until(ids, end):
    return ids[: ids.index(end)] if end in ids else ids


DECODERS = {
    "beam": beam_search,
    "diverse_beam": diverse_beam_search,
    "greedy": greedy,
    "multinomial": multinomial,
    "gumbel": gumbel,
    "top_k": top_k,
    "nucleus": nucleus,
}
STRIP = {
    "repeats": strip_repeats,
    "bad_endings": strip_bad_endings,
}  # what may be removed from a finished caption
OPTIONS = {  # of the decoders that take them: type, least and largest value, help
    "beam_size": (int, 1, 10**6, "beams, of each group"),
    "groups": (int, 1, 10**6, "groups of a diverse beam"),
    "diversity": (
        float,
        0,
        10**6,
        "what a word loses for each beam of an earlier group that chose it at the same step",
    ),
    "length_normalisation": (
        float,
        0,
        100,
        "rank finished beams of n words by log-probability / n ** this",
    ),
    "num_captions": (int, 1, 10**6, "captions drawn for an image; the first is used"),
    "temperature": (float, 0.001, 10**6, "divides log-probabilities before a word is drawn"),
    "top_k": (int, 1, 10**6, "likeliest words to draw from"),
    "top_p": (float, 0.001, 1, "probability of the likeliest words to draw from"),
}


def options_of(method):
    """{option: its default} of a decoder. UserError if there is no such decoder."""
    if method not in DECODERS:
        raise UserError(f"there is no decoding '{method}'; choose from {', '.join(DECODERS)}")
    parameters = inspect.signature(DECODERS[method]).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name in OPTIONS}


def check_option(method, name, value):
    """UserError unless the decoder has this option and the value makes sense."""
    if name not in options_of(method):
        takers = [decoder for decoder in DECODERS if name in options_of(decoder)]
        raise UserError(
            f"--{name} does not go with --decoding {method}; it is for {', '.join(takers) or 'no decoding'}"
        )
    _, least, most, _ = OPTIONS[name]
    if not least <= value <= most:
        raise UserError(f"--{name} must be from {least} to {most}, not {value}")


def add_decoding_flags(parser, max_length=None):
    """Give an argparse parser the flags of how to caption: --decoding, --max_length and what the decoders take. max_length: the
    default; None means the captioner's own."""
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--decoding", choices=DECODERS, default="beam", help="how to caption (default: %(default)s)"
    )
    shown = "the captioner's own" if max_length is None else max_length
    group.add_argument(
        "--max_length",
        type=int,
        default=max_length,
        help=f"words of the longest caption (default: {shown})",
    )
    for name, (kind, *_, text) in OPTIONS.items():
        takers = {
            method: options_of(method)[name] for method in DECODERS if name in options_of(method)
        }
        default = next(iter(takers.values()))
        group.add_argument(
            f"--{name}", type=kind, help=f"{text} ({', '.join(takers)}; default: {default})"
        )
    group.add_argument(
        "--strip",
        nargs="+",
        choices=STRIP,
        help="drop repeated words, or prepositions and articles at the end",
    )


def decoding_options(args):
    """What a captioner's `caption` and `decode` take, from the flags of `add_decoding_flags`; only those that were given."""
    names = ("max_length", "strip", *OPTIONS)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in given.keys() & OPTIONS.keys():
        check_option(args.decoding, name, given[name])
    if args.max_length is not None and not 1 <= args.max_length <= 1000:
        raise UserError("--max_length must be from 1 to 1000")
    return {"method": args.decoding, **given}
