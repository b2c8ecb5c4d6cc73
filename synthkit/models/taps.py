"""Features of a network beside its logits, for the losses that compare them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from synthkit.distillation.contract import FEATURES, Shapes, Taps
from synthkit.errors import ConfigError, ModelError
from synthkit.models.tap_points import Probe, Reading, StageTable, classifier_reading
from synthkit.models.view import ModelView


class TapSet:
    """Where features are read in one network.

    Args:
        view: the network; its modules are looked up by path at every call, so it may be moved, loaded or compiled.
        wanted: of "pooled" (input of the last linear layer), "maps" (ends of the stages, the stem left out), "preact"
            (the same before each stage's last activation; WRN: through the BatchNorm that follows; a stage that ends
            in no activation module: unchanged).
        points: where maps are read: dotted module paths or "stem", "stage1" ... "stageN", "last", each with "@pre"
            for before its final ReLU. None is the convention: see `synthkit.models.tap_points`.

    Shapes: images (B, C, H, W) to `Taps` with logits (B, K) float32, pooled (B, D), maps [(B, C, h, w)] from fine to
    coarse in the network's own dtype; tokens (B, N, D) become maps (B, D, h, w).

    Hooks exist during a call only. After `module.compile()` hooks on its parts do not fire, so this class then
    compiles the forward with its readings once more (one further compilation per mode and shape; no graph breaks and
    no recompilation from call to call).

    Raises:
        ConfigError: `wanted` or a point is unknown, or cannot be read.
        ModelError: the network has no maps or no linear classifier, though they are wanted.

    Source: method card `kd` 3.2, 3.3 and 11.10 (feature lists of HobbitLong/RepDistiller@b84f547,
    DefangChen/SimKD@2b389c3 and megvii-research/mdistiller@a08d46f without stem and pooled).
    Cost: two dictionary entries per reading and call; a copy of a map that an in-place ReLU would overwrite.
    """

    shapes: Shapes
    """Probed with zeros in eval mode; the network is left as it was."""
    names: list[str]
    """The dotted paths behind the maps (with "@pre" where asked), in order."""

    def __init__(self, view: ModelView, wanted: Collection[str], *, points: Sequence[str] | None = None):
        for feature in wanted:
            if feature not in FEATURES:
                raise ConfigError("taps: no such feature", got=feature, allowed=FEATURES)
        if points is not None and not points:
            raise ConfigError("taps: no point to read features at", hint='name some, as in "stage2" or "layer3.1"')
        self.view = view
        self.shapes, self.names = Shapes(), []
        self._pooled: list[Reading] = []
        self._maps: list[Reading] = []
        self._preact: list[Reading] = []
        if wanted:
            self._find(wanted, points)
        self._hooks: dict[tuple[str, bool], Callable[..., None]] = {}
        self._kept: dict[tuple[str, bool], list[Tensor]] = {}
        for key in {(r.path, r.before): None for r in self._readings()}:
            self._hooks[key] = self._hook(key)
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def __call__(self, images: Tensor) -> Taps:
        """Logits and features of [0, 1] images (B, C, H, W), from one forward.

        Raises:
            ModelError: a module was called more or less often than in the probe.
        """
        if not self._hooks:
            return Taps(logits=self.view(images).float())
        module = self.view.module
        handles = []
        try:
            for (path, before), hook in self._hooks.items():
                layer = module.get_submodule(path)
                handles.append(layer.register_forward_pre_hook(hook) if before else layer.register_forward_hook(hook))
            logits = self._forward(module)(self.view.normalize(images))
            return Taps(
                logits=logits.float(),
                pooled=self._take(self._pooled[0]).flatten(1) if self._pooled else None,
                maps=[as_map(self._take(r), r) for r in self._maps] or None,
                preact=[as_map(self._take(r), r) for r in self._preact] or None,
            )
        finally:
            for handle in handles:
                handle.remove()
            self._kept.clear()  # the graph must not outlive the step

    def _find(self, wanted: Collection[str], points: Sequence[str] | None) -> None:
        probe = Probe(self.view)
        if "pooled" in wanted:
            self._pooled = [classifier_reading(probe)]
            self.shapes.pooled = self._pooled[0].shape[0]
        if "maps" in wanted or "preact" in wanted:
            table = StageTable(probe)
            maps = table.maps(points)
            self.names = [r.name for r in maps]
            if "maps" in wanted:
                self._maps = maps
                self.shapes.maps = [r.shape for r in maps]
            if "preact" in wanted:
                self._preact = table.preacts(points)
                self.shapes.preact = [r.shape for r in self._preact]

    def _readings(self) -> list[Reading]:
        return [*self._pooled, *self._maps, *self._preact]

    def _hook(self, key: tuple[str, bool]) -> Callable[..., None]:
        copy = any(r.copy for r in self._readings() if (r.path, r.before) == key)

        def keep(layer: nn.Module, args: tuple, out: Any = None) -> None:
            tensor = args[0] if key[1] else out
            self._kept.setdefault(key, []).append(tensor.clone() if copy else tensor)

        return keep

    def _forward(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        if module._compiled_call_impl is None:
            return module
        if self._compiled is None:
            # through `forward`, for the compiled call was traced without our hooks
            self._compiled = torch.compile(lambda x: self.view.module.forward(x))
        return self._compiled

    def _take(self, reading: Reading) -> Tensor:
        kept = self._kept.get((reading.path, reading.before), [])
        if len(kept) != reading.calls:
            raise ModelError(
                f"{self.view.name}: {reading.path} is not called as often as when it was probed",
                got=f"{len(kept)} call(s) instead of {reading.calls}",
                hint="read the features elsewhere: the forward must not depend on the mode or the batch",
            )
        return kept[reading.which]


def as_map(tensor: Tensor, reading: Reading) -> Tensor:
    """(B, C, h, w) of what a module gave: channels-last turned, tokens laid out and the class token dropped."""
    if reading.layout == "nchw":
        return tensor
    if reading.layout == "nhwc":
        return tensor.permute(0, 3, 1, 2)
    tokens = tensor[:, 1:] if reading.layout == "class+tokens" else tensor
    return tokens.transpose(1, 2).unflatten(2, reading.shape[1:])
