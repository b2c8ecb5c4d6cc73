"""The one training loop of the house: distillation and teaching both run under it.

Accelerate gives device, precision and ranks; sources give batches as a pure function of the step; the objective gives
the loss. Ranks and micro-batches are slices of the one global batch: BatchNorm statistics and relational losses see it
whole over the ranks, and a relational loss sees it whole over the micro-batches too. Nothing waits for the device
inside a step: figures are kept on the device and read every `CHECK_EVERY` steps.
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
from synthkit.distillation.objective import (
    Figures,
    FromFunction,
    Objective,
    drawer,
    join_seen,
    map_seen,
    split_batch,
    tensors_of,
)
from synthkit.distillation.optimizers import make_optimizer
from synthkit.distillation.protocols import Plan
from synthkit.distillation.ranks import average_gradients, gather_batch, synchronise_batchnorm
from synthkit.distillation.sources import BatchSource, stream_seed
from synthkit.distillation.state import StateStore
from synthkit.errors import NonFiniteError
from synthkit.models.bn_stats import running_statistics_kept
from synthkit.models.view import ModelView, TeacherView
from synthkit.runtime import RunDir, Runtime, format_bytes, format_seconds, peak_memory

if TYPE_CHECKING:
    from torch import Tensor

CHECK_EVERY = 20  # steps between reading the figures (one wait for the device)
SAVE_SECONDS = 60.0  # longest time between two states
_TIMED = (1, 3, 4, 12)  # steps between which the estimate is timed: early where they are slow, else over more
_SLOW = 2.0  # seconds of a step that is slow

Function = Callable[[ModelView, Batch], "dict[str, Tensor]"]
"""(student view, batch) -> scalars; the entry "loss" is minimised, the others are logged (detached)."""
EpochHook = Callable[[int, TeacherView], "dict[str, Any]"]
"""(epoch from 1, frozen copy of the network) -> further figures for metrics.jsonl."""


class Trainer:
    """Train `view.module` on `source` by `plan`; resumable, and the same for any number of processes.

    Args:
        view: the network with its constants; trained in place.
        objective: an `Objective`, or a `Function`.
        run_dir: where metrics.jsonl and the state go.
        seed: of the dropout draws (all other draws belong to the source).
        description: name of the progress line.
        eval_every: call `on_epoch` every so many epochs (0: only after the last).
        accumulate: micro-batches of a step. BatchNorm sees each alone, as accumulation always does; a relational loss
            sees the whole batch (the forward passes run twice: once for the loss, once for the gradients).
        ema: decay per step of an exponential moving average of the weights (0: none), kept beside the network.
        tracked_as: stands before the names of the figures in the trackers, which several runs may share.
    """

    def __init__(
        self,
        *,
        runtime: Runtime,
        view: ModelView,
        objective: Objective | Function,
        source: BatchSource,
        plan: Plan,
        run_dir: RunDir,
        seed: int = 0,
        description: str = "train",
        on_epoch: EpochHook | None = None,
        eval_every: int = 0,
        accumulate: int = 1,
        ema: float = 0.0,
        tracked_as: str = "",
    ):
        self.runtime, self.view, self.source, self.plan = runtime, view, source, plan
        self.objective: Objective = objective if hasattr(objective, "look") else FromFunction(view, objective)  # type: ignore[assignment,arg-type]  # a function has no `look`
        self.run_dir, self.seed, self.description = run_dir, seed, description
        self.on_epoch, self.eval_every = on_epoch, eval_every
        self.accumulate, self.decay, self.tracked_as = accumulate, ema, tracked_as
        self.total = plan.total_steps(source.steps_per_epoch)
        self.epochs = -(-self.total // source.steps_per_epoch)
        self.state = StateStore(run_dir.path / "state")
        self._frozen = copy.deepcopy(view.module)
        self.channels_last = runtime.lays_channels_last(view.input_size)
        view.to(runtime.device, channels_last=self.channels_last)
        self.network = view.module
        self.parts = nn.ModuleDict({"network": self.network})
        if self.objective.aux is not None:
            self.parts["aux"] = self.objective.aux.to(runtime.device).train()
        if runtime.world > 1:
            synchronise_batchnorm(self.parts)
            self._agree()
        self.average = copy.deepcopy(self.network).requires_grad_(False).eval() if ema else None
        self.stored = nn.ModuleDict({**self.parts, **({} if self.average is None else {"ema": self.average})})
        if runtime.config.compile:
            self.network.compile()
        self.optimizer = make_optimizer(plan, self.network, runtime.device, self.objective)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.step, self.seconds = 0, 0.0
        self._pending: list[Tensor] = []
        self._names: list[str] = []
        self._sums: dict[str, list[float]] = {}

    @torch.no_grad()
    def _agree(self) -> None:
        """Start all ranks from the first one's weights: seeds agree, kernels of other machines may not."""
        for value in self.parts.state_dict().values():
            torch.distributed.broadcast(value, 0)

    # --- state --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state of this step; refuses to store weights that are not finite."""
        self._check()
        if not self.runtime.is_main:
            return
        self._require_finite_weights()
        self.state.save(self.step, self.stored, self.optimizer, {"seconds": self.seconds, "sums": self._sums})

    def restore(self) -> bool:
        """Go on from the newest whole state; False (and a start from the beginning) where there is none."""
        meta = self.state.load(self.stored, self.optimizer)
        if meta is None:
            if self.runtime.is_main:
                self.run_dir.truncate_metrics(lambda _: False)
            return False
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        self._sums = {name: list(pair) for name, pair in meta["sums"].items()}
        if self.runtime.is_main:
            epoch = self.step // self.source.steps_per_epoch
            self.run_dir.truncate_metrics(lambda record: record.get("epoch", 0) <= epoch)
        return True

    def frozen(self, network: nn.Module | None = None) -> TeacherView:
        """A frozen copy of the network as it is now, for evaluation (the one in training is not touched).

        Args:
            network: another one of the same architecture: the moving average.
        """
        self._frozen.load_state_dict((network or self.network).state_dict())
        return self.seen_as(self._frozen)

    def seen_as(self, module: nn.Module) -> TeacherView:
        """A module that takes the network's input, as a frozen view."""
        view = TeacherView(
            module,
            self.view.mean,
            self.view.std,
            input_size=self.view.input_size,
            num_classes=self.view.num_classes,
            class_names=self.view.class_names,
            name=self.view.name,
        )
        return view.to(self.runtime.device, channels_last=self.channels_last)  # type: ignore[return-value]  # `to` returns self

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
            self.parts.train()
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
            bar.update(self.total - bar.done, **{k: v for k, v in last.items() if k in self._names})
        self._require_finite_weights()
        self.source.close()
        images = (self.total - first) * self.source.batch_size
        elapsed = max(self.seconds - at_start, 1e-9)
        return {**last, "steps": self.total, "seconds": self.seconds, "images_per_second": images / elapsed}

    def _train_step(self) -> float:
        rate = self.plan.lr_at(self.step, self.total, self.source.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        # dropout and the like draw from torch's own generator: forked in `fit`, seeded per step, so resuming is exact
        self.runtime.seed_modules(stream_seed(self.seed, "dropout", self.step, self.runtime.rank))
        self.objective.on_step(self.optimizer, self.step / self.total)
        self.optimizer.zero_grad(set_to_none=True)
        figures = self._backward(self.batch())
        if self.runtime.world > 1:
            each = getattr(self.optimizer, "each_part", None)  # DOT keeps two gradients of every parameter
            _ = each(average_gradients) if each else average_gradients(self.parameters)
        self.optimizer.step()
        if self.average is not None:
            self._follow(self.average)
        self._note(figures)
        self.step += 1
        return rate

    def batch(self) -> Batch:
        """This rank's slice of the global batch of the present step."""
        batch = self.source.batch(self.step)
        batch.epoch, batch.progress = self.step / self.source.steps_per_epoch, self.step / self.total
        batch.draw = drawer(self.seed, self.step)
        if self.channels_last:
            batch.images = batch.images.contiguous(memory_format=torch.channels_last)
        return batch

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of one global batch, in one piece or in micro-batches; returns the figures to log."""
        if self.accumulate == 1:
            with self.runtime.autocast():
                seen = self.objective.look(batch)
                if self.objective.relational and self.runtime.world > 1:
                    seen = map_seen(seen, gather_batch)
                figures = self.objective.figures(seen)
            self._derive(figures)
            return self._shown(figures)
        parts = split_batch(batch, self.accumulate)
        if self.objective.relational:
            return self._cached(parts)
        total: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            self._reseed(number)
            with self.runtime.autocast():
                figures = self.objective.figures(self.objective.look(part))
            self._derive(figures, 1.0 / len(parts))
            for name, value in self._shown(figures).items():
                total[name] = total.get(name, 0.0) + value / len(parts)
        return total

    def _cached(self, parts: list[Batch]) -> dict[str, Tensor]:
        """Gradients of a loss that must see all micro-batches: what they show is gathered without graph, the loss gives
        the gradients of that, and a second forward pass of each micro-batch takes them down to the weights (Gao et al.
        2021, "gradient cache"). The same arithmetic as one batch, but for BatchNorm, which sees each part alone.
        """
        seen = []
        with torch.no_grad(), running_statistics_kept(self.network), self.runtime.autocast():
            for number, part in enumerate(parts):
                self._reseed(number)
                seen.append(self.objective.look(part))
        whole = join_seen(seen)
        assert whole.student is not None  # a relational objective looks at the student
        leaves = tensors_of(whole.student)
        with self.runtime.autocast():
            figures = self.objective.figures(map_seen(whole, gather_batch) if self.runtime.world > 1 else whole)
        self._derive(figures)
        for number, part in enumerate(parts):
            self._reseed(number)
            with self.runtime.autocast():
                again = self.objective.again(part)
            wanted = [
                (tensor, leaf.grad.chunk(len(parts))[number])
                for tensor, leaf in zip(tensors_of(again), leaves, strict=True)
                if leaf.grad is not None
            ]
            torch.autograd.backward([tensor for tensor, _ in wanted], [grad for _, grad in wanted])
        return self._shown(figures)

    def _derive(self, figures: Figures, share: float = 1.0) -> None:
        """Backward of a share of the loss; DOT wants the gradients of the labels' part by themselves."""
        keep = getattr(self.optimizer, "keep_task", None)
        if keep is None:
            self.runtime.accelerator.backward(figures.loss * share if share != 1.0 else figures.loss)
            return
        rest = figures.loss
        if figures.task is not None:
            self.runtime.accelerator.backward(figures.task * share, retain_graph=True)
            rest = figures.loss - figures.task
        keep()
        self.runtime.accelerator.backward(rest * share)
        self.optimizer.keep_distillation()  # type: ignore[attr-defined]  # DOT has both

    def _shown(self, figures: Figures) -> dict[str, Tensor]:
        return {"loss": figures.loss.detach(), **figures.shown}

    def _reseed(self, part: int) -> None:
        """Dropout of one micro-batch: the same in both of its forward passes."""
        self.runtime.seed_modules(stream_seed(self.seed, "dropout", self.step, self.runtime.rank, part))

    @torch.no_grad()
    def _follow(self, average: nn.Module) -> None:
        """One step of the moving average; what is not a float (counters) is copied."""
        new, old = self.network.state_dict(), average.state_dict()
        floats = [name for name, value in new.items() if value.is_floating_point()]
        for name in floats:
            old[name].lerp_(new[name], 1.0 - self.decay)
        for name in new.keys() - set(floats):
            old[name].copy_(new[name])

    def _note(self, figures: dict[str, Tensor]) -> None:
        """Keep this step's figures on the device; a schedule may change which ones there are."""
        if list(figures) != self._names:
            self._check()
            self._names = list(figures)
        self._pending.append(torch.stack([value.detach().float() for value in figures.values()]))

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
        for name, values in zip(self._names, zip(*rows, strict=True), strict=True):
            total, count = self._sums.get(name, [0.0, 0])
            self._sums[name] = [total + sum(values), count + len(values)]

    def _fail(self, what: str, step: int) -> None:
        rate = self.plan.lr_at(step, self.total, self.source.steps_per_epoch)
        kept = self.state.newest()
        raise NonFiniteError(
            f"{self.description}: the {what} is not finite at step {step} of {self.total} (lr {rate:.3g})",
            hint=f"lower lr (try {self.plan.lr / 3:.2g}) or add warm-up (0.05); "
            + (f"the state of step {kept} is kept" if kept is not None else "no result was written"),
        )

    def _require_finite_weights(self) -> None:
        finite = torch.stack([torch.isfinite(p).all() for p in self.parts.state_dict().values()])
        if not bool(finite.all()):
            self._fail("network", self.step)

    def _means(self) -> dict[str, float]:
        return {name: total / max(count, 1) for name, (total, count) in self._sums.items()}

    def _end_epoch(self, rate: float) -> dict[str, Any]:
        self._check()
        epoch = -(-self.step // self.source.steps_per_epoch)
        record: dict[str, Any] = {"epoch": epoch, "step": self.step, **self._means(), "lr": rate}
        due = self.step == self.total or (self.eval_every > 0 and epoch % self.eval_every == 0)
        if self.on_epoch is not None and self.runtime.is_main and due:
            record |= self.on_epoch(epoch, self.frozen())
            self.parts.train()
        record["seconds"] = self.seconds
        if self.runtime.is_main:
            self.run_dir.log(record)
            numbers = {f"{self.tracked_as}{k}": v for k, v in record.items() if isinstance(v, int | float)}
            self.runtime.accelerator.log(numbers, step=self.step)  # to the trackers, where any were asked for
        self._sums = {}
        return record

    def _estimate(self, bar: Any, timed: dict[int, float]) -> None:
        if len(timed) not in (2, 4):
            return
        first, last = sorted(timed)[-2:]
        seconds = (timed[last] - timed[first]) / (last - first)
        if len(timed) == 2 and seconds < _SLOW:
            return
        rest = seconds * (self.total - self.step)
        bar.write(
            f"{self.description}: {self.source.batch_size / seconds:,.0f} images/s, {self.total} steps of "
            f"{self.source.batch_size} images, about {format_seconds(rest)} to go, "
            f"{format_bytes(peak_memory())} of memory"
        )
