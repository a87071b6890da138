"""Configuration: frozen dataclasses with defaults, ranges and the origin of each default.

Order of precedence, lowest first: dataclass defaults, YAML recipe (`--config NAME|FILE`), flags, `key=value`.
Origins of the pre-training's defaults:

* ``iBOT``: bytedance/ibot, main_ibot.py and README (the code base that PersonViT's authors forked).
* ``peers``: the same value in every LUPerson pre-training script of TransReID-SSL, PASS and SOLIDER.
* ``inferred``: read from the names of PersonViT's released files, not stated by its authors (docs/recipe.md).
* ``ours``: a choice of this project.
"""

from __future__ import annotations

from personvit.config.evaluate import PROTOCOLS, RERANK_PRESETS, EvaluateConfig, ExpansionConfig, RerankConfig
from personvit.config.finetune import (
    EvalConfig,
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneLossConfig,
    FinetuneModelConfig,
    FinetuneOptimConfig,
    FinetuneTrainConfig,
    InputConfig,
)
from personvit.config.merge import given_yaml, load_config, recipes, to_plain, to_yaml
from personvit.config.pretrain import (
    CropsConfig,
    HeadConfig,
    HealthConfig,
    LossConfig,
    MasksConfig,
    OptimConfig,
    PretrainConfig,
    TrainConfig,
)
from personvit.config.shared import IMAGENET_MEAN, IMAGENET_STD, DataConfig, KernelsConfig, ModelConfig

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PROTOCOLS",
    "RERANK_PRESETS",
    "CropsConfig",
    "DataConfig",
    "EvalConfig",
    "EvaluateConfig",
    "ExpansionConfig",
    "FinetuneConfig",
    "FinetuneDataConfig",
    "FinetuneLossConfig",
    "FinetuneModelConfig",
    "FinetuneOptimConfig",
    "FinetuneTrainConfig",
    "HeadConfig",
    "HealthConfig",
    "InputConfig",
    "KernelsConfig",
    "LossConfig",
    "MasksConfig",
    "ModelConfig",
    "OptimConfig",
    "PretrainConfig",
    "RerankConfig",
    "TrainConfig",
    "given_yaml",
    "load_config",
    "recipes",
    "to_plain",
    "to_yaml",
]
