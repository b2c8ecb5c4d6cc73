"""MTT: matching training trajectories, and with soft labels and a growing window DATM."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.errors import NonFiniteError
from synthkit.lazy import F, torch
from synthkit.synthesis.base import BankFacts, Requires
from synthkit.synthesis.curriculum import trajectory_window
from synthkit.synthesis.matching.cost import choose_engine, estimate
from synthkit.synthesis.matching.distances import soft_cross_entropy
from synthkit.synthesis.matching.engines import ENGINES, Gradients, InnerRun, minibatches
from synthkit.synthesis.matching.flat import FlatNetwork
from synthkit.synthesis.matching.labels import correct_rows, expert_logits
from synthkit.synthesis.matching.loop import MatchingLoop
from synthkit.synthesis.matching.mtt_config import MTTConfig
from synthkit.synthesis.matching.pool import Space
from synthkit.synthesis.matching.siamese import strategy_of
from synthkit.synthesis.matching.trajectories import Trajectories

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.synthesis.base import Task

PATIENCE = 100  # iterations in a row without a finite gradient before the run stops


class MTT(MatchingLoop):
    """Learn images, a step size and possibly labels with which training retraces how experts learnt from real data.

    Per iteration: theta_0 = expert after t epochs, theta* = after t + M; N student steps
    theta_{i+1} = theta_i - alpha grad l(theta_i; A_i S_i) on minibatches S_i of the synthetic set, A_i a fresh DSA
    transform; L = ||theta_N - theta*||^2 / ||theta_0 - theta*||^2; one SGD step on pixels, alpha and label logits z
    (l = -mean softmax(z) log softmax(f), else the cross-entropy of the classes). t ~ U{min_start .. u - 1}, u grows
    from first_start_epoch to max_start_epoch under a curriculum with a ramp, else u = max_start_epoch.

    Shapes: pixels (N, C, H, W) in normalised or whitened space, never clamped; labels (N,), logits (N, K) where learnt.
    Source: Cazenavette et al., "Dataset distillation by matching training trajectories" (CVPR 2022, arXiv 2203.11932),
        GeorgeCazenavette/mtt-distillation@50dccea; Guo et al., "Towards lossless dataset distillation via
        difficulty-aligned trajectory matching" (ICLR 2024, arXiv 2310.05773), NUS-HPC-AI-Lab/DATM@97ae510.
    Differs from source: exact gradients by the constant-memory sweep (`engine`); experts are trained with plain SGD,
        where DATM's are FTD's (GSAM); a step with a non-finite gradient is left out, alpha has a floor; the last
        checkpoint of an expert is the last that is trained.
    Cost: experts E epochs 3 F each real image; per iteration 12 N b F (unroll 9), F the forward cost of an image, b
        the minibatch; memory of the double backward of b images (unroll: N b) and N + 1 weight vectors.
    """

    requires: ClassVar[Requires] = Requires(teacher=False, real_data=True)
    places: ClassVar[tuple[str, ...]] = ("experts",)
    Config: ClassVar[type] = MTTConfig
    config: MTTConfig

    def __init__(self, config: MTTConfig, task: Task):
        self.alpha = torch.tensor(config.alpha, device=task.runtime.device)
        k = task.image_spec.num_classes
        soft = config.labels == "soft"
        self.z = torch.zeros(task.images, k, device=task.runtime.device) if soft else None
        super().__init__(config, task)
        self.strategy = strategy_of(config.strategy, self.spec)
        self.prelude = config.expert_count * config.epochs
        self.engine = "sweep" if config.engine == "auto" else config.engine
        self.skipped = self.in_a_row = 0
        self.network = FlatNetwork(self.fresh_network("shape"))
        self.experts = Trajectories(config, self.real, self.spec, self.strategy, self.build)

    # ---- before the first iteration --------------------------------------------------------------------------

    def prepare(self) -> Iterator[None]:
        """Train the experts that are missing, then set what starts from them."""
        c = self.config
        for index in range(c.expert_count):
            self.experts.ensure(index, self.task.runtime.say)
            ahead = (index + 1) * c.epochs - self.step
            if ahead > 0:
                self.advance(ahead)
                yield None
        if self.step == self.prelude:
            self._begin()

    def _begin(self) -> None:
        c, n = self.config, self.config.expert_count
        if c.init == "correct":
            rows = correct_rows(self.real, self.labels, n, self._predict, self.task.rng("first-images", "cpu"))
            self.pixels.copy_(self.real.take(rows))
        if self.z is not None:
            self.z.copy_(expert_logits(self.pixels, self.targets, n, self._predict))
        if c.engine == "auto":
            self.engine = choose_engine(self)

    def _predict(self, expert: int, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(self.experts.theta(expert, self.config.epochs), images)

    def first_pixels(self) -> Tensor:
        """As the family's; images that the experts get right are not known before these are trained."""
        if self.config.init == "correct":
            return torch.zeros(self.task.images, *self.spec.shape)
        return super().first_pixels()

    def _space(self, task: Task) -> Space:
        from synthkit.data.zca import ZCA

        zca = ZCA.fit(task.data.images, device=self.device).to(self.device) if self.config.zca and task.data else None
        return Space(self.spec, self.device, zca)

    # ---- the iteration ---------------------------------------------------------------------------------------

    def iteration(self, draws: torch.Generator) -> dict[str, Tensor]:
        """One expert stretch, one SGD step of pixels, step size and labels (or none, see `in_a_row` and threshold)."""
        c, window, expert = self.config, self.window(self.done), self._expert()
        epoch = int(torch.randint(c.min_start_epoch, window, (), generator=draws))
        start, target = (self.experts.theta(expert, e) for e in (epoch, epoch + c.expert_epochs))
        found = self.gradients(self.inner_run(draws, start, target, c.syn_steps))
        figures = {"alpha": self.alpha.clone(), "window": torch.tensor(float(window))}
        finite = found.finite()
        if finite:
            figures |= {"matching_loss": found.loss, "grad_norm": found.pixels.norm()}
        applied = finite and (c.threshold is None or float(found.loss) <= c.threshold)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row >= PATIENCE:
            raise NonFiniteError(
                f"{PATIENCE} iterations in a row had no finite gradient (iteration {self.done + 1})",
                hint="lower --method.alpha, --method.lr_alpha or --method.lr_img",
            )
        if applied:
            self._apply(found)
        self.skipped += not applied
        return {**figures, "skipped": torch.tensor(float(not applied))}

    def inner_run(self, draws: torch.Generator, start: Tensor, target: Tensor, steps: int) -> InnerRun:
        """`steps` student steps from `start` on the synthetic set."""
        from synthkit.data.dsa import apply, draw

        batches = minibatches(self.task.images, self.config.batch_syn or self.task.images, steps, draws)
        records = [draw(self.strategy, len(b), self.side, draws, siamese=False, device=self.device) for b in batches]
        return InnerRun(
            loss=self.loss,
            start=start,
            target=target,
            batches=[batch.to(self.device) for batch in batches],
            augment=[functools.partial(apply, record=record) for record in records],
        )

    def loss(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Training loss of the student: hard labels (b,) or label logits (b, K)."""
        logits = self.network(theta, images)
        return soft_cross_entropy(logits, labels) if labels.is_floating_point() else F.cross_entropy(logits, labels)

    def gradients(self, run: InnerRun, engine: str | None = None) -> Gradients:
        """Loss and gradients of one iteration by `engine`, or the chosen one."""
        return ENGINES[engine or self.engine](run, self.pixels, self.targets if self.z is None else self.z, self.alpha)

    def window(self, iteration: int) -> int:
        """End (exclusive) of the start epochs at `iteration`."""
        c = self.config
        if not self.task.curriculum.ramp:
            return c.max_start_epoch
        return trajectory_window(
            iteration, c.first_window, c.max_start_epoch, c.grow_iterations or max(1, c.iterations // 10)
        )

    def _expert(self) -> int:
        n = self.config.expert_count
        order = self.task.numpy_rng("experts", self.done // n).permutation(n)
        return int(order[self.done % n])

    def _apply(self, found: Gradients) -> None:
        self.alpha.grad = found.alpha
        if self.z is not None:
            self.z.grad = found.labels
        self.update(found.pixels)
        self.alpha.clamp_(min=self.config.alpha_min)

    def check(self, means: dict[str, float]) -> None:
        """Stop when a figure is NaN or infinite; warn when most iterations changed nothing."""
        super().check(means)
        if means["skipped"] > 0.5 and self.task.warn:
            self.task.warn(
                f"iteration {self.done + 1}: {100 * means['skipped']:.0f} % of the last iterations changed nothing"
                f" (loss {means.get('matching_loss', float('nan')):.3g} above the threshold, or no finite gradient);"
                " raise --method.threshold, lower --method.alpha, or match earlier epochs"
            )

    # ---- state, facts ----------------------------------------------------------------------------------------

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": [self.pixels]}]
        groups += [{"params": [self.alpha], "lr": self.config.lr_alpha, "momentum": 0.5}]
        if self.z is not None:
            groups += [{"params": [self.z], "lr": self.config.lr_labels, "momentum": 0.9}]
        return groups

    def state_dict(self) -> dict[str, Any]:
        """As the family's, with step size, labels, guards and the engine that was chosen."""
        own = {"alpha": self.alpha, "skipped": self.skipped, "in_a_row": self.in_a_row, "engine": self.engine}
        return {**super().state_dict(), **own, **({} if self.z is None else {"z": self.z})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        super().load_state_dict(state)
        self.alpha.copy_(state["alpha"])
        if self.z is not None:
            self.z.copy_(state["z"])
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])
        self.engine = state["engine"]

    def facts(self) -> BankFacts:
        """The whitening, and which experts were matched."""
        return dataclasses.replace(super().facts(), identity={"experts": self.experts.buffer.sha256})

    def figures_of_end(self) -> dict[str, float]:
        """The learnt step size, and how many iterations changed nothing."""
        return {"learning_rate": float(self.alpha), "skipped": float(self.skipped)}

    def label_logits(self) -> Tensor | None:
        """The learnt label logits (N, K)."""
        return self.z

    def estimate(self) -> dict[str, float]:
        """Seconds and bytes of the whole run (see `cost.py`)."""
        return estimate(self)
