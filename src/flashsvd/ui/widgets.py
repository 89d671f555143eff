"""A widget for each field of a config dataclass, and the config that their values describe."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

import gradio as gr

# What a menu calls the value None.
UNSET = "default"

# What the short words of a shell's options stand for.
_WORDS = {
    "adasvd": "AdaSVD", "asvd": "ASVD", "attn": "attention", "calib": "calibration", "eval": "evaluation",
    "ffn": "feed-forward", "json": "file", "len": "length", "qkv": "Q, K, V", "seq": "sequence",
    "stats": "statistics", "wo": "attention output",
}  # fmt: skip


def widgets_for(config_class: Any, tab: str, essential: Sequence[str], left_out: Iterable[str] = ()) -> dict[str, Any]:
    """Widgets by field name: the essential ones in their order, all others in a fold below them.

    Args:
        tab: begins the widgets' ids in the page: `compress-model`.
        left_out: fields that the page fills in by other means.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.name not in left_out}
    types_by_name = typing.get_type_hints(config_class)
    made = {name: _widget(fields[name], types_by_name[name], tab) for name in essential if name in fields}
    others = [name for name in fields if name not in made]
    with gr.Accordion("More options", open=False, elem_classes="options"):
        for name in others:
            made[name] = _widget(fields[name], types_by_name[name], tab)
    return made


def config_from(config_class: Any, names: Sequence[str], values: Sequence[Any], **given: Any) -> Any:
    """The config that widgets' values describe. The dataclass itself says what it does not take.

    Args:
        names: the fields that `values` are of.
        given: values of other fields.

    Raises:
        ConfigError: an option has a value that cannot be used.
    """
    types_by_name = typing.get_type_hints(config_class)
    read = {name: _value(value, types_by_name[name]) for name, value in zip(names, values, strict=True)}
    # A field that was emptied has its default again, as an option that is left out has in a shell.
    taken = {name: value for name, value in read.items() if value is not None}
    required = {f.name: "" for f in dataclasses.fields(config_class) if f.default is dataclasses.MISSING}
    return config_class(**(required | taken | given))


def label_of(name: str) -> str:
    """`calib_data` -> `Calibration data`."""
    text = " ".join(_WORDS.get(word, word) for word in name.split("_"))
    return text[0].upper() + text[1:]


def _widget(field: dataclasses.Field[Any], annotation: Any, tab: str) -> Any:
    about = {
        "label": label_of(field.name),
        "info": field.metadata["help"],
        "elem_id": f"{tab}-{field.name.replace('_', '-')}",
    }
    default = None if field.default is dataclasses.MISSING else field.default
    choices, suggestions = field.metadata["choices"], field.metadata["suggestions"]
    if annotation is bool:
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


def _value(value: Any, annotation: Any) -> Any:
    """What a widget's value stands for: None for nothing; text where it is not a number, for the config to refuse."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if _plain(annotation) in (int, float):
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(text)
    return text or None


def _plain(annotation: Any) -> Any:
    """`int` for `int | None`."""
    if isinstance(annotation, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation
