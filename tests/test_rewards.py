"""Functions of texts: how their arguments are bound, what they may return, and how their mistakes are told."""

from __future__ import annotations

import dataclasses
import decimal
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax.data.storyland import task
from rlhf_jax.rewards import functions
from rlhf_jax.run import config as config_lib
from rlhf_jax.run.ppo import settings

SOURCE = """
import json

def by_name(prompt, response): return len(prompt) * 10 + len(response)
def turned(response, prompt): return len(prompt) * 10 + len(response)
def alone(response): return len(response)
def everything(prompt_id, prompt, response): return float(f"{len(prompt_id)}{len(prompt)}{len(response)}")
def keywords(*, response, prompt_id): return len(prompt_id) * 10 + len(response)
def rest(response, **more): return len(response) + 10 * len(more["prompt"]) + 100 * len(more["prompt_id"])
def legacy(name, answer): return len(name) * 10 + len(answer)
def half_legacy(name, response): return len(name) * 10 + len(response)
def stars(*both): return len(both[0]) * 10 + len(both[1])
def scaled(response, *, each=1.0, most=9.0): return min(most, each * len(response))
def with_default(response, weight=2.0): return weight * len(response)
def needs(response, *, target): return target
def foreign(response, reference): return 0.0
def three(a, b, c): return 0.0
def question(prompt, answer): return 0.0
def nothing(): return 0.0
def breaks(response): return json.loads(response)["score"]
def divides(response):
    return 1 / len(response)
class Strict:
    def __call__(self, response): return len(response)
"""


@pytest.fixture(autouse=True)
def lab(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_judges", None)


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("by_name", 53), ("turned", 53), ("alone", 3), ("everything", 253), ("keywords", 23), ("rest", 253),
        ("legacy", 23), ("half_legacy", 23), ("stars", 23), ("scaled", 3), ("with_default", 6),
    ],
)  # fmt: skip
def test_arguments_are_bound_by_name(name, score):
    judge = settings.judge(f"my_judges:{name}")
    assert judge is not None
    assert judge("id", "abc", "12345") == score


def test_a_function_that_wants_no_prompt_is_called_as_before():
    judge = settings.judge("my_judges:legacy")
    assert judge is not None
    assert judge("id", "abc") == 23


def test_keyword_only_arguments_are_hyperparameters():
    judge = functions.judge(config_lib.fn_spec("my_judges:scaled", each=2.0, most=5.0))
    assert [judge("", text) for text in ("a", "ab", "abc")] == [2.0, 4.0, 5.0]
    config = ConfigDict({"text_reward": "my_judges:scaled", "other": "my_judges:scaled"}).lock()
    config_lib.override(config, {"text_reward.each": "3"})
    assert functions.judge(config.text_reward)("", "ab") == 6.0
    with pytest.raises(ValueError, match="is a value, not a group"):
        config_lib.override(config, {"other.each": "3"})
    with pytest.raises(ValueError, match="no key 'eahc'; did you mean 'each'"):
        config_lib.override(config, {"text_reward.eahc": "3"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "foreign",
            r"wants the argument 'reference', which is not available here. Available: prompt, response, prom",
        ),
        ("three", "wants the argument 'a'"),
        ("question", "wants the argument 'answer'"),
        ("nothing", "takes none of prompt, response, prompt_id"),
        ("needs", "needs a value for target"),
        ("by_nam", "did you mean 'by_name'"),
    ],
)
def test_a_function_that_cannot_be_served_is_refused_at_the_start(name, message):
    with pytest.raises(ValueError, match=message):
        settings.judge(f"my_judges:{name}")


@dataclasses.dataclass
class Verdict:
    score: object
    parts: dict = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("returned", "score"),
    [
        (1, 1.0), (True, 1.0), (np.bool_(False), 0.0), (np.float32(0.5), 0.5), (np.array(2), 2.0),
        (jnp.float32(3), 3.0), (decimal.Decimal("0.25"), 0.25), (Verdict(0.75), 0.75), (Verdict(np.int64(4)), 4.0), 
        (math.inf, math.inf),
        (math.nan, math.nan), (None, math.nan), (Verdict(None), math.nan),
    ],
    ids=repr,
)  # fmt: skip
def test_what_counts_as_a_number(returned, score):
    judged = functions.judge(lambda response: returned)("id", "text")
    assert type(judged) is float
    assert judged == score or (math.isnan(score) and math.isnan(judged))


async def later(response):
    return 1.0


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ("0.5", "the text '0.5'"), (b"1", "the text"), ([0.5], r"a list, \[0.5\]"), ({"score": 1}, "a dict"),
        (np.array([1.0]), r"a ndarray of shape \(1,\)"), (1j, "a complex"), (np.complex64(1j), "a complex64"), (10**400, "a int that is no number"),
        (Verdict("high"), "the text 'high'"), (object, "a type"), (types.SimpleNamespace(value=1), "a SimpleNamespace"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_what_is_no_number_is_told_with_prompt_and_function(returned, shown):
    judge = functions.judge(lambda response: returned)
    with pytest.raises(
        ValueError,
        match=rf"test_rewards:.*lambda.* returned {shown}.*for the prompt 'p/7'.*None to leave",
    ):
        judge("p/7", "text")


def test_an_async_function_is_told():
    with pytest.raises(
        ValueError, match=r"returned a coroutine .it is an async function. for the prompt 'p'"
    ):
        functions.judge(later)("p", "text")


@pytest.mark.parametrize(
    ("name", "response", "told"),
    [
        (
            "divides",
            "",
            r"my_judges:divides failed for the prompt 'p/3': \S*my_judges.py:\d+: ZeroDivisionError",
        ),
        ("breaks", "no json", r"my_judges.py:\d+: JSONDecodeError"),
        ("breaks", "[]", r"my_judges.py:\d+: TypeError"),
    ],
)
def test_an_error_in_the_function_names_its_line_and_the_prompt(name, response, told):
    judge = settings.judge(f"my_judges:{name}")
    assert judge is not None
    with pytest.raises(functions.FunctionFailed, match=told) as failed:
        judge("p/3", response)
    assert "what was saved before is intact" in str(failed.value)
    assert failed.value.exit_status == 1


def test_an_object_that_can_be_called_is_a_function():
    assert functions.judge(__import__("my_judges").Strict())("id", "abc") == 3.0


def test_the_gold_scorer_of_storyland_tells_its_parts():
    judge = functions.judge("rlhf_jax.data.storyland.gold:gold_of")
    judged = judge.judged("test/0", "The text is calm.")
    assert judged.parts["tone"] == 1.0
    assert judge("test/0", "The text is calm.", task("test", 0).prompt) == judged.score
