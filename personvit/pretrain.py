"""`python -m personvit.pretrain`: pre-train a ViT on person crops."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import torch

from personvit.config import PretrainConfig, given_yaml, load_config, recipes, to_yaml
from personvit.engine.pretrain_loop import PretrainResult, PretrainRun
from personvit.errors import EXIT_INTERRUPTED
from personvit.runtime.distributed import Ranks, init_distributed, on_main
from personvit.runtime.entry import run, setup_logging
from personvit.runtime.memory import keep_freed_memory
from personvit.runtime.runlog import RunFolder, log_to_file

logger = logging.getLogger("personvit.pretrain")  # `python -m` names this module __main__

DEFAULT_RECIPE = "demo"

_EPILOG = """\
examples:
  personvit pretrain                                                  a small run on generated persons
  personvit pretrain data.root=CROPS --out runs/mine                  a small run on your own crops
  torchrun --nproc-per-node 8 -m personvit.pretrain --config vit_small_luperson data.root=LUP/images --out runs/lup
  personvit pretrain --out runs/lup --resume auto                     go on where that run stopped

--out holds config.yaml resolved.yaml metrics.jsonl tensorboard/ train.log checkpoints/ exported/backbone.safetensors.
exit codes: 0 done; 1 other errors; 2 configuration; 3 data; 4 checkpoint; 5 run folder in use; 6 backend; 7 not finite;
75 stopped by SIGTERM or SIGINT after saving (run again with --resume auto); 130 stopped by a second one, not saved.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="personvit pretrain",
        description="Pre-train a ViT on person crops by masked image modelling and self-distillation.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help=f"recipe: {', '.join(recipes())}; or a YAML file (default {DEFAULT_RECIPE}; with --resume: the run's own)",
    )
    parser.add_argument("--fused", action="store_true", help="fastest operators here; same as kernels.backend=fused")
    parser.add_argument("--out", metavar="DIR", help="run folder (default runs/pretrain-RECIPE)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", metavar="auto|PATH", help="go on from the run folder's last checkpoint, or from PATH"
    )
    start.add_argument("--overwrite", action="store_true", help="delete what an earlier run wrote into the run folder")
    parser.add_argument("--print-config", action="store_true", help="print every key with its value, and leave")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values, e.g. train.epochs=20")
    return parser


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
    on_main(lambda: folder.prepare(resume=resume is not None, overwrite=overwrite), ranks.device)
    handler = log_to_file(folder) if ranks.is_main else None
    try:
        if ranks.is_main:
            folder.config.write_text(given or to_yaml(cfg), encoding="utf-8")
            folder.resolved.write_text(to_yaml(cfg), encoding="utf-8")
        _set_determinism(cfg)
        if ranks.device.type == "cpu":
            keep_freed_memory()
        return PretrainRun(cfg, folder, ranks, resume).run()
    finally:
        if handler is not None:
            logging.getLogger("personvit").removeHandler(handler)
            handler.close()


def _set_determinism(cfg: PretrainConfig) -> None:
    if cfg.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.train.deterministic)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and pre-train.

    Args:
        argv: arguments without the program name; None: those of this process.

    Returns:
        0, or `EXIT_INTERRUPTED` when a signal stopped the run after it was saved.
    """
    arguments = _parser().parse_intermixed_args(argv)
    recipe = arguments.config
    out = Path(arguments.out or Path("runs") / f"pretrain-{Path(recipe or DEFAULT_RECIPE).stem}")
    if recipe is None and arguments.resume and RunFolder(out).config.is_file():
        recipe = str(RunFolder(out).config)  # the run goes on as it was begun
    overrides = [*(["kernels.backend=fused"] if arguments.fused else []), *arguments.overrides]
    cfg = load_config(PretrainConfig, recipe or DEFAULT_RECIPE, overrides)
    if arguments.print_config:
        sys.stdout.write(to_yaml(cfg))
        return 0
    ranks = init_distributed()
    setup_logging()
    if recipe is None:
        logger.info(
            "no --config: recipe %s, sized for a laptop's CPU. For real runs: --config vit_small_luperson",
            DEFAULT_RECIPE,
        )
        recipe = DEFAULT_RECIPE
    result = pretrain(
        cfg,
        out,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        given=given_yaml(recipe, overrides),
        ranks=ranks,
    )
    return EXIT_INTERRUPTED if result.interrupted else 0


if __name__ == "__main__":
    raise SystemExit(run(main))
