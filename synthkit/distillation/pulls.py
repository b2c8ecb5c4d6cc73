"""How hard each term of a loss pulls at the student when training begins.

Published weights belong to published networks and schedules. On others a term may drown what stands beside it, or be
drowned: the norms of the terms' gradients on the student's weights say so before any time is spent.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from synthkit.distillation.contract import Batch
from synthkit.distillation.objective import Distillation, split_batch
from synthkit.models.bn_stats import running_statistics_kept

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.distillation.trainer import Trainer

FILE = "pulls.json"

DROWNS = 10.0  # times as hard as everything beside it


def first_pulls(trainer: Trainer, objective: Distillation) -> dict[str, float]:
    """`gradient_norms` on the trainer's present batch (its first micro-batch); nothing of the run changes.

    Of one process, and not of compiled networks, whose graph can be walked only once.
    """
    runtime = trainer.runtime
    trainer.parts.train()
    with runtime.module_draws(0), running_statistics_kept(trainer.parts), runtime.autocast():
        return gradient_norms(objective, trainer.network, split_batch(trainer.batch(), trainer.accumulate)[0])


def gradient_norms(objective: Distillation, network: nn.Module, batch: Batch) -> dict[str, float]:
    """Euclidean norm, over all weights of `network`, of the gradient of every term's mean (weights of a sum included).

    A term that begins or ends at some epoch is looked at where it pulls hardest. Terms whose norm is not finite are
    left out (training will say so). The buffers of the loss are put back as they were.

    Cost: one forward pass and one backward pass per term, for every epoch at which a schedule changes.
    """
    weights = [p for p in network.parameters() if p.requires_grad]
    aux = objective.aux
    kept = {} if aux is None else {name: value.clone() for name, value in aux.named_buffers()}
    found: dict[str, list[Tensor]] = {}
    for epoch in sorted({0.0, *(float(math.ceil(t.at)) for t in getattr(objective.loss, "terms", ()))}):
        batch.epoch = epoch
        for name, value in objective.parts(objective.look(batch)).items():
            if not value.requires_grad:
                continue
            grads = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            norms = [g.float().norm() for g in grads if g is not None]
            found.setdefault(name, []).append(torch.stack(norms).norm() if norms else value.detach().float() * 0)
    with torch.no_grad():
        for name, value in () if aux is None else aux.named_buffers():
            value.copy_(kept[name])
    read = {name: float(torch.stack(norms).max()) for name, norms in found.items()}
    return {name: norm for name, norm in read.items() if math.isfinite(norm)}


def in_words(norms: dict[str, float]) -> list[str]:
    """One line for a sum of terms, and a note where one of them drowns the others; nothing for a single term."""
    if len(norms) < 2:
        return []
    terms = ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items())
    said = [f"  first batch: gradients of the terms on the student's weights {terms}"]
    for name, norm in norms.items():
        rest = sum(other for term, other in norms.items() if term != name)
        if rest > 0 and norm > DROWNS * rest:
            said.append(
                f"  note: {name} pulls {norm / rest:.0f} times as hard as all the rest: published weights belong to "
                f"their networks and schedules; {rest / norm:.2g} times its weight would make them even"
            )
    return said
