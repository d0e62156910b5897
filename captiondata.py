"""Reads what preparedataset.py wrote: the vocabulary, the images or their cached features, captions and objects.

dataset = CaptionDataset("data/scenes", "train", transform=image_transform(64))      # or features="vgg16"
x, captions, index = dataset[0]
"""

import hashlib
from pathlib import Path

import h5py
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from commandline import UserError, read_json
from featurecache import FeatureReader, features_path
from images import image_transform, load_image  # noqa: F401 (older scripts import image_transform from here)
from vocabulary import Vocabulary


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
            features, boxes = (
                torch.from_numpy(file[name][:]).float()
                for name in ("image_features", "image_boxes")
            )
    except FileNotFoundError:
        raise UserError(f"there is no file {path} of region features") from None
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # what is no array has no [:]
        raise UserError(f"{path} does not hold image_features and image_boxes ({error})") from None
    if (
        features.shape[1:] != (channels,)
        or not 1 <= len(features) <= count
        or boxes.shape != (len(features), 4)
    ):
        shapes = f"features {tuple(features.shape)} and boxes {tuple(boxes.shape)}"
        raise UserError(
            f"{path}: expected 1 to {count} regions of {channels} numbers with a box each, not {shapes}"
        )
    if not (features.isfinite().all() and boxes.isfinite().all()):
        raise UserError(f"{path} holds numbers that are not finite; extract its features again")
    return torch.cat(
        [features, features.new_zeros(count - len(features), features.shape[1])]
    ), boxes


def _is_info(info):
    return (
        isinstance(info["splits"], dict)
        and isinstance(info["max_length"], int)
        and {"name", "images_root", "categories"} <= info.keys()
    )


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
        self.folder, self.split, self.transform, self.features = (
            Path(folder),
            split,
            transform,
            features,
        )
        self.regions = regions
        if not (self.folder / "info.json").exists():
            raise UserError(
                f"{folder} is not a prepared dataset; run: python preparedataset.py --output {folder} ..."
            )
        self.info = read_json(self.folder / "info.json")
        self._require(_is_info, self.info, "info.json")
        if split not in self.info["splits"]:
            raise UserError(
                f"{folder} has no split '{split}'; it has: {', '.join(self.info['splits'])}"
            )
        self.vocabulary = Vocabulary.load(self.folder / "vocabulary.json")
        self.entries = read_json(self.folder / f"{split}.json")
        self._require(self._are_entries, self.entries, f"{split}.json")
        self.augmentation_seed, self.epoch = (
            None,
            0,
        )  # with a seed, the transform's randomness depends on seed, epoch and index only
        self._readers = (
            [self._reader(version) for version in range(versions + 1)] if features else []
        )
        self._memory = None
        for reader in self._readers[1:]:
            if reader.attributes["weights_hash"] != self._readers[0].attributes["weights_hash"]:
                raise UserError(
                    f"{reader.path} was made with other weights than {self._readers[0].path}; delete it and make it anew"
                )
        self.features_attributes = self._readers[0].attributes if features else None

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        return (
            (self._row(index) if self.features else self._pixels(index)),
            self.captions(index),
            index,
        )

    def _require(self, test, content, file):
        """UserError unless the content of a file passes, which it does not if it was edited or copied from another preparation."""
        try:
            sound = test(content)
        except (TypeError, KeyError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise UserError(
                f"{self.folder / file} is damaged or of another preparation than its neighbours; run preparedataset.py again"
            )

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
        rows = [
            start + ids + end + pad * (length - len(ids)) for ids in self.entries[index]["encoded"]
        ]
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
            return load_regions(
                regions_path(self.regions, self.split, self.entries[index]["file"])
            )[0]
        image = self.image(index)
        if self.transform is None:
            return v2.functional.pil_to_tensor(image) / 255
        if self.augmentation_seed is None:
            return self.transform(image)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                ((self.augmentation_seed * 1_000_003 + self.epoch) * 1_000_003 + index) % 2**63
            )
            return self.transform(image)

    def _row(self, index):
        version = (self.epoch + index) % len(self._readers)
        return (
            self._readers[version].rows(index, index + 1)[0]
            if self._memory is None
            else self._memory[version][index]
        )

    def load(self, device):
        """Read all cached features into the memory of a device."""
        self._memory = [reader.all_rows(device) for reader in self._readers]

    def features_bytes(self):
        """How much memory `load` takes."""
        return len(self._readers) * len(self) * self._row(0).nbytes

    def _reader(self, version):
        command = f"preparedataset.py --features {self.features}{f' --augment {version}' if version else ''}"
        return FeatureReader(
            features_path(self.folder, self.features, version),
            self.split,
            files_hash(self.entries),
            command,
        )
