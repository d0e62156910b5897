"""Decoding: captions from a captioner's word probabilities, for a batch of images at once.

A decoder takes a captioner, region features (B, L, D), the length of the longest caption in words,
and its own options. It returns for each of the B images a list of captions: one, or several where
it looks for several (a diverse beam search finds one a group, sampling draws `num_captions`). A
caption is a list of token ids without `<start>` and `<end>`.

Of a captioner a decoder uses its vocabulary, `image_memory(features)`, `initial_state(memory, n)`
and `next_words(token_ids, state, memory)`; see basemodel.py. `decode` calls a decoder by its name;
`captioned` and `decode_split` caption a whole split of a dataset, `caption_files` image files.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
from commandline import UserError
from decodingflags import check_options, options_of
from encoder import CutEncoder, eval_view
from images import image_transform, load_image

BAD_ENDINGS = (
    *("with", "in", "on", "of", "at", "to", "for"),
    *("a", "an", "this", "his", "her", "that", "the", "and"),
)
# Images are dropped from the batch when no more than this fraction of it is still being captioned.
COMPACT_BELOW = 0.75


@torch.no_grad()
def beam_search(captioner, features, max_length, beam_size, length_normalisation):
    """Beam search by total log-probability; the paper has 3 beams and no length normalisation (0).

    A hypothesis that says `<end>` is set aside and its image goes on with one beam fewer. An image
    is done when no live hypothesis can still beat its best finished one. If none has finished, the
    best one of `max_length` words is returned.

    length_normalisation: a finished hypothesis of n words, `<end>` included, is ranked by
    log-probability / n ** length_normalisation.
    """
    return diverse_beam_search(
        captioner,
        features,
        max_length,
        beam_size,
        groups=1,
        diversity=0.0,
        length_normalisation=length_normalisation,
    )


@torch.no_grad()
def diverse_beam_search(
    captioner, features, max_length, beam_size, groups, diversity, length_normalisation
):
    """Diverse beam search (Vijayakumar et al. 2016) with Hamming diversity.

    Returns one caption for each group, the best group's first. Each group is a beam search of
    `beam_size` beams. At every step the groups choose one after another, and a word loses
    `diversity` for each beam of an earlier group that has chosen it at this very step. As in the
    authors' code a hypothesis never regains what it lost, so captions are ranked by their
    log-probability less all of these penalties.
    """
    beams = _Beams.at_start(captioner, features, beam_size, groups)
    finished = _BestCaptions(beams, max_length, captioner.vocabulary.end)
    for length in range(1, max_length + 1):
        beams.extend(captioner, beam_size, diversity)
        ended = beams.ended(captioner.vocabulary.end)
        if ended.any():
            ranks = beams.scores * length**-length_normalisation
            finished.keep(beams, ranks.masked_fill(~ended, -torch.inf))
            beams.retire(ended)
        attainable = beams.scores.amax(-1) * max_length**-length_normalisation  # (B, G)
        going = (finished.scores[beams.images] < attainable).any(1)
        remaining = going.sum()
        if not remaining:
            break
        if remaining <= COMPACT_BELOW * len(going):
            beams.keep_images(going)
    unfinished = finished.scores[beams.images].isinf().unsqueeze(-1)
    finished.keep(beams, beams.scores.masked_fill(~unfinished, -torch.inf))
    return finished.captions()


@dataclass
class _Beams:
    """The hypotheses of B images: G groups of K beams each.

    images      (B,) the rows of these images in the batch that was given
    scores      (B, G, K) log-probability less the penalties for what earlier groups chose; -inf
                where there is no hypothesis
    sequences   (B, G*K, T) the T token ids that each hypothesis has said
    token_ids   (B, G*K) the last of them, at first `<start>`
    live        (B, G, 1) the number of beams that a group goes on with
    memory      the captioner's, of these images
    state       the captioner's, of these hypotheses
    """

    images: torch.Tensor
    scores: torch.Tensor
    sequences: torch.Tensor
    token_ids: torch.Tensor
    live: torch.Tensor
    memory: object
    state: tuple

    @classmethod
    def at_start(cls, captioner, features, beam_size, groups):
        """One empty hypothesis for each group; its best successors become the beams."""
        batch = len(features)
        device = features.device
        memory = captioner.image_memory(features)
        token_ids = torch.full((batch, groups), captioner.vocabulary.start, device=device)
        return cls(
            images=torch.arange(batch, device=device),
            scores=torch.zeros(batch, groups, 1, device=device),
            sequences=token_ids.new_empty(batch, groups, 0),
            token_ids=token_ids,
            live=token_ids.new_full((batch, groups, 1), beam_size),
            memory=memory,
            state=captioner.initial_state(memory, groups),
        )

    def extend(self, captioner, beam_size, diversity):
        """Replace the hypotheses of each group by the best that are one word longer."""
        log_probabilities, state = captioner.next_words(self.token_ids, self.state, self.memory)
        self.scores, parents, self.token_ids = _best_successors(
            self.scores, log_probabilities, self.live, beam_size, diversity
        )
        images = torch.arange(len(parents), device=parents.device).unsqueeze(1)
        self.state = of_rows(state, images, parents)
        said = reorder(self.sequences, parents)
        self.sequences = torch.cat([said, self.token_ids.unsqueeze(-1)], dim=-1)

    def ended(self, end):
        """Which hypotheses have just said `<end>`: bool (B, G, K)."""
        # (B, G*K) -> (B, G, K)
        return (self.token_ids == end).view_as(self.scores) & self.scores.isfinite()

    def retire(self, ended):
        """Go on without the hypotheses that have ended, and with as many beams fewer."""
        self.live = self.live - ended.sum(-1, keepdim=True)
        self.scores = self.scores.masked_fill(ended, -torch.inf)

    def keep_images(self, going):
        """Go on without the images that are done; going: bool (B,)."""
        self.images = self.images[going]
        self.scores = self.scores[going]
        self.sequences = self.sequences[going]
        self.token_ids = self.token_ids[going]
        self.live = self.live[going]
        self.memory = self.memory.of_images(going)
        self.state = of_rows(self.state, going)


def _best_successors(scores, log_probabilities, live, beam_size, diversity):
    """The `beam_size` best continuations of each group.

    scores (B, G, K) of the hypotheses, log_probabilities (B, G*K, V) of their next words, live
    (B, G, 1) beams of each group -> scores (B, G, beam_size), -inf beyond the group's live beams,
    and the continued hypotheses and their new token ids, (B, G*beam_size) each.
    """
    batch, groups, beams = scores.shape
    vocabulary = log_probabilities.shape[-1]
    # (B, G, K) -> (B, G*K, 1)
    totals = scores.to(log_probabilities).flatten(1).unsqueeze(-1) + log_probabilities
    totals = totals.view(batch, groups, -1)  # (B, G*K, V) -> (B, G, K*V)
    taken = totals.new_zeros(batch, vocabulary)  # how many beams have chosen a word at this step
    chosen = []
    for group in range(groups):
        candidates = totals[:, group]  # (B, K*V)
        if group > 0:
            candidates = candidates - (diversity * taken).repeat(1, beams)
        values, index = _largest(candidates, beam_size)
        beam = torch.arange(beam_size, device=live.device)
        values = values.masked_fill(beam >= live[:, group], -torch.inf)
        token_ids = index % vocabulary
        parents = index // vocabulary + group * beams
        chosen.append((values, parents, token_ids))
        if group < groups - 1:
            taken.scatter_add_(1, token_ids, values.isfinite().to(taken))
    values, parents, token_ids = zip(*chosen)
    return torch.stack(values, dim=1), torch.cat(parents, dim=1), torch.cat(token_ids, dim=1)


def _largest(candidates, count):
    """The `count` largest of candidates (B, C), and where they are: (B, count) each.

    A small vocabulary has fewer candidates to begin with; the rest is then -inf.
    """
    values, index = candidates.topk(min(count, candidates.shape[-1]))
    missing = (0, count - values.shape[-1])
    return F.pad(values, missing, value=-torch.inf), F.pad(index, missing)


class _BestCaptions:
    """The best caption so far of each group of each image: sequences (B, G, T), scores (B, G)."""

    def __init__(self, beams, max_length, end):
        self.end = end
        self.scores = beams.scores.new_full(beams.token_ids.shape, -torch.inf)
        self.sequences = beams.token_ids.new_full((*beams.token_ids.shape, max_length), end)

    def keep(self, beams, ranks):
        """Remember a group's hypothesis of the highest rank where it beats the best one so far.

        ranks: (B, G, K), -inf for a hypothesis that does not take part.
        """
        values, best = ranks.max(dim=-1)  # (B, G)
        rows, groups = (values > self.scores[beams.images]).nonzero(as_tuple=True)
        images = beams.images[rows]
        self.scores[images, groups] = values[rows, groups].to(self.scores)
        best = best[rows, groups] + groups * ranks.shape[-1]
        length = beams.sequences.shape[-1]
        self.sequences[images, groups, :length] = beams.sequences[rows, best]

    def captions(self):
        """For each image the captions of its groups, lists of token ids, the best group's first."""
        order = self.scores.argsort(dim=1, descending=True)
        return _up_to_end(reorder(self.sequences, order), self.end)


@torch.no_grad()
def generate(captioner, features, max_length, num_captions, choose):
    """Say `num_captions` captions of every image, word by word.

    choose: a function of log-probabilities (B, N, V) that returns the next token ids (B, N).
    """
    end = captioner.vocabulary.end
    memory = captioner.image_memory(features)
    state = captioner.initial_state(memory, num_captions)
    shape = (len(features), num_captions)
    token_ids = torch.full(shape, captioner.vocabulary.start, device=features.device)
    # The rows, in the batch that was given, of the images that are still in it.
    images = torch.arange(len(features), device=features.device)
    ended = torch.zeros_like(token_ids, dtype=torch.bool)
    said = token_ids.new_full((*shape, max_length), end)
    for position in range(max_length):
        log_probabilities, state = captioner.next_words(token_ids, state, memory)
        token_ids = choose(log_probabilities)
        said[images, :, position] = token_ids
        ended |= token_ids == end
        going = ~ended.all(1)
        remaining = going.sum()
        if not remaining:
            break
        if remaining <= COMPACT_BELOW * len(going):
            images = images[going]
            token_ids = token_ids[going]
            ended = ended[going]
            memory = memory.of_images(going)
            state = of_rows(state, going)
    return _up_to_end(said, end)


def greedy(captioner, features, max_length):
    """The likeliest next word at every step, until `<end>` or `max_length` words."""
    return generate(captioner, features, max_length, 1, likeliest)


def multinomial(captioner, features, max_length, num_captions, temperature):
    """Words drawn from p ** (1 / temperature), renormalised."""

    def choose(log_probabilities):
        return draw(log_probabilities / temperature)

    return generate(captioner, features, max_length, num_captions, choose)


def gumbel(captioner, features, max_length, num_captions, temperature):
    """As `multinomial`, by the likeliest word under Gumbel noise: log p / temperature + noise."""

    def choose(log_probabilities):
        noise = -torch.empty_like(log_probabilities).exponential_().log()
        return likeliest(log_probabilities / temperature + noise)

    return generate(captioner, features, max_length, num_captions, choose)


def top_k(captioner, features, max_length, num_captions, temperature, top_k):
    """Words drawn from the `top_k` likeliest (Fan et al. 2018)."""

    def choose(log_probabilities):
        return draw(keep_top_k(log_probabilities / temperature, top_k))

    return generate(captioner, features, max_length, num_captions, choose)


def nucleus(captioner, features, max_length, num_captions, temperature, top_p):
    """Words drawn from the nucleus (Holtzman et al. 2020).

    These are the likeliest words, as few as together have the probability `top_p`.
    """

    def choose(log_probabilities):
        return draw(keep_nucleus(log_probabilities / temperature, top_p))

    return generate(captioner, features, max_length, num_captions, choose)


def likeliest(logits):
    """The token ids (B, N) of the largest of logits (B, N, V)."""
    return logits.argmax(-1)


def draw(logits):
    """Token ids (B, N) drawn from the softmax of logits (B, N, V).

    UserError if the logits are not numbers, which is so after a training that diverged.
    """
    probabilities = logits.softmax(-1).flatten(0, 1)  # (B, N, V) -> (B*N, V)
    if probabilities.isnan().any():
        raise UserError(
            "the captioner's probabilities are not numbers, so its training has diverged; "
            "go on from the last checkpoint with a lower learning rate (decoder_lr)"
        )
    return torch.multinomial(probabilities, 1).view(logits.shape[:-1])  # (B*N, 1) -> (B, N)


def keep_top_k(logits, k):
    """logits (..., V) with all but the k largest at -inf."""
    values, index = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, values)


def keep_nucleus(logits, p):
    """logits (..., V) with -inf outside of the nucleus.

    The nucleus is the shortest prefix of the words, in order of falling probability, whose total
    probability reaches p. The first word is always in it.
    """
    values, index = logits.sort(dim=-1, descending=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = values.masked_fill(before >= p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, kept)


def reorder(sequences, index):
    """sequences (..., K, T) with the second last dimension picked by index (..., K)."""
    index = index.unsqueeze(-1).expand(*index.shape, sequences.shape[-1])  # (..., K) -> (..., K, T)
    return sequences.gather(-2, index)


def of_rows(state, *index):
    """A state, a tuple of tensors (B, ...), with every tensor indexed."""
    return tuple(part[index] for part in state)


def _up_to_end(sequences, end):
    """Sequences (B, N, T) -> B lists of N lists of the token ids before the first `<end>`."""
    images = []
    for captions in sequences.tolist():
        images.append([_before(token_ids, end) for token_ids in captions])
    return images


def _before(token_ids, end):
    return token_ids[: token_ids.index(end)] if end in token_ids else token_ids


def strip_bad_endings(words):
    """The words without prepositions, articles and "and" at their end.

    They are unchanged if nothing else would be left.
    """
    stripped = list(words)
    while stripped and stripped[-1] in BAD_ENDINGS:
        stripped.pop()
    return stripped or words


def strip_repeats(words):
    """The words without those that only repeat the word before them."""
    stripped = []
    for word in words:
        if not stripped or word != stripped[-1]:
            stripped.append(word)
    return stripped


DECODERS = {
    "beam": beam_search,
    "diverse_beam": diverse_beam_search,
    "greedy": greedy,
    "multinomial": multinomial,
    "gumbel": gumbel,
    "top_k": top_k,
    "nucleus": nucleus,
}
# What may be removed from a finished caption.
STRIP = {"repeats": strip_repeats, "bad_endings": strip_bad_endings}


def decode(captioner, features, method, max_length, **options):
    """Region features (B, L, D) -> for each of B images a list of captions, lists of token ids.

    method: a name in DECODERS; max_length: words; options: of OPTIONS, each with a default there.
    Raises UserError for an unknown method, and for an option that the method does not have or
    whose value makes no sense.
    """
    check_options(method, options)
    defaults = {name: option.default for name, option in options_of(method).items()}
    return DECODERS[method](captioner, features, max_length, **{**defaults, **options})


def stripped(words, names):
    """A caption's words without what the functions of STRIP that are named here remove, in turn.

    UserError if there is no such function.
    """
    for name in names:
        if name not in STRIP:
            known = ", ".join(STRIP)
            raise UserError(f"there is nothing called '{name}' to strip; choose from {known}")
        words = STRIP[name](words)
    return words


def captioned(captioner, dataset, batch_size=64, workers=2, **decoding):
    """Caption the images of a CaptionDataset, of pixels or cached features, that this process has.

    decoding: what `captioner.decode` takes besides the features. Yields for each batch the
    images' indices, their features (B, L, D) and their captions as `captioner.decode` returns them.
    """
    batches = distributed.shared(torch.arange(len(dataset)).split(batch_size))
    sampler = [batch.tolist() for batch in batches]
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    description = f"captioning {dataset.split}"
    hidden = not distributed.is_main()
    finish = finisher(captioner.encoder, dataset)
    for inputs, _, indices in tqdm(loader, desc=description, leave=False, disable=hidden):
        if dataset.features:
            features = finish(inputs.to(captioner.device).float())
        else:
            features = captioner.encode(inputs)
        yield indices.tolist(), features, captioner.decode(features, **decoding)


def finisher(encoder, dataset):
    """A function: rows of a dataset's cached features, float -> region features (B, L, D).

    It runs the stages of the encoder that the cache was made without, in eval mode, if any.
    """
    if not dataset.stage:
        return lambda rows: rows
    finish = CutEncoder(eval_view(encoder), dataset.stage).finish
    return torch.inference_mode()(finish)


def decode_split(captioner, dataset, batch_size=64, workers=2, **decoding):
    """Caption a whole CaptionDataset as `captioned` does, by all processes together.

    Returns {index: caption}, in every process.
    """
    found = {}
    for indices, _, captions in captioned(captioner, dataset, batch_size, workers, **decoding):
        found.update(zip(indices, captions))
    return distributed.gathered(found)


def caption_files(captioner, files, batch_size=64, **decoding):
    """Caption image files, by all processes together: {file: caption}, in every process.

    decoding: what `captioner.caption` takes besides the images. UserError for a captioner of
    bottom-up features, or a damaged image.
    """
    if captioner.encoder.given:
        raise UserError("bottom-up features are not made here, so this captioner takes no images")
    transform = image_transform(captioner.encoder.image_size)
    starts = distributed.shared(range(0, len(files), batch_size))
    found = {}
    for start in tqdm(starts, desc="captioning", leave=False, disable=not distributed.is_main()):
        batch = files[start : start + batch_size]
        images = torch.stack([transform(load_image(file)) for file in batch])
        found.update(zip(batch, captioner.caption(images, **decoding)))
    return distributed.gathered(found)
