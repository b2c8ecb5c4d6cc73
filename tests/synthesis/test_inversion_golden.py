"""Inversion against numbers that the original implementations produced (whole update trajectories in float64)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthesis.tiny import TinyNet, task
from synthkit.models.view import TeacherView
from synthkit.synthesis.inversion.deepinversion import DeepInversion, DeepInversionConfig
from synthkit.synthesis.inversion.job import Job, learning_rate
from synthkit.synthesis.inversion.views import Views
from synthkit.synthesis.priors import l2_batch, l2_mean, tv_l1, tv_l2

REFERENCE = Path(__file__).parents[1] / "reference"


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(a, b, rtol=1e-7, atol=1e-9):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


def network(case: dict[str, torch.Tensor], prefix: str, mean, std) -> TeacherView:
    state = {k[len(prefix) :]: v for k, v in case.items() if k.startswith(prefix)}
    net = TinyNet(width=state["conv1.weight"].shape[0]).double()
    net.load_state_dict(state)
    size = case["x0"].shape[-1]
    return TeacherView(net, mean, std, input_size=(3, size, size), num_classes=10, name=prefix)


def golden_job(case: dict[str, torch.Tensor], mean=(0, 0, 0), std=(1, 1, 1), **settings) -> Job:
    """A job on the stored networks, pixels, labels and draws."""
    teacher, student = (network(case, prefix, mean, std) for prefix in ("T.", "S."))
    config = DeepInversionConfig(competitor="S", **settings)
    method = DeepInversion(config, task(teachers=[teacher], networks={"competitor": student}, images=len(case["y"])))
    inverter = method.inverter
    flips = case["flip"] > 0.5 if "flip" in case else torch.zeros(len(case["jitter"]), dtype=torch.bool)
    inverter.views = (
        lambda start, count, t, size: Views(  # type: ignore[method-assign]
            roll=case["jitter"][t : t + 1].numpy(), flip=flips[t : t + 1].numpy()
        )
    )
    return Job(inverter, 0, case["y"], case["x0"])


def losses(job: Job, count: int) -> torch.Tensor:
    return torch.stack([torch.stack(list(job.step().values())).sum() for _ in range(count)])


def shown(job: Job, mean, std) -> torch.Tensor:
    """The pixels in [0, 1], float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    return job.pixels.detach() * std + mean


def test_image_priors():
    case = golden("image_priors")
    for name, prior in (("tv_l1", tv_l1), ("tv_l2", tv_l2), ("l2_batch", l2_batch), ("l2_mean", l2_mean)):
        for memory in (torch.contiguous_format, torch.channels_last):
            x = case["x"].clone().contiguous(memory_format=memory).requires_grad_()
            value = prior(x)
            value.backward()
            close(value.detach(), case[name], rtol=1e-9, atol=1e-11)
            close(x.grad, case[f"grad_{name}"], rtol=1e-9, atol=1e-11)


def test_cifar_loop():
    """NVIDIA's CIFAR loop with competition; the last iterate is what it returns ("best" aliases the pixels)."""
    case = golden("deepinversion_cifar_loop")
    job = golden_job(case, competition=1.0, iterations=3)
    close(losses(job, 3), case["losses"])
    assert job.done
    close(job.pixels.detach(), case["x_after"])


IMAGENET = {
    "coarse_iterations": 2, "iterations": 2, "lr": 0.2, "betas": (0.5, 0.9), "schedule": "cosine", "warmup": 1,
    "jitter": 30, "flip": True, "clamp": True, "bn": 0.05, "bn_first": 10.0, "tv_l2": 1e-4, "l2": 1e-5,
    "competition": 0.2,
}  # fmt: skip


def test_imagenet_loop():
    """Setting 0: two iterations on pooled pixels, two at full size with a new optimiser; the stored best is the clone
    after the second iteration, whose loss was lowest."""
    case = golden("deepinversion_imagenet_loop")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    job = golden_job(case, mean, std, **IMAGENET)
    close(losses(job, 2), case["losses"][:2])
    close(shown(job, mean, std), case["best01"])
    first = job.optimizer
    close(losses(job, 2), case["losses"][2:])
    assert job.optimizer is not first and job.done


def test_benchmark_loop():
    """zju's form: -J as competition, total variation of the pixels before the view."""
    case = golden("deepinv_benchmark_loop")
    mean, std = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    job = golden_job(
        case, mean, std, iterations=3, betas=(0.5, 0.99), flip=True, clamp=True, bn=10.0, tv_l2=0.0, tv_l1=1e-3,
        priors_of="pixels", competition=1.0, competition_form="raw",
    )  # fmt: skip
    close(losses(job, 3), case["losses"])
    close(shown(job, mean, std), case["pool"])


def test_recover_cosine():
    case = golden("recover_cosine_lr")
    config = DeepInversionConfig(lr=0.25, schedule="cosine")
    close([learning_rate(int(t), 1000, config) for t in case["iters"]], case["lr"].tolist(), rtol=1e-9)


@pytest.mark.parametrize("form", ["step", "linear", "cosine"])
def test_crop_bound(form):
    """The bound that a method uses at iteration t of 100, under an easy-to-hard curriculum."""
    case = golden("cda_crop_bound")
    for i, milestone in enumerate((0.0, 0.5, 1.0)):
        from synthkit.synthesis.curriculum import crop_lower_bound

        found = [crop_lower_bound(int(t) / 100, form, milestone) for t in case["it"]]
        close(found, case[f"min_crop_{form}"][i].tolist(), rtol=1e-9)
