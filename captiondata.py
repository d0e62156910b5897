"""A prepared dataset, data/<name>/: read, written, and its features cached.

    info.json         what it is, how it was prepared, where its images are
    vocabulary.json   the words
    SPLIT.json        an entry an image: file, captions, encoded captions, objects
    features-*.h5     cached features, see featurecache.py

dataset = CaptionDataset("data/scenes", "train", image_transform(64))    # or features="vgg16"
x, captions, index = dataset[0]
"""

import itertools
import os
import random
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import h5py
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from commandline import (
    UserError,
    provenance,
    read_json,
    write_atomically,
    write_json,
    write_tensors,
)
from featurecache import (
    FeatureReader,
    encoder_path,
    features_path,
    files_hash,
    lay_out,
    write_missing_rows,
)
from images import image_size, image_transform, load_image, require_whole
from prepared import read_info, require_sound
from vocabulary import Vocabulary, tokenize

CAPTIONS_PER_IMAGE = 5
PREPROCESSING = "stretched to a square, bilinear with antialiasing, ImageNet's mean and deviation"

# ----------------------------------------------------------------------------------------- reading


def open_split(folder, split, encoder):
    """The split as the encoder wants it: images, or cached features where no image is looked at."""
    if encoder.given:
        return CaptionDataset(folder, split, features=encoder.name)
    return CaptionDataset(folder, split, image_transform(encoder.image_size))


class CaptionDataset(Dataset):
    """One split of a prepared dataset, one item per image: (x, captions, index).

    x: float (3, H, W), the image after `transform` (None: as it is, in 0..1), or float16 (L, D),
    its row of features-<features>.h5, or its bottom-up features in the folder `regions`,
    SPLIT/FILE.hdf5; captions: long (5, max_length + 2), each <start>, words, <end>, <pad> ...;
    index: int.
    versions: so many augmented versions of the cached features take turns with the plain one,
    another of them every epoch.
    stage: the rows are what this stage of the encoder is given, and the encoder has to finish them.

    Attributes: folder, split, info, vocabulary, entries (list of dicts of <split>.json),
    features_attributes (dict of the cache's attributes, or None), epoch, augmentation_seed (with a
    seed, the transform's randomness depends on seed, epoch and index only). UserError if the
    folder, the split or a complete cache is missing.
    """

    def __init__(
        self,
        folder,
        split,
        transform=None,
        features=None,
        regions=None,
        versions=0,
        stage=None,
    ):
        self.folder = Path(folder)
        self.split = split
        self.transform = transform
        self.features = features
        self.stage = stage
        self.regions = regions
        self.augmentation_seed = None
        self.epoch = 0
        self.info = self._read_info()
        self.vocabulary = Vocabulary.load(self.folder / "vocabulary.json")
        self.entries = read_json(self.folder / f"{split}.json")
        require_sound(self._are_entries, self.entries, self.folder / f"{split}.json")
        self._readers = self._open_readers(versions) if features else []
        self._memory = None
        self.features_attributes = self._readers[0].attributes if features else None

    def _read_info(self):
        info = read_info(self.folder)
        if self.split not in info["splits"]:
            there = ", ".join(info["splits"])
            raise UserError(f"{self.folder} has no split '{self.split}'; it has: {there}")
        return info

    def _are_entries(self, entries):
        """Whether there are as many as info.json says, all of them sound."""
        return len(entries) == self.info["splits"][self.split] and all(
            self._is_entry(entry) for entry in entries
        )

    def _is_entry(self, entry):
        """Whether an entry has all its fields, and encoded captions of words of the vocabulary."""
        if not isinstance(entry["file"], str) or not isinstance(entry["objects"], list):
            return False
        if not all(isinstance(caption, str) for caption in entry["captions"]):
            return False
        if len(entry["encoded"]) != CAPTIONS_PER_IMAGE:
            return False
        size = len(self.vocabulary)
        longest = self.info["max_length"]
        for ids in entry["encoded"]:
            if len(ids) > longest or min(ids) < 0 or max(ids) >= size:
                return False
        return True

    def _open_readers(self, versions):
        """The readers of the plain features and of so many augmented versions of them."""
        readers = []
        for version in range(versions + 1):
            command = f"preparedataset.py --features {self.features}"
            if self.stage:
                command += f" --stage {self.stage}"
            if version:
                command += f" --augment {version}"
            path = features_path(self.folder, self.features, version, self.stage)
            readers.append(FeatureReader(path, self.split, files_hash(self.entries), command))
        plain, *augmented = readers
        for reader in augmented:
            if reader.attributes["weights_hash"] != plain.attributes["weights_hash"]:
                raise UserError(
                    f"{reader.path} was made with other weights than {plain.path}; "
                    "delete it and make it anew"
                )
        return readers

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        x = self._row(index) if self.features else self._pixels(index)
        return x, self.captions(index), index

    def captions(self, index):
        """The five encoded captions of an image: long (5, max_length + 2)."""
        vocabulary = self.vocabulary
        rows = []
        for ids in self.entries[index]["encoded"]:
            padding = [vocabulary.pad] * (self.info["max_length"] - len(ids))
            rows.append([vocabulary.start, *ids, vocabulary.end, *padding])
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
        """The transformed image, or its bottom-up features."""
        if self.regions:
            path = regions_path(self.regions, self.split, self.entries[index]["file"])
            features, _ = load_regions(path)
            return features
        image = self.image(index)
        if self.transform is None:
            return v2.functional.pil_to_tensor(image) / 255
        if self.augmentation_seed is None:
            return self.transform(image)
        seed = (self.augmentation_seed * 1_000_003 + self.epoch) * 1_000_003 + index
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            return self.transform(image)

    def _row(self, index):
        """The cached features of an image, of the version whose turn it is."""
        version = (self.epoch + index) % len(self._readers)
        if self._memory is not None:
            return self._memory[version][index]
        return self._readers[version].rows(index, index + 1)[0]

    def load(self, device):
        """Read all cached features into the memory of a device."""
        self._memory = [reader.all_rows(device) for reader in self._readers]

    def features_bytes(self):
        """How many bytes of memory `load` takes."""
        return len(self._readers) * len(self) * self._row(0).nbytes


# ------------------------------------------------------------------------ bottom-up region features


def regions_path(folder, split, file):
    """Where the bottom-up features of an image lie; `file` is that of its entry."""
    return Path(folder) / split / f"{Path(file).name}.hdf5"


def load_regions(path, count=36, channels=2048):
    """Bottom-up features of one image, in the original's HDF5 format.

    Returns features float32 (count, channels), padded with zeros, and boxes (n, 4) of the n <=
    count real regions, x1 y1 x2 y2 in pixels. UserError naming the file if it holds none.
    """
    features, boxes = _read_regions(path)
    of_channels = features.shape[1:] == (channels,)
    boxed = of_channels and boxes.shape == (len(features), 4)
    if not boxed or not 1 <= len(features) <= count:
        shapes = f"features {tuple(features.shape)} and boxes {tuple(boxes.shape)}"
        raise UserError(
            f"{path}: expected 1 to {count} regions of {channels} numbers with a box each, "
            f"not {shapes}"
        )
    if not features.isfinite().all() or not boxes.isfinite().all():
        raise UserError(f"{path} holds numbers that are not finite; extract its features again")
    padding = features.new_zeros(count - len(features), channels)
    return torch.cat([features, padding]), boxes


def _read_regions(path):
    """The arrays image_features and image_boxes of an HDF5 file, float32."""
    try:
        with h5py.File(path, "r") as file:
            features = torch.from_numpy(file["image_features"][:]).float()
            boxes = torch.from_numpy(file["image_boxes"][:]).float()
    except FileNotFoundError:
        raise UserError(f"there is no file {path} of region features") from None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        # some of them because what is no array has no [:]
        raise UserError(f"{path} does not hold image_features and image_boxes ({error})") from None
    return features, boxes


# ----------------------------------------------------------------------------------------- writing


def write_dataset(output, name, raw, min_word_freq, max_length, seed=0, regions=None, source=None):
    """Make a prepared dataset called `name` of a `readers.Raw` in the folder `output`; returns its
    info.

    source: the name of its row in readers.SOURCES, if that is another. Everything is checked before
    anything is written: that there is a file for every image, and in the folder `regions`, if it is
    given, too. UserError for what is missing or left empty.
    """
    vocabulary, splits, summary = encode_captions(raw.splits, min_word_freq, max_length, seed)
    require_images(raw.images_root, splits)
    if regions:
        require_regions(regions, splits)
    summary["images_unused"] = raw.images_unused
    summary["vocabulary"] = len(vocabulary.kept)
    info = {
        "name": name,
        "source": source or name,
        "images_root": _path_from(output, raw.images_root),
        "min_word_freq": min_word_freq,
        "max_length": _longest(splits),
        "splits": {split: len(entries) for split, entries in splits.items()},
        "categories": raw.categories,
        "planted_pairs": raw.planted_pairs,
        "summary": summary,
        "command": provenance()["command"],
        "seed": seed,
    }
    _write_files(output, vocabulary, splits, info)
    return info


def encode_captions(splits, min_word_freq, max_length, seed):
    """Build the vocabulary on all training captions and encode five captions an image (sampled, or
    some repeated).

    Returns (vocabulary, {split: entries with "encoded"}, {split: counts of what was read and
    dropped}). A caption that is empty or longer than `max_length` words is not encoded; the long
    ones remain among the raw references. UserError if a split or the vocabulary is left empty.
    """
    vocabulary = Vocabulary.build(_tokenized(splits["train"]), min_word_freq)
    generator = random.Random(seed)
    kept = {}
    summary = {}
    for split, entries in splits.items():
        counts = Counter(images_read=len(entries))
        encoded = [_encode(entry, vocabulary, max_length, generator, counts) for entry in entries]
        kept[split] = [entry for entry in encoded if entry]
        if not kept[split]:
            raise UserError(
                f"split '{split}' is empty: {len(entries)} images, "
                f"no caption of 1 to {max_length} words (max_length)"
            )
        summary[split] = dict(counts)
    if not vocabulary.kept:
        raise UserError(
            f"no word occurs {min_word_freq} times in the captions of train; "
            "give a lower min_word_freq"
        )
    return vocabulary, kept, summary


def _tokenized(entries):
    """The words of every caption, one caption after another."""
    for entry in entries:
        yield from map(tokenize, entry["captions"])


def _encode(entry, vocabulary, max_length, generator, counts):
    """`entry` with its encoded captions, or None if no caption is left; adds to `counts` what is
    read and dropped."""
    tokens = {caption: tokenize(caption) for caption in entry["captions"]}
    raw = [caption for caption in entry["captions"] if tokens[caption]]
    usable = [tokens[caption] for caption in raw if len(tokens[caption]) <= max_length]
    counts["captions_read"] += len(entry["captions"])
    counts["captions_dropped_empty"] += len(entry["captions"]) - len(raw)
    counts["captions_dropped_too_long"] += len(raw) - len(usable)
    counts["images_dropped_without_caption"] += not usable
    if not usable:
        return None
    if len(usable) > CAPTIONS_PER_IMAGE:
        usable = generator.sample(usable, CAPTIONS_PER_IMAGE)
    repeats = generator.choices(usable, k=CAPTIONS_PER_IMAGE - len(usable))
    counts["images_without_boxes"] += not entry["objects"]
    for words in usable:
        counts["words"] += len(words)
        counts["words_unknown"] += sum(word not in vocabulary for word in words)
    encoded = [vocabulary.encode(words) for words in usable + repeats]
    return {**entry, "captions": raw, "encoded": encoded}


def require_images(images_root, splits):
    """UserError unless the file of every entry is an image, by its header, and was not cut short;
    sets the width and height that an entry lacks."""
    entries = list(itertools.chain.from_iterable(splits.values()))
    _require_files([images_root / entry["file"] for entry in entries], "images")
    for entry in entries:
        path = images_root / entry["file"]
        width, height = image_size(path)
        require_whole(path)
        if not (_is_length(entry["width"]) and _is_length(entry["height"])):
            entry["width"] = width
            entry["height"] = height


def _is_length(value):
    return isinstance(value, int) and value > 0


def require_regions(regions, splits):
    """UserError unless there is a file of bottom-up features for every entry."""
    paths = []
    for split, entries in splits.items():
        paths += [regions_path(regions, split, entry["file"]) for entry in entries]
    _require_files(paths, "files of regions")


def _require_files(paths, what):
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} {what} are missing, the first is {missing[0]}"
        )


def _path_from(output, images_root):
    """The images folder as info.json names it: relative to `output` if it is inside, so that both
    can be moved together."""
    if images_root.resolve().is_relative_to(output.resolve()):
        return os.path.relpath(images_root, output)
    return str(images_root.resolve())


def _longest(splits):
    """The length of the longest encoded caption."""
    longest = 0
    for entries in splits.values():
        for entry in entries:
            longest = max(longest, *map(len, entry["encoded"]))
    return longest


def _write_files(output, vocabulary, splits, info):
    """Write all files and only then put them in their places, info.json last: it stands for a
    complete dataset. A failure leaves an earlier dataset as it was."""
    contents = {"info": info, "vocabulary": vocabulary.words, **splits}
    with ExitStack() as stack:  # leaves what it entered from the last to the first
        stack.callback(_remove_if_empty, output)
        temporaries = {}
        for name in contents:
            temporaries[name] = stack.enter_context(write_atomically(output / f"{name}.json"))
        for name, content in contents.items():
            write_json(temporaries[name], content, indent=None if name in splits else 1)
        for stale in {"info", "train", "val", "test"} - splits.keys():
            (output / f"{stale}.json").unlink(missing_ok=True)


def _remove_if_empty(folder):
    with suppress(OSError):
        folder.rmdir()


def remove_prepared(output):
    """Remove what makes a folder a prepared dataset, and its cached features; they are of images
    that are about to change."""
    for stale in (output / "info.json", *output.glob("features-*.h5")):
        stale.unlink(missing_ok=True)


# -------------------------------------------------------------------------------- caching features


def cache_features(
    folder,
    encoder,
    batch_size=32,
    workers=2,
    device="cpu",
    regions=None,
    augment=0,
    smallest_crop=1.0,
    seed=0,
    cut=None,
):
    """Write the features of all images to features-<encoder.name>.h5 in `folder` (featurecache.py),
    and the encoder's weights beside them, so that training knows them.

    regions: the folder of bottom-up features, for that encoder; augment: so many more versions of
    the train split, of images cropped (`image_transform`), jittered and mirrored by `seed`, each in
    a file of its own; cut: a CutEncoder of the encoder, for the outputs of its first part instead.
    Goes on where an interrupted run stopped. UserError if a file was made with other weights or for
    other images.
    """
    encoder = encoder.to(device, memory_format=torch.channels_last)  # twice as fast on CPUs
    stage = cut.stage if cut else None
    shape = cut.shape() if cut else (encoder.grid[0] * encoder.grid[1], encoder.out_channels)
    for version in range(augment + 1):
        transform = None
        if not regions:
            transform = image_transform(encoder.image_size, version > 0, smallest_crop)
        datasets = _datasets(folder, transform, regions, version, seed)
        path = features_path(folder, encoder.name, version, stage)
        room = {dataset.split: (len(dataset), files_hash(dataset.entries)) for dataset in datasets}
        augmentation = _augmentation(seed, smallest_crop) if version else ""
        lay_out(path, _stamp(encoder, cut, PREPROCESSING + augmentation), room, shape)
        if not version:  # not before the file has said that these are its weights
            write_tensors(encoder_path(folder, encoder.name, stage), encoder.state_dict())
        for dataset in datasets:
            title = f"{dataset.split}, augmented {version}" if version else dataset.split
            encode = cut.begin if cut else encoder
            write_missing_rows(path, dataset, encode, batch_size, workers, device, title)


def _datasets(folder, transform, regions, version, seed):
    """All splits of a prepared dataset, or train only for augmented images of version 1, 2, ..."""
    splits = ["train"] if version else read_json(Path(folder) / "info.json")["splits"]
    datasets = [CaptionDataset(folder, split, transform, regions=regions) for split in splits]
    if version:
        datasets[0].augmentation_seed = seed
        datasets[0].epoch = version
    return datasets


def _augmentation(seed, smallest_crop):
    """What the attributes of a cache say of augmented images."""
    crops = f", crops of {smallest_crop} and more" if smallest_crop < 1 else ""
    return f"; augmented, seed {seed}{crops}"


def _stamp(encoder, cut, preprocessing):
    """The attributes of a cache, which tell what made it."""
    stamp = {
        "encoder": encoder.name,
        "weights_hash": (cut or encoder).weights_hash(),
        "image_size": encoder.image_size or 0,
        "grid": encoder.grid,
        "preprocessing": preprocessing,
    }
    if cut:
        stamp["stage"] = cut.stage
    return stamp
