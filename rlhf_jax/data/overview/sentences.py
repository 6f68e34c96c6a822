"""Writes a sentence for each suspicious number."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_jax.data.overview.numbers import SHORT, AnswerNumbers, Look, PairNumbers, Prompts

FEW = 20
"""Shares of fewer pairs or answers than this are not judged, as they may be chance."""


# Names of columns that are usually part of what the model should read.
_OFTEN_NEEDED = {
    "system",
    "system_prompt",
    "instruction",
    "instructions",
    "input",
    "context",
    "history",
    "question",
    "query",
    "prompt",
    "messages",
    "conversation",
    "conversations",
    "tools",
    "functions",
    "images",
    "image",
    "audio",
    "reasoning",
    "reasoning_content",
    "thinking",
    "chosen",
    "rejected",
    "response",
    "output",
    "answer",
    "completion",
}


def judgements(looks: Mapping[str, Look], aside: Mapping[str, int] | None = None) -> list[str]:
    """A sentence for each suspicious number, the most serious first.

    Each gives the number, its effect on a model, and the remedy.

    Args:
      looks: from `look`.
      aside: columns of the source that no record has a field for, and how many rows have them.
    """
    # Each sentence with its severity, 0 for the most serious.
    found: list[tuple[int, str]] = []
    for name, seen in looks.items():
        if seen.templated:
            found.append(
                (
                    0,
                    f"{seen.templated:,} of {seen.rows:,} {name} hold control tokens of a chat "
                    "template as text: give messages, or strip them",
                )
            )
        found += [(1, text) for text in (_about_pairs(seen.pairs) if seen.pairs else [])]
        found += [
            (2, text) for text in (_about_answers(name, seen.answers) if seen.answers else [])
        ]
        found += [
            (3, text) for text in (_about_prompts(name, seen.prompts) if seen.prompts else [])
        ]
    for column, rows in (aside or {}).items():
        if column.lower() in _OFTEN_NEEDED:
            found.append(
                (
                    1,
                    f"column {column!r} of {rows:,} rows is left aside: if the model should read "
                    "it, map it with --columns",
                )
            )
    # A stable sort: sentences of one severity keep the order in which they were found.
    return [text for _, text in sorted(found, key=lambda item: item[0])]


def _about_pairs(pairs: PairNumbers) -> list[str]:
    found = []
    # Pairs of equal length say nothing about a preference for length.
    differ = pairs.longer + pairs.shorter
    if differ >= FEW and pairs.longer >= 0.7 * differ:
        found.append(
            f"the preferred answer is the longer one in {percent(pairs.longer, differ)} of pairs: "
            "a reward model will learn length; compare its accuracy with that share"
        )
    if differ >= FEW and pairs.shorter >= 0.7 * differ:
        found.append(
            f"the preferred answer is the shorter one in {percent(pairs.shorter, differ)} of "
            "pairs: a reward model will learn to like short answers"
        )
    for name, where in (("trailing", "ends"), ("leading", "begins")):
        best, other = getattr(pairs, name)
        if pairs.strict >= FEW and abs(best - other) >= 0.1 * pairs.strict:
            shares = (
                f"{percent(best, pairs.strict)} of pairs, the other in "
                f"{percent(other, pairs.strict)}"
            )
            found.append(
                f"the preferred answer {where} with a space in {shares}: a reward model will learn "
                "the space; strip both"
            )
    if pairs.equal >= max(1, 0.01 * pairs.strict):
        found.append(
            f"{pairs.equal:,} pairs prefer a text to itself: no model can learn them, and they "
            "lower the accuracy that can be reached"
        )
    if pairs.contradicted >= max(1, 0.01 * pairs.strict):
        found.append(
            f"{pairs.contradicted:,} pairs are preferred the other way round in another row"
        )
    if pairs.strict and pairs.repeated >= max(FEW, 0.05 * pairs.strict):
        found.append(
            f"{pairs.repeated:,} pairs repeat those of another row: they count more than once"
        )
    if pairs.tied >= FEW and pairs.tied > pairs.strict:
        found.append(
            f"{percent(pairs.tied, pairs.tied + pairs.strict)} of pairs tie: only the others teach "
            "anything"
        )
    if not pairs.strict:
        found.append(
            "no pair prefers one answer to another: a reward model cannot be trained on these "
            "rankings"
        )
    return found


def _about_answers(name: str, answers: AnswerNumbers) -> list[str]:
    found, count = [], answers.count
    if answers.empty:
        found.append(f"{answers.empty:,} answers of {name} are empty")
    if answers.begin >= max(2, 0.02 * count):
        found.append(
            f"{percent(answers.begin, count)} of the answers of {name} begin with their prompt: a "
            "model will learn to repeat the question; cut it off"
        )
    elif answers.contain >= max(2, 0.1 * count):
        found.append(
            f"{percent(answers.contain, count)} of the answers of {name} hold their whole prompt"
        )
    if answers.echo >= max(2, 0.1 * count):
        found.append(
            f"{percent(answers.echo, count)} of the answers of {name} repeat the user's last turn"
        )
    # Only a mixture is suspicious: where nearly all answers agree, the space is a convention.
    if count >= FEW and 0.05 * count <= answers.leading <= 0.95 * count:
        found.append(
            f"{percent(answers.leading, count)} of the answers of {name} begin with a space and "
            "the others do not: the same word is two tokens; strip them"
        )
    times, text = answers.commonest
    if count >= FEW and text and len(text) > SHORT and times >= max(5, 0.05 * count):
        found.append(f"one answer is {percent(times, count)} of those of {name}: {_quoted(text)}")
    return found


def _about_prompts(name: str, prompts: Prompts) -> list[str]:
    found = []
    # Several labelers may rank or answer the same prompt, so repeats count in prompt files alone.
    if name == "prompts" and prompts.different < 0.95 * prompts.rows:
        found.append(
            f"{prompts.rows - prompts.different:,} of {prompts.rows:,} prompts are repeats of "
            "another"
        )
    if prompts.different >= FEW and prompts.near >= 0.1 * prompts.different:
        found.append(
            f"{percent(prompts.near, prompts.different)} of the different prompts of {name} nearly "
            "repeat another: they may stand in training and test, and one template may rule the "
            "rest"
        )
    return found


def percent(part: int, whole: int) -> str:
    """A share in per cent, which is 0% only for none and 100% only for all."""
    if not whole or not part:
        return "0%"
    share = 100 * part / whole
    digits = 0 if 10 <= share <= 99 or part == whole else 1
    # Rounding must not turn a few into none or nearly all into all.
    return f"{min(max(share, 0.1), 100 if part == whole else 99.9):.{digits}f}%"


def _quoted(text: str) -> str:
    shown = text if len(text) <= 40 else text[:37] + "..."
    return repr(shown)
