"""An interrupted compression is gone on with from the layers that are done, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch

from conftest import build_decoder, build_tokenizer
from flashsvd import CompressConfig, CompressReport, FlashSVDError, load_compressed, run_compress
from flashsvd.compression.run import CompressionJob
from flashsvd.compression.walks import states
from flashsvd.compression.walks.pieces import Pieces
from flashsvd.errors import CheckpointError, ModelError
from flashsvd.methods import adasvd
from flashsvd.storage.unfinished import TERMS_FILE
from training_data import write_text

LAYERS = 3


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "dense"
    llama().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def llama() -> Any:
    return build_decoder("llama", num_hidden_layers=LAYERS)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text") / "train.txt"


def compress(source: Path, output: Path, **options: Any) -> CompressReport:
    defaults = {"ratio": 0.5, "device": "cpu", "calib_samples": 12, "calib_batch_size": 4, "calib_seq_len": 16}
    return run_compress(CompressConfig(model=str(source), output=str(output), **(defaults | options)))


def interrupt(
    monkeypatch: pytest.MonkeyPatch,
    source: Path,
    output: Path,
    layer: int,
    error: BaseException | None = None,
    raises: type[BaseException] = KeyboardInterrupt,
    says: str | None = None,
    **options: Any,
) -> None:
    """A run that ends when it is about to write a layer; LAYERS stands for what lies outside of the layers."""
    write, complete = Pieces._write, Pieces.complete

    def writes(self: Pieces, done: Any, path: str) -> Any:
        if done.index == layer:
            raise error or KeyboardInterrupt
        return write(self, done, path)

    def completes(self: Pieces, names: Any) -> Any:
        if layer == LAYERS:
            raise error or KeyboardInterrupt
        return complete(self, names)

    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "_write", writes)
        patch.setattr(Pieces, "complete", completes)
        with pytest.raises(raises, match=says):
            compress(source, output, **options)


HOW: dict[str, dict[str, Any]] = {
    "standard": {"method": "standard"},
    "drone": {"method": "drone"},
    "integers": {"method": "asvd", "factors": "int8", "qkv": "per-head"},
    "refined": {"method": "drone", "refine": 3},
    "compressed": {"method": "drone", "calib_inputs": "compressed", "refine": 2, "dtype": "bfloat16"},
    "gradients": {"method": "fwsvd"},
    "searched": {"method": "drone", "rank_search": "loss", "rank_steps": "fine"},
    "learned": {"method": "adasvd"},
}


@pytest.mark.parametrize("memory", [0, 1 << 28], ids=["states in files", "states in memory"])
@pytest.mark.parametrize("how", HOW)
def test_it_ends_as_a_run_that_was_never_interrupted(
    source: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, how: str, memory: int
) -> None:
    monkeypatch.setattr(adasvd, "STEPS", 2)
    monkeypatch.setattr(states, "IN_MEMORY", memory)
    options = HOW[how] | {"calib_data": str(text)}
    whole = compress(source, tmp_path / "whole", **options)
    for layer in range(1, LAYERS + 1):
        output = tmp_path / f"interrupted-{layer}"
        interrupt(monkeypatch, source, output, layer, **options)
        assert not output.exists()
        report = compress(source, output, resume=True, **options)
        assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
        assert (report.matrices, report.refinements) == (whole.matrices, whole.refinements)
        assert report.info.module_ranks == whole.info.module_ranks
        assert report.info.parameters == whole.info.parameters
        load_compressed(output, verify=True)
        assert not output.with_name(f"{output.name}.partial").exists()


def test_layers_that_are_done_are_not_done_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, source, tmp_path / "out", 2)
    done: list[int] = []
    write = Pieces._write
    monkeypatch.setattr(Pieces, "_write", lambda self, one, path: (done.append(one.index), write(self, one, path))[1])
    compress(source, tmp_path / "out", resume=True)
    assert done == [2]


def test_it_can_be_interrupted_again(source: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"method": "drone", "calib_data": str(text)}
    compress(source, tmp_path / "whole", **options)
    interrupt(monkeypatch, source, tmp_path / "out", 1, **options)
    interrupt(monkeypatch, source, tmp_path / "out", 2, resume=True, **options)
    compress(source, tmp_path / "out", resume=True, **options)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def partial_of(tmp_path: Path) -> Path:
    return tmp_path / "out.partial"


def test_an_interrupted_run_is_neither_forgotten_nor_thrown_away_unasked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(monkeypatch, source, tmp_path / "out", 1)
    assert f"what has been done is kept in {partial_of(tmp_path)}; --resume goes on from there" in caplog.text
    with pytest.raises(FlashSVDError, match="holds an interrupted run; pass resume=True to continue it, or overwrite"):
        compress(source, tmp_path / "out")
    compress(source, tmp_path / "out", overwrite=True)
    assert f"{partial_of(tmp_path)} held an interrupted run, which is thrown away" in caplog.text
    assert not partial_of(tmp_path).exists()


def test_before_a_layer_is_done_nothing_is_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, source, tmp_path / "out", 0)
    assert not partial_of(tmp_path).exists()
    with pytest.raises(FlashSVDError, match=r"there is nothing to resume: .*out\.partial holds no finished layer"):
        compress(source, tmp_path / "out", resume=True)


def test_a_full_disk_leaves_what_is_done(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(28, "No space left on device")
    says = r"cannot write .*out.partial: No space left on device"
    interrupt(monkeypatch, source, tmp_path / "out", 1, error=full, raises=CheckpointError, says=says)
    assert (partial_of(tmp_path) / "layer-00000.json").is_file()


def test_an_error_that_would_come_again_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, source, tmp_path / "out", 1, error=ModelError("damaged"), raises=ModelError)
    assert not partial_of(tmp_path).exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ratio": 0.6}, r"ratio is 0\.6, but the run to resume had 0\.5; give it the same options"),
        ({"method": "asvd"}, "method is 'asvd', but the run to resume had 'drone'"),
        ({"factors": "int8"}, "factors is 'int8', but the run to resume had 'float'"),
        ({"seed": 3}, "seed is 3, but the run to resume had 0"),
    ],
    ids=str,
)
def test_other_options_are_refused(
    source: Path,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    says: str,
) -> None:
    options = {"method": "drone", "calib_data": str(text)}
    interrupt(monkeypatch, source, tmp_path / "out", 1, **options)
    with pytest.raises(FlashSVDError, match=says):
        compress(source, tmp_path / "out", resume=True, **(options | changes))
    compress(source, tmp_path / "out", resume=True, state_dict=True, **options)


def test_other_weights_data_and_libraries_are_refused(
    source: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "drone", "calib_data": str(text)}
    interrupt(monkeypatch, source, tmp_path / "out", 1, **options)
    file, words = partial_of(tmp_path) / TERMS_FILE, text.read_text()
    text.write_text(words[::-1])
    with pytest.raises(FlashSVDError, match="the calibration data is not that of the run to resume"):
        compress(source, tmp_path / "out", resume=True, **options)
    text.write_text(words)

    terms = json.loads(file.read_text())
    file.write_text(json.dumps(terms | {"versions": terms["versions"] | {"torch": "2.0"}}))
    with pytest.raises(FlashSVDError, match=r"torch is .*, but the run to resume had 2\.0; install that, or remove"):
        compress(source, tmp_path / "out", resume=True, **options)
    file.write_text(json.dumps(terms))

    weights = (source / "model.safetensors").read_bytes()
    model = llama()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(source)
    with pytest.raises(FlashSVDError, match="the model's weights are not those of the run to resume"):
        compress(source, tmp_path / "out", resume=True, **options)
    (source / "model.safetensors").write_bytes(weights)
    compress(source, tmp_path / "out", resume=True, **options)


def test_another_config_and_other_ranks_are_refused(
    source: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = {"method": "drone", "rank_search": "loss", "calib_data": str(text)}
    ranks = compress(source, tmp_path / "first", **searched).output / "ranks.json"
    options = {"ratio": None, "ranks_json": str(ranks)}
    interrupt(monkeypatch, source, tmp_path / "out", 1, **options)
    for file, name in ((ranks, "rank file"), (source / "config.json", "model's config")):
        before = file.read_text()
        file.write_text(before.replace(": 1", ": 2"))
        assert file.read_text() != before
        with pytest.raises(FlashSVDError, match=rf"the {name} is not that of the run to resume; restore it, or remove"):
            compress(source, tmp_path / "out", resume=True, **options)
        file.write_text(before)
    compress(source, tmp_path / "out", resume=True, **options)


def test_what_another_process_began_meanwhile_is_not_gone_on_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the directory and its lock a large model is loaded."""
    options = {"model": str(source), "ratio": 0.5, "device": "cpu", "output": str(tmp_path / "out")}
    interrupt(monkeypatch, source, tmp_path / "out", 1)
    job = CompressionJob.prepare(
        CompressConfig(resume=True, calib_samples=12, calib_batch_size=4, calib_seq_len=16, **options)
    )
    interrupt(monkeypatch, source, tmp_path / "out", 2, ratio=0.3, overwrite=True)
    with pytest.raises(FlashSVDError, match=r"ratio is 0\.5, but the run to resume had 0\.3"):
        job.run()


def test_a_piece_is_written_under_a_name_that_is_known_as_ours(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a writer that is killed leaves behind does not stand in the way of the run that resumes."""
    save, seen = safetensors.torch.save_file, list[bool]()

    def saves(tensors: Any, file: Path, **others: Any) -> None:
        (Path(file).parent / ".tmpAbC123").touch()
        save(tensors, file, **others)
        directory = partial_of(tmp_path)
        if directory.is_dir():
            seen.append(any(path.name.startswith(".tmp") for path in directory.iterdir()))

    monkeypatch.setattr(safetensors.torch, "save_file", saves)
    compress(source, tmp_path / "out")
    assert seen
    assert not any(seen)


def test_values_too_large_for_the_dtype_are_found_before_the_first_layer(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 1e6
    model.save_pretrained(source)
    monkeypatch.setattr(Pieces, "_write", Mock(side_effect=AssertionError("a layer was done")))
    with pytest.raises(FlashSVDError, match=r"lm_head\.weight has values too large for float16"):
        compress(source, tmp_path / "out", dtype="float16")


def test_what_is_no_working_directory_is_left_alone(source: Path, tmp_path: Path) -> None:
    partial_of(tmp_path).mkdir()
    (partial_of(tmp_path) / "diary.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(FlashSVDError, match="is no working directory of ours, but its name is needed"):
            compress(source, tmp_path / "out", resume=resume, overwrite=True)
    assert (partial_of(tmp_path) / "diary.txt").read_text() == "mine"


def test_a_damaged_record_is_refused_by_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, source, tmp_path / "out", 2)
    (partial_of(tmp_path) / "layer-00001.json").write_text("{")
    with pytest.raises(FlashSVDError, match=r"layer-00001.json cannot be read .* remove .*out.partial to start anew"):
        compress(source, tmp_path / "out", resume=True)
