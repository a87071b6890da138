"""Sections that several commands share."""

from __future__ import annotations

from dataclasses import dataclass

from personvit.config.checks import check, check_choice
from personvit.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they are read."""

    name: str = "auto"
    """auto (looks at `data.root`), generated, folder, list, lmdb, shards, csv, or a labelled set (market1501 ...)."""
    root: str | None = None
    """Folder, text file of paths, LMDB database, tar shards or CSV. None: generated persons in the cache folder."""
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
    generated_train_ids: int | None = None
    """Identities of the generated training split. None: as many as of the query/gallery split."""
    generated_test_ids: int = 100
    """Identities of the generated query/gallery split, disjoint from the pool."""
    generated_seed: int = 0

    def __post_init__(self) -> None:
        check_choice("data.loader", self.loader, ("auto", "dali-gpu", "dali-cpu", "torchvision"))
        check_choice("data.decode", self.decode, ("auto", "cpu", "mixed"))
        check(self.threads == -1 or self.threads >= 1, "data.threads", self.threads, "1 or more, or -1")
        check(0 <= self.hw_decoder_load <= 1, "data.hw_decoder_load", self.hw_decoder_load, "a share in [0, 1]")
        if self.decode == "mixed" and self.loader in ("dali-cpu", "torchvision"):
            raise ConfigError(
                f"data.decode=mixed decodes on a GPU, but data.loader={self.loader} does not use one. Use "
                f"data.loader=dali-gpu, or leave data.decode out."
            )
        check(self.num_workers >= -1, "data.num_workers", self.num_workers, "-1 or more")
        check(self.prefetch >= 1, "data.prefetch", self.prefetch, "1 or more")
        check(self.generated_train >= 1, "data.generated_train", self.generated_train, "1 or more")
        ids = self.generated_train_ids
        check(ids is None or ids >= 0, "data.generated_train_ids", ids, "0 or more, or null")


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
        check(self.patch_size >= 1, "model.patch_size", self.patch_size, "1 or more")
        check(0.0 <= self.drop_path < 1.0, "model.drop_path", self.drop_path, "[0, 1)")


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Which implementation of each operator runs. Never changes the recipe or a checkpoint."""

    backend: str = "auto"
    """auto, reference (plain torch), fused (the fastest on this device; `--fused`), or triton (its kernels everywhere;
    on a CPU they need TRITON_INTERPRET=1 and are for debugging only)."""

    def __post_init__(self) -> None:
        check_choice("kernels.backend", self.backend, ("auto", "reference", "fused", "triton"))
