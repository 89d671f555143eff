"""An interrupted training goes on to the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import MakeModel
from flashsvd import FinetuneConfig
from flashsvd.errors import CheckpointError, ConfigError
from flashsvd.storage.scratch import Lock
from flashsvd.training.callbacks import StopWhenLost
from flashsvd.training.resume import Workplace
from processes import running, until
from training_data import MNLI, SST2, TASKS, compress, finetune, write_task_data, write_text


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C after so many steps of the training that follows."""

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(StopWhenLost, "on_step_begin", on_step_begin)


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


CASES: dict[str, dict[str, Any]] = {
    "dense": {"task": "mnli"},
    "joint": {"task": "mnli"},
    "per-head": {"task": "mnli"},
    "masked-lm": {"mode": "mlm"},
    "similarity": {"mode": "similarity"},
    "distilled": {"task": "mnli", "hidden_weight": 0.5, "batch_size": 4, "accumulation": 2, "warmup": 0.3},
}


# Six steps an epoch, a checkpoint after each five: interrupted between two epochs, within one, before there is any.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "step", "last"),
    [*((case, 11, 10) for case in CASES), ("dense", 6, 6), ("per-head", 6, 6), ("dense", 3, None)],
)
def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, step: int, last: int | None
) -> None:
    options = CASES[case] | {"epochs": 2, "save_steps": 5, "seed": 4}
    if case == "masked-lm":
        source, options["data"] = make_model("bert", "masked-lm"), write_text(tmp_path / "data", train=48)
    elif case == "similarity":
        source, options["data"] = make_model("bert", "base"), write_task_data(tmp_path / "data", TASKS["similarity"])
    else:
        source, options["data"] = make_model("bert", "base"), write_task_data(tmp_path / "data", MNLI)
    if case == "distilled":
        options["teacher"] = make_model(name="teacher", num_labels=3)
    if case in ("joint", "per-head", "distilled"):
        source = compress(source, tmp_path / "small", qkv="joint" if case == "distilled" else case)
    whole = finetune(source, tmp_path / "whole", **options)
    interrupt_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        finetune(source, tmp_path / "parts", **options)
    assert not (tmp_path / "parts").exists()
    checkpoints = {path.name for path in (tmp_path / "parts.partial").glob("checkpoint-*")}
    assert (f"checkpoint-{last}" in checkpoints) if last else not (tmp_path / "parts.partial").exists()
    resumed = finetune(source, tmp_path / "parts", resume=last is not None, **options)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert (resumed.metrics, resumed.record.steps) == (whole.metrics, whole.record.steps)
    assert not (tmp_path / "parts.partial").exists()


@pytest.mark.slow
def test_legacy_names_of_weights_survive_a_checkpoint(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BERT's first checkpoints call a norm's weight gamma; the Trainer's own checkpoints would again."""
    source, data = make_model(), write_task_data(tmp_path / "data", SST2)
    tensors = load_file(source / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert set(renamed) != set(tensors)
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    options = {"task": "sst2", "data": data, "epochs": 2}
    finetune(source, tmp_path / "whole", **options)
    interrupt_at(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        finetune(source, tmp_path / "parts", **options)
    finetune(source, tmp_path / "parts", resume=True, **options)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert set(load_file(tmp_path / "whole" / "model.safetensors")) == set(tensors)


@pytest.mark.slow
def test_early_stopping_remembers_what_it_saw(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"task": "sst2", "data": write_task_data(tmp_path / "data", SST2), "epochs": 20, "early_stopping": 3}
    whole = finetune(make_model(), tmp_path / "whole", **options)
    interrupt_at(monkeypatch, whole.record.steps - 6)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path / "dense", tmp_path / "parts", **options)
    resumed = finetune(tmp_path / "dense", tmp_path / "parts", resume=True, **options)
    assert resumed.record.steps == whole.record.steps < 120
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture
def interrupted(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A training that was interrupted in its second epoch: the options that it had."""
    options = {"task": "sst2", "data": write_task_data(tmp_path / "data", SST2), "epochs": 2}
    options |= {"model": make_model(), "output": tmp_path / "out"}
    interrupt_at(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        finetune(**options)
    return options


def test_an_interrupted_run_is_neither_lost_nor_mixed_up(interrupted: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out\.partial holds an interrupted run; pass resume=True"):
        finetune(**interrupted)
    with pytest.raises(ConfigError, match=r"learning_rate is 0\.1, but the run to resume had 0\.005"):
        finetune(**interrupted, resume=True, learning_rate=0.1)
    assert (tmp_path / "out.partial" / "checkpoint-6").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 2},
        {"epochs": 1.5, "scheduler": "constant"},
        {"epochs": 20, "early_stopping": 1, "learning_rate": 2e-3},
        {"epochs": 1.5, "eval_steps": 4, "scheduler": "constant"},
    ],
    ids=lambda options: " ".join(map(str, options)),
)
@pytest.mark.parametrize("evaluated", [True, False])
def test_a_model_that_could_not_be_saved_is_saved_by_resuming(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], evaluated: bool
) -> None:
    options = options | {"task": "sst2", "data": write_task_data(tmp_path / "data", SST2)}
    if not evaluated:
        (options["data"] / "validation.tsv").unlink()
        options = {name: value for name, value in options.items() if name not in ("early_stopping", "eval_steps")}
        options["epochs"] = min(options["epochs"], 2)
    whole = finetune(make_model(), tmp_path / "whole", **options)

    def full(*_: object, **__: object) -> None:
        raise CheckpointError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("flashsvd.training.run.save_trained", full)
        with pytest.raises(CheckpointError, match="no space left"):
            finetune(tmp_path / "dense", tmp_path / "parts", **options)
    resumed = finetune(tmp_path / "dense", tmp_path / "parts", resume=True, **options)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert (resumed.metrics, resumed.record.steps) == (whole.metrics, whole.record.steps)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("change", ["lost", "cut"])
def test_a_checkpoint_without_the_state_of_the_training_is_refused(
    interrupted: dict[str, Any], tmp_path: Path, name: str, change: str
) -> None:
    """The Trainer itself would go on with a fresh optimiser, schedule or random numbers."""
    file = tmp_path / "out.partial" / "checkpoint-6" / name
    data = file.read_bytes()
    file.unlink()
    if change == "cut":
        file.write_bytes(data[:100])
    with pytest.raises(CheckpointError, match=rf"{name} is missing or damaged; remove .*checkpoint-6 to go on without"):
        finetune(**interrupted, resume=True)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(
    interrupted: dict[str, Any], tmp_path: Path
) -> None:
    for checkpoint in (tmp_path / "out.partial").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert finetune(**interrupted, resume=True).record.steps == 12


def test_a_run_is_resumed_with_as_many_processes(
    interrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="the run to resume had 1 processes, not 2; start as many with torchrun"):
        finetune(resume=True, **interrupted)


def test_a_run_is_resumed_on_the_same_data(interrupted: dict[str, Any]) -> None:
    file = interrupted["data"] / "train.tsv"
    file.write_text(file.read_text().replace("good", "very", 1))
    with pytest.raises(ConfigError, match="the training data are not those of the run to resume"):
        finetune(resume=True, **interrupted)


def test_there_must_be_something_to_resume(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    with pytest.raises(ConfigError, match=r"there is nothing to resume: .*out\.partial holds no training"):
        finetune(make_model(), tmp_path / "out", task="sst2", data=data, resume=True)


HALF = '{"model": "dense", "task'


@pytest.mark.parametrize(
    "left",
    [
        {},
        {"finetune_config.json": ""},
        {"finetune_config.json": HALF},
        {"checkpoint-6/trainer_state.json": HALF, "checkpoint-6/model.safetensors": ""},
    ],
)
def test_a_working_directory_with_nothing_in_it_is_nothing(
    make_model: MakeModel, tmp_path: Path, left: dict[str, str]
) -> None:
    """Neither does it block the next run, nor is there anything to resume."""
    options: dict[str, Any] = {"task": "sst2", "data": write_task_data(tmp_path / "data", SST2), "epochs": 1}
    (tmp_path / "out.partial").mkdir()
    for name, text in left.items():
        (tmp_path / "out.partial" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out.partial" / name).write_text(text)
    with pytest.raises(ConfigError, match="there is nothing to resume"):
        finetune(make_model(), tmp_path / "out", resume=True, **options)
    finetune(tmp_path / "dense", tmp_path / "out", **options)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("what", ["a directory", "a file", "a link"])
def test_a_working_directory_of_somebody_elses_stays(
    make_model: MakeModel, tmp_path: Path, what: str, resume: bool
) -> None:
    theirs = tmp_path / "out.partial"
    if what == "a file":
        theirs.write_text("dear")
    else:
        real = theirs if what == "a directory" else tmp_path / "real"
        real.mkdir()
        (real / "letters").write_text("dear")
        if what == "a link":
            theirs.symlink_to(real)
    data = write_task_data(tmp_path / "data", SST2)
    with pytest.raises(ConfigError, match=r"out\.partial is no working directory of ours.*choose another output"):
        finetune(make_model(), tmp_path / "out", task="sst2", data=data, resume=resume)
    assert (theirs if what == "a file" else theirs / "letters").read_text() == "dear"


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoints_without_options_that_can_be_read_are_kept_and_neither_way_points_at_the_other(
    interrupted: dict[str, Any], tmp_path: Path, resume: bool
) -> None:
    (tmp_path / "out.partial" / "finetune_config.json").write_text(HALF)
    with pytest.raises(
        CheckpointError, match=r"finetune_config\.json cannot be read .* remove that directory to start"
    ):
        finetune(**interrupted, resume=resume)
    assert (tmp_path / "out.partial" / "checkpoint-6").is_dir()


@pytest.mark.parametrize("resume", [False, True])
def test_a_working_directory_that_is_in_use_is_refused(
    interrupted: dict[str, Any], tmp_path: Path, resume: bool
) -> None:
    lock = Lock.of_new(tmp_path / "out.partial")
    assert lock is not None
    with pytest.raises(ConfigError, match=r"another process trains in .*out\.partial; wait for it, or choose another"):
        finetune(**interrupted, resume=resume)
    lock.release()


def test_the_options_are_written_once(
    interrupted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.partial" / "finetune_config.json"
    before = file.stat()
    assert json.loads(file.read_text())["save_steps"] != 2
    interrupt_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        finetune(**interrupted, resume=True, save_steps=2)
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_half_written_checkpoint_does_not_count(interrupted: dict[str, Any], tmp_path: Path) -> None:
    half = tmp_path / "out.partial" / "checkpoint-7"
    shutil.copytree(tmp_path / "out.partial" / "checkpoint-6", half)
    (half / "trainer_state.json").write_text('{"epoch": 1')
    result = finetune(**interrupted, resume=True)
    assert result.record.steps == 12


def test_the_best_weights_are_those_of_its_own_checkpoint(interrupted: dict[str, Any], tmp_path: Path) -> None:
    """Wherever the working directory was when they were noted."""
    own, elsewhere = tmp_path / "out.partial" / "checkpoint-6", tmp_path / "elsewhere" / "checkpoint-6"
    best = load_file(own / "model.safetensors")
    elsewhere.mkdir(parents=True)
    others = {name: torch.zeros_like(tensor) for name, tensor in best.items()}
    save_file(others, elsewhere / "model.safetensors", metadata={"format": "pt"})
    state = json.loads((own / "trainer_state.json").read_text())
    noted = {"best_model_checkpoint": str(elsewhere), "best_metric": 2.0, "best_global_step": 6}
    (own / "trainer_state.json").write_text(json.dumps(state | noted))
    finetune(**interrupted, resume=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in best.items())


@pytest.mark.parametrize("name", ["..", "checkpoint-5"])
def test_a_best_checkpoint_that_is_not_there_is_refused(interrupted: dict[str, Any], tmp_path: Path, name: str) -> None:
    file = tmp_path / "out.partial" / "checkpoint-6" / "trainer_state.json"
    noted = {"best_model_checkpoint": f"elsewhere/{name}"}
    file.write_text(json.dumps(json.loads(file.read_text()) | noted))
    with pytest.raises(CheckpointError, match="the best so far; remove it to start anew"):
        finetune(**interrupted, resume=True)


@pytest.mark.parametrize("change", ["lost", "misshapen"])
def test_a_checkpoint_of_other_tensors_is_refused(interrupted: dict[str, Any], tmp_path: Path, change: str) -> None:
    """The Trainer itself would warn, and go on with what the model had before."""
    file = tmp_path / "out.partial" / "checkpoint-6" / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.bias"] = torch.zeros(7)
    if change == "lost":
        del tensors["classifier.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"classifier\.bias"):
        finetune(**interrupted, resume=True)


@pytest.mark.slow
def test_a_killed_process_is_resumed_from_the_shell(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    arguments = ["finetune", "--model", make_model(), "--task", "sst2", "--data", data, "--output", tmp_path / "out"]
    arguments += ["--batch-size", "2", "--epochs", "1", "--seq-len", "24", "--save-steps", "3", "--device", "cpu"]
    # The third step after a checkpoint never ends.
    stalled = (
        "import sys, time; from flashsvd.training.callbacks import StopWhenLost as C\n"
        "C.on_step_begin = lambda self, args, state, control, **_: time.sleep(120 if state.global_step == 5 else 0)\n"
        "from flashsvd.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    with running([sys.executable, "-c", stalled, *arguments], stderr=subprocess.PIPE) as process:
        until((tmp_path / "out.partial" / "checkpoint-3" / "trainer_state.json").is_file, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    from flashsvd.cli import main

    assert main([*map(str, arguments), "--resume"]) == 0
    record = json.loads((tmp_path / "out" / "flashsvd_training.json").read_text())["trainings"][-1]
    assert (record["steps"], record["epochs"]) == (24, 1.0)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_what_was_whole(make_model: MakeModel, tmp_path: Path) -> None:
    data = write_task_data(tmp_path / "data", SST2)
    # A limit on file size fails the write itself, as a full disk does: the optimiser's state is twice the weights.
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (120000, 120000)); "
        "from flashsvd.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["finetune", "--model", make_model(), "--task", "sst2", "--data", data, "--output", tmp_path / "out"]
    arguments += ["--epochs", "1", "--seq-len", "24", "--device", "cpu"]
    # Without coverage's own data file, which would meet the limit too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    result = subprocess.run(
        [sys.executable, "-c", limited, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 2, result.stderr
    assert f"error: cannot write {tmp_path / 'out.partial'}" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("out*"))


def test_of_two_runs_that_found_nothing_only_the_first_trains(tmp_path: Path) -> None:
    config = FinetuneConfig(model="x", task="sst2", output=str(tmp_path / "out"))
    first, second = Workplace.find(tmp_path / "out", config), Workplace.find(tmp_path / "out", config)
    with first.opened(config, "digest"):
        (first.directory / "checkpoint-10").mkdir()
        with pytest.raises(ConfigError, match="another process trains in"), second.opened(config, "digest"):
            pass
        assert (first.directory / "checkpoint-10").is_dir()
