"""Everything that `personvit evaluate` reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from personvit.config.checks import check, check_choice
from personvit.config.shared import DataConfig, KernelsConfig, ModelConfig
from personvit.errors import ConfigError

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
        check_choice("rerank.preset", self.preset, tuple(RERANK_PRESETS))
        for key in ("k1", "k2"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"rerank.{key}", value, "1 or more")
        if self.lambda_value is not None:
            check(0 <= self.lambda_value <= 1, "rerank.lambda_value", self.lambda_value, "0 (Jaccard only) to 1")

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
        check(self.top >= 0, "expansion.top", self.top, "0 (off) or more")
        check(self.alpha >= 0, "expansion.alpha", self.alpha, "0 or more")


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
    rank_lists: str | None = None
    """Picture (PNG) of some queries with what was found for them; same as `--rank-lists`."""

    def __post_init__(self) -> None:
        check_choice("protocol", self.protocol, PROTOCOLS)
        check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        check(self.max_rank >= 1, "max_rank", self.max_rank, "1 or more")
        if self.per_query is not None and Path(self.per_query).suffix.lower() not in (".json", ".csv"):
            raise ConfigError(f"per_query={self.per_query}: name a file that ends in .json or .csv.")
