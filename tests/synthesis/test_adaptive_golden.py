"""AdaDFKD, TA-DFKD and DFME against numbers that the original implementations produced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthesis.tiny import TinyNet
from synthkit.synthesis.curriculum import self_paced_weights
from synthkit.synthesis.generator.adadfkd import hard_factor, infonce_per_sample, windowed_infonce
from synthkit.synthesis.generator.dfme import answered, zeroth_order_gradient
from synthkit.synthesis.generator.tadfkd import TADFKDConfig, clean_probability, select_clean, tadfkd_terms
from synthkit.synthesis.losses import adversarial_js

REFERENCE = Path(__file__).parents[1] / "reference"


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


# ---- AdaDFKD ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [0.0, 0.1, 0.2])
def test_adadfkd_infonce_window(hard):
    case = golden("adadfkd_infonce_window")
    queue, name = case["queue"].T, f"h{hard:g}"
    losses, batch = [], case["t_feat"].shape[1]
    for call, (t, s) in enumerate(zip(case["t_feat"], case["s_feat"], strict=True)):
        t, s = t.clone().requires_grad_(), s.clone().requires_grad_()
        loss = windowed_infonce(t, s, queue, hard, 0.8, 0.07)
        losses.append(loss.detach())
        loss.backward()
        assert s.grad is None, "the keys carry no gradient"
        queue = queue.clone()
        queue[call * batch : (call + 1) * batch] = F.normalize(s.detach(), dim=1)
    close(torch.stack(losses), case[f"loss_{name}"])
    close(t.grad, case[f"grad_t_{name}"])
    close(queue.T, case["queue_after"])


def test_adadfkd_student_infonce():
    """The released code weighs the batch: v(l) l of one scalar l = KD + s_nce InfoNCE."""
    case = golden("adadfkd_student_infonce")
    s = case["s_feat"].clone().requires_grad_()
    close(infonce_per_sample(case["s_feat"], case["t_feat"], 0.07).mean(), case["loss_s_t"])
    nce = infonce_per_sample(case["t_feat"], s, 0.07)
    close(nce.mean().detach(), case["infonce"])
    close(torch.autograd.grad(nce.mean(), s)[0], case["grad_s"])
    total = case["kd"] + 0.1 * nce.mean().detach()
    close(self_paced_weights(total, 2.2, "log") * total, case["student_loss"])


@pytest.mark.parametrize(
    ("name", "setting"), [("a", (300, 0.0, 0.75, 0.8)), ("b", (400, 0.2, 0.75, 0.9)), ("c", (50, 0.25, 0.75, 0.81))]
)
def test_adadfkd_hard_factor(name, setting):
    epochs = setting[0]
    ours = torch.tensor([hard_factor(e, *setting) for e in range(epochs)], dtype=torch.float64)
    close(ours, golden("adadfkd_hard_factor")[name])


# ---- TA-DFKD ---------------------------------------------------------------------------------------------------


def test_tadfkd_selection():
    case = golden("tadfkd_selection")
    logits = case["logits"]
    losses = F.cross_entropy(logits, logits.argmax(1), reduction="none")
    close(clean_probability(losses), case["prob_clean"], rtol=1e-5, atol=1e-11)
    assert select_clean(losses, 0.5).tolist() == case["mask"].bool().tolist()


def test_tadfkd_generator_loss():
    case = golden("tadfkd_generator_loss")
    fake = case["fake"].clone().requires_grad_()
    terms = tadfkd_terms(TADFKDConfig(), fake, case["bn_terms"].sum(), case["adv"], 1.0)
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    close(loss.detach(), case["loss"])
    close(fake.grad, case["grad_fake"])


def test_tadfkd_adversary_is_the_element_mean():
    case = golden("adi_js_divergence")
    s, t = case["s"].clone().requires_grad_(), case["t"]
    loss = adversarial_js(s, t, 3.0, mean="element")
    close(loss.detach(), case["pre"])
    close(torch.autograd.grad(loss, s)[0], case["grad_s_pre"])
    assert float(case["pre"]) != float(case["adi"]), "the batch mean would be another number"


# ---- DFME ------------------------------------------------------------------------------------------------------


def net(case: dict[str, torch.Tensor], prefix: str) -> TinyNet:
    module = TinyNet(width=len(case[f"{prefix}.conv1.weight"])).double()
    module.load_state_dict({k[2:]: v for k, v in case.items() if k.startswith(f"{prefix}.")})
    return module.eval()


@pytest.mark.parametrize(
    ("loss", "logits", "name"), [("l1", "recovered", "l1"), ("kl", "recovered", "kl"), ("l1", "raw", "l1_logits")]
)
def test_dfme_zeroth_order(loss, logits, name):
    case = golden("dfme_zeroth_order")
    victim, clone, x = net(case, "T"), net(case, "S"), case["x"]
    gradient, value = zeroth_order_gradient(
        lambda points: answered(victim(points), loss, logits),
        clone,
        x,
        case["raw_dirs"].view(len(x), 1, *x.shape[1:]),
        epsilon=1e-3,
        classes=10,
        loss=loss,
    )
    close(gradient, case[f"grad_{name}"], rtol=1e-7, atol=1e-9)
    if f"loss_{name}" in case:
        close(value, case[f"loss_{name}"], rtol=1e-7, atol=1e-9)
