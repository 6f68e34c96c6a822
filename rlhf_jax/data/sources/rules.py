"""The rules for rows of other tools' tables, in addition to those of `schema.RULES`."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_jax.data.schema import Rule

EXPECTED_DROPS = (
    "identical responses",
    "prompts differ",
    "empty response",
    "no Assistant turn",
    "only one response",
    "not submitted",
    "nothing annotated",
    "language",
)
"""Reasons that rows of public data sets and exports are dropped and counted under, not errors."""

FORM_RULES: Mapping[str, Rule] = {
    # no prompt is guessed
    "no prompt": Rule(
        "bad", "no `prompt`, no transcript with turn marks, no messages", "`--columns prompt=NAME`"
    ),
    "systems differ": Rule(
        "bad", "a `system` column and a system turn, or two such columns, that differ", "keep one"
    ),
    "prompt in one text": Rule(
        "bad",
        "a transcript as `prompt` that begins only one of the two texts",
        "write answers or whole texts in both",
    ),
    "transcript of another prompt": Rule(
        "bad",
        "whole transcripts beside a `prompt` that is none of their human turns",
        "`--columns prompt=`",
    ),
    "prompt before both": Rule(
        "bad",
        "a prompt of one or two words before both answers, and no other row tells whether it is "
        "repeated there",
        "remove it from the answers, or add rows",
    ),
    # what a role and a text cannot hold
    "tool call": Rule(
        "bad",
        "`tool_calls`, `function_call`, `tools`, a role tool or function",
        "leave such rows out",
    ),
    "reasoning content": Rule(
        "bad", "`reasoning_content`, `reasoning`, `thinking`", "leave it out, or join it"
    ),
    "not text": Rule("bad", "images, audio, video, files, a refusal", "leave such rows out"),
    "speaker name": Rule("bad", "a turn with a `name`", "write it into the text, or remove it"),
    "turn weight": Rule(
        "bad",
        "an assistant's turn with `weight` or `train` other than 1",
        "cut the conversation there",
    ),
    "unknown turn field": Rule(
        "bad", "a turn with another field that is not known", "rename or remove it"
    ),
    "unpaired": Rule(
        "bad",
        "`label` beside one answer (TRL's unpaired preference)",
        "no ranking: use pairs or scores",
    ),
    "more than one turn": Rule(
        "bad", "several messages that answer one prompt", "one answer, the last turn"
    ),
    "unknown answer": Rule(
        "bad", "a choice that names none of the row's answers", "`--columns NAME=FIELD`"
    ),
    "uneven row": Rule(
        "bad", "a line of a CSV file with more or fewer cells than the first", "quote the cells"
    ),
    # left out and counted
    "identical responses": Rule("dropped", "two responses that are the same", "none needed"),
    "prompts differ": Rule(
        "dropped", "two conversations that differ before the last turn", "none needed"
    ),
    "no Assistant turn": Rule(
        "dropped", "a conversation that does not end with the assistant", "none needed"
    ),
    "only one response": Rule(
        "dropped", "a prompt with one rated response: nothing to compare with", "none needed"
    ),
    "not submitted": Rule(
        "dropped", "an annotation that is cancelled, a draft or discarded", "none needed"
    ),
    "nothing annotated": Rule(
        "dropped", "a record or task without an annotation to use", "none needed"
    ),
    "language": Rule("dropped", "OpenAssistant trees in another language", "`--config.language=`"),
    # kept and noted
    "order without ranks": Rule(
        "kept",
        "a ranking of Argilla 2's client: names without ranks, so ties are lost",
        "compare rows with Argilla",
    ),
    "some not submitted": Rule(
        "kept", "other answers to it were cancelled, drafts or discarded", "none needed"
    ),
    "line ends made LF": Rule(
        "kept", "CR LF or CR in a text: it is LF in the record", "none needed"
    ),
    "byte order mark removed": Rule(
        "kept", "a byte order mark at the start of a text or name", "none needed"
    ),
    "spaces at the seam removed": Rule(
        "kept", "spaces after a text prompt, or around an answer", "none needed"
    ),
    "prompt cut from whole text": Rule(
        "kept", "an answer given as the whole text: its prompt is cut", "none needed"
    ),
    "answer begins with the prompt": Rule(
        "kept", "an answer begins with its prompt and is left so", "look at the row"
    ),
    "one response begins the other": Rule(
        "kept", "a response that another one goes on from", "see whether one is cut"
    ),
    "system made a turn": Rule(
        "kept", "a `system` column: it is the first turn of the prompt", "none needed"
    ),
    "prompt made a turn": Rule(
        "kept", "no system here but in other rows: it is a user's turn too", "none needed"
    ),
    "text parts joined": Rule(
        "kept", "a content of several parts, all of them text", "none needed"
    ),
    "missing value as text": Rule(
        "kept",
        "a CSV cell that says `nan`, `None` or the like: nothing where it may be left out, else "
        "that text",
        "leave it empty",
    ),
    "chat template in text": Rule(
        "kept", "a text with the marks of a chat template", "use the messages themselves"
    ),
    "scores are equal": Rule(
        "kept", "`score_chosen` = `score_rejected`", "leave the row out if it is a tie"
    ),
    "scores say otherwise": Rule("kept", "`score_chosen` < `score_rejected`", "look at the row"),
}
"""Every reason that the readers of tables and exports count a row under, in addition to those of
`schema.RULES`."""
