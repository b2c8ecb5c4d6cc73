"""What a bank is made from: teachers, further networks and real data, loaded and checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.config.schema import SynthesizeConfig
from synthkit.errors import RequirementError
from synthkit.runtime import Runtime
from synthkit.synthesis.base import ImageSpec, Requires, requirements

if TYPE_CHECKING:
    from synthkit.data.real import RealData
    from synthkit.models.build import LoadedModel
    from synthkit.models.view import TeacherView


@dataclass(frozen=True)
class Network:
    """A further network that the config of a method names."""

    spec: str
    loaded: LoadedModel
    view: TeacherView


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a bank is made from."""

    spec: ImageSpec
    """Size and classes of its images: the teacher's word, else the data's, else the method's."""
    teacher_models: list[LoadedModel] = field(default_factory=list)
    teachers: list[TeacherView] = field(default_factory=list)
    networks: dict[str, Network] = field(default_factory=dict)
    data: RealData | None = None

    @classmethod
    def load(cls, config: SynthesizeConfig, method_class: Any, runtime: Runtime) -> Source:
        """Load what `config` names, and refuse what the method cannot do.

        Raises:
            RequirementError: something is missing or too much, or the teacher lacks what the method needs; the message
                has the remedy.
            ModelError, DataError: one of them cannot be loaded, or their classes do not fit.
        """
        requires = requirements(method_class, config.method)
        specs = teacher_specs(config.teacher)
        if len(specs) > requires.max_teachers:
            raise RequirementError(
                f"{config.method_name} listens to {requires.max_teachers} teacher(s)",
                got=config.teacher,
                hint="give fewer, or choose a method that takes several, such as deepinversion",
            )
        models, teachers = [], []
        for text in specs:
            loaded, view = _load(text, runtime)
            check_requirements(config.method_name, requires, view)
            models.append(loaded)
            teachers.append(view)
        if not teachers:
            check_requirements(config.method_name, requires, None)
        _check_alike(specs, teachers)
        takes_data = requires.real_data or requires.optional_data
        if config.data and teachers and not takes_data:
            hint = "leave --data out, or choose a method that does, such as random_real"
            raise RequirementError(f"{config.method_name} does not look at real data", got=config.data, hint=hint)
        data = _real_data(config.data, teachers[0] if teachers else None, runtime) if config.data else None
        spec = _image_spec(config, method_class, teachers, data)
        networks = {
            name: _network(name, getattr(config.method, name), spec, runtime)
            for name in requires.networks
            if getattr(config.method, name) is not None
        }
        return cls(spec=spec, teacher_models=models, teachers=teachers, networks=networks, data=data)


def teacher_specs(text: str | None) -> list[str]:
    """The model specs in `--teacher A,B`; a file whose name holds a comma is one."""
    if not text:
        return []
    return [text] if Path(text).exists() else [part.strip() for part in text.split(",") if part.strip()]


def _load(text: str, runtime: Runtime) -> tuple[LoadedModel, TeacherView]:
    from synthkit.models.build import load_model
    from synthkit.models.view import TeacherView

    loaded = load_model(text, weights="required")
    return loaded, TeacherView.from_loaded(loaded).to(runtime.device, channels_last=runtime.channels_last)


def _check_alike(specs: list[str], teachers: list[TeacherView]) -> None:
    for text, teacher in zip(specs[1:], teachers[1:], strict=True):
        first = teachers[0]
        if (teacher.input_size, teacher.num_classes) != (first.input_size, first.num_classes):
            raise RequirementError(
                f"teacher {text!r} takes {teacher.input_size} images of {teacher.num_classes} classes,"
                f" {specs[0]!r} takes {first.input_size} of {first.num_classes}",
                hint="several teachers must take the same images and know the same classes",
            )


def _network(name: str, text: str, spec: ImageSpec, runtime: Runtime) -> Network:
    loaded, view = _load(text, runtime)
    if (view.input_size, view.num_classes) != (spec.shape, spec.num_classes):
        raise RequirementError(
            f"method.{name}: {text!r} takes {view.input_size} images of {view.num_classes} classes,"
            f" the bank holds {spec.shape} of {spec.num_classes}",
            hint="name a network of the same input size and classes",
        )
    return Network(text, loaded, view)


def _image_spec(
    config: SynthesizeConfig, method_class: Any, teachers: list[TeacherView], data: RealData | None
) -> ImageSpec:
    if teachers:
        t = teachers[0]
        return ImageSpec(
            shape=t.input_size, num_classes=t.num_classes, mean=t.mean, std=t.std, class_names=t.class_names
        )
    if data is not None:
        mean, std = data_stats(config.data or "", data)
        return ImageSpec(
            shape=data.shape, num_classes=data.num_classes, mean=mean, std=std, class_names=list(data.class_names)
        )
    own = method_class.image_spec_for(config.method) if hasattr(method_class, "image_spec_for") else None
    if own is None:
        raise RequirementError(
            f"{config.method_name} must know the size of the images and the classes",
            hint="give --teacher, or --data for its size and classes alone",
        )
    return own


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
