"""How probable words are while a captioner is forced to say given captions."""

from itertools import chain

import torch

from vocabulary import padded


@torch.no_grad()
def last_word_probabilities(captioner, features, sequences):
    """The probability of the last word of sequences, each after the words before it.

    features (B, L, D); sequences: for each image a list of lists of token ids. Returns for each
    image a list of floats, one for each sequence. One forward pass does all of them.
    """
    most = max(map(len, sequences))
    if not most:
        return [[] for _ in sequences]
    inputs, last, targets = _teacher_forcing(sequences, most, captioner.vocabulary)
    inputs, last, targets = (part.to(features.device) for part in (inputs, last, targets))
    captioner = captioner.eval_view()
    memory = captioner.image_memory(features)
    addends = captioner.unroll(captioner.embedding(inputs), memory).addends
    last_steps = []
    for addend in addends:  # (B, N, T, H)
        index = last[..., None, None].expand(-1, -1, 1, addend.shape[-1])
        last_steps.append(addend.gather(2, index).squeeze(2))  # (B, N, H)
    probabilities = captioner.last_layer(last_steps).softmax(-1)  # (B, N, V)
    found = probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1).tolist()
    return [row[: len(image)] for row, image in zip(found, sequences)]


def _teacher_forcing(sequences, most, vocabulary):
    """The inputs (B, most, T) of sequences, their last positions and last token ids (B, most)."""
    longest = max(map(len, chain.from_iterable(sequences)))
    inputs = torch.full((len(sequences), most, longest), vocabulary.pad)
    last = torch.zeros(len(sequences), most, dtype=torch.long)
    targets = torch.zeros(len(sequences), most, dtype=torch.long)
    for image, row in enumerate(sequences):
        for place, ids in enumerate(row):
            inputs[image, place, : len(ids)] = torch.tensor([vocabulary.start, *ids[:-1]])
            last[image, place] = len(ids) - 1
            targets[image, place] = ids[-1]
    return inputs, last, targets


@torch.no_grad()
def word_scores(captioner, features, captions, words):
    """The largest probability that each of `words` had while a captioner said a caption.

    features (B, L, D); captions: B lists of words. Returns (B, len(words)) on the CPU, 0 for a word
    that the captioner does not know.
    """
    vocabulary = captioner.vocabulary
    sequences = [[vocabulary.start, *vocabulary.encode(caption)] for caption in captions]
    inputs = padded(sequences).to(features.device)
    logits = captioner.eval_view()(features, inputs.unsqueeze(1)).squeeze(1)
    probabilities = logits.softmax(-1)  # (B, T, V)
    probabilities = probabilities[..., vocabulary.encode(words)]
    probabilities = probabilities.masked_fill((inputs == vocabulary.pad).unsqueeze(-1), 0)
    unknown = torch.tensor([word not in vocabulary for word in words], dtype=torch.bool)
    return probabilities.amax(dim=1).masked_fill(unknown.to(features.device), 0).cpu()
