"""Turns labelers' few-shot instructions into demonstrations."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

from rlhf_jax.data.schema import Demonstration

FEW_SHOT = "{query}\n{response}"
"""How a query and its response are written below an instruction."""


def few_shot_examples(
    instruction: str,
    pairs: Sequence[tuple[str, str]],
    *,
    template: str = FEW_SHOT,
    **labels: str | None,
) -> list[Demonstration]:
    r"""K query/response pairs of one instruction as K demonstrations.

    The prompt of each has the other K - 1 pairs in its context.

    Args:
      instruction: the task that the labeler describes.
      pairs: the K queries and responses, at least one.
      template: the format of a pair; it ends in ``{response}``.
      **labels: further fields of the records (`source`, `use_case`, `labeler`, `user`, ...); with
        `id` the k-th record gets the id ``<id>/<k>``.

    Source: Ouyang et al. 2022, appendix A.1.

    >>> few_shot_examples("Say the opposite.", [("up", "down"), ("hot", "cold")])[1].prompt
    'Say the opposite.\n\nup\ndown\n\nhot'
    """
    order = range(len(pairs))
    chosen = [(target, [k for k in order if k != target]) for target in order]
    return _few_shot(instruction, pairs, chosen, template, labels)


def few_shot_subsets(
    instruction: str, pairs: Sequence[tuple[str, str]], *, count: int, shots: int, seed: int = 0,
    template: str = FEW_SHOT, **labels: str | None,
) -> list[Demonstration]:  # fmt: skip
    """Draws `count` different demonstrations of one instruction.

    Each is a query after a random subset of `shots` other pairs.

    Args:
      instruction: the task that the labeler describes.
      pairs: the K queries and responses.
      count: number of demonstrations; at most K times the number of subsets, so that all differ.
      shots: pairs in the context, 0 to K - 1, in the order of `pairs`.
      seed: of the choice.
      template: the format of a pair; it ends in ``{response}``.
      **labels: as in `few_shot_examples`.

    Source: Ouyang et al. 2022, appendix A.3 (further examples from different subsets; how many is
      not given).
    """
    k = len(pairs)
    possible = k * math.comb(k - 1, shots) if 0 <= shots < k else 0
    if not 0 <= count <= possible:
        raise ValueError(
            f"count={count} with shots={shots}: {k} pairs give {possible} different examples; "
            "lower count or shots"
        )
    noise, chosen = random.Random(seed), dict[tuple[int, ...], None]()
    # When most of the possible examples are wanted, rejecting repeats would take long, so they are
    # drawn from the list of all.
    if 2 * count > possible:
        every = [
            (t, *s)
            for t in range(k)
            for s in itertools.combinations([j for j in range(k) if j != t], shots)
        ]
        chosen.update(dict.fromkeys(noise.sample(every, count)))
    # When few of the possible examples are wanted, repeats are rare and simply drawn again.
    while len(chosen) < count:
        target = noise.randrange(k)
        # Sorted, so that the same subset drawn in another order counts as a repeat.
        chosen[target, *sorted(noise.sample([j for j in range(k) if j != target], shots))] = None
    return _few_shot(
        instruction, pairs, [(target, list(rest)) for target, *rest in chosen], template, labels
    )


def _few_shot(
    instruction: str,
    pairs: Sequence[tuple[str, str]],
    chosen: Sequence[tuple[int, list[int]]],
    template: str,
    labels: Mapping[str, str | None],
) -> list[Demonstration]:
    head, marker, tail = template.partition("{response}")
    if not marker or tail.strip() or "{query}" not in head:
        raise ValueError(f"template={template!r} must hold {{query}} and end in {{response}}")
    if not pairs:
        raise ValueError("pairs is empty: give at least one query and its response")
    name = labels.get("id")
    examples = []
    # `replace` and not `format`: the template may contain other braces.
    for place, (target, context) in enumerate(chosen):
        shown = [head.replace("{query}", pairs[j][0]) + pairs[j][1] for j in context]
        # The template's text between query and response ends the prompt, without its trailing
        # space.
        asked = head.replace("{query}", pairs[target][0]).rstrip()
        fields = {**labels, "id": None if name is None else f"{name}/{place}"}
        examples.append(
            Demonstration("\n\n".join([instruction, *shown, asked]), pairs[target][1], **fields)
        )
    return examples
