"""`evaluate_bank`: fresh networks trained on a bank under a named protocol, beside an equal-size random-real control.

The last epoch is the result. Nothing is selected on the test set; the best point of a short curve is given as a
diagnostic, because the literature reports it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from synthkit.bank import Bank
from synthkit.bank.labels.stored import has_logits
from synthkit.data import dsa
from synthkit.errors import BankError, ConfigError, RequirementError
from synthkit.evaluation import dd_protocols, fresh_nets, ranking
from synthkit.evaluation.bank_sets import BankSets
from synthkit.evaluation.dd_protocols import DDProtocol
from synthkit.evaluation.fresh_nets import NetResult, Pictures, Training
from synthkit.models.build import build_model
from synthkit.models.names import resolve_name
from synthkit.runtime import Runtime, format_bytes, format_seconds, hardware, peak_memory, versions

CURVE_POINTS, CURVE_IMAGES = 5, 1000


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `evaluate_bank` can be told beside the bank and the data."""

    protocol: str = dd_protocols.OWN
    """Name in `dd_protocols`; convnet is that of the bank's method."""
    arch: str | None = None
    """Network; none is the one that the bank was distilled with, else the ConvNet for its image size."""
    cross: tuple[str, ...] = ()
    """Further networks, each trained under the same protocol."""
    nets: int = 5
    """Networks of each architecture, of the bank and of the control each."""
    epochs: int | None = None
    """E instead of the protocol's."""
    lr: float | None = None
    """First learning rate instead of the protocol's or the learnt one."""
    labels: Literal["auto", "hard", "soft"] = "auto"
    """Labels of the bank: auto is what the protocol says."""
    teacher: str | None = None
    """Model that labels the control softly when the bank's labels are soft."""
    control_data: str | None = None
    """Data spec whose train split the control is drawn from; none is the data itself."""
    full: float | None = None
    """Accuracy of the whole training set under hard labels, as a share: HLR, IOR and LRS are reported then."""
    full_epochs: int = 0
    """Measure that accuracy here, with so many epochs over the whole training set."""
    limit: int | None = None
    """Test on a random sample of so many images."""
    seed: int = 0
    """Of networks, order, augmentation and the control's draw."""
    stack: bool | None = None
    """Train the networks stacked or one by one; none takes what is faster here."""

    def __post_init__(self) -> None:
        for name in ("nets", "epochs", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1", got=value)
        if self.lr is not None and not self.lr > 0:
            raise ConfigError("lr must be positive", got=self.lr)
        if self.full is not None and not 0 < self.full <= 1:
            raise ConfigError("full is an accuracy as a share, above 0 and at most 1", got=self.full)
        if self.full is not None and self.full_epochs:
            raise ConfigError("full and full_epochs exclude each other", hint="give one of them")

    @property
    def ranked(self) -> bool:
        """Whether HLR, IOR and LRS are asked for."""
        return self.full is not None or self.full_epochs > 0


def evaluate_bank(
    bank: Bank | str | Path, data: str, *, runtime: Runtime | None = None, quiet: bool = True, **options: Any
) -> dict[str, Any]:
    """Train fresh networks on `bank` and on a random-real control of its size, and test them on `data`.

    Args:
        data: spec of the real data: its test split is tested on, the control comes from its train split.
        quiet: no estimate and no progress on standard error.
        options: fields of `Options`.

    Returns:
        JSON-able record: `bank`, `data`, `protocol` (name, why, all its values, `changed` by flags), `results` {arch:
        {`bank`, `control`: {`mean`, `std`, `best_mean`, `nets`: [{`seed`, `last`, `best`, `curve`, `loss`}]}, `gain`,
        `epochs`, `lr`, `stacked`, `ranking`, ...}}, `notes`, `warnings`, `estimate`, `seconds`, `cpu_seconds`,
        `peak_memory`, `versions`, `hardware`. Accuracies are shares.

    Raises:
        ConfigError, DataError, RequirementError: the parts do not fit each other. BankError: the bank is damaged.
    """
    begun, cpu = time.monotonic(), time.process_time()
    job = _Job(bank if isinstance(bank, Bank) else Bank(bank), data, Options(**options), runtime or Runtime.create())
    record = job.run(quiet)
    record |= {"seconds": round(time.monotonic() - begun, 3), "cpu_seconds": round(time.process_time() - cpu, 3)}
    return record | {"peak_memory": peak_memory(), "versions": versions(), "hardware": hardware()}


class _Job:
    """One evaluation: everything that is fixed before the first network is trained."""

    def __init__(self, bank: Bank, data: str, options: Options, runtime: Runtime):
        if len(bank) == 0:
            hint = "finish it with: synthkit synthesize --resume"
            raise BankError(f"{bank.path}: no shard is committed yet", hint=hint)
        self.bank, self.data, self.options, self.runtime = bank, data, options, runtime
        self.notes: list[str] = []
        self.warnings: list[str] = []
        if not bank.complete:
            self.warnings.append(f"the bank is unfinished: {len(bank):,} of {bank.spec.images:,} images")
        self.name, self.why = self._protocol()
        self.protocol: DDProtocol = dd_protocols.protocol_named(self.name)
        self.soft, self.rate = self._soft(), self._rate()
        if options.teacher is not None and not self.soft:
            self.notes.append("the teacher is not used: it would label the control softly, and labels are hard")
        archs = [options.arch or self.protocol.arch or dd_protocols.own_arch(bank.spec.recipe, bank.shape[-1])]
        self.archs = list(dict.fromkeys(resolve_name(name) for name in [*archs, *options.cross]))
        for name in self.archs:
            self.builder(name)(0)  # an impossible network is refused before any data is read
        self.sets = BankSets(
            bank, data, device=runtime.device, soft=self.soft, mixed=self.protocol.cutmix > 0, nets=options.nets,
            seed=options.seed, control=options.control_data, teacher=options.teacher, limit=options.limit,
        )  # fmt: skip

    # --- what is decided ----------------------------------------------------------------------------------------------

    def _protocol(self) -> tuple[str, str]:
        asked, spec = self.options.protocol, self.bank.spec
        if asked != dd_protocols.OWN:
            return asked, "asked for"
        learnt = has_logits(self.bank) and not spec.teacher
        return dd_protocols.own_protocol(spec.recipe, len(self.bank) / spec.num_classes, soft=learnt)

    def _soft(self) -> bool:
        asked = self.options.labels
        wanted = self.protocol.labels == "soft" if asked == "auto" else asked == "soft"
        if wanted and not has_logits(self.bank):
            if asked == "soft":
                hint = "take --labels hard"
                raise RequirementError(f"bank {self.bank.path}: stores no logits for soft labels", hint=hint)
            self.notes.append("the protocol has soft labels, but the bank stores no logits: hard labels are used")
            return False
        return wanted

    def _rate(self) -> float:
        """The first learning rate."""
        if self.options.lr is not None or not self.protocol.learnt_lr:
            return self.options.lr or self.protocol.lr
        meta = self.bank.sidecars[-1].raw.get("meta")
        rate = meta.get("learning_rate") if isinstance(meta, dict) else None
        if not isinstance(rate, int | float) or not rate > 0:
            self.notes.append(f"the bank holds no learnt step size: {self.protocol.lr:g} is used")
            return self.protocol.lr
        return float(rate)

    def training(self, arch: str) -> Training:
        """The protocol for this network and these classes."""
        strategy = dsa.default_strategy(self.bank.class_names)
        ops: tuple[str, ...] = ()
        if self.protocol.augment == "dc":
            if arch.startswith("convnet") and arch.endswith("_bn"):
                ops = ("crop", "noise")
            elif strategy == dsa.DIGITS_STRATEGY and self.bank.shape[0] == 1:
                ops = ("crop", "scale", "rotate")
        epochs = self.options.epochs or self.protocol.epochs_for(self.protocol.augment != "dc" or bool(ops))
        return Training(protocol=self.protocol, epochs=epochs, lr=self.rate, strategy=strategy, dc_ops=ops)

    def builder(self, arch: str) -> Callable[[int], nn.Module]:
        """What makes a fresh network on the device from a seed."""
        channels, _, side = self.bank.shape
        shape = {"num_classes": self.bank.num_classes, "in_channels": channels, "image_size": side}
        return lambda seed: build_model(arch, seed=seed, **shape).to(self.runtime.device)

    # --- training -----------------------------------------------------------------------------------------------------

    def run(self, quiet: bool) -> dict[str, Any]:
        """The record without timings."""
        options, estimate = self.options, self.estimate()
        if not quiet:
            self.runtime.say(self.describe(estimate))
        results: dict[str, Any] = {}
        steps = sum(plan["steps"] for plan in estimate["archs"].values())
        bar = None if quiet else self.runtime.progress(steps, "evaluate")
        for arch, plan in estimate["archs"].items():
            results[arch] = self._measured(arch, plan["stacked"], bar.update if bar else None)
        if bar:
            bar.close()
        changed = [name for name in ("epochs", "lr") if getattr(options, name) is not None]
        changed += ["labels"] if options.labels != "auto" else []
        test, train = self.sets.test_data, self.sets.train_data
        return {
            "bank": self._about_bank(),
            "data": {
                "spec": self.data, "name": test.name, "split": test.split, "n": len(test), "limit": options.limit,
                "control": options.control_data or self.data, "control_split": train.split,
            },
            "protocol": {"name": self.name, "why": self.why, **asdict(self.protocol), "changed": changed},
            "results": results, "seed": options.seed, "nets": options.nets, "estimate": estimate,
            "notes": self.notes + self.sets.notes, "warnings": self.sets.warnings + self.warnings,
        }  # fmt: skip

    def _about_bank(self) -> dict[str, Any]:
        spec, method = self.bank.spec, self.bank.spec.recipe.get("method")
        counts = np.bincount(self.sets.classes.numpy(), minlength=spec.num_classes)
        return {
            "path": str(self.bank.path), "uuid": self.bank.record.get("uuid"), "images": len(self.bank),
            "per_class": [int(counts.min()), int(counts.max())], "space": self.sets.space.kind,
            "method": method.get("name") if isinstance(method, dict) else method,
            "pixels": "images_f16" if self.bank.has("images_f16") else "images",
            "labels": "soft" if self.soft else "hard", "contains_real": spec.contains_real,
        }  # fmt: skip

    def _measured(self, arch: str, stacked: bool, tick: Callable[[int], None] | None) -> dict[str, Any]:
        training, nets = self.training(arch), self.options.nets
        bank = self._nets(arch, [self.sets.bank] * nets, training, stacked, tick)
        control = self._nets(arch, self.sets.controls, training, stacked, tick)
        result: dict[str, Any] = {
            "bank": _summary(bank), "control": _summary(control), "epochs": training.epochs, "lr": training.lr,
            "epochs_run": self.protocol.epochs_run(training.epochs), "dc_ops": list(training.dc_ops),
            "dsa": training.strategy if self.protocol.augment in ("dsa", "idc") else None, "stacked": stacked,
        }  # fmt: skip
        result["gain"] = result["bank"]["mean"] - result["control"]["mean"]
        for what, found in (("bank", bank), ("control", control)):
            lost = [i for i, net in enumerate(found) if not np.isfinite(net.loss)]
            if lost:
                self.warnings.append(f"{arch}: the loss of {what} network(s) {lost} is not finite; lower --lr")
        if self.options.ranked:
            result["ranking"] = self._ranking(arch, training, stacked, tick, result)
        return result

    def _nets(
        self, arch: str, sets: Sequence[Pictures], training: Training, stacked: bool, tick: Callable[[int], None] | None
    ) -> list[NetResult]:
        seeds = [fresh_nets.net_seed(self.options.seed, i) for i in range(len(sets))]
        run = self.protocol.epochs_run(training.epochs)
        points = sorted({round(run * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)})
        size = len(seeds) if stacked else 1
        found: list[NetResult] = []
        for start in range(0, len(seeds), size):
            part = slice(start, start + size)
            found += fresh_nets.train_together(
                self.builder(arch), sets[part], self.sets.test, training, seeds[part], points=points,
                curve_images=CURVE_IMAGES, tick=tick,
            )  # fmt: skip
        return found

    def _ranking(
        self, arch: str, training: Training, stacked: bool, tick: Callable[[int], None] | None, result: dict[str, Any]
    ) -> dict[str, float]:
        """HLR, IOR and LRS; hard-label networks are trained for them where the bank's labels are soft."""
        full, hard = self.options.full, result["bank"]["mean"]
        if full is None:
            long = replace(training, epochs=self.options.full_epochs)
            full = self._nets(arch, [self.sets.everything()], long, False, tick)[0].last
        if self.soft:
            sets = [self.sets.with_hard_labels()] * self.options.nets
            hard = _summary(self._nets(arch, sets, training, stacked, tick))["mean"]
        hlr = ranking.hard_label_recovery(full, hard)
        ior = ranking.improvement_over_random(result["bank"]["mean"], result["control"]["mean"])
        return {"full": full, "hard": hard, "hlr": hlr, "ior": ior, "lrs": ranking.label_robust_score(hlr, ior)}

    # --- cost ---------------------------------------------------------------------------------------------------------

    def estimate(self) -> dict[str, Any]:
        """Seconds, bytes and steps, whole and by architecture, from one step and one test batch each."""
        plans = {arch: self._plan(arch) for arch in self.archs}
        return {
            "seconds": sum(p["seconds"] for p in plans.values()),
            "memory_bytes": max(p["memory_bytes"] for p in plans.values()) + self.sets.nbytes,
            "archs": plans,
        }

    def _plan(self, arch: str) -> dict[str, Any]:
        training, options, build = self.training(arch), self.options, self.builder(arch)
        template, stacked = build(0), options.stack
        if stacked is None:
            stacked = fresh_nets.stacking_pays(build, self.sets.bank, training, options.nets)
        elif stacked and fresh_nets.has_batchnorm(template):
            raise ConfigError(f"stack: {arch} has BatchNorm layers, and such networks are trained one by one")
        size = options.nets if stacked else 1
        seconds, saved = fresh_nets.step_seconds(build, self.sets.bank, training, size)
        scoring = fresh_nets.scoring_seconds(build, self.sets.test)

        def steps_of(images: int, epochs: int) -> int:
            return -(-images // self.protocol.batch_size) * self.protocol.epochs_run(epochs)

        networks = (3 if options.ranked and self.soft else 2) * options.nets
        steps = networks * steps_of(len(self.bank), training.epochs)
        if options.full_epochs:
            steps += steps_of(len(self.sets.train_data), options.full_epochs)
        curve = CURVE_POINTS * min(1.0, CURVE_IMAGES / len(self.sets.test))
        weights = sum(p.numel() * p.element_size() for p in template.parameters())
        return {
            "seconds": steps * seconds / size + networks * (1 + curve) * scoring, "steps": steps, "stacked": stacked,
            "memory_bytes": 1.5 * saved + 4 * weights * size,  # workspace on top; weights, gradients, two moments
        }  # fmt: skip

    def describe(self, estimate: dict[str, Any]) -> str:
        """What is about to be done, and what it costs."""
        archs = ", ".join(f"{a} ({'stacked' if p['stacked'] else 'one by one'})" for a, p in estimate["archs"].items())
        full = f", one on all {len(self.sets.train_data):,} real images" if self.options.full_epochs else ""
        return (
            f"protocol {self.name} ({self.why}): {self.protocol.description}\n"
            f"{self.options.nets} network(s) on {len(self.bank):,} images, as many on random real ones{full}: {archs}\n"
            f"about {format_seconds(estimate['seconds'])}, {format_bytes(estimate['memory_bytes'])}"
        )


def _summary(nets: Sequence[NetResult]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for one network) of the last epochs, and each network."""
    last = [net.last for net in nets]
    return {
        "mean": statistics.fmean(last),
        "std": statistics.stdev(last) if len(last) > 1 else None,
        "best_mean": statistics.fmean(net.best for net in nets),
        "nets": [{**asdict(net), "best": net.best} for net in nets],
    }
