"""One call for every kind of network: (noisy state, time, class) -> prediction, and from the last state to pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from synthkit.data.classes import check_classes
from synthkit.errors import ConfigError, ModelError, RequirementError
from synthkit.lazy import F, torch
from synthkit.synthesis.diffusion.checkpoints import Layout, load_network, load_vae
from synthkit.synthesis.diffusion.config import DiffusionConfig

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.runtime import Runtime


class Painter:
    """The networks of a checkpoint on the device of the run, frozen.

    Args:
        config: `classes`, `cfg` and the prompts.
        class_names: of the bank, in order; numbers where it has none.
    """

    def __init__(self, layout: Layout, config: DiffusionConfig, class_names: list[str], runtime: Runtime):
        self.layout, self.cfg, self.runtime, self.device = layout, config.cfg, runtime, runtime.device
        self.warning: str | None = None  # what the user should know about how the classes were matched
        self.conditions = self._conditions(config, class_names)
        network, vae = load_network(layout), load_vae(layout)
        self.network = network.to(self.device)
        self.vae: Any = vae.to(self.device) if vae is not None else None
        if runtime.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks the keyword
        if runtime.config.compile:
            self.network.compile()
        self.halved = int(layout.network.get("out_channels") or 0) == 2 * layout.state_shape[0]

    def _conditions(self, config: DiffusionConfig, class_names: list[str]) -> Tensor | None:
        """What the network is told for every class, and behind them (the last row) for "no class".

        Class numbers (K + 1,), text embeddings (K + 1, tokens, width), or None for an unconditional network.

        Raises:
            RequirementError: the checkpoint does not have what the config asks for; the message says what it has.
        """
        layout = self.layout
        if layout.kind == "text":
            from synthkit.synthesis.diffusion.text import embed_classes

            return embed_classes(layout, config, class_names, self.device)
        guided = config.cfg != 1
        if layout.num_classes is None:
            if guided or config.classes:
                raise RequirementError(f"{layout.folder}: the model is unconditional", hint="leave cfg and classes out")
            return None
        if guided and layout.null_class is None:
            raise RequirementError(
                f"{layout.folder}: the model has no 'no class' label, which classifier-free guidance needs",
                got=config.cfg,
                hint="leave --method.cfg out; teacher guidance works without",
            )
        classes, self.warning = matched_classes(layout, config.classes, class_names)
        null = 0 if layout.null_class is None else layout.null_class  # row 0 then stands in, and is never asked for
        return torch.tensor([*classes, null], device=self.device)

    def condition(self, labels: Tensor) -> Tensor | None:
        """What the network is told for labels (B,) of the bank; with classifier-free guidance (2 B): labels, nulls."""
        if self.conditions is None:
            return None
        if self.cfg == 1:
            return self.conditions[labels]
        return self.conditions[torch.cat([labels, torch.full_like(labels, len(self.conditions) - 1)])]

    def __call__(self, state: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        """The network's prediction (B, C, H, W), fp32: o_null + s (o_y - o_null) with classifier-free guidance.

        Args:
            state: (B, C, H, W), already scaled for the network.
            time: scalar on the device.
            condition: of `condition`.
        """
        guided = condition is not None and self.cfg != 1
        shown = torch.cat([state, state]) if guided else state
        if self.runtime.channels_last:
            shown = shown.contiguous(memory_format=torch.channels_last)
        with self.runtime.autocast():
            output = self._forward(shown, time.expand(len(shown)), condition).float()
        if self.halved:
            output = output.chunk(2, dim=1)[0]  # the second half is the learnt variance
        if guided:
            with_class, without = output.chunk(2)
            output = without + self.cfg * (with_class - without)
        return output

    def _forward(self, shown: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        if self.layout.kind == "text":
            return self.network(shown, time, encoder_hidden_states=condition, return_dict=False)[0]
        if self.layout.kind == "dit":
            return self.network(shown, timestep=time, class_labels=condition, return_dict=False)[0]
        return self.network(shown, time, class_labels=condition, return_dict=False)[0]

    def decode(self, state: Tensor) -> Tensor:
        """[0, 1] images (B, C, H, W) of clean states, not clamped; differentiable."""
        if self.vae is not None:
            with self.runtime.autocast():
                state = self.vae.decode(state / self.vae.config.scaling_factor, return_dict=False)[0].float()
        low, high = self.layout.card.pixel_range if self.layout.card else (-1.0, 1.0)
        return (state - low) / (high - low)


def matched_classes(
    layout: Layout, given: tuple[int, ...] | None, class_names: list[str]
) -> tuple[list[int], str | None]:
    """(the model's class for every class of the bank, a warning or None): as given, else by name, else by number.

    Raises:
        ConfigError: the given classes are too few, too many or unknown to the model.
        DataError: the names or numbers of classes do not fit.
    """
    known = layout.num_classes or 0
    if given is None:
        names = layout.names if layout.names and len(layout.names) == known else None
        fit = check_classes(names, class_names, known)
        return fit.mapping, fit.warning
    if len(given) != len(class_names):
        raise ConfigError(f"method.classes: the bank has {len(class_names)} classes", got=given)
    if not all(0 <= number < known for number in given):
        raise ConfigError(f"method.classes: the model's classes are 0 to {known - 1}", got=given)
    return list(given), None


def fitted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images (B, C, h, w) in the size of the bank: antialiased bilinear scaling; differentiable.

    Raises:
        ModelError: the numbers of channels differ.
    """
    if images.shape[1] != shape[0]:
        raise ModelError(
            f"the diffusion model paints {images.shape[1]} channel(s), the bank holds {shape[0]}",
            hint="use a teacher and a diffusion model of the same kind of images",
        )
    if images.shape[2:] == torch.Size(shape[1:]):
        return images
    return F.interpolate(images, shape[1:], mode="bilinear", antialias=True, align_corners=False)
