"""JSON Schema of the lines of a record file, derived from the definitions of the records.

    python -m rlhf_jax.data.schema.json_schema docs/schema

A schema gives the fields of a line and their types. Constraints across fields or on the text (turns
that alternate, one rank per response, no empty prompt, unique ids) are in `rules.RULES`, and
`jsonl.read_jsonl` checks them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from rlhf_jax.data.schema.records import Demonstration, PlainText, Prompt, Ranking
from rlhf_jax.run.files import written

FILES = {
    "demonstration": Demonstration,
    "ranking": Ranking,
    "prompt": Prompt,
    "plain_text": PlainText,
}
"""Name of a published file, without ``.json`` -> its record class."""


def json_schema(kind: type) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of one line with a record.

    It is msgspec's schema of the record, changed to the form in files: a prompt of several turns is
    a field of its own, `messages`, and ranks start at 1, with null for a response that was not
    ranked.

    Args:
      kind: `Demonstration`, `Ranking`, `Prompt` or `PlainText`.
    """
    _, parts = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    for part in parts.values():
        part["description"] = _unwrapped(part["description"])
    found = parts.pop(kind.__name__)
    if "prompt" in found["properties"]:
        _separate_messages(found)
    if "ranks" in found["properties"]:
        rank = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}
        found["properties"]["ranks"] = {"type": "array", "minItems": 2, "items": rank}
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}
    return {**found, "$defs": parts} if parts else found


def _unwrapped(text: str) -> str:
    """A docstring with one line per paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _separate_messages(found: dict[str, Any]) -> None:
    """Splits `prompt`, a text or a list of turns, into two fields of which a line has one."""
    text, turns = found["properties"].pop("prompt")["anyOf"]
    nothing = {"type": "null"}
    both = {"prompt": {"anyOf": [text, nothing]}, "messages": {"anyOf": [turns, nothing]}}
    found["properties"] = both | found["properties"]
    required = [name for name in found["required"] if name != "prompt"]
    # A demonstration may end `messages` with the assistant's turn and leave `response` out.
    in_messages = [name for name in required if name != "response"]
    if "response" in required:
        found["properties"]["response"] = {"anyOf": [found["properties"]["response"], nothing]}
    found["required"] = in_messages
    texts = ["prompt", *(name for name in required if name == "response")]
    found["oneOf"] = [
        {"required": texts, "properties": dict.fromkeys(texts, text)},
        {"required": ["messages"], "properties": {"messages": turns}},
    ]


def write_schemas(folder: Path) -> None:
    """Writes ``<name>.json`` for each record of `FILES`."""
    for name, kind in FILES.items():
        with written(folder / f"{name}.json") as file:
            file.write(published(kind))


def published(kind: type) -> str:
    """The content of a record's published file."""
    return json.dumps(json_schema(kind), indent=2) + "\n"


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
