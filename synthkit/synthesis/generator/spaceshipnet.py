"""SpaceshipNet: channel-wise feature exchange and multi-scale spatial activation regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.errors import ConfigError, ModelError, RequirementError
from synthkit.lazy import torch
from synthkit.synthesis.base import Requires, Task, widened
from synthkit.synthesis.generator.activation_maps import (
    class_activation_maps,
    grad_cam,
    require_common_stages,
    squared_distance,
)
from synthkit.synthesis.generator.config import PoolConfig, at_least_one, not_negative
from synthkit.synthesis.generator.inverting import Best, inversion_terms, new_generator, targets
from synthkit.synthesis.generator.pool import PoolLoop
from synthkit.synthesis.generator.student import Distilled

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SpaceshipNetConfig(PoolConfig):
    """SpaceshipNet; the defaults are the published ResNet-34 -> ResNet-18 run on CIFAR-100."""

    epochs: int = 200
    """Epochs of `ep_steps` student steps; the ramp and the learning rate move per epoch."""
    ep_steps: int = 2000
    """Student steps per epoch (published: one synthesis call before each epoch)."""
    T: float = 30.0
    """KD temperature."""
    oh: float = 0.5
    """Weight of the cross-entropy to the target class."""
    bn: float = 1.0
    """Weight of the BatchNorm-statistics term; off for teachers without BatchNorm."""
    adv_T: float = 1.0
    """Temperature of the adversary, which only a curriculum with a ramp (or `adv`) switches on."""
    mix: float = 0.7
    """Probability that the features of a student step are exchanged channel by channel."""
    cam: float = 1.0
    """Weight of the class-activation maps' distance in the student's loss (0: off)."""
    gradcam: float = 1.0
    """Weight of the Grad-CAM maps' distance, summed over the stages (0: off)."""
    feature_memory: int = 4096
    """Images whose generator features are remembered, the newest ones (half precision, in CPU memory and in every
    stored state: 208 KiB an image at 32 px and width 64; published: all)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "feature_memory")
        not_negative(self, "cam", "gradcam")
        if not 0 <= self.mix <= 1:
            raise ConfigError("method.mix must be a probability", got=self.mix)


class SpaceshipNet(PoolLoop):
    """Invert the teacher with one lasting generator and let the student learn from recombinations of its features.

    Synthesis: x = G(z), z ~ N(0, I) fixed in a call, y uniform; L = oh CE(t(x'), y) + bn L_BN on augmented x', a new
    Adam over G per call. The batch of lowest loss enters the memory, and G's feature maps of it at three depths.
    Student:   features f of one depth (uniform) of random rows; with probability `mix` sample i keeps a random half of
    its channels and takes the others from sample B - 1 - i; today's G in eval mode decodes them, then augmentation.
    L_S = mean_i l_i, l_i = T^2/K KL(softmax(t/T) || softmax(s/T)) + cam mse(W_s A_s, W_t A_t) + gradcam sum_stages
    mse(g_s, g_t): A the last feature map, W the classifier's weight as a 1x1 convolution (a constant for the student),
    g = sum_c w_c A_c, w_c the spatial mean of the gradient of the logit of the teacher's class (a constant; no ReLU).
    `--curriculum easy2hard` weighs l_i by v(l_i) and adds a decision-masked adversary a(e) to L; the published form is
    none.

    A network whose classifier does not look at a pooled map (LeNet, ConvNet) has its penultimate features as A, of one
    pixel. Maps of different size are pooled to the smaller one; Grad-CAM maps are compared at the sizes that teacher
    and student both have.

    Shapes: z (S, nz), images (S, C, H, W) in [0, 1]; maps (B, K, h, w) and (B, h, w); logits (B, K).
    Source: Yu et al., "Data-Free Knowledge Distillation via Feature Exchange and Activation Region Constraint" (CVPR
        2023); skgyu/SpaceshipNet@30a76b0 `model_CFE_mSARC_base_V37.py` and its configs.
    Differs from source: the teacher's weights get no gradient (there all are differentiated to reach the maps); the
        feature memory is bounded and in half precision; labels of exchanged images, which the released code averages
        as integers and never uses, are not made. The bank holds the images as they were made, never exchanged ones.
    Cost: per student step forward of generator and teacher, the teacher's backward to its first stage, and the
        student's backward twice (one for Grad-CAM); memory of features as `feature_memory` says.
    """

    requires: ClassVar[Requires] = Requires(teacher=True)
    Config: ClassVar[type] = SpaceshipNetConfig
    config: SpaceshipNetConfig

    def __init__(self, config: SpaceshipNetConfig, task: Task):
        from synthkit.models.stages import generate_with_maps

        super().__init__(config, task)
        self.generator = new_generator(self, "generator-init").eval()
        try:
            with torch.no_grad():
                z = torch.zeros(1, *self.generator.latent_shape, device=self.device)
                maps = generate_with_maps(self.generator, z)[1]
        except ModelError as error:
            raise RequirementError(f"method.generator {config.generator}: {error}") from None
        rows = min(config.feature_memory, self.calls * config.synthesis_batch)
        self.features = [torch.zeros(rows, *found.shape[1:], dtype=torch.float16) for found in maps]
        self.kept = 0  # rows of features ever kept
        if config.gradcam:
            require_common_stages(self.teacher, self.student_view, self.device)

    # ---- synthesis -------------------------------------------------------------------------------------------

    def synthesise(self, call: int) -> tuple[Tensor, Tensor]:
        """The best batch of `g_steps` iterations and its targets; its features enter the feature memory."""
        from synthkit.data.augment import augment
        from synthkit.models.stages import generate_with_maps

        c, runtime, generator = self.config, self.task.runtime, self.generator.train()
        shape = (c.synthesis_batch, *generator.latent_shape)
        z = torch.randn(shape, generator=self.task.rng(f"call-{call}-latents"), device=self.device)
        labels, draw = targets(self, call), self.task.rng(f"call-{call}-views")
        optimizer = torch.optim.Adam(generator.parameters(), lr=c.lr_g, betas=c.betas_g, fused=self.fused)
        weight, best = self.adversarial_weight(self.epoch), Best()
        for _ in range(c.g_steps):
            with runtime.autocast():
                images, maps = generate_with_maps(generator, z)
                seen = augment(images, c.views, draw)
                look = self.look(seen)
                student = widened(self.student_view(seen)) if weight else None
            terms = inversion_terms(c, look.logits, labels, look.bn, student, weight)
            loss = torch.stack(list(terms.values())).sum()
            best.offer(loss, images, *maps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._clip(generator)
            optimizer.step()
            self.note_generator(terms, loss)
        generator.eval().zero_grad(set_to_none=True)
        images, *maps = best.kept
        self._keep(maps)
        return images, labels

    def _keep(self, maps: list[Tensor]) -> None:
        """Write features over the oldest ones."""
        rows = len(self.features[0])
        newest = [found[-rows:] for found in maps]
        place = (self.kept + torch.arange(len(newest[0]))) % rows
        for memory, found in zip(self.features, newest, strict=True):
            memory[place] = found.to("cpu", torch.float16)
        self.kept += len(newest[0])

    # ---- the student -----------------------------------------------------------------------------------------

    def student_images(self) -> Tensor:
        """Images of one student step, decoded from remembered features; pure in (state, seed, learned)."""
        from synthkit.data.augment import augment
        from synthkit.models.stages import decode

        c, choice, draw = (
            self.config,
            self.task.numpy_rng("student", self.learned),
            self.task.rng(f"student-{self.learned}", "cpu"),
        )
        depth = int(choice.integers(len(self.features)))
        rows = torch.randint(0, min(self.kept, len(self.features[0])), (c.batch_size,), generator=draw)
        maps = self.features[depth][rows].to(self.device, torch.float32)
        if choice.random() < c.mix:
            picks = torch.rand(maps.shape[:2], generator=draw).argsort(1)[:, : maps.shape[1] // 2]
            maps = exchange_channels(maps, picks.to(self.device))
        with torch.no_grad(), self.task.runtime.autocast():
            images = widened(decode(self.generator, maps, depth))
        return augment(images, c.augment, draw)

    def kd_per_sample(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The configured KD loss (B,), KL as its mean over the classes as well (published)."""
        losses = super().kd_per_sample(student, teacher)
        return losses / teacher.shape[1] if self.config.loss == "kl" else losses

    def distil(self, images: Tensor) -> Distilled:
        """Forward passes of both networks with their maps, and L_S."""
        from synthkit.models.stages import stage_maps

        runtime, c = self.task.runtime, self.config
        # the teacher's maps need a graph behind them, and its weights are frozen
        with stage_maps(self.teacher) as of_teacher, runtime.autocast():
            teacher = widened(self.teacher(images.detach().requires_grad_(bool(c.gradcam))))
        with stage_maps(self.student_view) as of_student, runtime.autocast():
            student = widened(self.student_view(images))
        labels = teacher.detach().argmax(1)
        per_sample = self.kd_per_sample(student, teacher.detach())
        if c.cam:
            theirs = class_activation_maps(self.teacher, of_teacher).detach()
            per_sample = per_sample + c.cam * squared_distance(
                class_activation_maps(self.student_view, of_student), theirs
            )
        if c.gradcam:
            sizes = [size for size in of_teacher.stages if size in of_student.stages]
            theirs = grad_cam(teacher, [of_teacher.stages[size] for size in sizes], labels)
            ours = grad_cam(student, [of_student.stages[size] for size in sizes], labels)
            for mine, his in zip(ours, theirs, strict=True):
                per_sample = per_sample + c.gradcam * squared_distance(mine, his.detach())
        return Distilled(teacher.detach(), student, per_sample, self.student_loss(per_sample))

    # ---- state and cost --------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Generator and remembered features; the optimiser lives for one call only."""
        filled = min(self.kept, len(self.features[0]))
        features = {str(depth): memory[:filled] for depth, memory in enumerate(self.features)}
        return {"generator": dict(self.generator.state_dict()), "features": features, "kept": self.kept}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `extra_state`."""
        self.generator.load_state_dict(state["generator"])
        self.kept = int(state["kept"])
        for depth, memory in enumerate(self.features):
            memory[: min(self.kept, len(memory))] = state["features"][str(depth)]

    def estimate(self) -> dict[str, float]:
        """As of the other methods with a memory bank, and the memory of features."""
        found = super().estimate()
        return {**found, "memory_bytes": found["memory_bytes"] + sum(memory.nbytes for memory in self.features)}


def exchange_channels(maps: Tensor, picks: Tensor) -> Tensor:
    """Sample i keeps its own channels `picks[i]` and takes the others from sample B - 1 - i; (B, C, h, w), (B, P)."""
    own = torch.zeros(maps.shape[:2], dtype=torch.bool, device=maps.device).scatter_(1, picks, True)
    return torch.where(own[:, :, None, None], maps, maps.flip(0))
