"""Image generators of the data-free methods: latent noise in, pixels out.

Source: method card `dfkd` 1.3 and 9 (ljrprocc/DataFree@bf3096b, zju-vipa/CMI@9e79fa9, zju-vipa/Fast-Datafree@0dcecbc,
huawei-noah DAFL, kuluhan/PRE-DFKD@604010d, VainF/Data-Free-Adversarial-Distillation@c161591,
polo5/ZeroShotKnowledgeTransfer@e24915d, bigdata-inha/TA-DFKD-Official@5cb7f8a), rebuilt from their layer lists.

| name | ends in | weights at start | notes |
|---|---|---|---|
| cud | Sigmoid | N(0, 0.02) | CuDFKD; `depth` halvings of the channels, any width |
| small | Sigmoid | torch default | CMI, Fast, DFME; channels 2w, 2w, w |
| large | Sigmoid | torch default | DAFL/ZSKT/DFQ of the benchmark; channels 4w, 2w, w |
| dcgan | Sigmoid | N(0, 0.02) | CMI at 64 px; four 4x4 transposed convolutions |
| deep | Sigmoid | N(0, 0.02) | Fast, ImageNet; spatial noise of side image_size/16 |
| dafl | BN without affine | torch default | BN eps 0.8 inside; normalised space |
| dafl_sn | BN without affine | U(-0.08, 0.08) | PRE-DFKD; dafl with spectral norm on its convolutions |
| dfad_a | BN without affine | torch default | as dafl with the usual eps; normalised space |
| dfad_b | Tanh | N(0, 0.02) | the dcgan body; mapped from [-1, 1] to [0, 1] |
| zskt | BN with affine | torch default | no squash; normalised space |
| tadfkd | Sigmoid | torch default | TA-DFKD; as dafl with a LeakyReLU after its first BN |

"Normalised space" generators make what the teacher's first layer sees. synthkit's images are pixels, so these need the
teacher's `mean` and `std`: `forward` returns `raw * std + mean`, unclamped, which the teacher's view turns back into
`raw` exactly. Their attribute `bounded` is False; a bank clamps them when it stores bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from synthkit.errors import ModelError
from synthkit.models.init import dcgan_init, seeded, uniform_init

_SLOPE = 0.2


class Generator(nn.Module):
    """`forward(z)`: latent (B, *latent_shape) -> images (B, channels, image_size, image_size) in pixel space.

    Attributes:
        latent_dim: length of z (channels of z where it is spatial).
        latent_shape: shape of one z, (latent_dim,) except for `deep`.
        bounded: True when the output lies in [0, 1] by construction.
    """

    def __init__(
        self,
        project: nn.Module,
        main: nn.Module,
        *,
        latent_shape: tuple[int, ...],
        image_size: int,
        channels: int,
        bounded: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        self.latent_dim, self.latent_shape = latent_shape[0], latent_shape
        self.image_size, self.channels, self.bounded = image_size, channels, bounded
        self.project, self.main = project, main
        self._side: int | None = None
        if mean is not None and std is not None:
            self.register_buffer("pixel_mean", torch.tensor(list(mean)).view(1, -1, 1, 1), persistent=False)
            self.register_buffer("pixel_std", torch.tensor(list(std)).view(1, -1, 1, 1), persistent=False)
        else:
            self.pixel_mean = self.pixel_std = None

    def raw(self, z: Tensor) -> Tensor:
        """The network's own output: pixels for bounded generators, the teacher's normalised input for the others."""
        return self.main(self.project(z))

    def forward(self, z: Tensor) -> Tensor:
        out = self.raw(z)
        if self.pixel_mean is not None and self.pixel_std is not None:
            return out * self.pixel_std + self.pixel_mean
        return out

    def reset(self, *, seed: int | None = None) -> None:
        """Draw all weights anew from N(0, 0.02) and set BN statistics back (what CMI does before every synthesis)."""
        with seeded(seed):
            dcgan_init(self)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.reset_running_stats()


class _Halve(nn.Module):
    """Tanh mapped from [-1, 1] to [0, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(x) + 1) / 2


def _project(latent_dim: int, width: int, side: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(latent_dim, width * side * side), nn.Unflatten(1, (width, side, side)))


def _conv(cin: int, cout: int, *, bias: bool = False, eps: float = 1e-5) -> list[nn.Module]:
    return [
        nn.Conv2d(cin, cout, 3, padding=1, bias=bias),
        nn.BatchNorm2d(cout, eps=eps),
        nn.LeakyReLU(_SLOPE, inplace=True),
    ]


def _up() -> nn.Module:
    return nn.Upsample(scale_factor=2)


def _start_side(name: str, image_size: int, halvings: int) -> int:
    step = 2**halvings
    if image_size < step or image_size % step:
        raise ModelError(
            f"generator {name!r}: the image side must be a multiple of {step}",
            got=image_size,
            hint=f"use {max(step, round(image_size / step) * step)}, or another depth or generator",
        )
    return image_size // step


def _upsampling(name: str, latent_dim: int, image_size: int, channels: int, widths: list[int]) -> Generator:
    """Linear to widths[0] maps, then a nearest x2 and a convolution per further width, then the image; Sigmoid."""
    layers: list[nn.Module] = [nn.BatchNorm2d(widths[0])]
    for cin, cout in zip(widths, widths[1:], strict=False):
        layers += [_up(), *_conv(cin, cout)]
    layers += [nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Sigmoid()]
    side = _start_side(name, image_size, len(widths) - 1)
    return Generator(
        _project(latent_dim, widths[0], side),
        nn.Sequential(*layers),
        latent_shape=(latent_dim,),
        image_size=image_size,
        channels=channels,
    )


def _cud(*, latent_dim: int, image_size: int, channels: int, depth: int, width: int, **_: object) -> Generator:
    net = _upsampling("cud", latent_dim, image_size, channels, [width * 2**i for i in range(depth, -1, -1)])
    dcgan_init(net)
    return net


def _small(*, latent_dim: int, image_size: int, channels: int, width: int, **_: object) -> Generator:
    return _upsampling("small", latent_dim, image_size, channels, [2 * width, 2 * width, width])


def _large(*, latent_dim: int, image_size: int, channels: int, width: int, **_: object) -> Generator:
    return _upsampling("large", latent_dim, image_size, channels, [4 * width, 2 * width, width])


def _transposed(name: str, end: nn.Module, *, latent_dim: int, image_size: int, channels: int, width: int) -> Generator:
    side = _start_side(name, image_size, 4)
    widths = [8 * width, 4 * width, 2 * width, width, width]
    layers: list[nn.Module] = [nn.BatchNorm2d(widths[0])]
    for cin, cout in zip(widths, widths[1:], strict=False):
        layers.append(nn.ConvTranspose2d(cin, cout, 4, stride=2, padding=1, bias=False))
        layers += [nn.BatchNorm2d(cout), nn.LeakyReLU(_SLOPE, inplace=True)]
    layers += [nn.Conv2d(width, channels, 3, padding=1), end]
    net = Generator(
        _project(latent_dim, widths[0], side),
        nn.Sequential(*layers),
        latent_shape=(latent_dim,),
        image_size=image_size,
        channels=channels,
    )
    dcgan_init(net)
    return net


def _dcgan(*, latent_dim: int, image_size: int, channels: int, width: int, **_: object) -> Generator:
    return _transposed(
        "dcgan", nn.Sigmoid(), latent_dim=latent_dim, image_size=image_size, channels=channels, width=width
    )


def _dfad_b(*, latent_dim: int, image_size: int, channels: int, width: int, **_: object) -> Generator:
    return _transposed("dfad_b", _Halve(), latent_dim=latent_dim, image_size=image_size, channels=channels, width=width)


def _deep(*, latent_dim: int, image_size: int, channels: int, width: int, **_: object) -> Generator:
    # The original also carries a Linear of 805,952 weights that its forward never uses; it is left out here.
    side = _start_side("deep", image_size, 4)
    layers: list[nn.Module] = _conv(latent_dim, 2 * width)
    for cin, cout in ((2 * width, 2 * width), (2 * width, width), (width, width), (width, width)):
        layers += [_up(), *_conv(cin, cout)]
    layers += [nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid()]
    net = Generator(
        nn.Identity(),
        nn.Sequential(*layers),
        latent_shape=(latent_dim, side, side),
        image_size=image_size,
        channels=channels,
    )
    dcgan_init(net)
    return net


def _normalised(name: str, end: Callable[[int], list[nn.Module]], eps: float = 1e-5) -> Callable[..., Generator]:
    """Builder of the generators that end in a BatchNorm: Linear, BN, (x2, biased conv, BN) twice, conv, `end`."""

    def build(
        *,
        latent_dim: int,
        image_size: int,
        channels: int,
        width: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        **_: object,
    ) -> Generator:
        if mean is None or std is None:
            raise ModelError(
                f"generator {name!r} works in the teacher's normalised space",
                hint="give the teacher's mean= and std= (one number per channel), or use a generator such as cud",
            )
        side = _start_side(name, image_size, 2)
        layers = [nn.BatchNorm2d(2 * width), _up(), *_conv(2 * width, 2 * width, bias=True, eps=eps)]
        layers += [_up(), *_conv(2 * width, width, bias=True, eps=eps)]
        layers += [nn.Conv2d(width, channels, 3, padding=1), *end(channels)]
        return Generator(
            _project(latent_dim, 2 * width, side),
            nn.Sequential(*layers),
            latent_shape=(latent_dim,),
            image_size=image_size,
            channels=channels,
            bounded=False,
            mean=mean,
            std=std,
        )

    return build


def _tadfkd(*, latent_dim: int, image_size: int, channels: int, width: int, **_: object) -> Generator:
    side = _start_side("tadfkd", image_size, 2)
    layers: list[nn.Module] = [nn.BatchNorm2d(2 * width), nn.LeakyReLU(_SLOPE, inplace=True)]
    for cin, cout in ((2 * width, 2 * width), (2 * width, width)):
        layers += [_up(), *_conv(cin, cout, bias=True, eps=0.8)]
    layers += [nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid()]
    return Generator(
        _project(latent_dim, 2 * width, side),
        nn.Sequential(*layers),
        latent_shape=(latent_dim,),
        image_size=image_size,
        channels=channels,
    )


def _tanh_bn(channels: int) -> list[nn.Module]:
    return [nn.Tanh(), nn.BatchNorm2d(channels, affine=False)]


def _dafl_sn(**arguments: Any) -> Generator:
    net = _normalised("dafl_sn", _tanh_bn, eps=0.8)(**arguments)
    uniform_init(net, 0.08)
    for layer in list(net.modules()):
        if isinstance(layer, nn.Conv2d):
            spectral_norm(layer)  # its power iteration moves on with every forward in train mode
    return net


GENERATORS: dict[str, Callable[..., Generator]] = {
    "cud": _cud,
    "small": _small,
    "large": _large,
    "dcgan": _dcgan,
    "deep": _deep,
    "dafl": _normalised("dafl", _tanh_bn, eps=0.8),
    "dafl_sn": _dafl_sn,
    "dfad_a": _normalised("dfad_a", _tanh_bn),
    "dfad_b": _dfad_b,
    "tadfkd": _tadfkd,
    "zskt": _normalised("zskt", lambda channels: [nn.BatchNorm2d(channels)]),
}


def build_generator(
    name: str,
    *,
    latent_dim: int,
    image_size: int,
    channels: int,
    depth: int = 2,
    width: int = 64,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
) -> Generator:
    """A generator with fresh weights.

    Args:
        name: one of `GENERATORS`.
        latent_dim: length of the noise vector.
        image_size: side of the square image in pixels.
        channels: image channels (1 grey, 3 colour).
        depth: halvings of the channels (`cud` only).
        width: channels before the last convolution.
        mean, std: the teacher's input normalisation; needed by dafl, dafl_sn, dfad_a and zskt only.
        seed: seed of the weights; none draws from torch's global generator.

    Raises:
        ModelError: unknown name, a size that the layers cannot reach, or mean/std missing.
    """
    if name not in GENERATORS:
        raise ModelError("generator: not a known generator", got=name, allowed=GENERATORS)
    for what, value in (("latent_dim", latent_dim), ("channels", channels), ("depth", depth), ("width", width)):
        if value < 1:
            raise ModelError(f"generator {name!r}: {what} must be at least 1", got=value)
    for what, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise ModelError(f"generator {name!r}: {what} needs one number per channel ({channels})", got=list(values))
    with seeded(seed):
        return GENERATORS[name](
            latent_dim=latent_dim,
            image_size=image_size,
            channels=channels,
            depth=depth,
            width=width,
            mean=mean,
            std=std,
        )
