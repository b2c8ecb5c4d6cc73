"""ZCA whitening against kornia's numbers (tests/reference/zca_kornia.npz)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.data.zca import ZCA
from synthkit.errors import DataError

REFERENCE = Path(__file__).parents[1] / "reference" / "zca_kornia.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(REFERENCE) as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def images(n: int = 300, seed: int = 0) -> torch.Tensor:
    """Smooth uint8 images, so that their pixels are correlated."""
    noise = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(noise, (8, 8), mode="bilinear") * 255).to(torch.uint8)


def test_equal_to_kornia(golden):
    zca = ZCA.fit(golden["train"])
    for ours, theirs in ((zca.mean, "mean"), (zca.matrix, "W"), (zca.inverse, "W_inv")):
        torch.testing.assert_close(ours.double(), golden[theirs].view(ours.shape), rtol=2e-7, atol=2e-7)
    for part in ("train", "test"):
        torch.testing.assert_close(zca.whiten(golden[part]), golden[f"white_{part}"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            zca.unwhiten(golden[f"white_{part}"]), golden[f"restored_{part}"], rtol=1e-5, atol=1e-6
        )


def test_chunks_and_dtypes_do_not_change_the_fit(monkeypatch):
    whole = ZCA.fit(images())
    monkeypatch.setattr("synthkit.data.zca._CHUNK", 77)
    for other in (ZCA.fit(images()), ZCA.fit(images().double() / 255), ZCA.fit(images().float() / 255)):
        torch.testing.assert_close(other.matrix, whole.matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ZCA.fit(images()).whiten(images()), whole.whiten(images()), rtol=1e-4, atol=1e-4)


def test_whitened_set_has_shrunk_identity_covariance():
    zca = ZCA.fit(images(2000), eps=1e-6)
    white = zca.whiten(images(2000)).flatten(1).double()
    values = torch.linalg.eigvalsh(white.T.cov())
    # a direction of variance s is left with s / (s + eps): 1 where there is any variance to speak of, else 0
    assert float(white.mean(0).abs().max()) < 1e-3
    assert bool(((values - 1).abs() < 0.02).logical_or(values < 0.9).all()) and int((values > 0.98).sum()) >= 40


def test_round_trip_through_arrays_and_back_to_pixels():
    zca = ZCA.fit(images())
    back = ZCA.from_arrays(zca.arrays(), eps=zca.eps)
    pixels = images(5, seed=3)
    assert torch.equal(back.whiten(pixels), zca.whiten(pixels)) and back.eps == 0.1
    restored = back.unwhiten(back.whiten(pixels)) * 255
    assert torch.equal(restored.round().to(torch.uint8), pixels)


def test_autocast_is_kept_out():
    zca, pixels = ZCA.fit(images()), images(5)
    with torch.autocast("cpu", torch.bfloat16):
        inside, refit = zca.whiten(pixels), ZCA.fit(images())
    assert torch.equal(inside, zca.whiten(pixels)) and torch.equal(refit.matrix, zca.matrix)


@pytest.fixture(params=[True, False])
def tf32(request):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


def test_tf32_is_off_inside_and_put_back(tf32):
    zca, seen = ZCA.fit(images()), []
    zca._map(images(5), lambda part: (seen.append(torch.backends.cuda.matmul.allow_tf32), part.float())[1])
    assert seen == [False] and torch.backends.cuda.matmul.allow_tf32 == tf32

    def broken(part: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        zca._map(images(5), broken)
    assert torch.backends.cuda.matmul.allow_tf32 == tf32


def test_gradient_passes():
    zca = ZCA.fit(images())
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(zca.whiten, (x,)) and torch.autograd.gradcheck(zca.unwhiten, (x,))


def test_refusals():
    arrays = ZCA.fit(images()).arrays()
    with pytest.raises(DataError, match="two images"):
        ZCA.fit(images(1))
    with pytest.raises(DataError, match="'inverse'"):
        ZCA.from_arrays({k: v for k, v in arrays.items() if k != "inverse"})
    with pytest.raises(DataError, match="do not fit"):
        ZCA.from_arrays(arrays | {"mean": arrays["mean"][:-1]})
    with pytest.raises(DataError, match="finite"):
        ZCA.from_arrays(arrays | {"mean": arrays["mean"] * np.nan})
    with pytest.raises(DataError, match="192 numbers"):
        ZCA.from_arrays(arrays).whiten(torch.zeros(2, 3, 4, 4))
