"""The optimiser of a plan, over a network and what a loss trains beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from synthkit.distillation.protocols import Plan

if TYPE_CHECKING:
    from synthkit.distillation.objective import Objective


def make_optimizer(
    plan: Plan, network: nn.Module, device: torch.device, objective: Objective | None = None
) -> torch.optim.Optimizer:
    """The plan's optimiser over all parameters of `network` and of the objective, fused where the device has it.

    Every group has a factor `lr_scale` of the plan's rate.
    """
    everything = [*network.parameters(), *(objective.aux.parameters() if objective and objective.aux else [])]
    parameters = [p for p in everything if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if objective is not None and (own := objective.parameter_groups(network)) is not None:
        groups = own
    if not plan.decay_vectors:
        groups = [part for group in groups for part in _by_dimensions(plan, group)]
    for group in groups:
        group.setdefault("lr_scale", 1.0)
    fused = device.type in ("cpu", "cuda") and all(p.is_floating_point() for p in parameters)
    if plan.optimizer == "dot":
        from synthkit.distillation.dot import DOT

        return DOT(groups, lr=plan.lr, momentum=plan.momentum, delta=plan.dot_delta, weight_decay=plan.weight_decay)
    if plan.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            groups,
            lr=plan.lr,
            momentum=plan.momentum,
            nesterov=plan.nesterov and plan.momentum > 0,
            weight_decay=plan.weight_decay,
            fused=fused,
        )
        if plan.momentum > 0:  # fused SGD fails where some parameters get their first gradient later than others
            for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=plan.lr, weight_decay=plan.weight_decay, fused=fused)


def _by_dimensions(plan: Plan, group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group as matrices and kernels, with its decay, and the vectors (BatchNorm, biases) with that of the plan."""
    members = list(group["params"])
    wide, vectors = ([p for p in members if (p.ndim > 1) == flag] for flag in (True, False))
    parts = [{**group, "params": wide}, {**group, "params": vectors, "weight_decay": plan.decay_of(1)}]
    return [part for part in parts if part["params"]]
