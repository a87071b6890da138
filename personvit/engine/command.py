"""What the commands that train share: arguments, the run folder's files, determinism."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from personvit.config import FinetuneConfig, PretrainConfig, given_yaml, load_config, recipes, to_yaml
from personvit.errors import EXIT_INTERRUPTED
from personvit.runtime.distributed import Ranks, init_distributed, on_main
from personvit.runtime.entry import setup_logging
from personvit.runtime.memory import keep_freed_memory
from personvit.runtime.runlog import RunFolder, log_to_file

logger = logging.getLogger(__name__)

C = TypeVar("C", PretrainConfig, FinetuneConfig)
C_contra = TypeVar("C_contra", PretrainConfig, FinetuneConfig, contravariant=True)

EXIT_CODES = """\
exit codes: 0 done; 1 other errors; 2 configuration; 3 data; 4 checkpoint; 5 run folder in use; 6 backend; 7 not finite;
75 stopped by SIGTERM or SIGINT after saving (run again with --resume auto); 130 stopped by a second one, not saved.
"""


class Ended(Protocol):
    """What a training function returns."""

    @property
    def interrupted(self) -> bool:
        """Whether a signal stopped the run after it was saved."""


class Train(Protocol[C_contra]):
    """`pretrain` or `finetune`."""

    def __call__(
        self,
        cfg: C_contra,
        out: str | Path,
        *,
        resume: str | None = None,
        overwrite: bool = False,
        given: str | None = None,
        ranks: Ranks | None = None,
    ) -> Ended:
        """Train into a run folder."""


@dataclass(frozen=True)
class TrainingCommand(Generic[C]):
    """A command that trains.

    Attributes:
        verb: its name.
        schema: its configuration.
        default_recipe: recipe without `--config`.
        description: first line of its help.
        examples: last part of its help.
        advice: said when nobody named a recipe.
        train: does the work.
        folder: kind of its run folders.
    """

    verb: str
    schema: type[C]
    default_recipe: str
    description: str
    examples: str
    advice: str
    train: Train[C]
    folder: type[RunFolder] = RunFolder

    def main(self, argv: list[str] | None) -> int:
        """Parse the command line and train.

        Args:
            argv: arguments without the program name; None: those of this process.

        Returns:
            0, or `EXIT_INTERRUPTED` when a signal stopped the run after it was saved.
        """
        arguments: argparse.Namespace = self._parser().parse_intermixed_args(argv)
        recipe: str | None = arguments.config
        out = Path(arguments.out or self._default_out(recipe or self.default_recipe))
        if recipe is None and arguments.resume and self.folder(out).config.is_file():
            self.folder(out).refuse_other_command()
            recipe = str(self.folder(out).config)  # the run goes on as it was begun
        overrides = [*(["kernels.backend=fused"] if arguments.fused else []), *arguments.overrides]
        cfg = load_config(self.schema, recipe or self.default_recipe, overrides)
        if arguments.print_config:
            sys.stdout.write(to_yaml(cfg))
            return 0
        ranks = init_distributed()
        setup_logging()
        if recipe is None:
            logger.info("no --config: recipe %s, %s", self.default_recipe, self.advice)
            recipe = self.default_recipe
        ended = self.train(
            cfg,
            out,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            given=given_yaml(self.schema, recipe, overrides),
            ranks=ranks,
        )
        return EXIT_INTERRUPTED if ended.interrupted else 0

    def _default_out(self, recipe: str) -> Path:
        stem = Path(recipe).stem
        return Path("runs") / (stem if stem.startswith(f"{self.verb}_") else f"{self.verb}-{stem}")

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            prog=f"personvit {self.verb}",
            description=self.description,
            epilog=f"{self.examples}{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument(
            "--config",
            metavar="NAME|FILE",
            help=f"recipe: {', '.join(recipes(self.schema))}; or a YAML file (default {self.default_recipe}; with "
            f"--resume: the run's own)",
        )
        parser.add_argument(
            "--fused", action="store_true", help="fastest operators here; same as kernels.backend=fused"
        )
        parser.add_argument("--out", metavar="DIR", help=f"run folder (default {self._default_out('RECIPE')})")
        start = parser.add_mutually_exclusive_group()
        start.add_argument(
            "--resume", metavar="auto|PATH", help="go on from the run folder's last checkpoint, or from PATH"
        )
        start.add_argument(
            "--overwrite", action="store_true", help="delete what an earlier run wrote into the run folder"
        )
        parser.add_argument("--print-config", action="store_true", help="print every key with its value, and leave")
        parser.add_argument(
            "overrides", nargs="*", metavar="key=value", help="configuration values, e.g. train.epochs=20"
        )
        return parser


@contextlib.contextmanager
def prepared(
    folder: RunFolder,
    cfg: PretrainConfig | FinetuneConfig,
    ranks: Ranks,
    *,
    resume: bool,
    overwrite: bool,
    given: str | None,
) -> Iterator[None]:
    """A run folder with its configuration and log, and a process set up for training, while a run lasts.

    Args:
        folder: the run folder.
        cfg: configuration.
        ranks: this process and its peers.
        resume: the run goes on in this folder.
        overwrite: delete what an earlier run wrote there.
        given: YAML text of the configuration as the user gave it; None: the resolved one.

    Raises:
        RunFolderError: the folder is in use or cannot be written.
    """
    on_main(lambda: folder.prepare(resume=resume, overwrite=overwrite), ranks.device)
    handler = log_to_file(folder) if ranks.is_main else None
    try:
        if ranks.is_main:
            folder.config.write_text(given or to_yaml(cfg), encoding="utf-8")
            folder.resolved.write_text(to_yaml(cfg), encoding="utf-8")
        if cfg.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(cfg.train.deterministic)
        if ranks.device.type == "cpu":
            keep_freed_memory()
        yield
    finally:
        if handler is not None:
            logging.getLogger("personvit").removeHandler(handler)
            handler.close()
