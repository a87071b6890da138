"""Evaluations during and after a fine-tuning, on all ranks together."""

from __future__ import annotations

import dataclasses

from personvit.config import DataConfig, EvaluateConfig, FinetuneConfig, ModelConfig
from personvit.data.reid_sets import ReIDSet
from personvit.engine.evaluation import Evaluation, Subject, evaluate_set
from personvit.engine.finetune_data import GENERATED, FinetuneData
from personvit.models.reid import ReIDModel
from personvit.runtime.distributed import Ranks


class FinetuneEvaluator:
    """Evaluates the model of a run on every set.

    Args:
        cfg: configuration.
        data: the sets.
        ranks: this process and its peers; all of them must call `run`.
    """

    def __init__(self, cfg: FinetuneConfig, data: FinetuneData, ranks: Ranks) -> None:
        self._cfg, self._data, self._ranks = cfg, data, ranks

    def run(self, model: ReIDModel, description: str, *, rerank: bool) -> list[Evaluation]:
        """Evaluate on every set. The model stays on its device and in its mode.

        The features are shared work, and every rank ranks by them; only rank 0 re-ranks, which takes more memory.

        Args:
            model: the same weights and buffers on every rank.
            description: of the model, for the report.
            rerank: also re-rank.

        Raises:
            DataError: an image cannot be read, or a feature is not finite.
        """
        cfg, main = self._cfg, self._ranks.is_main
        height, width = cfg.input.size
        text = f"{description}, at {height}x{width}, feature {model.neck_feat} the neck"
        subject = Subject(model, text, cfg.input.size, cfg.input.mean, cfg.input.std, cfg.model.arch)
        return [
            evaluate_set(
                self._evaluate_config(one, rerank=rerank and main),
                subject,
                one,
                generated=one.name == GENERATED,
                ranks=self._ranks,
                progress=main,
            )
            for one in self._data.testing
        ]

    def _evaluate_config(self, one: ReIDSet, *, rerank: bool) -> EvaluateConfig:
        """What `personvit evaluate` would be told to do the same."""
        cfg = self._cfg
        data = {field.name: getattr(cfg.data, field.name) for field in dataclasses.fields(DataConfig)}
        model = {field.name: getattr(cfg.model, field.name) for field in dataclasses.fields(ModelConfig)}
        return EvaluateConfig(
            data=DataConfig(**{**data, "name": one.name, "root": one.root}),
            model=ModelConfig(**model),
            kernels=cfg.kernels,
            rerank=dataclasses.replace(cfg.eval.rerank, enabled=rerank),
            protocol=cfg.eval.protocol,
            image_size=cfg.input.size,
            batch_size=cfg.eval.batch_size,
            max_rank=cfg.eval.max_rank,
            flip=cfg.eval.flip,
        )
