"""Reads what preparedataset.py wrote: the vocabulary, the images or their cached features, captions and objects.

    dataset = CaptionDataset("data/scenes", "train", transform=image_transform(64))      # or features="vgg16"
    x, captions, index = dataset[0]
"""

import hashlib
import struct
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
from nltk.tokenize import RegexpTokenizer
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import v2

from commandline import UserError, read_json, write_json
from featurecache import FeatureReader, features_path

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TOKENIZER = RegexpTokenizer(r"\w+")
# NLTK's list of English stop words, which wants a download there: its 179 words of before 2024. The 198 of later add nothing but
# contractions such as "they're", which `tokenize` takes apart.
STOP_WORDS = frozenset("""
i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his himself she she's her
hers herself it it's its itself they them their theirs themselves what which who whom this that that'll these those am is are was
were be been being have has had having do does did doing a an the and but if or because as until while of at by for with about
against between into through during before after above below to from up down in out on off over under again further then once here
there when where why how all any both each few more most other some such no nor not only own same so than too very s t can will
just don don't should should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn
hasn't haven haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren
weren't won won't wouldn wouldn't
""".split())


def tokenize(caption):
    """The words of a caption: lower case, punctuation separates ("A man's hat." -> a, man, s, hat)."""
    return _TOKENIZER.tokenize(caption.lower())


class Vocabulary:
    """Words and their indices: <pad> is 0, then the kept words, <unk>, <start>, <end>. `words` is that full list."""

    def __init__(self, words):
        self.words = list(words)
        if self.words[:1] != ["<pad>"] or self.words[-3:] != ["<unk>", "<start>", "<end>"]:
            raise UserError("this is not a vocabulary: it must begin with <pad> and end with <unk>, <start>, <end>")
        self._index = {word: index for index, word in enumerate(self.words)}
        self.pad = 0
        self.unk, self.start, self.end = range(len(self.words) - 3, len(self.words))

    @classmethod
    def build(cls, token_lists, min_word_freq):
        """The vocabulary of the words that occur at least `min_word_freq` times, in first-seen order."""
        counts = Counter(token for tokens in token_lists for token in tokens)
        kept = [word for word, count in counts.items() if count >= min_word_freq]
        return cls(["<pad>", *kept, "<unk>", "<start>", "<end>"])

    @property
    def kept(self):
        """The words of the captions, without the four that stand for something else."""
        return self.words[1:-3]

    def __len__(self):
        return len(self.words)

    def __contains__(self, word):
        return word in self._index

    def encode(self, tokens):
        """The index of each token, <unk>'s for an unknown one; no <start> or <end> is added."""
        return [self._index.get(token, self.unk) for token in tokens]

    def decode(self, ids):
        """The words of `ids` (ints or a 1-d tensor) up to <end>, without <start> and <pad>; <unk> stays."""
        words = []
        for index in map(int, ids):
            if index == self.end:
                break
            if index not in (self.start, self.pad):
                words.append(self.words[index])
        return words

    def save(self, path):
        """Write the list of words as JSON."""
        write_json(path, self.words)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; UserError if `path` is missing or holds no vocabulary."""
        words = read_json(path)
        try:
            return cls(words if isinstance(words, list) and all(isinstance(word, str) for word in words) else [])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def padded(captions):
    """Lists of word ids -> long (captions, longest), padded with 0, which is <pad> in every vocabulary."""
    result = torch.zeros(len(captions), max(map(len, captions), default=0), dtype=torch.long)
    for row, caption in zip(result, captions):
        row[: len(caption)] = torch.tensor(caption, dtype=torch.long)
    return result


def load_image(path):
    """The image in `path` as an 8-bit RGB PIL image, upright as its EXIF tag says, transparency laid on white.

    UserError naming the file if it is missing, truncated or not an image.
    """
    with opened_image(path) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


def image_size(path):
    """(width, height) in pixels as `load_image` returns it; reads the header only. UserError as there."""
    with opened_image(path) as image:
        sideways = image.getexif().get(0x0112, 1) >= 5  # 0x0112: orientation
        return image.size[::-1] if sideways else image.size


@contextmanager
def opened_image(path):
    """The image in `path` as PIL opens it; whatever goes wrong with it is a UserError naming the file."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image, it may be damaged ({error})") from None


def _to_rgb(image):
    """An 8-bit RGB copy of a PIL image of any mode."""
    if image.mode.startswith("I"):  # 16 bits a pixel: PIL would clip them to 255 instead of scaling
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def image_transform(size, augment=False):
    """PIL RGB image -> float (3, size, size), stretched to a square (as the paper does), ImageNet-normalised.

    `augment` adds the original's training augmentation: brightness and contrast by up to 20 %, mirroring.
    """
    augmentation = [v2.ColorJitter(brightness=0.2, contrast=0.2), v2.RandomHorizontalFlip()] if augment else []
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                 v2.ToPureTensor()]
    return v2.Compose([v2.Resize((size, size)), *augmentation, *to_tensor])


def files_hash(entries):
    """16 hex digits that tell one list of images from another, so that rows of a cache are never misattributed."""
    return hashlib.sha256("\n".join(entry["file"] for entry in entries).encode()).hexdigest()[:16]


def regions_path(folder, split, file):
    """Where the bottom-up features of an image lie; `file` is that of its entry."""
    return Path(folder) / split / f"{Path(file).name}.hdf5"


def load_regions(path, count=36, channels=2048):
    """Bottom-up features of one image, in the original's HDF5 format: features float32 (count, channels), padded with zeros, and
    boxes (n, 4) of the n <= count real regions, x1 y1 x2 y2 in pixels. UserError naming the file if it holds none."""
    try:
        with h5py.File(path, "r") as file:
            features, boxes = (torch.from_numpy(file[name][:]).float() for name in ("image_features", "image_boxes"))
    except FileNotFoundError:
        raise UserError(f"there is no file {path} of region features") from None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:  # what is no array has no [:]
        raise UserError(f"{path} does not hold image_features and image_boxes ({error})") from None
    if features.shape[1:] != (channels,) or not 1 <= len(features) <= count or boxes.shape != (len(features), 4):
        shapes = f"features {tuple(features.shape)} and boxes {tuple(boxes.shape)}"
        raise UserError(f"{path}: expected 1 to {count} regions of {channels} numbers with a box each, not {shapes}")
    if not (features.isfinite().all() and boxes.isfinite().all()):
        raise UserError(f"{path} holds numbers that are not finite; extract its features again")
    return torch.cat([features, features.new_zeros(count - len(features), features.shape[1])]), boxes


def _is_info(info):
    return isinstance(info["splits"], dict) and isinstance(info["max_length"], int) and {"name", "images_root", "categories"} <= info.keys()


class CaptionDataset(Dataset):
    """One split of a prepared dataset, one item per image: (x, captions, index).

    x: float (3, H, W), the image after `transform` (None: as it is, in 0..1), or float16 (L, D), its row of
    features-<features>.h5, or its bottom-up features in the folder `regions`, SPLIT/FILE.hdf5;
    captions: long (5, max_length + 2), each <start>, words, <end>, <pad> ...; index: int.
    Attributes: folder, split, info, vocabulary, entries (list of dicts of <split>.json), features_attributes (dict of
    the cache's attributes, or None), epoch. UserError if the folder, the split or a complete cache is missing.

    versions: so many augmented versions of the cached features take turns with the plain one, another of them every epoch.
    """

    def __init__(self, folder, split, transform=None, features=None, regions=None, versions=0):
        self.folder, self.split, self.transform, self.features = Path(folder), split, transform, features
        self.regions = regions
        if not (self.folder / "info.json").exists():
            raise UserError(f"{folder} is not a prepared dataset; run: python preparedataset.py --output {folder} ...")
        self.info = read_json(self.folder / "info.json")
        self._require(_is_info, self.info, "info.json")
        if split not in self.info["splits"]:
            raise UserError(f"{folder} has no split '{split}'; it has: {', '.join(self.info['splits'])}")
        self.vocabulary = Vocabulary.load(self.folder / "vocabulary.json")
        self.entries = read_json(self.folder / f"{split}.json")
        self._require(self._are_entries, self.entries, f"{split}.json")
        self.augmentation_seed, self.epoch = None, 0  # with a seed, the transform's randomness depends on seed, epoch and index only
        self._readers = [self._reader(version) for version in range(versions + 1)] if features else []
        self._memory = None
        for reader in self._readers[1:]:
            if reader.attributes["weights_hash"] != self._readers[0].attributes["weights_hash"]:
                raise UserError(f"{reader.path} was made with other weights than {self._readers[0].path}; delete it and make it anew")
        self.features_attributes = self._readers[0].attributes if features else None

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        return (self._row(index) if self.features else self._pixels(index)), self.captions(index), index

    def _require(self, test, content, file):
        """UserError unless the content of a file passes, which it does not if it was edited or copied from another preparation."""
        try:
            sound = test(content)
        except (TypeError, KeyError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise UserError(f"{self.folder / file} is damaged or of another preparation than its neighbours; run preparedataset.py again")

    def _are_entries(self, entries):
        """Whether there are as many as info.json says, of words that the vocabulary has."""
        size, longest = len(self.vocabulary), self.info["max_length"]
        return len(entries) == self.info["splits"][self.split] and all(
            isinstance(entry["file"], str) and isinstance(entry["objects"], list) and all(isinstance(caption, str) for caption in entry["captions"])
            and len(entry["encoded"]) == 5 and all(len(ids) <= longest and 0 <= min(ids) and max(ids) < size for ids in entry["encoded"])
            for entry in entries
        )  # fmt: skip

    def captions(self, index):
        """The five encoded captions of an image: long (5, max_length + 2)."""
        start, end, pad = [self.vocabulary.start], [self.vocabulary.end], [self.vocabulary.pad]
        length = self.info["max_length"]
        rows = [start + ids + end + pad * (length - len(ids)) for ids in self.entries[index]["encoded"]]
        return torch.tensor(rows)

    def image_path(self, index):
        """The file of an image."""
        return self.folder / self.info["images_root"] / self.entries[index]["file"]

    def image(self, index):
        """The image itself, PIL RGB, untransformed."""
        return load_image(self.image_path(index))

    def references(self):
        """{index: the raw captions of that image, all of them}."""
        return {index: entry["captions"] for index, entry in enumerate(self.entries)}

    def _pixels(self, index):
        if self.regions:
            return load_regions(regions_path(self.regions, self.split, self.entries[index]["file"]))[0]
        image = self.image(index)
        if self.transform is None:
            return v2.functional.pil_to_tensor(image) / 255
        if self.augmentation_seed is None:
            return self.transform(image)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(((self.augmentation_seed * 1_000_003 + self.epoch) * 1_000_003 + index) % 2**63)
            return self.transform(image)

    def _row(self, index):
        version = (self.epoch + index) % len(self._readers)
        return self._readers[version].rows(index, index + 1)[0] if self._memory is None else self._memory[version][index]

    def load(self, device):
        """Read all cached features into the memory of a device."""
        self._memory = [reader.all_rows(device) for reader in self._readers]

    def features_bytes(self):
        """How much memory `load` takes."""
        return len(self._readers) * len(self) * self._row(0).nbytes

    def _reader(self, version):
        command = f"preparedataset.py --features {self.features}{f' --augment {version}' if version else ''}"
        return FeatureReader(features_path(self.folder, self.features, version), self.split, files_hash(self.entries), command)
