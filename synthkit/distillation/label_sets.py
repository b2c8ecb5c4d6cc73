"""What a distill run checks of the label set that it is to train on."""

from __future__ import annotations

from synthkit.bank import Bank, LabelSet
from synthkit.config.schema import DistillConfig
from synthkit.distillation.contract import Loss
from synthkit.errors import ConfigError, DataError


def label_set_of(cfg: DistillConfig, bank: Bank, notes: list[str]) -> LabelSet | None:
    """The label set to train on, checked; None where the bank's own labels are used.

    Raises:
        UsageError: there is none of that name, it is unfinished, or other flags contradict it. BankError: damaged.
    """
    if cfg.label_set is None:
        return None
    labels = bank.labels(cfg.label_set)
    if not labels.complete:
        raise DataError(
            f"label set {labels.name!r} is unfinished: {len(labels.sidecars)} of {labels.spec.shards} shards",
            hint="go on with the same synthkit relabel command and --resume",
        )
    if cfg.logits == "live":
        raise ConfigError("logits live: a label set holds stored logits", hint="leave --logits or --label_set out")
    if cfg.fresh:
        raise ConfigError("fresh images have no stored logits", got=cfg.fresh, hint="leave --fresh or --label_set out")
    if not bank.complete:
        raise DataError(f"bank {cfg.bank} is unfinished, its label set is not", hint="run synthkit bank verify")
    if labels.kind == "images":
        return labels
    if cfg.augment not in (None, "none"):
        raise ConfigError(
            f"augment: label set {labels.name!r} holds views, which are the augmentation (the teacher saw them so)",
            got=cfg.augment,
            hint="leave --augment out, or use a label set of the images",
        )
    if cfg.order != "random":
        raise ConfigError("order: views are read in stored order", got=cfg.order, hint="leave --order out")
    height, width = bank.shape[1:]
    if labels.spec.size != (height, width):
        raise DataError(f"label set {labels.name!r} holds views of {labels.spec.size}, the student takes {height}")
    drawn = labels.spec.policy.get("views")
    if cfg.labels == "stored" and isinstance(drawn, dict) and drawn.get("mix"):
        notes.append("labels stored: a mixed view has the label of its own image; the other one is not counted")
    return labels


def note_topk(bank: Bank, labels: LabelSet | None, loss: Loss, notes: list[str]) -> None:
    """Stored top-k logits are the teacher's at temperature 1; say what another temperature costs."""
    top_k = labels.spec.top_k if labels is not None else (None if bank.has("logits") else bank.spec.top_k)
    temperature = getattr(getattr(loss, "config", None), "temperature", 1.0)
    if top_k is None or temperature == 1:
        return
    errors = labels.tail_error if labels is not None else None
    measured = "" if not errors else ": measured error of the probabilities (total variation) " + ", ".join(
        f"{100 * error:.2f} % at {t}" for t, error in errors.items())  # fmt: skip
    notes.append(
        f"top {top_k} logits have the tail's right mass at temperature 1, the loss takes {temperature:g}{measured}"
    )
