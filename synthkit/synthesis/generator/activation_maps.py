"""Where a network looks: class-activation maps and Grad-CAM of feature maps, and their distance (SpaceshipNet).

Source: skgyu/SpaceshipNet@30a76b0 `model_CFE_mSARC_base_V37.py` (`cope_fclikeconv`, `gradcam_cope`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthkit.errors import RequirementError
from synthkit.lazy import F, torch
from synthkit.synthesis.base import widened

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.models.stages import StageMaps
    from synthkit.models.view import ModelView


def class_activation_maps(view: ModelView, found: StageMaps) -> Tensor:
    """(B, K, h, w): the classifier's weight, as a constant, over the last map.

    A classifier that does not look at a pooled last map has its input features as a map of one pixel.
    """
    weight, last, feature = view.classifier.weight.detach(), found.last, found.feature
    if last is None or last.shape[1] != weight.shape[1]:
        assert feature is not None  # the classifier was run
        last = feature[:, :, None, None]
    return torch.einsum("kc,bchw->bkhw", weight, widened(last))


def grad_cam(logits: Tensor, maps: list[Tensor], labels: Tensor) -> list[Tensor]:
    """(B, h, w) of every map A (B, C, h, w): sum_c w_c A_c, w_c the spatial mean of d logits[labels] / d A_c.

    The weights w are constants (no second derivative); there is no ReLU and no normalisation.
    """
    chosen = logits.gather(1, labels[:, None]).sum()
    gradients = torch.autograd.grad(chosen, maps, retain_graph=True)
    return [
        (widened(gradient).mean((2, 3), keepdim=True) * widened(found)).sum(1)
        for gradient, found in zip(gradients, maps, strict=True)
    ]


def squared_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """(B,): mean squared difference of maps (B, ..., h, w), both pooled to the smaller size where they differ."""
    size = (min(ours.shape[-2], theirs.shape[-2]), min(ours.shape[-1], theirs.shape[-1]))
    ours, theirs = (x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in (ours, theirs))
    return (ours - theirs).square().flatten(1).mean(1)


def require_common_stages(teacher: ModelView, student: ModelView, device: torch.device) -> None:
    """Look at one blank image with both networks (left in eval mode).

    Raises:
        RequirementError: no map of one has the size of a map of the other.
    """
    from synthkit.models.stages import stage_maps

    blank, sizes = torch.zeros(1, *teacher.input_size, device=device), []
    for view in (teacher, student):
        view.module.eval()
        with torch.no_grad(), stage_maps(view) as found:
            view(blank)
        sizes.append(set(found.stages))
    if not sizes[0] & sizes[1]:
        raise RequirementError(
            "teacher and student have no feature maps of the same size, so there is no Grad-CAM to compare",
            got=[sorted(found) for found in sizes],
            hint="use --method.gradcam 0, or another student",
        )
