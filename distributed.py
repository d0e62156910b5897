"""One job on several processes, started by torchrun: which process this is, which part of the work
is its own, and how the results are put together.

    torchrun --nproc_per_node=4 train.py ...
    torchrun --nproc_per_node=4 evaluation.py ...

Training, evaluation and explanation all divide their work in this one way. They divide it by whole
batches, never by rows of a batch, wherever a result must not depend on the number of processes: the
same batches are computed, only elsewhere. A script that torchrun did not start is a job of one
process, and for it these functions do nothing.
"""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from commandline import UserError, choose_device

# How long to wait for the slowest process. One part of the experiments takes hours; PyTorch would
# wait for 30 minutes.
PATIENCE = timedelta(hours=12)


def _setting(name, alone):
    """What torchrun has set in the environment, an int; `alone` where it did not start this.

    UserError for what torchrun would not set.
    """
    text = os.environ.get(name, str(alone))
    if not text.isdecimal() or int(text) < (1 if name.endswith("WORLD_SIZE") else 0):
        raise UserError(f"the environment has {name}={text}; unset it, or start by torchrun")
    return int(text)


def rank():
    """The number of this process, from 0."""
    return _setting("RANK", 0)


def world_size():
    """How many processes share the job."""
    return _setting("WORLD_SIZE", 1)


def processes_here():
    """How many processes of the job run on this machine."""
    return _setting("LOCAL_WORLD_SIZE", 1)


def is_main():
    """Whether this process writes files and talks."""
    return rank() == 0


def restarted():
    """Whether torchrun started the processes again, because one failed or others joined."""
    return _setting("TORCHELASTIC_RESTART_COUNT", 0) > 0


def own_device(name=None):
    """The device of this process: as `choose_device`, but each process gets a GPU of its own.

    name: None or "cuda" for such a GPU, or another device. UserError for the name of a single GPU,
    or if the machine has fewer GPUs than processes.
    """
    if world_size() == 1:
        return choose_device(name)
    if name is not None and name.startswith("cuda:"):
        raise UserError(
            f"all {world_size()} processes would share the device '{name}'; "
            "say cuda, or nothing, and each takes a GPU of its own"
        )
    if name in (None, "cuda") and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        local_rank = _setting("LOCAL_RANK", 0)
        if local_rank >= gpus:
            raise UserError(f"--nproc_per_node is more than the {gpus} GPUs of this machine")
        name = f"cuda:{local_rank}"
    return choose_device(name)


@contextmanager
def job(device):
    """A context in which the processes can exchange tensors: by NCCL between GPUs, else by gloo."""
    if world_size() == 1:
        yield
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"the environment has WORLD_SIZE={world_size()} and no {name}; unset it, or start "
                "by torchrun"
            )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    yield
    # Not after an error: this may wait for the others, which wait for this process.
    dist.destroy_process_group()


def shared(items):
    """This process's part of a list: of n processes every n-th item, from its rank on."""
    return items[rank() :: world_size()]


def gathered(found):
    """The union of what the processes have found, in every process.

    found: a dict; where several processes have the same key, they have the same value. The result
    is sorted by key.
    """
    parts = [found]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, found)
    union = {}
    for part in parts:
        union.update(part)
    return dict(sorted(union.items()))


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
    """A module whose gradients are averaged over the processes; itself if there is only one."""
    return DistributedDataParallel(step) if world_size() > 1 else step


def loss_weight(num_words, device):
    """What this process' loss is multiplied by: its number of words over the mean of all processes.

    With it the mean over processes of their mean losses is the mean over all words.
    """
    if world_size() == 1:
        return 1.0
    own = torch.full((), float(num_words), device=device)  # torch.tensor would wait for the GPU
    return (own / averaged(own)).float()
