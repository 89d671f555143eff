"""A file that git-lfs did not fetch, or that is cut short, is named, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import MakeModel
from flashsvd import CompressConfig, EvalConfig, run_compress, run_eval
from flashsvd.errors import FlashSVDError, ModelError, one_line

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "x.tsv").write_text("sentence\tlabel\na good movie\t1\n")
    return tmp_path / "x.tsv"


def evaluate(source: Path, data: Path) -> None:
    run_eval(EvalConfig(checkpoint=str(source), task="sst2", data=str(data), device="cpu"))


def pickled(source: Path) -> Path:
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    return source / "pytorch_model.bin"


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json", "tokenizer.json",
     "tokenizer_config.json"],
)  # fmt: skip
def test_a_pointer_of_git_lfs_is_named(make_model: MakeModel, tmp_path: Path, data: Path, name: str) -> None:
    source = make_model()
    if name == "pytorch_model.bin":
        pickled(source)
    if name == "model.safetensors.index.json":
        (source / "model.safetensors").unlink()
    (source / name).write_text(POINTER)
    for run in (
        lambda: run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(tmp_path / "out"))),
        lambda: evaluate(source, data),
    ):
        with pytest.raises(FlashSVDError) as refusal:
            run()
        assert f"{source / name} is a git-lfs pointer and not the file itself; run git lfs pull" in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_in_a_compressed_checkpoint_is_named(
    make_model: MakeModel, tmp_path: Path, data: Path, name: str
) -> None:
    run_compress(CompressConfig(model=str(make_model()), ratio=0.5, output=str(tmp_path / "out")))
    (tmp_path / "out" / name).write_text(POINTER)
    with pytest.raises(FlashSVDError, match=rf"{name} is a git-lfs pointer"):
        evaluate(tmp_path / "out", data)


@pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.jsonl", "x.parquet"])
def test_a_pointer_in_the_place_of_data_is_named(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(FlashSVDError, match=rf"{name} is a git-lfs pointer"):
        evaluate(make_model(), tmp_path / name)


@pytest.mark.parametrize("left", [0.0, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "pickled"])
def test_weights_that_are_cut_short_are_named(
    make_model: MakeModel, tmp_path: Path, data: Path, kind: str, left: float
) -> None:
    source = make_model()
    file = pickled(source) if kind == "pickled" else source / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content))])
    for run in (
        lambda: run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(tmp_path / "out"))),
        lambda: evaluate(source, data),
    ):
        with pytest.raises(ModelError) as refusal:
            run()
        assert str(file) in one_line(refusal.value)
        assert "it is truncated or damaged, " in one_line(refusal.value)


def test_an_adapter_says_what_it_is(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    (source / "adapter_config.json").write_text("{}")
    (source / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds an adapter \(adapter_config.json\); merge it into its model"):
        run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(tmp_path / "out")))
