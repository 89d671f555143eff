"""Widgets: what the config dataclasses say of themselves, and configs made of what visitors put in."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import gradio as gr
import pytest

from flashsvd import CompressConfig, EvalConfig, FinetuneConfig, ProfileConfig
from flashsvd.common.config import config_from
from flashsvd.compression.config import METHOD_NAMES
from flashsvd.errors import ConfigError
from flashsvd.methods.registry import METHODS
from flashsvd.ui.widgets import label_of, values_of, widgets_for

CASES = [
    (CompressConfig, {"model": "x", "rank": 8}),
    (EvalConfig, {"checkpoint": "x", "task": "sst2"}),
    (FinetuneConfig, {"model": "x"}),
    (ProfileConfig, {"checkpoint": "x"}),
]


def widgets(config_class: Any) -> dict[str, Any]:
    with gr.Blocks():
        return widgets_for(config_class, "tab", ("task",))


@pytest.mark.parametrize(("config_class", "given"), CASES)
def test_each_field_has_a_widget_with_its_own_help_and_default(config_class: Any, given: dict[str, Any]) -> None:
    made = widgets(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    assert made.keys() == fields.keys()
    assert next(iter(made)) == "task"
    for name, widget in made.items():
        assert widget.info == fields[name].metadata["help"]
        assert widget.label == label_of(name)
        assert widget.elem_id == f"tab-{name.replace('_', '-')}"
    values = [given.get(name, widget.value) for name, widget in made.items()]
    assert config_from(config_class, values_of(config_class, list(made), values)) == config_class(**given)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("model", "Model"), ("calib_seq_len", "Calibration sequence length"), ("asvd_search", "ASVD search"),
        ("rank_ffn", "Rank feed-forward"), ("qkv", "Q, K, V"), ("state_dict", "State dict"), ("stats", "Statistics"),
    ],
)  # fmt: skip
def test_a_label_is_the_name_in_whole_words(name: str, label: str) -> None:
    assert label_of(name) == label


def test_choices_and_suggestions_are_offered() -> None:
    made = widgets(CompressConfig)
    assert [value for _, value in made["qkv"].choices] == ["joint", "per-head"]
    assert [value for _, value in made["dtype"].choices] == ["", "float32", "float16", "bfloat16"]
    assert [value for _, value in made["method"].choices] == list(METHOD_NAMES) == list(METHODS)
    assert made["method"].allow_custom_value
    assert isinstance(made["overwrite"], gr.Checkbox)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rank", " 16 ", 16), ("rank", "", None), ("ratio", "0.5", 0.5), ("alpha", "1e-1", 0.1), ("output", "  ", None),
        ("output", " a b ", "a b"), ("dtype", "", None), ("device", None, None), ("calib_samples", "", 512),
        ("qkv", "per-head", "per-head"), ("overwrite", True, True),
    ],
)  # fmt: skip
def test_text_stands_for_a_value(name: str, text: Any, value: Any) -> None:
    ranks = {} if name in ("rank", "ratio") and value is not None else {"rank_attn": 4, "rank_ffn": 4, "rank_wo": 4}
    given = {"model": "x", **ranks, **values_of(CompressConfig, [name], [text])}
    config = config_from(CompressConfig, given)
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": "", "rank": "8"}, "model must be a name, got ''"),
        ({"model": "x", "rank": "many"}, "'many'"),
        ({"model": "x", "rank": "2.5"}, "2.5"),
        ({"model": "x", "ratio": "half"}, "'half'"),
        ({"model": "x", "ratio": "nan"}, "nan"),
        ({"model": "x", "rank": "8", "calib_samples": "few"}, "calib_samples must be a whole number, got 'few'"),
        ({"model": "x", "rank": "8", "seed": "1.5"}, "seed must be a whole number"),
    ],
)
def test_what_a_config_does_not_take_it_refuses_itself(options: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        config_from(CompressConfig, values_of(CompressConfig, list(options), list(options.values())))


@pytest.mark.parametrize("config_class", [case[0] for case in CASES])
def test_no_help_text_has_what_gradio_takes_for_markup(config_class: Any) -> None:
    for field in dataclasses.fields(config_class):
        assert not re.search(r"`[^`]+`|\*.+?\*|__.+?__|(?<!\w)_.+?_(?!\w)|\[[^\]]+\]\(", field.metadata["help"])
