"""Where a training keeps its checkpoints until the model is done: a directory beside the output.

It is what an interrupted run leaves behind and a resumed one goes on from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flashsvd.common.json_file import read_json
from flashsvd.common.options import flag
from flashsvd.errors import CheckpointError, ConfigError, first_line
from flashsvd.models.state import check_state
from flashsvd.storage.atomic import parents_made, real_target, write_text
from flashsvd.storage.scratch import Lock, Scratch, is_locked, leftover, take_away_leftovers
from flashsvd.storage.unfinished import read_terms
from flashsvd.storage.verify import tensor_shapes, weight_files
from flashsvd.training.config import FinetuneConfig

CONFIG_FILE = "finetune_config.json"
_PROCESSES, _DATA = "processes", "data_digest"
# Written last into a checkpoint of the Trainer's.
STATE_FILE = "trainer_state.json"
# What may be another in a resumed run, which goes the same way all the same.
_FREE = ("resume", "overwrite", "device", "dtype", "output", "save_steps")


@dataclass(frozen=True)
class Workplace:
    """The working directory of one output.

    Attributes:
        resumes: whether it goes on from what is there.
    """

    directory: Path
    resumes: bool

    @classmethod
    def find(cls, output: Path, config: FinetuneConfig) -> Workplace:
        """The workplace of an output, as far as it fits the config; nothing is written.

        Raises:
            ConfigError: there is an interrupted run and `--resume` is not given, or nothing to resume, or an option
                or the number of processes differs from that of the interrupted run, or another process works there.
            CheckpointError: what the interrupted run was asked for cannot be read, or the output is a loop of links.
        """
        directory = real_target(output).with_name(f"{output.name}.partial")
        take_away_leftovers(directory)
        what = _what_is_in(directory)
        if what == "nothing":
            if config.resume:
                raise ConfigError(f"there is nothing to resume: {directory} holds no training; leave out --resume")
            return cls(directory, False)
        if what == "something else":
            raise ConfigError(
                f"{directory} is no working directory of ours, but the training needs its name; choose another --output"
            )
        if is_locked(directory):
            raise ConfigError(f"another process trains in {directory}; wait for it, or choose another --output")
        earlier = read_terms(directory / CONFIG_FILE)
        if not config.resume:
            raise ConfigError(
                f"{directory} holds an interrupted run; pass --resume to continue it, or remove that directory"
            )
        _check_same(earlier, config)
        return cls(directory, True)

    def check_data(self, digest: str) -> None:
        """Refuse to go on with other examples than those that the interrupted run trained on.

        Args:
            digest: of the examples to train on.

        Raises:
            ConfigError: they are others.
        """
        if self.resumes and read_terms(self.directory / CONFIG_FILE).get(_DATA, digest) != digest:
            raise ConfigError(
                f"the training data are not those of the run to resume; restore them, or remove {self.directory}"
            )

    @contextlib.contextmanager
    def opened(self, config: FinetuneConfig, digest: str) -> Iterator[None]:
        """The directory, with the config in it, for this process alone; of its checkpoints no half-written one is left.

        The config is written with the directory itself, and never again.

        Args:
            digest: of the examples to train on.

        Raises:
            CheckpointError: the directory cannot be written.
            ConfigError: another process came before.
        """
        with self.writing(), parents_made(self.directory):
            lock = Lock.of_new(self.directory) if self.resumes else self._made(config, digest)
        if lock is None:
            raise ConfigError(f"another process trains in {self.directory}; wait for it, or choose another --output")
        try:
            with self.writing():
                for checkpoint in self._checkpoints():
                    if not _is_whole(checkpoint):
                        shutil.rmtree(checkpoint)
            yield
        finally:
            lock.release()

    def _made(self, config: FinetuneConfig, digest: str) -> Lock | None:
        """Make the directory, and lock it before others can see it; None where another process came before."""
        if self.directory.is_dir():
            # Much may have happened since it was looked at.
            abandoned = Lock.of_abandoned(self.directory)
            if abandoned is None or _what_is_in(self.directory) != "nothing":
                if abandoned is not None:
                    abandoned.release()
                return None
            _remove(self.directory)
            abandoned.release()
        with Scratch(self.directory, "writing") as scratch:
            made = scratch / self.directory.name
            made.mkdir()
            others = {_PROCESSES: _processes(), _DATA: digest}
            text = json.dumps(dataclasses.asdict(config) | others, indent=2)
            (made / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
            lock = Lock.of_new(made)
            made.rename(self.directory)
        return lock

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the file system says to whoever writes here into an error of one line.

        Raises:
            CheckpointError: this directory cannot be written.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError):
                reason = error.strerror or first_line(error)
            # Two writers report a full disk in types of their own: safetensors' and torch's.
            elif type(error).__name__ == "SafetensorError" or "inline_container" in str(error):
                reason = f"the file system takes no more ({first_line(error)})"
            else:
                raise
            raise CheckpointError(f"cannot write {self.directory}: {reason}; choose another --output") from error

    def last_checkpoint(self) -> Path | None:
        """The checkpoint to go on from; None where there is none."""
        return max(filter(_is_whole, self._checkpoints()), key=_step, default=None)

    def remove(self) -> None:
        """Remove it, all at once: what is left of half of it would be taken for an interrupted run."""
        _remove(self.directory)

    def _checkpoints(self) -> list[Path]:
        return _checkpoints_in(self.directory)


def _remove(directory: Path) -> None:
    with contextlib.suppress(OSError), Scratch(directory, "writing") as scratch:
        directory.rename(scratch / directory.name)


def _checkpoints_in(directory: Path) -> list[Path]:
    return [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def _what_is_in(directory: Path) -> Literal["nothing", "a training", "something else"]:
    """What a working directory holds; without a config that can be read and without a checkpoint, it is nothing."""
    if not os.path.lexists(directory):
        return "nothing"
    checkpoints = _checkpoints_in(directory)
    with contextlib.suppress(CheckpointError):
        read_terms(directory / CONFIG_FILE)
        return "a training"
    if any(map(_is_whole, checkpoints)):
        return "a training"
    ours = {directory / CONFIG_FILE, *checkpoints}
    if not directory.is_dir() or any(path not in ours and not leftover(path) for path in directory.iterdir()):
        return "something else"
    return "nothing"


def check_checkpoint(model: Any, checkpoint: Path) -> None:
    """Refuse a checkpoint that does not hold every tensor of the model, since the Trainer only warns.

    Raises:
        CheckpointError: naming a tensor that is missing, misshapen or has no place.
    """
    check_state(model, tensor_shapes(weight_files(checkpoint)), str(checkpoint), all_of_it=True)


def check_resumable(checkpoint: Path, process: int, processes: int) -> None:
    """Refuse a checkpoint without the optimiser's state, the schedule's or the random numbers': the Trainer would start
    with fresh ones.

    Raises:
        CheckpointError: naming the file.
    """
    random = f"rng_state_{process}.pth" if processes > 1 else "rng_state.pth"
    for name in ("optimizer.pt", "scheduler.pt", random):
        # The end of a file holds what makes it an archive.
        if not zipfile.is_zipfile(checkpoint / name):
            raise CheckpointError(f"{checkpoint / name} is missing or damaged; remove {checkpoint} to go on without it")


def finished(checkpoint: Path, early_stopping: int | None) -> Any:
    """The Trainer's state in a checkpoint after which there was nothing more to train; None for any other."""
    from transformers import TrainerState

    from flashsvd.training.callbacks import evaluations_since_best

    state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    stopped = early_stopping is not None and evaluations_since_best(state) >= early_stopping
    return state if stopped or state.global_step >= state.max_steps else None


def take_weights(model: Any, checkpoint: Path) -> None:
    """Give a model the weights in a checkpoint of its own.

    Raises:
        CheckpointError: as for `check_checkpoint`.
    """
    from safetensors.torch import load_file

    check_checkpoint(model, checkpoint)
    for file in weight_files(checkpoint):
        model.load_state_dict(load_file(file), strict=False)


def keep_best_here(checkpoint: Path) -> None:
    """Make the best checkpoint so far the one beside this: the working directory may have been moved.

    The Trainer would take the best weights from wherever its state says, or forget them where nothing is there.

    Raises:
        CheckpointError: it is not there.
    """
    file = checkpoint / STATE_FILE
    state = read_terms(file)
    noted = state.get("best_model_checkpoint")
    if noted is None:
        return
    best = checkpoint.with_name(Path(str(noted)).name or checkpoint.name)
    if not re.fullmatch(r"checkpoint-\d+", best.name) or not best.is_dir():
        raise CheckpointError(f"{checkpoint.parent} lacks {noted}, the best so far; remove it to start anew")
    if str(best) != noted:
        write_text(file, json.dumps(state | {"best_model_checkpoint": str(best)}, indent=2) + "\n")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        read_json(checkpoint / STATE_FILE)
        return True
    return False


def _check_same(earlier: dict[str, Any], config: FinetuneConfig) -> None:
    for name, value in dataclasses.asdict(config).items():
        if name not in _FREE and name in earlier and earlier[name] != value:
            raise ConfigError(
                f"{flag(name)} is {value!r}, but the run to resume had {earlier[name]!r}; give it the same options"
            )
    if (before := earlier.get(_PROCESSES, 1)) != _processes():
        raise ConfigError(f"the run to resume had {before} processes, not {_processes()}; start as many with torchrun")


def _processes() -> int:
    """How many torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
