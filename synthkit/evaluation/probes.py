"""Students under choice and the probe images that they are judged by: found, checked, loaded, looked at.

`selection` decides; this file knows banks and networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synthkit.bank import Bank
from synthkit.bank.labels.stored import pixel_column
from synthkit.data.augment import augment
from synthkit.errors import DataError, ModelError, NonFiniteError, RequirementError, UsageError
from synthkit.evaluation import signals
from synthkit.evaluation.features import BATCH_BYTES, sample
from synthkit.evaluation.metrics import device_of, evaluating
from synthkit.models.bn_stats import BatchNormStatistics
from synthkit.models.build import LoadedModel, load_model
from synthkit.models.card import ModelCard
from synthkit.models.view import ModelView, TeacherView
from synthkit.runtime import RunDir
from synthkit.synthesis.run import CHECKPOINTS
from synthkit.tables import lookup, methods

Statistics = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run whose student is under choice: a bank with a co-trained student, or the directory of a distill run."""

    path: Path
    name: str
    """What is compared with what: the method; runs of one name and several seeds are siblings."""
    seed: int
    bank: Bank | None
    """None for a distill run."""
    made_from: frozenset[str]
    """Identities of the banks that the student learned from."""
    teacher: dict[str, Any]
    """Spec and sha256 of the teacher, as far as they are known."""
    students: list[tuple[int, Path]] = field(hash=False)
    """(step, folder) of every stored student, in order; the last one is the last epoch's."""


def find_run(path: str | Path, name: str | None = None, seed: int | None = None) -> Run:
    """The run in `path`.

    Args:
        name, seed: none takes those that the run remembers.

    Raises:
        RequirementError: a bank without checkpoints of its student. ModelError: a folder that is neither.
    """
    path = Path(path)
    if not (path / "bank.json").is_file():
        return _distill_run(path, name, seed)
    bank = Bank(path)
    folders = [entry for entry in (path / CHECKPOINTS).glob("step-*") if (entry / "card.yaml").is_file()]
    if not folders:
        raise RequirementError(
            f"{path}: the run kept no checkpoints of its student, so there is no stopping point to choose",
            hint="make the bank with --method.checkpoints 10",
        )
    return Run(
        path=path,
        name=name or method_of(bank),
        seed=bank.spec.seed if seed is None else seed,
        bank=bank,
        made_from=identities(bank),
        teacher=dict(bank.spec.teacher),
        students=sorted((int(folder.name.partition("-")[2]), folder) for folder in folders),
    )


def _distill_run(path: Path, name: str | None, seed: int | None) -> Run:
    if not (path / "card.yaml").is_file():
        raise ModelError(f"{path}: neither a bank nor the directory of a distill run", hint="give one of the two")
    extra = ModelCard.load(path / "card.yaml").extra
    of_bank = dict(extra["bank"]) if isinstance(extra.get("bank"), dict) else {}
    where = Path(str(of_bank.get("path", "")))
    ids = frozenset({str(of_bank["uuid"])} if of_bank.get("uuid") else ())
    if (where / "bank.json").is_file():
        ids |= identities(Bank(where))
    loss = extra.get("loss", {}).get("name", "distill")
    teacher = extra.get("teacher")
    return Run(
        path=path,
        name=name or f"{loss} on {where.name or '?'}",
        seed=int(extra.get("seed", 0)) if seed is None else seed,
        bank=None,
        made_from=ids,
        teacher=dict(teacher) if isinstance(teacher, dict) else {},
        students=[(int((RunDir(path).read_json("result.json") or {}).get("steps", 0)), path)],
    )


def method_of(bank: Bank) -> str:
    """The method that made the bank, with the curriculum where that is not the method's own."""
    method = bank.spec.recipe.get("method")
    name = str((method.get("name") if isinstance(method, dict) else method) or bank.path.name)
    curriculum = bank.spec.recipe.get("curriculum")
    if curriculum is None or name not in methods():
        return name
    usual = getattr(lookup("method", name), "default_curriculum", "easy2hard")
    return name if curriculum == usual else f"{name} {curriculum}"


def identities(bank: Bank) -> frozenset[str]:
    """The bank's identity and those of the banks that it was joined from."""
    parents = [parent.get("uuid") for parent in bank.spec.parents if isinstance(parent, dict)]
    return frozenset(str(uuid) for uuid in (bank.record["uuid"], *parents) if uuid)


def common_teacher(runs: Sequence[Run], spec: str | None, device: torch.device) -> tuple[TeacherView, LoadedModel]:
    """The one teacher of all runs, frozen, on `device`.

    Raises:
        RequirementError: the runs name none, or different ones. ModelError: it cannot be loaded.
    """
    known = {str(run.teacher["sha256"]): run for run in runs if run.teacher.get("sha256")}
    if len(known) > 1:
        shown = ", ".join(f"{run.path}: {run.teacher.get('spec')}" for run in known.values())
        raise RequirementError(f"the runs have different teachers ({shown})", hint="choose among runs of one teacher")
    wanted = spec or next((str(run.teacher["spec"]) for run in runs if run.teacher.get("spec")), None)
    if wanted is None:
        raise RequirementError("the runs name no teacher", hint="give --teacher, a model spec")
    try:
        loaded = load_model(wanted)
    except ModelError as error:
        if spec is not None:
            raise
        raise ModelError(f"the teacher {wanted!r} cannot be loaded ({error})", hint="give --teacher SPEC") from error
    if known and loaded.sha256 not in known:
        raise RequirementError(
            f"the teacher {wanted} is another file than the one of the runs", hint="give the right one: --teacher SPEC"
        )
    view = TeacherView.from_loaded(loaded).to(device, channels_last=True)
    return view, loaded


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Probe images of one bank on the device, with all that the teacher says about them."""

    path: Path
    images: Tensor
    """(N, C, H, W) uint8, or float where the bank's training pixels leave [0, 1]."""
    augmented: Tensor
    teacher: Tensor
    """(N, K) logits."""
    teacher_augmented: Tensor
    teacher_distance: float | None
    """`signals.bn_distance` of the teacher itself on these images; None without BatchNorm."""
    real: bool
    """Whether the images are, or contain, real ones."""


def load_probe(bank: Bank, teacher: TeacherView, sha256: str | None, limit: int, seed: int) -> Probe:
    """`limit` images of `bank`, the same ones every time, and the teacher's logits.

    Raises:
        RequirementError: it is another teacher's bank. DataError: it is empty, or of other classes or image sizes.
    """
    where = f"probe {bank.path}"
    made_with = bank.spec.teacher.get("sha256")
    if made_with and sha256 and made_with != sha256:
        raise RequirementError(f"{where} was made from another teacher", got=bank.spec.teacher.get("spec"))
    if bank.num_classes != teacher.num_classes:
        raise DataError(f"{where} has {bank.num_classes} classes, the teacher has {teacher.num_classes}")
    if tuple(bank.shape) != tuple(teacher.input_size):
        raise DataError(f"{where} has images of {tuple(bank.shape)}, the teacher takes {tuple(teacher.input_size)}")
    if not len(bank):
        raise DataError(f"{where} holds no image yet", hint="finish it with synthkit synthesize --resume")
    column = pixel_column(bank)
    rows = sample(len(bank), limit, seed)
    images = torch.from_numpy(getattr(bank.batch(rows, [column]), column))
    images = images if images.dtype == torch.uint8 else images.float()
    draw = torch.Generator().manual_seed(seed)
    policy = "shift" if bank.shape[0] == 1 else "crop_flip"  # what teachers are trained with
    device = device_of(teacher)
    images, moved = images.to(device), augment(images, policy, draw).to(device)
    logits, statistics = look(teacher, images)
    return Probe(
        path=bank.path,
        images=images,
        augmented=moved,
        teacher=logits,
        teacher_augmented=look(teacher, moved, statistics=False)[0],
        teacher_distance=signals.bn_distance(statistics, running_statistics(teacher)) if statistics else None,
        real=bank.spec.contains_real,
    )


def look(view: ModelView, images: Tensor, *, statistics: bool = True) -> tuple[Tensor, Statistics]:
    """Logits (N, K) float32 and the (mean, biased variance) of all images at every BatchNorm (empty without any).

    One pass in eval mode, in blocks; the blocks' statistics are joined to those of the whole.
    """
    layers = view.batchnorms() if statistics else []
    recorder = BatchNormStatistics(layers)
    logits: list[Tensor] = []
    parts: list[Statistics] = []
    blocks = list(_blocks(images))
    with evaluating(view), recorder.recording():
        for block in blocks:
            logits.append(view(block).float())
            parts.append(recorder.batch)
    out = torch.cat(logits)
    if not bool(torch.isfinite(out).all()):
        raise NonFiniteError(f"{view.name}: logits of a probe image are not finite", hint="its weights are broken")
    shares = [len(block) / len(images) for block in blocks]
    return out, [joined([part[i] for part in parts], shares) for i in range(len(layers))]


def _blocks(images: Tensor) -> Iterator[Tensor]:
    size = max(1, min(512, BATCH_BYTES // max(1, math.prod(images.shape[1:]))))
    yield from images.split(size)


def joined(parts: Sequence[tuple[Tensor, Tensor]], shares: Iterable[float]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a set from those of its parts: m = sum w m_i, v = sum w (v_i + m_i^2) - m^2."""
    weights = list(shares)
    mean = torch.stack([w * m.double() for w, (m, _) in zip(weights, parts, strict=True)]).sum(0)
    square = torch.stack([w * (v + m.double() ** 2) for w, (m, v) in zip(weights, parts, strict=True)]).sum(0)
    return mean, (square - mean**2).clamp(min=0)


def running_statistics(view: ModelView) -> Statistics:
    """The running (mean, variance) of every BatchNorm layer."""
    return [(layer.running_mean, layer.running_var) for layer in view.batchnorms()]  # type: ignore[misc]  # both exist


def load_student(folder: Path, teacher: TeacherView, device: torch.device) -> ModelView:
    """The student in `folder`, on `device`.

    Raises:
        UsageError: it is not about the teacher's classes or image size.
    """
    view = ModelView.from_loaded(load_model(str(folder.resolve()))).to(device, channels_last=True)
    if (view.num_classes, view.input_size) != (teacher.num_classes, teacher.input_size):
        raise UsageError(
            f"{folder}: the student has {view.num_classes} classes and takes images of {view.input_size}",
            hint=f"its teacher has {teacher.num_classes} and takes {teacher.input_size}",
        )
    return view


def observe(student: ModelView, probe: Probe) -> tuple[dict[str, float], Tensor]:
    """The signals of a student on one probe bank (without `disagreement`), and its classes (N,) on the CPU."""
    logits, statistics = look(student, probe.images)
    moved, _ = look(student, probe.augmented, statistics=False)
    found = {
        "agreement": signals.agreement(logits, probe.teacher),
        "agreement_augmented": signals.agreement(moved, probe.teacher_augmented),
        "kl": signals.soft_agreement(logits, probe.teacher),
        "confidence": signals.confidence(logits),
        "class_balance": signals.class_balance(logits, probe.teacher),
    }
    if statistics and probe.teacher_distance:
        found["bn_distance"] = signals.bn_distance(statistics, running_statistics(student)) / probe.teacher_distance
    return found, logits.argmax(1).cpu()
