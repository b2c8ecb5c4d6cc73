"""Normalisation constants and class names of the standard datasets. No torch.

Source of the constants: the public code of the data-free distillation methods (zju-vipa benchmark, CuDFKD) and the
usual ImageNet values. They describe pixels in [0, 1]; the *teacher's checkpoint* decides which one applies.
"""

from __future__ import annotations

STATS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "half-grey": ((0.5,), (0.5,)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "none-grey": ((0.0,), (1.0,)),
}
"""Name -> (mean, std), one number per channel, for pixels in [0, 1]. `half` maps to [-1, 1]; `none` leaves them."""

_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""

CLASS_NAMES: dict[str, list[str]] = {
    "mnist": [str(digit) for digit in range(10)],
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "cifar100": list(_CIFAR100.split()),
}
"""Class names in the standard label order."""

SHAPES: dict[str, tuple[int, int, int]] = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
"""Native image shape (C, H, W)."""
