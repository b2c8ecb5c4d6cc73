"""CMI and FastDFKD against numbers of the original implementations (tests/reference/cmi_*.npz, fastdfkd_meta.npz)."""

from __future__ import annotations

import pytest
import torch

from synthesis.test_cudfkd_golden import close, golden, load_by_order
from synthesis.tiny import TinyNet, task, teacher_view
from synthkit.synthesis.generator import cmi, fastdfkd
from synthkit.synthesis.generator.cmi import CMI, CMIConfig, contrast_head, contrastive_loss
from synthkit.synthesis.generator.fastdfkd import FastDFKD, FastDFKDConfig
from synthkit.synthesis.generator.inverting import new_generator


def head_of(case: dict, prefix: str = "head.head.") -> torch.nn.Module:
    out, width = case[f"{prefix}2.weight"].shape
    head = contrast_head(width, out).double()
    load_by_order(head, case, prefix)
    return head


@pytest.mark.parametrize("kind", ["cached", "empty"])
def test_contrastive_loss(kind):
    case = golden("cmi_contrastive")
    head, known = head_of(case), case["bank"] if kind == "cached" else case["bank"][:0]
    local, whole = case["local"].clone().requires_grad_(), case["global"].clone().requires_grad_()
    loss = contrastive_loss(head, local, whole, known, 0.1)
    loss.backward()
    close(loss.detach(), case[f"loss_{kind}"])
    close(local.grad, case[f"grad_local_{kind}"])
    assert whole.grad is None, "the original's is exactly zero"
    if kind == "cached":
        close(head[0].weight.grad, case["grad_head0_cached"])


def double(method: CMI | FastDFKD, case: dict) -> None:
    """The stored networks and the normalisation in float64."""
    student = TinyNet(width=case["S.conv1.weight"].shape[0]).double()
    load_by_order(student, case, "S.")
    load_by_order(method.teacher.module.double(), case, "T.")
    method.student_view.module = student.eval()
    for view in (method.teacher, method.student_view):
        std, mean = (torch.tensor(values, dtype=torch.float64) for values in (view.std, view.mean))
        view._scale, view._shift = (1 / std).view(1, -1, 1, 1), (-mean / std).view(1, -1, 1, 1)


def stored_generator(method: CMI | FastDFKD, case: dict) -> torch.nn.Module:
    generator = new_generator(method, "any").double()
    load_by_order(generator, case, "G.")
    return generator


def losses_of(method: CMI | FastDFKD) -> list[torch.Tensor]:
    losses: list[torch.Tensor] = []
    method.note_generator = lambda terms, loss: losses.append(loss.detach())
    return losses


def compare_state(ours: torch.nn.Module, case: dict, prefix: str) -> None:
    stored = [v for k, v in case.items() if k.startswith(prefix)]
    for mine, theirs in zip(ours.state_dict().values(), stored, strict=True):
        close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_whole_cmi_call(monkeypatch):
    """Two iterations of generator, latents and head with all terms and a half-filled bank."""
    case = golden("cmi_synthesize")
    config = CMIConfig(student="resnet8", synthesis_batch=4, g_steps=2, nz=6, width=2, head_dim=5, bank_size=16)
    method = CMI(config, task(teachers=[teacher_view(TinyNet())], images=4))
    double(method, case)
    method.head = head_of(case)
    method.optimizer_head = torch.optim.Adam(method.head.parameters(), lr=1e-3)
    method.bank.rows, method.bank.added = case["bank"].clone(), 8
    method.bank.draw = lambda count, rng: method.bank.rows[case["bank_idx"]]
    method.views = lambda call: lambda images: (images, images.flip(3))
    generator, z = stored_generator(method, case), case["z"].clone().requires_grad_()
    monkeypatch.setattr(cmi, "new_generator", lambda *args, **kwargs: generator)
    monkeypatch.setattr(cmi, "latents", lambda *args: z)
    monkeypatch.setattr(cmi, "targets", lambda *args: case["y"])
    losses = losses_of(method)
    images, labels = method.synthesise(0)
    close(torch.stack(losses), case["losses"], rtol=1e-7, atol=1e-9)
    close(images, case["best"], rtol=1e-7, atol=1e-9)
    assert torch.equal(labels, case["y"])
    close(z.detach(), case["z_after"], rtol=1e-7, atol=1e-9)
    close(method.bank.rows, case["bank_after"], rtol=1e-7, atol=1e-9)
    compare_state(generator, case, "after.")
    compare_state(method.head, case, "head_after.")


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_two_fastdfkd_calls(meta, monkeypatch):
    """The adversary and the remembered statistics come in with the second call; the meta-optimiser lives on."""
    case = golden("fastdfkd_meta")
    options = {"g_steps": 2, "lr_g": 0.005, "lr_z": 0.015, "adv": 1.1, "bn": 10.0, "oh": 0.4, "warmup": 1.0}
    config = FastDFKDConfig(student="resnet8", synthesis_batch=5, nz=6, width=2, meta=meta, reset_l0=0, **options)
    method = FastDFKD(config, task(teachers=[teacher_view(TinyNet())], images=10))
    double(method, case)
    method.generator = stored_generator(method, case)
    method.optimizer_meta = torch.optim.Adam(method.generator.parameters(), lr=0.005 * 2, betas=(0.5, 0.999))
    latents = [z.clone().requires_grad_() for z in case["z"]]
    monkeypatch.setattr(fastdfkd, "latents", lambda loop, call, shape: latents[call])
    monkeypatch.setattr(fastdfkd, "targets", lambda loop, call: case["y"][call])
    monkeypatch.setattr("synthkit.data.augment.augment", lambda images, policy, rng: images)
    losses = losses_of(method)
    for call in range(2):
        images, labels = method.synthesise(call)
        close(images, case[f"best_{meta}"][call], rtol=1e-7, atol=1e-9)
        assert torch.equal(labels, case["y"][call])
        method.called += 1
    close(torch.stack(losses).view(2, 2), case[f"losses_{meta}"], rtol=1e-7, atol=1e-9)
    close(latents[1].detach(), case[f"z_after_{meta}"], rtol=1e-7, atol=1e-9)
    compare_state(method.generator, case, f"{meta}.")
