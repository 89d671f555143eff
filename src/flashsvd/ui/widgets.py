"""A widget for each field of a config dataclass, and the config that their values describe."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import gradio as gr

from flashsvd.common.config import Config, field_types

# What a menu calls the value None.
UNSET = "default"

# What the short words of a shell's options stand for.
_WORDS = {
    "adasvd": "AdaSVD", "asvd": "ASVD", "attn": "attention", "calib": "calibration", "eval": "evaluation",
    "ffn": "feed-forward", "json": "file", "len": "length", "qkv": "Q, K, V", "seq": "sequence",
    "stats": "statistics", "wo": "attention output",
}  # fmt: skip


def widgets_for(
    config_class: type[Config], tab: str, essential: Sequence[str], left_out: Iterable[str] = ()
) -> dict[str, Any]:
    """Widgets by field name: the essential ones in their order, all others in a fold below them.

    Args:
        tab: begins the widgets' ids in the page: `compress-model`.
        left_out: fields that the page fills in by other means.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.name not in left_out}
    kinds = field_types(config_class)
    made = {name: _widget(fields[name], kinds[name].plain, tab) for name in essential if name in fields}
    others = [name for name in fields if name not in made]
    with gr.Accordion("More options", open=False, elem_classes="options"):
        for name in others:
            made[name] = _widget(fields[name], kinds[name].plain, tab)
    return made


def values_of(config_class: type[Config], names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """What a form's values stand for, by field, for `config_from`.

    Args:
        names: the fields that `values` are of.
    """
    kinds = field_types(config_class)
    return {name: _value(value, kinds[name].plain) for name, value in zip(names, values, strict=True)}


def label_of(name: str) -> str:
    """`calib_data` -> `Calibration data`."""
    text = " ".join(_WORDS.get(word, word) for word in name.split("_"))
    return text[0].upper() + text[1:]


def _widget(field: dataclasses.Field[Any], kind: type, tab: str) -> Any:
    about = {
        "label": label_of(field.name),
        "info": field.metadata["help"],
        "elem_id": f"{tab}-{field.name.replace('_', '-')}",
    }
    default = None if field.default is dataclasses.MISSING else field.default
    choices, suggestions = field.metadata["choices"], field.metadata["suggestions"]
    if kind is bool:
        return gr.Checkbox(value=bool(default), container=True, **about)
    if choices:
        unset = [(UNSET, "")] if default is None else []
        named = [*unset, *((choice, choice) for choice in choices)]
        return gr.Dropdown(named, value=default or "", **about)
    if suggestions:
        return gr.Dropdown(list(suggestions), value=default or "", allow_custom_value=True, **about)
    # Numbers too: Gradio's own field for them has no empty value.
    shown = "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
    return gr.Textbox(value=shown, max_lines=1, **about)


def _value(value: Any, kind: type) -> Any:
    """What a widget's value stands for: None for nothing; text where it is not a number, for the config to refuse."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if kind in (int, float):
        # A whole number stays one where any number is taken, and what is out of kind is the config's to refuse.
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(text)
    return text or None
