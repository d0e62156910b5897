"""The cache of a frozen encoder's features: one HDF5 file for all splits, which says what made it.

    SPLIT         (n, L, D) float16     a row an image, in the order of SPLIT.json
    SPLIT_done    (n,) bool             which rows are written
    SPLIT_crc32   (n,) uint32           their checksums
    attributes: encoder, weights_hash, image_size, preprocessing, grid; of each SPLIT: files_hash

Of an encoder that is cut into two the rows are what a stage is given, instead of the features, and
the file has an attribute more, stage.

The file is laid out in full, with holes, before the first row is written; from then on only bytes
of rows and marks change. So the file is whole whenever the writer is killed, and lacks no more than
the batch that was being written.
"""

import hashlib
import itertools
import os
import zlib
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from commandline import UserError, write_atomically

READ_AT_ONCE = 256  # rows


def file_name(encoder):
    """An encoder's name as a part of a file's name; timm/NAME has a slash."""
    return encoder.replace("/", "-")


def features_path(folder, encoder, version=0, stage=None):
    """Where the features of the encoder called `encoder` are cached.

    version: 1, 2, ... for those of augmented images; stage: for what this stage is given.
    """
    ending = f"-augmented{version}" if version else ""
    return Path(folder) / f"features-{_cache_name(encoder, stage)}{ending}.h5"


def encoder_path(folder, encoder, stage=None):
    """Where the weights of the encoder that made the cached features lie (a state dict)."""
    return Path(folder) / f"encoder-{_cache_name(encoder, stage)}.pt"


def _cache_name(encoder, stage):
    name = file_name(encoder)
    return f"{name}@{stage}" if stage else name


def versions_of(folder, encoder, stage=None):
    """How many augmented versions of the features there are."""
    for version in itertools.count(1):
        if not features_path(folder, encoder, version, stage).exists():
            return version - 1


def cached_encoders(folder):
    """The names of the encoders whose features are cached in a folder, sorted."""
    names = []
    for path in sorted(Path(folder).glob("features-*.h5")):
        with suppress(OSError, KeyError), h5py.File(path, "r") as file:
            name = file.attrs["encoder"]
            if path == features_path(folder, name):  # not of augmented images, nor of a stage
                names.append(name)
    return sorted(names)


def files_hash(entries):
    """16 hex digits that tell one list of images from another, so that rows of a cache are never
    misattributed."""
    files = "\n".join(entry["file"] for entry in entries)
    return hashlib.sha256(files.encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------- writing


def lay_out(path, stamp, splits, shape):
    """Make room for {split: (images, files_hash)} rows of `shape` (L, D), unless that is done.

    UserError if the file was made with another stamp (a dict of attributes) or for other images.
    """
    if not path.exists():
        with write_atomically(path) as temporary, h5py.File(temporary, "w") as file:
            file.attrs.update(stamp)
            for split, (images, files) in splits.items():
                rows = _room(file, split, (images, *shape), np.float16)
                rows.attrs["files_hash"] = files
                _room(file, f"{split}_crc32", (images,), np.uint32)
                _room(file, f"{split}_done", (images,), bool)[:] = False
    with _opened(path, "r") as file:
        for key, value in stamp.items():
            if key not in file.attrs or not np.array_equal(file.attrs[key], value):
                raise UserError(
                    f"{path} was made with {key} {file.attrs.get(key)}, not {value}; "
                    "delete it to make it anew"
                )
        for split, (_, files) in splits.items():
            if split not in file or file[split].attrs["files_hash"] != files:
                raise UserError(
                    f"{path} was made for other images of split '{split}'; "
                    "delete it to make it anew"
                )


def _room(file, name, shape, dtype):
    """A dataset whose bytes have their place in the file already, so that no write ever moves or
    adds anything else."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    return file.create_dataset(name, shape, dtype, dcpl=properties, fill_time="never")


def _opened(path, mode):
    """The opened file. It is opened for one step at a time, since a worker that is forked meanwhile
    would hold its lock for as long as the worker lives.
    """
    try:
        return h5py.File(path, mode)
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened ({error}); wait if another run writes it, else delete it"
        ) from None


def missing_rows(path, split):
    """The indices of the rows that are not written yet."""
    with _opened(path, "r") as file:
        return np.flatnonzero(~file[f"{split}_done"][:]).tolist()


def write_rows(path, split, indices, rows):
    """Write rows (B, L, D) float16 at these indices, in rising order; they count only after they
    are in the file."""
    with _opened(path, "r+") as file:
        file[split][indices] = rows
        file[f"{split}_crc32"][indices] = [zlib.crc32(row.tobytes()) for row in rows]
        file.flush()
        file[f"{split}_done"][indices] = True


def write_missing_rows(path, dataset, encode, batch_size, workers, device, title):
    """Encode those images of a dataset, whose items are (image, captions, index), that have no row
    yet, with a progress bar called `title`.

    encode: a function, images (B, 3, S, S) -> rows (B, L, D).
    """
    todo = Subset(dataset, missing_rows(path, dataset.split))
    loader = DataLoader(todo, batch_size, num_workers=min(workers, len(todo)))
    with tqdm(total=len(todo), desc=title, unit="image") as bar:
        for images, _, indices in loader:
            with torch.inference_mode():
                features = encode(images.to(device)).half().cpu().numpy()
            write_rows(path, dataset.split, indices.numpy(), features)
            bar.update(len(indices))


# ----------------------------------------------------------------------------------------- reading


class FeatureReader:
    """Reads the rows of one split; every process (a DataLoader's worker) opens the file for itself,
    as HDF5 requires.

    files: the files_hash of the images whose rows are wanted; command: what makes such a file.
    attributes: those of the file, a dict. UserError if there is no such file, or if it is not
    complete for this split, or if it was made for other images.
    """

    def __init__(self, path, split, files, command):
        self.path = path
        self.split = split
        self._open = None  # (process id, file)
        if not path.exists():
            raise UserError(f"there is no {path}; run {command}")
        try:
            with h5py.File(path, "r") as file:
                self._require_rows(file, files, command)
                self.attributes = {name: _plain(value) for name, value in file.attrs.items()}
        except (OSError, KeyError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); delete it and run {command}"
            ) from None

    def _require_rows(self, file, files, command):
        """UserError unless the file has all rows of the split, of these images."""
        there = self.split in file and f"{self.split}_crc32" in file
        if not there or not file[f"{self.split}_done"][:].all():
            raise UserError(
                f"{self.path} is incomplete for split '{self.split}'; run {command}, "
                "it goes on where it stopped"
            )
        if file[self.split].attrs["files_hash"] != files:
            raise UserError(f"{self.path} was made for other images; delete it and run {command}")

    def __getstate__(self):
        return {**self.__dict__, "_open": None}

    def rows(self, start, stop):
        """The rows start to stop, float16 (stop - start, L, D). UserError if they are not what was
        written."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), h5py.File(self.path, "r"))
        file = self._open[1]
        rows = file[self.split][start:stop]
        checksums = file[f"{self.split}_crc32"][start:stop]
        for index, row, checksum in zip(range(start, stop), rows, checksums):
            if zlib.crc32(row.tobytes()) != checksum:
                raise UserError(
                    f"{self.path} is damaged at image {index} of split '{self.split}'; "
                    "delete it and make it anew"
                )
        return torch.from_numpy(rows)

    def all_rows(self, device):
        """All rows on a device, float16 (n, L, D)."""
        with h5py.File(self.path, "r") as file:
            shape = file[self.split].shape
        result = torch.empty(shape, dtype=torch.float16, device=device)
        for start in range(0, shape[0], READ_AT_ONCE):
            stop = min(start + READ_AT_ONCE, shape[0])
            result[start:stop] = self.rows(start, stop)
        return result


def _plain(value):
    """An attribute of an HDF5 file as a plain Python value."""
    return value.tolist() if hasattr(value, "tolist") else value
