"""Options of every kind of caller: a shell's text, a notebook's paths and NumPy numbers."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import MakeModel
from flashsvd import CompressConfig, EvalConfig, FinetuneConfig, ProfileConfig, run_compress
from flashsvd.common.device import BACKENDS
from flashsvd.errors import ConfigError
from flashsvd.kernels.launch import Backend
from flashsvd.training.config import MODES
from flashsvd.training.model import Mode


def test_paths_stand_for_their_names(make_model: MakeModel, tmp_path: Path) -> None:
    config = CompressConfig(model=make_model(), ratio=0.5, output=tmp_path / "out")
    assert (config.model, config.output) == (str(tmp_path / "dense"), str(tmp_path / "out"))
    assert run_compress(config).output == tmp_path / "out"
    evaluate = EvalConfig(checkpoint=tmp_path, task="sst2", data=tmp_path / "x.tsv")
    assert (evaluate.checkpoint, evaluate.data) == (str(tmp_path), str(tmp_path / "x.tsv"))


def test_numpy_numbers_stand_for_plain_ones() -> None:
    config = CompressConfig(model="x", rank=np.int64(8), seed=np.int32(3))
    assert (type(config.rank), config.rank, type(config.seed)) == (int, 8, int)
    assert CompressConfig(model="x", ratio=np.float32(0.5)).ratio == 0.5
    assert EvalConfig(checkpoint="x", task="sst2", batch_size=np.int64(4)).batch_size == 4


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1.5, "1", True, None])
def test_a_seed_that_torch_does_not_take_is_refused(seed: object) -> None:
    with pytest.raises(ConfigError, match=r"seed must be a whole number from 0 to 2\*\*63 - 1"):
        CompressConfig(model="x", rank=8, seed=seed)


def test_default_names_tell_the_layouts_apart() -> None:
    joint, per_head = (
        CompressConfig(model="x", rank=8, qkv=qkv).output_directory("fwsvd") for qkv in ("joint", "per-head")
    )
    assert (joint.name, per_head.name) == ("x_fwsvd_r8", "x_fwsvd_r8_per-head")


def test_backends_are_named_alike_for_users_and_kernels() -> None:
    assert typing.get_args(Backend) == BACKENDS
    for backend in BACKENDS:
        assert EvalConfig(checkpoint="x", task="sst2", backend=backend).backend == backend
    with pytest.raises(ConfigError, match="backend 'cuda' is not known; choose from plain, auto, torch, triton"):
        EvalConfig(checkpoint="x", task="sst2", backend="cuda")


def test_modes_of_training_are_named_alike_for_users_and_models() -> None:
    assert typing.get_args(Mode) == MODES


DIRECTORIES = [
    (CompressConfig, {"model": "x", "rank": 4}, "output"),
    (CompressConfig, {"model": "x", "rank": 4}, "save_stats"),
    (FinetuneConfig, {"model": "x", "task": "sst2"}, "output"),
    (ProfileConfig, {"checkpoint": "x"}, "output"),
]


@pytest.mark.parametrize(("kind", "others", "name"), DIRECTORIES)
def test_a_directory_is_not_called_as_a_file_is(kind: Any, others: dict[str, Any], name: str) -> None:
    for file in ("p.json", "results/P.PNG", Path("a.safetensors")):
        with pytest.raises(
            ConfigError, match=f"^{name} .* is the name of a file, and a directory is written; leave out"
        ):
            kind(**others, **{name: file})
    for directory in ("results", "model_p0.5", "v1.json/small", "."):
        assert getattr(kind(**others, **{name: directory}), name) == directory


def test_a_file_is_not_called_as_a_directory_is() -> None:
    with pytest.raises(ConfigError, match=r"^output results/ names a directory, and a file is written; name one in it"):
        EvalConfig(checkpoint="x", output="results/")


def test_every_option_that_writes_says_whether_it_writes_a_directory() -> None:
    for kind in (CompressConfig, FinetuneConfig, ProfileConfig, EvalConfig):
        for field in dataclasses.fields(kind):
            if field.metadata["path"] == "write":
                assert field.metadata["directory"] == field.metadata["help"].startswith("directory")
