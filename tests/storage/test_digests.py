"""Digests: a byte of a weight or tokenizer file that is another one than was saved is found when asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flashsvd import load_compressed, read_info, save_compressed
from flashsvd.cli import main
from flashsvd.errors import CheckpointError
from flashsvd.storage.metadata import CompressionInfo

OLD = Path(__file__).parent / "checkpoints" / "bert"


def test_every_weight_and_tokenizer_file_has_one(checkpoint: Path) -> None:
    names = {file.name for file in checkpoint.iterdir()}
    described = {"config.json", "compression_info.json"}
    assert set(read_info(checkpoint).compression.digests) == names - described
    assert "model.safetensors" in names
    assert "tokenizer.json" in names


@pytest.mark.parametrize("place", ["start", "middle", "end"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_changed_byte_is_found_wherever_it_is(checkpoint: Path, name: str, place: str) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[{"start": 0, "middle": len(content) // 2, "end": -1}[place]] ^= 1
    (checkpoint / name).write_bytes(content)
    for verify in (lambda: load_compressed(checkpoint, verify=True), lambda: read_info(checkpoint, verify_files=True)):
        with pytest.raises(CheckpointError, match=rf"{name} is not the file that was saved; copy it again"):
            verify()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        read_info(checkpoint, verify_files=True)


def test_an_edited_model_card_is_no_damage(checkpoint: Path) -> None:
    with (checkpoint / "README.md").open("a") as card:
        card.write("Mine.")
    read_info(checkpoint, verify_files=True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors.index.json", "x.safetensors", "vocab.txt"])
def test_a_file_that_would_be_read_beside_those_that_were_saved_is_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name} is not one of the files that were saved; remove it"):
        load_compressed(checkpoint, verify=True)


def test_so_are_weights_that_the_config_names(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(CheckpointError, match=r"names weights of its own, 'other.safetensors'"):
        load_compressed(checkpoint, verify=True)


def test_the_index_of_shards_has_one_too(checkpoint: Path, tmp_path: Path) -> None:
    model, info = load_compressed(checkpoint), read_info(checkpoint).compression
    save_compressed(model, tmp_path / "sharded", info, max_shard_size="20KB")
    load_compressed(tmp_path / "sharded", verify=True)
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"index\.json is not the file that was saved"):
        load_compressed(tmp_path / "sharded", verify=True)


def test_the_shell_says_what_it_found(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(checkpoint), "--verify"]) == 0
    count = len(read_info(checkpoint).compression.digests)
    assert f"verified: {count} files are as they were saved" in capsys.readouterr().out
    with (checkpoint / "model.safetensors").open("ab") as weights:
        weights.write(b"x")
    assert main(["info", str(checkpoint), "--verify"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flashsvd info: error: ")
    assert error.count("\n") == 1


def test_a_checkpoint_without_digests_says_that_nothing_can_be_verified(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    load_compressed(tmp_path / "old")
    with pytest.raises(CheckpointError, match="records no digests of its files, so nothing can be verified"):
        load_compressed(tmp_path / "old", verify=True)


@pytest.mark.parametrize("name", ["../other", "/etc/hostname", "a/../../b", ""])
def test_a_digest_of_a_file_outside_is_refused(checkpoint: Path, name: str) -> None:
    file = checkpoint / "compression_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"digests": {name: "0" * 64}}))
    with pytest.raises(CheckpointError, match="lies outside it; do not trust it"):
        read_info(checkpoint, verify_files=True)


@pytest.mark.parametrize("digests", [None, [], {"model.safetensors": 1}, "x"])
def test_digests_that_cannot_be_are_refused(checkpoint: Path, digests: object) -> None:
    file = checkpoint / "compression_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"digests": digests}))
    with pytest.raises(CheckpointError, match="has digests"):
        CompressionInfo.read(checkpoint)
