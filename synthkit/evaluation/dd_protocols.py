"""How the dataset-distillation papers train the networks that judge a distilled set. No torch.

A number means nothing without its protocol: the same images give results tens of points apart under these (method card
`matching` 0.6 and 1.7). Each entry is what the released code does; selection on the test set is left out: the last
epoch is the result, the best one is shown as a diagnostic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from synthkit.errors import ConfigError

DEFAULT, LARGE = "dsa", "bank"
"""What a bank is judged by when its method has no protocol: with up to `LARGE_IPC` images per class, and above."""
LARGE_IPC = 100
OWN = "convnet"
"""Stands for the protocol of the bank's own method."""


@dataclass(frozen=True, kw_only=True)
class DDProtocol:
    """How fresh networks are trained on a distilled set."""

    description: str
    """One line for `synthkit list protocols`."""
    source: str
    """Where the released code says so."""
    epochs: int
    """E, passes over the set (see `restart` and `epochs_augmented`)."""
    epochs_augmented: int | None = None
    """E where the augmentation is on for this network and data (DC: only then 1000)."""
    batch_size: int = 256
    """Images per step; the last batch of an epoch may be smaller."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = 0.01
    """First learning rate."""
    learnt_lr: bool = False
    """Take the step size that the method learnt, where the bank holds one; the control is trained with it too."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """On all parameters."""
    restart: bool = True
    """DC's schedule: E + 1 epochs are run; after epoch E // 2 + 1 (from 0) the rate falls by `gamma` once and the
    optimiser is made anew, so that its momentum is lost."""
    milestones: tuple[float, ...] = ()
    """Without `restart`: shares of E at which the rate is multiplied by `gamma`."""
    gamma: float = 0.1
    """Factor of the learning rate."""
    augment: Literal["none", "dsa", "dc", "idc"] = "dsa"
    """dsa: one DSA family per batch, parameters per image. dc: DC's own, for digits and BatchNorm ConvNets only.
    idc: flip and colour, one of crop, scale and rotate, then cutout, on pixels before they are normalised."""
    cutmix: float = 0.0
    """Probability that a batch is mixed by CutMix with beta 1 (idc: cutout is left out where it is below 1)."""
    labels: Literal["hard", "soft"] = "hard"
    """soft: cross-entropy with the softmax of the bank's logits."""
    nets: int = 5
    """Networks of the published figures, per run."""
    arch: str | None = None
    """Network of the released code where it is not the instance-norm ConvNet."""

    def epochs_for(self, augmented: bool) -> int:
        """E for a network and data on which the augmentation does something or not."""
        return self.epochs_augmented if augmented and self.epochs_augmented else self.epochs

    def epochs_run(self, epochs: int) -> int:
        """Epochs that are really run when E = `epochs`."""
        return epochs + 1 if self.restart else epochs

    def rate(self, epoch: int, epochs: int) -> float:
        """Factor on the first learning rate in epoch `epoch` (from 0)."""
        if self.restart:
            return self.gamma if epoch > epochs // 2 + 1 else 1.0
        return self.gamma ** sum(epoch >= int(share * epochs) for share in self.milestones)

    def restarts(self, epoch: int, epochs: int) -> bool:
        """Whether the optimiser is made anew before epoch `epoch`."""
        return self.restart and epoch == epochs // 2 + 2


_THIRDS = (2 / 3, 5 / 6)
_DC = "VICO-UoE/DatasetCondensation@53f63a6 utils.py:evaluate_synset"
_MTT = "GeorgeCazenavette/mtt-distillation@50dccea utils.py:evaluate_synset"

DD_PROTOCOLS: dict[str, DDProtocol] = {
    "dc": DDProtocol(
        description="DC: SGD .01, 300 epochs without augmentation; digits and BatchNorm ConvNets 1000 with DC's own",
        source=_DC, epochs=300, epochs_augmented=1000, augment="dc", nets=20,
    ),
    "dsa": DDProtocol(
        description="DSA: SGD .01 (x0.1 after half), batch 256, 1000 epochs with DSA",
        source=_DC, epochs=1000, nets=20,
    ),
    "dm": DDProtocol(description="DM: as DSA", source=_DC, epochs=1000, nets=20),
    "mtt": DDProtocol(
        description="MTT, FTD, TESLA: SGD at the learnt step size, batch 256, 1000 epochs with DSA",
        source=_MTT, epochs=1000, learnt_lr=True,
    ),
    "datm": DDProtocol(
        description="DATM: as MTT, batch 128, learnt soft labels",
        source="NUS-HPC-AI-Lab/DATM@97ae510", epochs=1000, batch_size=128, learnt_lr=True, labels="soft",
    ),
    "idc": DDProtocol(
        description="IDC: SGD .01 (x0.2 at 2/3 and 5/6), batch 64, 1000 epochs, all of DSA and CutMix",
        source="snu-mllab/Efficient-Dataset-Condensation@ceac95a", epochs=1000, batch_size=64, restart=False,
        milestones=_THIRDS, gamma=0.2, augment="idc", cutmix=1.0, nets=3,
    ),
    "datadam": DDProtocol(
        description="DataDAM: SGD .01 (x0.1 after half), batch 64, 1800 epochs with DSA, BatchNorm ConvNet",
        source="DataDistillation/DataDAM@0f6ea09", epochs=1800, batch_size=64, nets=10, arch="convnet_bn",
    ),
    "ncfm": DDProtocol(
        description="NCFM: AdamW .001 (x0.5 at every fifth), batch 128, 2000 epochs, DSA without cutout, CutMix .5",
        source="gszfwsb/NCFM@de92fb8", epochs=2000, batch_size=128, optimizer="adamw", lr=1e-3, weight_decay=0.01,
        restart=False, milestones=(0.2, 0.4, 0.6, 0.8), gamma=0.5, augment="idc", cutmix=0.5, nets=10,
    ),
    "dc_bench": DDProtocol(
        description="DC-Bench: SGD .01 (x0.1 at half), batch 256, 300 epochs, no augmentation",
        source="justincui03/dc_benchmark@2a57711", epochs=300, restart=False, milestones=(0.5,), augment="none",
    ),
    "dd_ranking": DDProtocol(
        description="DD-Ranking, hard labels: SGD .01 (x0.1 at half), batch 128, 1000 epochs with DSA",
        source="NUS-HPC-AI-Lab/DD-Ranking@b8b0966", epochs=1000, batch_size=128, restart=False, milestones=(0.5,),
    ),
    "bank": DDProtocol(
        description="banks of thousands: SGD .05 (x0.1 at .6 and .85), batch 128, 30 epochs with DSA, soft labels",
        source="synthkit's own", epochs=30, batch_size=128, lr=0.05, restart=False, milestones=(0.6, 0.85),
        labels="soft", nets=3,
    ),
}  # fmt: skip

_OF_METHOD = {"ftd": "mtt", "tesla": "mtt"}


def protocol_named(name: str) -> DDProtocol:
    """The protocol called `name`.

    Raises:
        ConfigError: no such protocol; the nearest one is offered.
    """
    if name not in DD_PROTOCOLS:
        allowed = [OWN, *DD_PROTOCOLS]
        raise ConfigError("protocol: not known", got=name, allowed=allowed, hint="synthkit list protocols")
    return DD_PROTOCOLS[name]


def own_protocol(recipe: Mapping[str, Any], per_class: float, *, soft: bool = False) -> tuple[str, str]:
    """(protocol, why) for a bank with this recipe: that of its method, else `DEFAULT` or `LARGE`.

    Args:
        per_class: images per class.
        soft: whether the bank stores learnt soft labels beside its classes (trajectory matching as in DATM).
    """
    method = recipe.get("method")
    name = str(method.get("name", "")) if isinstance(method, Mapping) else str(method or "")
    known = _OF_METHOD.get(name, name)
    if known == "mtt" and soft:
        return "datm", f"the bank was made by {name} with learnt soft labels"
    if known in DD_PROTOCOLS:
        return known, f"the bank was made by {name}"
    why = f"{name or 'the bank'} has no protocol of its own"
    return (LARGE, f"{why}, and more than {LARGE_IPC} images per class") if per_class > LARGE_IPC else (DEFAULT, why)


def own_arch(recipe: Mapping[str, Any], side: int) -> str:
    """The network that the bank was distilled with, else the ConvNet of the depth that suits the image size."""
    method = recipe.get("method")
    arch = method.get("arch") if isinstance(method, Mapping) else None
    if isinstance(arch, str) and arch:
        return arch
    depth = 3 if side < 64 else 4 if side < 128 else 5 if side < 256 else 6
    return "convnet" if depth == 3 else f"convnet_d{depth}"
