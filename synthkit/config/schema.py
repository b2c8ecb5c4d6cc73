"""The configs of the commands: frozen keyword-only dataclasses, no torch. A method's own config stands in its file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where and how a run computes."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes the accelerator that is there."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 autocast on a GPU that has it, else fp32."""
    threads: int | None = None
    """CPU threads of torch; none leaves torch's own choice."""
    compile: bool = False
    """Compile the networks with torch.compile (slow start, faster steps on a GPU)."""
    world: int | None = None
    """Number of processes that must take part; a different world size is refused."""
    tracker: str | None = None
    """Comma-separated accelerate trackers (tensorboard, wandb, ...); metrics.jsonl is always written."""


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """`synthkit synthesize`: make a bank of images from a trained classifier."""

    method: Any
    """Config of the synthesis method (flags --method.*)."""
    method_name: str = "cudfkd"
    """Name in the method table (flag --method NAME)."""
    teacher: str | None = None
    """Model spec: NAME, NAME@FILE, a card, a run directory, timm:NAME, torchvision:NAME. Most methods need one; some
    listen to several (A,B)."""
    data: str | None = None
    """Data spec of real images, for methods that use them (synthkit list datasets); its train split is read."""
    curriculum: str = "auto"
    """Curriculum variant: easy2hard, none or a named variant (synthkit list curricula); auto is what the method's
    paper does."""
    images: int | None = None
    """Images in the finished bank; none is `ipc` times the classes where `ipc` or the method says it, else 50,000."""
    ipc: int | None = None
    """Images per class, instead of `images`."""
    images_per_shard: int | None = None
    """Images per shard; none plans 20 shards or more, of at most 64 MiB."""
    seed: int = 0
    """Base seed of every random draw."""
    out: str | None = None
    """Bank directory; none makes banks/METHOD-TEACHER-HASH."""
    resume: bool = False
    """Go on with the unfinished bank in `out`."""
    shards: str | None = None
    """I/N: make only the I-th of N equal parts of the shards, as one of N processes on one bank (I from 1 to N)."""
    eval_data: str | None = None
    """Labelled data for a diagnostic accuracy curve of the co-trained student; never used for any decision."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """`synthkit distill`: train a student from a bank alone."""

    bank: str
    """Bank directory."""
    student: str
    """Model spec of the student; a name gives fresh weights."""
    teacher: str | None = None
    """Model spec of the teacher, several (A,B: the mean of their softmaxes), or random:ARCH[@SEED] (fresh weights, a
    check of the loss itself); none takes the one that the bank names, or the stored logits."""
    loss: Any = None
    """Config of the loss (flags --loss.*)."""
    loss_name: str = "kd"
    """Name in the loss table, or a weighted sum of them with schedules (flag --loss "ce+0.9*kd+dkd@ramp20")."""
    student_taps: str | None = None
    """Where the student's feature maps are read: comma-separated dotted paths or stage names (stage2, layer3.1), each
    with @pre for the map before its last ReLU; none takes the ends of the stages."""
    teacher_taps: str | None = None
    """The same for the teacher."""
    labels: Literal["none", "argmax", "stored"] = "none"
    """Hard labels: none, the teacher's argmax, or the bank's. Losses that need labels (ce, dkd, ...) use them."""
    label_weight: float = 0.0
    """Weight of a cross-entropy term on the hard labels beside the loss."""
    logits: Literal["auto", "live", "stored"] = "auto"
    """Teacher logits: live on the augmented image, or read from the bank; auto is live when a teacher is found."""
    label_set: str | None = None
    """Label set of the bank to train on (made by synthkit relabel): its logits instead of the bank's, or its stored
    views, in stored order and without further augmentation."""
    fresh: float | None = None
    """Share of every batch drawn anew from the bank's generator snapshots (needs a live teacher); none is 0.5 where
    the bank has snapshots and the teacher is live, else 0."""
    epochs: int | None = None
    """Passes over the bank; none follows the protocol."""
    steps: int | None = None
    """Total optimiser steps (instead of epochs)."""
    protocol: str = "auto"
    """Named preset of batch, optimiser and schedule (synthkit list protocols); flags given by hand win."""
    batch_size: int | None = None
    """Global batch size."""
    lr: float | None = None
    """Peak learning rate."""
    accumulate: int = 1
    """Micro-batches that a step is computed in, to save memory; the batch and what a loss compares stay the same."""
    optimizer: Literal["sgd", "adamw", "adam", "dot"] | None = None
    """Optimiser; dot is SGD with a momentum of its own for the labels' part of the loss (DOT)."""
    momentum: float | None = None
    """SGD momentum."""
    nesterov: bool | None = None
    """Nesterov momentum of SGD."""
    dot_delta: float | None = None
    """How far dot moves its two momenta apart (none: 0.075)."""
    weight_decay: float | None = None
    """Weight decay on all parameters."""
    ema: float = 0.0
    """Also keep an exponential moving average of the weights with this decay per step (0: none); reported beside the
    student, never instead of it."""
    schedule: Literal["cosine", "linear", "cosine_drop", "onecycle", "step", "constant"] | None = None
    """Learning-rate schedule."""
    eta: float | None = None
    """How slowly cosine, linear and cosine_drop fall: a run is 1/eta of the way to 0 (2 ends at half the rate)."""
    floor: float | None = None
    """Share of the peak rate at which cosine and linear end."""
    milestones: tuple[float, ...] | None = None
    """Shares of the run at which a step schedule falls (none: 0.625,0.75,0.875)."""
    gamma: float | None = None
    """Factor of a step schedule at each milestone (none: 0.1)."""
    warmup: float | None = None
    """Share of the steps with linear warm-up; of a one-cycle run the share that rises."""
    augment: str | None = None
    """Augmentation policy of the bank images; none follows the protocol."""
    order: Literal["random", "easy2hard", "self_paced"] = "random"
    """Order of the bank: uniform, by stored difficulty from easy to hard, or uniform with only the easiest samples of
    every batch counted (by their present loss); the share grows from 0.3 to 1 in the first half of the run."""
    holdout: float = 0.05
    """Share of the bank kept out of training to measure agreement with the teacher."""
    eval_data: str | None = None
    """Labelled data for evaluation only (last epoch is reported; never used to select)."""
    eval_every: int = 0
    """Evaluate every so many epochs (0: only at the end)."""
    control: str = "none"
    """Also train a control student for the same steps: noise, or a data spec for an equal-size random-real control."""
    seed: int = 0
    """Seed of initialisation, order and augmentation."""
    seeds: int = 1
    """Number of students trained with seed, seed+1, ...; mean and std are reported."""
    out: str | None = None
    """Run directory; none makes runs/STUDENT-BANK-HASH."""
    resume: bool = False
    """Go on with the unfinished run in `out`."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True, kw_only=True)
class RelabelConfig:
    """`synthkit relabel`: write further labels of a bank's images, or of stored views of them (FKD)."""

    bank: str
    """Bank directory; its images are not touched."""
    name: str
    """Name of the label set: a-z, 0-9, _ and -, at most 64."""
    preset: str | None = None
    """How the papers label: sre2l, cvdd, rded, gvbsm, edc or fkd; sets views, crops, mix, combine, bn, top_k and
    batch_size, and flags given by hand win."""
    teacher: str | None = None
    """Model spec of the teacher, or of several (A,B); none takes the one that the bank names."""
    combine: Literal["probs", "logits"] | None = None
    """Several teachers: mean of their probabilities (none: this) or of their logits."""
    weights: tuple[float, ...] | None = None
    """Several teachers: a positive weight of each, scaled to sum to 1 (none: equal)."""
    views: int | None = None
    """View epochs: stored views of every image; 0 labels the images as they are (none: 0)."""
    crop_scale: tuple[float, float] | None = None
    """Area of a view's crop as a share of the image (RandomResizedCrop; none: 0.08 to 1)."""
    crop_ratio: tuple[float, float] | None = None
    """Width / height of a view's crop (none: 3/4 to 4/3)."""
    flip: float | None = None
    """Probability that a view is mirrored (none: 0.5)."""
    mix: Literal["none", "mixup", "cutmix"] | None = None
    """Whether views are mixed with the view of another row (nothing said: none)."""
    mix_alpha: float | None = None
    """The mixing share is drawn from Beta(alpha, alpha) (none: 1; mixup: 0.8 in the SRe2L family)."""
    top_k: int | None = None
    """Keep the k largest logits and the mass of the rest; none keeps all logits (fp16)."""
    bn: Literal["eval", "batch"] | None = None
    """BatchNorm of the teacher: its running statistics (none: these), or those of the batch (BSSL of SRe2L++ and
    CV-DD)."""
    batch_size: int | None = None
    """Rows that the teacher sees at once (none: 256); with --bn batch it is part of the labels."""
    seed: int = 0
    """Seed of the views."""
    shards: str | None = None
    """I/N: make only the I-th of N equal parts of the shards, as one of N processes or machines (I from 1 to N)."""
    resume: bool = False
    """Go on with the unfinished label set `name`."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True, kw_only=True)
class TeachConfig:
    """`synthkit teach`: train a teacher, or a class-conditional diffusion model (`--arch unet`), on real data."""

    arch: str
    """Architecture name (synthkit list models), or `unet`: a small diffusion model (synthesize --method diffusion)."""
    data: str
    """Data spec of the training data (its train split)."""
    eval_data: str | None = None
    """Data spec of the test data; none takes the test split of `data`."""
    epochs: int | None = None
    """Passes over the data; none is 200 (unet: 2,500 steps)."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    batch_size: int = 128
    """Global batch size."""
    lr: float | None = None
    """Peak learning rate; none is 0.1 (unet: 0.001)."""
    optimizer: Literal["sgd", "adamw", "adam"] | None = None
    """Optimiser; none is sgd (unet: adamw)."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float | None = None
    """Weight decay on all parameters; none is 5e-4 (unet: 0.01)."""
    nesterov: bool = True
    """Nesterov momentum."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Learning-rate schedule."""
    warmup: float = 0.02
    """Share of the steps with linear warm-up."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    augment: str = "auto"
    """Augmentation policy; auto is crop_flip for colour images, shift for grey ones."""
    image_size: int | None = None
    """Side of the input; none keeps the data's own, except 32 for LeNet."""
    unet_channels: tuple[int, ...] | None = None
    """unet: channels of every level, each half the side of the one before; none takes a preset by image size."""
    unet_prediction: Literal["v_prediction", "epsilon"] = "v_prediction"
    """unet: what the network predicts."""
    unet_label_drop: float = 0.1
    """unet: share of the labels replaced by "no class", which classifier-free guidance needs."""
    unet_ema: float = 0.995
    """unet: decay of the moving average of the weights, which is what is kept; at step n at most (1 + n) / (10 + n)."""
    eval_every: int = 0
    """Evaluate every so many epochs (0: only at the end)."""
    seed: int = 0
    """Seed of initialisation, order and augmentation."""
    out: str | None = None
    """Run directory; none makes teachers/ARCH-DATA."""
    resume: bool = False
    """Go on with the unfinished run in `out`."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`synthkit evaluate`: how good a model is (--model), or how good fresh networks trained on a bank are (--bank)."""

    model: str | None = None
    """Model spec (a run directory, a card, NAME@FILE, ...)."""
    bank: str | None = None
    """Bank directory: train fresh networks on it, and on as many random real images, and test them on the data."""
    data: str | None = None
    """Labelled data spec; with `bank:DIR` the agreement with the teacher on a bank is measured, labelled as such."""
    teacher: str | None = None
    """Teacher spec for agreement and KL; for a run directory the run's own teacher is the default. With --bank: what
    labels the control when the bank's labels are soft."""
    protocol: str = "convnet"
    """--bank: how the networks are trained (synthkit list protocols); convnet is the protocol of the bank's method."""
    arch: str | None = None
    """--bank: network; none is the one that the bank was distilled with, else the ConvNet for its image size."""
    cross: str | None = None
    """--bank: further networks, separated by commas (mlp,lenet_dd,alexnet_dd,vgg11_in,resnet18_in, ...)."""
    nets: int = 5
    """--bank: networks of each architecture, on the bank and on the control each."""
    epochs: int | None = None
    """--bank: epochs instead of the protocol's."""
    lr: float | None = None
    """--bank: first learning rate instead of the protocol's, or the bank's learnt one."""
    labels: Literal["auto", "hard", "soft"] = "auto"
    """--bank: train on its classes or on the softmax of its logits; auto is what the protocol says."""
    control_data: str | None = None
    """--bank: data spec whose train split the random-real control is drawn from; none is that of `data`."""
    full: float | None = None
    """--bank: accuracy (0 to 1) of the whole training set with hard labels, for the scores HLR, IOR and LRS."""
    full_epochs: int = 0
    """--bank: measure that accuracy here, with so many epochs over the whole training set."""
    split: Literal["train", "test", "all"] = "test"
    """Split of the data."""
    limit: int | None = None
    """Use a random sample of so many images."""
    out: str | None = None
    """Write the result as JSON to this file too."""
    seed: int = 0
    """Seed of the sample; with --bank also of networks, order, augmentation and the control."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
