"""Training fresh networks: the schedule of each protocol, and stacked networks against single ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from synthkit.errors import ConfigError
from synthkit.evaluation import fresh_nets
from synthkit.evaluation.dd_protocols import DD_PROTOCOLS, DDProtocol, own_arch, own_protocol, protocol_named
from synthkit.evaluation.fresh_nets import Pictures, Training, train_together
from synthkit.models.build import build_model


def builder(name: str):
    return lambda seed: build_model(name, num_classes=3, in_channels=1, image_size=8, seed=seed)


def learnable(n: int, seed: int = 0) -> Pictures:
    """Bars in one of three places under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.rand(n, 1, 8, 8, generator=generator) * 120
    for i, label in enumerate(labels.tolist()):
        images[i, :, 2 * label + 1] += 130
    mean, std = torch.full((1, 1, 1, 1), 0.4), torch.full((1, 1, 1, 1), 0.3)
    return Pictures(images=images.to(torch.uint8), targets=labels, mean=mean, std=std)


def training(name: str, epochs: int, **changes) -> Training:
    values = {"protocol": DD_PROTOCOLS[name], "epochs": epochs, "lr": 0.05, "strategy": "color_crop", "dc_ops": ()}
    return Training(**{**values, **changes})


def rates(protocol: DDProtocol, epochs: int) -> list[float]:
    return [round(protocol.rate(e, epochs), 9) for e in range(protocol.epochs_run(epochs))]


def test_dc_schedule_falls_after_half_and_runs_one_epoch_more():
    dc = DD_PROTOCOLS["dc"]
    # E = 6: epochs 0 to 6; after epoch 6 // 2 + 1 = 4 the rate falls and the optimiser is new
    assert rates(dc, 6) == [1, 1, 1, 1, 1, 0.1, 0.1]
    assert [dc.restarts(e, 6) for e in range(7)] == [False] * 5 + [True, False]
    assert dc.epochs_for(True) == 1000 and dc.epochs_for(False) == 300 and dc.epochs_run(1000) == 1001


def test_step_schedules():
    assert rates(DD_PROTOCOLS["idc"], 6) == [1, 1, 1, 1, 0.2, 0.04]
    assert rates(DD_PROTOCOLS["ncfm"], 5) == [1, 0.5, 0.25, 0.125, 0.0625]
    assert rates(DD_PROTOCOLS["dc_bench"], 4) == [1, 1, 0.1, 0.1]
    assert not any(DD_PROTOCOLS["idc"].restarts(e, 6) for e in range(7))


def test_table_is_that_of_the_method_card():
    wanted = {
        "dc": (300, 256, 0.01, "hard"), "dsa": (1000, 256, 0.01, "hard"), "dm": (1000, 256, 0.01, "hard"),
        "mtt": (1000, 256, 0.01, "hard"), "datm": (1000, 128, 0.01, "soft"), "idc": (1000, 64, 0.01, "hard"),
        "datadam": (1800, 64, 0.01, "hard"), "ncfm": (2000, 128, 0.001, "hard"), "dc_bench": (300, 256, 0.01, "hard"),
        "dd_ranking": (1000, 128, 0.01, "hard"),
    }  # fmt: skip
    for name, values in wanted.items():
        p = DD_PROTOCOLS[name]
        assert (p.epochs, p.batch_size, p.lr, p.labels) == values, name
        assert p.learnt_lr == (name in ("mtt", "datm")) and p.source


def test_a_whole_run_is_the_naive_loop():
    """One full batch per epoch and no augmentation: order does not matter, so plain torch must give the same."""
    train, test = learnable(12), learnable(60, seed=1)
    for name, epochs in (("dc", 6), ("ncfm", 5)):
        protocol = DD_PROTOCOLS[name]
        plan = training(name, epochs, protocol=DDProtocol(**{**vars(protocol), "augment": "none", "cutmix": 0.0}))
        found = train_together(builder("convnet_d2_w8"), [train], test, plan, [5])[0]
        net = builder("convnet_d2_w8")(5)
        x, y = (train.images.float() / 255 - 0.4) / 0.3, train.targets

        def optimizer(lr: float, net=net, name=name):
            if name == "ncfm":
                return torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01)
            return torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4)

        lr, loss = 0.05, torch.zeros(())
        opt = optimizer(lr)
        for epoch in range(epochs + 1 if name == "dc" else epochs):
            if name == "ncfm" and epoch in (1, 2, 3, 4):
                opt.param_groups[0]["lr"] *= 0.5
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            if name == "dc" and epoch == epochs // 2 + 1:
                lr *= 0.1
                opt = optimizer(lr)
        assert found.loss == pytest.approx(float(loss.detach()), rel=1e-4)
        with torch.no_grad():
            right = net((test.images.float() / 255 - 0.4) / 0.3).argmax(1) == test.targets
        assert found.last == pytest.approx(float(right.float().mean()), abs=1.5 / 60)


@pytest.mark.parametrize("name", ["convnet_d2_w8", "mlp"])
@pytest.mark.parametrize("protocol", ["dsa", "idc", "dc"])
def test_stacked_networks_are_the_single_ones(name, protocol):
    sets = [learnable(15, seed) for seed in range(3)]
    sets = [Pictures(images=s.images, targets=F.one_hot(s.targets, 3).float(), mean=s.mean, std=s.std) for s in sets]
    test, seeds = learnable(60, seed=9), [3, 4, 5]
    small = DDProtocol(**{**vars(DD_PROTOCOLS[protocol]), "batch_size": 6})
    plan = training(protocol, 4, protocol=small, dc_ops=("crop", "scale", "rotate"))
    together = train_together(builder(name), sets, test, plan, seeds, points=[2], curve_images=30)
    for i, seed in enumerate(seeds):
        alone = train_together(builder(name), [sets[i]], test, plan, [seed], points=[2], curve_images=30)[0]
        assert alone.loss == pytest.approx(together[i].loss, rel=2e-3)
        assert alone.last == pytest.approx(together[i].last, abs=2 / 60)
        assert [e for e, _ in alone.curve] == [2] == [e for e, _ in together[i].curve]
    assert len({net.loss for net in together}) == 3


def test_networks_learn_and_the_same_seed_is_the_same_network():
    train, test = learnable(30), learnable(90, seed=1)
    plan = training("dsa", 30, lr=0.05)
    before = torch.random.get_rng_state()
    first = train_together(builder("convnet_d2_w8"), [train], test, plan, [1])[0]
    again = train_together(builder("convnet_d2_w8"), [train], test, plan, [1])[0]
    other = train_together(builder("convnet_d2_w8"), [train], test, plan, [2])[0]
    assert first == again and first.loss != other.loss
    assert first.last > 0.9
    assert torch.equal(before, torch.random.get_rng_state())


def test_batchnorm_networks_are_never_stacked_and_learn():
    train, test = learnable(30), learnable(90, seed=1)
    plan = training("dsa", 20)
    assert not fresh_nets.stacking_pays(builder("convnet_d2_w8_bn"), train, plan, 3)
    assert train_together(builder("convnet_d2_w8_bn"), [train], test, plan, [1])[0].last > 0.9


def test_measured_rule_on_cpu():
    train, plan = learnable(30), training("dsa", 20)
    for name in ("mlp", "convnet_d2_w8"):
        assert not fresh_nets.stacking_pays(builder(name), train, plan, 3)


def test_cost_is_measured_on_throw_away_networks():
    train = learnable(30)
    seconds, kept = fresh_nets.step_seconds(builder("convnet_d2_w8"), train, training("dsa", 20), 1)
    assert 0 < seconds < 5 and kept > train.images.numel() * 4
    assert fresh_nets.scoring_seconds(builder("convnet_d2_w8"), learnable(200)) > 0


def test_own_protocol_and_network():
    def own(method, per_class=1, **more):
        return own_protocol({"method": method}, per_class, **more)[0]

    assert own({"name": "dc"}) == "dc" and own({"name": "dm"}) == "dm" and own({"name": "mtt"}) == "mtt"
    assert own({"name": "mtt"}, soft=True) == "datm" and own({"name": "random_real"}) == "dsa"
    assert own({"name": "cudfkd"}, 5000) == "bank" and own("arrays") == "dsa" and own_protocol({}, 1)[0] == "dsa"
    assert own_arch({"method": {"arch": "convnet_w32"}}, 28) == "convnet_w32"
    assert [own_arch({}, side) for side in (28, 32, 64, 128, 256)] == [
        "convnet", "convnet", "convnet_d4", "convnet_d5", "convnet_d6",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="did you mean 'datm'"):
        protocol_named("dat")


def test_seeds_of_networks_differ():
    seeds = {fresh_nets.net_seed(s, i) for s in range(5) for i in range(5)}
    assert len(seeds) == 25 and all(0 <= s < 2**63 for s in seeds)
