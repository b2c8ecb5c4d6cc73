"""AdaDFKD: CuDFKD that also measures difficulty in feature space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from synthkit.errors import ConfigError
from synthkit.lazy import F, torch
from synthkit.synthesis.base import widened
from synthkit.synthesis.generator.config import at_least_one, not_negative, positive
from synthkit.synthesis.generator.cudfkd import CuDFKD, CuDFKDConfig, cudfkd_terms
from synthkit.synthesis.generator.student import Distilled

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdaDFKDConfig(CuDFKDConfig):
    """AdaDFKD; the defaults are the published ResNet-34 -> ResNet-18 run on CIFAR-10."""

    epochs: int = 300
    """Epochs of `ep_steps` student steps; window, ramp and learning rate move per epoch."""
    batch_size: int = 768
    """Images per generator step and per student step."""
    loss: Literal["l1", "kl", "l2"] = "kl"
    """KD loss of the student, and the difficulty of an image: mean |s - t|, T^2 KL at T, or mean (s - t)^2."""
    adv: float = 1.0
    """Adversarial weight; its start under a curriculum with a ramp."""
    grad_adv: float = 0.0
    """Growth of the adversarial weight per epoch between `begin` and `end` (published: none)."""
    lambda_0: float = 2.2
    """Age parameter of the self-paced weights at the first step."""
    nce: float = 0.1
    """Weight of the generator's InfoNCE term (0: off)."""
    s_nce: float = 0.1
    """Weight of the student's InfoNCE term (0: off)."""
    tau: float = 0.07
    """Temperature of both InfoNCE terms."""
    negatives: int = 4096
    """Student features in the queue."""
    length: float = 0.9
    """Share of the sorted negatives inside the window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "tau")
        not_negative(self, "nce", "s_nce")
        at_least_one(self, "negatives")
        if not 0 < self.length <= 1 or int(self.length * self.negatives) < 1:
            raise ConfigError(
                "method.length must be in (0, 1] and its window hold one negative at least",
                got=(self.length, self.negatives),
            )


class AdaDFKD(CuDFKD):
    """CuDFKD with an InfoNCE between teacher and student features in both losses.

    Generator:  L_G of CuDFKD + nce mean_i -log(e^(p_i) / (e^(p_i) + sum_(n in W_i) e^n)), p_i = <f_t, f_s> / tau of
                image i (normalised penultimate features, no gradient to f_s), W_i the window [h, h + length) of the
                products of f_t with `negatives` queued student features, sorted ascending.
    Student:    mean_i v(l_i, lambda_k) l_i, l_i = KD_i + s_nce NCE_i, NCE_i = -log softmax_j(<f_t,i, f_s,j> / tau)_i.
    With easy2hard (the default, as published) the weights v are on and the window slides from the most distant
    negatives (h = 0) to the nearest (h = 1 - length) between `begin` and `end`; the adversary stays at `adv` unless
    grad_adv > 0. Without a ramp h stays 0, without weights v = 1.

    Shapes: as CuDFKD; features (B, D), queue (negatives, D of the teacher), filled with random unit vectors at first.
    Source: Li et al., "AdaDFKD: Exploring adaptive inter-sample relationship in data-free knowledge distillation"
        (Neural Networks 2024, doi 10.1016/j.neunet.2024.106386); ljrprocc/DFKD@cd281c4
        `datafree/synthesis/adadfkd.py`, `datafree/utils/_utils.py:MoCo,difficulty_mining`, `datafree_kd.py`.
    Differs from source: where feature widths differ the released code maps student features with a Linear that it
        makes anew, untrained, in every iteration, so that the queue's features and the keys lie in unrelated spaces;
        here one random projection is drawn from the seed and kept. v and l are per sample (`granularity batch`: per
        batch, as there). The student's InfoNCE is on under every curriculum (there off without weights). The queue
        takes any batch size (there a divisor of its length) and is resumed. The window's arithmetic and both losses
        are equal (golden cases adadfkd_*).
    Cost: CuDFKD plus a student forward, a product and a sort of (B, negatives) per generator step.
    """

    Config: ClassVar[type] = AdaDFKDConfig
    config: AdaDFKDConfig

    def __init__(self, config: AdaDFKDConfig, task: Any):
        super().__init__(config, task)
        wide, narrow = self.teacher.classifier.in_features, self.student_view.classifier.in_features
        draws = task.rng("negatives")
        self.queue = F.normalize(torch.randn(config.negatives, wide, generator=draws, device=self.device), dim=1)
        self.place = 0
        self.projection: Tensor | None = None
        if wide != narrow:
            self.projection = torch.randn(narrow, wide, generator=draws, device=self.device) / narrow**0.5

    def hard_factor(self, epoch: int) -> float:
        """Where the window of negatives begins in `epoch`, as a share of the queue."""
        if not self.task.curriculum.ramp:
            return 0.0
        c = self.config
        return hard_factor(epoch, c.epochs, c.begin, c.end, c.length)

    def schedule_figures(self, epoch: int) -> dict[str, float]:
        """Adversary, age and window of `epoch`."""
        return super().schedule_figures(epoch) | {"hard_factor": self.hard_factor(epoch)}

    def generator_terms(self, images: Tensor) -> dict[str, Tensor]:
        """The weighted terms of L_G."""
        c, weight = self.config, self.adversarial_weight(self.epoch)
        if c.nce == 0:
            return super().generator_terms(images)
        seen = self.look(images, features=True)
        with torch.set_grad_enabled(weight != 0):  # the keys alone need none
            student, key = self.student_view.features(images)
        terms = cudfkd_terms(c, seen.logits, widened(student), seen.features, seen.bn, weight)
        assert seen.features is not None
        query, key = widened(seen.features), self._key(key.detach())
        terms["nce"] = c.nce * windowed_infonce(query, key, self.queue, self.hard_factor(self.epoch), c.length, c.tau)
        self._remember(key)
        return terms

    def _key(self, features: Tensor) -> Tensor:
        """Student features (B, D_s) in the teacher's width (B, D_t)."""
        features = widened(features)
        return features if self.projection is None else features @ self.projection.to(features.dtype)

    def _remember(self, key: Tensor) -> None:
        """The queue's oldest entries give way to the (normalised) keys."""
        length = len(self.queue)
        key = F.normalize(key, dim=1)[-length:]
        rows = (self.place + torch.arange(len(key), device=key.device)) % length
        self.queue = self.queue.index_copy(0, rows, key.to(self.queue.dtype))  # not in place: a backward needs the old
        self.place = (self.place + len(key)) % length

    def distil(self, images: Tensor) -> Distilled:
        """KD and feature InfoNCE of every sample, weighed by the curriculum."""
        c = self.config
        if c.s_nce == 0:
            return super().distil(images)
        with self.task.runtime.autocast():
            with torch.no_grad():
                teacher, query = self.teacher.features(images)
            student, key = self.student_view.features(images)
        teacher, student = widened(teacher), widened(student)
        per_sample = self.kd_per_sample(student, teacher)
        difficulty = per_sample + c.s_nce * infonce_per_sample(widened(query), self._key(key), c.tau)
        return Distilled(teacher, student, per_sample, self.student_loss(difficulty))

    def extra_state(self) -> dict[str, Any]:
        """The queue; the projection follows from the seed."""
        return {"queue": self.queue, "place": self.place}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `extra_state`."""
        self.queue = state["queue"].to(self.device)
        self.place = int(state["place"])


def hard_factor(epoch: int, epochs: int, begin: float, end: float, length: float) -> float:
    """h = (1 - length) (epoch - e_b) / int(E (end - begin)), held in [0, 1 - length], with e_b = int(E begin)."""
    span = max(1, int(epochs * (end - begin)))
    return min(max(0.0, (1 - length) * (epoch - int(begin * epochs)) / span), 1 - length)


def windowed_infonce(query: Tensor, key: Tensor, queue: Tensor, hard: float, length: float, tau: float) -> Tensor:
    """Mean InfoNCE of queries (B, D) with their keys (B, D, no gradient) against a window of the queue (K, D).

    Every query's products with the queue are sorted ascending; columns int(hard K) to int((hard + length) K) count.
    """
    query, key = F.normalize(query, dim=1), F.normalize(key.detach(), dim=1)
    queue = queue.to(query.dtype)
    size = len(queue)
    products = (query @ queue.mT).sort(dim=1).values[:, int(hard * size) : int((hard + length) * size)]
    logits = torch.cat([(query * key).sum(1, keepdim=True), products], 1) / tau
    return -logits.log_softmax(1)[:, 0].mean()


def infonce_per_sample(teacher: Tensor, student: Tensor, tau: float) -> Tensor:
    """(B,): cross-entropy of every teacher feature (B, D) with its own student feature among the batch's."""
    products = F.normalize(teacher, dim=1) @ F.normalize(student, dim=1).mT / tau
    return -products.log_softmax(1).diagonal()
