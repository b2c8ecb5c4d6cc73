"""Views of bank images, as FKD stores them: which image, which crop, mirrored or not, mixed with whom and how.

A record says everything that is needed to make the view again, and `apply_views` is the one function that makes it:
the teacher labels its output and the student is trained on its output, bit for bit the same on one device. Indices are
stored, so nothing hangs on a batch size or a sampler's seed (largescale.md 0.5: in SRe2L both must be equal).

Row r = e * images + p is the p-th view of view epoch e; an epoch takes every image once, in an order of its own. Each
record is a pure function of (seed, epoch, row): its random numbers stand at a fixed place of a counter-based stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from synthkit.errors import BankError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Mix = Literal["none", "mixup", "cutmix"]
MIXES = ("none", "mixup", "cutmix")
RECORD_COLUMNS = ("sample", "crop", "flip", "partner", "mix_lambda", "mix_box")
RATIO = (3 / 4, 4 / 3)  # width / height of random crops, as torchvision's RandomResizedCrop
_TRIES = 10
_DRAWS = 32  # random numbers that belong to one row: 20 of the crop's tries, 6 others, room for more
_STREAM = {"order": 0x6F, "partner": 0x70, "record": 0x72}
_PIECE = 1 << 16  # rows drawn at once
_CHUNK_BYTES = 64 << 20  # of finished views; the memory of `apply_views` beyond its result is a few times that


@dataclass(frozen=True, kw_only=True)
class ViewPolicy:
    """How views are drawn. The record of it (`to_dict`) is stored with the labels."""

    epochs: int
    """View epochs: views of every image."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of a crop as a share of the image, uniform in between (RandomResizedCrop)."""
    crop_ratio: tuple[float, float] = RATIO
    """Width / height of a crop, log-uniform in between."""
    flip: float = 0.5
    """Probability of a mirrored view."""
    mix: Mix = "none"
    """What is done with the partner's view: nothing, mixup, or cutmix."""
    mix_alpha: float = 1.0
    """The mixing share is drawn from Beta(alpha, alpha), per view (SRe2L: one per batch)."""

    def __post_init__(self):
        if self.epochs < 1:
            raise ConfigError("views: at least 1 view epoch is needed", got=self.epochs)
        for name, top in (("crop_scale", 1.0), ("crop_ratio", 100.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ConfigError(f"{name}: two numbers, 0 < low <= high <= {top:g}", got=[low, high])
            object.__setattr__(self, name, (float(low), float(high)))
        if not 0 <= self.flip <= 1:
            raise ConfigError("flip is a probability in [0, 1]", got=self.flip)
        if self.mix not in MIXES:
            raise ConfigError("mix: not known", got=self.mix, allowed=MIXES)
        if not 0.05 <= self.mix_alpha <= 100:
            raise ConfigError("mix_alpha must be 0.05 to 100", got=self.mix_alpha)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for labels.json."""
        mix = {"kind": self.mix, "alpha": self.mix_alpha, "lambda": "per view"} if self.mix != "none" else None
        return {
            "epochs": self.epochs, "crop": {"kind": "random_resized", "scale": list(self.crop_scale),
            "ratio": list(self.crop_ratio)}, "flip": self.flip, "mix": mix,
            "resampling": "bilinear, antialiased where it shrinks, whole-pixel crops",
        }  # fmt: skip


class ViewDraw:
    """The records of a policy: `rows(start, stop)` gives any part of them, always the same.

    Args:
        policy: how views are drawn.
        images: images of the bank.
        source: (height, width) of its images. size: (height, width) of the views, in whose pixels boxes are kept.
        seed: base seed.
    """

    def __init__(self, policy: ViewPolicy, *, images: int, source: tuple[int, int], size: tuple[int, int], seed: int):
        self.policy, self.images, self.source, self.size, self.seed = policy, images, source, size, seed
        self._orders: dict[tuple[str, int], np.ndarray] = {}
        self._crops: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.policy.epochs * self.images

    def rows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The columns of rows start to stop - 1 (see `RECORD_COLUMNS`)."""
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.images)
            last = min(first + stop - start, self.images)
            parts.append(self._epoch_rows(epoch, first, last))
            start += last - first
        return {name: np.concatenate([p[name] for p in parts]) for name in RECORD_COLUMNS}

    def own_views(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """sample, crop and flip of scattered rows (of partners: who they are mixed with does not matter)."""
        rows = rows.astype(np.int64)
        count = len(rows)
        found = {"sample": np.zeros(count, np.int64), "crop": np.zeros((count, 4), np.float32),
                 "flip": np.zeros(count, np.uint8)}  # fmt: skip
        for epoch in np.unique(rows // self.images).tolist():
            at = np.flatnonzero(rows // self.images == epoch)
            place = rows[at] - epoch * self.images
            crop, flip = self._epoch_crops(epoch)
            found["sample"][at], found["crop"][at] = self.order("order", epoch)[place], crop[place]
            found["flip"][at] = flip[place]
        return found

    def _epoch_crops(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """crop and flip of all rows of an epoch, kept until another epoch is asked for (17 bytes an image)."""
        if self._crops is None or self._crops[0] != epoch:
            crop, flip = np.empty((self.images, 4), np.float32), np.empty(self.images, np.uint8)
            for first in range(0, self.images, _PIECE):
                part = slice(first, min(first + _PIECE, self.images))
                crop[part], flip[part] = self._crop_flip(self._uniform(epoch, part.start, part.stop))
            self._crops = (epoch, crop, flip)
        return self._crops[1], self._crops[2]

    def order(self, what: str, epoch: int) -> np.ndarray:
        """A permutation of the images that depends on (seed, epoch) and the purpose: raw bits and a stable sort."""
        if (what, epoch) not in self._orders:
            for old in [key for key in self._orders if key[1] < epoch - 1]:
                del self._orders[old]
            bits = np.random.PCG64(self._seeds(what, epoch)).random_raw(self.images)
            self._orders[what, epoch] = np.argsort(bits, kind="stable")
        return self._orders[what, epoch]

    def _seeds(self, what: str, epoch: int) -> np.random.SeedSequence:
        return np.random.SeedSequence([self.seed, epoch, _STREAM[what]])

    def _uniform(self, epoch: int, first: int, last: int) -> np.ndarray:
        """(last - first, _DRAWS) numbers in [0, 1) of these rows: 53 bits each, at their place of the stream."""
        stream = np.random.PCG64(self._seeds("record", epoch)).advance(first * _DRAWS)
        bits = stream.random_raw((last - first) * _DRAWS) >> np.uint64(11)
        return bits.reshape(-1, _DRAWS) * 2.0**-53

    def _crop_flip(self, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        crop = random_crops(uniform[:, :22], self.source, self.policy.crop_scale, self.policy.crop_ratio)
        return crop, (uniform[:, 22] < self.policy.flip).astype(np.uint8)

    def _epoch_rows(self, epoch: int, first: int, last: int) -> dict[str, np.ndarray]:
        count, policy = last - first, self.policy
        uniform = self._uniform(epoch, first, last)
        crop, flip = self._crop_flip(uniform)
        own = epoch * self.images + np.arange(first, last)
        columns = {
            "sample": self.order("order", epoch)[first:last],
            "crop": crop,
            "flip": flip,
            "partner": own,
            "mix_lambda": np.ones(count, np.float32),
            "mix_box": np.zeros((count, 4), np.uint16),
        }
        if policy.mix != "none":
            columns["partner"] = epoch * self.images + self.order("partner", epoch)[first:last]
            columns["mix_lambda"] = beta_quantile(uniform[:, 23], policy.mix_alpha).astype(np.float32)
        if policy.mix == "cutmix":
            boxes = cutmix_boxes(columns["mix_lambda"], uniform[:, 24:26], self.size)
            empty = (boxes[:, 0] == boxes[:, 2]) | (boxes[:, 1] == boxes[:, 3])
            empty |= columns["partner"] == own
            # Zeros mean mixup: a box without area is written as what it is, a view that is not mixed.
            columns["partner"] = np.where(empty, own, columns["partner"])
            columns["mix_box"] = np.where(empty[:, None], 0, boxes).astype(np.uint16)
        return columns


def random_crops(
    uniform: np.ndarray, source: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Crops drawn as torchvision's RandomResizedCrop draws them, as fractions (top, left, height, width) float32.

    Args:
        uniform: (N, 22) numbers in [0, 1): ten tries of (area, ratio), then the place.
        source: (height, width) in pixels; the crops lie on whole pixels.
    """
    high, wide = source
    area = high * wide * (scale[0] + (scale[1] - scale[0]) * uniform[:, 0 : 2 * _TRIES : 2])
    aspect = np.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * uniform[:, 1 : 2 * _TRIES : 2])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= wide) & (h > 0) & (h <= high)
    chosen = np.arange(len(uniform)), fits.argmax(axis=1)
    w, h, found = w[chosen], h[chosen], fits.any(axis=1)
    # No try fitted: the largest central crop of an allowed ratio, as the original does.
    central_w = min(wide, round(high * ratio[1]))
    central_h = min(high, round(wide / ratio[0]))
    h, w = np.where(found, h, max(central_h, 1)), np.where(found, w, max(central_w, 1))
    top = np.where(found, np.floor(uniform[:, 20] * (high - h + 1)), np.rint((high - h) / 2))
    left = np.where(found, np.floor(uniform[:, 21] * (wide - w + 1)), np.rint((wide - w) / 2))
    return np.stack([top / high, left / wide, h / high, w / wide], axis=1).astype(np.float32)


def beta_quantile(uniform: np.ndarray, alpha: float) -> np.ndarray:
    """Beta(alpha, alpha) numbers from uniform ones (inverse distribution function; alpha = 1 gives them back).

    The lower half is integrated numerically in a variable in which the density is bounded, the upper half mirrored.
    """
    if alpha == 1:
        return uniform
    power = max(1.0, 1.0 / alpha)
    t = np.linspace(0.0, 0.5 ** (1 / power), (1 << 14) + 1)
    x = t**power
    with np.errstate(divide="ignore"):
        density = np.exp((power * alpha - 1) * np.log(t) + (alpha - 1) * np.log1p(-x)) if power * alpha > 1 else (
            1 - x
        ) ** (alpha - 1)  # fmt: skip
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    lower = np.interp(np.minimum(uniform, 1 - uniform) * 2, mass / mass[-1], t) ** power
    return np.where(uniform < 0.5, lower, 1 - lower)


def cutmix_boxes(share: np.ndarray, centre: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes (top, left, bottom, right) int64 (N, 4) in pixels of the view, clipped to it.

    Sides are sqrt(1 - lambda) of the view's, the centre is uniform, edges are centre +- side // 2 (odd sides lose a
    pixel), as in the released code of CutMix and SRe2L; lambda itself is not corrected for the clipping.

    Args:
        share: (N,) lambda, the part of the view's own image. centre: (N, 2) uniform numbers in [0, 1).
    """
    sides = np.sqrt(np.maximum(0.0, 1.0 - share.astype(np.float64)))[:, None] * np.array(size)
    half = sides.astype(np.int64) // 2
    middle = (centre * np.array(size)).astype(np.int64)
    return np.concatenate([np.maximum(middle - half, 0), np.minimum(middle + half, np.array(size))], axis=1)


@dataclass(kw_only=True)
class Views:
    """Records ready to be applied: those of the rows themselves, and crop and flip of their partners."""

    row: np.ndarray
    """(B,) int64."""
    sample: np.ndarray
    """(B,) int64, image of the bank."""
    crop: np.ndarray
    """(B, 4) float32: top, left, height, width as fractions of the image."""
    flip: np.ndarray
    """(B,) uint8."""
    partner: np.ndarray
    """(B,) int64: the ROW whose view is mixed in; the own row: none."""
    mix_lambda: np.ndarray
    """(B,) float32, share of the own view (mixup)."""
    mix_box: np.ndarray
    """(B, 4) uint16: top, left, bottom, right of the partner's patch in pixels of the view; zeros: mixup."""
    partner_sample: np.ndarray
    """(M,) int64: images of the partners of the M mixed rows, in order."""
    partner_crop: np.ndarray
    """(M, 4) float32."""
    partner_flip: np.ndarray
    """(M,) uint8."""

    @property
    def mixed(self) -> np.ndarray:
        """(B,) bool: rows that have a partner."""
        return self.partner != self.row

    def __len__(self) -> int:
        return len(self.row)


def join_views(rows: np.ndarray, own: dict[str, np.ndarray], partners: dict[str, np.ndarray]) -> Views:
    """`Views` of `rows` from their records and the records of the mixed ones' partners."""
    return Views(
        row=rows.astype(np.int64), sample=own["sample"].astype(np.int64), crop=own["crop"], flip=own["flip"],
        partner=own["partner"].astype(np.int64), mix_lambda=own["mix_lambda"], mix_box=own["mix_box"],
        partner_sample=partners["sample"].astype(np.int64), partner_crop=partners["crop"],
        partner_flip=partners["flip"],
    )  # fmt: skip


def check_records(columns: dict[str, np.ndarray], *, images: int, rows: int, where: str) -> None:
    """Raise `BankError` unless every record can be applied: indices in range, crops inside, flips 0 or 1.

    Args:
        columns: record columns as stored. images: of the bank. rows: of the label set. where: for the message.
    """

    def need(ok: Any, name: str, what: str) -> None:
        if not ok.all():
            bad = int(np.flatnonzero(~ok)[0])
            raise BankError(f"{where}: {name} {what}", got=np.asarray(columns[name][bad]).tolist())

    crop, box, share = columns["crop"], columns["mix_box"], columns["mix_lambda"]
    need(columns["sample"] < images, "sample", f"must be an image from 0 to {images - 1}")
    need(columns["partner"] < rows, "partner", f"must be a row from 0 to {rows - 1}")
    need(columns["flip"] <= 1, "flip", "must be 0 or 1")
    with np.errstate(invalid="ignore"):  # NaN fails every comparison, which is what is asked
        inside = (crop[:, :2] >= 0).all(1) & (crop[:, 2:] > 0).all(1) & (crop[:, :2] + crop[:, 2:] <= 1.0001).all(1)
        need(inside, "crop", "must lie inside the image")
        need((share >= 0) & (share <= 1), "mix_lambda", "must be in [0, 1]")
    need((box[:, 0] <= box[:, 2]) & (box[:, 1] <= box[:, 3]), "mix_box", "must be top, left, bottom, right")


def apply_views(images: Tensor, views: Views, size: tuple[int, int], partner_images: Tensor | None = None) -> Tensor:
    """Make the views: crop and resize, mirror, mix. Each view depends on its own record alone, bit for bit.

    Args:
        images: (B, C, H, W) uint8 (or float in [0, 1]), the images `views.sample` in order.
        views: their records.
        size: (height, width) of the result.
        partner_images: (M, C, H, W), the images `views.partner_sample`; needed when M > 0.

    Returns:
        (B, C, *size) float32 in [0, 1] on the device of `images`. Bilinear, antialiased where a crop shrinks:
        torchvision's `resized_crop(..., antialias=True)` of a float image (agreement checked to 1e-6 in the tests).
    """
    import torch

    views_out = crop_views(images, views.crop, views.flip, size)
    mixed = np.flatnonzero(views.mixed)
    if not len(mixed):
        return views_out
    assert partner_images is not None and len(partner_images) == len(mixed)
    device = images.device
    other = crop_views(partner_images, views.partner_crop, views.partner_flip, size)
    at = torch.from_numpy(mixed).to(device)
    box = torch.from_numpy(views.mix_box[mixed].astype(np.int64)).to(device)[:, :, None, None]  # (M, 4, 1, 1)
    share = torch.from_numpy(views.mix_lambda[mixed]).to(device)[:, None, None, None]
    y, x = torch.arange(size[0], device=device)[:, None], torch.arange(size[1], device=device)
    inside = (y >= box[:, 0:1]) & (y < box[:, 2:3]) & (x >= box[:, 1:2]) & (x < box[:, 3:4])
    mixup = (box == 0).all(dim=1, keepdim=True)
    own = views_out.index_select(0, at)
    blended = own * share + other * (1 - share)
    views_out[at] = torch.where(mixup, blended, torch.where(inside, other, own))
    return views_out


def crop_views(images: Tensor, crop: np.ndarray, flip: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Crop, resize to `size` and mirror every image on its own; see `apply_views`."""
    import torch

    count, channels, high, wide = images.shape
    pixels = np.array([high, wide, high, wide])
    boxes = np.rint(crop.astype(np.float64) * pixels).astype(np.int64)
    boxes[:, 2:] = np.clip(boxes[:, 2:], 1, pixels[2:])
    boxes[:, :2] = np.clip(boxes[:, :2], 0, pixels[:2] - boxes[:, 2:])
    mirrored = torch.from_numpy(flip.astype(bool))
    step = max(1, _CHUNK_BYTES // (4 * channels * size[0] * size[1]))
    result = torch.empty((count, channels, *size), dtype=torch.float32, device=images.device)
    for at in range(0, count, step):
        part = slice(at, at + step)
        rows = _resample(images[part], boxes[part, 0], boxes[part, 2], size[0], 2, None)
        result[part] = _resample(rows, boxes[part, 1], boxes[part, 3], size[1], 3, mirrored[part])
    return result.div_(255) if images.dtype == torch.uint8 else result


def _resample(
    images: Tensor, start: np.ndarray, length: np.ndarray, out: int, dim: int, mirrored: torch.Tensor | None
) -> Tensor:
    """Triangle-filter the windows [start, start + length) of `dim` (2 or 3) to `out` pixels.

    Taps are added one after the other, and an image takes as many as its own scale needs: further ones, taken because
    another image of the batch shrinks more, have weight 0 and change no bit. (A matrix product would be free to.)
    """
    import torch

    device = images.device
    needed = np.ceil(2 * np.maximum(1.0, length / out)).astype(np.int64)  # of a filter two half widths wide
    begin, extent, own_taps = (torch.from_numpy(v).to(device)[:, None] for v in (start, length, needed))
    position = torch.arange(out, device=device)
    if mirrored is not None:
        position = torch.where(mirrored.to(device)[:, None], out - 1 - position, position)
    scale = extent.float() / out
    reach = scale.clamp(min=1.0)  # half width of the filter: one source pixel, or one target pixel where that is more
    centre = (position + 0.5) * scale
    first = (centre - reach + 0.5).floor().clamp(min=0).long()
    shape = list(images.shape)
    shape[dim] = out
    across = (slice(None), None, slice(None), None) if dim == 2 else (slice(None), None, None, slice(None))
    total = torch.zeros_like(centre)
    result = torch.zeros(shape, dtype=torch.float32, device=device)
    for tap in range(int(needed.max())):
        source = first + tap
        weight = (1 - (source + 0.5 - centre).abs() / reach).clamp(min=0) * (source < extent) * (tap < own_taps)
        index = source.minimum(extent - 1) + begin
        result.add_(images.gather(dim, index[across].expand(shape)).float().mul_(weight[across]))
        total.add_(weight)
    return result.div_(total[across])
