"""The table of architectures: what a model spec may name. No torch here, so that listing is instant."""

from __future__ import annotations

import re

from synthkit.errors import ModelError
from synthkit.models import own

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
            f"resnet{d}": f"ResNet-{d}, 16-32-64 channels, projection shortcuts (KD tables)"
            for d in (*_DEPTHS, 38, 116, 200)
        },
        **{f"resnet{d}_a": f"ResNet-{d}, 16-32-64 channels, zero-padding shortcuts (He et al. 2016)" for d in _DEPTHS},
        **{f"resnet{d}x2": f"ResNet-{d}, stage channels x2: 32-64-128 (SimKD)" for d in (14, 38, 110)},
        **{f"resnet{d}x4": f"ResNet-{d}, stage channels x4: 64-128-256" for d in sorted((*_DEPTHS, 26, 38))},
    },
)
_add(
    "resnet_tiny",
    "ResNet (Tiny-ImageNet)",
    {f"resnet{d}_tiny": f"torchvision's ResNet-{d} with a 3x3 stem, for 64x64 images" for d in (18, 34, 50)},
)
_add(
    "wrn",
    "Wide ResNet",
    {
        f"wrn{d}_{k}": f"WRN-{d}-{k} (any wrnD_K with D = 6n + 4 works)"
        for d, k in ((16, 1), (16, 2), (40, 1), (40, 2), (28, 10))
    },
)
_add(
    "resnet_imagenet",
    "ResNet (ImageNet)",
    {f"resnet{d}x2_imagenet": f"ResNet-{d} at double width for 224x224 images (SimKD)" for d in (10, 18, 34)},
)
_VGG = (8, 11, 13, 16, 19)
_add(
    "vgg",
    "VGG",
    {
        **{f"vgg{d}": f"VGG-{d} with BatchNorm and one linear layer" for d in _VGG},
        **{f"vgg{d}_nobn": f"VGG-{d} without BatchNorm, one linear layer" for d in _VGG},
    },
)
_add(
    "mobilenetv2",
    "MobileNetV2",
    {
        "mobilenetv2_half": "MobileNetV2 at width 0.5 for 32x32 images (KD tables)",
        "mobilenetv2": "MobileNetV2 at width 1.0 for 32x32 images (SimKD)",
    },
)
_add("mobilenetv1", "MobileNetV1", {"mobilenetv1": "MobileNetV1 at width 1.0 for 224x224 images (KD tables)"})
_add(
    "shufflenet",
    "ShuffleNet",
    {
        "shufflenetv1": "ShuffleNet V1, 3 groups, for 32x32 images",
        "shufflenetv2": "ShuffleNet V2 at width 1.0 for 32x32 images",
        **{
            f"shufflenetv2_{w}_{h}": f"ShuffleNet V2 at width {w}.{h} for 32x32 images"
            for w, h in ((0, 2), (0, 5), (1, 5), (2, 0))
        },
    },
)
_add(
    "convnet",
    "ConvNet",
    {
        "convnet": "ConvNet of dataset distillation: depth 3, width 128, instance norm (any convnet_dD_wW_NORM works)",
        "convnet_bn": "ConvNet, depth 3, width 128, BatchNorm",
        "convnet_d4": "ConvNet, depth 4 (64x64 images)",
        "convnet_d5": "ConvNet, depth 5 (128x128 images)",
        "convnet_d6": "ConvNet, depth 6 (256x256 images)",
    },
)
_add(
    "dd",
    "Dataset distillation",
    {
        "mlp": "three linear layers of width 128",
        "lenet_dd": "LeNet with max-pooling, no BatchNorm (grey 28x28 or colour 32x32)",
        "alexnet_dd": "AlexNet for 32x32 images, no normalisation",
        "alexnet_dd_bn": "AlexNet for 32x32 images, BatchNorm",
        "vgg11_in": "VGG-11, instance norm",
        "vgg11_dd_bn": "VGG-11, BatchNorm, max-pooling after every block (torch's default initialisation)",
        "resnet18_in": "ResNet-18 with a 3x3 stem, instance norm",
        "resnet18_ap_in": "ResNet-18 with average pooling for strides, instance norm",
        "resnet18_ap_bn": "ResNet-18 with average pooling for strides, BatchNorm",
    },
)

DD_NETWORKS = tuple(name for name, row in ARCHITECTURES.items() if row[0].startswith("synthkit.models.dd:"))
"""Networks that pad grey images from 28 to 32 pixels by themselves, as the ConvNets do."""

ALIASES: dict[str, str] = {
    "r18": "resnet18",
    "r34": "resnet34",
    "r50": "resnet50",
    "lenet": "lenet5",
    "vgg8_bn": "vgg8",
    "vgg11_bn": "vgg11",
    "vgg13_bn": "vgg13",
    "vgg16_bn": "vgg16",
    "vgg19_bn": "vgg19",
    "mobile_half": "mobilenetv2_half",
    "shufflev1": "shufflenetv1",
    "shufflev2": "shufflenetv2",
    "convnet_d3": "convnet",
}

EXTERNAL = ("timm:", "torchvision:")
"""Prefixes of architectures that another library builds; what follows is that library's own name."""

_WRN = re.compile(r"wrn_?(\d+)_(\d+)")
_CONVNET = re.compile(r"convnet(?:_?d(\d+))?(?:_?w(\d+))?(?:_?(bn|batch|none|group|layer|instance))?")


def default_input(name: str, channels: int | None = None) -> tuple[int, int]:
    """(in_channels, image_size) that an architecture takes when nothing else says so."""
    if name.startswith("lenet5"):
        return 1, 32
    if channels == 1 and (name.startswith("convnet") or name in DD_NETWORKS):
        return 1, 28
    if name.endswith("_tiny"):
        return 3, 64
    return (3, 224) if _of_imagenet(name) else (3, 32)


def default_classes(name: str) -> int:
    """Number of classes that an architecture gets when nothing else says so."""
    if name.endswith("_tiny"):
        return 200
    return 1000 if _of_imagenet(name) else 10


def _of_imagenet(name: str) -> bool:
    return name.startswith(EXTERNAL) or name == "mobilenetv1" or name.endswith("_imagenet")


def resolve_name(name: str) -> str:
    """The canonical form of an architecture name: aliases, case, `-` for `_`, any wrnD_K and convnet_dD_wW_NORM.

    Names with the prefix `timm:`, `torchvision:` or `py:` are returned as they are.

    Raises:
        ModelError: the name is unknown; the nearest one is offered.
    """
    if name.startswith(own.PREFIXES):
        return name
    if name.startswith(EXTERNAL):
        if not name.partition(":")[2]:
            raise ModelError("model: the library's own name is missing after the colon", got=name)
        return name
    plain = name.strip().lower().replace("-", "_")
    if plain in ARCHITECTURES:
        return plain
    if plain in ALIASES:
        return ALIASES[plain]
    if generic := _generic(plain, name):
        return generic
    squeezed = {known.replace("_", ""): known for known in ARCHITECTURES}
    if plain.replace("_", "") in squeezed:
        return squeezed[plain.replace("_", "")]
    raise ModelError(
        "model: not a known architecture",
        got=name,
        allowed=[*ARCHITECTURES, *ALIASES],
        hint="see `synthkit list models`",
    )


def _generic(plain: str, name: str) -> str | None:
    """Canonical form of a WRN or ConvNet of any size, None for other names."""
    if wide := _WRN.fullmatch(plain):
        depth, width = int(wide[1]), int(wide[2])
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ModelError("model: a WRN's depth must be 6n + 4 (10, 16, 22, 28, 34, 40, ...)", got=name)
        return f"wrn{depth}_{width}"
    if conv := _CONVNET.fullmatch(plain):
        depth, width = int(conv[1] or 3), int(conv[2] or 128)
        if not 1 <= depth <= 8 or width < 1:
            raise ModelError("model: a ConvNet has 1 to 8 blocks and a positive width", got=name)
        norm = {"batch": "bn", "instance": None}.get(conv[3], conv[3])
        parts = ["convnet", f"d{depth}" * (depth != 3), f"w{width}" * (width != 128), norm or ""]
        return "_".join(part for part in parts if part)
    return None


def entry(name: str) -> tuple[str, str, str]:
    """(builder, description, family) of a canonical name, those of any size included."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    base = "wrn16_1" if name.startswith("wrn") else "convnet"
    module, _, family = ARCHITECTURES[base]
    return module, f"{family} {name}", family
