"""What every docstring keeps to."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from markdown import ROOT

SOURCE = ROOT / "src" / "flashsvd"


def public_functions() -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Functions and methods of the package with no underscore before their name, and their docstrings."""
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield f"{file.relative_to(SOURCE)}: {node.name}", node, ast.get_docstring(node) or ""


def raises(function: ast.FunctionDef) -> bool:
    """Whether a function makes an error by itself, and not in another one that it defines."""
    rest: list[ast.AST] = list(function.body)
    while rest:
        node = rest.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            rest += ast.iter_child_nodes(node)
    return False


def test_what_a_public_function_raises_is_said() -> None:
    silent = [
        name
        for name, function, docstring in public_functions()
        if raises(function) and "Raises" not in docstring and "error" not in docstring
    ]
    assert silent == []


def test_docstrings_say_what_is_and_not_what_shall_be() -> None:
    assert [name for name, _, docstring in public_functions() if " shall " in docstring] == []
