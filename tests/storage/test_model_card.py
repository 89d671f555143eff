"""The README.md of a checkpoint: what the hub and a reader learn from it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import MakeModel
from flashsvd import CompressConfig, read_info, run_compress
from flashsvd.storage.metadata import CompressionInfo
from flashsvd.storage.model_card import model_card


@pytest.fixture
def info(make_model: MakeModel, tmp_path: Path) -> CompressionInfo:
    config = CompressConfig(model=str(make_model()), ratio=0.5, task="sst2", output=str(tmp_path / "small"))
    return run_compress(config).info


def front_matter(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.usefixtures("info")
def test_it_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    card = (tmp_path / "small" / "README.md").read_text()
    found = read_info(tmp_path / "small")
    assert front_matter(card) == {
        "library_name": "flashsvd",
        "pipeline_tag": "text-classification",
        "tags": ["flashsvd", "low-rank", "svd", "standard", "bert"],
    }
    for fact in ("standard", "keep 0.5 of the factored layers' parameters", f"{found.weight_bytes:,} bytes", "sst2"):
        assert fact in card


@pytest.mark.usefixtures("info")
def test_its_code_loads_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "small" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "BertForSequenceClassification"


@pytest.mark.parametrize(
    ("base", "shown", "linked"),
    [
        ("google-bert/bert-base-uncased", "google-bert/bert-base-uncased", True),
        ("gpt2", "gpt2", False),
        ("/home/me/private/sst2-model", "sst2-model", False),
        ("./models/mine", "mine", False),
        ("~/models/mine", "mine", False),
        ("", "an unknown model", False),
    ],
)
def test_a_base_model_of_the_hub_is_linked_and_a_directory_does_not_show_where_it_lay(
    info: CompressionInfo, base: str, shown: str, linked: bool
) -> None:
    calibrated = {"samples": 8, "tokens": 90, "data": "/home/me/private/text.tsv", "seed": 0}
    trained = {"task": "sst2", "epochs": 1, "data": "/home/me/private/text.tsv", "learning_rate": 1e-4}
    made = dataclasses.replace(info, base_model=base, calibration=calibrated, trainings=(trained,))
    card = model_card(made, "small", 1000, sentence_encoder=False)
    assert card.count("text.tsv") == 2
    assert f"This is {shown}, compressed" in card
    assert front_matter(card).get("base_model") == (base if linked else None)
    assert "private" not in card
    assert "/home" not in card


def test_a_directory_that_is_called_as_a_model_of_the_hub_is_none(
    info: CompressionInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = model_card(dataclasses.replace(info, base_model="models/bert"), "small", 1000, sentence_encoder=False)
    assert "base_model" not in front_matter(card)


@pytest.mark.parametrize("odd", ["r\udcff", "a\x1b[2Jb", "a\nb"])
def test_names_that_are_no_text_are_escaped(info: CompressionInfo, odd: str) -> None:
    made = dataclasses.replace(info, base_model=odd, ranks_json=odd, ratio=None)
    card = model_card(made, odd, 1000, sentence_encoder=False)
    assert card.encode()
    assert all(line.isprintable() for line in card.splitlines())


@pytest.mark.parametrize(
    ("architecture", "sentences", "pipeline"),
    [
        ("LlamaForCausalLM", False, "text-generation"),
        ("GPT2LMHeadModel", False, "text-generation"),
        ("BertForMaskedLM", False, "fill-mask"),
        ("RobertaForSequenceClassification", False, "text-classification"),
        ("BertModel", False, "feature-extraction"),
        ("BertModel", True, "sentence-similarity"),
    ],
)
def test_the_hub_learns_what_it_is_for(
    info: CompressionInfo, architecture: str, sentences: bool, pipeline: str
) -> None:
    card = model_card(dataclasses.replace(info, architecture=architecture), "x", 1, sentence_encoder=sentences)
    assert front_matter(card)["pipeline_tag"] == pipeline
    assert ("sentence-transformers" in front_matter(card)["tags"]) == sentences
