"""OpenAssistant: trees of messages with replies that volunteers ranked."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.schema import DataReport, Demonstration, Ranking, RowError, check_text, read_rows
from rlhf_jax.data.sources.hub import download, folder
from rlhf_jax.data.sources.row import Draft, Row, as_number
from rlhf_jax.data.sources.transcripts import Split, dialogue, take_split
from rlhf_jax.run.files import local_path

OASST_REPO = "OpenAssistant/oasst1"
OASST_TREES = "2023-04-12_oasst_ready.trees.jsonl.gz"


def read_oasst(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    split: Split,
    test_fraction: float = 0.1,
    language: str = "en",
) -> tuple[list[Ranking], DataReport]:
    """Rankings of 2 to 9 replies to the same context, by the volunteers of OpenAssistant.

    Args:
      data_dir: folder with ``rankings.jsonl.gz`` (rows
        ``{prompt: [{role, text}], responses, ranks}``, ranks from 0) or else a file of message
        trees (``*tree*.jsonl.gz``), or with such a folder named oasst*; None = download.
      split: "train" or "test", by a hash of the first human turn.
      test_fraction: share of the conversations in the test split.
      language: of the trees' messages, as a two-letter code.

    Source: Koepf et al. 2023, arXiv 2304.07327.
    """
    path = _oasst_file(data_dir, "*tree*.jsonl.gz", "rankings.jsonl.gz")
    parse = (
        _parse_oasst
        if path.name == "rankings.jsonl.gz"
        else functools.partial(_tree_rankings, language=language)
    )
    # A tree has several contexts with ranked replies, so each row of the file gives a list.
    groups, report = read_rows(path, parse)
    return take_split([r for group in groups for r in group], report, split, test_fraction)


def read_oasst_demonstrations(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    split: Split,
    test_fraction: float = 0.1,
    language: str = "en",
) -> tuple[list[Demonstration], DataReport]:
    """The best-ranked (or only) human reply to each context of OpenAssistant.

    The arguments are those of `read_oasst`. The file may also be ``demonstrations.jsonl.gz`` (rows
    ``{prompt: [{role, text}], response}``).
    """
    path = _oasst_file(data_dir, "*tree*.jsonl.gz", "demonstrations.jsonl.gz")
    of_tree = functools.partial(_tree_demonstrations, language=language)
    parse = _parse_oasst_demonstration if path.name == "demonstrations.jsonl.gz" else of_tree
    groups, report = read_rows(path, parse)
    return take_split([d for group in groups for d in group], report, split, test_fraction)


def _parse_oasst(row: dict[str, Any]) -> list[Ranking]:
    responses, ranks = row.get("responses"), row.get("ranks")
    if (
        not isinstance(responses, list)
        or not isinstance(ranks, list)
        or len(responses) != len(ranks)
    ):
        raise RowError(
            "bad ranks", "fields 'responses' and 'ranks' must be lists of the same length"
        )
    # `type` and not isinstance, which takes a bool for an int.
    if len(responses) < 2 or any(type(rank) is not int or rank < 0 for rank in ranks):
        raise RowError("bad ranks", "a ranking needs at least 2 responses and integer ranks from 0")
    texts = tuple(check_text(text, "responses").strip() for text in responses)
    return [Ranking(dialogue(_turns(row)), texts, tuple(ranks), source="oasst")]


def _parse_oasst_demonstration(row: dict[str, Any]) -> list[Demonstration]:
    response = check_text(row.get("response"), "response").strip()
    return [Demonstration(dialogue(_turns(row)), response, source="oasst")]


def _turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    turns = row.get("prompt")
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, dict) for turn in turns)
    ):
        raise RowError("bad prompt", "field 'prompt' must be a list of {role, text}")
    return [(check_text(t.get("role"), "role"), check_text(t.get("text"), "text")) for t in turns]


def _tree_rankings(row: dict[str, Any], *, language: str) -> list[Ranking]:
    found = []
    for node, turns in _contexts(row, language):
        replies = sorted(
            (r for r in _replies(node, language) if type(r.get("rank")) is int),
            key=lambda reply: reply["rank"],
        )
        if len(replies) < 2:
            continue
        texts = tuple(check_text(r.get("text"), "text").strip() for r in replies)
        # Ranks begin at 0 again where the best reply is deleted or in another language.
        ranks = tuple(r["rank"] - replies[0]["rank"] for r in replies)
        found.append(Ranking(dialogue(turns), texts, ranks, node.get("message_id"), "oasst"))
    return found


def _tree_demonstrations(row: dict[str, Any], *, language: str) -> list[Demonstration]:
    found = []
    for node, turns in _contexts(row, language):
        human = [r for r in _replies(node, language) if not r.get("synthetic")]
        ranked = sorted(
            (r for r in human if type(r.get("rank")) is int), key=lambda reply: reply["rank"]
        )
        # Without ranks a reply is taken only if it is the only one, as none is known to be better.
        best = ranked[0] if ranked else human[0] if len(human) == 1 else None
        if best is not None:
            text = check_text(best.get("text"), "text").strip()
            found.append(Demonstration(dialogue(turns), text, node.get("message_id"), "oasst"))
    return found


def _contexts(
    row: dict[str, Any], language: str
) -> Iterator[tuple[dict[str, Any], list[tuple[str, str]]]]:
    """Every human message of a tree, with the turns up to and including it."""
    root = row.get("prompt")
    if not isinstance(root, dict):
        raise RowError("bad prompt", "field 'prompt' must be the first message of the tree")
    # A stack instead of recursion, as a tree built from flat messages may be deep.
    stack = [(root, [])] if root.get("lang") == language and not root.get("deleted") else []
    while stack:
        node, before = stack.pop()
        turns = [
            *before,
            (check_text(node.get("role"), "role"), check_text(node.get("text"), "text")),
        ]
        if node["role"] == "prompter":
            yield node, turns
        # Reversed, so that the stack gives the replies in the order of the file.
        stack += [(reply, turns) for reply in reversed(_replies(node, language))]


def _replies(node: dict[str, Any], language: str) -> list[dict[str, Any]]:
    return [
        r for r in node.get("replies") or [] if r.get("lang") == language and not r.get("deleted")
    ]


def _oasst_file(data_dir: str | os.PathLike[str] | None, trees: str, derived: str) -> Path:
    if data_dir is None:
        return download(OASST_REPO, OASST_TREES)
    root = folder(
        data_dir, *(p.name for p in sorted(local_path("data_dir", data_dir).glob("oasst*")))
    )
    # The file of finished rows is preferred to the trees, if the folder has both.
    files = [*sorted(root.glob(derived)), *sorted(root.glob(trees))]
    if not files:
        raise ValueError(
            f"no {derived} or {trees} in {root}: pass the folder that holds OpenAssistant's file"
        )
    return files[0]


# --------------------------------------------------------------------------------- a file by itself


def is_tree(row: Row) -> bool:
    """Whether a row is a tree of messages, or a message of the flat form."""
    root = row.values.get("prompt")
    return (isinstance(root, dict) and bool({"replies", "message_id"} & set(root))) or is_message(
        row
    )


def is_message(row: Row) -> bool:
    """Whether a row is a message of the flat form, which names its parent."""
    return {"message_id", "parent_id", "text", "role"} <= set(row.values)


def table(rows: Sequence[Row], language: str) -> tuple[Sequence[Row], Callable[[Row], list[Draft]]]:
    """The trees of a file, built from its messages in the flat form, and their parser.

    Args:
      rows: trees, or messages that name their parents.
      language: of the messages, as a two-letter code.
    """
    if any(is_message(row) for row in rows):
        rows = _trees(rows)
    return rows, lambda row: _drafts(row, language)


def _trees(rows: Sequence[Row]) -> list[Row]:
    """Builds trees from the messages of the flat form.

    A message with a missing parent becomes a tree of its own, which `_drafts` refuses.
    """
    nodes: dict[str, dict[str, Any]] = {}
    for row in rows:
        node = {name: row.take(name) for name in row.values}
        rank = as_number(node.get("rank"), "rank", texts=row.cells)
        for name in ("deleted", "synthetic"):
            if row.cells:  # a CSV cell is always text
                node[name] = str(node.get(name)).strip().lower() in ("true", "1", "1.0")
        nodes[str(node["message_id"])] = node | {
            "rank": None if rank is None else int(rank),
            "replies": [],
        }
    parts: dict[str, list[Row]] = {}
    # A second pass, because a reply may stand before its parent in the file.
    for row in rows:
        node = nodes[str(row.values["message_id"])]
        if str(node["parent_id"]) in nodes:
            nodes[str(node["parent_id"])]["replies"].append(node)
    for row in rows:
        root, seen = str(row.values["message_id"]), set()
        while str(nodes[root]["parent_id"]) in nodes:
            # In a damaged file the parents may form a cycle.
            if root in seen:
                raise ValueError(
                    f"{row.place}: field 'parent_id' leads from the message back to it: remove the "
                    "row"
                )
            seen.add(root)
            root = str(nodes[root]["parent_id"])
        parts.setdefault(root, []).append(row)
    return [
        Row(group[0].place, {"prompt": nodes[root]}, parts=group) for root, group in parts.items()
    ]


def _drafts(row: Row, language: str) -> list[Draft]:
    """The rankings and demonstrations of a tree."""
    tree = {"prompt": row.take("prompt")}
    root = tree["prompt"]
    if not isinstance(root, dict):
        raise RowError("bad prompt", "field 'prompt' must be the first message of the tree")
    if root.get("role") == "assistant" or root.get("parent_id"):
        raise RowError(
            "missing field",
            f"field 'parent_id' = {root.get('parent_id')!r} names no message of the file",
        )
    if root.get("lang") != language:
        raise RowError(
            "language", f"the tree is in {root.get('lang')!r}: choose it with --config.language="
        )
    for name in ("message_tree_id", "tree_state"):
        row.take(name)
    for node in _all(root):
        if not isinstance(node, dict) or not isinstance(node.get("replies") or [], list):
            raise RowError(
                "bad prompt", "field 'replies' must be a list of messages, each an object"
            )
        if node.get("lang") != language:
            row.leave_aside(f"messages in {node.get('lang')!r}")
        if node.get("deleted"):
            row.leave_aside("deleted messages")
    drafts = []
    for found in _tree_rankings(tree, language=language):
        # Ranks may have gaps, and a file counts them from 1.
        order = sorted(set(found.ranks))
        fields = {
            "prompt": found.prompt,
            "responses": list(found.responses),
            "id": found.id,
            "source": "oasst",
        }
        drafts.append(
            Draft(Ranking, fields | {"ranks": [order.index(rank) + 1 for rank in found.ranks]})
        )
    for best in _tree_demonstrations(tree, language=language):
        fields = {
            "prompt": best.prompt,
            "response": best.response,
            "id": best.id,
            "source": "oasst",
        }
        drafts.append(Draft(Demonstration, fields))
    if not drafts:
        raise RowError(
            "nothing annotated", "no message of the tree has ranked replies, or a single human one"
        )
    return drafts


def _all(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack += node.get("replies") or []
