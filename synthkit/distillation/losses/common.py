"""What the loss files share: the reduction over samples and the check of a temperature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthkit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def reduce(values: Tensor, reduction: str) -> Tensor:
    """(B,) values as they are ("none") or their mean over samples ("mean").

    Raises:
        ConfigError: another reduction was asked for.
    """
    if reduction == "none":
        return values
    if reduction == "mean":
        return values.mean()
    raise ConfigError("reduction: not known", got=reduction, allowed=["none", "mean"])


def scaled(values: Tensor, temperature: float, t_squared: bool) -> Tensor:
    """Values that carry the factor T^2, with it or without."""
    return values if t_squared else values / temperature**2


def check_temperature(temperature: float) -> None:
    """A temperature must be a positive number.

    Raises:
        ConfigError: it is not.
    """
    if not temperature > 0:
        raise ConfigError("loss.temperature must be above 0", got=temperature, hint="4 is usual; 1 leaves the logits")
