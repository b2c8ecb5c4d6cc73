"""DFME: a student of a black-box teacher, of which only the answers to queries are known."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from synthkit.lazy import F, torch
from synthkit.logits import kl_per_sample, l1_per_sample
from synthkit.synthesis.base import ImageBatch, Requires, Task, widened
from synthkit.synthesis.generator.config import GeneratorConfig, at_least_one, positive
from synthkit.synthesis.generator.loop import GeneratorLoop

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.models.view import TeacherView


@dataclass(frozen=True, kw_only=True)
class DFMEConfig(GeneratorConfig):
    """DFME; the defaults are the script of CuDFKD's repository, WRN-40-2 -> WRN-16-1 on CIFAR-10."""

    epochs: int = 210
    """Epochs of `ep_steps` student steps; the learning rates move per epoch."""
    batch_size: int = 256
    """Images per generator step and per student step; a generator step asks (m + 1) times as many queries."""
    kd_steps: int = 5
    """Student steps per cycle."""
    g_steps: int = 5
    """Generator steps per cycle."""
    loss: Literal["l1", "kl"] = "kl"  # type: ignore[assignment]  # one choice less than its base
    """What the student minimises (mean |s - t|, or T^2 KL at T) and the generator raises (the same, KL at T = 1)."""
    logits: Literal["recovered", "raw"] = "recovered"
    """What the l1 loss learns from: log-probabilities less their mean, as of a teacher that answers with probabilities,
    or the teacher's logits themselves."""
    m: int = 1
    """Random directions of the gradient estimate."""
    epsilon: float = 1e-3
    """Length of a step along a direction, in normalised pixels."""
    squash: Literal["tanh", "none"] = "tanh"
    """What the generator's objective does to normalised images before it asks: tanh (as released) or nothing."""
    lr_g: float = 1e-4
    """Generator learning rate (one persistent Adam)."""
    betas_g: tuple[float, float] = (0.9, 0.999)
    """Generator Adam betas."""
    generator: str = "small"
    """Generator network (models.generators)."""
    nz: int = 256
    """Latent dimension."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "m")
        positive(self, "epsilon")


class BlackBox:
    """A teacher behind a counter: images in, logits out; no gradient, no features, no BatchNorm statistics."""

    has_batchnorm = False

    def __init__(self, teacher: TeacherView):
        self._teacher = teacher
        self.queries = 0
        self.name, self.class_names = teacher.name, teacher.class_names
        self.mean, self.std = teacher.mean, teacher.std
        self.input_size, self.num_classes = teacher.input_size, teacher.num_classes
        self.module = torch.nn.Module()  # what runs elsewhere takes no memory here

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [0, 1], or uint8; B queries."""
        self.queries += len(images)
        with torch.no_grad():
            return self._teacher(images.detach())


class DFME(GeneratorLoop):
    """Train generator and student against a teacher that can only be asked; every image that it sees is counted.

    Generator:  maximise D_i = mean_k |s_k - t'_k| (or KL(softmax(t) || softmax(s))) of x_i = tanh(normalise(G(z_i)))
                without the teacher's gradient: with L_i = -D_i and unit vectors u_ij,
                dL/dx_i ~ (d / m) sum_j u_ij (L_i(x_i + epsilon u_ij) - L_i(x_i)) / epsilon, d = C H W,
                for l1 also divided by B K, goes into the generator's own backward pass.
    Student:    mean_i v_i l_i, l_i = mean_k |s_k - t'_k| or T^2 KL(softmax(t/T) || softmax(s/T)), on G(z).
    t' = log softmax(t) - mean_k log softmax(t)_k (`logits raw`: t). With easy2hard the student's samples have
    self-paced weights; the adversary is the generator's only term, so a ramp of its weight would change nothing.
    Every log record and the record of every shard hold `queries`, the images that generator, student and bank have
    sent to the teacher so far; the end of a run prints it. The time estimate and --eval-data ask on top of that.

    Shapes: latents (B, nz) -> images (B, C, H, W) in [0, 1]; directions (B, m, C, H, W).
    Source: Truong et al., "Data-free model extraction" (CVPR 2021, arXiv 2011.14779),
        cake-lab/datafree-model-extraction@0043ec4 `dfme/approximate_gradients.py`, in the form of
        ljrprocc/DataFree@bf3096b `datafree/synthesis/dfme.py`, `datafree/utils/_utils.py`.
    Differs from source: the estimate is equal (golden case dfme_zeroth_order), its K is the teacher's (there always
        10); the second normalisation of the student's images is left out; l1 learns from t' in the student too, as in
        the original paper's code. The original makes x with a tanh for the student as well; here, as released, only
        the generator's objective has it (`squash none`: neither).
    Cost: per generator step one forward/backward of the generator, m + 1 forwards of teacher and student.
    """

    requires: ClassVar[Requires] = Requires(grad=False)
    Config: ClassVar[type] = DFMEConfig
    config: DFMEConfig

    def __init__(self, config: DFMEConfig, task: Task):
        super().__init__(config, task)
        self.teacher: Any = BlackBox(task.teacher)

    def kd_per_sample(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's loss of every sample, (B,)."""
        return super().kd_per_sample(student, answered(teacher, self.config.loss, self.config.logits))

    def generator_step(self) -> dict[str, Tensor]:
        """One update of the generator along the estimated gradient of its objective."""
        c = self.config
        with self.task.runtime.autocast():
            inputs = self.student_view.normalize(widened(self.generator(self.latents(c.batch_size, self.noise))))
        points = inputs.detach()
        shape = (len(points), c.m, *points.shape[1:])
        directions = torch.randn(shape, generator=self.noise, device=self.device)
        with full_precision():
            gradient, loss = zeroth_order_gradient(
                lambda x: answered(self.teacher(self._pixels(x)), c.loss, c.logits),
                lambda x: self.student_view(self._pixels(x)),
                points,
                directions,
                epsilon=c.epsilon,
                classes=self.teacher.num_classes,
                loss=c.loss,
                squash=c.squash,
            )
        self.optimizer_g.zero_grad(set_to_none=True)
        inputs.backward(gradient)
        self.update_generator()
        terms = {"disagreement": loss}
        self.note_generator(terms, loss)
        return terms

    def _pixels(self, inputs: Tensor) -> Tensor:
        """Normalised images as the pixels that the views normalise."""
        mean, std = (torch.tensor(v, device=inputs.device) for v in (self.teacher.mean, self.teacher.std))
        return inputs * std.to(inputs.dtype).view(-1, 1, 1) + mean.to(inputs.dtype).view(-1, 1, 1)

    def generate(self) -> Iterator[ImageBatch]:
        """As every generator method, with the number of queries beside each batch."""
        for batch in super().generate():
            batch.meta["queries"] = self.teacher.queries
            if self.stored == self.task.images:
                self.task.runtime.say(f"dfme sent {self.teacher.queries} images to the teacher")
            yield batch

    def schedule_figures(self, epoch: int) -> dict[str, float]:
        """The queries so far, and the age where samples are weighed."""
        figures = super().schedule_figures(epoch) | {"queries": self.teacher.queries}
        del figures["adv_weight"]  # nothing to be weighed against
        return figures

    def extra_state(self) -> dict[str, Any]:
        """The counter."""
        return {"queries": self.teacher.queries}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `extra_state`."""
        self.teacher.queries = int(state["queries"])


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 (autocast is off already): a step of epsilon moves a pixel by 1e-5, which ten bits would round away."""
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def answered(teacher: Tensor, loss: str, logits: str) -> Tensor:
    """What is learnt from the teacher's logits (B, K): for l1 log-probabilities less their mean, unless `raw`."""
    if loss == "kl" or logits == "raw":
        return teacher
    shares = F.log_softmax(teacher, dim=1)
    return shares - shares.mean(1, keepdim=True)


def zeroth_order_gradient(
    victim: Callable[[Tensor], Tensor],
    clone: Callable[[Tensor], Tensor],
    x: Tensor,
    directions: Tensor,
    *,
    epsilon: float,
    classes: int,
    loss: Literal["l1", "kl"] = "l1",
    squash: Literal["tanh", "none"] = "tanh",
) -> tuple[Tensor, Tensor]:
    """Forward-difference estimate, in x (B, C, H, W), of the gradient of -disagreement; and its mean value.

    Args:
        victim, clone: (B, C, H, W) -> logits (B, K), called m + 1 times each, without gradient.
        directions: (B, m, C, H, W) normal draws; each is scaled to length 1.
        classes: K, by which (and by B) the estimate for l1 is divided.
    """

    def objective(points: Tensor) -> Tensor:
        points = points.tanh() if squash == "tanh" else points
        theirs, ours = widened(victim(points)), widened(clone(points))
        return -(l1_per_sample if loss == "l1" else kl_per_sample)(ours, theirs)

    with torch.no_grad():
        here = objective(x)
        gradient = torch.zeros_like(x)
        for u in directions.unbind(1):
            u = u / u.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            slope = (objective(x + epsilon * u) - here) / epsilon
            gradient += slope.view(-1, 1, 1, 1) * u
        gradient *= x[0].numel() / directions.shape[1]
        if loss == "l1":
            gradient /= len(x) * classes
    return gradient, here.mean()
