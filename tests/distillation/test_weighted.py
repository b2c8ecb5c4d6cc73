"""Weighted sums of losses: what can be written, what every term weighs and when, and what a sum needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from synthkit import tables
from synthkit.config.parse import config_hash, config_to_dict, parse_command_line, parse_config
from synthkit.distillation.contract import Batch, Look, Loss, LossNeeds, Setup, Shapes, Taps
from synthkit.distillation.losses.kd import kd_loss
from synthkit.distillation.outputs import identity, short_hash
from synthkit.distillation.weighted import Term, WeightedSum, parse_terms, weighted_sum
from synthkit.errors import ConfigError


@pytest.fixture
def parts(monkeypatch) -> Iterator[dict[str, Any]]:
    """Two losses of the table that write down what is done with them: `first` and `second`."""
    made: dict[str, Any] = {}
    for name, value in (("first", 1.0), ("second", 10.0)):

        class Part(Loss):
            calls: list[Any] = []

            @dataclasses.dataclass(frozen=True, kw_only=True)
            class Config:
                size: float = 1.0
                """Factor of the value."""

            def setup(self, setup: Setup) -> None:
                self.calls.append(("setup", setup.seed))
                self.aux = nn.Linear(2, 2)

            def prepare(self, looks) -> None:
                self.calls.append(("prepare", len(list(looks()))))

            def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, torch.Tensor]:
                self.calls.append(("call", batch.epoch))
                return {type(self).__name__: self.config.size * student.logits[:, 0]}

            def on_step(self, optimizer, progress) -> None:
                self.calls.append(("on_step", progress))

        made[name] = type(name, (Part,), {"calls": [], "value": value})
        monkeypatch.setattr(f"{__name__}.{name}", made[name], raising=False)
        monkeypatch.setitem(tables.LOSSES, name, f"{__name__}:{name}")
    weighted_sum.cache_clear()
    yield made
    weighted_sum.cache_clear()


def setup() -> Setup:
    return Setup(student=Shapes(), teacher=Shapes(), num_classes=3, batch_size=4, epochs=2, images=8, seed=5)


def taps() -> tuple[Taps, Taps, Batch]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(6, 4, generator=generator) for _ in range(2))
    return Taps(logits=student), Taps(logits=teacher), Batch(images=torch.zeros(6, 1, 2, 2), labels=torch.arange(6) % 4)


# --- what can be written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("ce+kd", [Term("ce"), Term("kd")]),
        ("ce+0.9*kd+dkd@ramp20", [Term("ce"), Term("kd", 0.9), Term("dkd", 1.0, "ramp", 20.0)]),
        (" ce + 30000 * pkt ", [Term("ce"), Term("pkt", 30000.0)]),
        ("1e-3*at@until1.5+kd", [Term("at", 1e-3, "until", 1.5), Term("kd")]),
        (".5*kd+2.*ce@cosine", [Term("kd", 0.5), Term("ce", 2.0, "cosine")]),
        ("kd@until3+ce@from3", [Term("kd", 1.0, "until", 3.0), Term("ce", 1.0, "from", 3.0)]),
    ],
)
def test_sums_are_read(text, terms):
    assert list(parse_terms(text)) == terms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ce+kdd", "loss: not a known loss; got 'kdd'; did you mean 'kd'"),
        ("ce+", r"cannot read the term ''; a term is \[WEIGHT\*\]NAME\[@SCHEDULE\]"),
        ("ce*0.5+kd", r"cannot read the term 'ce\*0.5'"),
        ("-1*kd+ce", r"cannot read the term '-1\*kd'"),
        ("1.2.3*kd+ce", r"cannot read the term '1.2.3\*kd'"),
        ("kd@ramp1.2.3", "cannot read the term"),
        (".*kd", "cannot read the term"),
        ("kd+ce+2*kd", "kd is named twice; add the weights up"),
        ("ce+kd@rampe20", "no such schedule; got '@rampe20'; did you mean 'rampN'"),
        ("ce+kd@ramp", "no such schedule; got '@ramp'"),
        ("ce+kd@ramp0", "no such schedule; got '@ramp0'"),
        ("ce+kd@cosine5", "no such schedule; got '@cosine5'"),
        ("kd@from5", "from epoch 0 on no term counts"),
        ("kd@until5", "from epoch 5 on no term counts"),
        ("kd@until2.5+ce@from4", "from epoch 3 on no term counts, .*add a term without until or from"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_terms(text)


# --- weights over the run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "epoch", "progress", "weight"),
    [
        (Term("kd", 2.0), 7.9, 0.3, 2.0),
        (Term("kd", 2.0, "ramp", 4.0), 0.99, 0.1, 0.0),
        (Term("kd", 2.0, "ramp", 4.0), 3.5, 0.4, 1.5),
        (Term("kd", 2.0, "ramp", 4.0), 90.0, 0.9, 2.0),
        (Term("kd", 2.0, "until", 3.0), 2.99, 0.1, 2.0),
        (Term("kd", 2.0, "until", 3.0), 3.0, 0.1, 0.0),
        (Term("kd", 2.0, "from", 3.0), 2.99, 0.1, 0.0),
        (Term("kd", 2.0, "from", 3.0), 3.0, 0.1, 2.0),
        (Term("kd", 2.0, "cosine"), 5.0, 0.0, 2.0),
        (Term("kd", 2.0, "cosine"), 5.0, 0.5, 1.0),
        (Term("kd", 2.0, "cosine"), 5.0, 1.0, 0.0),
        (Term("kd", 2.0, "cosine"), 5.0, 1 / 3, 1.0 + math.cos(math.pi / 3)),
    ],
)
def test_weight_of_a_term(term, epoch, progress, weight):
    assert term.factor(epoch, progress) == pytest.approx(weight, abs=1e-12)


def test_a_sum_is_the_weighted_terms():
    student, teacher, batch = taps()
    loss = weighted_sum("ce+0.5*kd")()
    assert isinstance(loss, WeightedSum)
    found = loss(student, teacher, batch)
    assert list(found) == ["ce", "kd"] and all(value.shape == (6,) for value in found.values())
    torch.testing.assert_close(found["kd"], 0.5 * kd_loss(student.logits, teacher.logits, reduction="none"))
    assert batch.labels is not None
    cross = nn.functional.cross_entropy(student.logits, batch.labels, reduction="none")
    torch.testing.assert_close(found["ce"], cross)


def test_a_phase_that_is_over_or_not_begun_is_not_computed(parts):
    loss = weighted_sum("first@until2+3*second@from2")()
    student, teacher, batch = taps()
    names = []
    for epoch in (0.0, 1.9, 2.0, 7.0):
        names.append(list(loss(student, teacher, dataclasses.replace(batch, epoch=epoch))))
    assert names == [["first"], ["first"], ["second"], ["second"]]
    assert parts["first"].calls == [("call", 0.0), ("call", 1.9)]
    assert parts["second"].calls == [("call", 2.0), ("call", 7.0)]
    torch.testing.assert_close(loss(student, teacher, dataclasses.replace(batch, epoch=2.0))["second"],
                               3 * student.logits[:, 0])  # fmt: skip


def test_a_ramp_that_weighs_nothing_yet_is_shown():
    student, teacher, batch = taps()
    found = weighted_sum("ce+kd@ramp4")()(student, teacher, dataclasses.replace(batch, epoch=0.5))
    assert list(found) == ["ce", "kd"] and bool((found["kd"] == 0).all())


# --- the parts --------------------------------------------------------------------------------------------------------


def test_every_part_is_set_up_prepared_and_called_at_steps(parts):
    loss = weighted_sum("first+second")()
    loss.setup(setup())
    assert isinstance(loss.aux, nn.ModuleDict) and list(loss.aux) == ["first", "second"]
    look = Look(teacher=taps()[1], labels=None, index=torch.arange(6))
    loss.prepare(lambda: iter([look, look]))
    loss.on_step(torch.optim.SGD(loss.aux.parameters(), lr=0.1), 0.25)
    for part in parts.values():
        assert part.calls == [("setup", 5), ("prepare", 2), ("on_step", 0.25)]


def test_a_sum_without_modules_has_none():
    loss = weighted_sum("ce+kd")()
    loss.setup(setup())
    assert loss.aux is None and loss.parameter_groups(nn.Linear(2, 2)) is None


def test_one_part_may_bring_groups_and_the_others_modules_join_them(parts):
    student = nn.Linear(3, 3)
    parts["first"].parameter_groups = lambda self, student: [
        {"params": [*student.parameters(), *self.aux.parameters()], "lr_scale": 0.5}
    ]
    loss = weighted_sum("first+second")()
    loss.setup(setup())
    groups = loss.parameter_groups(student)
    assert loss.aux is not None and groups is not None and len(groups) == 2 and groups[0]["lr_scale"] == 0.5
    given = [p for group in groups for p in group["params"]]
    everything = [*student.parameters(), *loss.aux.parameters()]
    assert len(given) == len(everything) and {id(p) for p in given} == {id(p) for p in everything}
    parts["second"].parameter_groups = lambda self, student: [{"params": list(self.aux.parameters())}]
    with pytest.raises(ConfigError, match=r"own optimiser groups; got \['first', 'second'\]"):
        loss.parameter_groups(student)


def test_needs_are_merged(parts):
    maps: dict[str, Any] = {"student": ("maps",), "teacher": ("maps",)}
    parts["first"].requires = LossNeeds(labels=True, **maps, smallest_batch=64, teachers=2)
    parts["second"].requires = LossNeeds(student=("pooled", "maps"), relational=True, index=True, live_teacher=True)
    assert weighted_sum("first+second")().requires == LossNeeds(
        labels=True, live_teacher=True, student=("maps", "pooled"), teacher=("maps",), index=True, relational=True,
        smallest_batch=64, teachers=2,
    )  # fmt: skip


def test_needs_of_a_part_may_depend_on_its_options():
    kind = weighted_sum("ikl+kd")
    parts = {"ikl": tables.lookup("loss", "ikl").Config(class_prior=True)}
    assert kind(kind.Config(**parts)).requires.labels and not kind().requires.labels


def test_one_part_may_deploy_modules_two_may_not(parts):
    parts["first"].requires = LossNeeds(deploys=True)
    parts["first"].deploy = lambda self, student: nn.Sequential(student, nn.ReLU())
    parts["first"].deployed_settings = lambda self: {"width": 3}
    loss = weighted_sum("second+0.5*first")()
    student = nn.Linear(2, 2)
    assert loss.requires.deploys and loss.deployer is not None and loss.deployer[0] == "first"
    deployed = loss.deploy(student)
    assert isinstance(deployed, nn.Sequential) and deployed[0] is student
    assert loss.deployed_settings() == {"width": 3}
    alone = weighted_sum("2*second")()
    assert alone.deploy(student) is None and alone.deployed_settings() == {} and alone.deployer is None
    parts["second"].requires = LossNeeds(deploys=True)
    with pytest.raises(ConfigError, match="two losses of the sum deploy modules with the student; use one of them"):
        weighted_sum("first+second")()


# --- options ----------------------------------------------------------------------------------------------------------

WORDS = ["--bank", "b", "--student", "resnet8", "--loss", "ce+0.9*kd+dkd@ramp20"]


def test_options_of_terms_are_flags():
    cfg = parse_config("distill", [*WORDS, "--loss.kd.temperature", "2", "--loss.dkd.beta", "4"])
    assert cfg.loss_name == "ce+0.9*kd+dkd@ramp20"
    assert cfg.loss.kd.temperature == 2.0 and cfg.loss.kd.t_squared and cfg.loss.dkd.beta == 4.0
    assert cfg.loss.ce == tables.lookup("loss", "ce").Config()
    same = {"ce": {}, "kd": {"temperature": 2}, "dkd": {"beta": 4}}
    recipe = {"bank": "b", "student": "resnet8", "loss": {"name": cfg.loss_name, **same}}
    assert parse_config("distill", recipe) == cfg


def test_a_config_survives_its_plain_form():
    cfg = parse_config("distill", [*WORDS, "--loss.kd.temperature", "2"])
    plain = config_to_dict(cfg)
    assert plain["loss"]["name"] == cfg.loss_name and plain["loss"]["kd"]["temperature"] == 2.0
    assert parse_config("distill", plain) == cfg
    other = parse_config("distill", WORDS)
    assert config_hash(other) != config_hash(cfg)
    weight = parse_config("distill", [*WORDS[:-1], "ce+0.8*kd+dkd@ramp20"])
    assert len({config_hash(c) for c in (cfg, other, weight)}) == 3


@pytest.mark.parametrize("name", sorted(tables.LOSSES))
def test_one_weighted_term_is_read_from_a_config(name):
    """Also where no term has options."""
    cfg = parse_config("distill", {"bank": "b", "student": "resnet8", "loss": {"name": f"0.5*{name}"}})
    assert cfg.loss_name == f"0.5*{name}" and cfg.loss == weighted_sum(f"0.5*{name}").Config()


def test_run_json_tells_sums_apart():
    """What a resumed run is compared by: the expression and the options of every term."""
    cfg, other = parse_config("distill", [*WORDS, "--loss.kd.temperature", "2"]), parse_config("distill", WORDS)
    same = parse_config("distill", [*WORDS, "--loss.kd.temperature", "2.0", "--out", "elsewhere"])
    assert identity(cfg) == identity(same) != identity(other) and short_hash(cfg) == short_hash(same)
    assert identity(cfg)["loss"]["kd"] == {"temperature": 2.0, "t_squared": True}
    assert identity(cfg)["loss_name"] == "ce+0.9*kd+dkd@ramp20"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss.kd.temprature", "2"], "did you mean '?--loss.kd.temperature"),
        (["--loss.temperature", "2"], "loss.temperature"),
        (["--loss.kd.temperature", "warm"], "loss.kd.temperature: expected a number; got 'warm'"),
        (["--loss.kd.temperature", "0"], "temperature"),
    ],
)
def test_wrong_options_of_terms_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_config("distill", [*WORDS, *words])


def test_an_unknown_term_is_refused_on_the_command_line():
    with pytest.raises(ConfigError, match="did you mean 'dkd'"):
        parse_config("distill", [*WORDS[:-1], "ce+dkkd"])


def test_help_lists_the_options_of_every_term():
    text = parse_command_line("distill", [*WORDS, "--help"]).text
    assert text is not None
    for flag in ("--loss.ce.label_smoothing", "--loss.kd.temperature", "--loss.kd.t_squared", "--loss.dkd.beta"):
        assert flag in text
    assert "Options of KD" in text and "Softening temperature" in text
    single = parse_command_line("distill", [*WORDS[:-1], "kd", "--help"]).text
    assert single is not None and "--loss.temperature" in single and "--loss.kd.temperature" not in single


def test_effective_recipe_is_taken_back(tmp_path):
    words = [*WORDS, "--loss.kd.temperature", "2"]
    text = parse_command_line("distill", [*words, "--print_config"]).text
    assert text is not None
    (tmp_path / "recipe.yaml").write_text(text)
    assert parse_config("distill", ["--config", str(tmp_path / "recipe.yaml")]) == parse_config("distill", words)
