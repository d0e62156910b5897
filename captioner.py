"""The front door: the captioners there are, and how to build or load one.

    captioner = load_captioner("checkpoints/flickr8k.pt", device="cpu")
    captions = captioner.caption(images, method="beam", beam_size=3)    # lists of words
    explanations = captioner.explain(images)                            # one Explanation an image

What a captioner can do is in basemodel.py, how it explains in explanation.py.
"""

import re
from pathlib import Path

import torch

from aoamodel import AoACaptioner
from basemodel import CaptionerConfig, read_checkpoint
from clipmappermodel import is_clipmapper, load_clipmapper
from commandline import UserError, find_checkpoint
from encoder import Encoder
from explanation import METHODS, Explanation
from gridTDmodel import AdaptiveCaptioner, GridTDCaptioner
from prepared import dataset_folder
from pretrainedmodel import is_pretrained, load_pretrained
from readers import SOURCES
from softattentionmodel import SoftAttentionCaptioner
from vocabulary import Vocabulary

__all__ = [
    "METHODS",
    "MODELS",
    "CaptionerConfig",
    "Explanation",
    "build_captioner",
    "load_captioner",
]

MODELS = {
    "adaptive": AdaptiveCaptioner,
    "gridtd": GridTDCaptioner,
    "aoa": AoACaptioner,
    "soft": SoftAttentionCaptioner,
}

# What train.py adds to the name of a captioner that it fine-tunes, and the names that it gives.
TUNING = r"-([a-z_]+_tune)(?:-form_([a-z]+))?(?:-lambda_([0-9.]+))?"
CHECKPOINT_NAME = re.compile(
    rf"(?P<dataset>.+)-(?P<model_type>{'|'.join(MODELS)})(?P<tunings>(?:{TUNING})*)\.pt"
)


def build_captioner(config, vocabulary, encoder):
    """A captioner with random decoder weights over the given encoder.

    UserError if there is no such model_type.
    """
    if config.model_type not in MODELS:
        known = ", ".join(MODELS)
        raise UserError(f"there is no model_type '{config.model_type}'; choose from {known}")
    return MODELS[config.model_type](config, vocabulary, encoder)


def load_captioner(path, device="cpu", pretrained=True):
    """The captioner saved in `path`, in eval mode on `device`.

    path: a checkpoint; or for the captioners of pretrainedmodel.py a folder that transformers has
    saved, or a name of its hub such as "Salesforce/blip-image-captioning-base". These can only
    caption and explain; pretrained=False refuses them. UserError if the file is not one; if it is
    missing, with the commands that make it.
    """
    commands = commands_for(path)
    if commands and not find_checkpoint(path).exists():
        raise UserError(f"there is no checkpoint {path}; make it with: {' && '.join(commands)}")
    # Parameters that are made in inference mode could not be explained later.
    with torch.inference_mode(False):
        if pretrained and is_clipmapper(path):
            return load_clipmapper(path, device)
        if pretrained and is_pretrained(path):
            return load_pretrained(path, device)
        checkpoint = read_checkpoint(path, device)
        try:
            captioner = captioner_of(checkpoint)
        except UserError as error:
            raise UserError(f"{path} cannot be loaded: {error}") from None
        captioner.encoder.to(memory_format=torch.channels_last)  # twice as fast on CPUs
        return captioner.to(device).eval()


def captioner_of(checkpoint):
    """The captioner of the dict that `read_checkpoint` returns.

    UserError if there is no such captioner, encoder or vocabulary, or the weights do not fit.
    """
    config = CaptionerConfig(**checkpoint["config"])
    vocabulary = Vocabulary(checkpoint["vocabulary"])
    weights = checkpoint["state_dict"]
    # Sizes that no memory has room for show here, where nothing is allocated.
    with torch.device("meta"):
        expected = build_captioner(config, vocabulary, Encoder(config.encoder)).state_dict()
    if expected.keys() != weights.keys():
        name = min(expected.keys() ^ weights.keys())
        verb = "lacks" if name in expected else "has"
        raise UserError(f"it {verb} the weights {name}, against what its config says")
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            own = tuple(weights[name].shape)
            raise UserError(
                f"the weights {name} have the shape {own}, and not {tuple(tensor.shape)}, as the "
                "file's config has it"
            )
    captioner = build_captioner(config, vocabulary, Encoder(config.encoder))
    captioner.load_state_dict(weights)
    return captioner


def commands_for(path):
    """The commands that make the checkpoint `path`, in order, less those whose result is there.

    They are read off the names that train.py gives, checkpoints/DATASET-MODEL[-TUNING ...].pt. The
    list is empty for a file of another name, or in another folder.
    """
    path = Path(path)
    name = CHECKPOINT_NAME.fullmatch(path.name)
    if name is None or path.parent.resolve() != Path("checkpoints").resolve():
        return []
    dataset = name["dataset"]
    commands = []
    if dataset in SOURCES and not dataset_folder(dataset).is_dir():
        root = "" if dataset == "scenes" else " --root FOLDER"  # the scenes are drawn
        commands.append(f"python preparedataset.py --dataset {dataset}{root}")
    made = path.with_name(f"{dataset}-{name['model_type']}.pt")
    training = f"python train.py --dataset {dataset} --model_type {name['model_type']}"
    if not made.exists():
        commands.append(training)
    for number, tuning in enumerate(re.finditer(TUNING, name["tunings"])):
        command = f"{training} {tuning_flags(*tuning.groups())}"
        if number > 0:  # the first one starts from DATASET-MODEL.pt by itself
            command += f" --resume {made}"
        made = made.with_name(f"{made.name.removesuffix('.pt')}{tuning[0]}.pt")
        if not made.exists():
            commands.append(command)
    return commands


def tuning_flags(mode, form, weight):
    """The flags of train.py for the three groups of TUNING, of which the last two may be None."""
    flags = f"--{mode}"
    if form:
        flags += f" --lrp_form {form}"
    if weight:
        flags += f" --lrp_lambda {weight}"
    return flags
