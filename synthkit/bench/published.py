"""Numbers that others published for the methods of `bench dfkd`, each with its source. Baselines disagree between
sources by up to 27 points (ZSKT on CIFAR-100), so none is quoted without one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published number."""

    method: str
    dataset: str
    pair: str
    top1: float
    """In %."""
    source: str


_DAFL = "DAFL (ICCV 2019), its table"
_DFAD = "DFAD (2019), its table, mean over runs"
_SEED = "README of ljrprocc/DataFree@bf3096b (best epoch)"
_CMI = "README of zju-vipa/CMI@9e79fa9 (best epoch)"
_FAST = "README of zju-vipa/Fast-Datafree@0dcecbc (best epoch)"
_ADA = "README of ljrprocc/DFKD@cd281c4 (best epoch)"

PUBLISHED = (
    Published("noise", "mnist", "LeNet-5 -> half", 88.01, _DAFL + " (N(0, 1) inputs)"),
    Published("real", "mnist", "LeNet-5 -> half", 98.91, _DAFL + " (KD)"),
    Published("real_labels", "mnist", "LeNet-5 -> half", 98.65, _DAFL),
    Published("dafl", "mnist", "LeNet-5 -> half", 98.20, _DAFL),
    Published("dafl", "mnist", "LeNet-5 -> half", 98.1, _DFAD),
    Published("dfad", "mnist", "LeNet-5 -> half", 98.3, _DFAD),
    Published("cudfkd", "cifar10", "ResNet-34 -> ResNet-18", 95.28, _SEED),
    Published("cudfkd", "cifar10", "WRN-40-2 -> WRN-16-1", 88.77, _SEED),
    Published("dafl", "cifar10", "ResNet-34 -> ResNet-18", 92.22, _DAFL),
    Published("dafl", "cifar10", "ResNet-34 -> ResNet-18", 88.5, _DFAD),
    Published("dafl", "cifar10", "WRN-40-2 -> WRN-16-1", 65.71, _CMI),
    Published("dafl", "cifar10", "WRN-40-2 -> WRN-16-1", 72.15, _SEED),
    Published("zskt", "cifar10", "ResNet-34 -> ResNet-18", 93.32, _CMI),
    Published("zskt", "cifar10", "WRN-40-2 -> WRN-16-1", 83.74, _CMI),
    Published("dfad", "cifar10", "ResNet-34 -> ResNet-18", 93.3, _DFAD),
    Published("dfq", "cifar10", "ResNet-34 -> ResNet-18", 94.61, _CMI),
    Published("dfq", "cifar10", "WRN-40-2 -> WRN-16-1", 86.14, _CMI),
    Published("adi", "cifar10", "ResNet-34 -> ResNet-18", 93.26, _CMI),
    Published("adi", "cifar10", "WRN-40-2 -> WRN-16-1", 83.04, _CMI),
    Published("cmi", "cifar10", "ResNet-34 -> ResNet-18", 94.84, _CMI),
    Published("cmi", "cifar10", "WRN-40-2 -> WRN-16-1", 90.01, _CMI),
    Published("predfkd", "cifar10", "ResNet-34 -> ResNet-18", 94.10, _SEED),
    Published("mbdfkd", "cifar10", "ResNet-34 -> ResNet-18", 92.4, _SEED),
    Published("fastdfkd", "cifar10", "ResNet-34 -> ResNet-18", 94.05, _FAST + ", 10 steps"),
    Published("fastdfkd", "cifar10", "WRN-40-2 -> WRN-16-1", 89.29, _FAST + ", 10 steps"),
    Published("adadfkd", "cifar10", "ResNet-34 -> ResNet-18", 95.32, _ADA),
    Published("adadfkd", "cifar10", "WRN-40-2 -> WRN-16-1", 90.05, _ADA),
)
