"""One job on several processes, started by torchrun: who am I, which part is mine, put the parts together. In a file of its own
because training, evaluation and explanation all share their work in this one way.

    torchrun --nproc_per_node=4 train.py ...
    torchrun --nproc_per_node=4 evaluation.py ...

Work is shared by whole batches, never by rows of a batch, wherever a result must not depend on the number of processes: the same
batches are computed, only elsewhere. A script that was not started by torchrun is a job of one process, and nothing here is felt.
"""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from commandline import UserError, choose_device

PATIENCE = timedelta(
    hours=12
)  # with the slowest process: a share of the experiments takes hours, and PyTorch waits 30 minutes


def rank():
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """How many processes share the job."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_here():
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main():
    """Whether this process writes files and talks."""
    return rank() == 0


def restarted():
    """Whether torchrun started the processes anew, because one of them failed or others joined."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def own_device(name=None):
    """As `choose_device`; without a name, or for "cuda", the GPU that is this process' own on its machine."""
    if world_size() > 1 and (name or "").startswith("cuda:"):
        raise UserError(
            f"--device {name} would give all {world_size()} processes the same GPU; say --device cuda, or nothing"
        )
    if world_size() > 1 and name in (None, "cuda") and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this machine"
            )
        name = f"cuda:{local}"
    return choose_device(name)


@contextmanager
def job(device):
    """The processes know each other inside: by NCCL between GPUs, else by gloo. Ranks above 0 print nothing."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE
    )
    yield
    dist.destroy_process_group()  # not after an error: it may wait for the others, which wait for this process


def shared(items):
    """Every how-many-eth of a list is this process' own, beginning with its rank."""
    return items[rank() :: world_size()]


def gathered(found):
    """The union, in every process, of what each has found: dicts of different keys, sorted by key."""
    parts = [found]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, found)
    return dict(sorted(item for part in parts for item in part.items()))


def averaged(tensor):
    """The mean over all processes, in float64."""
    tensor = tensor.double()
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor / world_size()


def from_main(value):
    """The main process' value, in every process."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def seed_of(seed, step):
    """A seed for one step of this process."""
    return ((seed * 1_000_003 + step) * 1_000_003 + rank()) % 2**63


def parallel(step):
    """A module whose gradients are averaged over the processes; itself if there is but one."""
    return DistributedDataParallel(step) if world_size() > 1 else step


def share(words, device):
    """How much more, or less, than the mean this process' batch counts: its words over the mean number of words. With it the mean
    over processes of their mean losses is the mean over all words."""
    if world_size() == 1:
        return 1.0
    own = torch.full((), float(words), device=device)  # torch.tensor would wait for the GPU
    return (own / averaged(own)).float()
