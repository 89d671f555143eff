"""What is copied beside a checkpoint's weights, and what is never trusted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from conftest import MakeModel
from flashsvd import CompressConfig, EvalConfig, load_compressed, run_compress, run_eval
from flashsvd.errors import FlashSVDError, ModelError
from flashsvd.storage.companions import find_companions
from flashsvd.storage.model_files import HubUnreachableError, companion_file
from flashsvd.storage.verify import is_plain_name

POOLING = {"pooling_mode_cls_token": True}


def make_sentence_encoder(source: Path, *modules: tuple[str, str]) -> None:
    """Put a `modules.json` and a pooling beside a model, as sentence-transformers does."""
    named = [("Transformer", ""), ("Pooling", "1_Pooling"), *modules]
    entries = [{"type": f"sentence_transformers.models.{kind}", "path": folder} for kind, folder in named]
    (source / "modules.json").write_text(json.dumps(entries))
    (source / "1_Pooling").mkdir(exist_ok=True)
    (source / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))


def compress(source: Path | str, output: Path, **options: Any) -> Path:
    run_compress(CompressConfig(model=source, ratio=0.5, output=output, **options))
    return output


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0b", "../a", "C:a", 5, None])
def test_a_path_is_no_plain_name(name: object) -> None:
    assert not is_plain_name(name)


@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooling", "...", "a..b"])
def test_a_plain_name_is_one(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize("folder", ["..", ".", "../elsewhere", "/etc", "a/../../b"])
def test_a_module_outside_the_model_is_refused_before_anything_is_copied(
    make_model: MakeModel, tmp_path: Path, folder: str
) -> None:
    source = make_model("bert", "base")
    (tmp_path / "precious.json").write_text("mine")
    make_sentence_encoder(source, ("Normalize", folder))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ModelError, match="lies outside the model; do not trust it"):
        compress(source, tmp_path / "deep" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_modules_are_copied_by_kind_of_file_and_pickles_are_not(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_model("bert", "base")
    make_sentence_encoder(source)
    for name in ("evil.pkl", "pytorch_model.bin", "run.py"):
        (source / "1_Pooling" / name).write_text("x")
    output = compress(source, tmp_path / "out")
    assert [file.name for file in (output / "1_Pooling").iterdir()] == ["config.json"]
    assert any("evil.pkl is a pickle and is not copied" in record.message for record in caplog.records)


def test_a_module_whose_weights_are_pickled_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("bert", "base")
    make_sentence_encoder(source, ("Dense", "2_Dense"))
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text("{}")
    (source / "2_Dense" / "pytorch_model.bin").write_text("x")
    with pytest.raises(ModelError, match=r"has no 2_Dense/model\.safetensors for its Dense module"):
        compress(source, tmp_path / "out")
    shutil.copy(source / "model.safetensors", source / "2_Dense" / "model.safetensors")
    assert (compress(source, tmp_path / "out") / "2_Dense" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "1_Pooling/extra.txt"])
def test_links_out_of_the_model_are_refused(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    source = make_model("bert", "base")
    make_sentence_encoder(source)
    (tmp_path / "secret").write_text("{}")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"is a link to .*secret, outside the model"):
        compress(source, tmp_path / "out")


def test_a_model_without_a_tokenizer_is_compressed_with_a_warning(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_model()
    for file in source.glob("tokenizer*"):
        file.unlink()
    compress(source, tmp_path / "out")
    assert any("no tokenizer files" in record.message for record in caplog.records)


def test_pooling_that_no_module_names_is_pointed_out(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_model("bert", "base")
    (source / "modules.json").write_text(json.dumps([{"type": "models.Transformer", "path": ""}]))
    (tmp_path / "x.tsv").write_text("sentence1\tsentence2\tlabel\na man\ta dog\t3\na film\ta movie\t4\n")
    run_eval(EvalConfig(checkpoint=str(source), task="similarity", data=str(tmp_path / "x.tsv"), seq_len=16))
    assert any("names no pooling" in record.message for record in caplog.records)


class FakeHub:
    """A hub cache as the client lays it out, of one model, with nobody behind it."""

    name = "org/encoder"

    def __init__(self, cache: Path) -> None:
        self.root = cache / "models--org--encoder"
        (self.root / "refs").mkdir(parents=True)
        (self.root / "refs" / "main").write_text("c0ffee")
        (self.root / "blobs").mkdir()

    def put(self, file: Path, name: str) -> None:
        blob = self.root / "blobs" / name.replace("/", "-")
        shutil.copy(file, blob)
        link = self.root / "snapshots" / "c0ffee" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))

    def put_all(self, directory: Path) -> None:
        for file in directory.rglob("*"):
            if file.is_file():
                self.put(file, file.relative_to(directory).as_posix())

    def record_absent(self, name: str) -> None:
        file = self.root / ".no_exist" / "c0ffee" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # The client bound its default when it was imported.
    import huggingface_hub.file_download as client

    monkeypatch.setattr(client.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return FakeHub(tmp_path / "cache")


def test_absent_and_unknown_are_told_apart(hub: FakeHub, make_model: MakeModel) -> None:
    hub.put(make_model() / "config.json", "config.json")
    hub.record_absent("vocab.txt")
    assert companion_file(hub.name, "config.json") is not None
    assert companion_file(hub.name, "vocab.txt") is None
    with pytest.raises(HubUnreachableError, match=r"cannot be asked whether org/encoder has modules\.json"):
        companion_file(hub.name, "modules.json")


def test_a_hub_model_is_compressed_from_the_cache_alone(
    hub: FakeHub, make_model: MakeModel, tmp_path: Path, tokens: torch.Tensor
) -> None:
    source = make_model("bert", "base")
    make_sentence_encoder(source, ("Normalize", "2_Normalize"))
    hub.put_all(source)
    from_hub = compress(hub.name, tmp_path / "from-hub", task="similarity")
    local = compress(source, tmp_path / "local", task="similarity")
    assert {f.name for f in from_hub.rglob("*")} == {f.name for f in local.rglob("*")}
    assert not any(file.is_symlink() for file in from_hub.rglob("*"))
    with torch.inference_mode():
        assert torch.equal(load_compressed(from_hub)(tokens)[0], load_compressed(local)(tokens)[0])


def test_a_snapshot_in_the_cache_is_a_directory_like_any_other(
    hub: FakeHub, make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model("bert", "base")
    make_sentence_encoder(source)
    hub.put_all(source)
    output = compress(hub.root / "snapshots" / "c0ffee", tmp_path / "out")
    assert (output / "1_Pooling" / "config.json").is_file()


def test_a_sentence_encoder_whose_pooling_cannot_be_looked_up_is_refused_before_it_is_factored(
    hub: FakeHub, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put_all(make_model("bert", "base"))
    monkeypatch.setattr("flashsvd.compression.run.factor_model", None)
    with pytest.raises(ModelError, match=r"cannot be asked whether org/encoder has modules\.json"):
        compress(hub.name, tmp_path / "out", task="similarity")
    assert not (tmp_path / "out").exists()


def test_other_hub_models_are_compressed_with_a_warning(
    hub: FakeHub, make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.put_all(make_model())
    output = compress(hub.name, tmp_path / "out", task="sst2")
    assert (output / "tokenizer.json").is_file()
    assert any("cannot be asked for modules.json" in record.message for record in caplog.records)


def test_a_hub_module_without_weights_is_refused(hub: FakeHub, make_model: MakeModel) -> None:
    source = make_model("bert", "base")
    make_sentence_encoder(source, ("Dense", "2_Dense"))
    hub.put_all(source)
    hub.record_absent("2_Dense/config.json")
    hub.record_absent("2_Dense/model.safetensors")
    with pytest.raises(FlashSVDError, match="Dense module"):
        find_companions(hub.name)


def test_a_compressed_hub_checkpoint_is_evaluated_as_one(hub: FakeHub, make_model: MakeModel, tmp_path: Path) -> None:
    hub.put_all(compress(make_model(), tmp_path / "out", task="sst2"))
    (tmp_path / "x.tsv").write_text("sentence\tlabel\na good movie\t1\n")
    result = run_eval(EvalConfig(checkpoint=hub.name, task="sst2", data=str(tmp_path / "x.tsv"), seq_len=16))
    assert (result.method, result.ratio) == ("standard", 0.5)
