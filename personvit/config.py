"""Configuration: frozen dataclasses with defaults, ranges and the origin of each default.

Order of precedence, lowest first: dataclass defaults, YAML recipe (`--config NAME|FILE`), flags, `key=value`.
Origins used below:

* ``iBOT``: bytedance/ibot, main_ibot.py and README (the code base that PersonViT's authors forked).
* ``peers``: the same value in every LUPerson pre-training script of TransReID-SSL, PASS and SOLIDER.
* ``inferred``: read from the names of PersonViT's released files, not stated by its authors (docs/recipe.md).
* ``ours``: a choice of this project.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from personvit.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _check(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value} is out of range: expected {expected}. Set it with {key}=VALUE.")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f" Did you mean {key}={near[0]}?" if near else ""
        raise ConfigError(f"{key}={value} is not one of {', '.join(choices)}.{hint}")


def _check_probability(key: str, values: tuple[float, ...]) -> None:
    for value in values:
        _check(0.0 <= value <= 1.0, key, value, "a probability in [0, 1]")


def _check_range(key: str, pair: tuple[float, float], low: float, high: float) -> None:
    _check(len(pair) == 2 and low < pair[0] <= pair[1] <= high, key, pair, f"{low} < first <= second <= {high}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they are read."""

    name: str = "auto"
    """auto, generated, folder, list, lmdb, shards, or a labelled layout (market1501 ...). auto looks at `data.root`."""
    root: str | None = None
    """Folder, text file of paths, LMDB database or tar shards. None: generated persons in the cache folder."""
    loader: str = "auto"
    """auto, dali-gpu, dali-cpu or torchvision. auto: the first of them that can run here."""
    num_workers: int = -1
    """torchvision: reader processes per rank; -1: the cores available, at most 16, less one. 0: none."""
    threads: int = -1
    """DALI: threads per rank that decode, and as many that read files; -1: the cores available, at most 16."""
    prefetch: int = 2
    """Batches each reader process (torchvision) or the loader (DALI) keeps ready."""
    decode: str = "auto"
    """DALI: where JPEGs are decoded: cpu, or mixed (nvJPEG; dali-gpu only). auto: mixed on a GPU."""
    hw_decoder_load: float = 0.65
    """DALI, mixed: share of the JPEGs for the hardware decoder of GPUs that have one (DALI's default)."""
    probe_root: str | None = None
    """Labelled set (Market-1501 layout) for the periodic retrieval probe. None: the generated persons', if used."""
    generated_train: int = 8000
    """Images of the generated unlabelled pool."""
    generated_test_ids: int = 100
    """Identities of the generated query/gallery split, disjoint from the pool."""
    generated_seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("data.loader", self.loader, ("auto", "dali-gpu", "dali-cpu", "torchvision"))
        _check_choice("data.decode", self.decode, ("auto", "cpu", "mixed"))
        _check(self.threads == -1 or self.threads >= 1, "data.threads", self.threads, "1 or more, or -1")
        _check(0 <= self.hw_decoder_load <= 1, "data.hw_decoder_load", self.hw_decoder_load, "a share in [0, 1]")
        if self.decode == "mixed" and self.loader in ("dali-cpu", "torchvision"):
            raise ConfigError(
                f"data.decode=mixed decodes on a GPU, but data.loader={self.loader} does not use one. Use "
                f"data.loader=dali-gpu, or leave data.decode out."
            )
        _check(self.num_workers >= -1, "data.num_workers", self.num_workers, "-1 or more")
        _check(self.prefetch >= 1, "data.prefetch", self.prefetch, "1 or more")
        _check(self.generated_train >= 1, "data.generated_train", self.generated_train, "1 or more")


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
            _check(len(size) == 2 and min(size) >= 1, f"crops.{key}", size, "(height, width) in pixels, 1 or more")
        _check(self.local_crops >= 0, "crops.local_crops", self.local_crops, "0 or more")
        _check_range("crops.global_scale", self.global_scale, 0.0, 1.0)
        _check_range("crops.local_scale", self.local_scale, 0.0, 1.0)
        _check_range("crops.aspect_ratio", self.aspect_ratio, 0.0, 10.0)
        _check_range("crops.blur_sigma", self.blur_sigma, 0.0, 100.0)
        for key in ("blur", "solarize"):
            _check(len(getattr(self, key)) == 3, f"crops.{key}", getattr(self, key), "three probabilities")
            _check_probability(f"crops.{key}", getattr(self, key))
        _check_probability("crops.flip", (self.flip, self.jitter_probability, self.grayscale))
        strengths, hue = self.jitter[:3], self.jitter[3]
        _check(min(strengths) >= 0, "crops.jitter", self.jitter, "brightness, contrast and saturation of 0 or more")
        _check(0 <= hue <= 0.5, "crops.jitter", self.jitter, "a hue in [0, 0.5] of a turn")


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
        _check(len(self.ratio) == len(self.ratio_var) >= 1, "masks.ratio", self.ratio, "as many as masks.ratio_var")
        for mean, var in zip(self.ratio, self.ratio_var, strict=True):
            _check(0 <= var <= mean and mean + var < 1, "masks.ratio", (mean, var), "0 <= var <= mean, mean + var < 1")
        _check_choice("masks.shape", self.shape, ("block", "rand"))
        _check_range("masks.aspect", self.aspect, 0.0, 100.0)
        _check(self.start_epoch >= 0, "masks.start_epoch", self.start_epoch, "0 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Backbone."""

    arch: str = "vit_small"
    """vit_micro, vit_tiny, vit_small, vit_base."""
    patch_size: int = 16
    drop_path: float = 0.1
    """Stochastic depth of the student's last block, linear from 0 (iBOT)."""
    weights: str | None = None
    """Initial backbone weights (any supported layout). None: random (inferred: the released models are 'wopt')."""

    def __post_init__(self) -> None:
        _check(self.patch_size >= 1, "model.patch_size", self.patch_size, "1 or more")
        _check(0.0 <= self.drop_path < 1.0, "model.drop_path", self.drop_path, "[0, 1)")


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
            _check(getattr(self, key) >= 1, f"head.{key}", getattr(self, key), "1 or more")
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
            _check_choice(f"loss.{key}", getattr(self, key), ("centre", "sinkhorn"))
        _check(self.student_temp > 0, "loss.student_temp", self.student_temp, "more than 0")
        for key in ("teacher_temp", "teacher_patch_temp"):
            pair = getattr(self, key)
            _check(len(pair) == 2 and min(pair) > 0, f"loss.{key}", pair, "two values above 0: first, final")
        _check_probability("loss.centre_momentum", (self.centre_momentum,))


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
        _check(self.lr > 0, "optim.lr", self.lr, "more than 0")
        _check(self.min_lr >= 0, "optim.min_lr", self.min_lr, "0 or more")
        _check(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "0 or more")
        _check(self.clip_grad >= 0, "optim.clip_grad", self.clip_grad, "0 (off) or more")
        _check_probability("optim.momentum", self.momentum)


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

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "accumulate", "log_every", "non_finite_limit", "keep_every_epochs")
        for key in (*positive, "save_every_epochs"):
            _check(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "1 or more")
        _check(self.max_steps is None or self.max_steps >= 1, "train.max_steps", self.max_steps, "1 or more")
        _check(self.save_every_steps >= 0, "train.save_every_steps", self.save_every_steps, "0 or more")
        _check_choice("train.precision", self.precision, ("bf16", "fp32"))


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
        _check(self.every >= 1, "health.every", self.every, "1 or more")
        _check(self.probe_every_epochs >= 0, "health.probe_every_epochs", self.probe_every_epochs, "0 or more")


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Which implementation of each operator runs. Never changes the recipe or a checkpoint."""

    backend: str = "auto"
    """auto, reference (plain torch), fused (the fastest on this device; `--fused`), or triton (its kernels everywhere;
    on a CPU they need TRITON_INTERPRET=1 and are for debugging only)."""

    def __post_init__(self) -> None:
        _check_choice("kernels.backend", self.backend, ("auto", "reference", "fused", "triton"))


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


RERANK_PRESETS = {"zhong2017": (20, 6, 0.3), "personvit": (50, 15, 0.3)}
"""(k1, k2, lambda_value): of Zhong et al. 2017, and of hustvl/PersonViT, utils/metrics.py."""

PROTOCOLS = ("market", "keep")


@dataclass(frozen=True, kw_only=True)
class RerankConfig:
    """k-reciprocal re-ranking, reported beside the plain figures."""

    enabled: bool = False
    """Same as `--rerank`."""
    preset: str = "zhong2017"
    """zhong2017 (20, 6, 0.3) or personvit (50, 15, 0.3); the keys below change single values of it."""
    k1: int | None = None
    """Size of the neighbourhoods."""
    k2: int | None = None
    """Rows averaged in the local query expansion; 1: none."""
    lambda_value: float | None = None
    """Share of the original distance, 0 to 1."""

    def __post_init__(self) -> None:
        _check_choice("rerank.preset", self.preset, tuple(RERANK_PRESETS))
        for key in ("k1", "k2"):
            value = getattr(self, key)
            _check(value is None or value >= 1, f"rerank.{key}", value, "1 or more")
        if self.lambda_value is not None:
            _check(0 <= self.lambda_value <= 1, "rerank.lambda_value", self.lambda_value, "0 (Jaccard only) to 1")

    def values(self) -> tuple[int, int, float]:
        """k1, k2 and lambda_value in force."""
        k1, k2, lambda_value = RERANK_PRESETS[self.preset]
        return (
            k1 if self.k1 is None else self.k1,
            k2 if self.k2 is None else self.k2,
            lambda_value if self.lambda_value is None else self.lambda_value,
        )


@dataclass(frozen=True, kw_only=True)
class ExpansionConfig:
    """Average query expansion: a query becomes the mean of itself and its nearest gallery images."""

    top: int = 0
    """Gallery images that join the query; 0: off (as in every published figure)."""
    alpha: float = 0.0
    """Weights are cosine^alpha (alpha-QE); 0: all equal (AQE)."""

    def __post_init__(self) -> None:
        _check(self.top >= 0, "expansion.top", self.top, "0 (off) or more")
        _check(self.alpha >= 0, "expansion.alpha", self.alpha, "0 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything that `personvit evaluate` reads."""

    data: DataConfig = field(default_factory=DataConfig)
    """data.name may list several sets: market1501,msmt17. data.root is then the folder above them, or a list too."""
    model: ModelConfig = field(default_factory=ModelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    expansion: ExpansionConfig = field(default_factory=ExpansionConfig)
    protocol: str = "market"
    """market: gallery images of the query's identity and camera are left out. keep: they count as matches."""
    image_size: tuple[int, int] | None = None
    """Height, width. None: what the weights were trained at."""
    batch_size: int = 64
    max_rank: int = 50
    flip: bool = False
    """Add the feature of the mirrored image (off in the published protocol)."""
    raw_pixels: bool = False
    """Evaluate raw pixels (64x32, standardised per image) instead of a model: the baseline of the data card."""
    cache: str | None = None
    """Folder where features are kept for the next evaluation of the same weights on the same files. None: nowhere."""
    out: str | None = None
    """File for the figures, JSON; same as `--out`."""
    per_query: str | None = None
    """File for the result of every query, .json or .csv; same as `--per-query`."""

    def __post_init__(self) -> None:
        _check_choice("protocol", self.protocol, PROTOCOLS)
        _check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        _check(self.max_rank >= 1, "max_rank", self.max_rank, "1 or more")
        if self.per_query is not None and Path(self.per_query).suffix.lower() not in (".json", ".csv"):
            raise ConfigError(f"per_query={self.per_query}: name a file that ends in .json or .csv.")


C = TypeVar("C", PretrainConfig, EvaluateConfig)


def recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("personvit") / "configs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(schema: type[C], recipe: str | None = None, overrides: list[str] | None = None) -> C:
    """Merge defaults, a recipe and `key=value` overrides into a validated configuration.

    Args:
        schema: PretrainConfig or EvaluateConfig.
        recipe: name of a shipped recipe, or path of a YAML file.
        overrides: `section.key=value` strings, applied last.

    Raises:
        ConfigError: unknown key (with the nearest match), wrong type, value out of range, or no such recipe.
    """
    merged = OmegaConf.structured(schema)
    for origin, layer in _layers(recipe, overrides):
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(schema, origin, layer, error)) from None
    try:
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        cause = error.__cause__
        raise (cause if isinstance(cause, ConfigError) else ConfigError(str(error))) from None
    assert isinstance(result, schema)
    return result


def to_yaml(config: PretrainConfig | EvaluateConfig) -> str:
    """The configuration as YAML text that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_plain(config: object) -> dict[str, Any]:
    """The configuration as nested dicts of built-in types (tuples become lists)."""
    plain = _without_tuples(OmegaConf.to_container(OmegaConf.structured(config)))
    assert isinstance(plain, dict)
    return plain


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_tuples(item) for key, item in value.items()}
    return [_without_tuples(item) for item in value] if isinstance(value, list | tuple) else value


def given_yaml(recipe: str | None, overrides: list[str] | None = None) -> str:
    """What the user gave, recipe and overrides merged, as YAML text that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.merge(*(layer for _, layer in _layers(recipe, overrides))))


def _layers(recipe: str | None, overrides: list[str] | None) -> list[tuple[str, Any]]:
    """(origin, values) of the recipe and of every override, in the order in which they apply."""
    layers: list[tuple[str, Any]] = []
    if recipe is not None:
        layers.append((f"recipe {recipe}", _read_recipe(recipe)))
    for item in overrides or []:
        key, separator, _ = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"{item!r} is not key=value. Example: train.batch_size=64")
        layers.append((item, OmegaConf.from_dotlist([item])))
    return layers


def _read_recipe(recipe: str) -> DictConfig:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"--config {recipe}: no such file. Shipped recipes: {', '.join(recipes())}")
        text = path.read_text(encoding="utf-8")
    elif recipe in recipes():
        text = (resources.files("personvit") / "configs" / f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        near = difflib.get_close_matches(recipe, recipes(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--config {recipe}: no such recipe.{hint} Shipped: {', '.join(recipes())}")
    layer = OmegaConf.create(text)
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"--config {recipe}: a recipe is a mapping of sections to keys, got {type(layer).__name__}")
    return layer


def _known_keys(schema: type[Any], prefix: str = "") -> list[str]:
    keys = []
    for entry in dataclasses.fields(schema):
        factory = entry.default_factory
        if factory is not dataclasses.MISSING and dataclasses.is_dataclass(factory):
            keys += _known_keys(factory, f"{prefix}{entry.name}.")
        keys.append(prefix + entry.name)
    return keys


def _explain(schema: type[Any], origin: str, layer: Any, error: Exception) -> str:
    known = _known_keys(schema)
    for key in _leaf_keys(OmegaConf.to_container(layer)):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            return f"{origin}: unknown key {key}.{hint} All keys: personvit pretrain --print-config"
    return f"{origin}: {str(error).splitlines()[0]}"


def _leaf_keys(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [prefix.removesuffix(".")]
    return [leaf for key, value in tree.items() for leaf in _leaf_keys(value, f"{prefix}{key}.")]
