"""`python -m personvit.pretrain`: pre-train a ViT on person crops."""

from __future__ import annotations

from pathlib import Path

from personvit.config import PretrainConfig
from personvit.engine.command import TrainingCommand, prepared
from personvit.engine.pretrain_loop import PretrainResult, PretrainRun
from personvit.runtime.distributed import Ranks, init_distributed
from personvit.runtime.entry import run
from personvit.runtime.runlog import RunFolder

DEFAULT_RECIPE = "demo"

_EXAMPLES = """\
examples:
  personvit pretrain                                                  a small run on generated persons
  personvit pretrain data.root=CROPS --out runs/mine                  a small run on your own crops
  torchrun --nproc-per-node 8 -m personvit.pretrain --config vit_small_luperson data.root=LUP/images --out runs/lup
  personvit pretrain --out runs/lup --resume auto                     go on where that run stopped

--out holds config.yaml resolved.yaml metrics.jsonl tensorboard/ train.log checkpoints/ exported/backbone.safetensors.
"""


def pretrain(
    cfg: PretrainConfig,
    out: str | Path,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    given: str | None = None,
    ranks: Ranks | None = None,
) -> PretrainResult:
    """Pre-train as configured, and write everything into a run folder.

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
    folder = RunFolder(out)
    with prepared(folder, cfg, ranks, resume=resume is not None, overwrite=overwrite, given=given):
        return PretrainRun(cfg, folder, ranks, resume).run()


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and pre-train.

    Args:
        argv: arguments without the program name; None: those of this process.

    Returns:
        0, or `EXIT_INTERRUPTED` when a signal stopped the run after it was saved.
    """
    return TrainingCommand(
        verb="pretrain",
        schema=PretrainConfig,
        default_recipe=DEFAULT_RECIPE,
        description="Pre-train a ViT on person crops by masked image modelling and self-distillation.",
        examples=_EXAMPLES,
        advice="sized for a laptop's CPU. For real runs: --config vit_small_luperson",
        train=pretrain,
    ).main(argv)


if __name__ == "__main__":
    raise SystemExit(run(main))
