"""Where a result comes from: library versions, the commit of this package's own checkout, the time."""

from __future__ import annotations

import datetime
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flashsvd._version import __version__

PACKAGE_DIRECTORY = Path(__file__).resolve().parent.parent


def timestamp() -> str:
    """Now, in UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def library_versions() -> dict[str, str | None]:
    """Versions of flashsvd and of the libraries whose behaviour shapes a checkpoint; None where not installed."""
    return {"flashsvd": __version__} | {name: _version(name) for name in ("torch", "transformers", "triton")}


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, or None when it is installed elsewhere.

    An installed package may lie inside somebody else's repository (a virtual environment in a project, say), whose
    commit says nothing about us: only a checkout that holds this very directory as `src/flashsvd` counts.
    """
    checkout = PACKAGE_DIRECTORY.parent.parent
    if checkout / "src" / "flashsvd" != PACKAGE_DIRECTORY or not (checkout / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
