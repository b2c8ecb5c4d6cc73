"""Which modules of a network are its stages: the declared ones, else a rule that works on any network.

A network of the house declares `tap_points` (stem, ends of the stages, input of the classifier; with `stemless = True`
there is no stem) and, where "before the last ReLU" is not simply that, `preact_points`, one per stage.

Rule for all other networks (torchvision, timm): watch one forward of zeros. A stage end is the last output of its
spatial size, where
- a unit that at most halves the side (a residual block, a transition, a whole stage) counts with its end only;
- poolings, dropouts and identities do not count, nor what comes after the pooling to 1x1;
- the first layer alone (fewer than two layers with weights so far) is the stem and no stage.
So a closing 1x1 convolution (MobileNet, EfficientNet, ShuffleNet) or LayerNorm (Swin) is part of the last map, and a
ViT, all of whose blocks have one size, has one map. Maps may be (B, C, h, w), channels-last (B, h, w, C), or tokens
(B, N, D) with N = h w or h w + 1, where the first token is the class and is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from synthkit.errors import ConfigError, ModelError, nearest
from synthkit.models.view import ModelView

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish)
_NO_STAGE = (nn.Identity, _DropoutNd, _MaxPoolNd, _AvgPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)
_PRE = "@pre"

Layout = Literal["nchw", "nhwc", "tokens", "class+tokens"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One tensor to read in a forward pass."""

    name: str
    """How messages and `TapSet.names` call it."""
    path: str
    """The module whose input or output it is."""
    before: bool = False
    """Its input, not its output."""
    calls: int = 1
    """How often the module is called in a forward."""
    which: int = 0
    """The call that is read."""
    copy: bool = False
    """Whether the network overwrites the tensor later (in-place ReLU), so that it must be copied."""
    layout: Layout = "nchw"
    shape: tuple[int, int, int] = (0, 0, 0)
    """(C, h, w) as a map."""


@dataclass(eq=False, kw_only=True)
class _Call:
    """One call of one module during the probe."""

    path: str
    module: nn.Module
    parents: tuple[_Call, ...]
    given: Tensor | None
    given_version: int = 0
    out: Tensor | None = None
    out_version: int = 0
    which: int = 0
    layers: int = 0
    """Layers with weights that had run when it ended."""


@dataclass
class Probe:
    """What one forward of two zero images in eval mode called, in the order in which the calls ended.

    The network is left as it was: modes, buffers and hooks. Holds every activation of the pass, so it should not live
    longer than the search for taps.
    """

    view: ModelView
    calls: list[_Call] = field(default_factory=list)

    def __post_init__(self):
        module = self.view.module
        modes = [(m, m.training) for m in module.modules()]
        handles, stack, counts = [], [], {}
        layers = 0

        def enter(path: str):
            def hook(layer: nn.Module, args: tuple) -> None:
                given = next((a for a in args if isinstance(a, Tensor)), None)
                version = 0 if given is None else given._version
                call = _Call(path=path, module=layer, parents=tuple(stack), given=given, given_version=version)
                stack.append(call)

            return hook

        def leave(layer: nn.Module, args: tuple, out: object) -> None:
            nonlocal layers
            call = stack.pop()
            layers += any(p.ndim >= 2 for p in layer.parameters(recurse=False))
            call.layers, call.which = layers, counts.get(call.path, 0)
            counts[call.path] = call.which + 1
            if isinstance(out, Tensor):
                call.out, call.out_version = out, out._version
            self.calls.append(call)

        for path, layer in module.named_modules():
            if path:
                handles += [layer.register_forward_pre_hook(enter(path)), layer.register_forward_hook(leave)]
        weight = next(module.parameters(), torch.empty(0))
        zeros = torch.zeros(2, *self.view.input_size, device=weight.device, dtype=weight.dtype)
        try:
            module.eval()
            with torch.no_grad():
                # `forward`, not the call: a compiled network would skip the hooks
                module.forward(self.view.normalize(zeros))
        finally:
            for handle in handles:
                handle.remove()
            for m, mode in modes:
                m.training = mode

    def called(self, path: str) -> list[_Call]:
        """The calls of one module, in order."""
        return [call for call in self.calls if call.path == path]

    def layout(self, tensor: Tensor | None) -> tuple[Layout, tuple[int, int, int]] | None:
        """How a tensor is a map, and its (C, h, w); None where it is none."""
        if tensor is None or tensor.shape[0] != 2:
            return None
        if tensor.ndim == 4:
            _, a, b, c = tensor.shape
            aspect = self.view.input_size[1] / self.view.input_size[2]
            if abs(b / c - aspect) <= abs(a / b - aspect):
                return "nchw", (a, b, c)
            return "nhwc", (c, a, b)
        if tensor.ndim == 3:
            _, tokens, width = tensor.shape
            side = math.isqrt(tokens)
            if side * side == tokens:
                return "tokens", (width, side, side)
            side = math.isqrt(tokens - 1)
            if side * side == tokens - 1:
                return "class+tokens", (width, side, side)
        return None

    def reading(self, name: str, call: _Call, *, before: bool = False) -> Reading | None:
        """How to read the input or output of a call as a map; None where that is no map."""
        tensor, version = (call.given, call.given_version) if before else (call.out, call.out_version)
        found = self.layout(tensor)
        if found is None or tensor is None:
            return None
        # an in-place dropout overwrites in training only, which the probe in eval mode does not see
        overwritten = any(
            c.given is tensor and getattr(c.module, "inplace", False) and (c.given_version >= version)
            for c in self.calls
        )
        return Reading(
            name=name,
            path=call.path,
            before=before,
            calls=len(self.called(call.path)),
            which=call.which,
            copy=overwritten or tensor._version != version,
            layout=found[0],
            shape=found[1],
        )

    def last_activation(self, call: _Call) -> _Call | None:
        """The call of an activation module that made the output of `call`."""
        made = [
            c
            for c in self.calls
            if isinstance(c.module, ACTIVATIONS)
            and (c is call or call in c.parents)
            # an in-place ReLU hands on the tensor that it was given, and a sum may still be added to it
            and c.out is call.out
            and c.out_version == call.out_version
        ]
        return made[-1] if made else None

    def stage_ends(self) -> list[_Call]:
        """The rule of the module's docstring; the first entry may be the stem (`layers` below 2)."""
        ends: dict[tuple[int, int], _Call] = {}
        for call in self.calls:
            size, source = self._side(call.out), self._side(call.given)
            if size is None or isinstance(call.module, _NO_STAGE) or self._pools(call, size, source):
                continue
            if size == (1, 1) and source == (1, 1):
                continue
            if any(self._is_unit(p) and self._side(p.out) != size for p in call.parents):
                continue
            if not self._is_unit(call) and any(True for _ in call.module.children()):
                continue  # the whole trunk: its last unit has the same output and the better name
            ends[size] = call
        linear = any(isinstance(m, nn.Linear) for m in self.view.module.modules())
        by_end = [call for call in self.calls if call in ends.values()]
        logits = [c for c in by_end if not linear and self._channels(c) == self.view.num_classes]
        return [call for call in by_end if call not in logits]

    def _side(self, tensor: Tensor | None) -> tuple[int, int] | None:
        found = self.layout(tensor)
        return None if found is None else found[1][1:]

    def _channels(self, call: _Call) -> int:
        found = self.layout(call.out)
        return 0 if found is None else found[1][0]

    def _is_unit(self, call: _Call) -> bool:
        """Whether the side is at most halved from its input to its output."""
        source, size = self._side(call.given), self._side(call.out)
        return source is not None and size is not None and source[0] <= 2 * size[0] + 1

    @staticmethod
    def _pools(call: _Call, size: tuple[int, int], source: tuple[int, int] | None) -> bool:
        return source is not None and size != source and not any(True for _ in call.module.parameters())


class StageTable:
    """Stages of one network by name: "stem", "stage1" to "stageN", "last", and any dotted path, each with "@pre"."""

    def __init__(self, probe: Probe):
        self.probe, module = probe, probe.view.module
        self._modules = {name for name, _ in module.named_modules() if name}
        declared: Sequence[str] = getattr(module, "tap_points", ())
        ends = [(path, call) for path in declared for call in probe.called(path)[-1:] if probe.layout(call.out)]
        if len(ends) > 0:
            has_stem = not getattr(module, "stemless", False)
        else:
            ends = [(call.path, call) for call in probe.stage_ends()]
            has_stem = bool(ends) and ends[0][1].layers < 2
        self.stem = ends[0][0] if has_stem else None
        self.stages = [path for path, _ in ends[has_stem:]]
        self.preact: dict[str, str] = {}
        if len(own := getattr(module, "preact_points", ())) == len(self.stages):
            self.preact = dict(zip(self.stages, own, strict=True))
        self._calls = {path: call for path, call in ends}

    def maps(self, points: Sequence[str] | None) -> list[Reading]:
        """Readings of the named points, or of the conventional stages.

        Raises:
            ModelError: there are no stages.
            ConfigError: a point is unknown or cannot be read.
        """
        if points is None and not self.stages:
            raise ModelError(
                f"{self.probe.view.name} has no feature maps", hint="use a loss on logits or on pooled features"
            )
        if points is None:
            return [self._read(path, conventional=True) for path in self.stages]
        return [self._read(point) for point in points]

    def preacts(self, points: Sequence[str] | None) -> list[Reading]:
        """The same before the last activation; a map that ends in none (linear bottleneck, LayerNorm) as it is."""
        found = []
        for reading in self.maps(points):
            point = reading.name.removesuffix(_PRE)
            if point in self.preact:
                found.append(replace(self._read(self.preact[point]), name=point + _PRE))
                continue
            call = self.probe.called(point)[0] if point not in self._calls else self._calls[point]
            active = self.probe.last_activation(call)
            before = None if active is None else self.probe.reading(point + _PRE, active, before=True)
            found.append(before or reading)
        return found

    def _path(self, plain: str) -> str:
        """The dotted path behind a stage name; a module that is really called so goes first."""
        if plain in self._modules:
            return plain
        if plain == "last" and self.stages:
            return self.stages[-1]
        if plain == "stem" and self.stem is not None:
            return self.stem
        number = plain.removeprefix("stage")
        if plain != number and number.isdecimal() and 1 <= int(number) <= len(self.stages):
            return self.stages[int(number) - 1]
        return plain

    def _read(self, point: str, *, conventional: bool = False) -> Reading:
        who, pre = self.probe.view.name, point.endswith(_PRE)
        path = self._path(point.removesuffix(_PRE))
        if path not in self._modules:
            raise ConfigError(f"{who}: no such point to read features at", got=point, hint=self._offer(path))
        calls = self.probe.called(path)
        if not calls:
            raise ConfigError(f"{who}: {path} is not called in a forward", got=point, hint=self._offer(path))
        if len(calls) > 1 and not conventional:
            raise ConfigError(
                f"{who}: {path} is called {len(calls)} times in a forward", got=point, hint=self._offer(path)
            )
        call = self._calls.get(path, calls[-1])
        if not pre:
            reading = self.probe.reading(path, call)
        elif path in self.preact:
            reading = replace(self._read(self.preact[path]), name=path + _PRE)
        else:
            active = self.probe.last_activation(call)
            if active is None:
                raise ConfigError(
                    f"{who}: {path} does not end in a ReLU module", got=point, hint=f"leave {_PRE} out: it is linear"
                )
            reading = self.probe.reading(path + _PRE, active, before=True)
        if reading is None:
            shape = tuple(call.out.shape[1:]) if call.out is not None else type(call.out).__name__
            raise ConfigError(f"{who}: {path} gives {shape}, no map", got=point, hint=self._offer(path))
        return reading

    def _offer(self, path: str) -> str:
        """Candidates with their shapes, the nearest names first."""
        once = [c for c in self.probe.calls if len(self.probe.called(c.path)) == 1 and len(c.parents) < 2]
        shapes = {c.path: found[1] for c in [*once, *self._calls.values()] if (found := self.probe.layout(c.out))}
        names = [*nearest(path, shapes, n=4), *self.stages, *shapes]
        shown = [f"{name} ({'x'.join(map(str, shapes[name]))})" for name in dict.fromkeys(names) if name in shapes]
        stages = f"stage1 to stage{len(self.stages)}, last" if self.stages else "none"
        return f"stages: {stages}; candidates: {', '.join(shown[:12])}"


def classifier_reading(probe: Probe) -> Reading:
    """The input of the last linear layer, `shape` (D, 1, 1).

    Raises:
        ModelError: there is no linear layer that gives the logits.
    """
    view = probe.view
    remedy = "use a loss that needs no pooled features, or a network with a linear classifier"
    linears = [(name, m) for name, m in view.module.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ModelError(f"{view.name} has no linear classifier, so no pooled features", hint=remedy)
    path, layer = linears[-1]
    calls = probe.called(path)
    if layer.out_features != view.num_classes or len(calls) != 1:
        raise ModelError(
            f"{view.name}: the last linear layer {path} is not its classifier",
            got=f"{layer.out_features} outputs for {view.num_classes} classes, {len(calls)} call(s) in a forward",
            hint=remedy,
        )
    given = calls[0].given
    if given is None or given.flatten(1).shape[1] != layer.in_features:
        raise ModelError(f"{view.name}: the classifier {path} sees more than one vector per image", hint=remedy)
    return Reading(name="pooled", path=path, before=True, shape=(layer.in_features, 1, 1))
