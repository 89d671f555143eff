"""All files that a tokenizer or a processor may have come along, by what transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeModel, build_tokenizer
from flashsvd import CompressConfig, export_dense, run_compress
from flashsvd.errors import CheckpointError, ModelError
from flashsvd.models.loading import load_tokenizer
from flashsvd.storage.companions import find_companions

TEMPLATES = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}", "rag": "R"}


def compress(source: Path, output: Path, **options: Any) -> Path:
    run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(output), **options))
    return output


@pytest.mark.parametrize("templates", [TEMPLATES, {"default": "D"}, "only one"], ids=["several", "default", "one"])
def test_chat_templates_come_along(make_model: MakeModel, tmp_path: Path, templates: Any) -> None:
    source = make_model("llama", "causal-lm")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(source)
    small = compress(source, tmp_path / "small")
    export_dense(small, tmp_path / "dense-again")
    kept = load_tokenizer(str(source)).chat_template
    assert [load_tokenizer(str(place)).chat_template for place in (small, tmp_path / "dense-again")] == [kept, kept]
    # And what was written is known as ours: it may be replaced.
    compress(source, small, overwrite=True)
    export_dense(small, tmp_path / "dense-again", overwrite=True)


@pytest.mark.parametrize(
    ("name", "tokenizer_class"),
    [
        ("preprocessor_config.json", None),
        ("processor_config.json", None),
        ("video_preprocessor_config.json", None),
        ("chat_template.json", None),
        ("added_tokens.json", None),
        ("vocab.txt", None),
        ("merges.txt", None),
        ("sentencepiece.bpe.model", None),
        ("tokenizer.model", None),
        ("spiece.model", None),
        ("spm.model", "DebertaV2Tokenizer"),
        ("spm.model", "DebertaV2TokenizerFast"),
        ("tokenizer.4.0.0.json", "BertTokenizer"),
    ],
)
def test_every_file_that_the_library_knows_comes_along(
    make_model: MakeModel, tmp_path: Path, name: str, tokenizer_class: str | None
) -> None:
    source = make_model()
    (source / name).write_text("{}")
    if tokenizer_class is not None:
        config = {
            "tokenizer_class": tokenizer_class,
            "fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.0.json"],
        }
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    assert name in find_companions(str(source)).files


def test_what_the_library_writes_comes_along_and_nothing_else(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATES
    written = {Path(name).relative_to(source).as_posix() for name in tokenizer.save_pretrained(source)}
    for name in ("README.md", "notes.json", "run.py", "weights.pkl", "additional_chat_templates/notes.txt"):
        (source / name).write_text("x")
    assert set(find_companions(str(source)).files) == {name for name in written if (source / name).is_file()}


@pytest.mark.parametrize("name", ["additional_chat_templates/notes.txt", "elsewhere/x.jinja", "notes.jinja"])
def test_files_of_others_are_never_overwritten(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    source = make_model()
    small = compress(source, tmp_path / "small")
    (small / name).parent.mkdir(exist_ok=True)
    (small / name).write_text("mine")
    with pytest.raises(CheckpointError):
        compress(source, small, overwrite=True)
    assert (small / name).read_text() == "mine"


def test_a_template_that_is_a_link_out_of_the_model_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    (tmp_path / "secret").write_text("s")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "x.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="outside the model"):
        compress(source, tmp_path / "out")
