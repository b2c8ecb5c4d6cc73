"""KD++: push the student's feature towards its class's direction and let its norm grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Look, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


def nd_loss(
    student: Tensor, teacher: Tensor, directions: Tensor, *, reduction: Literal["none", "mean"] = "mean"
) -> Tensor:
    """Norm-and-direction loss of features.

    `l_i = 1 - <e_s, c> / max(|e_s|, |e_t|)`, `c` the unit direction of the label's class: a shorter student feature
    is drawn along `c` until it is as long as the teacher's, a longer one is only turned.

    Shapes: `student`, `teacher`, `directions` (B, D), the directions of any length above 0 (of each sample's class);
    returns (B,) for "none", a scalar for "mean".

    Source: Wang et al. 2023, "Improving Knowledge Distillation via Regularizing Feature Norm and Direction" (arXiv
    2305.17007); WangYZ1608/Knowledge-Distillation-via-ND@fc6f3f9 CIFAR/utils.py:DirectNormLoss.
    Differs from source: per-sample values; no factor (it is the term's weight); two features of norm 0 give 1, not NaN.
    Cost: O(B D) time and memory.

    >>> import torch
    >>> student, teacher, up = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> round(float(nd_loss(student, teacher, up)), 4)
    0.2
    """
    along = (student * F.normalize(directions, dim=1)).sum(dim=1)
    longest = torch.maximum(student.norm(dim=1), teacher.norm(dim=1)).clamp_min(1e-12)
    return reduce(1 - along / longest, reduction)


def add_to_classes(sums: Tensor, counts: Tensor, features: Tensor, labels: Tensor, decimals: int | None = None) -> None:
    """In place: add (B, D) `features` to the row of `sums` (K, D) of their label, and 1 to its place in `counts`."""
    features = features.to(sums.dtype)
    if decimals is not None:
        features = features.round(decimals=decimals)
    sums.index_add_(0, labels, features)
    counts.index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))


def class_means(sums: Tensor, counts: Tensor, decimals: int | None = None) -> Tensor:
    """(K, D) means from the sums of `add_to_classes`; rows of 0 for classes without a sample."""
    means = sums / counts.clamp_min(1).unsqueeze(1)
    return means if decimals is None else means.round(decimals=decimals)


class ND(Loss):
    """`nd_loss` on the pooled features (`--loss "ce+kd@ramp20+2*nd"` is KD++ of resnet56 to resnet20).

    `L_i = 1 - <h(e_s), c_y> / max(|h(e_s)|, |e_t|)`, `c_y` the unit mean of the teacher's features over the images of
    class y, `h` the identity, or where the widths differ BatchNorm, dropout and a linear layer, discarded afterwards.

    Shapes: pooled features (B, D_s) and (B, D_t); the value is (B,).

    Source: as `nd_loss`; CIFAR/emb_fea_distribution.py:emb_fea, CIFAR/Models/embtrans_cifar.py:EmbTrans.
    Differs from source: the means are taken over the bank under the label policy (the source: over the training
    images), so they are proxies, as are the classifier's rows (`centers classifier`); a class without an image gets its
    classifier row. The source rounds every feature and the means to 4 decimals (`decimals 4`); here nothing is rounded.
    Cost: one pass of the teacher over the bank before training; then O(B D).
    """

    requires = LossNeeds(labels=True, student=("pooled",), teacher=("pooled",), teacher_classifier=True)
    beta = 2.0

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the ND loss."""

        centers: Literal["bank", "classifier"] = "bank"
        """Where class directions come from: means over the bank, or the rows of the teacher's classifier."""
        dropout: float = 0.5
        """Dropout of the student's feature where the widths differ."""
        decimals: int | None = None
        """Decimals to which features and means are rounded; 4 as released, none: exact."""

        def __post_init__(self):
            if self.centers not in ("bank", "classifier"):
                raise ConfigError("loss.centers: not known", got=self.centers, allowed=["bank", "classifier"])
            if not 0 <= self.dropout < 1:
                raise ConfigError("loss.dropout must lie in [0, 1)", got=self.dropout)

    def setup(self, setup: Setup) -> None:
        """Build the transform where the widths differ; directions are the classifier's rows until `prepare`."""
        from synthkit.models.init import seeded

        classifier = setup.teacher_classifier
        assert classifier is not None  # it is required
        own, width = setup.student.pooled, setup.teacher.pooled
        if tuple(classifier.weight.shape) != (setup.num_classes, width):
            raise ConfigError(
                f"nd: the teacher's classifier must have a row of {width} per class, {setup.num_classes} in all",
                got=tuple(classifier.weight.shape),
            )
        nn = torch.nn
        self.aux = nn.Module()
        self.aux.register_buffer("directions", F.normalize(classifier.weight.detach().float().clone(), dim=1))
        if own != width:
            with seeded(setup.seed):
                layers = nn.BatchNorm1d(own), nn.Dropout(self.config.dropout), nn.Linear(own, width)
                self.aux.add_module("transform", nn.Sequential(*layers))

    def prepare(self, looks: Callable[[], Iterator[Look]]) -> None:
        """Replace the directions by the class means over the bank."""
        if self.config.centers == "classifier":
            return
        assert self.aux is not None
        directions = self.aux.get_buffer("directions")
        sums = torch.zeros(directions.shape, dtype=torch.float64)  # on the CPU: not every device has float64
        counts = torch.zeros(len(sums), dtype=torch.float64)
        for look in looks():
            assert look.labels is not None and look.teacher.pooled is not None
            add_to_classes(sums, counts, look.teacher.pooled.cpu(), look.labels.cpu(), self.config.decimals)
        means = F.normalize(class_means(sums, counts, self.config.decimals), dim=1).to(directions)
        directions.copy_(torch.where(counts.to(directions.device).unsqueeze(1) > 0, means, directions))

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert self.aux is not None and batch.labels is not None
        assert student.pooled is not None and teacher.pooled is not None
        feature = student.pooled
        if "transform" in dict(self.aux.named_children()):
            feature = self.aux.get_submodule("transform")(feature)
        directions = self.aux.get_buffer("directions")[batch.labels]
        return {"nd": nd_loss(feature.float(), teacher.pooled.float(), directions, reduction="none")}
