"""Factor transfer: the student's translated map against a compressed one of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Look, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.distillation.losses.maps import attention, pool_to_smaller, require_space, widen
from synthkit.errors import ConfigError, NonFiniteError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor, nn

SLOPE = 0.1  # of every LeakyReLU
ROWS = 64  # of one step of the paraphraser


def ft_loss(student: Tensor, teacher: Tensor, *, reduction: Literal["none", "mean"] = "mean") -> Tensor:
    """Mean absolute difference of the normalised factors of student and teacher.

    `l_i = (1/N) sum_n |a_n(f_s) - a_n(f_t)|`, `a(f) = q / |q|`, `q_n = (1/C) sum_c f_cn^2`; `f_s` is the translator's
    output on the student's last map, `f_t` the paraphraser's encoder on the teacher's; the larger is average-pooled.

    Shapes: `student`, `teacher` (B, C, h, w), any sizes; returns (B,) for "none", a scalar for "mean".

    Source: Kim, Park, Kwak 2018 (arXiv 1802.04977); HobbitLong/RepDistiller@b84f547 distiller_zoo/FT.py and
    models/util.py (Paraphraser, Translator), whose numbers the tests check.
    Differs from source: the paraphraser learns from the bank's images as they are, in order; there they are shuffled
    and augmented. The paper normalises the whole factor and takes |.|_1 of the difference; the code, and this, compare
    spatial attention. The translator's first convolution keeps the student's channels, as in the code.
    Cost: `epochs` passes of the teacher and the paraphraser over the bank before training; then six 3x3 convolutions
    at the last maps' sizes (three of them trained).

    >>> import torch
    >>> float(ft_loss(torch.ones(1, 2, 2, 2), torch.ones(1, 3, 4, 4)))
    0.0
    """
    s, t = pool_to_smaller(student, teacher, wide=False)
    return reduce((attention(s) - attention(t)).abs().mean(dim=1), reduction)


def _stack(kind: type[nn.Module], channels: list[int], *, norm: bool) -> nn.Sequential:
    """3x3 (transposed) convolutions with bias through `channels`, each followed by LeakyReLU, BatchNorm between."""
    layers: list[nn.Module] = []
    for before, after in zip(channels, channels[1:], strict=False):
        layers.append(kind(before, after, 3, padding=1))
        layers += [torch.nn.BatchNorm2d(after)] if norm else []
        layers.append(torch.nn.LeakyReLU(SLOPE))
    return torch.nn.Sequential(*layers)


class FT(Loss):
    """`ft_loss` on the last maps (`--loss ce+200*ft --loss.ft.epochs 30`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of FT."""

        ratio: float = 0.5
        """Channels of the factor per channel of the teacher's map (k of the paper)."""
        epochs: int = 30
        """Passes over the bank that train the paraphraser before the student starts; 0 leaves it random."""
        lr: float = 0.01
        """Learning rate of the paraphraser: SGD with momentum 0.9 and weight decay 5e-4."""

        def __post_init__(self):
            if not 0 < self.ratio <= 1:
                raise ConfigError("loss.ratio is a share in (0, 1]", got=self.ratio, hint="0.5 is usual")
            if self.epochs < 0:
                raise ConfigError("loss.epochs must not be negative", got=self.epochs, hint="30 is usual")
            if not self.lr > 0:
                raise ConfigError("loss.lr must be above 0", got=self.lr, hint="0.01 is usual")

    requires = LossNeeds(student=("maps",), teacher=("maps",))
    beta = 200.0
    aux: nn.ModuleDict | None = None

    def setup(self, setup: Setup) -> None:
        from synthkit.models.init import seeded

        require_space("ft", [(setup.student.maps[-1], setup.teacher.maps[-1])])
        s, t = setup.student.maps[-1][0], setup.teacher.maps[-1][0]
        factor = max(1, int(t * self.config.ratio))
        conv, transposed = torch.nn.Conv2d, torch.nn.ConvTranspose2d
        with seeded(setup.seed):
            modules = {
                "encoder": _stack(conv, [t, t, factor, factor], norm=False),
                "decoder": _stack(transposed, [factor, factor, t, t], norm=False),
                "translator": _stack(conv, [s, s, factor, factor], norm=True),
            }
        self.aux = torch.nn.ModuleDict(modules)
        for name in ("encoder", "decoder"):  # never trained with the student, also after a resume
            self.aux[name].requires_grad_(False)

    def prepare(self, looks: Callable[[], Iterator[Look]]) -> None:
        """Train the paraphraser to reconstruct the teacher's last maps, then freeze it.

        Raises:
            NonFiniteError: it diverged.
        """
        assert self.aux is not None  # set up
        encoder, decoder = self.aux["encoder"], self.aux["decoder"]
        parameters = [*encoder.parameters(), *decoder.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(parameters, lr=self.config.lr, momentum=0.9, weight_decay=5e-4)
        for epoch in range(self.config.epochs):
            error = None
            for look in looks():
                assert look.teacher.maps  # required above
                for target in widen(look.teacher.maps[-1]).split(ROWS):
                    with torch.enable_grad():
                        error = F.mse_loss(decoder(encoder(target)), target)
                        optimizer.zero_grad(set_to_none=True)
                        error.backward()
                    optimizer.step()
            if error is not None and not bool(torch.isfinite(error)):
                raise NonFiniteError(
                    f"ft: the paraphraser's error is not finite in pass {epoch + 1} of {self.config.epochs}",
                    hint=f"lower loss.lr (try {self.config.lr / 3:.2g})",
                )
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert self.aux is not None and student.maps and teacher.maps  # set up, and required above
        with torch.no_grad():
            target = self.aux["encoder"](teacher.maps[-1])
        return {"ft": ft_loss(self.aux["translator"](student.maps[-1]), target, reduction="none")}
