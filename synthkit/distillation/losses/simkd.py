"""SimKD: the student's map is brought to the teacher's, and the teacher's classifier is used again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from synthkit.distillation.contract import Batch, Look, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.distillation.losses.maps import mean_per_sample, pool_to_smaller, widen
from synthkit.errors import ConfigError, ModelError, RequirementError
from synthkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def simkd_loss(projected: Tensor, teacher: Tensor, *, reduction: Literal["none", "mean"] = "mean"):
    """The projected last map of the student equals the teacher's.

    `l_i = (1/(C h w)) |g(f_s)_i - f_t_i|^2`, both maps at the smaller of both sizes. Nothing else is needed beside it:
    no labels, no logits. Afterwards the projector and the teacher's classifier stay with the student.

    Shapes: `projected`, `teacher` (B, C, h, w); returns (B,) for "none", a scalar for "mean".

    Source: Chen et al. 2022, "Knowledge distillation with the reused teacher classifier" (arXiv 2203.14001);
    DefangChen/SimKD@2b389c3 models/util.py:SimKD and helper/loops.py, whose numbers the tests check.
    Differs from source: the larger map is pooled by height and by width, for maps that are not square. A teacher whose
    classifier does not read its pooled last map (WRN, MobileNetV2, ShuffleNetV2) is refused before training.
    Cost: the projector's (Cs w + 9 w^2 + w C) h w multiplications per image, w = C / factor, also in use.

    >>> import torch
    >>> float(simkd_loss(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)))
    1.0
    """
    return reduce(mean_per_sample((widen(projected) - widen(teacher)).square()), reduction)


def sharing(module: nn.Module) -> nn.Module:
    """A copy of `module` in eval mode that shares its tensors: it follows the training without disturbing it."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()


class SimKD(Loss):
    """`simkd_loss` with a trained projector (`--loss simkd`, alone)."""

    requires = LossNeeds(student=("maps",), teacher=("maps",), teacher_classifier=True, deploys=True)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of SimKD."""

        factor: int = 2
        """The projector's inner width is the teacher's channels divided by this: 1, 2, 4 or 8 in the paper."""

        def __post_init__(self):
            if self.factor < 1:
                raise ConfigError("loss.factor must be at least 1", got=self.factor, hint="2 is usual")

    def setup(self, setup: Setup) -> None:
        from synthkit.distillation.heads.simkd import projector
        from synthkit.models.init import seeded

        classifier = setup.teacher_classifier
        if classifier is None:
            raise RequirementError("loss simkd needs the teacher's linear classifier", hint="use --loss kd")
        (channels, *_), (wanted, height, width) = setup.student.maps[-1], setup.teacher.maps[-1]
        if wanted != classifier.in_features:
            raise ModelError(
                f"loss simkd: the teacher's last map has {wanted} channels, its classifier takes "
                f"{classifier.in_features} numbers",
                hint="use --loss kd+srrl, or name the map that the classifier reads with --teacher_taps",
            )
        self._classifier = classifier  # the teacher's own, frozen: no part of what is trained and stored
        point = setup.student_points[-1]
        if point.endswith("@pre"):
            raise ConfigError("loss simkd: the student's last map is read at the output of a module", got=point)
        with seeded(setup.seed):
            self.aux = projector(channels, wanted, self.config.factor)
        self._settings: dict[str, Any] = {
            "point": point,
            "channels": channels,
            "size": [height, width],
            "teacher_channels": wanted,
            "num_classes": classifier.out_features,
            "bias": classifier.bias is not None,
            "factor": self.config.factor,
        }

    def prepare(self, looks: Callable[[], Iterator[Look]]) -> None:
        """Nothing is looked for; one batch tells whether the teacher's classifier reads its pooled last map.

        Raises:
            ModelError: it does not, so it would be of no use to the student.
        """
        teacher = next(looks()).teacher
        assert teacher.maps is not None
        with torch.no_grad():
            logits = self._classifier(teacher.maps[-1].float().mean(dim=(2, 3)))
        scale, error = teacher.logits.abs().amax(), (logits - teacher.logits).abs().amax()
        if float(error) > 0.05 * float(scale):  # bf16 stays well below
            raise ModelError(
                "loss simkd: the teacher's classifier does not read its pooled last map (as in WRN, MobileNetV2)",
                hint="use a teacher of the ResNet or VGG kind, or --loss srrl",
            )

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert self.aux is not None and student.maps is not None and teacher.maps is not None
        source, target = pool_to_smaller(student.maps[-1], teacher.maps[-1])
        return {"simkd": simkd_loss(self.aux(source), target, reduction="none")}

    def deploy(self, student: nn.Module) -> nn.Module:
        from synthkit.distillation.heads.simkd import assemble

        assert self.aux is not None
        return assemble(sharing(student), sharing(self.aux), sharing(self._classifier), self._settings)

    def deployed_settings(self) -> dict[str, Any]:
        return dict(self._settings)

    @classmethod
    def rebuild(cls, student: nn.Module, settings: dict[str, Any]) -> nn.Module:
        """See `Loss.rebuild`.

        Raises:
            ModelError: the settings are not SimKD's, or the student has no such module.
        """
        from synthkit.distillation.heads.simkd import rebuild

        return rebuild(student, settings)
