"""From noise to an image: the samplers, built on the schedulers of diffusers but never on what they inherit.

A scheduler made `from_config` of another takes over values that were written to disk and forgets values that were
defaults in memory, so the same checkpoint may start at another time before and after it was saved. Here every
scheduler is made from the plain values of the checkpoint's file, with the spacing given explicitly.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from synthkit.errors import ConfigError
from synthkit.synthesis.diffusion.config import STEPS, DiffusionConfig

if TYPE_CHECKING:
    from torch import Generator, Tensor

_CLASSES = {
    "ddim": "DDIMScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "ddpm": "DDPMScheduler",
    "lcm": "LCMScheduler",
    "consistency": "CMStochasticIterativeScheduler",
}


class Sampler:
    """Times and update rule of one sampler.

    Args:
        config: what the run was told (`sampler`, `steps`, `spacing`, `eta`).
        trained: the checkpoint's scheduler_config.json.
        consistency: whether the network is a consistency model, which no other sampler fits.

    `abar[i]` is the share of signal (alpha bar) at step i; a consistency model has no such thing (None).
    """

    def __init__(self, config: DiffusionConfig, trained: dict[str, Any], *, consistency: bool):
        import diffusers

        self.name = config.sampler if config.sampler != "auto" else "consistency" if consistency else "ddim"
        if (self.name == "consistency") != consistency:
            raise ConfigError(
                f"method.sampler: {'only consistency samples' if consistency else 'consistency needs'} a consistency"
                " model",
                got=self.name,
                hint="leave --method.sampler out",
            )
        self.steps = config.steps or STEPS[self.name]
        self.prediction = trained.get("prediction_type", "epsilon")
        kind = getattr(diffusers, _CLASSES[self.name])
        known = inspect.signature(kind.__init__).parameters
        values = {key: value for key, value in trained.items() if key in known}
        if not consistency:
            values |= {"timestep_spacing": spacing_of(config.spacing, trained)}
        if self.name == "dpmpp":
            values |= {"algorithm_type": "dpmsolver++", "solver_order": 2, "variance_type": None}
        if self.name == "ddpm" and str(values.get("variance_type", "")).startswith("learned"):
            values |= {"variance_type": "fixed_small"}  # the network's own variances are cut off (DiT)
        self.scheduler = kind(**values)
        longest = self.scheduler.config.num_train_timesteps
        if self.steps > longest:
            raise ConfigError(f"method.steps: the model was trained with {longest} times", got=self.steps)
        self.extra = {"eta": config.eta} if self.name == "ddim" else {}
        self.restart()
        self.abar: list[float] | None = None
        if not consistency:
            self.abar = self.scheduler.alphas_cumprod[self.times.long()].tolist()

    def restart(self) -> None:
        """Forget the images before (order 2 remembers the last prediction)."""
        self.scheduler.set_timesteps(self.steps)
        self.times: Tensor = self.scheduler.timesteps

    def start(self, noise: Tensor) -> Tensor:
        """The first state, of standard normal noise."""
        return noise * self.scheduler.init_noise_sigma

    def scaled(self, state: Tensor, step: int) -> Tensor:
        """What the network is shown."""
        return self.scheduler.scale_model_input(state, self.times[step])

    def update(self, output: Tensor, step: int, state: Tensor, draw: Generator) -> Tensor:
        """The next state, of the network's prediction; noise comes from `draw`."""
        extra = {"generator": draw, **self.extra}
        return self.scheduler.step(output, self.times[step], state, return_dict=False, **extra)[0]


def spacing_of(asked: str, trained: dict[str, Any]) -> str:
    """The spacing of the times: as asked, else the checkpoint's, else by what the network predicts."""
    if asked != "auto":
        return asked
    by_prediction = "trailing" if trained.get("prediction_type") == "v_prediction" else "leading"
    return trained.get("timestep_spacing") or by_prediction


def noise_of(output: Tensor, state: Tensor, abar: float, prediction: str) -> Tensor:
    """eps of x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, from what the network predicts (epsilon, v or x_0)."""
    signal, spread = abar**0.5, (1 - abar) ** 0.5
    if prediction == "epsilon":
        return output
    if prediction == "v_prediction":
        return signal * output + spread * state
    return (state - signal * output) / spread


def prediction_of(noise: Tensor, state: Tensor, abar: float, prediction: str) -> Tensor:
    """Inverse of `noise_of`."""
    signal, spread = abar**0.5, (1 - abar) ** 0.5
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        return (noise - spread * state) / signal
    return (state - spread * noise) / signal
