"""CRD: contrastive representation distillation with memories of every image's embeddings."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import check_temperature, reduce
from synthkit.distillation.losses.crd_draw import Classes, draw_negatives, draw_positives
from synthkit.distillation.losses.maps import full_precision, widen
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
EPS = 1e-7


def contrast_scores(anchors: Tensor, memory: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """(B, K+1) `memory[rows] . anchor / temperature`; anchors (B, E), memory (N, E), rows (B, K+1)."""
    # one product with the whole memory and a choice among B x N numbers: the chosen vectors would be B x K x E
    return (anchors @ memory.T).gather(1, rows) / temperature


def log_normaliser(scores: Tensor, images: int) -> Tensor:
    """Scalar `log(N mean exp(scores))` without gradient."""
    return torch.logsumexp(scores.detach().flatten(), dim=0) - math.log(scores.numel() / images)


def nce_loss(scores: Tensor, log_z: Tensor, images: int) -> Tensor:
    """(B,) noise-contrastive estimation: column 0 is the data, the K others are noise of density 1/N."""
    noise = (scores.shape[1] - 1) / images
    log_p = scores - log_z
    log_sum = (log_p.exp() + (noise + EPS)).log()
    return -(log_p[:, 0] - log_sum[:, 0]) - (math.log(noise) - log_sum[:, 1:]).sum(dim=1)


def crd_loss(
    scores_s: Tensor, scores_t: Tensor, log_z: Tensor, images: int, *, reduction: Literal["none", "mean"] = "mean"
):
    """Contrastive distillation: an image's student and teacher embeddings find each other among other images'.

    `l_i = L(u_i) + L(w_i)`, `L(x) = -log(P_0 / (P_0 + c + eps)) - sum_k log(c / (P_k + c + eps))`, `P = exp(x) / Z`,
    `c = K / N`, eps = 1e-7; the scores `u_ik = M_t[j_k] . v_s_i / tau` and `w_ik = M_s[j_k] . v_t_i / tau` compare
    unit embeddings `v` of the pooled features with the memories `M`; `j_0` is the image itself (or one of its class),
    `j_1..j_K` are images of other classes. `Z` (one for each side) is `N mean exp(x)` of the first batch, constant
    from then on. After the scores, `M[i] <- normalise(m M[i] + (1 - m) v_i)`.

    Shapes: `scores_s`, `scores_t` (B, K+1) with the positive in column 0, `log_z` (2,) the logarithms of both `Z`,
    student first; returns (B,) for "none", a scalar for "mean".

    Source: Tian, Krishnan, Isola 2020, "Contrastive representation distillation" (arXiv 1910.10699);
    HobbitLong/RepDistiller@b84f547 crd/criterion.py and crd/memory.py, whose numbers the tests check.
    Differs from source: computed from logarithms; tau is 0.07 and not its float32 neighbour. Negatives are drawn on
    the device (`crd_draw`), each sample's set distributed as in the source: without replacement, and with it for all
    samples where K is more than the images outside the largest class (the log says so). N counts all images of the
    bank: held-out ones serve as negatives with their initial vectors. An image that is twice in a batch updates its
    row once, by its first place.
    Cost: O(B N E) time, O(B N + N E) memory (the source's O(B K E) is more where N < K E); both memories are 2 N E
    numbers in the state (51 MB for 50,000 images).

    >>> import torch
    >>> value = crd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), images=4)
    >>> round(float(value) / 2, 4)  # P = 1, c = 1/2: log(3/2) + 2 log(3)
    2.6027
    """
    parts = [nce_loss(scores, log_z[at], images) for at, scores in enumerate((scores_s, scores_t))]
    return reduce(parts[0] + parts[1], reduction)


def update_memory(memory: Tensor, index: Tensor, embeddings: Tensor, momentum: float) -> None:
    """In place, without gradient: rows `index` (B,) of `memory` (N, E) move to `embeddings` (B, E), unit norm again."""
    with torch.no_grad():
        same = index[:, None] == index[None]
        places = torch.arange(len(index), device=index.device)
        first = torch.where(same, places, len(index)).amin(dim=1)  # equal rows write equal values: no race
        moved = momentum * memory[index] + (1 - momentum) * embeddings[first].to(memory.dtype)
        memory[index] = F.normalize(moved, dim=1)


class CRD(Loss):
    """`crd_loss` with trained embeddings and memories (`--loss ce+0.8*crd`)."""

    # relational: every process must update the same memories
    requires = LossNeeds(labels=True, student=("pooled",), teacher=("pooled",), index=True, relational=True)
    beta = 0.8

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of CRD."""

        negatives: int = 16384
        """Negatives K of every image."""
        temperature: float = 0.07
        """Temperature tau of the scores."""
        momentum: float = 0.5
        """Share m of the old vector in an update of the memories, in [0, 1)."""
        width: int = 128
        """Width E of the embeddings."""
        positive: Literal["exact", "relax"] = "exact"
        """The positive is the image itself (exact) or a random one of its class (relax)."""

        def __post_init__(self):
            check_temperature(self.temperature)
            if self.negatives < 1 or self.width < 1:
                raise ConfigError("loss.negatives and loss.width must be at least 1", got=(self.negatives, self.width))
            if not 0 <= self.momentum < 1:
                raise ConfigError("loss.momentum must be in [0, 1)", got=self.momentum, hint="0.5 is usual")
            if self.positive not in ("exact", "relax"):
                raise ConfigError("loss.positive: not known", got=self.positive, allowed=["exact", "relax"])

    def setup(self, setup: Setup) -> None:
        from synthkit.models.init import seeded

        if setup.bank_labels is None:
            raise ConfigError(
                "loss crd draws negatives by class: every image needs a label", hint="use --labels argmax"
            )
        cfg, images = self.config, setup.images
        classes = Classes.of(setup.bank_labels.cpu())
        if classes.fewest_others == 0:
            raise ConfigError("loss crd needs images of two classes", hint="use another bank or --loss rkd")
        self.replacement = cfg.negatives > classes.fewest_others
        if self.replacement:
            log.info(
                "loss crd: %d negatives, but only %d images outside the largest class: drawn with replacement",
                cfg.negatives,
                classes.fewest_others,
            )
        bound = (3 / cfg.width) ** 0.5
        with seeded(setup.seed):
            aux = torch.nn.ModuleDict(
                {
                    "student": torch.nn.Linear(setup.student.pooled, cfg.width),
                    "teacher": torch.nn.Linear(setup.teacher.pooled, cfg.width),
                }
            )
            for side in ("student", "teacher"):
                aux.register_buffer(f"memory_{side}", torch.empty(images, cfg.width).uniform_(-bound, bound))
        aux.register_buffer("log_z", torch.zeros(2))
        aux.register_buffer("known", torch.zeros(()))  # 1 once log_z is
        for name, value in vars(classes).items():  # facts of the bank: moved with the rest, not stored
            if isinstance(value, torch.Tensor):
                aux.register_buffer(name, value, persistent=False)
        self.aux, self._classes = aux, classes

    def rows(self, batch: Batch) -> Tensor:
        """(B, K+1) rows of the memories: the positive, then the negatives, drawn for this step."""
        assert batch.index is not None and batch.draw is not None
        aux: Any = self.aux
        classes = Classes(aux.labels, aux.order, aux.starts, aux.counts, self._classes.fewest_others)
        seed = batch.draw("negatives").initial_seed()
        generator = torch.Generator(device=batch.index.device).manual_seed(seed)
        positives = batch.index
        if self.config.positive == "relax":
            positives = draw_positives(classes, batch.index, generator)
        negatives = draw_negatives(classes, batch.index, self.config.negatives, generator, replacement=self.replacement)
        return torch.cat([positives[:, None], negatives], dim=1)

    def contrast(self, student: Tensor, teacher: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        """(B,) loss of pooled features (B, D) for chosen rows (B, K+1); then the memories take `index` in."""
        aux: Any = self.aux
        images, tau = len(aux.memory_student), self.config.temperature
        mine = F.normalize(aux["student"](student), dim=1)
        theirs = F.normalize(aux["teacher"](teacher), dim=1)
        # clones: the backward pass needs the vectors from before the update
        scores = (
            contrast_scores(mine, aux.memory_teacher.clone(), rows, tau),
            contrast_scores(theirs, aux.memory_student.clone(), rows, tau),
        )
        fresh = torch.stack([log_normaliser(s, images) for s in scores]).to(aux.log_z.dtype)
        aux.log_z.copy_(torch.where(aux.known > 0, aux.log_z, fresh))
        aux.known.fill_(1)
        value = crd_loss(*scores, aux.log_z.clone(), images, reduction="none")
        update_memory(aux.memory_student, index, mine.detach(), self.config.momentum)
        update_memory(aux.memory_teacher, index, theirs.detach(), self.config.momentum)
        return value

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert student.pooled is not None and teacher.pooled is not None and batch.index is not None
        with full_precision(student.pooled):  # the scores are exponents after a division by 0.07
            value = self.contrast(widen(student.pooled), widen(teacher.pooled), batch.index, self.rows(batch))
        return {"crd": value}
