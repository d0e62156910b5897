"""Turning a captioner's word probabilities into captions, for a batch of images at once.

Each function takes a captioner and region features (B, L, D) and returns B lists of word ids, without `<start>` and
`<end>`. A captioner offers `look(features)`, `start(memory, n)` and `next_words(words, state, memory)`; see captioner.py.
"""

import torch


@torch.no_grad()
def greedy(captioner, features, max_length=20):
    """The likeliest next word at every step, until `<end>` or `max_length` words."""
    end = captioner.vocabulary.end
    memory = captioner.look(features)
    state = captioner.start(memory, 1)
    words = torch.full((len(features), 1), captioner.vocabulary.start, device=features.device)
    chosen = []
    ended = torch.zeros_like(words, dtype=torch.bool)
    for _ in range(max_length):
        log_probabilities, state = captioner.next_words(words, state, memory)
        words = log_probabilities.argmax(-1)  # (B, 1)
        chosen.append(words)
        ended |= words == end
        if ended.all():
            break
    return [_until(row, end) for row in torch.cat(chosen, dim=1).tolist()]


@torch.no_grad()
def beam_search(captioner, features, beam_size=3, max_length=20):
    """Beam search by total log-probability, without length normalisation (as the paper decodes, with 3 beams).

    A hypothesis that says `<end>` is set aside and its image goes on with one beam fewer. An image is done when no live
    hypothesis can still beat its best finished one. Without a finished one the best of `max_length` words is returned.
    """
    batch, device, end = len(features), features.device, captioner.vocabulary.end
    memory = captioner.look(features)
    state = captioner.start(memory, beam_size)
    words = torch.full((batch, beam_size), captioner.vocabulary.start, device=device)
    sequences = torch.empty(batch, beam_size, 0, dtype=torch.long, device=device)
    scores = torch.full((batch, beam_size), -torch.inf, device=device)
    scores[:, 0] = 0  # one empty hypothesis to begin with; its `beam_size` best successors become the beams
    live = torch.full((batch, 1), beam_size, device=device)
    best = [[] for _ in range(batch)]
    best_scores = torch.full((batch,), -torch.inf, device=device)
    for _ in range(max_length):
        log_probabilities, state = captioner.next_words(words, state, memory)
        totals = (scores.to(log_probabilities).unsqueeze(-1) + log_probabilities).flatten(1)  # (B, K*V)
        scores, index = totals.topk(beam_size)
        scores = scores.masked_fill(torch.arange(beam_size, device=device) >= live, -torch.inf)
        parents, words = index // log_probabilities.shape[-1], index % log_probabilities.shape[-1]
        state = reorder(state, parents)
        sequences = torch.cat([reorder(sequences, parents), words.unsqueeze(-1)], dim=-1)
        ended = (words == end) & scores.isfinite()
        _set_aside(best, best_scores, sequences, scores.masked_fill(~ended, -torch.inf))
        live = live - ended.sum(1, keepdim=True)
        scores = scores.masked_fill(ended, -torch.inf)
        if (best_scores >= scores.amax(1)).all():
            break
    unfinished = best_scores.isinf()
    _set_aside(best, best_scores, sequences, scores.masked_fill(~unfinished.unsqueeze(1), -torch.inf))
    return [_until(row, end) for row in best]


def _set_aside(best, best_scores, sequences, candidates):
    """Where the best candidate (B, K; -inf = none) beats an image's best so far, remember its sequence and score."""
    values, beams = candidates.max(1)
    for image in (values > best_scores).nonzero().flatten().tolist():
        best[image] = sequences[image, beams[image]].tolist()
        best_scores[image] = values[image]


def reorder(state, index):
    """Every tensor (B, K, ...) of a state with its second dimension picked by index (B, K)."""
    if isinstance(state, tuple):
        return tuple(reorder(part, index) for part in state)
    return state.gather(1, index.reshape(*index.shape, *[1] * (state.dim() - 2)).expand(-1, -1, *state.shape[2:]))


def _until(ids, end):
    return ids[: ids.index(end)] if end in ids else ids


DECODERS = {"beam": beam_search, "greedy": greedy}
