"""The published JSON Schemas are those of the code, and say yes and no as the reader does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.data.schema import PlainText, RowError, parse_row
from rlhf_jax.data.schema.json_schema import FILES, json_schema, published

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"

TURNS = [{"role": "user", "content": "Hi"}]
ANSWERED = [*TURNS, {"role": "assistant", "content": "Hello."}]
RANKED = {"responses": ["a", "b", "c"], "ranks": [1, None, 2]}

GOOD = [
    ("demonstration", {"prompt": "p", "response": "r"}),
    ("demonstration", {"messages": TURNS, "response": "r", "labeler": "ann", "time": None}),
    ("demonstration", {"messages": ANSWERED}),
    ("demonstration", {"prompt": None, "messages": ANSWERED}),
    ("ranking", {"prompt": "p", **RANKED, "temperatures": [0, 0.5, 1], "revision": 0}),
    ("ranking", {"messages": TURNS, **RANKED, "policies": ["x", "y", "z"]}),
    ("prompt", {"prompt": "p", "messages": None, "user": "u"}),
    ("plain_text", {"text": "t", "id": "1"}),
]
BAD = [
    ("demonstration", {"prompt": "p"}),
    ("demonstration", {"prompt": "p", "messages": TURNS, "response": "r"}),
    ("demonstration", {"prompt": "p", "response": "r", "policies": ["x"]}),
    ("demonstration", {"messages": [{"role": "bot", "content": "Hi"}], "response": "r"}),
    ("ranking", {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}),
    ("ranking", {"prompt": "p", "responses": ["a"], "ranks": [1]}),
    ("ranking", {"prompt": "p", **RANKED, "revision": -1}),
    ("ranking", {"prompt": "p", **RANKED, "temperatures": [1, -1, 2]}),
    ("prompt", {"prompt": 1}),
    ("prompt", {}),
    ("plain_text", {"text": None}),
    ("plain_text", {"text": "t", "prompt": "p"}),
]


def says_yes(name: str, row: dict[str, Any]) -> bool:
    jsonschema = pytest.importorskip(
        "jsonschema", reason="needs the extra: pip install 'rlhf_jax[notebooks]'"
    )
    kind = jsonschema.Draft202012Validator
    found = json_schema(FILES[name])
    kind.check_schema(found)
    return kind(found).is_valid(row)


@pytest.mark.parametrize("name", FILES)
def test_the_published_file_is_the_one_that_the_code_makes(name: str):
    """After a change of a record: python -m rlhf_jax.data.schema.json_schema docs/schema."""
    assert (SCHEMAS / f"{name}.json").read_text() == published(FILES[name])


def test_nothing_else_is_published():
    assert {file.stem for file in SCHEMAS.iterdir()} == set(FILES)


@pytest.mark.parametrize(("name", "row"), GOOD)
def test_a_row_that_the_reader_takes_is_of_the_schema(name: str, row: dict[str, Any]):
    parse_row(json.loads(json.dumps(row)), FILES[name])
    assert says_yes(name, row)


@pytest.mark.parametrize(("name", "row"), BAD)
def test_a_row_of_another_form_is_refused_by_both(name: str, row: dict[str, Any]):
    with pytest.raises(RowError):
        parse_row(row, FILES[name])
    assert not says_yes(name, row)


def test_a_schema_says_nothing_of_what_a_text_holds():
    """That is what the rules are for."""
    assert says_yes("plain_text", {"text": " "})
    with pytest.raises(RowError, match="empty"):
        parse_row({"text": " "}, PlainText)
