"""NAYER: noisy-layer data-free distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.errors import ConfigError
from synthkit.lazy import torch
from synthkit.synthesis.base import BankFacts, Requires, Task, seeded_init, widened
from synthkit.synthesis.generator.config import PoolConfig, at_least_one, not_negative
from synthkit.synthesis.generator.embeddings import class_embeddings, embeddings_identity
from synthkit.synthesis.generator.inverting import Best, inversion_terms
from synthkit.synthesis.generator.pool import PoolLoop

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.models.noisy_generator import NoisyGenerator


@dataclass(frozen=True, kw_only=True)
class NAYERConfig(PoolConfig):
    """NAYER; the defaults are the published 100-epoch runs on CIFAR-10 (all teacher-student pairs alike)."""

    epochs: int = 100
    """Epochs of `ep_steps` student steps, the warm-up not counted (published names count 20 more)."""
    batch_size: int = 512
    """Images of the memory bank per student step."""
    lr: float = 0.2
    """Student learning rate."""
    lr_min: float = 2e-4
    """Student learning rate at the end of the cosine."""
    synthesis_batch: int = 400
    """Images per synthesis call: every class once per noisy layer, and a random rest."""
    g_steps: int = 30
    """Iterations per synthesis call (published: 40 for CIFAR-100, 60 for Tiny-ImageNet)."""
    warmup: float = 0.5
    """Share of the synthesis calls that are made before the student starts, without adversary."""
    warmup_epochs: int = 20
    """Epochs that the calls of the warm-up stand for, when the generator's age is counted."""
    g_life: int = 10
    """Epochs after which the whole generator is made anew."""
    lr_g: float = 4e-3
    """Learning rate of the synthesis (a new Adam for every call)."""
    nz: int = 1000
    """Outputs of a noisy layer."""
    oh: float = 0.5
    """Weight of the cross-entropy to the target class."""
    bn: float = 10.0
    """Weight of the BatchNorm-statistics term; off for teachers without BatchNorm."""
    bn_mmt: float = 0.9
    """Weight of earlier calls in the batch statistics (0: none)."""
    adv: float = 1.33
    """Weight of the decision-masked adversary after the warm-up; its start under a curriculum with a ramp."""
    adv_T: float = 1.0
    """Temperature of the adversary."""
    embeddings: str | None = None
    """File of one vector per class, (K, E), from any text encoder (.npy, .npz, .safetensors, .pt); none: the label-only
    form, unless `text_encoder` is given."""
    text_encoder: str | None = None
    """Folder of a CLIP model that encodes the class names (needs transformers; published: ViT-B/32)."""
    embedding_width: int = 512
    """Width of the label-only vectors (at least the number of classes)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "warmup_epochs", "g_life", "embedding_width")
        not_negative(self, "bn_mmt")
        if not self.bn_mmt < 1:
            raise ConfigError("method.bn_mmt must be below 1", got=self.bn_mmt)
        if self.embeddings and self.text_encoder:
            raise ConfigError("method.embeddings and method.text_encoder exclude each other", hint="leave one out")
        if self.generator != "small":
            raise ConfigError("method.generator: NAYER's own generator ends in the layers of small", got=self.generator)


class NAYER(PoolLoop):
    """Fill a memory with batches from fixed class embeddings, whose variety comes from a layer of noise, not from z.

    Synthesis: x = G(e_y), slice j of K samples (each class once) through noisy layer j, all noisy layers drawn anew
    from N(0, 1) for the call; L = bn L_BN + oh CE(t(x'), y) + a L_adv with x' the augmented x, L_BN on statistics
    (1 - m) batch + m memory, m = `bn_mmt`, and L_adv = -mean_i 1[argmax s_i = argmax t_i] KL(softmax t_i || softmax
    s_i), only after the warm-up. The batch of lowest loss among `g_steps` Adam iterations enters the memory.
    Student:   L_S = mean_i v(l_i) l_i on augmented images of the memory, l_i = T^2 KL(softmax(t/T) || softmax(s/T)).
    `--curriculum easy2hard` ramps a up from `adv` and weighs the samples by v; the published form is none (v = 1).

    The label-only form has no text encoder: fixed orthonormal vectors stand for the classes, which then differ but are
    not more or less alike. An "epoch" of the generator's life is mapped onto calls: those of the warm-up are spread
    over `warmup_epochs`, the others over `epochs`; G is made anew where a multiple of `g_life` is passed, counted from
    the start and from the end of the warm-up.

    Shapes: embeddings (K, E), targets (S,) -> images (S, C, H, W) in [0, 1]; logits (S, K).
    Source: Tran et al., "NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free Knowledge
        Distillation" (CVPR 2024, arXiv 2310.00258); tmtuan1307/NAYER@c6bedcd `datafree/synthesis/nayer.py`.
    Differs from source: the student is in eval mode during all synthesis (the released code leaves it in train mode
        from the second batch of an epoch on, so that its BatchNorm statistics follow the generator); crops pad by 1/8
        of the side (4 pixels there: the same at 32 px, half at 64); the memory holds the bank's bytes and is drawn from
        with replacement; CLIP is not shipped. The adversary starts after the last warm-up call, as there (FastDFKD: one
        epoch earlier).
    Cost: per iteration one forward/backward of generator, teacher (to its input) and, while a > 0, student; the noisy
        layers hold ceil(S/K) E nz weights (20.5 million for CIFAR-10), Adam twice as much beside them.
    """

    requires: ClassVar[Requires] = Requires(teacher=True)
    Config: ClassVar[type] = NAYERConfig
    places: ClassVar[tuple[str, ...]] = ("embeddings", "text_encoder")
    config: NAYERConfig

    def __init__(self, config: NAYERConfig, task: Task):
        from synthkit.models.bn_stats import StatisticsEMA

        super().__init__(config, task)
        self.slices = -(-config.synthesis_batch // self.teacher.num_classes)
        self.embeddings = class_embeddings(config, self.teacher, task.warn)
        self.generator = self._new_generator("generator-init")
        self.ema = StatisticsEMA(config.bn_mmt)

    def facts(self) -> BankFacts:
        """What the class vectors are, wherever their file lies."""
        return BankFacts(identity={"embeddings": embeddings_identity(self.config, self.embeddings)})

    # ---- the generator ---------------------------------------------------------------------------------------

    def _new_generator(self, stream: str) -> NoisyGenerator:
        from synthkit.models.noisy_generator import NoisyGenerator

        c, (channels, side, _) = self.config, self.teacher.input_size
        sizes = {"layers": self.slices, "hidden": c.nz, "width": c.width, "image_size": side, "channels": channels}
        generator: Any = seeded_init(lambda: NoisyGenerator(self.embeddings, **sizes), self.task.seed_of(stream))
        if self.task.runtime.channels_last:
            generator.to(memory_format=torch.channels_last)
        return generator.to(self.device).train()

    def generator_epoch(self, call: int) -> int:
        """The epoch that a call stands for, warm-up included."""
        c, warm = self.config, self.warm_calls
        if call < warm:
            return call * c.warmup_epochs // warm
        return c.warmup_epochs + (call - warm) * c.epochs // max(1, self.calls - warm)

    def reborn(self, call: int) -> bool:
        """Whether the generator is made anew before `call`."""

        def lives(epoch: int) -> int:
            return epoch // self.config.g_life + (epoch - self.config.warmup_epochs) // self.config.g_life

        return call > 0 and lives(self.generator_epoch(call)) != lives(self.generator_epoch(call - 1))

    def targets(self, call: int) -> Tensor:
        """Every class once, again and again, then a random rest: (S,)."""
        size, classes = self.config.synthesis_batch, self.teacher.num_classes
        draw = self.task.rng(f"call-{call}-targets")
        rest = torch.randint(0, classes, (size % classes,), generator=draw, device=self.device)
        return torch.cat([torch.arange(classes, device=self.device).repeat(size // classes), rest])

    # ---- synthesis -------------------------------------------------------------------------------------------

    def synthesise(self, call: int) -> tuple[Tensor, Tensor]:
        """The best batch of `g_steps` iterations under new noise, and its targets."""
        from synthkit.data.augment import augment

        c = self.config
        if self.reborn(call):
            self.generator = self._new_generator(f"call-{call}-generator")
        self.generator.redraw(self.task.rng(f"call-{call}-noise"))
        targets, draw = self.targets(call), self.task.rng(f"call-{call}-views")
        optimizer = torch.optim.Adam(self.generator.parameters(), lr=c.lr_g, betas=c.betas_g, fused=self.fused)
        weight, best, statistics = self.adversarial_weight(self.epoch), Best(), None
        for _ in range(c.g_steps):
            with self.task.runtime.autocast():
                images = self.generator(targets)
                seen = augment(images, c.views, draw)
                look = self.look(seen, ema=self.ema)
                student = widened(self.student_view(seen)) if weight else None
            terms, statistics = inversion_terms(c, look.logits, targets, look.bn, student, weight), look.statistics
            loss = torch.stack(list(terms.values())).sum()
            best.offer(loss, images)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._clip(self.generator)
            optimizer.step()
            self.note_generator(terms, loss)
        self.generator.zero_grad(set_to_none=True)
        if statistics and c.bn_mmt:
            self.ema.update(statistics)
        return best.kept[0], targets

    # ---- state -----------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Generator and memory of the BN statistics; the optimiser lives for one call only."""
        return {"generator": dict(self.generator.state_dict()), "ema": self.ema.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `extra_state`."""
        self.generator.load_state_dict(state["generator"])
        self.ema.load(state.get("ema", {}), self.device)
