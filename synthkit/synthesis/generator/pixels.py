"""What ZSKD and soft-target share: pixels are optimised directly, all of them before the student starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from synthkit.errors import ConfigError
from synthkit.lazy import torch
from synthkit.synthesis.base import Makes, widened
from synthkit.synthesis.generator.config import PoolConfig, not_negative
from synthkit.synthesis.generator.pool import PoolLoop
from synthkit.synthesis.inversion.views import draw_views

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PixelConfig(PoolConfig):
    """Methods whose pixels know the teacher only: no generator, no adversary."""

    warmup: float = 1.0
    """Share of the batches that are made before the student starts (published: all of them)."""
    grad_adv: float = 0.0
    """Stays 0: the images do not look at the student."""
    jitter: int = 4
    """Views are rolled by up to this many pixels, one draw per iteration (published: an eighth of the side)."""
    flip: bool = True
    """Mirror half of the views."""

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "jitter")
        if self.adv or self.grad_adv:
            raise ConfigError(
                "method.adv and method.grad_adv: these images are made without looking at the student",
                got=(self.adv, self.grad_adv),
                hint="leave both at 0; for inversion against a student use --method adi or cmi",
            )


class PixelLoop(PoolLoop):
    """Base of the two: pixels live in the teacher's normalised space, as published; bytes are met at the end only."""

    Config: ClassVar[type] = PixelConfig
    makes: ClassVar[Makes] = Makes()

    def to_pixels(self, normalised: Tensor) -> Tensor:
        """[0, 1] space of what the teacher's first layer sees; unclamped."""
        mean, std = self._constants(normalised)
        return torch.addcmul(mean, normalised, std)

    def clip_(self, normalised: Tensor) -> None:
        """Clamp normalised pixels to black and white, in place."""
        mean, std = self._constants(normalised)
        with torch.no_grad():
            normalised.clamp_(-mean / std, (1 - mean) / std)

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(  # type: ignore[return-value]  # two of them
            torch.tensor(v, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
            for v in (self.teacher.mean, self.teacher.std)
        )

    def fresh(self, call: int, draw: Callable[..., Tensor]) -> Tensor:
        """A leaf of noise (S, C, H, W) for a call, drawn by `torch.randn` or `torch.rand`."""
        size = (self.config.synthesis_batch, *self.teacher.input_size)
        memory = torch.channels_last if self.task.runtime.channels_last else torch.contiguous_format
        noise = draw(size, generator=self.task.rng(f"call-{call}-noise"), device=self.device)
        return noise.contiguous(memory_format=memory).requires_grad_()

    def view(self, pixels: Tensor, call: int, iteration: int) -> Tensor:
        """Roll and mirror the batch by one draw, a pure function of (seed, call, iteration); differentiable."""
        c, draw = self.config, self.task.numpy_rng("views", call, iteration)
        return draw_views(draw, 1, (pixels.shape[2], pixels.shape[3]), jitter=c.jitter, flip=c.flip)(pixels)

    def adam(self, pixels: Tensor) -> torch.optim.Optimizer:
        """The optimiser of a batch of pixels."""
        return torch.optim.Adam([pixels], lr=self.config.lr_g, betas=self.config.betas_g)

    def descend(self, optimizer: torch.optim.Optimizer, terms: dict[str, Tensor]) -> None:
        """One update of the pixels by the sum of scalar terms."""
        loss = torch.stack([widened(term) for term in terms.values()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        self.note_generator(terms, loss)
