"""The records that people write and their files, checked strictly: a bad row is an error.

A file has one JSON object per line, in UTF-8. Fields marked ? may be left out or null; a field that
is not listed is an error.

| record | fields |
|---|---|
| `Demonstration` | `prompt` or `messages, response, id?, source?, use_case?, labeler?, user?`, |
|           | `organization?, time?` |
| `Ranking` | `prompt` or `messages, responses` (K strings), |
|           | `ranks` (K integers from 1 = best, equal = tie, null = not ranked), |
|           | `id?, source?, use_case?, labeler?, labeler_group?, policies?` (K strings), |
|           | `temperatures?` (K numbers), `user?, organization?, time?`, |
|           | `revision?` (integer from 0) |
| `Prompt` | `prompt` or `messages, id?, source?, use_case?, user?, organization?, time?` |
| `PlainText` | `text, id?, source?` |

`messages` is a list of ``{"role": "system|user|assistant", "content": "..."}``: at most one system
message, first, then user and assistant in turn, the user last. A demonstration may leave `response`
out and end with the assistant's turn.

`RULES` lists everything that can happen to a row; docs/data.md prints it. docs/schema/ has the form
of a line as JSON Schema (`json_schema.json_schema`).
"""

from rlhf_jax.data.schema.checks import LABELS, MORE_THAN_TEXT, check_text
from rlhf_jax.data.schema.jsonl import OTHER_TABLES, read_jsonl, read_rows, write_jsonl
from rlhf_jax.data.schema.lengths import notes
from rlhf_jax.data.schema.parse import parse_row
from rlhf_jax.data.schema.records import (
    ABSENT,
    ROLES,
    Conversation,
    Demonstration,
    Message,
    PlainText,
    Prompt,
    Ranking,
    Record,
    field_names,
    record_texts,
    strict_pairs,
)
from rlhf_jax.data.schema.report import PLACES, SCREEN, DataReport
from rlhf_jax.data.schema.rules import NESTING, RULES, RowError, Rule
from rlhf_jax.data.schema.strict_json import (
    LINE_LIMIT,
    first_rows,
    json_list,
    json_rows,
    json_value,
    read_bytes,
)

__all__ = [
    "ABSENT",
    "LABELS",
    "LINE_LIMIT",
    "MORE_THAN_TEXT",
    "NESTING",
    "OTHER_TABLES",
    "PLACES",
    "ROLES",
    "RULES",
    "SCREEN",
    "Conversation",
    "DataReport",
    "Demonstration",
    "Message",
    "PlainText",
    "Prompt",
    "Ranking",
    "Record",
    "RowError",
    "Rule",
    "check_text",
    "field_names",
    "first_rows",
    "json_list",
    "json_rows",
    "json_value",
    "notes",
    "parse_row",
    "read_bytes",
    "read_jsonl",
    "read_rows",
    "record_texts",
    "strict_pairs",
    "write_jsonl",
]
