"""Simulated labelers who write demonstrations and rank, each with its own preferences and noise.

A labeler judges the parts of the gold score with its own weights, a small length bias and noise,
and ties two responses of nearly equal worth. Held-out labelers are drawn from the same population
and never label training data (Ouyang et al. 2022, section 3.4).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

from rlhf_jax.data.storyland.answers import answer, flawed_answer
from rlhf_jax.data.storyland.gold import WEIGHTS, gold
from rlhf_jax.data.storyland.grammar import NAMES, pick, sentences
from rlhf_jax.data.storyland.tasks import Task


@dataclasses.dataclass(frozen=True)
class Labeler:
    """One simulated person.

    Attributes:
      name: ``train-0``, ``heldout-1``, ...
      group: train or heldout.
      noise: standard deviation of a judgement, in gold points.
      tie: responses are tied when their perceived worth differs by at most this.
      length_bias: gold points for doubling the length.
      taste: this labeler's weight of instruction, constraint and facts, relative to the gold
        scorer's.
      carelessness: probability that a demonstration is flawed.
    """

    name: str
    group: str
    noise: float
    tie: float
    length_bias: float
    taste: dict[str, float]
    carelessness: float

    def rank(self, task: Task, responses: Sequence[str], *, place: object) -> list[int]:
        """Ranks of the responses as in a file: 1 is best, equal ranks are ties.

        The judgement of a response is a pure function of the labeler, `place` (such as the prompt's
        id) and its text. It does not depend on the order or on the other responses, and equal texts
        are always tied.
        """
        # Each distinct text is judged once.
        worth = {
            response: self._worth(task, response) + self._slip(response, place)
            for response in set(responses)
        }
        order = sorted(set(worth.values()), reverse=True)
        rank_of, rank, leader = {}, 1, order[0]
        for value in order:
            # Compared with the best of the tie, not the one before, so that ties cannot chain.
            if leader - value > self.tie:
                rank, leader = rank + 1, value
            rank_of[value] = rank
        return [rank_of[worth[response]] for response in responses]

    def demonstrate(self, task: Task, *, place: object) -> str:
        """A demonstration: an honest answer, or with probability `carelessness` a flawed one.

        Half of the flaws are in content (a forgotten constraint, a wrong fact, a rude remark). The
        others are in form: chatter around an honest answer, or a sentence without its capital,
        which people write inadvertently and dislike when they rank.
        """
        # The stream depends on names alone, so that more labelers or prompts change no
        # demonstration.
        rng = random.Random(f"{self.name}/demonstration/{place}")
        if rng.random() >= self.carelessness:
            return answer(task, rng)
        flaw = rng.random()
        if flaw < 0.5:
            return flawed_answer(task, rng)
        return (_with_chatter if flaw < 0.7 else _without_capital)(answer(task, rng), rng)

    def _slip(self, response: str, place: object) -> float:
        return self.noise * _normal(random.Random(f"{self.name}/{place}/{response}"))

    def _worth(self, task: Task, response: str) -> float:
        judged = gold(task, response)
        # The labeler's own weights shift the gold score; a part of 0.5 shifts nothing.
        shift = sum(
            WEIGHTS[part] * (self.taste[part] - 1) * (value - 0.5)
            for part, value in judged.parts.items()
            if part in WEIGHTS
        )
        return judged.score + shift + self.length_bias * math.log2(1 + len(response.split()))


_CHATTER = ("Thank you, {name}.", "This one is hard.", "Same as last week.", "Ask {name} too.")


def _with_chatter(text: str, rng: random.Random) -> str:
    parts = [text, str(pick(rng, _CHATTER)).format(name=pick(rng, NAMES))]
    return " ".join(parts if rng.random() < 0.5 else parts[::-1])


def _without_capital(text: str, rng: random.Random) -> str:
    parts = sentences(text)
    place = int(rng.random() * len(parts))
    parts[place] = parts[place][0].lower() + parts[place][1:]
    return " ".join(parts)


def _normal(rng: random.Random) -> float:
    """A standard normal sample by the Box-Muller transform.

    It uses `random()` alone, because Python guarantees its stream across versions.
    """
    # `1 - random()` is never 0, whose logarithm would not be finite.
    return math.sqrt(-2 * math.log(1 - rng.random())) * math.cos(2 * math.pi * rng.random())


def labelers(group: str, count: int, *, seed: int = 0) -> list[Labeler]:
    """The labelers of a group, ``train`` or ``heldout``, drawn from one population.

    Raises:
      ValueError: `group` is neither.
    """
    if group not in ("train", "heldout"):
        raise ValueError(f"group={group!r} is unknown: choose train or heldout")
    return [
        _labeler(group, index, random.Random(f"labeler/{seed}/{group}/{index}"))
        for index in range(count)
    ]


def _labeler(group: str, index: int, rng: random.Random) -> Labeler:
    between = lambda low, high: low + (high - low) * rng.random()
    # The order of the draws is a part of each labeler: another order would make other people.
    return Labeler(
        name=f"{group}-{index}",
        group=group,
        noise=between(0.08, 0.16),
        tie=between(0.04, 0.1),
        length_bias=between(-0.01, 0.03),
        taste={part: between(0.7, 1.3) for part in WEIGHTS},
        carelessness=between(0.18, 0.46),
    )
