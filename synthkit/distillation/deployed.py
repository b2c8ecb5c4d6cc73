"""What a finished student is used as: the network alone, or with the modules that its loss deploys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from synthkit.distillation.contract import Loss
from synthkit.distillation.outputs import save_network
from synthkit.distillation.weighted import WeightedSum
from synthkit.evaluation.cost import network_cost
from synthkit.models.card import ModelCard
from synthkit.models.view import TeacherView
from synthkit.runtime import RunDir

if TYPE_CHECKING:
    from synthkit.distillation.trainer import Trainer


class Deployed:
    """The student of a trainer as its loss deploys it.

    Args:
        trainer: holds the network and, where asked for, its moving average.
        loss: the loss it was trained with.
    """

    def __init__(self, trainer: Trainer, loss: Loss):
        self.trainer, self.loss = trainer, loss
        self.module: nn.Module | None = loss.deploy(trainer.network) if loss.requires.deploys else None

    def view(self) -> TeacherView | None:
        """A frozen copy of the whole, or None where the student stands alone."""
        return None if self.module is None else self.trainer.seen_as(copy.deepcopy(self.module))

    def costs(self) -> dict[str, int]:
        """Parameters and FLOPs of one image with the deployed modules, and of the student alone."""
        assert self.module is not None
        size = self.trainer.view.input_size
        whole, plain = network_cost(self.module, size), network_cost(self.trainer.network, size)
        return {
            "deployed_params": whole["params"],
            "deployed_flops": whole["flops"],
            "plain_params": plain["params"],
            "plain_flops": plain["flops"],
        }

    def head(self) -> dict[str, Any]:
        """How `load_model` builds the deployed network again: the loss's name and its settings."""
        name, loss = _name_of(self.loss)
        return {"loss": name, "settings": loss.deployed_settings()}

    def save(self, run: RunDir, card: Callable[[str], ModelCard]) -> None:
        """Write the model of the run: what is deployed; beside it `plain/` (the student alone, where modules are
        deployed with it) and `ema/` (the moving average, where there is one)."""
        if self.module is not None:
            own = card("plain_")
            own.extra["note"] = "the student alone, without the modules that its loss deploys"
            save_network(RunDir(run.path / "plain").create(), self.trainer.network, own, "student.safetensors")
        if self.trainer.average is not None:
            own = card("ema_")
            own.extra["note"] = f"moving average of the weights, decay {self.trainer.decay:g} per step"
            save_network(RunDir(run.path / "ema").create(), self.trainer.average, own, "student.safetensors")
        whole = card("")
        if self.module is not None:
            whole.extra["head"] = self.head()
        save_network(run, self.module or self.trainer.network, whole, "student.safetensors")


def _name_of(loss: Loss) -> tuple[str, Loss]:
    """(name in the table, loss) of the one that deploys."""
    if isinstance(loss, WeightedSum):
        assert loss.deployer is not None  # `requires.deploys` says so
        return loss.deployer
    from synthkit import tables

    here = f"{type(loss).__module__}:{type(loss).__qualname__}"
    return next(name for name, place in tables.losses().items() if place == here), loss
