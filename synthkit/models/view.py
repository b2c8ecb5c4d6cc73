"""Views of a classifier: the one place where images are normalised.

Everything else in the house speaks pixel space [0, 1]. A `ModelView` normalises and runs a network; a `TeacherView`
also freezes it and gives logits, penultimate features and, inside a context only, BatchNorm statistics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from synthkit.errors import ModelError
from synthkit.models.bn_stats import BatchNormStatistics

if TYPE_CHECKING:
    from synthkit.models.build import LoadedModel


class ModelView:
    """A classifier seen from pixel space.

    Args:
        module: network that takes normalised images (B, C, H, W) and returns logits (B, K).
        mean, std: per-channel constants of the network's training data, in [0, 1] units.
        input_size: (C, H, W) that the network takes.
        class_names: K names, or None.
        name: how messages call it.
    """

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        input_size: tuple[int, int, int],
        num_classes: int,
        class_names: Sequence[str] | None = None,
        name: str = "model",
    ):
        channels = input_size[0]
        if len(mean) != channels or len(std) != channels:
            raise ModelError(
                f"{name}: mean and std need {channels} value(s), one per channel", got=(list(mean), list(std))
            )
        if any(s <= 0 for s in std):
            raise ModelError(f"{name}: std must be positive", got=list(std))
        self.module = module
        self.mean, self.std = list(map(float, mean)), list(map(float, std))
        self.input_size: tuple[int, int, int] = (input_size[0], input_size[1], input_size[2])
        self.num_classes = num_classes
        self.class_names = list(class_names) if class_names else None
        self.name = name
        self._scale = (1.0 / torch.tensor(self.std)).view(1, -1, 1, 1)
        self._shift = (-torch.tensor(self.mean) / torch.tensor(self.std)).view(1, -1, 1, 1)

    @classmethod
    def from_loaded(cls, loaded: LoadedModel):
        """A view of what `load_model` returned, with the constants of its card."""
        card = loaded.card
        return cls(
            loaded.module,
            card.mean,
            card.std,
            input_size=tuple(card.input_size),  # type: ignore[arg-type]  # the card checks its length
            num_classes=card.num_classes,
            class_names=card.class_names,
            name=loaded.spec,
        )

    def to(self, device: torch.device | str, *, channels_last: bool = False):
        """Move network and constants; optionally lay convolutions out channels-last."""
        self.module.to(device)
        if channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks the keyword
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """[0, 1] images (or uint8) to the network's input: (x - mean) / std."""
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        if images.shape[1:] != self.input_size:
            raise ModelError(
                f"{self.name} takes images of {self.input_size}",
                got=tuple(images.shape[1:]),
                hint="resize the data, or use a model of that input size",
            )
        scale, shift = self._scale.to(images.dtype), self._shift.to(images.dtype)
        return torch.addcmul(shift, images, scale)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of [0, 1] images (B, C, H, W)."""
        return self.module(self.normalize(images))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and the penultimate feature (B, D): the input of the last linear layer."""
        kept: list[Tensor] = []
        handle = self.classifier.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        try:
            logits = self(images)
        finally:
            handle.remove()
        return logits, kept[0].flatten(1)

    @property
    def last_linear(self) -> nn.Linear | None:
        """The last linear layer of the network, None where there is none."""
        linears = [m for m in self.module.modules() if isinstance(m, nn.Linear)]
        return linears[-1] if linears else None

    @property
    def classifier(self) -> nn.Linear:
        """The last linear layer; raises `ModelError` where there is none."""
        if self.last_linear is None:
            raise ModelError(f"{self.name} has no linear classifier layer", hint="use logits only")
        return self.last_linear

    def batchnorms(self) -> list[nn.BatchNorm2d]:
        """All BatchNorm2d layers with running statistics, in module order."""
        return [m for m in self.module.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]

    @property
    def has_batchnorm(self) -> bool:
        """Whether BatchNorm statistics can be asked for."""
        return bool(self.batchnorms())


class TeacherView(ModelView):
    """A frozen classifier in eval mode: no weight ever receives a gradient, gradients flow to the images only."""

    def __init__(self, module: nn.Module, *args, **kwargs):
        super().__init__(module, *args, **kwargs)
        self.module.eval().requires_grad_(False)

    @contextlib.contextmanager
    def bn_statistics(self) -> Iterator[BatchNormStatistics]:
        """Record batch statistics of every BatchNorm2d input while the context is open.

        The network is the same afterwards: nothing stays attached. Raises `ModelError` without BatchNorm layers.
        """
        layers = self.batchnorms()
        if not layers:
            raise ModelError(
                f"{self.name} has no BatchNorm2d layer", hint="switch the BN term off (bn 0) or use a teacher with BN"
            )
        statistics = BatchNormStatistics(layers)
        with statistics.recording():
            yield statistics
