"""`python -m personvit.finetune`: fine-tune a ViT on a labelled person ReID set."""

from __future__ import annotations

from pathlib import Path

from personvit.config import FinetuneConfig
from personvit.engine.command import TrainingCommand, prepared
from personvit.engine.finetune_loop import FinetuneResult, FinetuneRun
from personvit.errors import RunFolderError
from personvit.runtime.distributed import Ranks, init_distributed
from personvit.runtime.entry import run
from personvit.runtime.runlog import FinetuneFolder

DEFAULT_RECIPE = "finetune_demo"

_EXAMPLES = """\
examples:
  personvit finetune                                                     a small run on generated persons
  personvit finetune --config finetune_market1501_vit_small data.root=/data/Market-1501 \\
      model.weights=backbone.safetensors --out runs/market               a published run
  torchrun --nproc-per-node 2 -m personvit.finetune --config finetune_msmt17_vit_base ...
  personvit finetune --config finetune_market1501_vit_small data.name=csv data.root=labels.csv ...     your own images
  personvit finetune --out runs/market --resume auto                     go on where that run stopped

--out holds config.yaml resolved.yaml metrics.jsonl tensorboard/ train.log checkpoints/{last,best}.pth
exported/{model,best}.safetensors evaluation.json: the figures of the last model, with and without re-ranking.
"""


def finetune(
    cfg: FinetuneConfig,
    out: str | Path,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    given: str | None = None,
    ranks: Ranks | None = None,
) -> FinetuneResult:
    """Fine-tune as configured, evaluate, and write everything into a run folder.

    Args:
        cfg: configuration.
        out: run folder.
        resume: None, "auto" or the path of a checkpoint.
        overwrite: delete what an earlier run wrote there.
        given: YAML text of the configuration as the user gave it; None: the resolved one.
        ranks: this process and its peers; None: from torchrun's environment.

    Raises:
        PersonViTError: with what failed and what to do.
    """
    ranks = ranks or init_distributed()
    folder = FinetuneFolder(out)
    if overwrite and cfg.model.weights is not None and folder.writes(cfg.model.weights):
        raise RunFolderError(
            f"--overwrite would delete model.weights={cfg.model.weights}, which lies in run folder {folder.root}. "
            f"Write elsewhere: --out DIR"
        )
    with prepared(folder, cfg, ranks, resume=resume is not None, overwrite=overwrite, given=given):
        return FinetuneRun(cfg, folder, ranks, resume).run()


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and fine-tune.

    Args:
        argv: arguments without the program name; None: those of this process.

    Returns:
        0, or `EXIT_INTERRUPTED` when a signal stopped the run after it was saved.
    """
    return TrainingCommand(
        verb="finetune",
        schema=FinetuneConfig,
        default_recipe=DEFAULT_RECIPE,
        description="Fine-tune a ViT on labelled persons by classification and triplets, and evaluate it.",
        examples=_EXAMPLES,
        advice="sized for a laptop's CPU. For real runs: --config finetune_market1501_vit_small",
        train=finetune,
        folder=FinetuneFolder,
    ).main(argv)


if __name__ == "__main__":
    raise SystemExit(run(main))
