"""The engine: from a config to a bank. It loads what the method needs, checks what it requires and drives it.

It is the only part of the synthesis room that knows the bank: `run.py` drives methods that go on from step to step,
`shards.py` those whose shards are independent.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.bank import Bank, BankSpec, BankWriter
from synthkit.bank.seal import refresh_card
from synthkit.bank.spec import read_record
from synthkit.config.parse import config_hash, config_to_dict
from synthkit.config.schema import SynthesizeConfig
from synthkit.errors import ConfigError, OutputExistsError, RequirementError
from synthkit.runtime import Runtime, hardware, versions
from synthkit.synthesis.base import ImageSpec, Makes, Requires, Task
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.record import RunRecord
from synthkit.synthesis.run import Evaluation, Run, announce
from synthkit.synthesis.shards import ShardRun, shards_of, worker_of
from synthkit.tables import citation, lookup

if TYPE_CHECKING:
    from synthkit.data.real import RealData
    from synthkit.models.build import LoadedModel
    from synthkit.models.view import TeacherView

IMAGES = 50_000
"""Images of a bank when neither `images` nor `ipc` says how many."""


def synthesize(config: SynthesizeConfig) -> Bank:
    """Make (or finish, with `resume`; or help to make, with `shards`) the bank that `config` describes.

    Raises:
        UsageError: the task is impossible or the output exists; nothing was written.
        RunError: training diverged, memory ran out or the disk is full; committed shards stay valid.
        BankError: the bank to resume is damaged, was begun with another recipe, or another run makes these shards.
    """
    method_class = lookup("method", config.method_name)
    if config.shards and worker_of(config.shards) and not method_class.requires.shardable:
        raise RequirementError(
            f"--shards: the shards of {config.method_name} are not independent, one process makes them in order",
            hint="run whole banks with different seeds (--seed 1 --out A, --seed 2 --out B, ...), then join them:"
            " synthkit bank merge A B --out BANK",
        )
    runtime = Runtime.create(config.runtime)
    worker = share_of(config, runtime) if method_class.requires.shardable else None
    curriculum = Curriculum.named(config.curriculum)
    source = Source.load(config, method_class, runtime)
    out = Path(config.out) if config.out else default_out(config)
    spec = bank_spec(config, source, method_class)
    _refuse_existing(config, out, runtime)
    early: list[str] = []  # what the method warns of while it is built, before there is a run to note it
    task = Task(
        teachers=[source.teacher] if source.teacher else [],
        images=spec.images,
        curriculum=curriculum,
        seed=config.seed,
        runtime=runtime,
        warn=early.append,
        data=source.data,
        spec=source.spec,
        images_per_shard=spec.images_per_shard,
        extra={"teacher_arch": source.loaded.card.arch} if source.loaded else {},
    )
    method = method_class(config.method, task)
    evaluation = Evaluation(config.eval_data, source.teacher) if config.eval_data and source.teacher else None
    _introduce(config, runtime, evaluation)
    writer = BankWriter.open_or_create(out, spec) if config.resume or worker else BankWriter.create(out, spec)
    record = RunRecord(out / "workers" / f"{worker[0]}-of-{worker[1]}" if worker else out, config, runtime)
    shards = shards_of(worker, writer.shards)
    with writer.claim(shards) if worker else writer.lock():
        if method_class.requires.shardable:
            run: Any = ShardRun(writer, method, task, record, shards)
            if not writer.committed():
                announce(method, writer, record)
        else:
            run = Run(writer, method, task, record, evaluation, source.loaded.card.licence if source.loaded else None)
        for text in early:
            record.warn(text)
        if run.unfinished():
            with record.closing(lambda: _go_on(writer)):
                run.run()
                refresh_card(out)  # it tells what the run measured, which is known only now
    return Bank(out)


def share_of(config: SynthesizeConfig, runtime: Runtime) -> tuple[int, int] | None:
    """(I, N): the part of the shards that this process makes; none is all. Under torchrun every rank is a worker."""
    part, parts = worker_of(config.shards) if config.shards else (1, 1)
    if runtime.world == 1 and not config.shards:
        return None
    return part + parts * runtime.rank, parts * runtime.world


def _refuse_existing(config: SynthesizeConfig, out: Path, runtime: Runtime) -> None:
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out} is a file", hint="choose another --out; nothing is overwritten")
    if runtime.is_main and not (config.resume or config.shards) and out.exists() and any(out.iterdir()):
        raise OutputExistsError(
            f"{out} is not empty", hint="go on with --resume, or choose another --out; nothing is overwritten"
        )
    if runtime.world > 1:
        runtime.accelerator.wait_for_everyone()  # no rank begins before the first has looked


def _introduce(config: SynthesizeConfig, runtime: Runtime, evaluation: Evaluation | None) -> None:
    parts = [config.method_name]
    if config.teacher:
        parts.append(f"on {config.teacher}")
    if config.data:
        parts.append(f"from {config.data}")
    if lookup("method", config.method_name).requires.curriculum:
        parts.append(f"with curriculum {config.curriculum}")
    runtime.say(f"{' '.join(parts)}; {runtime.describe()}")
    if evaluation:
        runtime.say(f"teacher on {config.eval_data}: top-1 {100 * evaluation.teacher_top1:.2f} %")
        for warning in evaluation.warnings:
            runtime.say(f"warning: {warning}")


def _go_on(writer: BankWriter) -> str:
    made = len(writer.committed())
    return f"{made} of {writer.shards} shards are committed in {writer.path}; go on with the same command and --resume"


def default_out(config: SynthesizeConfig) -> Path:
    """banks/METHOD-TEACHER-HASH (without a teacher: METHOD-DATA-HASH)."""
    source = config.teacher or (config.data or "").partition(":")[0]
    name = Path(source).stem if "/" in source else source.split("@")[0]
    return Path("banks") / f"{config.method_name}-{name.replace(':', '-')}-{config_hash(config)[:8]}"


def run_folder(config: SynthesizeConfig, bank: Path) -> Path:
    """Where the run that `config` describes keeps run.json and metrics.jsonl."""
    if not config.shards:
        return bank
    part, parts = worker_of(config.shards)
    return bank / "workers" / f"{part}-of-{parts}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a bank is made from."""

    spec: ImageSpec
    loaded: LoadedModel | None = None
    teacher: TeacherView | None = None
    data: RealData | None = None

    @classmethod
    def load(cls, config: SynthesizeConfig, method_class: Any, runtime: Runtime) -> Source:
        """Load the teacher and the real data that `config` names, and refuse what the method cannot do.

        Raises:
            RequirementError: neither is there, or the teacher lacks what the method needs; the message has the remedy.
            ModelError, DataError: one of them cannot be loaded, or their classes do not fit.
        """
        from synthkit.models.build import load_model
        from synthkit.models.view import TeacherView

        loaded = teacher = data = None
        if config.teacher:
            loaded = load_model(config.teacher, weights="required")
            teacher = TeacherView.from_loaded(loaded).to(runtime.device, channels_last=runtime.channels_last)
        check_requirements(config.method_name, method_class.requires, teacher)
        if config.data and teacher is not None and not method_class.requires.real_data:
            hint = "leave --data out, or choose a method that does, such as random_real"
            raise RequirementError(f"{config.method_name} does not look at real data", got=config.data, hint=hint)
        if config.data:
            data = _real_data(config.data, teacher, runtime)
        if teacher is not None:
            spec = Task(teachers=[teacher], images=1, curriculum=Curriculum.named("none"), seed=0,
                        runtime=runtime).image_spec  # fmt: skip
        elif data is not None:
            mean, std = data_stats(config.data or "", data)
            spec = ImageSpec(
                shape=data.shape, num_classes=data.num_classes, mean=mean, std=std, class_names=list(data.class_names)
            )
        else:
            raise RequirementError(
                f"{config.method_name} must know the size of the images and the classes",
                hint="give --teacher, or --data for its size and classes alone",
            )
        return cls(spec=spec, loaded=loaded, teacher=teacher, data=data)


def _real_data(text: str, teacher: TeacherView | None, runtime: Runtime) -> RealData:
    from synthkit.data.classes import check_classes
    from synthkit.data.specs import load_data

    data = load_data(text, "train", size=teacher.input_size if teacher else None)
    for note in data.notes:
        runtime.say(f"{text}: {note}")
    if teacher is None:
        return data
    fit = check_classes(teacher.class_names, data.class_names, teacher.num_classes)
    if fit.warning:
        runtime.say(f"warning: {fit.warning}")
    if fit.identity:
        return data
    names = teacher.class_names or [str(i) for i in range(teacher.num_classes)]
    return data.relabelled(fit.mapping, names)


def data_stats(text: str, data: RealData) -> tuple[list[float], list[float]]:
    """Channel means and standard deviations of `data` in [0, 1]: the field's usual numbers, else measured."""
    from synthkit.data.stats import STATS

    known = STATS.get(text.partition(":")[0])
    if known and len(known[0]) == data.shape[0]:
        return list(known[0]), list(known[1])
    total, squares, count = 0.0, 0.0, len(data) * data.shape[1] * data.shape[2]
    for images, _ in data.batches():
        pixels = images.double() / 255
        total, squares = total + pixels.sum((0, 2, 3)), squares + (pixels**2).sum((0, 2, 3))
    mean = total / count
    std = (squares / count - mean**2).clamp(min=1e-8).sqrt()  # type: ignore[union-attr]  # tensors after the loop
    return [round(v, 4) for v in mean.tolist()], [max(round(v, 4), 1e-4) for v in std.tolist()]  # type: ignore[union-attr]


def check_requirements(name: str, requires: Requires, teacher: TeacherView | None) -> None:
    """Refuse what the method cannot do, with the remedy.

    Raises:
        RequirementError: there is no teacher, or it lacks what the method needs.
    """
    if teacher is None:
        if requires.teacher:
            raise RequirementError(f"{name} needs a teacher", hint="give one: --teacher NAME@FILE")
        return
    if requires.batchnorm and not teacher.has_batchnorm:
        raise RequirementError(
            f"{name} needs BatchNorm layers in the teacher, {teacher.name} has none",
            hint="try method cudfkd (its BN term can be off), or a teacher with BatchNorm (lenet5_bn, not lenet5)",
        )


def bank_spec(config: SynthesizeConfig, source: Source, method_class: Any) -> BankSpec:
    """Identity of the bank: everything that changes its bytes, and where teacher and data came from."""
    requires: Requires = method_class.requires
    makes: Makes = getattr(method_class, "makes", Makes())
    spec = source.spec
    recipe: dict[str, Any] = {"method": {"name": config.method_name, **config_to_dict(config.method)}}
    if requires.curriculum:
        recipe["curriculum"] = config.curriculum
    if source.data is not None:
        recipe["data"] = data_identity(config.data or "", source.data, pixels=requires.real_data)
    facts = _provenance(config.data or "", source.data, makes) if requires.real_data else {}
    label_kind = makes.label_kind
    if label_kind == "real" and source.data is not None:
        label_kind = source.data.label_source
    if source.teacher is None and label_kind == "argmax" and not requires.real_data:
        label_kind = "none"
    return BankSpec(
        shape=spec.shape,
        num_classes=spec.num_classes,
        class_names=spec.class_names,
        mean=spec.mean,
        std=spec.std,
        label_kind=label_kind,  # type: ignore[arg-type]  # a bank's own kind, or one of Makes
        images=planned_images(config, spec),
        images_per_shard=config.images_per_shard,
        seed=config.seed,
        recipe=recipe,
        teacher=_teacher_record(config, source.loaded) if source.loaded else {},
        extra={"versions": versions(), "hardware": hardware(), "citation": citation(config.method_name)},
        **facts,
    )


def planned_images(config: SynthesizeConfig, spec: ImageSpec) -> int:
    """Images of the bank: `images`, or `ipc` times the classes, or 50,000. Raises `ConfigError` when both are given."""
    if config.images is not None and config.ipc is not None:
        raise ConfigError("synthesize: --images and --ipc exclude each other", hint="leave one of them out")
    return config.ipc * spec.num_classes if config.ipc is not None else config.images or IMAGES


def _teacher_record(config: SynthesizeConfig, loaded: LoadedModel) -> dict[str, Any]:
    card = loaded.card
    return {
        "spec": config.teacher, "arch": card.arch, "sha256": loaded.sha256, "accuracy": card.accuracy,
        "licence": card.licence, "source": card.source,
    }  # fmt: skip


def data_identity(text: str, data: RealData, *, pixels: bool) -> dict[str, Any]:
    """What tells one data set from another, without its path: name, split, size, and a hash of pixels and labels."""
    facts: dict[str, Any] = {"name": text.partition(":")[0], "split": data.split, "shape": list(data.shape)}
    if pixels:
        digest = hashlib.sha256(data.labels.cpu().numpy().tobytes())
        for images, _ in data.batches():
            digest.update(images.contiguous().numpy().data)
        facts |= {"images": len(data), "sha256": digest.hexdigest()}
    return facts


def _provenance(text: str, data: RealData | None, makes: Makes) -> dict[str, Any]:
    """Whether real pixels were looked at or are contained; a bank as data hands on what it says of itself."""
    if data is None or not text.startswith("bank:"):
        return {"real_data_used": True, "contains_real": makes.contains_real}
    parent, record = read_record(Path(text.partition(":")[2]).expanduser())
    return {
        "real_data_used": parent.real_data_used or parent.contains_real,
        "contains_real": makes.contains_real and parent.contains_real,
        "parents": [{"uuid": record["uuid"], "recipe_hash": parent.recipe_hash()}],
    }
