"""docs/pitfalls.md names a test for every pitfall, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMBERS = [f"J{n}" for n in range(1, 11)] + [str(n) for n in range(1, 51)]


def rows() -> dict[str, list[str]]:
    """Number of a pitfall -> the tests of its line."""
    lines = (ROOT / "docs" / "pitfalls.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| J?\d+ \|", line)]
    return {number: re.findall(r"`([^`]+::[^`]+)`", guards) for number, _, guards in cells}


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_pitfall_has_a_guard():
    assert list(rows()) == NUMBERS
    assert all(rows().values()), {number for number, guards in rows().items() if not guards}


def test_every_test_that_is_named_exists():
    named = {guard for guards in rows().values() for guard in guards}
    missing = [
        name
        for name in sorted(named)
        if name.split("::")[1] not in functions_of(name.split("::")[0])
    ]
    assert not missing, missing
    assert "test_of_nothing" not in functions_of("tests/test_pitfalls.py")
