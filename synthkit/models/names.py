"""The table of architectures: what a model spec may name. No torch here, so that listing is instant."""

from __future__ import annotations

import re

from synthkit.errors import ModelError

ARCHITECTURES: dict[str, tuple[str, str, str]] = {}
"""name -> (`module:function` that builds it, one-line description, family). All builders take
(name, *, num_classes, in_channels, image_size)."""


def _add(module: str, family: str, names: dict[str, str]) -> None:
    for name, description in names.items():
        ARCHITECTURES[name] = (f"synthkit.models.{module}:build", description, family)


_add(
    "lenet",
    "LeNet",
    {
        "lenet5": "LeNet-5 of the DAFL paper, no BatchNorm, 1x32x32",
        "lenet5_half": "LeNet-5 at half width, no BatchNorm, 1x32x32",
        "lenet5_bn": "LeNet-5 with BatchNorm after each convolution, 1x32x32",
        "lenet5_half_bn": "LeNet-5 at half width with BatchNorm, 1x32x32",
    },
)
_add(
    "resnet_cifar",
    "ResNet (CIFAR, 64-512 channels)",
    {
        f"resnet{d}": f"ResNet-{d} with a 3x3 stem for 32x32 images ({'bottleneck' if d >= 50 else 'basic'} blocks)"
        for d in (18, 34, 50, 101, 152)
    },
)
_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
_add(
    "resnet",
    "ResNet (CIFAR, 16-64 channels)",
    {
        **{
            f"resnet{d}": f"ResNet-{d}, 16-32-64 channels, projection shortcuts (the distillation tables)"
            for d in _DEPTHS
        },
        **{f"resnet{d}_a": f"ResNet-{d}, 16-32-64 channels, zero-padding shortcuts (He et al. 2016)" for d in _DEPTHS},
        **{f"resnet{d}x2": f"ResNet-{d}, stage channels x2: 32-64-128 (SimKD)" for d in (14, 38, 110)},
        **{f"resnet{d}x4": f"ResNet-{d}, stage channels x4: 64-128-256" for d in (8, 14, 32, 38)},
    },
)
_add(
    "wrn",
    "Wide ResNet",
    {
        f"wrn{d}_{k}": f"WRN-{d}-{k} (any wrnD_K with D = 6n + 4 works)"
        for d, k in ((16, 1), (16, 2), (40, 1), (40, 2), (28, 10))
    },
)

ALIASES: dict[str, str] = {
    "r18": "resnet18",
    "r34": "resnet34",
    "r50": "resnet50",
    "lenet": "lenet5",
    "lenet5half": "lenet5_half",
}

EXTERNAL = ("timm:", "torchvision:")
"""Prefixes of architectures that another library builds; what follows is that library's own name."""

_WRN = re.compile(r"wrn_?(\d+)_(\d+)")


def default_input(name: str) -> tuple[int, int]:
    """(in_channels, image_size) that an architecture takes when nothing else says so."""
    if name.startswith("lenet5"):
        return 1, 32
    return (3, 224) if name.startswith(EXTERNAL) else (3, 32)


def default_classes(name: str) -> int:
    """Number of classes that an architecture gets when nothing else says so."""
    return 1000 if name.startswith(EXTERNAL) else 10


def resolve_name(name: str) -> str:
    """The canonical form of an architecture name: aliases, case, `-` for `_` and any wrnD_K are understood.

    Names with the prefix `timm:` or `torchvision:` are returned as they are.

    Raises:
        ModelError: the name is unknown; the nearest one is offered.
    """
    if name.startswith(EXTERNAL):
        if not name.partition(":")[2]:
            raise ModelError("model: the library's own name is missing after the colon", got=name)
        return name
    plain = name.strip().lower().replace("-", "_")
    squeezed = {known.replace("_", ""): known for known in ARCHITECTURES}
    for found in (ARCHITECTURES.get(plain) and plain, ALIASES.get(plain), squeezed.get(plain.replace("_", ""))):
        if found:
            return found
    if wide := _WRN.fullmatch(plain):
        if int(wide[1]) < 10 or (int(wide[1]) - 4) % 6 or int(wide[2]) < 1:
            raise ModelError("model: a WRN's depth must be 6n + 4 (10, 16, 22, 28, 34, 40, ...)", got=name)
        return f"wrn{int(wide[1])}_{int(wide[2])}"
    raise ModelError(
        "model: not a known architecture",
        got=name,
        allowed=[*ARCHITECTURES, *ALIASES],
        hint="see `synthkit list models`",
    )


def entry(name: str) -> tuple[str, str, str]:
    """(builder, description, family) of a canonical name, generic WRN names included."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    return "synthkit.models.wrn:build", f"WRN-{name[3:].replace('_', '-')}", "Wide ResNet"
