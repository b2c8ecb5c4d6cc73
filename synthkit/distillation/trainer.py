"""The one training loop of the house: distillation and teaching both run under it.

Accelerate places and wraps the network; sources give batches as a pure function of the step; the objective gives the
loss. Nothing waits for the device inside a step: figures are kept on the device and read every `CHECK_EVERY` steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from synthkit.distillation.contract import Batch
from synthkit.distillation.protocols import Plan
from synthkit.distillation.sources import BatchSource, stream_seed
from synthkit.distillation.state import StateStore
from synthkit.errors import NonFiniteError
from synthkit.models.view import ModelView, TeacherView
from synthkit.runtime import RunDir, Runtime, format_bytes, format_seconds, peak_memory

if TYPE_CHECKING:
    from torch import Tensor

CHECK_EVERY = 20  # steps between reading the figures (one wait for the device)
SAVE_SECONDS = 60.0  # longest time between two states
_TIMED = (4, 12)  # steps that are timed for the estimate: after the first few, which allocate

Objective = Callable[[ModelView, Batch], "dict[str, Tensor]"]
"""(student view, batch) -> scalars; the entry "loss" is minimised, the others are logged (detached)."""
EpochHook = Callable[[int, TeacherView], "dict[str, Any]"]
"""(epoch from 1, frozen copy of the network) -> further figures for metrics.jsonl."""


def make_optimizer(plan: Plan, network: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The plan's optimiser over all parameters of `network`, fused where the device has it."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    fused = device.type in ("cpu", "cuda") and all(p.is_floating_point() for p in parameters)
    if plan.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=plan.lr,
            momentum=plan.momentum,
            nesterov=plan.nesterov and plan.momentum > 0,
            weight_decay=plan.weight_decay,
            fused=fused,
        )
    kind = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=plan.lr, weight_decay=plan.weight_decay, fused=fused)


class Trainer:
    """Train `view.module` on `source` by `plan`; resumable, and the same for any number of processes.

    Args:
        view: the network with its constants; trained in place.
        objective: see `Objective`.
        run_dir: where metrics.jsonl and the state go.
        seed: of the dropout draws (all other draws belong to the source).
        description: name of the progress line.
        eval_every: call `on_epoch` every so many epochs (0: only after the last).

    With BatchNorm and several processes on CPU each rank normalises by its own slice (torch has synchronised BatchNorm
    on GPUs only, where it is used); networks without BatchNorm give the same result for any number of processes.
    """

    def __init__(
        self,
        *,
        runtime: Runtime,
        view: ModelView,
        objective: Objective,
        source: BatchSource,
        plan: Plan,
        run_dir: RunDir,
        seed: int = 0,
        description: str = "train",
        on_epoch: EpochHook | None = None,
        eval_every: int = 0,
    ):
        self.runtime, self.view, self.objective, self.source, self.plan = runtime, view, objective, source, plan
        self.run_dir, self.seed, self.description = run_dir, seed, description
        self.on_epoch, self.eval_every = on_epoch, eval_every
        self.total = plan.total_steps(source.steps_per_epoch)
        self.epochs = -(-self.total // source.steps_per_epoch)
        self.state = StateStore(run_dir.path / "state")
        self._frozen = copy.deepcopy(view.module)
        view.to(runtime.device, channels_last=runtime.channels_last)
        network = view.module
        if runtime.world > 1 and runtime.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if runtime.config.compile:
            network.compile()
        self.network = network
        self.optimizer = make_optimizer(plan, network, runtime.device)
        view.module, self.prepared = runtime.accelerator.prepare(network, self.optimizer)
        self.step, self.seconds = 0, 0.0
        self._pending: list[Tensor] = []
        self._names: list[str] = []
        self._sums: list[float] = []
        self._count = 0

    # --- state --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state of this step; refuses to store weights that are not finite."""
        self._check()
        if not self.runtime.is_main:
            return
        self._require_finite_weights()
        self.state.save(
            self.step,
            self.network,
            self.optimizer,
            {"seconds": self.seconds, "names": self._names, "sums": self._sums, "count": self._count},
        )

    def restore(self) -> bool:
        """Go on from the newest whole state; False (and a start from the beginning) where there is none."""
        meta = self.state.load(self.network, self.optimizer)
        if meta is None:
            if self.runtime.is_main:
                self.run_dir.truncate_metrics(lambda _: False)
            return False
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        self._names, self._sums, self._count = list(meta["names"]), list(meta["sums"]), int(meta["count"])
        if self.runtime.is_main:
            epoch = self.step // self.source.steps_per_epoch
            self.run_dir.truncate_metrics(lambda record: record.get("epoch", 0) <= epoch)
        return True

    def frozen(self) -> TeacherView:
        """A frozen copy of the network as it is now, for evaluation (the one in training is not touched)."""
        self._frozen.load_state_dict(self.network.state_dict())
        view = TeacherView(
            self._frozen,
            self.view.mean,
            self.view.std,
            input_size=self.view.input_size,
            num_classes=self.view.num_classes,
            class_names=self.view.class_names,
            name=self.view.name,
        )
        return view.to(self.runtime.device, channels_last=self.runtime.channels_last)  # type: ignore[return-value]  # `to` returns self

    # --- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the last step and return the last epoch's figures.

        Raises:
            NonFiniteError: a loss or weight became NaN or infinite; the last good state is kept.
        """
        started, at_start = time.monotonic(), self.seconds
        saved, first = started, self.step
        timed: dict[int, float] = {}
        last: dict[str, Any] = {}
        device = self.runtime.device
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            self.runtime.progress(self.total, self.description, initial=self.step) as bar,
        ):
            self.view.module.train()
            while self.step < self.total:
                rate = self._train_step()
                self.seconds = at_start + time.monotonic() - started
                if self.step - first in _TIMED:
                    self._check()
                    timed[self.step - first] = time.monotonic()
                    self._estimate(bar, timed)
                if self.step % CHECK_EVERY == 0:
                    self._check()
                    bar.update(CHECK_EVERY if self.step - first >= CHECK_EVERY else self.step - first, **self._means())
                ended = self.step % self.source.steps_per_epoch == 0 or self.step == self.total
                if ended:
                    last = self._end_epoch(rate)
                # ranks may disagree about the time, and `save` talks to them unless the figures were just read
                may_save = self.runtime.world == 1 or self.step % CHECK_EVERY == 0
                if self.step < self.total and (ended or (may_save and time.monotonic() - saved > SAVE_SECONDS)):
                    self.save()
                    saved = time.monotonic()
            bar.update(self.total - bar.done)
        self._require_finite_weights()
        self.source.close()
        images = (self.total - first) * self.source.batch_size
        elapsed = max(self.seconds - at_start, 1e-9)
        return {**last, "steps": self.total, "seconds": self.seconds, "images_per_second": images / elapsed}

    def _train_step(self) -> float:
        rate = self.plan.lr_at(self.step, self.total, self.source.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # dropout and the like draw from torch's own generator: forked in `fit`, seeded per step, so resuming is exact
        torch.manual_seed(stream_seed(self.seed, "dropout", self.step, self.runtime.rank))
        batch = self.source.batch(self.step)
        if self.runtime.channels_last:
            batch.images = batch.images.contiguous(memory_format=torch.channels_last)
        self.prepared.zero_grad(set_to_none=True)
        with self.runtime.autocast():
            figures = self.objective(self.view, batch)
        self.runtime.accelerator.backward(figures["loss"])
        self.prepared.step()
        if not self._names:
            self._names, self._sums = list(figures), [0.0] * len(figures)
        self._pending.append(torch.stack([figures[name].detach().float() for name in self._names]))
        self.step += 1
        return rate

    def _check(self) -> None:
        """Read the pending figures, add them to the epoch's sums, and stop at the first that is not finite."""
        if not self._pending:
            return
        figures = torch.stack(self._pending)
        if self.runtime.world > 1:
            figures = self.runtime.accelerator.reduce(figures, reduction="mean")
        rows = figures.cpu().double().tolist()  # type: ignore[union-attr]  # reduce of a tensor gives a tensor
        self._pending.clear()
        at = self._names.index("loss")
        for offset, row in enumerate(rows):
            if not math.isfinite(row[at]):
                self._fail("loss", self.step - len(rows) + offset)
            self._sums = [a + b for a, b in zip(self._sums, row, strict=True)]
        self._count += len(rows)

    def _fail(self, what: str, step: int) -> None:
        rate = self.plan.lr_at(step, self.total, self.source.steps_per_epoch)
        kept = self.state.newest()
        raise NonFiniteError(
            f"{self.description}: the {what} is not finite at step {step} of {self.total} (lr {rate:.3g})",
            hint=f"lower lr (try {self.plan.lr / 3:.2g}) or add warm-up (0.05); "
            + (f"the state of step {kept} is kept" if kept is not None else "no result was written"),
        )

    def _require_finite_weights(self) -> None:
        finite = torch.stack([torch.isfinite(p).all() for p in self.network.state_dict().values()])
        if not bool(finite.all()):
            self._fail("network", self.step)

    def _means(self) -> dict[str, float]:
        return {n: s / max(self._count, 1) for n, s in zip(self._names, self._sums, strict=True)}

    def _end_epoch(self, rate: float) -> dict[str, Any]:
        self._check()
        epoch = -(-self.step // self.source.steps_per_epoch)
        record: dict[str, Any] = {"epoch": epoch, "step": self.step, **self._means(), "lr": rate}
        due = self.step == self.total or (self.eval_every > 0 and epoch % self.eval_every == 0)
        if self.on_epoch is not None and self.runtime.is_main and due:
            record |= self.on_epoch(epoch, self.frozen())
            self.view.module.train()
        record["seconds"] = self.seconds
        if self.runtime.is_main:
            self.run_dir.log(record)
        self._sums, self._count = [0.0] * len(self._names), 0
        return record

    def _estimate(self, bar: Any, timed: dict[int, float]) -> None:
        if len(timed) < 2:
            return
        seconds = (timed[_TIMED[1]] - timed[_TIMED[0]]) / (_TIMED[1] - _TIMED[0])
        rest = seconds * (self.total - self.step)
        bar.write(
            f"{self.description}: {self.source.batch_size / seconds:,.0f} images/s, {self.total} steps of "
            f"{self.source.batch_size} images, about {format_seconds(rest)} to go, "
            f"{format_bytes(peak_memory())} of memory"
        )
