"""No text, however long and unlucky, makes a regular expression of the package run away.

A search that reads a text again from each of its letters takes some seconds for the lengths below, one that tries all
ways to cut it never ends; a linear one takes a hundredth of a second, so the bound has room for a busy machine.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import rlhf_jax
from rlhf_jax.data import curation, schema
from rlhf_jax.data.curation import personal_data
from rlhf_jax.data.storyland import grammar
from rlhf_jax.run import secrets
from rlhf_jax.run.secrets import is_secret, known_secrets, redact

LENGTH = 20_000
SECONDS = 0.5
"""Twenty times what the slowest of these searches takes for `LENGTH` characters."""
MATCHES = 1_000
"""Matches looked for in a text; what runs away does so in the first."""

UNITS = (
    "a", "A", "1", "0", " ", "\n", "\t", "_", "-", ".", ",", "@", "=", "+", "(", ")", "[", "]", "{", "}", "<", ">", "|",
    "/", ":", "\\", "\"", "'", "#", "%", "&", "*", "!", "?", "\u00e9", "\u0301", "\u3000", "\x00", "1 ",
    "1-", "1.", "+1", "a ", "a.", "a@", "a=", "a-", "a_", "aA", ". ", "(1)", "[]", "{a}", "<a>", "a@a.", "f:", "255.",
    "http://a", "://", "://a:b@", "user:pw@", "key=", "_token", "token=", "secret_", "Bearer ", "bearer a", "Human: ",
    "\n\nHuman:",
    "\n\nAssistant:", "-00001-of-00002", "+" + "1" * 40 + " ", "+" + "11111)" * 7, "0170 1234x ", "1 " * 19 + "x ",
    "{\"a\":", "[[", "<|", "<s>", "</s>", "The fox is red. ",
)  # fmt: skip
ENDS = ("", "!x")


def compiled() -> dict[str, re.Pattern[str]]:
    """Every regular expression that stands at the top of a module, alone or in a tuple."""
    found: dict[str, re.Pattern[str]] = {}
    for module in pkgutil.walk_packages(rlhf_jax.__path__, "rlhf_jax."):
        if module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            for i, item in enumerate(value if isinstance(value, tuple | list) else [value]):
                if isinstance(item, re.Pattern):
                    found[f"{module.name}.{name}[{i}]"] = item
    return found


PATTERNS = compiled()
FUNCTIONS: dict[str, Callable[[str], object]] = {
    "redact": redact,
    "is_secret": is_secret,
    "known_secrets": lambda text: known_secrets([text, f"--{text}", f"--config.{text}=x"]),
    "mask_identifiers": curation.mask_identifiers,
    "normalise": curation.normalise,
    "first_turn": curation.first_turn,
    "sentences": grammar.sentences,
    "parse": grammar.parse,
}


def unlucky() -> list[str]:
    """Long texts of one repeated unit each, and the ends that make a match fail."""
    return [unit * (LENGTH // len(unit)) + end for unit in UNITS for end in ENDS]


def slow(run: Callable[[str], object]) -> list[str]:
    """The texts that take longer than `SECONDS`, twice; the first is enough."""

    def taken(text: str) -> float:
        start = time.perf_counter()
        run(text)
        return time.perf_counter() - start

    for text in unlucky():
        # A busy machine may be slow once. A linear search is not slow again.
        if taken(text) > SECONDS and taken(text) > SECONDS:
            return [f"{text[:20]!r} .. {text[-3:]!r}"]
    return []


def test_the_patterns_of_the_package_are_found():
    names = {name.rpartition(".")[2] for name in PATTERNS}
    assert {"_EMAIL[0]", "_PHONE[0]", "_CARD[0]", "_ASSIGNED[0]", "PLAIN_NAME[0]"} <= names


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_every_pattern_searches_in_linear_time(name: str):
    pattern = PATTERNS[name]
    assert (
        slow(
            lambda text: [
                *itertools.islice(pattern.finditer(text), MATCHES),
                pattern.fullmatch(text),
            ]
        )
        == []
    )


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_function_on_texts_takes_linear_time(name: str):
    assert slow(FUNCTIONS[name]) == []


@pytest.mark.parametrize("unit", ["[", "{", '{"a":[', "[[],", '"a",', "1,", "-", "\\u12"])
def test_a_line_of_json_is_read_or_refused_in_linear_time(unit: str, tmp_path: Path):
    def read(text: str) -> None:
        (tmp_path / "x.jsonl").write_text('{"prompt": ' + text)
        with pytest.raises(ValueError):
            schema.read_jsonl(tmp_path / "x.jsonl", schema.Prompt)

    start = time.perf_counter()
    read(unit * (LENGTH // len(unit)))
    assert time.perf_counter() - start < SECONDS


def test_the_guarded_patterns_find_what_the_plain_ones_did():
    """Phone numbers and assignments are written so that they cannot run away; they find no less than before."""
    phone = re.compile(r"(?<![\w.+-])\+\d{1,3}(?:[ .-]?\(?\d{1,5}\)?){2,6}(?![\w]|[.-]\d)")
    assigned = re.compile(r"(?P<key>[\w.-]+)=(?P<value>[^\s&;,)]+)")
    noise = random.Random(0)
    numbers, words = (
        ["+1", "+49 ", "23", "170", "12345", "1234567", " ", "-", " (", ") ", "x", ". "],
        "ab-.=& ;,)_?",
    )
    masked = 0
    for _ in range(20_000):
        text = "".join(noise.choice(numbers) for _ in range(noise.randrange(2, 10)))
        found = [m.span() for m in phone.finditer(text) if sum(map(str.isdigit, m[0])) >= 8]
        ours = [m.span() for m in personal_data._PHONE.finditer(text)]
        assert all(any(a <= start and end <= b for a, b in ours) for start, end in found), text
        masked += len(found)
        text = "".join(noise.choice(words) for _ in range(noise.randrange(2, 12)))
        assert [m.span() for m in assigned.finditer(text)] == [
            m.span() for m in secrets._ASSIGNED.finditer(text)
        ]
    assert masked > 1_000


# -------------------------------------------------------------------------------------------------- a user's own hook


def test_a_hook_that_fails_names_the_record_and_does_not_show_its_text():
    def hook(text: str) -> str:
        return str(1 // 0) if "secret" in text else text

    records = [schema.Prompt("fine", id="a"), schema.Prompt("a secret", id="b")]
    with pytest.raises(
        ValueError, match=r"record 1 \(id b\), on a text of 8 characters: ZeroDivisionError"
    ) as error:
        curation.scrub(records, hook)
    assert "a secret" not in str(error.value)


RUNS_AWAY = """
import re, signal
from rlhf_jax.data import curation, schema
from rlhf_jax.run.signals import told_when_slow

# Stops itself by an error from the timer's own signal after the second word of the watcher.
records = [schema.Prompt("fine", id="a"), schema.Prompt("a" * 60 + "!", id="b")]
with told_when_slow("take it out", seconds=0.2) as begin:
    told = signal.getsignal(signal.SIGALRM)
    def twice(number, frame, count=[0]):
        told(number, frame)
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, twice)
    try:
        curation.scrub(records, lambda text: re.sub(r"(a+)+$", "", text) or "x",
                       on_row=lambda place, r: begin(f"record {place} (id {r.id})"))
    except KeyboardInterrupt:
        print("stopped")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no timers")
def test_a_hook_whose_pattern_runs_away_is_named_while_it_runs():
    done = subprocess.run(
        [sys.executable, "-c", RUNS_AWAY], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "stopped\n"
    assert done.stderr.splitlines() == [
        f"record 1 (id b) has taken {taken} s and is not done: take it out"
        for taken in ("0.2", "0.4")
    ]
