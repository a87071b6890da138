"""Everything that `personvit finetune` reads.

Origins used below: ``published`` is hustvl/PersonViT (transreid_pytorch, its configs and run_batch.sh); ``ours`` a
choice of this project.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from personvit.config.checks import check, check_choice, check_probability, check_range
from personvit.config.evaluate import PROTOCOLS, RerankConfig
from personvit.config.shared import DataConfig, KernelsConfig, ModelConfig
from personvit.errors import ConfigError

NECK_FEATURES = ("before", "after")


@dataclass(frozen=True, kw_only=True)
class FinetuneDataConfig(DataConfig):
    """Which labelled sets are trained on, and which evaluated.

    `data.name` and `data.root` may list several sets, separated by commas: they are joined for training.
    """

    test_name: str | None = None
    """Sets to evaluate on, each apart, separated by commas. None: those of data.name."""
    test_root: str | None = None
    """Their folders. None: that of data.root."""
    merge_val: bool = True
    """MSMT17: train on the lists train and val together (published)."""


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Training images: bicubic resize, flip, padded crop, normalisation, erasing. Testing: bilinear resize only."""

    size: tuple[int, int] = (256, 128)
    """Height, width (published)."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """(published)."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """(published)."""
    flip: float = 0.5
    """Probability of a horizontal flip (published)."""
    pad: int = 10
    """Black pixels on every side before the random crop (published)."""
    erase: float = 0.5
    """Probability that a box is erased, with normal noise in place of every pixel and channel (published)."""
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    """Share of the image that the box takes (published)."""
    erase_aspect: tuple[float, float] = (0.3, 1 / 0.3)
    """Height / width of the box, log-uniform (published)."""

    def __post_init__(self) -> None:
        check(len(self.size) == 2 and min(self.size) >= 1, "input.size", self.size, "(height, width) in pixels")
        check_probability("input.flip", (self.flip,))
        check_probability("input.erase", (self.erase,))
        check(self.pad >= 0, "input.pad", self.pad, "0 or more pixels")
        check(min(self.std) > 0, "input.std", self.std, "three values above 0")
        check_range("input.erase_area", self.erase_area, 0.0, 1.0)
        check_range("input.erase_aspect", self.erase_aspect, 0.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class FinetuneModelConfig(ModelConfig):
    """Backbone, neck and camera embeddings. model.weights None: from random weights."""

    neck_feat: str = "before"
    """Feature of the evaluation: before or after the batch norm (published: before)."""
    dropout: float = 0.0
    """Before the classifier (published: 0)."""
    camera_embed: bool = False
    """Side information embedding (SIE): a learned vector for each camera, added to all tokens (published: off)."""
    sie_coefficient: float = 3.0
    """Factor of the camera embedding (published: TransReID)."""

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        check_choice("model.neck_feat", self.neck_feat, NECK_FEATURES)
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "[0, 1)")
        check(self.sie_coefficient > 0, "model.sie_coefficient", self.sie_coefficient, "more than 0")


@dataclass(frozen=True, kw_only=True)
class FinetuneLossConfig:
    """Cross-entropy on identities, and batch-hard triplets."""

    identity: float = 1.0
    """Weight of the cross-entropy (published)."""
    triplet: float = 1.0
    """Weight of the triplet loss (published)."""
    label_smoothing: float = 0.0
    """(published: off)."""
    margin: float | None = None
    """Of the triplet loss. None: soft margin, log(1 + exp(d_ap - d_an)) (published)."""

    def __post_init__(self) -> None:
        for key in ("identity", "triplet"):
            check(getattr(self, key) >= 0, f"loss.{key}", getattr(self, key), "0 (off) or more")
        check(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "[0, 1)")
        check(self.margin is None or self.margin > 0, "loss.margin", self.margin, "more than 0, or null: soft margin")
        if self.identity == self.triplet == 0:
            raise ConfigError("loss.identity=0 and loss.triplet=0 leave nothing to learn. Set one of them above 0.")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig:
    """Optimiser, and the learning rate of every epoch: linear warm-up, then the rest of a cosine over all epochs."""

    name: str = "sgd"
    """sgd (published) or adamw (ours, for small models from random weights)."""
    lr: float = 4e-4
    """Base learning rate of a batch of any size (published: run_batch.sh)."""
    momentum: float = 0.9
    """SGD only (published)."""
    weight_decay: float = 1e-4
    """Of everything that is not a bias, norms, CLS token and positions included (published)."""
    weight_decay_bias: float = 1e-4
    """(published)."""
    bias_lr_factor: float = 2.0
    """Biases learn so many times as fast (published)."""
    warmup_epochs: int = 20
    """(published; 5 for ViT-B on Market-1501, whose file leaves it out)."""
    warmup_factor: float = 0.01
    """The first epoch's rate is this share of lr (published)."""
    min_factor: float = 0.002
    """The cosine tends to this share of lr (published)."""
    clip_grad: float = 0.0
    """Limit of the L2 norm over all gradients together; 0: off (published)."""

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, ("sgd", "adamw"))
        check(self.lr > 0, "optim.lr", self.lr, "more than 0")
        check(0 <= self.momentum < 1, "optim.momentum", self.momentum, "[0, 1)")
        check(self.bias_lr_factor > 0, "optim.bias_lr_factor", self.bias_lr_factor, "more than 0")
        for key in ("weight_decay", "weight_decay_bias", "warmup_epochs", "clip_grad"):
            check(getattr(self, key) >= 0, f"optim.{key}", getattr(self, key), "0 or more")
        check_probability("optim.warmup_factor", (self.warmup_factor,))
        check_probability("optim.min_factor", (self.min_factor,))


@dataclass(frozen=True, kw_only=True)
class FinetuneTrainConfig:
    """Length, batch, precision and bookkeeping of a run."""

    epochs: int = 120
    """(published)."""
    max_steps: int | None = None
    """Stop after so many optimiser steps; the schedule is still laid out over `epochs`."""
    batch_size: int = 64
    """Global, over all ranks (published)."""
    instances: int = 4
    """Images of each identity in a batch: K of P x K (published)."""
    precision: str = "bf16"
    """bf16 or fp32; losses are always fp32 (published: fp16)."""
    compile: bool = False
    """torch.compile of the blocks."""
    seed: int = 1234
    """(published)."""
    log_every: int = 20
    save_every_epochs: int = 1
    """Write checkpoints/last.pth at the end of every so many epochs, and at the end of the run."""
    non_finite_limit: int = 5
    """Stop after so many non-finite steps in a row."""
    deterministic: bool = False
    """torch.use_deterministic_algorithms; the CPU path is deterministic either way."""
    licence: str | None = None
    """Licence of the weights, for the header of exported files. None: not stated; the data's own terms may bind."""

    def __post_init__(self) -> None:
        for key in ("epochs", "log_every", "save_every_epochs", "non_finite_limit"):
            check(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "1 or more")
        check(self.max_steps is None or self.max_steps >= 1, "train.max_steps", self.max_steps, "1 or more")
        check(self.instances >= 2, "train.instances", self.instances, "2 or more: a triplet needs a positive")
        check_choice("train.precision", self.precision, ("bf16", "fp32"))
        if self.batch_size % self.instances or self.batch_size < 2 * self.instances:
            fitting = max(2, round(self.batch_size / self.instances)) * self.instances
            raise ConfigError(
                f"train.batch_size={self.batch_size} is no P x K with K = train.instances={self.instances} and at "
                f"least two identities. Set train.batch_size={fitting}."
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during and after the training."""

    every_epochs: int = 10
    """Epochs between evaluations; the last epoch is always evaluated. 0: only then (published: 120 of 120)."""
    rerank: RerankConfig = field(default_factory=lambda: RerankConfig(enabled=True))
    """At the end of the run only."""
    protocol: str = "market"
    """As of `personvit evaluate`."""
    batch_size: int = 256
    max_rank: int = 50
    flip: bool = False
    """Add the feature of the mirrored image (off in the published protocol)."""

    def __post_init__(self) -> None:
        check_choice("eval.protocol", self.protocol, PROTOCOLS)
        check(self.every_epochs >= 0, "eval.every_epochs", self.every_epochs, "0 or more")
        check(self.batch_size >= 1, "eval.batch_size", self.batch_size, "1 or more")
        check(self.max_rank >= 1, "eval.max_rank", self.max_rank, "1 or more")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that `personvit finetune` reads."""

    data: FinetuneDataConfig = field(default_factory=FinetuneDataConfig)
    input: InputConfig = field(default_factory=InputConfig)
    model: FinetuneModelConfig = field(default_factory=FinetuneModelConfig)
    loss: FinetuneLossConfig = field(default_factory=FinetuneLossConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)

    def __post_init__(self) -> None:
        height, width = self.input.size
        patch = self.model.patch_size
        if height % patch or width % patch:
            fit = [max(1, round(side / patch)) * patch for side in (height, width)]
            raise ConfigError(
                f"input.size=[{height},{width}] is not divisible by model.patch_size={patch}. Nearest size that fits: "
                f"input.size=[{fit[0]},{fit[1]}]"
            )
