"""Weighted sums of losses: `--loss "ce+0.9*kd+dkd@ramp20"`. No torch at import.

A term is `[WEIGHT*]NAME[@SCHEDULE]`, terms are joined by `+`. The schedule is a factor of the weight that follows the
epochs e (counted from 0, whole epochs, as the sources do): `ramp20` = min(e / 20, 1), `until30` = 1 before epoch 30,
`from30` = 1 from epoch 30 on, `cosine` = (1 + cos(pi p)) / 2 over the run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit import tables
from synthkit.distillation.contract import Batch, Look, Loss, LossNeeds, Setup, Taps
from synthkit.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SCHEDULES = ("rampN", "untilN", "fromN", "cosine")
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_TERM = re.compile(
    rf"(?:(?P<weight>{_NUMBER}(?:[eE]-?[0-9]+)?)\*)?(?P<name>\w+)(?:@(?P<form>[a-z]+)(?P<at>{_NUMBER}?))?"
)


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a sum."""

    name: str
    weight: float = 1.0
    form: str = ""
    """ramp, until, from, cosine, or nothing for a constant weight."""
    at: float = 0.0
    """The epoch of the schedule."""

    def counts(self, epoch: float) -> bool:
        """Whether the term is there at all: a phase that is over, or has not begun, costs nothing."""
        return self.form not in ("until", "from") or (math.floor(epoch) < self.at) == (self.form == "until")

    def factor(self, epoch: float, progress: float) -> float:
        """The weight at this point of the run."""
        whole = math.floor(epoch)
        if self.form == "ramp":
            return self.weight * min(whole / self.at, 1.0)
        if self.form == "cosine":
            return self.weight * 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.weight if self.counts(epoch) else 0.0


def parse_terms(expression: str) -> tuple[Term, ...]:
    """The terms of a sum.

    Raises:
        ConfigError: a term that cannot be read, an unknown loss or schedule, a loss named twice, or an epoch in which
            no term counts.
    """
    found: list[Term] = []
    for text in expression.replace(" ", "").split("+"):
        match = _TERM.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"loss {expression!r}: cannot read the term {text!r}",
                hint="a term is [WEIGHT*]NAME[@SCHEDULE], for example ce+0.9*kd+dkd@ramp20",
            )
        name, form, at = match["name"], match["form"] or "", match["at"] or ""
        if name not in tables.losses():
            raise ConfigError("loss: not a known loss", got=name, allowed=tables.losses(), hint="synthkit list losses")
        if name in [term.name for term in found]:
            raise ConfigError(f"loss {expression!r}: {name} is named twice", hint="add the weights up")
        known = form in ("", "ramp", "until", "from", "cosine")
        if not known or (form in ("ramp", "until", "from")) != bool(at) or (form == "ramp" and float(at) <= 0):
            raise ConfigError(f"loss {expression!r}: no such schedule", got=f"@{form}{at}", allowed=SCHEDULES)
        found.append(Term(name, float(match["weight"] or 1.0), form, float(at or 0)))
    for epoch in sorted({0, *(math.ceil(term.at) for term in found)}):
        if not any(term.counts(epoch) for term in found):
            raise ConfigError(
                f"loss {expression!r}: from epoch {epoch} on no term counts, so nothing would be learnt",
                hint="add a term without until or from, for example kd",
            )
    return tuple(found)


@functools.cache
def weighted_sum(expression: str) -> type[WeightedSum]:
    """The loss class of a sum; its Config has one field per term, the term's own config."""
    terms = parse_terms(expression)
    kinds = {term.name: tables.lookup("loss", term.name) for term in terms}
    members = [(name, kind.Config, dataclasses.field(default_factory=kind.Config)) for name, kind in kinds.items()]
    config = dataclasses.make_dataclass("Config", members, frozen=True, kw_only=True)
    config.__doc__ = f"Options of the terms of {expression}."
    return type("WeightedSum", (WeightedSum,), {"Config": config, "terms": terms, "__doc__": f"The sum {expression}."})


class WeightedSum(Loss):
    """A weighted sum of losses; made by `weighted_sum`."""

    terms: ClassVar[tuple[Term, ...]] = ()

    def __init__(self, config: Any = None):
        super().__init__(config)
        self.losses: dict[str, Loss] = {
            term.name: tables.lookup("loss", term.name)(getattr(self.config, term.name)) for term in self.terms
        }
        self.requires = _merged([loss.requires for loss in self.losses.values()])

    @property
    def stands_alone(self) -> bool:
        """Whether one of the terms does."""
        return any(loss.stands_alone for loss in self.losses.values())

    def setup(self, setup: Setup) -> None:
        from torch import nn

        for loss in self.losses.values():
            loss.setup(setup)
        owned = {name: loss.aux for name, loss in self.losses.items() if loss.aux is not None}
        self.aux = nn.ModuleDict(owned) if owned else None

    def prepare(self, looks: Callable[[], Iterator[Look]]) -> None:
        for loss in self.losses.values():
            loss.prepare(looks)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for term in self.terms:
            if not term.counts(batch.epoch):
                continue
            factor = term.factor(batch.epoch, batch.progress)
            for name, value in self.losses[term.name](student, teacher, batch).items():
                found[name] = value if factor == 1.0 else factor * value
        return found

    def parameter_groups(self, student: nn.Module) -> list[dict[str, Any]] | None:
        own = {name: groups for name, loss in self.losses.items() if (groups := loss.parameter_groups(student))}
        if len(own) > 1:
            raise ConfigError("these losses bring their own optimiser groups", got=list(own), hint="use one of them")
        for name, groups in own.items():
            others = [loss.aux for other, loss in self.losses.items() if other != name and loss.aux is not None]
            rest = [p for aux in others for p in aux.parameters()]
            return [*groups, {"params": rest}] if rest else groups
        return None

    def on_step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        for loss in self.losses.values():
            loss.on_step(optimizer, progress)

    @property
    def deployer(self) -> tuple[str, Loss] | None:
        """(name, loss) of the term that deploys modules with the student."""
        return next(((name, loss) for name, loss in self.losses.items() if loss.requires.deploys), None)

    def deploy(self, student: nn.Module) -> nn.Module | None:
        return None if self.deployer is None else self.deployer[1].deploy(student)

    def deployed_settings(self) -> dict[str, Any]:
        return {} if self.deployer is None else self.deployer[1].deployed_settings()


def _merged(needs: list[LossNeeds]) -> LossNeeds:
    """All needs at once.

    Raises:
        ConfigError: two losses deploy modules.
    """
    if sum(n.deploys for n in needs) > 1:
        raise ConfigError("two losses of the sum deploy modules with the student", hint="use one of them")
    merged: dict[str, Any] = {}
    for entry in dataclasses.fields(LossNeeds):
        values = [getattr(n, entry.name) for n in needs]
        if isinstance(values[0], bool):
            merged[entry.name] = any(values)
        elif isinstance(values[0], tuple):
            merged[entry.name] = tuple(dict.fromkeys(v for group in values for v in group))
        else:
            merged[entry.name] = max(values)
    return LossNeeds(**merged)
