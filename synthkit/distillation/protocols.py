"""Named presets of batch, optimiser, schedule and augmentation. No torch.

A protocol is never mixed silently: the effective plan is printed, stored in run.json, and says which values came from
flags; the loss that a protocol stands for, or puts beside a method, is said (`beside_note`), never added. Sources:
methods cards kd.md 1 and 7 (`crd`, `simkd`, `imagenet`, `fast`, `fkd`), dfkd.md 1.1 (`dfkd`), largescale.md 1 and 10
(post-training of distilled banks); `bank-fast` and `mnist` are synthkit's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from synthkit.config.schema import DistillConfig, TeachConfig
from synthkit.data.policies import mixes
from synthkit.distillation.plan import OPTIMIZERS, SCHEDULES, Plan, Schedule
from synthkit.distillation.weighted import parse_terms
from synthkit.errors import ConfigError

__all__ = [
    "OPTIMIZERS", "PROTOCOLS", "SCHEDULES", "Plan", "Protocol", "Schedule", "beside_note", "distill_plan",
    "protocol_for", "teach_plan",
]  # fmt: skip

_LIGHT = ("mobile", "shuffle")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A named plan, what it was published with, and a line of description."""

    description: str
    plan: Plan
    light_lr: float | None = None
    """Learning rate for MobileNet and ShuffleNet students, where the source uses another."""
    beside: str = ""
    """The loss expression that stands beside a method (crd: ce)."""
    loss: str = ""
    """The loss expression of the protocol itself (sre2l: kd)."""
    options: Mapping[str, float | bool] = field(default_factory=dict)
    """Options of that loss, where it is one term."""
    alone: tuple[str, ...] = ()
    """Losses that the protocol uses with nothing beside them."""


def _adamw(epochs: int, batch_size: int, augment: str, **changes: Any) -> Plan:
    """AdamW 1e-3, weight decay 0.01, cosine per epoch: what most of the SRe2L family post-trains with."""
    common = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "per_epoch": True}
    return Plan(**{**common, "epochs": epochs, "batch_size": batch_size, "augment": augment, **changes})


_KL20: dict[str, float | bool] = {"temperature": 20.0, "t_squared": False}
_KL30: dict[str, float | bool] = {"temperature": 30.0, "t_squared": False}
_CRD = Plan(batch_size=64, epochs=240, lr=0.05, schedule="step", per_epoch=True, augment="crop_flip")

PROTOCOLS: dict[str, Protocol] = {
    "bank-fast": Protocol(
        description="colour banks on two cores: SGD Nesterov .05, wd 5e-4, cosine, batch 128, 30 epochs, crop and flip",
        plan=Plan(batch_size=128, epochs=30, lr=0.05, nesterov=True, warmup=0.02, augment="crop_flip"),
    ),
    "mnist": Protocol(
        description="grey banks: SGD Nesterov .1, wd 5e-4, cosine, batch 128, 20 epochs, affine augmentation",
        plan=Plan(batch_size=128, epochs=20, lr=0.1, nesterov=True, warmup=0.03, augment="affine"),
    ),
    "crd": Protocol(
        description="RepDistiller: SGD .05 (.01 mobile/shuffle), wd 5e-4, batch 64, 240 epochs, /10 at 150/180/210; "
        "a method stands beside cross-entropy of weight 1",
        plan=_CRD,
        light_lr=0.01,
        beside="ce",
        alone=("gendd",),
    ),
    "simkd": Protocol(
        description="SimKD's tables: optimised as crd, but a method stands beside ce + kd (T 4, T^2); SimKD alone",
        plan=_CRD,
        light_lr=0.01,
        beside="ce+kd",
        alone=("simkd",),
    ),
    "imagenet": Protocol(
        description="mdistiller on ImageNet: SGD .2, wd 1e-4, batch 512, 100 epochs, /10 at 30/60/90, "
        "RandomResizedCrop and flip; beside ce (SimKD: batch 256, lr .1, 120 epochs; CRD and ReviewKD: 256, .1)",
        plan=Plan(
            batch_size=512, epochs=100, lr=0.2, weight_decay=1e-4, schedule="step", milestones=(0.3, 0.6, 0.9),
            per_epoch=True, augment="rrc_flip",
        ),
        beside="ce",
        alone=("gendd", "js"),
    ),
    "fast": Protocol(
        description="preview, not comparable to 240-epoch tables: SGD Nesterov .1 one-cycle, wd 5e-4, batch 128, "
        "40 epochs, crop and flip, beside ce; bf16 and --compile are fine",
        plan=Plan(
            batch_size=128, epochs=40, lr=0.1, nesterov=True, schedule="onecycle", warmup=0.3, augment="crop_flip"
        ),
        light_lr=0.02,
        beside="ce",
    ),
    "dfkd": Protocol(
        description="data-free line: SGD .1, wd 1e-4, cosine per epoch, batch 256, 200 epochs, no augmentation",
        plan=Plan(batch_size=256, epochs=200, lr=0.1, weight_decay=1e-4, per_epoch=True),
    ),
    "fkd": Protocol(
        description="FKD: SGD .1, wd 1e-4, cosine, batch 1024 of stored crops, 300 epochs, soft cross-entropy at T 1",
        plan=Plan(batch_size=1024, epochs=300, lr=0.1, weight_decay=1e-4, per_epoch=True, augment="rrc_flip"),
        loss="soft_ce",
        options={"temperature": 1.0},
    ),
    "sre2l": Protocol(
        description="SRe2L and CDA on ImageNet: AdamW 1e-3, wd .01 (0 on vectors), cosine, batch 1024, 300 epochs, "
        "KL at T 20 without T^2 on stored cutmix views (relabel --preset sre2l)",
        plan=_adamw(300, 1024, "rrc_flip_cutmix", decay_vectors=False),
        loss="kd",
        options=_KL20,
    ),
    "dwa": Protocol(
        description="DWA and INFER on ImageNet: as sre2l with batch 128 and a live teacher on the mixed image, "
        "KL at T 20 without T^2 (T 4 with --augment rrc_flip_mixup)",
        plan=_adamw(300, 128, "rrc_flip_cutmix", decay_vectors=False),
        loss="kd",
        options=_KL20,
    ),
    "sre2l-cifar": Protocol(
        description="SRe2L and DWA on CIFAR: AdamW 1e-3, wd .01, cosine, batch 128, 400 epochs, mixup .8, KL at T 30 "
        "without T^2, live teacher (their code leaves it in train mode; here it is in eval mode)",
        plan=_adamw(400, 128, "crop_flip_mixup"),
        loss="kd",
        options=_KL30,
    ),
    "infer-cifar": Protocol(
        description="INFER on CIFAR, dynamic labels of 4 networks: as sre2l-cifar with batch 64 and 80 epochs, "
        "teacher in eval mode, KL at T 30 (without T^2, as the code it grew from; the card does not say)",
        plan=_adamw(80, 64, "crop_flip_mixup"),
        loss="kd",
        options=_KL30,
    ),
    "sre2l-tiny": Protocol(
        description="SRe2L and DWA on Tiny-ImageNet: SGD .2, wd 1e-4, cosine after 5 warm-up epochs, batch 64, "
        "200 epochs, cutmix, KL at T 20 with T^2, live teacher",
        plan=Plan(
            batch_size=64, epochs=200, lr=0.2, weight_decay=1e-4, warmup=0.025, per_epoch=True,
            augment="rrc_flip_cutmix",
        ),
        loss="kd",
        options={"temperature": 20.0, "t_squared": True},
    ),
    "rded": Protocol(
        description="RDED at 64 px and above (f 2): AdamW 1e-3 (ResNets; 2.5e-3 mobile), wd .01, cosine eta 2, 300 "
        "epochs, batch 100 (IPC 1/10/50: 10/50/100, doubled for 100 classes and more, Tiny 100), patch shuffle, crops "
        "of .5-1, cutmix, live teacher, KL at T 20 without T^2",
        plan=_adamw(300, 100, "patches_rrc_flip_cutmix", eta=2.0),
        loss="kd",
        options=_KL20,
    ),
    "rded-cifar": Protocol(
        description="RDED at f 1 (CIFAR, Tiny): as rded without patch shuffle; its crops of scale 1 are the image",
        plan=_adamw(300, 100, "flip_cutmix", eta=2.0),
        loss="kd",
        options=_KL20,
    ),
    "cvdd": Protocol(
        description="CV-DD, SRe2L++ and FADRM: AdamW 1e-3 (ResNet-101 mostly 5e-4), wd as sre2l, cosine eta 1 (2 per "
        "set, network and IPC: --eta), batch 16, 300 epochs, KL at T 20 without T^2 on stored views whose teacher used "
        "batch statistics (relabel --preset cvdd)",
        plan=_adamw(300, 16, "rrc_flip_cutmix", decay_vectors=False),
        loss="kd",
        options=_KL20,
    ),
    "gvbsm": Protocol(
        description="G-VBSM on ImageNet: AdamW 1e-3 (or SGD .1), cosine, batch 1024, 300 epochs (Tiny: 100, batch "
        "100), MSE of logits + .1 cross-entropy, no temperature, stored views (relabel --preset gvbsm); wd as sre2l, "
        "the card gives none",
        plan=_adamw(300, 1024, "rrc_flip_cutmix", decay_vectors=False),
        loss="mse+0.1*ce",
    ),
    "gvbsm-cifar": Protocol(
        description="G-VBSM on CIFAR: as gvbsm with batch 64, 1000 epochs and .15 cross-entropy",
        plan=_adamw(1000, 64, "rrc_flip_cutmix", decay_vectors=False),
        loss="mse+0.15*ce",
    ),
    "edc": Protocol(
        description="EDC on ImageNet: AdamW 1e-3, linear eta 2 (its cosine is overwritten in the released code), batch "
        "100, 300 epochs, MSE of logits + .025 cross-entropy, no temperature, evaluated as an EMA of .99; stored views "
        "(relabel --preset edc)",
        plan=_adamw(300, 100, "patches_rrc_flip_cutmix", schedule="linear", eta=2.0, decay_vectors=False),
        loss="mse+0.025*ce",
    ),
    "edc-cifar10": Protocol(
        description="EDC on CIFAR-10: as edc with a live teacher, 1000 epochs, times .5 at 800, 900 and 950",
        plan=_adamw(
            1000, 100, "patches_rrc_flip_cutmix", schedule="step", milestones=(0.8, 0.9, 0.95), gamma=0.5,
            decay_vectors=False,
        ),
        loss="mse+0.025*ce",
    ),
    "edc-cifar100": Protocol(
        description="EDC on CIFAR-100: as edc with a live teacher, 1000 epochs, cosine eta 2 until 5/6, then a drop",
        plan=_adamw(
            1000, 100, "patches_rrc_flip_cutmix", schedule="cosine_drop", eta=2.0, decay_vectors=False
        ),
        loss="mse+0.025*ce",
    ),
    "cim": Protocol(
        description="CIM: AdamW 1e-3, wd 1e-4, times .2 at 2/3 and 5/6, 1000 epochs (ImageNet 300), batch 100 (10-200 "
        "by size), MSE of logits of a live teacher; crop, flip and cutout stand for its DSA augmentation",
        plan=_adamw(
            1000, 100, "crop_flip_cutout", weight_decay=1e-4, schedule="step", milestones=(2 / 3, 5 / 6), gamma=0.2
        ),
        loss="mse",
    ),
}  # fmt: skip


def protocol_for(name: str, shape: tuple[int, int, int]) -> str:
    """The protocol that `name` means for images of (C, H, W): `auto` is mnist for grey ones, else bank-fast.

    Raises:
        ConfigError: no such protocol; the nearest one is offered.
    """
    if name == "auto":
        return "mnist" if shape[0] == 1 else "bank-fast"
    if name not in PROTOCOLS:
        raise ConfigError("protocol: not known", got=name, allowed=["auto", *PROTOCOLS], hint="synthkit list protocols")
    return name


def beside_note(protocol: str, loss_name: str, options: Mapping[str, Any] | None = None) -> str | None:
    """What the protocol's published loss has and the run's lacks, in words; None where nothing is to be said.

    Args:
        protocol: its name. loss_name: the loss of the run, a name or a sum.
        options: the run's options, where its loss is one term.
    """
    preset = PROTOCOLS[protocol]
    given = [term.name for term in parse_terms(loss_name)]
    published = preset.loss or preset.beside
    missing = [term.name for term in parse_terms(published) if term.name not in given] if published else []
    own = "".join(f" --loss.{key} {str(value).lower()}" for key, value in preset.options.items())
    if missing and not set(given) <= set(preset.alone):
        whole = preset.loss or "+".join([preset.beside, *(n for n in given if n not in preset.beside.split("+"))])
        return (
            f"protocol {protocol} was published with {' and '.join(missing)}, which loss {loss_name} lacks: its "
            f"figures are for --loss {whole}{own}"
        )
    other = [key for key, value in preset.options.items() if (options or {}).get(key, value) != value]
    if other and not missing and len(given) == 1:
        return f"protocol {protocol} was published with{own}; {' and '.join(other)} of this run differs"
    return None


def distill_plan(cfg: DistillConfig, shape: tuple[int, int, int]) -> tuple[str, Plan, list[str]]:
    """(protocol name, effective plan, names of the values that flags changed) of a distill run.

    Raises:
        ConfigError: unknown protocol, a value out of range, or epochs and steps both given.
    """
    name = protocol_for(cfg.protocol, shape)
    preset = PROTOCOLS[name]
    plan = preset.plan
    if preset.light_lr is not None and any(word in cfg.student.lower() for word in _LIGHT):
        plan = replace(plan, lr=preset.light_lr)
    if cfg.epochs is not None and cfg.steps is not None:
        raise ConfigError("epochs and steps exclude each other", got=(cfg.epochs, cfg.steps), hint="give one of them")
    given: dict[str, Any] = {}
    for f in fields(Plan):
        value = getattr(cfg, f.name, None)
        if value is None:
            continue
        given[f.name] = value
    if cfg.steps is not None:
        given["epochs"] = None
    plan = replace(plan, **given)
    return name, plan, sorted(k for k in given if k != "epochs" or cfg.steps is None)


def teach_plan(cfg: TeachConfig, channels: int) -> Plan:
    """The plan of a teach run; `augment auto` is crop_flip for colour images and shift for grey ones.

    Raises:
        ConfigError: a value out of range, epochs and steps both given, or an augmentation that mixes images.
    """
    if cfg.epochs is not None and cfg.steps is not None:
        raise ConfigError("epochs and steps exclude each other", got=(cfg.epochs, cfg.steps), hint="give one of them")
    augment = cfg.augment if cfg.augment != "auto" else ("shift" if channels == 1 else "crop_flip")
    if mixes(augment):
        raise ConfigError("augment: mixed images have no label, and a teacher is taught with labels", got=augment,
                          hint=f"use {augment.rsplit('_', 1)[0]}")  # fmt: skip
    return Plan(
        batch_size=cfg.batch_size,
        epochs=None if cfg.steps is not None else 200 if cfg.epochs is None else cfg.epochs,
        steps=cfg.steps,
        lr=0.1 if cfg.lr is None else cfg.lr,
        optimizer=cfg.optimizer or "sgd",
        momentum=cfg.momentum,
        nesterov=cfg.nesterov and cfg.momentum > 0,
        weight_decay=5e-4 if cfg.weight_decay is None else cfg.weight_decay,
        schedule=cfg.schedule,
        milestones=(0.6, 0.75, 0.9),
        warmup=cfg.warmup,
        augment=augment,
    )
