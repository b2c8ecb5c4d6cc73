"""NAYER's conditional generator: fixed label embeddings through a noisy layer that is drawn anew for every batch.

Source: method card `dfkd` 2.11 and 9 (tmtuan1307/NAYER@c6bedcd `NLGenerator`), rebuilt from its layer list. Not in
`GENERATORS`: it takes classes, not noise. Parameters with 512-wide embeddings, 1000 hidden units and width 64:
28,944,771 (40 layers, 32 px), 10,476,771 (4 layers, 32 px), 33,538,347 (1 layer, 64 px).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthkit.errors import ModelError
from synthkit.models.generators import build_generator


class NoisyGenerator(nn.Module):
    """`forward(targets)`: classes (B,) -> images (B, channels, image_size, image_size) in [0, 1].

    embedding -> BatchNorm -> noisy layer j for samples jK..(j+1)K-1 -> the network of generator `small`.

    Args:
        embeddings: (K, E), one fixed vector per class; no parameter, not in the state.
        layers: noisy layers L; at most L K samples fit into a batch.
        hidden: outputs of a noisy layer.
        width: channels before the last convolution.
    """

    embeddings: Tensor

    def __init__(self, embeddings: Tensor, *, layers: int, hidden: int, width: int, image_size: int, channels: int):
        super().__init__()
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.norm = nn.BatchNorm1d(embeddings.shape[1])
        # One tensor holds all layers: a batched product instead of L small ones.
        self.weight = nn.Parameter(torch.randn(layers, hidden, embeddings.shape[1]))
        self.bias = nn.Parameter(torch.zeros(layers, hidden))
        self.body = build_generator("small", latent_dim=hidden, image_size=image_size, channels=channels, width=width)

    def redraw(self, rng: torch.Generator) -> None:
        """Noisy layers anew, in place: weights N(0, 1), biases 0."""
        with torch.no_grad():
            self.weight.normal_(generator=rng)
            self.bias.zero_()

    def noisy(self, x: Tensor) -> Tensor:
        """(B, E) normalised embeddings -> (B, hidden), every slice of K samples through its own layer."""
        classes = len(self.embeddings)
        slices = -(-len(x) // classes)
        if slices > len(self.weight):
            raise ModelError(
                f"noisy generator: {len(self.weight)} layers serve {len(self.weight) * classes} samples", got=len(x)
            )
        padded = F.pad(x, (0, 0, 0, slices * classes - len(x))).view(slices, classes, -1)
        out = torch.baddbmm(self.bias[:slices, None], padded, self.weight[:slices].mT)
        return out.flatten(0, 1)[: len(x)]

    def forward(self, targets: Tensor) -> Tensor:
        return self.body(self.noisy(self.norm(self.embeddings[targets])))
