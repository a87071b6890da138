"""Everything that `personvit pretrain` reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from personvit.config.checks import check, check_choice, check_probability, check_range
from personvit.config.shared import IMAGENET_MEAN, IMAGENET_STD, DataConfig, KernelsConfig, ModelConfig
from personvit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """Multi-crop augmentation. View order is [global 1, global 2, local 1 ... local n]."""

    global_size: tuple[int, int] = (256, 128)
    """Height, width (peers)."""
    local_size: tuple[int, int] = (128, 64)
    """Height, width (peers)."""
    local_crops: int = 8
    """(TransReID-SSL; inferred)."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Area fraction; reading A of the released names (inferred, docs/recipe.md)."""
    local_scale: tuple[float, float] = (0.05, 0.8)
    """Area fraction; reading A (inferred)."""
    aspect_ratio: tuple[float, float] = (0.375, 0.6667)
    """Width / height of the cut box: lower bound from released names, upper one log-symmetric about 1/2 (inferred)."""
    flip: float = 0.5
    """(iBOT)."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation, hue (iBOT)."""
    jitter_probability: float = 0.8
    """(iBOT)."""
    grayscale: float = 0.2
    """(iBOT)."""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability for global 1, global 2, local (iBOT)."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation in output pixels (iBOT)."""
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability for global 1, global 2, local (iBOT)."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for key in ("global_size", "local_size"):
            size = getattr(self, key)
            check(len(size) == 2 and min(size) >= 1, f"crops.{key}", size, "(height, width) in pixels, 1 or more")
        check(self.local_crops >= 0, "crops.local_crops", self.local_crops, "0 or more")
        check_range("crops.global_scale", self.global_scale, 0.0, 1.0)
        check_range("crops.local_scale", self.local_scale, 0.0, 1.0)
        check_range("crops.aspect_ratio", self.aspect_ratio, 0.0, 10.0)
        check_range("crops.blur_sigma", self.blur_sigma, 0.0, 100.0)
        for key in ("blur", "solarize"):
            check(len(getattr(self, key)) == 3, f"crops.{key}", getattr(self, key), "three probabilities")
            check_probability(f"crops.{key}", getattr(self, key))
        check_probability("crops.flip", (self.flip, self.jitter_probability, self.grayscale))
        strengths, hue = self.jitter[:3], self.jitter[3]
        check(min(strengths) >= 0, "crops.jitter", self.jitter, "brightness, contrast and saturation of 0 or more")
        check(0 <= hue <= 0.5, "crops.jitter", self.jitter, "a hue in [0, 0.5] of a turn")


@dataclass(frozen=True, kw_only=True)
class MasksConfig:
    """Block masks over the patch grid of the global crops (Section 2 of docs/recipe.md)."""

    ratio: tuple[float, ...] = (0.0, 0.3)
    """One of these means is drawn per crop (iBOT README)."""
    ratio_var: tuple[float, ...] = (0.0, 0.2)
    """Half width of the uniform draw around the mean (iBOT README)."""
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    """Height / width of a block, log-uniform (iBOT)."""
    shape: str = "block"
    """block or rand (iBOT)."""
    start_epoch: int = 0
    """Epochs without masking (iBOT)."""

    def __post_init__(self) -> None:
        check(len(self.ratio) == len(self.ratio_var) >= 1, "masks.ratio", self.ratio, "as many as masks.ratio_var")
        for mean, var in zip(self.ratio, self.ratio_var, strict=True):
            check(0 <= var <= mean and mean + var < 1, "masks.ratio", (mean, var), "0 <= var <= mean, mean + var < 1")
        check_choice("masks.shape", self.shape, ("block", "rand"))
        check_range("masks.aspect", self.aspect, 0.0, 100.0)
        check(self.start_epoch >= 0, "masks.start_epoch", self.start_epoch, "0 or more")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Projection head: MLP trunk shared by CLS and patches, weight-normalised prototypes."""

    prototypes: int = 8192
    """(iBOT; inferred for PersonViT from the file size)."""
    patch_prototypes: int = 8192
    shared: bool = True
    """CLS and patches use one prototype matrix (iBOT README recipe)."""
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    norm_last_layer: bool = False
    """Freeze the prototypes' norm at 1 (iBOT: false for ViT-S, recommended true for ViT-B)."""

    def __post_init__(self) -> None:
        for key in ("prototypes", "patch_prototypes", "hidden_dim", "bottleneck_dim"):
            check(getattr(self, key) >= 1, f"head.{key}", getattr(self, key), "1 or more")
        if self.shared and self.prototypes != self.patch_prototypes:
            raise ConfigError(
                f"head.shared=true needs one matrix, got head.prototypes={self.prototypes} and "
                f"head.patch_prototypes={self.patch_prototypes}. Make them equal, or set head.shared=false."
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """DINO loss on the CLS token and iBOT loss on masked patches."""

    student_temp: float = 0.1
    """(iBOT)."""
    teacher_temp: tuple[float, float] = (0.04, 0.07)
    """CLS: first and final value, linear over the warm-up (UNI issue 47: published ViT-B arguments; inferred)."""
    teacher_patch_temp: tuple[float, float] = (0.04, 0.07)
    """Patches (iBOT README)."""
    teacher_temp_warmup_epochs: int = 30
    """(iBOT)."""
    centering: str = "centre"
    """CLS: centre (iBOT) or sinkhorn (DINOv2; another objective)."""
    patch_centering: str = "centre"
    """Patches: centre (iBOT) or sinkhorn (DINOv2)."""
    centre_momentum: float = 0.9
    """(iBOT). 1.0 never moves the centre from 0."""
    sinkhorn_iterations: int = 3
    """(DINOv2)."""
    lambda_cls: float = 1.0
    lambda_patch: float = 1.0

    def __post_init__(self) -> None:
        for key in ("centering", "patch_centering"):
            check_choice(f"loss.{key}", getattr(self, key), ("centre", "sinkhorn"))
        check(self.student_temp > 0, "loss.student_temp", self.student_temp, "more than 0")
        for key in ("teacher_temp", "teacher_patch_temp"):
            pair = getattr(self, key)
            check(len(pair) == 2 and min(pair) > 0, f"loss.{key}", pair, "two values above 0: first, final")
        check_probability("loss.centre_momentum", (self.centre_momentum,))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, schedules per step, EMA."""

    lr: float = 5e-4
    """Peak learning rate per 256 images of the global batch: peak = lr * batch_size / 256 (iBOT)."""
    min_lr: float = 1e-6
    """(iBOT)."""
    warmup_epochs: float = 10
    """Linear from 0 (iBOT)."""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """First and final, half cosine (iBOT)."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float = 3.0
    """L2 norm limit of each parameter tensor on its own (iBOT). 0: off."""
    freeze_last_layer_epochs: float = 1
    """Prototypes get no gradient for so many epochs (iBOT)."""
    momentum: tuple[float, float] = (0.996, 1.0)
    """EMA of the teacher, first and final, half cosine (iBOT). 0.9995 is advised for batches near 256."""

    def __post_init__(self) -> None:
        check(self.lr > 0, "optim.lr", self.lr, "more than 0")
        check(self.min_lr >= 0, "optim.min_lr", self.min_lr, "0 or more")
        check(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "0 or more")
        check(self.clip_grad >= 0, "optim.clip_grad", self.clip_grad, "0 (off) or more")
        check_probability("optim.momentum", self.momentum)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision and bookkeeping of a run."""

    epochs: int = 300
    """(PersonViT's scripts)."""
    max_steps: int | None = None
    """Stop after so many optimiser steps; schedules are still laid out over `epochs`."""
    batch_size: int = 1024
    """Global: over all ranks and accumulated micro-batches (512 to 1024 in the peers; unknown for PersonViT)."""
    accumulate: int = 1
    """Micro-batches per optimiser step on each rank."""
    precision: str = "bf16"
    """bf16 or fp32; losses and softmax are always fp32."""
    compile: bool = False
    """torch.compile of the blocks."""
    seed: int = 0
    log_every: int = 10
    save_every_epochs: int = 1
    """Write checkpoints/last.pth at the end of every so many epochs, and at the end of the run."""
    save_every_steps: int = 0
    """Write it also every so many steps; 0: only as above."""
    keep_every_epochs: int = 20
    """Keep a snapshot checkpointNNNN.pth (inferred: 20)."""
    non_finite_limit: int = 5
    """Stop after so many non-finite steps in a row."""
    deterministic: bool = False
    """torch.use_deterministic_algorithms; the CPU path is deterministic either way."""
    licence: str | None = None
    """Licence of the weights, for the header of exported files. None: not stated; the data's own terms may bind."""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "accumulate", "log_every", "non_finite_limit", "keep_every_epochs")
        for key in (*positive, "save_every_epochs"):
            check(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "1 or more")
        check(self.max_steps is None or self.max_steps >= 1, "train.max_steps", self.max_steps, "1 or more")
        check(self.save_every_steps >= 0, "train.save_every_steps", self.save_every_steps, "0 or more")
        check_choice("train.precision", self.precision, ("bf16", "fp32"))


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Label-free signs of collapse, and the retrieval probe."""

    every: int = 50
    """Steps between health rows."""
    probe_every_epochs: int = 10
    """Epochs between retrieval probes; 0: never."""
    probe_max_images: int = 4000
    """Images of query and gallery together that the probe may use."""

    def __post_init__(self) -> None:
        check(self.every >= 1, "health.every", self.every, "1 or more")
        check(self.probe_every_epochs >= 0, "health.probe_every_epochs", self.probe_every_epochs, "0 or more")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that `personvit pretrain` reads."""

    data: DataConfig = field(default_factory=DataConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)

    def __post_init__(self) -> None:
        patch = self.model.patch_size
        for key in ("global_size", "local_size"):
            height, width = getattr(self.crops, key)
            if height % patch or width % patch:
                raise ConfigError(
                    f"crops.{key}=[{height},{width}] is not divisible by model.patch_size={patch}: a ViT cuts an "
                    f"image into whole patches. Nearest size that fits: crops.{key}="
                    f"[{max(1, round(height / patch)) * patch},{max(1, round(width / patch)) * patch}]"
                )
        if self.train.epochs < self.loss.teacher_temp_warmup_epochs:
            raise ConfigError(
                f"train.epochs={self.train.epochs} is shorter than loss.teacher_temp_warmup_epochs="
                f"{self.loss.teacher_temp_warmup_epochs}: the temperature would never reach its final value. "
                f"Lower loss.teacher_temp_warmup_epochs or train longer."
            )
