"""A call leaves the process as it was, and does the same whatever state, mode or thread it is called in."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import MakeModel, build_model, build_tokenizer
from flashsvd import (
    CompressConfig,
    EvalConfig,
    FinetuneConfig,
    ProfileConfig,
    export_dense,
    load_compressed,
    optimize,
    run_compress,
    run_eval,
    run_finetune,
    run_profile,
)
from flashsvd.cli import main
from flashsvd.common.making_modules import making_modules
from flashsvd.models.loading import seeded
from training_data import SST2, write_task_data, write_text


@dataclass(frozen=True)
class Material:
    """A headless model, a classifier, a compressed classifier, and data for them."""

    root: Path

    def compress(self, output: Path, method: str = "standard", model: str = "headless", **options: Any) -> None:
        defaults: dict[str, Any] = {"calib_data": self.root / "data", "calib_samples": 8, "calib_seq_len": 16}
        options = defaults | {"task": "sst2", "ratio": 0.5, "device": "cpu"} | options
        run_compress(CompressConfig(model=self.root / model, method=method, output=output, **options))

    def finetune(self, output: Path, **options: Any) -> None:
        defaults = {"task": "sst2", "data": self.root / "data", "epochs": 1, "batch_size": 24, "device": "cpu"}
        run_finetune(FinetuneConfig(**({"model": self.root / "headless", "output": output} | defaults | options)))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    made = Material(tmp_path_factory.mktemp("material"))
    for name, head in (("headless", "base"), ("dense", "classifier"), ("masked", "masked-lm")):
        build_model("bert", head).save_pretrained(made.root / name)
        build_tokenizer().save_pretrained(made.root / name)
    write_task_data(made.root / "data", SST2)
    write_text(made.root / "text", train=20, validation=8)
    made.compress(made.root / "small", model="dense")
    return made


Door = Callable[[Material, Path], Any]


def evaluation(made: Material, **options: Any) -> EvalConfig:
    return EvalConfig(checkpoint=made.root / "small", task="sst2", data=made.root / "data", device="cpu", **options)


DOORS: dict[str, Door] = {
    **{
        # mypy cannot infer a lambda with a default.
        f"compress {method}": lambda made, out, method=method: made.compress(out, method)  # type: ignore[misc]
        for method in ("standard", "fwsvd", "drone", "asvd", "adasvd")
    },
    "compress per head": lambda made, out: made.compress(out, qkv="per-head"),
    "compress asvd, searching": lambda made, out: made.compress(out, "asvd", asvd_search=True),
    "compress drone, by the loss": lambda made, out: made.compress(out, "drone", rank_search="loss"),
    "eval": lambda made, out: run_eval(evaluation(made)),
    "eval fused": lambda made, out: run_eval(evaluation(made, backend="torch")),
    "finetune": lambda made, out: made.finetune(out),
    "finetune weighted": lambda made, out: made.finetune(out, class_weights="balanced"),
    "finetune masked": lambda made, out: made.finetune(
        out, model=made.root / "masked", mode="mlm", task=None, data=made.root / "text"
    ),
    "finetune distilled": lambda made, out: made.finetune(out, teacher=str(made.root / "dense")),
    "profile": lambda made, out: run_profile(
        ProfileConfig(made.root / "small", task="sst2", data=made.root / "data", device="cpu",
                      variants="dense,micro-batches,low-rank,fused")
    ),
    "load_compressed": lambda made, out: load_compressed(made.root / "small"),
    "load_compressed optimized": lambda made, out: load_compressed(made.root / "small", optimize=True),
    "export_dense": lambda made, out: export_dense(made.root / "small", out),
    "optimize": lambda made, out: optimize(load_compressed(made.root / "small")),
    "the shell": lambda made, out: main(
        ["compress", "--model", str(made.root / "headless"), "--task", "sst2", "--rank", "4", "--output", str(out)]
    ),
    "the shell refusing": lambda made, out: main(["info", str(out)]),
    "the shell printing JSON": lambda made, out: main(["eval", "--checkpoint", str(made.root / "small"), "--task",
                                                       "sst2", "--data", str(made.root / "data"), "--json"]),
}  # fmt: skip


@contextlib.contextmanager
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "as usual": contextlib.nullcontext,
    "float64": float64,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def state() -> dict[str, Any]:
    log = logging.getLogger("flashsvd")
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "SIGTERM": signal.getsignal(signal.SIGTERM),
        "SIGINT": signal.getsignal(signal.SIGINT),
        "handlers": list(log.handlers),
        "level": log.level,
        "propagates": log.propagate,
        "root": (list(logging.getLogger().handlers), logging.getLogger().level),
        "threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "directory": Path.cwd(),
    }


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors") if (directory / "model.safetensors").is_file() else {}


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_a_call_leaves_no_trace_and_makes_the_same_in_every_mode(name: str, material: Material, tmp_path: Path) -> None:
    # What libraries set when they are first imported is theirs.
    DOORS[name](material, tmp_path / "first")
    expected = weights(tmp_path / "first")
    for mode, entered in MODES.items():
        with entered():
            # In mid-stream, so that a seed shows.
            torch.rand(3), random.random(), np.random.rand()
            before = state()
            DOORS[name](material, tmp_path / mode)
            after = state()
        assert [key for key in before if before[key] != after[key]] == [], mode
        made = weights(tmp_path / mode)
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[key], expected[key]) for key in expected), mode


def test_a_call_that_fails_leaves_no_trace_either(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        torch.rand(3), random.random(), np.random.rand()
        raise KeyboardInterrupt

    monkeypatch.setattr("flashsvd.training.run.TrainingJob._run", interrupted)
    before = state()
    with pytest.raises(KeyboardInterrupt):
        material.finetune(tmp_path / "out")
    assert main(["finetune", "--model", str(material.root / "headless"), "--task", "sst2", "--data",
                 str(material.root / "data"), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 130  # fmt: skip
    after = state()
    assert [key for key in before if before[key] != after[key]] == []


@pytest.mark.slow
def test_threads_make_what_one_alone_makes(material: Material, tmp_path: Path) -> None:
    """Six compressions of a headless model, and two that draw while they search, with trainings among them."""
    jobs: dict[str, Door] = {f"{number}": DOORS["compress standard"] for number in range(6)}
    jobs |= {f"ada {number}": DOORS["compress adasvd"] for number in range(2)}
    jobs |= {f"train {number}": DOORS["finetune"] for number in range(2)}
    before = state()
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(lambda name: jobs[name](material, tmp_path / name), jobs))
    after = state()
    assert [key for key in before if before[key] != after[key]] == []
    for name in ("0", "ada 0", "train 0"):
        jobs[name](material, tmp_path / f"{name} alone")
    for name in jobs:
        kind = {"a": "ada 0", "t": "train 0"}.get(name[0], "0")
        alone, made = weights(tmp_path / f"{kind} alone"), weights(tmp_path / name)
        assert all(torch.equal(made[key], alone[key]) for key in alone), name


def draw() -> list[torch.Tensor]:
    model = torch.nn.Linear(5, 3)
    drawn = [model.weight.detach(), model.bias.detach(), torch.randn(3), torch.rand(2), torch.empty(4).uniform_(-1, 1)]
    for fill in ("xavier_uniform_", "kaiming_normal_", "trunc_normal_", "orthogonal_", "normal_"):
        drawn.append(getattr(torch.nn.init, fill)(torch.empty(4, 4)))
    return [
        *drawn,
        torch.randint(9, (3,)),
        torch.randperm(5),
        torch.empty(20).bernoulli_(0.5),
        torch.normal(0.0, torch.ones(3)),
    ]


def test_a_seed_draws_what_it_would_draw_from_the_generator_of_all_threads(make_model: MakeModel) -> None:
    before = torch.get_rng_state()
    with seeded(5):
        ours = draw()
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert all(torch.equal(one, other) for one, other in zip(ours, draw(), strict=True))


def test_a_seed_is_its_threads_own() -> None:
    meanwhile: list[torch.Tensor] = []
    with seeded(5):
        first = torch.rand(2)
        other = threading.Thread(target=lambda: meanwhile.append(torch.rand(2)))
        other.start()
        other.join()
        ours = torch.cat([first, torch.rand(2)])
    with seeded(5):
        assert torch.equal(ours, torch.cat([torch.rand(2), torch.rand(2)]))
    assert len(meanwhile) == 1


def test_what_has_no_storage_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with making_modules(generator), torch.device("meta"):
        torch.nn.Linear(3, 3)
        torch.randn(3)
    assert torch.equal(generator.get_state(), before)


def test_commands_in_threads_show_their_log_until_the_last_ends(
    material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def compress(number: int) -> int:
        return main(["compress", "--model", str(material.root / "dense"), "--rank", "4", "--device", "cpu",
                     "--output", str(tmp_path / str(number))])  # fmt: skip

    before = state()
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(compress, range(3))) == [0, 0, 0]
    assert state() == before
    printed = capsys.readouterr().out
    assert [printed.count(f"saving to {tmp_path / str(number)}\n") for number in range(3)] == [1, 1, 1]
