"""The cache of a frozen encoder's features: one HDF5 file for all splits, float16, with what made it. In a file of its own because
preparedataset.py writes what captiondata.py reads.

    SPLIT         (n, L, D) float16     a row an image, in the order of SPLIT.json
    SPLIT_done    (n,) bool             which rows there are
    SPLIT_crc32   (n,) uint32           their checksums
    attributes: encoder, weights_hash, image_size, preprocessing, grid; of each SPLIT: files_hash

The file is laid out in full, with holes, before the first row comes; from then on only bytes of rows and marks change. So it is whole
whenever the writer is killed, and lacks no more than the batch that was on its way.
"""

import os
import zlib
from pathlib import Path

import h5py
import numpy as np
import torch

from commandline import UserError, write_atomically

READ_AT_ONCE = 256  # rows


def features_path(folder, encoder, version=0):
    """Where the features of the encoder called `encoder` are cached; version 1, 2, ...: of augmented images."""
    return Path(folder) / f"features-{encoder}{f'-augmented{version}' if version else ''}.h5"


def encoder_path(folder, encoder):
    """Where the weights of the encoder that made the cached features lie (a state dict)."""
    return Path(folder) / f"encoder-{encoder}.pt"


def versions_of(folder, encoder):
    """How many augmented versions of the features are there."""
    return next(
        count
        for count in range(len(os.listdir(folder)) + 1)
        if not features_path(folder, encoder, count + 1).exists()
    )


def lay_out(path, stamp, splits, shape):
    """Make room for {split: (images, files_hash)} rows of `shape` (L, D), unless that is done. UserError if the file was made with
    another stamp (a dict of attributes) or for other images."""
    if not path.exists():
        with write_atomically(path) as temporary, h5py.File(temporary, "w") as file:
            file.attrs.update(stamp)
            for split, (images, files) in splits.items():
                _room(file, split, (images, *shape), np.float16).attrs["files_hash"] = files
                _room(file, f"{split}_crc32", (images,), np.uint32)
                _room(file, f"{split}_done", (images,), bool)[:] = False
    with _opened(path, "r") as file:
        for key, value in stamp.items():
            if key not in file.attrs or not np.array_equal(file.attrs[key], value):
                raise UserError(
                    f"{path} was made with {key} {file.attrs.get(key)}, not {value}; delete it to make it anew"
                )
        for split, (_, files) in splits.items():
            if split not in file or file[split].attrs["files_hash"] != files:
                raise UserError(
                    f"{path} was made for other images of split '{split}'; delete it to make it anew"
                )


def _room(file, name, shape, dtype):
    """A dataset whose bytes have their place in the file already, so that no write ever moves or adds anything else."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    return file.create_dataset(name, shape, dtype, dcpl=properties, fill_time="never")


def _opened(path, mode):
    """The file; for one step only: a worker forked while it is open would hold its lock for as long as it lives."""
    try:
        return h5py.File(path, mode)
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened ({error}); wait if another run writes it, else delete it"
        ) from None


def missing_rows(path, split):
    """The indices of the rows that are not there yet."""
    with _opened(path, "r") as file:
        return np.flatnonzero(~file[f"{split}_done"][:]).tolist()


def write_rows(path, split, indices, rows):
    """Write rows (B, L, D) float16 at these indices, in rising order; they count only after they are in the file."""
    with _opened(path, "r+") as file:
        file[split][indices] = rows
        file[f"{split}_crc32"][indices] = [zlib.crc32(row.tobytes()) for row in rows]
        file.flush()
        file[f"{split}_done"][indices] = True


class FeatureReader:
    """Reads the rows of one split; every process (a DataLoader's worker) opens the file for itself, as HDF5 requires.

    UserError if there is no such file, or it is not complete for this split, or was made for other images. attributes: a dict.
    """

    def __init__(self, path, split, files, command):
        self.path, self.split, self._open = path, split, None
        if not path.exists():
            raise UserError(f"there is no {path}; run {command}")
        try:
            with h5py.File(path, "r") as file:
                if (
                    split not in file
                    or f"{split}_crc32" not in file
                    or not file[f"{split}_done"][:].all()
                ):
                    raise UserError(
                        f"{path} is incomplete for split '{split}'; run {command}, it goes on where it stopped"
                    )
                if file[split].attrs["files_hash"] != files:
                    raise UserError(
                        f"{path} was made for other images; delete it and run {command}"
                    )
                self.attributes = {
                    name: value.tolist() if hasattr(value, "tolist") else value
                    for name, value in file.attrs.items()
                }
        except (OSError, KeyError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); delete it and run {command}"
            ) from None

    def __getstate__(self):
        return {**self.__dict__, "_open": None}

    def rows(self, start, stop):
        """The rows start to stop, float16 (stop - start, L, D). UserError if they are not what was written."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = os.getpid(), h5py.File(self.path, "r")
        file = self._open[1]
        rows, checksums = file[self.split][start:stop], file[f"{self.split}_crc32"][start:stop]
        for place, (row, checksum) in enumerate(zip(rows, checksums)):
            if zlib.crc32(row.tobytes()) != checksum:
                raise UserError(
                    f"{self.path} is damaged at image {start + place} of split '{self.split}'; delete it and make it anew"
                )
        return torch.from_numpy(rows)

    def all_rows(self, device):
        """All rows on a device."""
        with h5py.File(self.path, "r") as file:
            shape = file[self.split].shape
        result = torch.empty(shape, dtype=torch.float16, device=device)
        for start in range(0, shape[0], READ_AT_ONCE):
            result[start : start + READ_AT_ONCE] = self.rows(
                start, min(start + READ_AT_ONCE, shape[0])
            )
        return result
