"""A training that goes epoch by epoch, keeps the best, and goes on where it was interrupted.

It is what train_clip.py and train_clipmapper.py share. Captioners with an LSTM are trained by
trainer.py, which does far more.
"""

import torch

from commandline import UserError, write_tensors
from trainer import build_scheduler

MOST_GRADIENT = 1.0  # the norm to which a step's gradient is cut


class Epochs:
    """A model, AdamW with a cosine schedule, and the epochs that it has seen.

    parameters: those of the model that are trained; settings: the flags that a resumed training has
    to repeat, among them epochs, lr and weight_decay; steps: of the optimizer, in all epochs.
    """

    def __init__(self, model, parameters, settings, steps, device):
        self.model = model
        self.parameters = list(parameters)
        self.settings = settings
        self.device = device
        self.epoch = 0
        self.best = -1.0
        self.history = []
        self.optimizer = torch.optim.AdamW(
            self.parameters, settings["lr"], (0.9, 0.98), weight_decay=settings["weight_decay"]
        )
        self.scheduler = build_scheduler(self.optimizer, "cosine", max(1, steps))

    def seed(self):
        """The seed of this epoch, whatever was drawn before."""
        return self.settings["seed"] * 10_007 + self.epoch

    def generator(self):
        """The random numbers that choose this epoch's examples."""
        return torch.Generator().manual_seed(self.seed())

    def autocast(self):
        """The context of a forward pass: bfloat16 on a GPU."""
        on_gpu = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu)

    def descend(self, loss):
        """One step down the gradient of a loss; returns the loss without its graph."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MOST_GRADIENT)
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach()

    def fit(self, training, last, criterion, save):
        """Train the epochs that are left.

        training: has train_epoch() -> the mean loss in nats, and measured(split) -> {name: figure};
        last: the file that holds what is needed to go on, which is read if it is there; criterion:
        the figure of the split val by which the best epoch is chosen; save: writes the model.
        """
        if last.exists():
            resume_from(self, last)
            print(f"going on after epoch {self.epoch} of {last}")
        while self.epoch < self.settings["epochs"]:
            torch.manual_seed(self.seed())  # for dropout
            loss = training.train_epoch()
            self.epoch += 1
            found = training.measured("val")
            self.history.append({"epoch": self.epoch, "loss": loss, **found})
            print(f"epoch {self.epoch}: loss {loss:.3f}, val {criterion} {found[criterion]:.4f}")
            if found[criterion] > self.best:
                self.best = found[criterion]
                save()
            write_tensors(last, self.state())

    def state(self):
        """All that is needed to go on."""
        return {
            "settings": self.settings,
            "epoch": self.epoch,
            "best": self.best,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state(self, state):
        """Go on with what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch = state["epoch"]
        self.best = state["best"]
        self.history = state["history"]


def resume_from(training, path):
    """Go on with an interrupted training of which `path` holds what its `state()` returned.

    training: has `settings`, `device`, and `load_state`. UserError if the file is of other
    settings, or of something else.
    """
    try:
        state = torch.load(path, map_location=training.device, weights_only=True)
        if state["settings"] != training.settings:
            raise UserError(f"{path} is of other settings; repeat them, or delete it")
        training.load_state(state)
    except UserError:
        raise
    except Exception:  # whatever PyTorch makes of bytes that are not its own
        raise UserError(f"{path} holds no training of this command; delete it") from None
