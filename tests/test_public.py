"""What docs/modules.md calls public is there, and says so itself."""

from __future__ import annotations

import importlib
import re

import pytest

from markdown import ROOT

TABLE = [line for line in (ROOT / "docs" / "modules.md").read_text().splitlines() if line.startswith("| `flashsvd")]
OPERATORS = (
    "flash_attn_triton",
    "flash_attn_rotary",
    "flashsvdattn",
    "flashsvdropeattn",
    "flashsvdffnv1",
    "flashsvdffnv2",
    "flashsvdgeglu",
    "flashsvdswiglu",
    "flashsvddecode",
    "decode_attention",
    "latent_attention",
    "fused_ln",
    "rms_norm",
    "rotary",
)
MODULES = [name for line in TABLE for name in re.findall(r"`(flashsvd[\w.]*)`", line.split("|")[1])]


def test_the_table_names_modules() -> None:
    assert {"flashsvd", "flashsvd.io", "flashsvd.methods.method"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_called_public_is_there(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        assert getattr(module, public).__doc__ or public == "__version__", public


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_has_its_plain_form_beside_it(name: str) -> None:
    module = importlib.import_module(f"flashsvd.kernels.{name}")
    assert any(f"{public}_reference" in module.__all__ for public in module.__all__)
