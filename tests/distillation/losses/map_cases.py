"""What the tests of the map losses share: golden cases, taps and set-ups made of bare maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthkit.distillation.contract import Batch, Setup, Shapes, Taps
from synthkit.models.init import seeded

REFERENCE = Path(__file__).parents[2] / "reference"


def golden(name: str) -> dict[str, torch.Tensor]:
    """The case's inputs and outputs."""
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def close(found: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    a, b = (
        x.detach() if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64) for x in (found, expected)
    )
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def maps(case: dict[str, torch.Tensor], prefix: str, *, grad: bool = False) -> list[torch.Tensor]:
    """prefix0, prefix1, ... of the case."""
    names = [f"{prefix}{i}" for i in range(9) if f"{prefix}{i}" in case]
    return [case[name].clone().requires_grad_(grad) for name in names]


def random_maps(*shapes: tuple[int, ...], seed: int = 0, grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_(grad) for s in shapes]


def taps(features: list[torch.Tensor], *, kind: str = "maps", pooled: torch.Tensor | None = None) -> Taps:
    return Taps(logits=torch.zeros(len(features[0]), 3), pooled=pooled, **{kind: features})


def shapes(found: Taps) -> Shapes:
    per_map = {k: [tuple(f.shape[1:]) for f in getattr(found, k) or []] for k in ("maps", "preact")}
    return Shapes(pooled=0 if found.pooled is None else found.pooled.shape[1], **per_map)


def build(loss: Any, student: Taps, teacher: Taps, *, seed: int = 0) -> Any:
    """The loss after `setup`, its modules in float64."""
    facts = {"num_classes": 3, "batch_size": len(student.logits), "epochs": 2, "images": 32, "seed": seed}
    loss.setup(Setup(student=shapes(student), teacher=shapes(teacher), **facts))
    if loss.aux is not None:
        loss.aux.double().train()
    return loss


def batch_of(found: Taps) -> Batch:
    return Batch(images=torch.zeros(len(found.logits), 1, 2, 2))


def run(loss: Any, student: Taps, teacher: Taps) -> torch.Tensor:
    """The one value of the loss."""
    values = loss(student, teacher, batch_of(student))
    assert len(values) == 1
    return next(iter(values.values()))


def fill(module: torch.nn.Module, case: dict[str, torch.Tensor], prefixes: dict[str, str]) -> None:
    """Load the case's tensors into `module`: own submodule name -> name in the case."""
    for own, theirs in prefixes.items():
        part = module.get_submodule(own)
        start = f"{theirs}."
        state = {k.removeprefix(start): v for k, v in case.items() if k.startswith(start)}
        assert state, theirs
        part.load_state_dict(state, strict=False)  # the counter of BatchNorm is not in the cases
        missing = {k for k in part.state_dict() if not k.endswith("num_batches_tracked")} - set(state)
        assert not missing, missing


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def check_reproducible(make: Any, student: Taps, teacher: Taps) -> None:
    """The same seed gives the same weights, whatever the global generator; another seed gives others."""
    states = []
    for loss_seed, global_seed in ((1, 10), (1, 11), (2, 10)):
        with seeded(global_seed):
            before = torch.get_rng_state()
            states.append(build(make(), student, teacher, seed=loss_seed).aux.state_dict())
            assert torch.equal(before, torch.get_rng_state())
    first, same, other = states
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
