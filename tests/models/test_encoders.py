"""The encoder of PRE-DFKD's VAE and the spectral norm of its generator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from synthkit.errors import ModelError
from synthkit.models.build import count_parameters
from synthkit.models.encoders import VAEEncoder
from synthkit.models.generators import build_generator


def encoder(**more) -> VAEEncoder:
    return VAEEncoder(**{"latent_dim": 5, "image_size": 16, "channels": 1, "width": 3, "seed": 0, **more})


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_published_count():
    with torch.device("meta"):
        net = VAEEncoder(latent_dim=1000, image_size=32, channels=3)
        mu, log_var = net(torch.empty(2, 3, 32, 32))
    assert mu.shape == log_var.shape == (2, 1000)
    assert count_parameters(net) == 4_321_872 and len(list(net.parameters())) == 16
    assert sum(b.numel() for b in net.buffers()) == 643


def test_weights_start_uniform_and_biases_at_zero():
    for layer in encoder(width=16).modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert 0.07 < layer.weight.abs().max() <= 0.08 and layer.bias is not None and (layer.bias == 0).all()


def test_seed_decides_the_weights_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    one, same, other = encoder(), encoder(), encoder(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.mu.weight, same.mu.weight) and not torch.equal(one.mu.weight, other.mu.weight)


def test_the_scale_of_a_column_is_not_seen():
    net, x = encoder().eval(), images()
    scales = torch.rand(6, 1, 1, 16, generator=torch.Generator().manual_seed(1)) + 0.5
    torch.testing.assert_close(net(x), net(x * scales))
    assert not torch.allclose(net(x)[0], net(x.transpose(2, 3))[0])


def test_layers_by_hand():
    """Against the layer list of the card, one by one, with the resizing that the original names."""
    net, x = encoder().eval(), images()
    found = x / x.pow(2).sum(2, keepdim=True).sqrt()
    conv1, bn1, relu1, conv2, bn2, relu2 = net.first
    found = relu2(bn2(conv2(relu1(bn1(conv1(found))))))
    found = nn.functional.interpolate(found, scale_factor=0.5)
    found = nn.functional.interpolate(net.second(found), scale_factor=0.5).flatten(1)
    torch.testing.assert_close(net(x), (net.mu(found), net.log_var(found)))
    assert [m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == [0.8, 0.8, 1e-5]


def test_size_that_does_not_divide():
    with pytest.raises(ModelError, match="multiple of 8"):
        encoder(image_size=28)


def test_spectral_norm_of_the_replay_generator():
    """After some forwards in train mode no convolution has a singular value above 1, whatever its weights."""
    net = build_generator(
        "dafl_sn", latent_dim=6, image_size=8, channels=3, width=2, mean=[0.5] * 3, std=[0.25] * 3, seed=0
    )
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 3
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("weight.original"):
                parameter.mul_(7.0)
        for _ in range(60):
            net(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    for conv in convs:
        assert float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)) == pytest.approx(1.0, abs=1e-3)
