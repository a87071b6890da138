"""The arms of evidence.py, and one run of one: pre-training, fine-tuning, and what both are worth."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from evidence_page import SCRATCH, TITLES, Row

from personvit.config import EvaluateConfig, FinetuneConfig, PretrainConfig, load_config, to_plain
from personvit.data.generated.config import GeneratedConfig
from personvit.data.reid_sets import ReIDSet, ReIDSplit, open_reid_set
from personvit.engine.evaluation import Evaluation, Subject, evaluate_set
from personvit.errors import EXIT_INTERRUPTED, ConfigError, DataError, RunFolderError
from personvit.evaluate import build_subject
from personvit.finetune import finetune
from personvit.models.vit import build_vit
from personvit.pretrain import pretrain
from personvit.runtime.runlog import FinetuneFolder, RunFolder
from personvit.runtime.seed import seed_everything

logger = logging.getLogger("personvit.evidence")

_OWN_KEYS = ("data.name", "data.root", "model.weights", "train.seed")

ARMS: dict[str, tuple[str, ...]] = {
    SCRATCH: (),
    "dino": ("loss.lambda_patch=0.0", "masks.ratio=[0.0]", "masks.ratio_var=[0.0]"),
    "mim": ("loss.lambda_cls=0.0", "crops.local_crops=0"),  # only the CLS loss looks at local crops
    "dino+mim": (),
}
"""What each arm changes in the pre-training, applied last; `scratch` has none."""

PRETRAIN_RECIPE, FINETUNE_RECIPE = "vit_small_luperson", "finetune_market1501_vit_small"
PRETRAIN = (
    *("data.generated_train=20480", "data.generated_train_ids=512", "data.generated_test_ids=300"),
    *("train.epochs=12", "train.batch_size=256", "train.save_every_epochs=2", "train.keep_every_epochs=1000"),
    # What gets going within hundreds of steps (docs/learning.md); the recipe's values are meant for hundreds of epochs.
    *("loss.centering=sinkhorn", "loss.teacher_temp=[0.03,0.03]", "loss.teacher_patch_temp=[0.03,0.03]"),
    *("loss.teacher_temp_warmup_epochs=0", "optim.warmup_epochs=2", "optim.momentum=[0.98,1.0]"),
    *("health.probe_every_epochs=0", "kernels.backend=fused"),
)
FINETUNE = (
    # The published SGD at 4e-4 is meant for weights that know much already.
    *("optim.name=adamw", "optim.lr=3e-4", "optim.weight_decay=0.05", "optim.weight_decay_bias=0.0"),
    *("optim.bias_lr_factor=1.0", "optim.warmup_epochs=3", "train.epochs=24", "train.save_every_epochs=6"),
    "eval.every_epochs=0",
)
_QUICK = ("model.arch=vit_micro", "model.patch_size=8", "train.precision=fp32", "data.num_workers=0")
QUICK_PRETRAIN = (
    *_QUICK,
    *("data.generated_train=24", "data.generated_train_ids=6", "data.generated_test_ids=4", "kernels.backend=auto"),
    *("crops.global_size=[32,16]", "crops.local_size=[16,8]", "crops.local_crops=2"),
    *("head.prototypes=32", "head.patch_prototypes=32", "head.hidden_dim=32", "head.bottleneck_dim=16"),
    *("train.epochs=2", "train.batch_size=8", "data.loader=torchvision"),
    *("optim.warmup_epochs=1", "optim.lr=3e-2", "optim.momentum=[0.8,1.0]"),  # else so few steps change nothing
)
QUICK_FINETUNE = (
    *_QUICK,
    *("input.size=[32,16]", "input.pad=2", "train.epochs=2", "optim.warmup_epochs=1"),
    *("train.batch_size=12", "train.instances=2", "eval.batch_size=32", "eval.rerank.k1=4", "eval.rerank.k2=2"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the figures but arm and seed."""

    pretrain: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    """`key=value` of the user."""
    quick: bool = False

    def __post_init__(self) -> None:
        for item in (*self.pretrain, *self.finetune):
            if item.partition("=")[0] in _OWN_KEYS:
                raise ConfigError(f"{item}: every run sets {', '.join(_OWN_KEYS)} itself. Leave it out; see --seeds")

    def overrides(self) -> dict[str, list[str]]:
        """What the recipes are changed by in every arm; later entries win."""
        return {
            "pretrain": [*PRETRAIN, *(QUICK_PRETRAIN if self.quick else ()), *self.pretrain],
            "finetune": [*FINETUNE, *(QUICK_FINETUNE if self.quick else ()), *self.finetune],
        }

    def pretraining(self, arm: str, seed: int) -> PretrainConfig:
        """Configuration of a pre-training, without its data."""
        overrides = [*self.overrides()["pretrain"], *ARMS[arm], f"train.seed={seed}"]
        return load_config(PretrainConfig, PRETRAIN_RECIPE, overrides)

    def finetuning(self, seed: int) -> FinetuneConfig:
        """Configuration of a fine-tuning, without its data and weights."""
        return load_config(FinetuneConfig, FINETUNE_RECIPE, [*self.overrides()["finetune"], f"train.seed={seed}"])

    @functools.cached_property
    def digest(self) -> str:
        """Short name of the settings: the same for equal values, wherever the data lie and whichever kernels run."""
        cfg = self.pretraining(SCRATCH, 0)
        first, second = to_plain(cfg), to_plain(self.finetuning(0))
        for plain in (first, second):
            del plain["data"], plain["kernels"]
        content = [ARMS, GeneratedConfig.from_data_config(cfg.data).key(), first, second]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


class ArmRun:
    """One arm with one seed in its folder; each stage that is finished is written down and not done again.

    Args:
        settings: of all runs.
        arm: one of `ARMS`.
        seed: of weights, order and augmentation, in both trainings.
        root: the generated persons.
        folder: of this run.

    Raises:
        RunFolderError: the folder holds a run of other settings.
    """

    def __init__(self, settings: Settings, arm: str, seed: int, root: Path, folder: Path) -> None:
        self.settings, self.arm, self.seed, self.folder = settings, arm, seed, folder
        cfg, finetuning = settings.pretraining(arm, seed), settings.finetuning(seed)
        self.drawn = GeneratedConfig.from_data_config(cfg.data)
        self.cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, name="generated", root=str(root)))
        self.finetuning = dataclasses.replace(
            finetuning,
            data=dataclasses.replace(finetuning.data, name="generated", root=str(root)),
            kernels=cfg.kernels,
        )
        self.reid_set = open_reid_set("generated", root)
        self._journal = folder / "progress.json"
        self._progress: dict[str, Any] = {"settings": settings.digest}
        if self._journal.is_file():
            self._progress = json.loads(self._journal.read_text(encoding="utf-8"))
        if self._progress["settings"] != settings.digest:
            raise RunFolderError(
                f"{folder} holds a run of other settings ({self._progress['settings']}; now {settings.digest}), and "
                f"the two cannot be mixed. Write elsewhere: --out DIR, or give --pretrain and --finetune as before."
            )

    def row(self) -> Row:
        """Do what is left to do, and return all figures; shares in [0, 1].

        Raises:
            SystemExit: a signal stopped a training, which is saved.
        """
        steps = self._stage("pretrain", self._pretrain) if self.arm != SCRATCH else 0
        frozen = self._stage("frozen", self._frozen)
        tuned = self._stage("finetune", self._finetune)
        occluded = self._stage("occluded", self._occluded)
        return {
            "arm": self.arm,
            "seed": self.seed,
            "generated": True,
            "quick": self.settings.quick,
            "settings": self.settings.digest,
            "recipes": [PRETRAIN_RECIPE, FINETUNE_RECIPE],
            "overrides": {**self.settings.overrides(), "arm": list(ARMS[self.arm])},
            "pool_images": self.drawn.pool_images,
            "pool_ids": self.drawn.pool_ids,
            "train_images": len(self.reid_set.train),
            "train_ids": len(self.reid_set.train_pids),
            "test_ids": self.drawn.test_ids,
            "queries": len(self.reid_set.query),
            "occluded_queries": occluded["queries"],
            "gallery": len(self.reid_set.gallery),
            "pretrain_steps": steps,
            "pretrain_images": steps * self.cfg.train.batch_size,
            "pretrain_seconds": self._seconds("pretrain"),
            "finetune_steps": tuned["steps"],
            "finetune_images": tuned["steps"] * self.finetuning.train.batch_size,
            "finetune_seconds": self._seconds("finetune"),
            **{f"frozen_{key}": value for key, value in frozen.items()},
            **tuned["figures"],
            **{f"occluded_{key}": value for key, value in occluded["figures"].items()},
        }

    def _pretrain(self) -> int:
        """Steps of the pre-training."""
        with self._timed("pretrain"):
            result = pretrain(self.cfg, self.folder / "pretrain", resume="auto")
        if result.interrupted:
            raise SystemExit(EXIT_INTERRUPTED)
        return result.step

    def _frozen(self) -> dict[str, float]:
        """Figures of the backbone that the fine-tuning starts from."""
        figures = figures_of(self._evaluate(self._start(), self.reid_set, rerank=False))
        return {key: figures[key] for key in ("mAP", "rank1")}

    def _finetune(self) -> dict[str, Any]:
        """Steps, and the figures of the last model on all queries."""
        model = dataclasses.replace(self.finetuning.model, weights=self._backbone())
        folder = FinetuneFolder(self.folder / "finetune")
        with self._timed("finetune"):
            result = finetune(dataclasses.replace(self.finetuning, model=model), folder.root, resume="auto")
        if result.interrupted:
            raise SystemExit(EXIT_INTERRUPTED)
        summary = json.loads(folder.evaluation.read_text(encoding="utf-8"))["evaluations"][0]
        return {"steps": result.step, "figures": _figures(summary, summary["rerank"])}

    def _occluded(self) -> dict[str, Any]:
        """Number of the occluded queries, and the figures of the last model on them."""
        weights = str(FinetuneFolder(self.folder / "finetune").exported)
        subject = build_subject(self._evaluation(weights=weights))
        part = occluded_queries(self.reid_set)
        return {"queries": len(part.query), "figures": figures_of(self._evaluate(subject, part, rerank=True))}

    def _start(self) -> Subject:
        if self.arm != SCRATCH:
            return build_subject(self._evaluation(weights=self._backbone()))
        cfg, size = self.cfg, self.cfg.crops.global_size
        seed_everything(self.seed)  # the weights that a fine-tuning with this seed starts from
        backbone = build_vit(cfg.model.arch, img_size=size, patch_size=cfg.model.patch_size).eval()
        if torch.cuda.is_available():
            backbone.cuda()
        return Subject(backbone, f"{cfg.model.arch}, untrained", size, cfg.crops.mean, cfg.crops.std, cfg.model.arch)

    def _evaluation(self, *, weights: str | None = None, rerank: bool = False) -> EvaluateConfig:
        return EvaluateConfig(
            data=self.cfg.data,
            model=dataclasses.replace(self.cfg.model, weights=weights),
            kernels=self.cfg.kernels,
            rerank=dataclasses.replace(self.finetuning.eval.rerank, enabled=rerank),
            batch_size=self.finetuning.eval.batch_size,
        )

    def _evaluate(self, subject: Subject, reid_set: ReIDSet, *, rerank: bool) -> Evaluation:
        return evaluate_set(self._evaluation(rerank=rerank), subject, reid_set, generated=True)

    def _backbone(self) -> str | None:
        return None if self.arm == SCRATCH else str(RunFolder(self.folder / "pretrain").exported)

    def _stage(self, name: str, work: Callable[[], Any]) -> Any:
        if name not in self._progress:
            logger.info("%s, seed %d: %s", TITLES[self.arm], self.seed, name)
            self._note(name, work())
        return self._progress[name]

    def _seconds(self, training: str) -> float:
        """Wall-clock seconds of a training with its evaluation, over all parts; one that was killed is missing."""
        return round(float(self._progress.get(f"{training}_seconds", 0.0)), 1)

    @contextlib.contextmanager
    def _timed(self, training: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._note(f"{training}_seconds", self._seconds(training) + time.perf_counter() - begin)

    def _note(self, key: str, value: Any) -> None:
        self._progress[key] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._journal.with_suffix(".part")
        part.write_text(json.dumps(self._progress, indent=2) + "\n", encoding="utf-8")
        os.replace(part, self._journal)


def occluded_queries(reid_set: ReIDSet) -> ReIDSet:
    """A generated set with those queries only that have something in front of the person; the gallery stays whole.

    As in Occluded-Duke the split is a set of its own: re-ranking sees these queries and the gallery, no other query.

    Raises:
        DataError: there is no such query.
    """
    card = json.loads((Path(reid_set.root) / "card.json").read_text(encoding="utf-8"))
    hidden, query = set(card["occluded"]), reid_set.query
    chosen = [number for number, path in enumerate(query.paths) if f"query/{Path(path).name}" in hidden]
    if not chosen:
        raise DataError(
            f"{reid_set.root}: none of {len(query)} queries is occluded. Draw more: --pretrain "
            f"data.generated_test_ids=100"
        )
    part = ReIDSplit([query.paths[number] for number in chosen], query.pids[chosen], query.camids[chosen])
    return dataclasses.replace(reid_set, query=part)


def figures_of(evaluation: Evaluation) -> dict[str, float]:
    """Shares in [0, 1], those after re-ranking with the prefix `rr_`."""
    summary = evaluation.summary()
    return _figures(summary, summary["rerank"])


def _figures(plain: Row, reranked: Row | None) -> dict[str, float]:
    keys = ("mAP", "rank1", "mINP")
    return {key: plain[key] for key in keys} | {f"rr_{key}": reranked[key] for key in keys if reranked is not None}
