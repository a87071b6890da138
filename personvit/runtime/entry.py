"""The last wrapper around every command: errors that a user can cure end in one line, not in a traceback."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Sequence

from personvit.errors import PersonViTError
from personvit.runtime.distributed import is_main, shutdown
from personvit.runtime.progress import ConsoleHandler

Main = Callable[[list[str] | None], int]

_EXIT_KEYBOARD_INTERRUPT = 130  # what shells report for a program that SIGINT ended; nothing was saved


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's log to standard error, one plain line per message; ranks other than 0 only warn."""
    package = logging.getLogger("personvit")
    package.setLevel(level if is_main() else logging.WARNING)
    if not any(isinstance(handler, ConsoleHandler) for handler in package.handlers):
        handler = ConsoleHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
    # `python -m personvit.VERB` runs the entry module under the name __main__; its messages are the package's too.
    logging.getLogger("__main__").parent = package


def run(main: Main, argv: Sequence[str] | None = None) -> int:
    """Call an entry module's `main` and turn what it raises into an exit code.

    Args:
        main: takes the arguments without the program name, returns the exit code.
        argv: arguments; None: those of this process.

    Returns:
        What `main` returned, or the `exit_code` of the `PersonViTError`, or 130 after a Ctrl-C that `main` did not
        answer itself.
    """
    setup_logging()
    try:
        return main(list(sys.argv[1:] if argv is None else argv))
    except PersonViTError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        place = f" while writing {error.filename}" if error.filename else ""
        sys.stderr.write(
            f"error: the disk is full{place}. Checkpoints that were there are whole. Free some space (df -h shows "
            f"where it went) and run the same command with --resume auto.\n"
        )
        return PersonViTError.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _EXIT_KEYBOARD_INTERRUPT
    finally:
        shutdown()
