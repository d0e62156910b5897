"""The folder of a prepared dataset: where it is, and what its info.json says.

captiondata.py reads and writes what else is in it.
"""

from pathlib import Path

from commandline import UserError, read_json


def dataset_folder(name):
    """data/NAME for a bare name, else the path itself."""
    return Path("data") / name if Path(name).name == name else Path(name)


def source_of(info):
    """Which row of readers.SOURCES a prepared dataset was read by, of what `read_info` returns."""
    return info.get("source", info["name"])  # earlier preparations are called by their source


def folder_of(about):
    """The folder of the prepared dataset that a captioner was trained on.

    about: what its checkpoint says of where it comes from. UserError if it does not say that, or
    the dataset is not there any more.
    """
    name = about.get("dataset")
    if name is None:
        raise UserError("the checkpoint does not say what it was trained on; name the dataset")
    trained_on = about.get("folder")
    folders = [Path(trained_on)] if trained_on else []
    folders.append(dataset_folder(name))
    for folder in folders:
        if (folder / "info.json").exists():
            return folder
    raise UserError(
        f"the captioner was trained on {name}, and there is no prepared dataset {folders[0]}; "
        "make it by preparedataset.py, or name another dataset"
    )


def read_info(folder):
    """The dict in info.json of a prepared dataset. UserError if the folder is none, or damaged."""
    path = Path(folder) / "info.json"
    if not path.exists():
        raise UserError(
            f"{folder} is not a prepared dataset; "
            f"run: python preparedataset.py --output {folder} ..."
        )
    info = read_json(path)
    require_sound(_is_info, info, path)
    return info


def require_sound(test, content, path):
    """UserError unless the content of a file passes. It does not if the file was edited or copied
    from another preparation."""
    try:
        sound = test(content)
    except (TypeError, KeyError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise UserError(
            f"{path} is damaged or of another preparation than its neighbours; "
            "run preparedataset.py again"
        )


def _is_info(info):
    if not isinstance(info["splits"], dict) or not isinstance(info["max_length"], int):
        return False
    return {"name", "images_root", "categories"} <= info.keys()
