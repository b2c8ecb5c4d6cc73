"""What the protocols train and test on: the bank's training pixels, its equal-size random-real control, the test set.

The bank's pixels are taken as its method left them: float pixels where it stores them, whitened ones with the bank's
own ZCA matrix (the test set and the control are whitened with it too), else pixels normalised with its mean and std.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from synthkit.bank import Bank
from synthkit.bank.labels.stored import StoredLogits, has_logits
from synthkit.data.classes import check_classes
from synthkit.data.real import RealData
from synthkit.data.specs import load_data
from synthkit.data.zca import ZCA
from synthkit.errors import BankError, DataError, RequirementError
from synthkit.evaluation.fresh_nets import Pictures, stream_seed
from synthkit.models.build import load_model
from synthkit.models.view import TeacherView


class Space:
    """The training space of a bank: its mean and std, or its ZCA.

    Attributes: `kind`, normalised, affine (float pixels are stored normalised) or zca.
    """

    def __init__(self, bank: Bank, device: torch.device):
        self.kind, found = "normalised", bank.transform()
        mean, std = bank.mean, bank.std
        self.zca: ZCA | None = None
        if found is not None:
            self.kind = str(bank.spec.transform["kind"])
            if self.kind == "zca":
                self.zca = ZCA.from_arrays(found[0]).to(device)
            elif "mean" not in found[0] or "std" not in found[0]:
                raise BankError(f"{bank.path}: an affine transform needs the arrays mean and std", got=sorted(found[0]))
            else:
                mean, std = found[0]["mean"].ravel().tolist(), found[0]["std"].ravel().tolist()
        if any(value <= 0 for value in std):
            raise BankError(f"{bank.path}: std must be positive", got=std)
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def real(self, images: Tensor, targets: Tensor) -> Pictures:
        """Real images, uint8."""
        if self.zca is not None:
            return Pictures(images=self.zca.whiten(images), targets=targets)
        return Pictures(images=images, targets=targets, mean=self.mean, std=self.std)

    def bank(self, bank: Bank, targets: Tensor) -> Pictures:
        """The bank's training pixels."""
        column = "images_f16" if bank.has("images_f16") else "images"
        images = torch.from_numpy(np.ascontiguousarray(bank.column(column))).to(targets.device)
        if column == "images":
            return self.real(images, targets)
        if self.zca is not None:
            return Pictures(images=images, targets=targets)
        if self.kind == "affine":  # as pixels again, for augmentations that come before normalisation
            images = images.float() * self.std + self.mean
        return Pictures(images=images, targets=targets, mean=self.mean, std=self.std)


class BankSets:
    """The images of one evaluation.

    Args:
        data: spec of the real data. control: spec whose train split the control is drawn from; none is `data`.
        soft: train on the softmax of the bank's logits.
        mixed: targets are class probabilities even when labels are hard (CutMix needs them).
        nets: number of controls, each with its own draw.
        teacher: model that labels the controls softly, when `soft`.
        limit: test on a random sample of so many images.

    Attributes: `bank`, `controls` and `test` (`Pictures`); `classes` (N,) of the bank; `test_data`, `train_data`;
    `notes` and `warnings`, what the user should know.

    Raises:
        DataError: the data do not fit the bank, or there is no train split for the control.
        RequirementError: the bank stores neither labels nor logits.
    """

    def __init__(
        self,
        bank: Bank,
        data: str,
        *,
        device: torch.device,
        soft: bool,
        mixed: bool,
        nets: int,
        seed: int,
        control: str | None = None,
        teacher: str | None = None,
        limit: int | None = None,
    ):
        self._bank, self._device, self._seed, self._mixed = bank, device, seed, mixed
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.classes = self._hard_labels()
        self.space = Space(bank, device)
        self.test_data = self._load(data, "test")
        if limit:
            self.test_data = self.test_data.subset(limit, seed)
        self.train_data = self._load(control or data, "train")
        if control is None and self.train_data.split == self.test_data.split:
            raise DataError(
                f"{data} has no train split of its own, so the control would be trained on the test images",
                hint="say where the control comes from: --control-data SPEC",
            )
        # in random order, so that the part of it that a curve is measured on is a sample
        order = torch.randperm(len(self.test_data), generator=self._stream("test order"))
        self.test = self._real(self.test_data, order, None)
        targets = bank_logits(bank).softmax(1).to(device) if soft else self._hard(self.classes)
        self.bank = self.space.bank(bank, targets)
        self.controls = self._controls(nets, self._labeller(teacher) if soft else None)

    def with_hard_labels(self) -> Pictures:
        """The bank with the classes as targets."""
        return replace(self.bank, targets=self._hard(self.classes))

    def everything(self) -> Pictures:
        """The whole train split."""
        found = self._real(self.train_data, torch.arange(len(self.train_data)), None)
        return replace(found, targets=self._hard(self.train_data.labels))

    @property
    def nbytes(self) -> int:
        """Bytes of all images and targets on the device."""
        return sum(p.images.nbytes + p.targets.nbytes for p in (self.bank, self.test, *self.controls))

    def _stream(self, name: str, *numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(stream_seed(self._seed, name, *numbers))

    def _hard_labels(self) -> Tensor:
        if self._bank.spec.label_kind != "none" and self._bank.has("labels"):
            return torch.from_numpy(self._bank.column("labels").astype(np.int64))
        if not has_logits(self._bank):
            hint = "make some: synthkit relabel --bank DIR --name NAME --teacher SPEC"
            raise RequirementError(f"bank {self._bank.path}: stores neither labels nor logits", hint=hint)
        self.notes.append("the bank stores no labels: the largest of its logits stands for them")
        return bank_logits(self._bank).argmax(1)

    def _hard(self, classes: Tensor) -> Tensor:
        classes = classes.to(self._device)
        return F.one_hot(classes, self._bank.num_classes).float() if self._mixed else classes

    def _load(self, spec: str, split: Literal["train", "test"]) -> RealData:
        found = load_data(spec, split, size=self._bank.shape)
        self.notes += [text for text in found.notes if text not in self.notes]
        if found.stored_shape != self._bank.shape:
            self.notes.append(f"{split} images were resized from {found.stored_shape} to {self._bank.shape}")
        check = check_classes(self._bank.spec.class_names, found.class_names, self._bank.num_classes)
        if check.warning and check.warning not in self.warnings:
            self.warnings.append(check.warning)
        return found if check.identity else found.relabelled(check.mapping, self._bank.class_names)

    def _real(self, data: RealData, rows: Tensor, targets: Tensor | None) -> Pictures:
        labels = data.labels[rows].to(self._device) if targets is None else targets
        return self.space.real(data.images[rows].to(self._device), labels)

    def _controls(self, nets: int, teacher: TeacherView | None) -> list[Pictures]:
        """For every network its own random real images: as many of each class as the bank holds."""
        names, labels = self._bank.class_names, self.train_data.labels
        wanted = torch.bincount(self.classes, minlength=len(names)).tolist()
        rows = [(labels == label).nonzero()[:, 0] for label in range(len(names))]
        short = [name for name, n, found in zip(names, wanted, rows, strict=True) if n > len(found)]
        if short:
            self.warnings.append(f"the control is smaller than the bank: too few real images of {', '.join(short[:5])}")
        controls = []
        for index in range(nets):
            stream = self._stream("control", index)
            parts = [r[torch.randperm(len(r), generator=stream)[:n]] for r, n in zip(rows, wanted, strict=True)]
            chosen = torch.cat(parts)
            soft = None if teacher is None else _probabilities(teacher, self.train_data.images[chosen])
            controls.append(self._real(self.train_data, chosen, self._hard(labels[chosen]) if soft is None else soft))
        return controls

    def _labeller(self, spec: str | None) -> TeacherView | None:
        if spec is None:
            self.notes.append("the bank's labels are soft, the control's are hard (--teacher SPEC makes them soft)")
            return None
        teacher = TeacherView.from_loaded(load_model(spec, weights="required"))
        if teacher.num_classes != self._bank.num_classes:
            raise DataError(f"teacher {spec} has {teacher.num_classes} classes", got=self._bank.num_classes)
        return teacher.to(self._device)


def bank_logits(bank: Bank) -> Tensor:
    """All stored logits (N, K), float32."""
    return StoredLogits(bank).read(np.arange(len(bank))).dense()


def _probabilities(teacher: TeacherView, images: Tensor) -> Tensor:
    device = teacher._scale.device
    with torch.no_grad():
        return torch.cat([teacher(part.to(device)).softmax(1) for part in images.split(500)])
