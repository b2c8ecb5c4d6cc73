"""Contracts of the synthesis engine: what a method receives, what it yields, what it declares.

A method is a class in its own file with a nested frozen `Config` dataclass and the attributes of `Synthesizer`; the
table `synthkit.tables.METHODS` names it. It never opens a file and never knows the bank.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from synthkit.lazy import np, torch
from synthkit.synthesis.curriculum import Curriculum

if TYPE_CHECKING:
    from torch import Tensor, nn

    from synthkit.data.real import RealData
    from synthkit.models.view import ModelView, TeacherView
    from synthkit.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Requires:
    """What a method cannot work without; the engine refuses an impossible task before any work."""

    teacher: bool = True
    """A trained classifier."""
    batchnorm: bool = False
    """BatchNorm layers in the teacher."""
    real_data: bool = False
    """A real dataset."""
    optional_data: bool = False
    """Real data is used when it is given."""
    max_teachers: int = 1
    """Teachers that the method can listen to at once."""
    networks: tuple[str, ...] = ()
    """Fields of the config that may name a further network (a verifier, a fixed student): the engine loads them."""
    grad: bool = True
    """Gradients through the teacher (a black-box teacher has none)."""
    shardable: bool = False
    """Shards are independent (`generate_shard` makes one alone), so `--shards I/N` may split the work."""
    curriculum: bool = True
    """Whether the curriculum changes what is made; else it is no part of the recipe."""


@dataclass(frozen=True, kw_only=True)
class Makes:
    """What kind of bank a method makes; the bank, its card and every copy of it say so."""

    label_kind: Literal["argmax", "target", "real"] = "argmax"
    """What the labels mean. Argmax without a teacher means that there are none."""
    contains_real: bool = False
    """Whether the images are, or start from, real pixels of the task's data."""
    at_once: bool = False
    """Whether all images come at the end, so that many small shards would save nothing."""


@dataclass(frozen=True, kw_only=True)
class BankFacts:
    """What a method knows, once it is built, that belongs into the record of its bank."""

    identity: dict[str, Any] = field(default_factory=dict)
    """JSON data that decides the images and stands nowhere in the config (hash of a checkpoint, of a buffer)."""
    transform: tuple[str, dict[str, np.ndarray], dict[str, Any]] | None = None
    """(kind, arrays, further facts) of the space in which `ImageBatch.pixels` live; none is pixel space."""
    real_data_used: bool | None = None
    """Set where the method looked at real data in a way that the engine cannot see (a checkpoint trained on it)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping; not part of the identity."""


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What images of a task look like and which classes they have: the teacher's word, else the data's."""

    shape: tuple[int, int, int]
    """(C, H, W)."""
    num_classes: int
    """Number of classes."""
    mean: list[float]
    """Channel means for normalisation, in [0, 1] pixel space."""
    std: list[float]
    """Channel standard deviations."""
    class_names: list[str] | None = None
    """One name per class."""


@dataclass(kw_only=True)
class ImageBatch:
    """What flows from a synthesizer to the bank: images in [0, 1] (or uint8), never normalised."""

    images: Tensor
    """(B, C, H, W) uint8, or float in [0, 1]."""
    labels: Tensor | None = None
    """(B,) int64: intended class or the teacher's argmax."""
    logits: Tensor | None = None
    """(B, K) teacher logits of exactly these (quantised) images."""
    difficulty: Tensor | None = None
    """(B,) float, e.g. the KD loss of a reference student."""
    step: int = 0
    """Step of the method at which the images were made."""
    pixels: Tensor | None = None
    """(B, C, H, W) float: the pixels to train on, where they leave [0, 1] or live behind the transform of `BankFacts`;
    `images` then is their viewable form."""
    meta: dict[str, float] = field(default_factory=dict)
    """Figures for the record of the shard; `learning_rate` is the learnt step size of a distilled set."""


@dataclass(kw_only=True)
class Snapshot:
    """A generator state that the bank keeps, so that fresh images can be drawn from it later."""

    step: int
    """Step of the method at which it was taken."""
    spec: dict[str, Any]
    """Arguments of `models.generators.build_generator`."""
    state: dict[str, Tensor]
    """Its state dict."""


@dataclass(kw_only=True)
class Task:
    """Everything a method may use."""

    teachers: list[TeacherView]
    """Frozen classifiers; most methods take exactly one."""
    images: int
    """Images that the bank asks for."""
    curriculum: Curriculum
    """What gets harder, and how."""
    seed: int
    """Base seed; draw through `rng`."""
    runtime: Runtime
    """Device, precision, ranks."""
    log: Any = None
    """Called with a dict of figures now and then (may be None)."""
    warn: Any = None
    """Called with a text when something looks wrong (may be None)."""
    tick: Any = None
    """Called with the number of steps done since the last call, for the progress line (may be None)."""
    eval_hook: Any = None
    """Called with the co-trained student view; returns diagnostic figures or None. Never used for decisions."""
    keep_student: Any = None
    """Called at the end of an epoch with (co-trained student view, its steps), so that states of it can be kept."""
    earlier: Any = None
    """`earlier(n)`: the first n images that the method yielded, (n, C, H, W) uint8, read back from the bank; none where
    there is no bank, and the method must carry in its state what it needs of them."""
    data: RealData | None = None
    """Real images in the teacher's size and class order, or none; only for methods that declare it."""
    spec: ImageSpec | None = None
    """Size and classes of the images; none takes the teacher's (see `image_spec`)."""
    images_per_shard: int | None = None
    """Images in every shard but the last; none is one shard."""
    networks: dict[str, TeacherView] = field(default_factory=dict)
    """Further frozen networks by the config field that names them (see `Requires.networks`)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Family-specific parts (the teacher's architecture, ...)."""

    @property
    def teacher(self) -> TeacherView:
        """The only, or first, teacher."""
        return self.teachers[0]

    @property
    def image_spec(self) -> ImageSpec:
        """Size and classes of the images to make."""
        if self.spec is not None:
            return self.spec
        t = self.teacher
        return ImageSpec(
            shape=t.input_size, num_classes=t.num_classes, mean=t.mean, std=t.std, class_names=t.class_names
        )

    @property
    def per_shard(self) -> int:
        """Images in every shard but the last."""
        return self.images_per_shard or self.images

    def seed_of(self, name: str) -> int:
        """A 63-bit seed for the stream called `name`, independent of all other streams."""
        sequence = np.random.SeedSequence([self.seed, zlib.crc32(name.encode())])
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def numpy_rng(self, name: str, *numbers: int) -> np.random.Generator:
        """A numpy generator for the stream called `name` and the place `numbers` in it (a shard, a row, a class)."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, zlib.crc32(name.encode()), *numbers]))

    def rng(self, name: str, device: Any = None) -> torch.Generator:
        """A torch generator for the stream called `name` on the run's device."""
        generator = torch.Generator(device=device or self.runtime.device)
        generator.manual_seed(self.seed_of(name))
        return generator


class Synthesizer(Protocol):
    """One synthesis method."""

    requires: ClassVar[Requires]
    makes: ClassVar[Makes] = Makes()
    Config: ClassVar[type]
    step: int
    total_steps: int

    def __init__(self, config: Any, task: Task): ...

    def generate(self) -> Iterator[ImageBatch | None]:
        """Yield `task.images` images in all; while paused at a yield, `state_dict` is enough to go on.

        A yielded None is a safe point without images: a method whose images come late (or all at the end) offers them
        often, and the engine stores the state there now and then.
        """
        ...

    # With `Requires(shardable=True)` also:
    # def generate_shard(self, index: int, count: int) -> Iterator[ImageBatch]:
    #     """Yield the `count` images of shard `index`, a pure function of (seed, index); no state is kept."""

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors, numbers and strings."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        ...

    # Where they apply:
    # @classmethod
    # def requires_for(cls, config) -> Requires: what it needs with this config
    # @classmethod
    # def makes_for(cls, config) -> Makes: what bank it makes with this config
    # places: ClassVar[tuple[str, ...]]: config fields that say where something lies, no part of the bank's identity
    # @classmethod
    # def image_spec_for(cls, config) -> ImageSpec | None: size and classes, where the method itself brings them
    # def facts(self) -> BankFacts: for the record of the bank

    def estimate(self) -> dict[str, float]:
        """{"seconds", "memory_bytes"} that the whole run will take, measured on a small throw-away piece."""
        ...

    def snapshot(self) -> Snapshot | None:
        """The generator as it is now, or None where the method has none."""
        ...

    def student(self) -> ModelView | None:
        """The co-trained student, or None where the method has none."""
        ...


def requirements(method: Any, config: Any) -> Requires:
    """What `method` (a class) cannot work without when it runs with `config`."""
    return method.requires_for(config) if hasattr(method, "requires_for") else method.requires


def makes_of(method: Any, config: Any) -> Makes:
    """What kind of bank `method` (a class) makes when it runs with `config`."""
    return method.makes_for(config) if hasattr(method, "makes_for") else getattr(method, "makes", Makes())


def flatten_state(state: dict[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a nested state into flat tensors (for safetensors) and plain values (for JSON)."""
    tensors: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            inner_tensors, inner_plain = flatten_state(value, name + "\x1f")
            tensors.update(inner_tensors)
            plain.update(inner_plain)
        elif hasattr(value, "detach"):
            tensors[name] = value.detach()
        else:
            plain[name] = value
    return tensors, plain


def unflatten_state(tensors: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten_state`."""
    state: dict[str, Any] = {}
    for name, value in {**plain, **tensors}.items():
        *path, last = name.split("\x1f")
        node = state
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return state


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state as a nested dict with string keys (hyper-parameters of the groups included)."""
    raw = optimizer.state_dict()
    groups = {
        str(i): {k: list(v) if isinstance(v, tuple) else v for k, v in g.items() if k != "params"}
        for i, g in enumerate(raw["param_groups"])
    }
    return {"state": {str(k): dict(v) for k, v in raw["state"].items()}, "groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Inverse of `optimizer_state` on a freshly built optimiser over the same parameters."""
    raw = optimizer.state_dict()
    for i, group in enumerate(raw["param_groups"]):
        group.update(state.get("groups", {}).get(str(i), {}))
    raw["state"] = {int(k): v for k, v in state.get("state", {}).items()}
    optimizer.load_state_dict(raw)
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            # laid out as in an uninterrupted run, where it was made like its (channels-last) parameter: same kernels
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] float to the nearest of 256 levels; values outside are clamped. Same shape, uint8."""
    return images.detach().float().clamp(0, 1).mul(255).round_().to(torch.uint8)


def widened(values: Tensor) -> Tensor:
    """Half precisions (autocast) as float32, so that losses are summed in it; float32 and float64 stay as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def seeded_init(build: Any, seed: int) -> nn.Module:
    """Build a network with its default initialisation drawn from `seed`, leaving the global generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach every accelerator as well
        return build()
