"""ShareGPT: ``{conversations: [{from: human, value}, {from: gpt, value}, ..]}``.

LLaMA-Factory adds a preference: ``conversations`` that end with the human, and one turn in each of
``chosen`` and ``rejected``.
"""

from __future__ import annotations

from rlhf_jax.data.schema import RowError
from rlhf_jax.data.sources.messages import answer_to, demonstration_of, pair_of, turns
from rlhf_jax.data.sources.row import Draft, Row

COLUMNS = ("conversations", "conversation")


def parse(row: Row) -> Draft:
    """A demonstration, or a ranking of two where there are `chosen` and `rejected`.

    Raises:
      RowError: the last turn is not the assistant's, or a turn has more than a role and a text.
    """
    row.refuse_more_than_text()
    name = next((name for name in COLUMNS if row.has(name)), COLUMNS[0])
    said = turns(row, name, row.needed(name))
    if isinstance(said, str):
        raise RowError("wrong type", f"field {name!r} must be a list of turns, got str")
    if row.has("chosen") or row.has("rejected"):
        answers = [turns(row, column, row.needed(column)) for column in ("chosen", "rejected")]
        (prompt, chosen), (other, rejected) = (answer_to(row, said, answer) for answer in answers)
        # Each answer may repeat the conversation before its turn, so the two are compared.
        if prompt != other:
            raise RowError("prompts differ", "the two conversations differ before the last turn")
        return pair_of(row, prompt, chosen, rejected)
    prompt, answer = answer_to(row, None, said)
    return demonstration_of(row, prompt, answer)
