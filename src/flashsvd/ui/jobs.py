"""The jobs that the page can start: which library function each calls, in the process that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashsvd.common.config import Config
from flashsvd.common.options import option
from flashsvd.common.paths import expand
from flashsvd.ui.root import Root


@dataclass(frozen=True)
class SavedProfile(Config):
    """In the place of a config: a profile that was measured before, to be shown again."""

    file: str = option(help="profile.json of an earlier run", path="read")


@dataclass(frozen=True)
class Job:
    """One job of the page.

    Attributes:
        name: the command that does the same in a shell.
        configs: one config, or several for `profile`, some of which may be a `SavedProfile`.
        root: what its paths are held against once more before it begins.
    """

    name: str
    configs: tuple[Any, ...]
    root: Root

    def check_paths(self) -> None:
        """Raises ConfigError where a config names a path outside of the root."""
        for config in self.configs:
            self.root.check(config)


def prepare_imports() -> None:
    """Import what every job needs, which takes seconds."""
    import transformers  # noqa: F401 - for the time that it takes

    from flashsvd import runtime  # noqa: F401 - likewise
    from flashsvd.compression import run as compressing  # noqa: F401 - likewise
    from flashsvd.evaluation import run as evaluating  # noqa: F401 - likewise


def run_job(job: Job) -> tuple[Any, ...]:
    """Run a job and return its results.

    Raises:
        FlashSVDError: it cannot be done.
    """
    job.check_paths()
    match job.name:
        case "compress":
            from flashsvd.compress import run_compress

            return tuple(map(run_compress, job.configs))
        case "eval":
            from flashsvd.evaluate import run_eval

            return tuple(map(run_eval, job.configs))
        case "finetune":
            from flashsvd.finetune import run_finetune

            return tuple(map(run_finetune, job.configs))
        case "profile":
            from flashsvd.profile import run_profile
            from flashsvd.profiling.result import ProfileResult

            measured = [config for config in job.configs if not isinstance(config, SavedProfile)]
            for config in measured:
                _check_dense(config, job.root)
            read = {config: ProfileResult.read(expand(config.file)) for config in job.configs if config not in measured}
            return tuple(read[config] if config in read else run_profile(config) for config in job.configs)
        case _:
            raise ValueError(job.name)


def _check_dense(config: Any, root: Root) -> None:
    """Hold the dense model that a checkpoint's own metadata names against the root, where a profile follows it."""
    from flashsvd.models.found import find_model
    from flashsvd.profiling.variants import DENSE

    if config.dense is not None or not set(config.variant_names()) & set(DENSE):
        return
    if (info := find_model(config.checkpoint).info) is not None and info.base_model:
        root.check_path(f"{config.checkpoint} was compressed from", info.base_model, "model")
