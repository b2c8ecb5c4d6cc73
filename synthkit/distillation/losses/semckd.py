"""SemCKD: every student stage attends to the teacher's stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import check_temperature, reduce
from synthkit.distillation.losses.maps import full_precision, mean_per_sample, pool_to_smaller, widen
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def gram(feature: Tensor) -> Tensor:
    """(B, B) inner products of the samples' flattened maps (B, C, h, w)."""
    flat = widen(feature).flatten(1)
    return flat @ flat.T


def attention_weights(queries: Tensor, keys: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, S, T) softmax over the T teacher stages of `q . k / temperature`; queries (B, S, E), keys (B, T, E)."""
    return F.softmax(queries @ keys.transpose(1, 2) / temperature, dim=2)


def semckd_loss(weights: Tensor, errors: Tensor, *, reduction: Literal["none", "mean"] = "mean"):
    """Semantic calibration: the errors of all pairs of stages, weighted by attention.

    `l_b = (1/S) sum_ij a_bij e_bij`, `a_bi = softmax_j(q_i(S_i)_b . k_j(T_j)_b / tau)`, `S_i`, `T_j` the Gram matrices
    (B, B) of the batch's maps, whose rows feed the small networks `q` and `k` (unit norm), `e_bij` the mean squared
    error of the student's map i, projected to the channels of the teacher's map j, at the smaller of both sizes.

    Shapes: `weights`, `errors` (B, S, T) for S student and T teacher stages; returns (B,) for "none", a scalar for
    "mean".

    Source: Chen et al. 2021, "Cross-layer distillation with semantic calibration" (arXiv 2012.03236);
    DefangChen/SimKD@2b389c3 models/util.py:SelfA and distiller_zoo/SemCKD.py, whose numbers the tests check.
    Differs from source: the second network in each of `q` and `k`, which is never called there, is left out. The
    networks are as wide as the batch, so the batch size is part of the state; a partial batch is refused (there it is
    skipped; the trainer makes none).
    Cost: S T projections of 9 (2 C_t)^2 + 2 C_t (C_s + C_t) multiplications per pixel; the dearest of the map losses.

    >>> import torch
    >>> float(semckd_loss(torch.full((2, 1, 2), 0.5), torch.ones(2, 1, 2)))
    1.0
    """
    return reduce((weights * errors).sum(dim=(1, 2)) / weights.shape[1], reduction)


def embedding(batch_size: int, factor: int = 4) -> nn.Sequential:
    """Row of a Gram matrix (B,) to a query or key (B / factor,)."""
    width = batch_size // factor
    return torch.nn.Sequential(
        torch.nn.Linear(batch_size, 2 * width), torch.nn.ReLU(), torch.nn.Linear(2 * width, width)
    )


def projection(student: int, teacher: int) -> nn.Sequential:
    """Student map to the teacher's channels: 1x1, 3x3, 1x1 without bias, BN and ReLU between them."""
    wide = 2 * teacher
    return torch.nn.Sequential(
        torch.nn.Conv2d(student, wide, 1, bias=False),
        torch.nn.BatchNorm2d(wide),
        torch.nn.ReLU(),
        torch.nn.Conv2d(wide, wide, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(wide),
        torch.nn.ReLU(),
        torch.nn.Conv2d(wide, teacher, 1, bias=False),
    )


class SemCKD(Loss):
    """`semckd_loss` of the stage maps (`--loss ce+kd+400*semckd`)."""

    requires = LossNeeds(student=("maps",), teacher=("maps",), relational=True, smallest_batch=16)
    beta = 400.0

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of SemCKD."""

        temperature: float = 1.0
        """Temperature tau of the attention."""
        factor: int = 4
        """Queries and keys have the batch size divided by this as width."""

        def __post_init__(self):
            check_temperature(self.temperature)
            if self.factor < 1:
                raise ConfigError("loss.factor must be at least 1", got=self.factor, hint="4 is usual")

    def setup(self, setup: Setup) -> None:
        from synthkit.models.init import seeded

        self.batch_size, factor = setup.batch_size, self.config.factor
        if self.batch_size < factor:
            raise ConfigError(
                f"loss semckd: the batch size must be at least its factor {factor}",
                got=self.batch_size,
                hint="use a larger --batch_size or a smaller --loss.factor",
            )
        students = [channels for channels, _, _ in setup.student.maps]
        teachers = [channels for channels, _, _ in setup.teacher.maps]
        with seeded(setup.seed):
            self.aux = torch.nn.ModuleDict(
                {
                    "query": torch.nn.ModuleList(embedding(self.batch_size, factor) for _ in students),
                    "key": torch.nn.ModuleList(embedding(self.batch_size, factor) for _ in teachers),
                    "project": torch.nn.ModuleDict(
                        {f"{i}_{j}": projection(s, t) for i, s in enumerate(students) for j, t in enumerate(teachers)}
                    ),
                }
            )

    def attend(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """(B, S, T) weights of every pair of stages."""
        found = []
        for name, maps in (("query", student), ("key", teacher)):
            rows = [F.normalize(net(gram(f)), dim=1) for net, f in zip(self._part(name), maps, strict=True)]
            found.append(torch.stack(rows, dim=1))
        return attention_weights(found[0], found[1], self.config.temperature)

    def _part(self, name: str) -> Any:
        aux: Any = self.aux
        return aux[name]

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert student.maps is not None and teacher.maps is not None
        count = len(student.maps[0])
        if count != self.batch_size:
            raise ConfigError(
                f"loss semckd was built for batches of {self.batch_size}", got=count, hint="keep the batch size"
            )
        with full_precision(student.maps[0]):  # inner products over whole maps
            weights = self.attend(student.maps, teacher.maps)
        rows = []
        for i, mine in enumerate(student.maps):
            for j, theirs in enumerate(teacher.maps):
                source, target = pool_to_smaller(mine, theirs)
                projected = self._part("project")[f"{i}_{j}"](source)
                rows.append(mean_per_sample((widen(projected) - target).square()))
        errors = torch.stack(rows, dim=1).unflatten(1, (len(student.maps), len(teacher.maps)))
        return {"semckd": semckd_loss(weights, errors, reduction="none")}
