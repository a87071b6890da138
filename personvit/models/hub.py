"""Weight files on the Hugging Face Hub: `hf://owner/name/path/to/file`, with `@revision` where one is meant."""

from __future__ import annotations

import re
from pathlib import Path

from personvit.errors import CheckpointError

# One slash too: a Path made of the reference has lost the other.
_REFERENCE = re.compile(r"hf:/{1,2}([\w.-]+)/([\w.-]+)/([^@\\]+)(?:@([\w./-]+))?")
_FORM = "hf://owner/name/path/to/file, with @revision (branch, tag or commit) behind it if you like"


def is_reference(path: str | Path) -> bool:
    """Does this name a file on the Hub?"""
    return str(path).startswith("hf:")


def parse_reference(path: str | Path) -> tuple[str, str, str | None]:
    """Repository (owner/name), file in it, and revision (None: the default branch) of a reference.

    Raises:
        CheckpointError: not of the form `hf://owner/name/path/to/file[@revision]`.
    """
    found = _REFERENCE.fullmatch(str(path))
    owner, name, file, revision = found.groups() if found else ("", "", "", None)
    if any(not part.strip(".") for part in (owner, name, *file.split("/"))):  # nothing, or a way out of the folder
        raise CheckpointError(f"{path} is no reference to a file on the Hub. Write it as {_FORM}.")
    return f"{owner}/{name}", file, revision


def fetch(path: str | Path) -> Path:
    """The local copy of a referenced file, downloaded into the Hub's cache if it is not there yet.

    HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are obeyed, as by every program that uses huggingface_hub.

    Args:
        path: `hf://owner/name/path/to/file[@revision]`.

    Raises:
        CheckpointError: no such repository, file or revision, no permission, no network, or huggingface_hub is not
            installed.
    """
    repository, file, revision = parse_reference(path)
    try:
        from huggingface_hub import constants, errors, hf_hub_download
    except ImportError:
        raise CheckpointError(
            f"{path} lies on the Hugging Face Hub, and huggingface_hub is not installed: pip install 'personvit[hub]'"
        ) from None
    where = f"{repository} on {constants.ENDPOINT}"
    by_hand = "Or download the file with a browser and give its path."
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except errors.GatedRepoError:
        reason = f"{where} asks for an agreement first. Accept it on its page, then: hf auth login"
    except errors.RepositoryNotFoundError:
        reason = f"there is no {where}, or it is private. Check the spelling; for a private one: hf auth login"
    except errors.RevisionNotFoundError:
        reason = f"{where} has no revision {revision!r}. Leave @{revision} out for its default branch"
    except errors.LocalEntryNotFoundError as error:
        reason = (
            f"it is not in the cache and {constants.ENDPOINT} cannot be reached ({_first_line(error)}). Check the "
            f"network, HF_ENDPOINT, HF_HUB_OFFLINE and proxies. {by_hand}"
        )
    except errors.EntryNotFoundError:
        reason = f"{where} has no file {file!r}. See its list of files on its page"
    except (OSError, ValueError, RuntimeError) as error:  # broken transfers, full disks, names the Hub refuses
        reason = f"the download failed: {_first_line(error)}. Try again. {by_hand}"
    raise CheckpointError(f"{path}: {reason.rstrip('.')}.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
