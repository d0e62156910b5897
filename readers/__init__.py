"""Raw files of a dataset -> one in-memory form, `Raw`. Every format has a file here, and every
dataset a row of SOURCES.

A reader takes the root folder of its dataset and returns a `Raw`. The datasets differ in their
reader and nowhere else.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from commandline import UserError
from readers.coco import read_coco2017, read_scenes
from readers.karpathy import read_flickr8k, read_flickr30k, read_karpathy
from readers.pairs import read_pairs
from readers.records import Raw, require_folder

__all__ = ["SOURCES", "Raw", "Source", "read_raw", "require_folder"]


class Source(NamedTuple):
    """A dataset: its reader, its limits, and what its root folder must hold."""

    read: Callable  # root folder, and by name what `takes` lists -> Raw
    min_word_freq: int  # words that are seen less often in the training captions are <unk>
    max_length: int  # of a caption, in words
    layout: str
    takes: tuple = ()  # "captions", the file of them, and "seed"; of one's own images only

    @property
    def own(self):
        """Whether it is a format of one's own images, and no dataset with a name."""
        return "captions" in self.takes


SOURCES = {
    "scenes": Source(read_scenes, 3, 30, "nothing, it is drawn"),
    "coco2017": Source(read_coco2017, 4, 30, "annotations/, train2017/ and val2017/"),
    "flickr30k": Source(read_flickr30k, 3, 50, "dataset_flickr30k.json and images/"),
    "flickr8k": Source(read_flickr8k, 3, 50, "dataset_flickr8k.json and images/"),
    "karpathy": Source(read_karpathy, 3, 50, "dataset_*.json and images/", ("captions",)),
    "csv": Source(read_pairs, 3, 50, "the images", ("captions", "seed")),
}


def read_raw(name, root, captions=None, seed=0):
    """The Raw of the dataset `name` in the folder `root`.

    captions: the file of one's own captions; seed: what divides one's own images into splits. Both
    are for the sources that take them. UserError for what is missing or damaged, or if there is no
    image for train or val.
    """
    source = SOURCES[name]
    root = Path(root)
    require_folder(root, f"the root of {name}, which holds {source.layout}")
    options = {"captions": captions, "seed": seed}
    raw = source.read(root, **{name: options[name] for name in source.takes})
    for split in ("train", "val"):
        if not raw.splits.get(split):
            raise UserError(f"split '{split}' is empty: {root} lists no images for it")
    return raw
