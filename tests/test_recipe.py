"""Pages of docs lead to code that exists; the numbers of the recipe are those of the configs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.run.config import load_config

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "docs" / "recipe.md"
LINK = re.compile(r"\[`([^`\]]+)`\]\(([\w./]+\.py)\)")
PRESETS = {"configs/common.py": "configs/instructgpt/instructgpt_1_3b.py"}
"""Files of values that are no config themselves -> a config that has them unchanged."""


def links(page: Path) -> list[tuple[str, str]]:
    """What each link to code says, and the file it leads to, relative to the root."""
    found = LINK.findall(page.read_text(encoding="utf-8"))
    return [
        (text, (page.parent / target).resolve().relative_to(ROOT).as_posix())
        for text, target in found
    ]


def defined(file: str) -> set[str]:
    """Functions, classes and constants of a file, and of its classes the methods and fields."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        names |= names_of(node)
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                names |= {f"{node.name}.{name}" for name in names_of(inner)}
    return names


def names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return {ast.unparse(target) for target in targets}


def value_at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


SYMBOLS = [
    link for page in (RECIPE, ROOT / "README.md") for link in links(page) if "=" not in link[0]
]
VALUES = [link for link in links(RECIPE) if "=" in link[0]]


@pytest.mark.parametrize(("name", "file"), sorted(set(SYMBOLS)), ids=lambda part: str(part))
def test_every_link_leads_to_a_definition(name: str, file: str):
    assert name in defined(file), f"{file} does not define {name}"


@pytest.mark.parametrize("file", sorted({file for _, file in VALUES}))
def test_every_number_is_the_value_of_its_key(file: str):
    config = load_config(str(ROOT / PRESETS.get(file, file)))
    for text in (text for text, target in VALUES if target == file):
        key, value = text.split(" = ")
        assert value_at(config, key) == ast.literal_eval(value), text


def test_the_page_has_its_links():
    assert len(SYMBOLS) > 60
    assert len(VALUES) > 50


def test_every_row_of_the_recipe_leads_to_code():
    rows = [
        line for line in RECIPE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    heads = ("| in the paper ", "| equation ", "| open ")
    bare = [row for row in rows if not row.startswith(heads) and not LINK.search(row)]
    assert not bare, bare


PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
PATH = re.compile(r"(?<![\w/.-])((?:\w+/)+\w+\.(?:py|sh|yaml|sbatch|ipynb))\b")
INVENTED = {"configs/ppo/x.py", "tests/test_x.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path):
    """Paths are those of the checkout, or begin inside the package: ``run/files.py``."""
    named = set(PATH.findall(page.read_text(encoding="utf-8"))) - INVENTED
    missing = [
        path
        for path in named
        if not any((top / path).exists() for top in (ROOT, ROOT / "rlhf_jax"))
    ]
    assert not missing, missing


def test_a_link_that_leads_nowhere_would_be_found():
    assert "ranking_loss" in defined("rlhf_jax/losses/ranking.py")
    assert "no_such_loss" not in defined("rlhf_jax/losses/ranking.py")
    assert "DecoderConfig.dropout" in defined("rlhf_jax/models/config.py")
