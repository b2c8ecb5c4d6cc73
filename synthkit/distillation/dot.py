"""DOT: SGD with one momentum buffer for the task and a longer one for the distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from synthkit.errors import ConfigError, RunError

# the multi-tensor kernels of torch.optim, which torch does not export by name
_add: Any = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
_multiply: Any = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]

TASK, DISTILLATION = "momentum_task", "momentum_distillation"


class DOT(torch.optim.Optimizer):
    """Distillation-oriented SGD: the distillation gradient gets more inertia than the task's, so that it dominates.

    `v_task <- (m - d) v_task + g_task + w theta`, `v_kd <- (m + d) v_kd + g_kd`, `theta <- theta - lr (v_task + v_kd)`
    with momentum m, difference d and weight decay w. With d = 0 it is SGD with momentum m over the summed gradient.

    One step, with any number of micro-batches::

        optimizer.zero_grad()
        task_loss.backward(retain_graph=True)
        optimizer.keep_task()
        distillation_loss.backward()
        optimizer.keep_distillation()  # may be left out before `step`: what lies in `grad` then counts as distillation
        optimizer.step()

    A parameter that only one of the losses reaches (a module of the distillation loss) has one buffer with momentum m,
    and its weight decay goes there: decay is applied once to every parameter.

    Args:
        params: parameters or groups of them (a group may set `lr` and the like for itself).
        lr: learning rate, above 0 or 0.
        momentum: m, in [0, 1).
        delta: d; 0.075 on CIFAR-100. m + d must stay below 1 and m - d must not be negative.
        weight_decay: w, coupled as in SGD.

    Raises:
        ConfigError: a value is out of range.

    Source: Zhao, Cui, Song, Qiu, Liang 2023, "DOT: A Distillation-Oriented Trainer" (arXiv 2307.08436);
    megvii-research/mdistiller@a08d46f mdistiller/engine/dot.py, which backpropagates the distillation loss first.
    Differs from source: any number of groups; a parameter that only the distillation reaches is decayed in its first
    step too, where the source leaves that step out; no dampening.
    Cost: two backward passes a step and two buffers of the size of the parameters; multi-tensor kernels.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        delta: float = 0.075,
        weight_decay: float = 0.0,
    ):
        if not lr >= 0 or not weight_decay >= 0:
            raise ConfigError("dot: lr and weight_decay must not be negative", got=(lr, weight_decay))
        if not (momentum - abs(delta) >= 0 and momentum + abs(delta) < 1):
            raise ConfigError(
                "dot: momentum - delta must not be negative and momentum + delta must stay below 1",
                got=(momentum, delta),
                hint="0.9 and 0.075 are usual",
            )
        self._kept: dict[str, dict[Tensor, Tensor]] = {TASK: {}, DISTILLATION: {}}
        self._separated = False
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those that were set aside among them."""
        super().zero_grad(set_to_none)
        for pile in self._kept.values():
            pile.clear()
        self._separated = False

    def keep_task(self) -> None:
        """Set the gradients that lie in `grad` aside as the task's (added to those set aside before)."""
        self._keep(TASK)
        self._separated = True

    def keep_distillation(self) -> None:
        """Set the gradients that lie in `grad` aside as the distillation's."""
        self._keep(DISTILLATION)

    def each_part(self, action: Callable[[list[Tensor]], None]) -> None:
        """Call `action` on all parameters twice: while the task's gradients lie in `grad`, and while the distillation's
        do (None where there is none). It may change them, as averaging over ranks does. To be called before `step`."""
        self._keep(DISTILLATION)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for kind, pile in self._kept.items():
            for p in parameters:
                p.grad = pile.pop(p, None)
            action(parameters)
            self._keep(kind)

    @torch.no_grad()
    def _keep(self, kind: str) -> None:
        pile = self._kept[kind]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    pile[p] = p.grad if p not in pile else pile[p].add_(p.grad)
                    p.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # no loss to return
        """Update both buffers and the parameters, and forget the gradients.

        Raises:
            RunError: `keep_task` was not called since the last step, so that the two gradients are not known apart.
        """
        if closure is not None or not self._separated:
            raise RunError(
                "dot: the gradients of task and distillation are not known apart",
                hint="call keep_task() between the two backward passes (a closure cannot be used)",
            )
        self._keep(DISTILLATION)
        task, distillation = self._kept[TASK], self._kept[DISTILLATION]
        for group in self.param_groups:
            m, d = group["momentum"], group["delta"]
            both = [p for p in group["params"] if p in task and p in distillation]
            self._advance(both, task, TASK, group, m - d, decay=True)
            self._advance(both, distillation, DISTILLATION, group, m + d, decay=False)
            single = [p for p in group["params"] if p in task and p not in distillation]
            self._advance(single, task, TASK, group, m, decay=True)
            single = [p for p in group["params"] if p in distillation and p not in task]
            self._advance(single, distillation, DISTILLATION, group, m, decay=True)
        self.zero_grad()

    def _advance(
        self,
        params: list[Tensor],
        pile: dict[Tensor, Tensor],
        kind: str,
        group: dict[str, Any],
        momentum: float,
        *,
        decay: bool,
    ) -> None:
        if not params:
            return
        gradients = [pile[p] for p in params]
        if decay and group["weight_decay"] != 0:
            _add(gradients, params, alpha=group["weight_decay"])  # ours: they are forgotten after this
        for p in params:
            if kind not in self.state[p]:
                self.state[p][kind] = torch.zeros_like(p)
        buffers = [self.state[p][kind] for p in params]
        _multiply(buffers, momentum)
        _add(buffers, gradients)
        _add(params, buffers, alpha=-group["lr"])
