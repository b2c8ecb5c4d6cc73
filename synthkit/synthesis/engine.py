"""The engine: from a config to a bank. It loads what the method needs, checks what it requires and drives it.

It is the only part of the synthesis room that knows the bank: `run.py` drives methods that go on from step to step,
`shards.py` those whose shards are independent.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from synthkit.bank import Bank, BankWriter
from synthkit.bank.seal import refresh_card
from synthkit.config.parse import config_hash
from synthkit.config.schema import SynthesizeConfig
from synthkit.errors import OutputExistsError, RequirementError
from synthkit.runtime import Runtime
from synthkit.synthesis.base import BankFacts, Requires, Task, requirements
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.identity import bank_spec, planned_images, planned_shard
from synthkit.synthesis.record import RunRecord
from synthkit.synthesis.run import Evaluation, Run, announce
from synthkit.synthesis.shards import ShardRun, shards_of, worker_of
from synthkit.synthesis.sources import Source, teacher_specs
from synthkit.tables import lookup


def synthesize(config: SynthesizeConfig) -> Bank:
    """Make (or finish, with `resume`; or help to make, with `shards`) the bank that `config` describes.

    Raises:
        UsageError: the task is impossible or the output exists; nothing was written.
        RunError: training diverged, memory ran out or the disk is full; committed shards stay valid.
        BankError: the bank to resume is damaged, was begun with another recipe, or another run makes these shards.
    """
    method_class = lookup("method", config.method_name)
    requires = requirements(method_class, config.method)
    if config.curriculum == "auto":
        config = replace(config, curriculum=getattr(method_class, "default_curriculum", "easy2hard"))
    if config.shards and worker_of(config.shards) and not requires.shardable:
        raise RequirementError(
            f"--shards: the shards of {config.method_name} are not independent, one process makes them in order",
            hint="run whole banks with different seeds (--seed 1 --out A, --seed 2 --out B, ...), then join them:"
            " synthkit bank merge A B --out BANK",
        )
    runtime = Runtime.create(config.runtime)
    worker = share_of(config, runtime) if requires.shardable else None
    curriculum = Curriculum.named(config.curriculum)
    source = Source.load(config, method_class, runtime)
    out = Path(config.out) if config.out else default_out(config)
    _refuse_existing(config, out, runtime)
    early: list[str] = []  # what the method warns of while it is built, before there is a run to note it
    images = planned_images(config, source.spec, method_class)
    task = Task(
        teachers=source.teachers,
        images=images,
        curriculum=curriculum,
        seed=config.seed,
        runtime=runtime,
        warn=early.append,
        data=source.data,
        spec=source.spec,
        images_per_shard=planned_shard(config, images, source.spec, method_class),
        networks={name: network.view for name, network in source.networks.items()},
        extra={"teacher_arch": source.teacher_models[0].card.arch} if source.teachers else {},
    )
    _introduce(config, requires, runtime)
    method = method_class(config.method, task)
    facts: BankFacts = method.facts() if hasattr(method, "facts") else BankFacts()
    spec = bank_spec(config, source, method_class, task, facts)
    evaluation = Evaluation(config.eval_data, task.teacher) if config.eval_data and source.teachers else None
    _say_accuracy(config, runtime, evaluation)
    writer = BankWriter.open_or_create(out, spec) if config.resume or worker else BankWriter.create(out, spec)
    if facts.transform:
        writer.write_transform(facts.transform[1])
    record = RunRecord(out / "workers" / f"{worker[0]}-of-{worker[1]}" if worker else out, config, runtime)
    shards = shards_of(worker, writer.shards)
    with writer.claim(shards) if worker else writer.lock():
        if requires.shardable:
            run: Any = ShardRun(writer, method, task, record, shards)
            if not writer.committed():
                announce(method, writer, record)
        else:
            licence = source.teacher_models[0].card.licence if source.teachers else None
            run = Run(writer, method, task, record, evaluation, licence)
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


def _introduce(config: SynthesizeConfig, requires: Requires, runtime: Runtime) -> None:
    parts = [config.method_name]
    if config.teacher:
        parts.append(f"on {config.teacher}")
    if config.data:
        parts.append(f"from {config.data}")
    if requires.curriculum:
        parts.append(f"with curriculum {config.curriculum}")
    runtime.say(f"{' '.join(parts)}; {runtime.describe()}")


def _say_accuracy(config: SynthesizeConfig, runtime: Runtime, evaluation: Evaluation | None) -> None:
    if evaluation:
        runtime.say(f"teacher on {config.eval_data}: top-1 {100 * evaluation.teacher_top1:.2f} %")
        for warning in evaluation.warnings:
            runtime.say(f"warning: {warning}")


def _go_on(writer: BankWriter) -> str:
    made = len(writer.committed())
    return f"{made} of {writer.shards} shards are committed in {writer.path}; go on with the same command and --resume"


def default_out(config: SynthesizeConfig) -> Path:
    """banks/METHOD-TEACHER-HASH (without a teacher: METHOD-DATA-HASH)."""
    sources = teacher_specs(config.teacher) or [(config.data or "").partition(":")[0]]
    names = [Path(s).stem if "/" in s else s.split("@")[0].replace(":", "-") for s in sources if s]
    return Path("banks") / "-".join([config.method_name, *names, config_hash(config)[:8]])


def run_folder(config: SynthesizeConfig, bank: Path) -> Path:
    """Where the run that `config` describes keeps run.json and metrics.jsonl."""
    if not config.shards:
        return bank
    part, parts = worker_of(config.shards)
    return bank / "workers" / f"{part}-of-{parts}"
