"""The notebook runs from its first cell to its last, and holds what came out of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
README = EXAMPLES.parent / "README.md"

nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel (the dev extra installs them)")


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        from run_notebook import execute
    return execute(tmp_path_factory.mktemp("notebook"))


def outputs(notebook: Any) -> list[list[tuple[str, ...]]]:
    """For each cell of code, the kinds of what came out."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [[(output.output_type, *sorted(output.get("data", {}))) for output in cell.outputs] for cell in cells]


def sizes(notebook: Any) -> dict[str, list[str]]:
    """Parameters and megabytes of weights of each variant that was profiled."""
    rows = re.findall(r"<tr><th[^>]*>(dense|low-rank|fused)</th>(.*?)</tr>", text(notebook, "text/html"))
    return {variant: re.findall(r"<td>(.*?)</td>", cells)[-2:] for variant, cells in rows}


def text(notebook: Any, kind: str) -> str:
    """All outputs of a kind."""
    found = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "\n".join(output["data"][kind] for output in found if kind in output.get("data", {}))


@pytest.mark.slow
def test_it_runs_and_gives_what_is_stored(stored: Any, executed: Any) -> None:
    assert outputs(executed) == outputs(stored)
    # Times and memory differ from run to run; parameters and ranks do not.
    assert sizes(executed) == sizes(stored)
    for notebook in (stored, executed):
        assert "17,404,800" in text(notebook, "text/html")
        assert re.search(r"<td>128</td>", text(notebook, "text/html"))


def test_reports_are_tables_and_curves_are_pictures(stored: Any) -> None:
    kinds = [kind for cell in outputs(stored) for output in cell for kind in output[1:]]
    assert kinds.count("text/html") == 4
    assert kinds.count("image/png") == 2


def test_the_readme_quotes_what_is_stored(stored: Any) -> None:
    quoted_rows = re.findall(r"^(dense|low-rank|fused)  .*  (\S+) +(\S+)$", README.read_text(), re.MULTILINE)
    assert {variant: figures for variant, *figures in quoted_rows} == sizes(stored)
    (quoted,) = re.findall(r"^CompressReport\(.*$", README.read_text(), re.MULTILINE)
    assert quoted in text(stored, "text/plain").splitlines()


def test_what_is_stored_is_small_and_names_no_place_on_a_machine(stored: Any) -> None:
    assert (EXAMPLES / "quickstart.ipynb").stat().st_size < 150_000
    for cell in stored.cells:
        assert not any(output.get("name") == "stderr" for output in cell.get("outputs", []))
    for shown in (text(stored, "text/html"), text(stored, "text/plain")):
        assert not re.search(r"(?<![\w<.])(/|[A-Z]:\\)\w+[/\\]", shown)
