"""`synthkit evaluate`: accuracy on labelled data, agreement with the teacher on a bank, or what a bank teaches."""

from __future__ import annotations

import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.config.schema import EvaluateConfig
from synthkit.errors import BankError, DataError, ModelError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from synthkit.bank import Bank
    from synthkit.models.build import LoadedModel
    from synthkit.models.view import TeacherView
    from synthkit.runtime import Runtime


_OF_BANK = ("protocol", "arch", "cross", "nets", "epochs", "lr", "labels", "control_data", "full", "full_epochs")
_OF_MODEL = ("split",)


def run(cfg: EvaluateConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Measure a model, or the networks that a bank can train, and print the result.

    Returns:
        The record that `--json` prints and `--out` adds to its file. Of a model: `model`, `data`, `teacher`, `metrics`
        (see `evaluate_classifier`, `evaluate_fidelity`), `notes`, `warnings`, `seconds`, `versions`, `hardware` and
        `rank`. Of a bank: see `evaluate_bank`.

    Raises:
        UsageError: model, bank, data, teacher or output do not fit; nothing was written.
    """
    from synthkit.evaluation import report
    from synthkit.runtime import Runtime

    _check_words(cfg)
    out = Path(cfg.out) if cfg.out else None
    if out is not None:
        report.check_out(out)
    runtime = Runtime.create(cfg.runtime)
    result = _of_bank(cfg, runtime, quiet) if cfg.bank else _of_model(cfg, runtime)
    result["rank"] = runtime.rank
    if runtime.is_main:
        if not quiet:
            from synthkit.cli import evaluate_table

            print(evaluate_table.render(result) if cfg.bank else report.render(result))
        if out is not None:
            report.add_result(out, result)
            print(f"written to {out}", file=sys.stderr)
    return result


def _check_words(cfg: EvaluateConfig) -> None:
    """Exactly one of model and bank, and no option of the other one. Raises `UsageError`."""
    if (cfg.model is None) == (cfg.bank is None):
        got = "neither" if cfg.model is None else "both"
        hint = "--model measures a trained network, --bank trains fresh networks on a bank and measures those"
        raise UsageError("give either --model or --bank", got=got, hint=hint)
    chosen, others = ("--bank", _OF_MODEL) if cfg.bank else ("--model", _OF_BANK)
    defaults = {f.name: f.default for f in fields(cfg)}
    for name in others:
        if getattr(cfg, name) != defaults[name]:
            raise UsageError(f"--{name.replace('_', '-')} does not go with {chosen}", got=getattr(cfg, name))
    if cfg.bank and (cfg.runtime.precision == "bf16" or cfg.runtime.compile):
        raise UsageError("--bank trains in float32 without torch.compile, as the protocols do", hint="leave that out")
    if cfg.limit is not None and cfg.limit < 1:
        raise UsageError("limit must be at least 1", got=cfg.limit)


def _of_model(cfg: EvaluateConfig, runtime: Runtime) -> dict[str, Any]:
    from synthkit.runtime import hardware, versions

    began = time.monotonic()
    result = _Job(cfg, runtime).measure()
    return result | {"seconds": round(time.monotonic() - began, 3), "versions": versions(), "hardware": hardware()}


def _of_bank(cfg: EvaluateConfig, runtime: Runtime, quiet: bool) -> dict[str, Any]:
    from synthkit.evaluation.bank_protocol import evaluate_bank

    if cfg.data is None:
        raise UsageError("--bank needs real data to test on", hint="give --data, for example --data cifar10:DIR")
    words = (*_OF_BANK, "teacher", "limit", "seed")
    options = {name: getattr(cfg, name) for name in words}
    options["cross"] = tuple(name.strip() for name in (cfg.cross or "").split(",") if name.strip())
    return evaluate_bank(Path(cfg.bank or "").expanduser(), cfg.data, runtime=runtime, quiet=quiet, **options)


class _Job:
    """One evaluation: loads what the config names and chooses how to measure."""

    def __init__(self, cfg: EvaluateConfig, runtime: Runtime):
        from synthkit.models.build import load_model

        self.cfg, self.runtime = cfg, runtime
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.spec = cfg.model or ""
        self.loaded = load_model(self.spec, weights="required")
        assumed = self.loaded.card.extra.get("assumed")
        if assumed:
            self.warnings.append(f"the model has no card; {assumed} is assumed")
        self.view = self._view(self.loaded)

    def _view(self, loaded: LoadedModel) -> TeacherView:
        from synthkit.models.view import TeacherView

        view = TeacherView.from_loaded(loaded)
        view.to(self.runtime.device, channels_last=self.runtime.channels_last)
        return view

    def measure(self) -> dict[str, Any]:
        """The record without timings."""
        data, spec = self.cfg.data, self.cfg.data
        trained_on = self.loaded.card.extra.get("bank")
        if spec is None and isinstance(trained_on, dict) and trained_on.get("path"):
            data = f"bank:{trained_on['path']}"
            self.notes.append("no --data was given: measured on the bank that the student was trained from")
        if data is None:
            raise UsageError("evaluate: no data", hint="give --data, for example --data cifar10:DIR or bank:DIR")
        if data.startswith("bank:"):
            return self._on_bank(Path(data.removeprefix("bank:")).expanduser(), data)
        return self._on_labels(data)

    def _record(self, data: dict[str, Any], metrics: dict[str, Any], teacher: LoadedModel | None) -> dict[str, Any]:
        def about(loaded: LoadedModel) -> dict[str, Any]:
            card = loaded.card
            return {
                "spec": loaded.spec,
                "arch": card.arch,
                **({"head": head["loss"]} if (head := card.extra.get("head")) else {}),
                "parameters": sum(p.numel() for p in loaded.module.parameters()),
                "sha256": loaded.sha256,
                "mean": card.mean,
                "std": card.std,
                "claimed_accuracy": card.accuracy,
            }

        warnings = [*self.warnings, *metrics.pop("warnings")]
        data |= {"limit": self.cfg.limit, "seed": self.cfg.seed if self.cfg.limit else None}
        return {
            "model": about(self.loaded),
            "teacher": about(teacher) if teacher else None,
            "data": data,
            "metrics": metrics,
            "notes": self.notes,
            "warnings": warnings,
        }

    # --- labelled data ------------------------------------------------------------------------------------------------

    def _on_labels(self, spec: str) -> dict[str, Any]:
        from synthkit.data.classes import check_classes
        from synthkit.data.specs import load_data
        from synthkit.evaluation.diagnose import wrong_normalisation
        from synthkit.evaluation.metrics import evaluate_classifier, matched

        size = (self.view.input_size[0], self.view.input_size[1], self.view.input_size[2])
        raw = load_data(spec, self.cfg.split, size=size)
        loud = check_classes(self.view.class_names, raw.class_names, self.view.num_classes).warning
        data, said = matched(self.view, raw)
        self.notes += [text for text in said if text != loud]
        self.warnings += [loud] if loud else []
        if self.cfg.limit is not None:
            data = data.subset(self.cfg.limit, self.cfg.seed)
        teacher = self._teacher()
        metrics = evaluate_classifier(
            self.view, data, teacher=self._view(teacher) if teacher else None, runtime=self._autocast()
        )
        if data.label_source == "real" and not metrics["warnings"]:  # a permuted order would mislead the search
            warning = wrong_normalisation(self.view, data)
            metrics["warnings"] += [warning] if warning else []
        about = {"spec": spec, "name": data.name, "split": data.split, "labels": data.label_source}
        return self._record(about, metrics, teacher)

    def _autocast(self) -> Runtime | None:
        """Accuracies are measured in float32 unless another precision is asked for by name."""
        return None if self.cfg.runtime.precision == "auto" else self.runtime

    # --- teacher ------------------------------------------------------------------------------------------------------

    def _teacher(self, also: object = None) -> LoadedModel | None:
        """The teacher given, else that of the run, else `also`; one that is only remembered may be gone."""
        from synthkit.models.build import load_model

        if self.cfg.teacher is not None:
            return load_model(self.cfg.teacher, weights="required")
        remembered = _spec(self.loaded.card.extra.get("teacher")) or _spec(also)
        if remembered is None:
            return None
        if "," in remembered or remembered.startswith("random:"):
            self.notes.append(f"the teacher {remembered!r} is no single trained model: name one with --teacher SPEC")
            return None
        try:
            return load_model(remembered, weights="required")
        except ModelError as error:
            self.warnings.append(f"the teacher {remembered!r} cannot be loaded, so it is left out ({error})")
            return None

    # --- banks --------------------------------------------------------------------------------------------------------

    def _on_bank(self, path: Path, spec: str) -> dict[str, Any]:
        from synthkit.bank import Bank
        from synthkit.data.splits import missing_root
        from synthkit.evaluation.fidelity import evaluate_fidelity

        if not path.is_dir():
            raise missing_root("bank", path)
        bank = Bank(path)
        if len(bank) == 0:
            raise BankError(f"{path}: no shard is committed yet", hint="finish it with: synthkit synthesize --resume")
        if bank.spec.label_kind == "real":
            return self._on_labels(spec)
        teacher = self._teacher(bank.spec.teacher)
        if teacher is None and not bank.has("logits"):
            raise DataError(
                f"bank {path}: neither a teacher nor stored logits to agree with", hint="name it with --teacher SPEC"
            )
        rows = self._rows(bank)
        metrics = evaluate_fidelity(
            self.view,
            bank,
            teacher=self._view(teacher) if teacher else None,
            indices=rows,
            runtime=self._autocast(),
        )
        return self._record({"spec": spec, "labels": "none"}, metrics, teacher)

    def _rows(self, bank: Bank) -> np.ndarray:
        """The rows to measure on: of the bank that the student was trained from, the held-out part."""
        import numpy as np

        rows = np.arange(len(bank))
        trained_on = self.loaded.card.extra.get("bank")
        uuid = bank.record.get("uuid")
        if isinstance(trained_on, dict) and uuid is not None and trained_on.get("uuid") == uuid:
            held = _held_out(Path(self.spec), len(bank))
            if held is None or len(held) == 0:
                self.warnings.append("the student was trained on these very images: this is no held-out measure")
            else:
                rows = held
                self.notes.append(f"measured on the {len(held)} images that distill held out of training")
        if self.cfg.limit is not None and self.cfg.limit < len(rows):
            chosen = np.random.default_rng(self.cfg.seed).permutation(len(rows))[: self.cfg.limit]
            rows = rows[np.sort(chosen)]
        return rows


def _spec(teacher: object) -> str | None:
    """The model spec in what a card or bank remembers of a teacher."""
    if isinstance(teacher, dict):
        teacher = teacher.get("spec")
    return teacher if isinstance(teacher, str) and teacher else None


def _held_out(model: Path, images: int) -> np.ndarray | None:
    """The held-out rows of a distill run by its run.json; none when the run is not at hand."""
    from synthkit.distillation.sources import split_holdout
    from synthkit.runtime import RunDir

    folder = model if model.is_dir() else model.parent
    # with several seeds each has a folder, and the split is that of the whole call one level up
    for place in (folder.parent, folder):
        record = RunDir(place).read_json("run.json")
        config = record.get("config") if isinstance(record, dict) else None
        if not isinstance(config, dict) or "holdout" not in config:
            continue
        if place == folder or config.get("seeds", 1) > 1:
            return split_holdout(images, float(config["holdout"]), int(config["seed"]))[1]
    return None
