"""`optimize` takes what other libraries run a model by, optimises the model inside, and returns what it was given."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import pipeline

from conftest import MakeModel, build_decoder, build_model, build_tokenizer
from flashsvd import CompressConfig, optimize, run_compress, runtime
from flashsvd.blocks.registry import FUSED
from flashsvd.blocks.running.packed import is_packed
from flashsvd.errors import BackendError

TEXTS = ["a man eats", "the very good dog runs in the film", "not a movie ."]
PAIRS = [("a man eats", "a dog eats"), ("the very good film", "a movie ."), ("bad", "not good in the film")]


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("sentence_transformers", reason="the dev extra installs it")


def sentence_transformer(library: Any, source: Path) -> Any:
    """Built from its modules: a model and a pooling."""
    from sentence_transformers.models import Pooling, Transformer

    transformer = Transformer(str(source))
    return library.SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu")


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "compressed"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_sentence_transformer_encodes_as_before(
    library: Any, make_model: MakeModel, tmp_path: Path, family: str, compressed: bool
) -> None:
    source = make_model(family, "base")
    if compressed:
        run_compress(CompressConfig(model=str(source), ratio=0.5, output=str(tmp_path / "small"), device="cpu"))
        source = tmp_path / "small"
    model = sentence_transformer(library, source)
    expected = model.encode(TEXTS)
    assert optimize(model) is model
    assert is_packed(model)
    assert model.encode(TEXTS) == pytest.approx(expected, abs=1e-5)
    assert set(runtime.choices(model).values()) == {"torch"}
    with pytest.raises(BackendError, match="optimised already"):
        optimize(model)
    with pytest.raises(BackendError, match="cannot be saved"):
        model.save_pretrained(str(tmp_path / "saved"))


def test_a_cross_encoder_scores_as_before(library: Any, make_model: MakeModel) -> None:
    model = library.CrossEncoder(str(make_model(num_labels=1)), device="cpu")
    expected = model.predict(PAIRS)
    assert optimize(model) is model
    assert is_packed(model)
    assert model.predict(PAIRS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("task", "head"), [("text-classification", "classifier"), ("token-classification", "token-classifier")]
)
def test_a_pipeline_answers_as_before(task: str, head: str, batch_size: int) -> None:
    runner = pipeline(task, model=build_model("bert", head), tokenizer=build_tokenizer(), device="cpu")
    expected = runner(TEXTS, batch_size=batch_size)
    assert optimize(runner) is runner
    assert is_packed(runner.model)
    for found, before in zip(flat(runner(TEXTS, batch_size=batch_size)), flat(expected), strict=True):
        assert found.pop("score") == pytest.approx(before.pop("score"), abs=1e-5)
        assert found == before
    assert set(runtime.choices(runner).values()) == {"torch"}


def flat(answers: Any) -> list[dict[str, Any]]:
    """One dictionary after the other, whether a text has one or several."""
    return [one for answer in answers for one in (answer if isinstance(answer, list) else [answer])]


def test_options_hold_for_the_model_inside() -> None:
    runner = pipeline("text-classification", model=build_model(), tokenizer=build_tokenizer(), device="cpu")
    with pytest.raises(BackendError, match="backend 'cuda' is not known"):
        optimize(runner, backend="cuda")  # type: ignore[arg-type]  # what is refused
    runner.model.train()
    with pytest.raises(BackendError, match="in training mode"):
        optimize(runner)
    assert not is_packed(runner.model)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pipeline_writes_the_same_text(batch_size: int) -> None:
    tokenizer = build_tokenizer(padding_side="left")
    runner = pipeline("text-generation", model=build_decoder("llama"), tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 9, "do_sample": False, "batch_size": batch_size}
    expected = runner(TEXTS, **options)
    assert optimize(runner) is runner
    assert runner(TEXTS, **options) == expected
    assert len(runner.model.decoders) > 0
    assert set(runtime.choices(runner).values()) == {"torch"}


def test_what_fused_blocks_are_not_there_for_is_refused_inside_too(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = pipeline("text-generation", model=build_decoder("gpt2"), tokenizer=build_tokenizer(), device="cpu")
    monkeypatch.delitem(FUSED, "gpt2")
    with pytest.raises(BackendError, match="no fused blocks for 'gpt2'"):
        optimize(runner)


def test_several_models_in_one_are_asked_for_one_by_one(library: Any, make_model: MakeModel) -> None:
    from sentence_transformers.models import Router, Transformer

    routes = {name: [Transformer(str(make_model(head="base", name=name)))] for name in ("query", "document")}
    model = library.SentenceTransformer(modules=[Router(routes)], device="cpu")
    with pytest.raises(BackendError, match="runs 2 transformers models; give each of them to optimize"):
        optimize(model)
    assert not is_packed(model)


def test_a_sentence_transformer_without_a_transformer_is_refused(library: Any) -> None:
    from sentence_transformers.models import Dense

    with pytest.raises(BackendError, match="the SentenceTransformer runs no model of transformers; load it with"):
        optimize(library.SentenceTransformer(modules=[Dense(4, 4)], device="cpu"))


class Wrapper(nn.Module):
    """A module that runs a model by its own rules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize(
    "wrap",
    [
        Wrapper,
        torch.compile,
        nn.DataParallel,
        nn.Sequential,
        lambda model: SimpleNamespace(model=Wrapper(model)),
        lambda model: SimpleNamespace(model=None),
    ],
)
def test_a_wrapper_that_is_not_known_is_refused_and_its_model_left_alone(wrap: Callable[[Any], Any]) -> None:
    model = build_model("modernbert")
    with pytest.raises(BackendError, match="SentenceTransformer, CrossEncoder or pipeline with one, not a"):
        optimize(wrap(model))
    assert not is_packed(model)


@pytest.mark.slow
def test_sentence_transformers_is_not_imported_for_it() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); from conftest import build_model; import flashsvd; "
        "flashsvd.optimize(build_model()); sys.exit('sentence_transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
