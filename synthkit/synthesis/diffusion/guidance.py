"""Teacher guidance: energies of the predicted clean image, and how they bend a step.

Sign: an energy is *minimised*. eps is the direction towards noise (eps = -sqrt(1 - abar) grad log p), so a step
against the energy adds its gradient: eps' = eps + g sqrt(1 - abar) G, with G = d(sum of energies)/dx_t. All energies
are sums over the images, so that the gradient of an image does not depend on how many others are painted beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthkit.lazy import F, torch
from synthkit.logits import kl_per_sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def class_energy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy -log p(y_i | x_i) of every image, (B,): low where the teacher sees the intended class."""
    return F.cross_entropy(logits, labels, reduction="none")


def adversarial_energy(student: Tensor, teacher: Tensor, T: float) -> Tensor:
    """-1[argmax s_i = argmax t_i] T^2 KL(softmax(t_i / T) || softmax(s_i / T)), (B,): low where the student is unsure.

    Masked as CuDFKD's and DiffDFKD's adversary: images that the student already gets wrong are not pushed further.
    """
    agree = (student.argmax(1) == teacher.argmax(1)).to(teacher.dtype)
    return -agree * kl_per_sample(student, teacher, T)


def diversity_energy(images: Tensor, labels: Tensor) -> Tensor:
    """max over j != i with y_j = y_i of cos(x_i, x_j), (B,): low where no image of the same class is alike.

    The others are a memory: no gradient flows to them. An image that is alone in its class has energy 0.
    """
    flat = F.normalize(images.flatten(1), dim=1)
    alike = flat @ flat.detach().T
    others = (labels[:, None] == labels[None, :]).fill_diagonal_(False)
    nearest = alike.masked_fill(~others, -2).amax(1)
    return torch.where(others.any(1), nearest, torch.zeros_like(nearest))


def clean_image(state: Tensor, noise: Tensor, abar: float) -> Tensor:
    """x_0 predicted from x_t and eps: (x_t - sqrt(1 - abar) eps) / sqrt(abar)."""
    return (state - (1 - abar) ** 0.5 * noise) / abar**0.5


def guided_noise(
    state: Tensor,
    noise: Tensor,
    abar: float,
    energy: Callable[[Tensor], Tensor],
    scale: Tensor,
    *,
    normalise: bool,
) -> Tensor:
    """eps' = eps + g sqrt(1 - abar) G; with `normalise` every G_i has first been given the length of eps_i.

    The raw gradient through x_0 carries 1 / sqrt(abar), which explodes where there is little signal.

    Args:
        state: x_t (B, ...) that requires a gradient; `noise` may depend on it (through the network) or not (cheap).
        energy: predicted x_0 (B, ...) -> scalar.
        scale: g (B,), one per image.

    Returns:
        eps' (B, ...) without a graph.
    """
    (gradient,) = torch.autograd.grad(energy(clean_image(state, noise, abar)), state)
    noise, shape = noise.detach(), (-1, *[1] * (state.ndim - 1))
    if normalise:
        lengths = [torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (noise, gradient)]
        gradient = gradient * (lengths[0] / lengths[1].clamp(min=1e-12)).view(shape)
    return noise + ((1 - abar) ** 0.5 * scale).view(shape) * gradient
