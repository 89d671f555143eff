"""What the files at the root say of the project agrees."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parent.parent


def test_the_oldest_versions_tested_are_the_oldest_allowed() -> None:
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    allowed = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert set(tested) == {"torch", "triton", "transformers"}
    assert {name: Version(version) for name, version in tested.items()} == {
        name: Version(allowed[name]) for name in tested
    }
