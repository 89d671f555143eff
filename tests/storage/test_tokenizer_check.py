"""A tokenizer of which a file is lost or damaged is refused by name; transformers would make another of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from damage import KINDS, replace

from conftest import VOCABULARY, MakeModel
from flashsvd import CompressConfig, run_compress
from flashsvd.errors import ModelError
from flashsvd.models.loading import load_tokenizer
from flashsvd.storage.companions import find_companions

FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_file_must_be_there_and_be_a_file(make_model: MakeModel, name: str, kind: str) -> None:
    source = make_model()
    replace(source / name, kind)
    with pytest.raises(ModelError, match=rf"{name}|cannot be read") as refused:
        load_tokenizer(str(source))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "5", "{", '{"a": NaN}', "[" * 10_000, '{"a": "\\ud800"}'])
def test_settings_must_be_json_objects(make_model: MakeModel, name: str, text: str) -> None:
    source = make_model()
    (source / name).write_text(text)
    with pytest.raises(ModelError, match=rf"{name} cannot be read"):
        load_tokenizer(str(source))


@pytest.mark.parametrize("vocabulary", ["vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_a_directory_in_the_place_of_a_vocabulary_is_refused(make_model: MakeModel, vocabulary: str) -> None:
    source = make_model()
    (source / vocabulary).mkdir()
    with pytest.raises(ModelError, match=rf"{vocabulary} cannot be read \(it is a directory, not a file\)"):
        load_tokenizer(str(source))


def test_half_a_vocabulary_is_none(make_model: MakeModel) -> None:
    source = make_model()
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no tokenizer\.json, nor a vocabulary in its place"):
        load_tokenizer(str(source))


def test_an_old_vocabulary_of_lines_is_enough(make_model: MakeModel) -> None:
    source = make_model()
    words = load_tokenizer(str(source))("a good movie")["input_ids"]
    (source / "tokenizer.json").unlink()
    (source / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    assert load_tokenizer(str(source))("a good movie")["input_ids"] == words
    # As the first models were saved.
    (source / "tokenizer_config.json").unlink()
    assert load_tokenizer(str(source))("a good movie")["input_ids"] == words


def test_a_tokenizer_of_bytes_needs_no_vocabulary(make_model: MakeModel) -> None:
    source = make_model()
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert len(load_tokenizer(str(source))("movie")["input_ids"]) > len("movie")


@pytest.mark.parametrize("text", ["", "\n".join(VOCABULARY[:5]) + "\n"])
def test_a_tokenizer_without_words_is_refused(make_model: MakeModel, text: str) -> None:
    source = make_model()
    (source / "tokenizer.json").unlink()
    (source / "vocab.txt").write_text(text)
    with pytest.raises(ModelError, match="has no words"):
        load_tokenizer(str(source))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.txt"])
def test_a_checkpoint_knows_what_it_was_saved_with(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    source, out = make_model(), tmp_path / "out"
    (source / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(out)))
    caplog.clear()
    load_tokenizer(str(out))
    assert not caplog.records
    (out / name).write_text((out / name).read_text() + "\n")
    load_tokenizer(str(out))
    assert [record.message for record in caplog.records] == [
        f"{out / name} is not the file that was saved, so that texts may be read otherwise"
    ]
    (out / name).unlink()
    with pytest.raises(ModelError, match=f"has lost {name}; save the base model's tokenizer into it"):
        load_tokenizer(str(out))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"gone", "empty"}))
def test_what_cannot_be_copied_is_not_left_out_in_silence(make_model: MakeModel, kind: str) -> None:
    source = make_model()
    replace(source / "tokenizer.json", kind)
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        find_companions(str(source))


def test_a_file_of_the_hubs_cache_is_a_link(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    for name in FILES:
        (source / name).rename(tmp_path / name)
        (source / name).symlink_to(tmp_path / name)
    assert "good" in load_tokenizer(str(source)).get_vocab()
