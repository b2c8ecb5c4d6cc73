"""LELP (experimental): pseudo-subclasses from the teacher's features, for tasks of few classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from synthkit.distillation.contract import Batch, Look, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import check_temperature, reduce
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor, nn

_LARGEST = 2**27  # entries of the class covariances: 1 GiB of float64


def lelp_targets(logits: Tensor, features: Tensor, directions: Tensor, offsets: Tensor, temperature: float) -> Tensor:
    """The teacher's probabilities of K classes of 2R subclasses each.

    `a_icr = <f_i, v_cr> - o_cr`, `p_ics = softmax(t_i)_c softmax([a_ic, -a_ic] / T)_s`.

    Shapes: `logits` (B, K), `features` (B, D), `directions` (K, R, D), `offsets` (K, R); returns (B, K * 2R), rows sum
    to 1, those of a class side by side.
    """
    along = torch.einsum("bd,krd->bkr", features, directions) - offsets
    within = torch.cat([along, -along], dim=2).div(temperature).softmax(dim=2)
    return (logits.softmax(dim=1).unsqueeze(2) * within).flatten(1)


def lelp_loss(student: Tensor, targets: Tensor, *, reduction: Literal["none", "mean"] = "mean") -> Tensor:
    """Cross-entropy `l_i = -sum_j p_ij log softmax(z_i)_j` of subclass logits.

    Shapes: `student` logits and `targets` (B, K * 2R); returns (B,) for "none", a scalar for "mean".

    >>> import torch
    >>> round(float(lelp_loss(torch.zeros(1, 4), torch.full((1, 4), 0.25))), 4)
    1.3863
    """
    return reduce(-(targets * F.log_softmax(student, dim=1)).sum(dim=1), reduction)


def unseen_basis(weight: Tensor) -> Tensor:
    """(D, D - rank) orthonormal columns: the directions of features that a classifier (K, D) does not see."""
    _, values, rows = torch.linalg.svd(weight.detach().cpu().double(), full_matrices=True)
    rank = int((values > values.max() * max(weight.shape) * torch.finfo(weight.dtype).eps).sum())
    return rows[rank:].T


def subclass_directions(sums: Tensor, squares: Tensor, counts: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Per class the leading principal directions, scaled to unit variance of the projections, and their offsets.

    Shapes: `sums` (K, d) and `squares` (K, d, d) of the features and their outer products, `counts` (K,); returns
    (K, number, d) and (K, number). Directions without variance (few or equal images) are 0: their class is not split.
    """
    mean = sums / counts.clamp_min(1).unsqueeze(1)
    covariance = squares / counts.clamp_min(1).view(-1, 1, 1) - mean.unsqueeze(2) * mean.unsqueeze(1)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(1)[:, :number], vectors.flip(2)[:, :, :number].transpose(1, 2)
    scale = (squares.diagonal(dim1=1, dim2=2).sum(dim=1) / counts.clamp_min(1)).unsqueeze(1)
    flat = (values <= 1e-9 * scale) | (values <= 0)  # what is left there is rounding
    largest = vectors.gather(2, vectors.abs().argmax(dim=2, keepdim=True))
    vectors = vectors * largest.sign()  # eigenvectors have no sign of their own; this one is the same on every machine
    vectors = torch.where(flat.unsqueeze(2), 0, vectors / values.clamp_min(1e-300).sqrt().unsqueeze(2))
    return vectors, torch.einsum("kd,krd->kr", mean, vectors)


class LELP(Loss):
    """Linear embedding projections: the student learns subclasses that its teacher's features suggest.

    `L_i = lelp_loss(head(e_i), lelp_targets(t_i, f_i))`; `v_c1 .. v_cR` are the leading principal directions of the
    teacher's features of class c within the null space of its classifier. The deployed student sums the subclasses'
    probabilities.

    Shapes: pooled features (B, D_s), (B, D_t), teacher logits (B, K); the value is (B,).

    Source: Loo, Iliopoulos, Hu, Vee 2024, "Linear Projections of Teacher Embeddings for Few-Class Distillation" (arXiv
    2409.20449). There is no public code; the abstract and an excerpt of the reviews were read.
    Differs from source: experimental. Both signs of each direction as two subclasses, the scaling of projections to
    unit variance and every default are ours or from memory. The student's own classifier gets no gradient from this
    term: add `ce` or `kd` where it is wanted.
    Cost: a pass over the bank before training that sums K covariances of D^2; then O(B K R D) a step.
    """

    requires = LossNeeds(labels=True, student=("pooled",), teacher=("pooled",), teacher_classifier=True, deploys=True)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of LELP."""

        directions: int = 2
        """Principal directions R per class: a class becomes 2R subclasses."""
        temperature: float = 1.0
        """Softening of the subclasses within a class; class probabilities are not softened."""
        null_space: bool = True
        """Look only where the teacher's classifier does not."""

        def __post_init__(self):
            check_temperature(self.temperature)
            if self.directions < 1:
                raise ConfigError("loss.directions must be at least 1", got=self.directions)

    def setup(self, setup: Setup) -> None:
        """Build the subclass head; check that there is room for the directions."""
        from synthkit.models.init import seeded

        classifier = setup.teacher_classifier
        assert classifier is not None  # it is required
        width, number, classes = setup.teacher.pooled, self.config.directions, setup.num_classes
        basis = unseen_basis(classifier.weight) if self.config.null_space else torch.eye(width, dtype=torch.float64)
        self._basis = basis
        if basis.shape[1] < number:
            raise ConfigError(
                f"lelp: the teacher's classifier leaves {basis.shape[1]} of {width} directions unseen",
                got=f"directions {number}",
                hint="LELP is for few classes; --loss.null_space false looks at all directions",
            )
        if classes * basis.shape[1] ** 2 > _LARGEST:
            raise ConfigError(
                f"lelp: {classes} covariances of {basis.shape[1]}^2 do not fit into memory",
                hint="LELP is for few classes: use kd or dist",
            )
        self._classes = classes
        self.aux = torch.nn.Module()
        self.aux.register_buffer("directions", torch.zeros(classes, number, width))
        self.aux.register_buffer("offsets", torch.zeros(classes, number))
        with seeded(setup.seed):
            self.aux.add_module("head", torch.nn.Linear(setup.student.pooled, classes * 2 * number))

    def prepare(self, looks: Callable[[], Iterator[Look]]) -> None:
        """Find the directions of every class on the bank."""
        assert self.aux is not None
        size = self._basis.shape[1]
        sums = torch.zeros(self._classes, size, dtype=torch.float64)
        squares = torch.zeros(self._classes, size, size, dtype=torch.float64)
        counts = torch.zeros(self._classes, dtype=torch.float64)
        for look in looks():
            assert look.labels is not None and look.teacher.pooled is not None
            features, labels = look.teacher.pooled.cpu().double() @ self._basis, look.labels.cpu()
            for c in labels.unique().tolist():
                of_class = features[labels == c]
                sums[c] += of_class.sum(dim=0)
                squares[c] += of_class.T @ of_class
                counts[c] += len(of_class)
        directions, offsets = subclass_directions(sums, squares, counts, self.config.directions)
        self.aux.get_buffer("directions").copy_(directions @ self._basis.T)
        self.aux.get_buffer("offsets").copy_(offsets)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert self.aux is not None and student.pooled is not None and teacher.pooled is not None
        targets = lelp_targets(
            teacher.logits,
            teacher.pooled.float(),
            self.aux.get_buffer("directions"),
            self.aux.get_buffer("offsets"),
            self.config.temperature,
        )
        logits = self.aux.get_submodule("head")(student.pooled).float()
        return {"lelp": lelp_loss(logits, targets, reduction="none")}

    def deploy(self, student: nn.Module) -> nn.Module:
        """The student with the subclass head in place of its classifier."""
        from synthkit.distillation.heads.lelp import SubclassHead, with_classifier

        assert self.aux is not None
        head: Any = self.aux.get_submodule("head")
        return with_classifier(student, SubclassHead(head, self._classes))

    def deployed_settings(self) -> dict[str, Any]:
        """Numbers of classes and of subclasses per class."""
        return {"num_classes": self._classes, "subclasses": 2 * self.config.directions}

    @classmethod
    def rebuild(cls, student: nn.Module, settings: dict[str, Any]) -> nn.Module:
        """A fresh student with a fresh subclass head."""
        from synthkit.distillation.heads.lelp import SubclassHead, classifier_of, with_classifier
        from synthkit.distillation.heads.settings import check_settings

        check_settings("lelp", settings, ("num_classes", "subclasses"))
        _, old = classifier_of(student)
        classes = settings["num_classes"]
        fresh = torch.nn.Linear(old.in_features, classes * settings["subclasses"])
        return with_classifier(student, SubclassHead(fresh, classes))
