"""What every docstring keeps to."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from markdown import ROOT

SOURCE = ROOT / "src" / "flashsvd"


def documented_functions() -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Public functions and methods of the package with a docstring, but none within another function."""
    for file in sorted(SOURCE.rglob("*.py")):
        bodies: list[ast.Module | ast.ClassDef] = [ast.parse(file.read_text(encoding="utf-8"))]
        while bodies:
            for node in bodies.pop().body:
                if isinstance(node, ast.ClassDef):
                    bodies.append(node)
                elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    docstring = ast.get_docstring(node)
                    if docstring:
                        yield f"{file.relative_to(SOURCE)}: {node.name}", node, docstring


def test_what_a_public_function_raises_is_said() -> None:
    silent = [
        name
        for name, function, docstring in documented_functions()
        if any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(function))
        and "Raises" not in docstring
        and "error" not in docstring
    ]
    assert silent == []


def test_docstrings_say_what_is_and_not_what_shall_be() -> None:
    assert [name for name, _, docstring in documented_functions() if " shall " in docstring] == []
