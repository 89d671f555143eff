"""`--recipe`: a name for options that go together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeModel
from flashsvd import CompressConfig, plan_compress, run_compress
from flashsvd.compression.recipes import RECIPES, recipe
from flashsvd.errors import ConfigError
from training_data import write_text

OPTIONS = ("method", "rank_steps", "rank_search", "calib_inputs", "refine")


def options_of(**given: Any) -> tuple[Any, ...]:
    config = CompressConfig("bert", **({"ratio": 0.5} | given))
    return tuple(getattr(config, name) for name in OPTIONS)


def test_a_recipe_stands_for_its_options() -> None:
    assert options_of() == ("standard", "fast", None, "dense", 0)
    assert options_of(recipe="quick") == ("drone", "fine", "loss", "dense", 0)
    method, steps, search, inputs, refine = options_of(recipe="best")
    assert (method, steps, search, inputs) == ("drone", "fine", "loss", "compressed")
    assert refine > 0


@pytest.mark.parametrize(
    "given",
    [
        {"method": "asvd"}, {"method": "standard"}, {"rank_steps": "fast"}, {"rank_search": "uniform"},
        {"calib_inputs": "dense"}, {"refine": 0}, {"refine": 7},
    ],
)  # fmt: skip
def test_what_is_given_by_itself_holds_instead(given: dict[str, Any]) -> None:
    ours, whole = options_of(recipe="best", **given), options_of(recipe="best")
    ((name, value),) = given.items()
    assert ours[OPTIONS.index(name)] == value
    assert sum(mine != theirs for mine, theirs in zip(ours, whole, strict=True)) == 1


def test_ranks_from_a_file_leave_nothing_to_search_for() -> None:
    method, steps, search, *_ = options_of(recipe="best", ratio=None, ranks_json="ranks.json")
    assert (method, steps, search) == ("drone", "fast", None)


def test_one_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="recipe 'finest' is not known; choose from best, quick"):
        CompressConfig("bert", ratio=0.5, recipe="finest")


def test_its_help_says_what_it_stands_for() -> None:
    (help_text,) = (f.metadata["help"] for f in dataclasses.fields(CompressConfig) if f.name == "recipe")
    for name in RECIPES:
        assert name in help_text
    for option, value in recipe("best", finds_ranks=True).items():
        assert f"--{option.replace('_', '-')} {value}" in help_text


@pytest.mark.parametrize(
    ("family", "head", "method", "warns"),
    [
        ("llama", "causal-lm", "standard", True),
        ("llama", "causal-lm", "drone", False),
        ("bert", "masked-lm", "standard", False),
    ],
)
def test_a_method_that_reads_no_data_is_warned_of_on_a_decoder(
    make_model: MakeModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    family: str,
    head: str,
    method: str,
    warns: bool,
) -> None:
    text = write_text(tmp_path / "text") / "train.txt"
    source = make_model(family, head)
    options: dict[str, Any] = {} if method == "standard" else {"calib_data": str(text), "calib_seq_len": 16}
    with caplog.at_level("WARNING", logger="flashsvd"):
        plan_compress(CompressConfig(str(source), method=method, ratio=0.5, output=str(tmp_path / "out"), **options))
    said = [record.getMessage() for record in caplog.records]
    assert any("--method drone or --recipe best" in line for line in said) == warns


def test_the_checkpoint_says_what_was_done(make_model: MakeModel, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text") / "train.txt"
    info = run_compress(
        CompressConfig(
            str(make_model("llama", "causal-lm")), recipe="best", ratio=0.5, refine=2, device="cpu",
            calib_data=str(text), calib_samples=4, calib_seq_len=16, output=str(tmp_path / "out"),
        )
    ).info  # fmt: skip
    assert (info.method, info.rank_steps, info.rank_search) == ("drone", "fine", "loss")
    assert (info.calib_inputs, info.refine_steps) == ("compressed", 2)


def test_a_recipe_has_no_place_in_the_order_of_the_others() -> None:
    config = CompressConfig("a model", "drone", ratio=0.5)
    assert (config.method, config.recipe) == ("drone", None)
