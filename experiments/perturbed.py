"""What perturbation.py removes tokens from: questions with answers, and captions.

The tokens of an image are the patches of a CLIPmapper, which go before its first layer, or the
regions of a captioner with an LSTM. Those of a text are the words of a question, or the words of a
caption before the one that is explained; start and end stay.
"""

import random
from dataclasses import replace

import torch

from captiondata import CaptionDataset
from captionmetrics import Captions
from contrastive import patches_of_split
from experiments.probabilities import last_word_probabilities
from explanation import explain_batch, method_for
from images import image_transform
from pycocoevalcap.cider.cider import Cider
from questions import read_questions

IMAGE = "image"
QUESTION = "question"
WORDS = "words"
CAPTION = "image, of the caption"  # the image's tokens by what they are for all words together
LONGEST_CAPTION = 20  # words
CENTRE = "centre"
LAST = "last words"


def normalised_sum(relevance):
    """What the patches are for a caption: of each word's relevance (T, L) an equal part, (L,)."""
    sizes = relevance.abs().sum(dim=1, keepdim=True).clamp(min=torch.finfo(relevance.dtype).tiny)
    return (relevance / sizes).sum(dim=0)


def nearness_to_the_centre(grid):
    """A baseline of images: of h * w patches the negative distance to the middle, (L,)."""
    height, width = grid
    down = (torch.arange(height) + 0.5) / height - 0.5
    across = (torch.arange(width) + 0.5) / width - 0.5
    return -(down[:, None] ** 2 + across**2).sqrt().flatten()


def some_of_each(groups, count, rng):
    """Numbers of `count` items, from each group one after the other, in order.

    groups: lists of numbers; rng draws which.
    """
    shuffled = [rng.sample(group, len(group)) for group in groups]
    chosen = []
    for turn in range(max(map(len, groups))):
        chosen += [group[turn] for group in shuffled if turn < len(group)]
    return sorted(chosen[:count])


class Answers:
    """Questions on the scenes, answered by a CLIPmapper: is the answer still right?

    count: how many questions, spread over the images; what is explained is the answer that the
    CLIPmapper gives.
    """

    name = "answers"
    measures = {IMAGE: "accuracy", QUESTION: "accuracy"}

    def __init__(self, captioner, folder, split, count, seed=0):
        captioner.require("vqa")
        self.captioner = captioner
        everything = read_questions(folder, split)
        entries = CaptionDataset(folder, split).entries
        place = {entry["file"]: number for number, entry in enumerate(entries)}
        groups = [[] for _ in entries]
        for number, question in enumerate(everything):
            groups[place[question.file]].append(number)
        chosen = some_of_each(groups, count, random.Random(f"questions {seed}"))
        self.questions = [everything[number] for number in chosen]
        self.numbers = [place[question.file] for question in self.questions]
        self.images = len(entries)
        self.maps = torch.cat(
            list(patches_of_split(captioner.clip, folder, split, captioner.device))
        )
        self.truth = []
        for question in self.questions:
            known = question.answer in captioner.answers
            self.truth.append(captioner.answers.index(question.answer) if known else -1)

    def __len__(self):
        return len(self.questions)

    def image_of(self, item):
        """The number of the image that is asked about."""
        return self.numbers[item]

    def _pixels(self, item):
        number = self.numbers[item]
        return self.maps[number : number + 1]

    def _ids(self, item):
        return self.captioner.question_ids([self.questions[item].text])

    def explained(self, item, method):
        """See perturbation.py."""
        chosen = method_for(self.captioner, method)
        with torch.no_grad():
            model = self.captioner.model
            logits = model(model.image_tokens(self._pixels(item)), self._ids(item))
        answer = self.captioner.answers[logits.argmax()]
        text = self.questions[item].text
        _, found = self.captioner.question_relevance(self._pixels(item), text, answer, chosen)
        patches = self.captioner.patch_relevance(found)[0]
        return {IMAGE: patches.cpu(), QUESTION: found["words"][0, 1:-1].cpu()}

    def baselines(self, item):
        """See perturbation.py."""
        return {IMAGE: {CENTRE: nearness_to_the_centre(self.captioner.encoder.grid)}}

    @torch.no_grad()
    def measured(self, item, side, kept):
        """1 where the answer is right, else 0."""
        model = self.captioner.model
        ids = self._ids(item)
        kept = kept.to(ids.device)
        if side == IMAGE:
            image = model.image_tokens(self._pixels(item).expand(len(kept), -1, -1, -1), kept)
            ids = ids.expand(len(kept), -1)
        else:
            image = model.image_tokens(self._pixels(item)).expand(len(kept), -1, -1)
            words = ids[0, 1:-1][kept]
            ends = ids[:, [0, -1]].expand(len(kept), -1)
            ids = torch.cat([ends[:, :1], words, ends[:, 1:]], dim=1)
        answers = model(image, ids).argmax(dim=-1)
        return (answers == self.truth[item]).int().tolist()

    def finished(self, records):
        """Nothing is left to do."""
        return records


class Sentences:
    """Captions that a captioner says of images: is a word still probable, is the caption as good?

    One word of each caption is explained, drawn among those that another one precedes. What is
    removed by its relevance shows in its probability; by the relevance of all words together, in
    CIDEr of what is then said. Captions of one word have CIDEr only.

    A subclass knows the captioner.
    """

    name = "captions"
    measures = {IMAGE: "probability", WORDS: "probability", CAPTION: "CIDEr"}

    def __init__(self, captioner, folder, split, count, seed=0):
        self.captioner = captioner
        self.entries = CaptionDataset(folder, split).entries[:count]
        self.images = len(self.entries)
        self.captions = self.said_of_all(folder, split)
        self.positions = []
        for number, caption in enumerate(self.captions):
            rng = random.Random(f"word {seed} {number}")
            self.positions.append(rng.randrange(1, len(caption)) if len(caption) > 1 else None)

    def __len__(self):
        return len(self.entries)

    def image_of(self, item):
        """The number of the image."""
        return item

    def explained(self, item, method):
        """See perturbation.py."""
        if not self.captions[item]:
            return {}
        patches, words = self.relevance(item, method)
        position = self.positions[item]
        found = {CAPTION: normalised_sum(patches)}
        if position is not None:
            found[IMAGE] = patches[position]
            before = words[position, 1 : position + 1]
            found[WORDS] = before if before.any() else None
        return found

    def baselines(self, item):
        """See perturbation.py. The later a preceding word, the more it may matter."""
        centre = {CENTRE: nearness_to_the_centre(self.captioner.encoder.grid)}
        last = {LAST: torch.arange(float(self.positions[item] or 0))}
        return {IMAGE: centre, CAPTION: centre, WORDS: last}

    def measured(self, item, side, kept):
        """The word's probability; of a caption the words that are said, see `finished`."""
        kept = kept.to(self.captioner.device)
        if side == CAPTION:
            return self.said_with(item, kept)
        position = self.positions[item]
        before = torch.tensor(self.captions[item][:position])
        target = self.captions[item][position]
        if side == WORDS:
            return self.probabilities(item, None, before[kept.cpu()], target)
        return self.probabilities(item, kept, before.expand(len(kept), -1), target)

    def finished(self, records):
        """CIDEr in place of the captions: the document frequencies are those of these images."""
        having = [record for record in records if CAPTION in record["curves"]]
        of_item = {record["index"]: record["curves"][CAPTION] for record in having}
        references = {number: entry["captions"] for number, entry in enumerate(self.entries)}
        cider = CiderOfEach(references, {item: said_in(curves) for item, curves in of_item.items()})
        first = next(iter(of_item.values()), {})
        for method, orders in first.items():
            for order, values in orders.items():
                for place in range(len(values)):
                    said = {item: curves[method][order][place] for item, curves in of_item.items()}
                    scores = cider(said)
                    for item, curves in of_item.items():
                        curves[method][order][place] = scores[item]
        return records


def said_in(curves):
    """The different captions in the curves {method: {order: captions}} of an item."""
    captions = set()
    for orders in curves.values():
        for said in orders.values():
            captions.update(said)
    return sorted(captions)


class CiderOfEach:
    """CIDEr of the captions of images, one of each, whose tokens are made once.

    references: {number: texts}; captions: {number: all texts that will be asked about}.
    """

    def __init__(self, references, captions):
        together = {}
        for number, texts in references.items():
            together[number] = [*texts, *captions.get(number, [])]
        tokens = Captions(dict.fromkeys(references, ""), together).tokens.references
        self.references = {}
        self.tokens = {}  # {number: {caption: its tokens}}
        for number, texts in references.items():
            self.references[number] = tokens[number][: len(texts)]
            spoken = tokens[number][len(texts) :]
            self.tokens[number] = dict(zip(captions.get(number, []), spoken))

    def __call__(self, said):
        """{number: CIDEr} of captions {number: text}; images without one say nothing."""
        predictions = {}
        for number in self.references:
            predictions[number] = [self.tokens[number][said[number]] if number in said else ""]
        _, scores = Cider().compute_score(self.references, predictions)
        return dict(zip(self.references, map(float, scores)))


class ClipMapperSentences(Sentences):
    """Captions of a CLIPmapper; its tokens are sub-words."""

    def said_of_all(self, folder, split):
        """The sub-words of the captions of the images."""
        captioner = self.captioner
        captioner.require("caption")
        maps = []
        for part in patches_of_split(captioner.clip, folder, split, captioner.device):
            maps.append(part)
            if sum(map(len, maps)) >= len(self.entries):
                break
        self.maps = torch.cat(maps)[: len(self.entries)]
        captions = []
        for part in self.maps.split(50):
            tokens = captioner.model.image_tokens(part)
            captions += captioner.decoded_tokens(tokens, "greedy", LONGEST_CAPTION)
        return captions

    def relevance(self, item, method):
        """Of each sub-word said: of patches (T, L), of inputs (T, T)."""
        captioner = self.captioner
        targets = torch.tensor([self.captions[item]], device=captioner.device)
        maps = self.maps[item : item + 1]
        _, found = captioner.relevance_of_caption(maps, targets, method_for(captioner, method))
        return captioner.patch_relevance(found).cpu(), found["words"].cpu()

    def _tokens(self, item, kept, count):
        """Stage one's tokens of `count` copies of an image, with the patches kept if given."""
        maps = self.maps[item : item + 1]
        if kept is None:
            return self.captioner.model.image_tokens(maps).expand(count, -1, -1)
        return self.captioner.model.image_tokens(maps.expand(count, -1, -1, -1), kept)

    @torch.no_grad()
    def probabilities(self, item, kept, before, target):
        """How probable a sub-word is after others (S, K) with the patches kept (S, k), or all."""
        start = torch.full((len(before), 1), self.captioner.start)
        ids = torch.cat([start, before], dim=1).to(self.captioner.device)
        logits = self.captioner.model(self._tokens(item, kept, len(before)), ids)[:, -1]
        return logits.softmax(dim=-1)[:, target].tolist()

    @torch.no_grad()
    def said_with(self, item, kept):
        """What is said of an image with the patches kept, S texts."""
        tokens = self._tokens(item, kept, len(kept))
        captions = self.captioner.decoded_tokens(tokens, "greedy", LONGEST_CAPTION)
        return [" ".join(self.captioner.words_of(ids)[0]) for ids in captions]


class LstmSentences(Sentences):
    """Captions of a captioner with an LSTM. Without any region one of zeros is left."""

    @torch.no_grad()
    def said_of_all(self, folder, split):
        """The token ids of the captions of the images."""
        captioner = self.captioner
        transform = image_transform(captioner.encoder.image_size)
        self.dataset = CaptionDataset(folder, split, transform)
        self.features = []
        captions = []
        for first in range(0, len(self.entries), 25):
            numbers = range(first, min(first + 25, len(self.entries)))
            images = torch.stack([self.dataset[number][0] for number in numbers])
            features = captioner.encode(images)
            self.features += features.split(1)
            for words in captioner.decode(features, method="greedy"):
                captions.append(captioner.vocabulary.encode(words)[:LONGEST_CAPTION])
        return captions

    def relevance(self, item, method):
        """Of each word said: of regions (T, L), of inputs (T, T). The encoder is not explained."""
        chosen = replace(method_for(self.captioner, method), pixels=False)
        images = self.dataset[item][0].unsqueeze(0)
        ids = self.captions[item]
        (found,) = explain_batch(self.captioner, images, [ids], chosen)
        return found.region_relevance, found.word_relevance

    def _features(self, item, kept, count):
        """The regions of `count` copies of an image, those that are kept if given."""
        features = self.features[item]
        if kept is None:
            return features.expand(count, -1, -1)
        if not kept.shape[1]:
            return torch.zeros_like(features[:, :1]).expand(count, -1, -1)
        return features[0][kept]

    def probabilities(self, item, kept, before, target):
        """How probable a word is after others (S, K) with the regions kept (S, k), or all."""
        features = self._features(item, kept, len(before))
        sequences = [[[*row, target]] for row in before.tolist()]
        found = last_word_probabilities(self.captioner, features, sequences)
        return [row[0] for row in found]

    @torch.no_grad()
    def said_with(self, item, kept):
        """What is said of an image with the regions kept, S texts."""
        features = self._features(item, kept, len(kept))
        found = self.captioner.decode(features, method="greedy")
        return [" ".join(words[:LONGEST_CAPTION]) for words in found]
