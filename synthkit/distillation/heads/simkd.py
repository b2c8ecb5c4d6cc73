"""SimKD's projector, and the network that is used after training: student, projector, the teacher's classifier."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from synthkit.distillation.heads.settings import check_settings
from synthkit.errors import ConfigError, ModelError


def projector(student: int, teacher: int, factor: int = 2) -> nn.Sequential:
    """(B, student, h, w) to (B, teacher, h, w), not negative: 1x1, 3x3, 1x1 without bias, BN and ReLU after each.

    The inner width is `teacher // factor`. Parameters: `w s + 9 w^2 + w t + 4 w + 2 t` with w that width.
    """
    width = teacher // factor
    if width < 1:
        raise ConfigError(
            f"loss.factor must not be above {teacher}, the channels of the teacher's last map",
            got=factor,
            hint="2 is usual",
        )
    layers: list[nn.Module] = []
    for cin, cout, kernel in ((student, width, 1), (width, width, 3), (width, teacher, 1)):
        layers += [nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
    return nn.Sequential(*layers)


def shrink(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) at no more than `size`, by adaptive average pooling; unchanged where it is not larger."""
    height, width = min(feature.shape[2], size[0]), min(feature.shape[3], size[1])
    if (feature.shape[2], feature.shape[3]) == (height, width):
        return feature
    return F.adaptive_avg_pool2d(feature, (height, width))


def as_map(tensor: Tensor, channels: int) -> Tensor:
    """(B, channels, h, w) of (B, C, h, w), of channels-last (B, h, w, C), or of tokens (B, N, C) of a square image,
    without the class token where N is no square."""
    if tensor.ndim == 4:
        return tensor if tensor.shape[1] == channels else tensor.permute(0, 3, 1, 2)
    side = math.isqrt(tensor.shape[1])
    return tensor[:, tensor.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))


class SimKDNetwork(nn.Module):
    """Normalised images (B, C, H, W) to logits (B, K), through the teacher's classifier.

    The student's last map is read by a hook that lives during the call only; what the student makes of the map
    afterwards is not used (ONNX drops it). torch.export and both ONNX exporters trace through the hook.

    Args:
        student: its own classifier is neither trained nor used.
        point: dotted path of the module whose (last) output is the student's last map.
        channels: of that map.
        size: (h, w) of the teacher's map: the student's is pooled to it where it is larger.
    """

    def __init__(
        self,
        student: nn.Module,
        projector: nn.Module,
        classifier: nn.Module,
        *,
        point: str,
        channels: int,
        size: tuple[int, int],
    ):
        super().__init__()
        self.student, self.projector, self.classifier = student, projector, classifier
        self.point, self.channels, self.size = point, channels, size
        if point not in (names := [name for name, _ in student.named_modules() if name]):
            raise ModelError("head simkd: the student has no such module", got=point, allowed=names)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        # a copy: an in-place ReLU may follow
        keep = lambda _, __, output: kept.append(output.clone())  # noqa: E731  # lives for one call
        handle = self.student.get_submodule(self.point).register_forward_hook(keep)
        try:
            self.student(x)
        finally:
            handle.remove()
        feature = shrink(as_map(kept[-1], self.channels), self.size)
        return self.classifier(self.projector(feature).mean(dim=(2, 3)))


def rebuild(student: nn.Module, settings: dict[str, Any]) -> SimKDNetwork:
    """The network of `SimKD.deployed_settings` with fresh weights around `student`.

    Raises:
        ModelError: settings are missing or not possible, or the student has no such module.
    """
    numbers = ("channels", "teacher_channels", "num_classes", "factor")
    check_settings("simkd", settings, numbers, ("point", "size", "bias"))
    point, size, bias = settings["point"], settings["size"], settings["bias"]
    pair = isinstance(size, list | tuple) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)
    if not pair or not isinstance(point, str) or not isinstance(bias, bool):
        raise ModelError("head simkd: a module's name, [height, width] and true or false are needed", got=settings)
    wanted = settings["teacher_channels"]
    return assemble(
        student,
        projector(settings["channels"], wanted, settings["factor"]),
        nn.Linear(wanted, settings["num_classes"], bias=settings["bias"]),
        settings,
    )


def assemble(student: nn.Module, head: nn.Module, classifier: nn.Module, settings: dict[str, Any]) -> SimKDNetwork:
    """The network of these parts, in eval mode."""
    place = {"point": settings["point"], "channels": settings["channels"], "size": tuple(settings["size"])}
    return SimKDNetwork(student, head, classifier, **place).eval()
