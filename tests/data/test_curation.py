"""De-duplication, caps, splits, leaks, personal data, languages, few-shot examples and the tables of a data set."""

from __future__ import annotations

import collections
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import curation
from rlhf_jax.data.curation import mask_identifiers, tables
from rlhf_jax.data.schema import Conversation, Demonstration, Message, PlainText, Prompt, Ranking


class Typed(Prompt, frozen=True):
    """A prompt that says who typed it."""

    user: str | None = None
    organization: str | None = None


class Talk(Prompt, frozen=True):
    """A prompt of several turns."""

    prompt: Conversation  # pyright: ignore[reportIncompatibleVariableOverride]


CHAT = (Message("user", "Hi there"), Message("assistant", "Hello."), Message("user", "Tell a joke"))
FLAT = "Human: Hi  THERE\n\nAssistant: Yes?\n\nHuman: What is new?\n\nAssistant:"


def typed(count: int, users: int = 7) -> list[Typed]:
    return [
        Typed(f"prompt {i}", user=f"u{i % users}", organization=f"o{i % users % 3}")
        for i in range(count)
    ]


# ------------------------------------------------------------------------------------------------------------ texts


def test_text_and_first_turn_of_every_kind_of_prompt():
    assert curation.prompt_text(Prompt("a  B")) == "a  B"
    assert curation.prompt_text(CHAT).split("\n\n") == [
        "user: Hi there",
        "assistant: Hello.",
        "user: Tell a joke",
    ]
    assert curation.prompt_text(PlainText("a story")) == "a story"
    turns = [
        curation.first_turn(x)
        for x in (CHAT, Prompt(FLAT), Prompt("plain"), (Message("system", "be kind"),))
    ]
    assert turns == ["Hi there", "Hi  THERE", "plain", "system: be kind"]
    assert curation.normalise(curation.first_turn(FLAT)) == curation.normalise(
        curation.first_turn(CHAT)
    )
    assert curation.normalise("\uff21 \u00c9\tb\n") == curation.normalise("a e\u0301 B")


# --------------------------------------------------------------------------------------------------- de-duplication


@given(st.lists(st.text("aB \n", max_size=6), max_size=30), st.integers(1, 5))
def test_no_two_kept_prompts_share_the_prefix_and_each_dropped_one_shares_it_with_an_earlier(
    texts, length
):
    """Against the plain definition, pair by pair."""
    kept, report = curation.drop_long_common_prefix(texts, prefix_length=length)
    prefix = [curation.normalise(text)[:length] for text in texts]
    assert kept == [text for i, text in enumerate(texts) if prefix[i] not in prefix[:i]]
    assert report.rows == len(texts)
    assert report.kept + sum(report.dropped.values()) == report.rows


def test_what_was_dropped_is_counted_by_reason_without_its_text():
    prompts = [
        Prompt("Summarise this: cats"),
        Prompt("summarise  this: dogs"),
        Prompt("Summarise this: CATS"),
    ]
    kept, report = curation.drop_long_common_prefix(prompts, prefix_length=12)
    assert kept == prompts[:1]
    assert report.dropped == {"long common prefix": 1, "same prompt": 1}
    assert "prompt 1, which begins as prompt 0" in report.summary()
    assert "dogs" not in report.summary()
    assert len(curation.drop_long_common_prefix(prompts, prefix_length=17)[0]) == 2
    with pytest.raises(ValueError, match="prefix_length=0 must be 1 or more"):
        curation.drop_long_common_prefix(prompts, prefix_length=0)


# ----------------------------------------------------------------------------------------------------- cap and split


def test_cap_keeps_the_first_of_each_user_and_all_that_name_none():
    records = [*typed(40, users=2), *[Typed("nobody's") for _ in range(30)]]
    kept, report = curation.cap_per_user(records, 5)
    assert collections.Counter(r.user for r in kept) == {"u0": 5, "u1": 5, None: 30}
    assert kept[:10] == records[:10]
    assert (report.dropped, report.noted) == (
        {"more than 5 of one user": 30},
        {"names no user": 30},
    )
    assert len(curation.cap_per_user(typed(700, users=3), key="organization")[0]) == 3 * 200
    assert len(curation.cap_per_user(typed(12), 1, key=lambda r: r.prompt[-1])[0]) == 10
    # A record of the schema as it is has no such field at all: nothing is capped.
    assert len(curation.cap_per_user([Prompt("a"), Prompt("b")], 1)[0]) == 2
    with pytest.raises(ValueError, match="limit=0"):
        curation.cap_per_user(records, 0)


FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=40), st.integers(0, 5))
def test_no_user_is_in_two_splits_and_no_record_is_lost(pairs, seed):
    records = [Typed(f"p{p}", user=f"u{u}" if u else None) for p, u in pairs]
    parts = curation.split_by(records, fractions=FRACTIONS, seed=seed)
    assert collections.Counter(r for part in parts.values() for r in part) == collections.Counter(
        records
    )
    for group in (lambda r: r.user, lambda r: r.prompt if r.user is None else None):
        where = [{group(r) for r in part} - {None} for part in parts.values()]
        assert sum(map(len, where)) == len(set.union(*where))


def test_sizes_follow_the_fractions_and_the_seed_moves_users():
    records = typed(20_000, users=5_000)
    parts = curation.split_by(records, fractions=FRACTIONS)
    for name, share in FRACTIONS.items():
        # 4 standard deviations of the number of 5,000 users that fall into the part.
        assert abs(len(parts[name]) / 4 - 5_000 * share) < 4 * math.sqrt(
            5_000 * share * (1 - share)
        )
    assert curation.split_by(records, fractions=FRACTIONS) == parts
    assert curation.split_by(records, fractions=FRACTIONS, seed=1) != parts
    more = curation.split_by([*records, *typed(50)], fractions=FRACTIONS)
    assert all(more[name][: len(part)] == part for name, part in parts.items())


def test_split_by_organization_by_conversation_and_by_a_function():
    by_organization = curation.split_by(
        typed(60), key="organization", fractions={"a": 0.5, "b": 0.5}
    )
    assert {r.organization for r in by_organization["a"]}.isdisjoint(
        r.organization for r in by_organization["b"]
    )
    for seed in range(8):
        talks = [Prompt(FLAT), Talk(CHAT), "other", Prompt("hi there")]
        parts = curation.split_by(
            talks, key="conversation", fractions={"a": 0.5, "b": 0.5}, seed=seed
        )
        assert (
            max(
                sum(talk in part for talk in (talks[0], talks[1], talks[3]))
                for part in parts.values()
            )
            == 3
        )
        parity = curation.split_by(
            list(range(9)), key=lambda n: str(n % 2), fractions={"a": 0.5, "b": 0.5}, seed=seed
        )
        assert all(
            len({n % 2 for n in part}) <= 1 or not other for part, other in (parity.values(),)
        )
    assert curation.split_by(["x"], key="conversation", fractions={"a": 0.0, "b": 1.0}) == {
        "a": [],
        "b": ["x"],
    }
    with pytest.raises(ValueError, match=r"fractions=.* add up to 1, not 0\.9"):
        curation.split_by([], fractions={"train": 0.9})


# ------------------------------------------------------------------------------------------------------------- leaks


def test_a_prompt_in_two_splits_is_found_and_both_places_are_named():
    splits = {
        "train": [Prompt("one"), Demonstration("Write a  POEM", "roses", id="d7"), Prompt(FLAT)],
        "validation": [Ranking("two", ("a", "b"), (0, 1)), Prompt("write a poem ")],
        "test": [Prompt("three"), Prompt("four"), Talk(CHAT), PlainText("ONE")],
    }
    leaks = curation.leakage(splits)
    assert [(leak.kind, leak.places) for leak in leaks] == [
        ("prompt", (("train", 1), ("validation", 1))),
        ("first human turn", (("train", 2), ("test", 2))),
        ("prompt", (("train", 0), ("test", 3))),
    ]
    assert (
        str(leaks[0]) == "the same prompt is in train[1] (id d7) and validation[1]: 'write a poem'"
    )
    with pytest.raises(
        ValueError, match=r"3 records .*\n.*train\[1\] \(id d7\) and validation\[1\]"
    ):
        curation.check_leakage(splits)
    held_out = [*splits["validation"], *splits["test"]]
    train, report = curation.without_leaks(splits["train"], held_out)
    assert (train, report.dropped) == ([], {"also held out": 3})
    curation.check_leakage({"train": train, "held out": held_out})
    curation.check_leakage({"train": [Prompt("a"), Prompt("a")], "test": [Prompt("b")]})
    assert curation.without_leaks([Prompt("a")], [])[0] == [Prompt("a")]


@given(
    st.lists(st.text("ab", max_size=2), max_size=8), st.lists(st.text("ab", max_size=2), max_size=8)
)
def test_leaks_are_the_intersection(train, test):
    leaks = curation.leakage({"train": train, "test": test})
    assert [leak.places[1][1] for leak in leaks] == [
        i for i, text in enumerate(test) if text in train
    ]


# ----------------------------------------------------------------------------------------------------- personal data


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Write to Ann.Lee+x@mail.example.co.uk!", "Write to [EMAIL]!"),
        ("call +49 170 1234567 or +1 (555) 555-5555", "call [PHONE] or [PHONE]"),
        ("(512) 555-2994, 555-123-4567, 1-800-222-1222.", "[PHONE], [PHONE], [PHONE]."),
        ("mobile 0170 1234567", "mobile [PHONE]"),
        ("card 4111 1111 1111 1111, 5500-0000-0000-0004", "card [CARD], [CARD]"),
        ("ping 192.168.0.1 and 2001:db8:0:0:0:0:2:1.", "ping [IP] and [IP]."),
    ],
)
def test_identifiers_are_masked(text: str, clean: str):
    assert mask_identifiers(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "In 1999-2004 it grew by 12,345,678.90 or +13.5%", "4111 1111 1111 1112 fails the check sum",
        "version 1.2.3.4.5 of 2023-01-15 10:30", "5 + 3 - 2 = 6; 100-200 people; 3.14159265358979",
        "x@y and @name, 256.1.1.1", "12:30:45",
    ],
)  # fmt: skip
def test_other_numbers_stay(text: str):
    assert mask_identifiers(text) == text


def test_the_hook_sees_every_text_and_may_leave_records_out():
    hook = lambda text: None if "secret" in text else text.replace("Ann", "[NAME]")
    records = [
        Demonstration("Ann asks", "Ann, yes", labeler="Ann"), Ranking("q", ("to Ann", "b"), (0, 1)), Prompt("plain"),
        Talk((Message("user", "I am Ann"), Message("assistant", "Hi"))), Prompt("a secret"), PlainText("Ann ran"),
        Ranking("q", ("x", "secret"), (0, 1)),
    ]  # fmt: skip
    kept, report = curation.scrub(records, hook)
    assert kept == [
        Demonstration("[NAME] asks", "[NAME], yes", labeler="Ann"), Ranking("q", ("to [NAME]", "b"), (0, 1)),
        Prompt("plain"), Talk((Message("user", "I am [NAME]"), Message("assistant", "Hi"))), PlainText("[NAME] ran"),
    ]  # fmt: skip
    assert (report.rows, report.kept, report.dropped) == (7, 5, {"left out by the hook": 2})
    assert report.noted == {"changed by the hook": 4}


def test_a_hook_that_empties_a_text_or_returns_something_else():
    kept, report = curation.scrub(
        [Prompt("Ann"), Demonstration("a", "")], lambda text: text.replace("Ann", " ")
    )
    assert (kept, report.dropped) == ([Demonstration("a", "")], {"nothing left of a text": 1})
    with pytest.raises(ValueError, match="the hook gave a bool for field 'prompt'"):
        curation.scrub([Prompt("a")], lambda text: True)  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------------------- languages


def test_language_share_by_a_function_and_by_py3langid(monkeypatch):
    share = curation.language_share(["a", "bb", "cc", "d", "eee"], lambda text: f"l{len(text)}")
    assert list(share.items()) == [("l1", 0.4), ("l2", 0.4), ("l3", 0.2)]
    assert curation.language_share([], str) == {}
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'rlhf_jax\[languages\]'"):
        curation.language_share(["a"])


def test_py3langid_knows_english_from_german():
    pytest.importorskip("py3langid")
    english = [
        "What is the capital of France, and why is it so large?",
        "Please write a short story about a cat.",
    ]
    german = ["Was ist die Hauptstadt von Frankreich, und warum ist sie so gross?"]
    assert curation.language_share(english + german) == {"en": 2 / 3, "de": 1 / 3}


# ---------------------------------------------------------------------------------------------------------- few-shot

PAIRS = [("q0", "r0"), ("q1", "r1"), ("q2", "r2"), ("q3", "r3")]


def test_k_pairs_give_k_examples_each_with_the_other_k_minus_1():
    examples = curation.few_shot_examples(
        "Do it.", PAIRS, id="t", source="labeler", use_case="other"
    )
    assert [e.response for e in examples] == ["r0", "r1", "r2", "r3"]
    assert [e.id for e in examples] == ["t/0", "t/1", "t/2", "t/3"]
    assert examples[2].prompt == "Do it.\n\nq0\nr0\n\nq1\nr1\n\nq3\nr3\n\nq2"
    for k, example in enumerate(examples):
        assert f"r{k}" not in example.prompt
        assert all(f"q{j}\nr{j}" in example.prompt for j in range(4) if j != k)
        assert (example.source, example.use_case) == ("labeler", "other")
    assert curation.few_shot_examples("Do it.", PAIRS[:1])[0] == Demonstration("Do it.\n\nq0", "r0")
    asked = curation.few_shot_examples("I", PAIRS[:2], template="In: {query}\nOut: {response}")[
        0
    ].prompt
    assert asked == "I\n\nIn: q1\nOut: r1\n\nIn: q0\nOut:"
    for pairs, template in (
        ([], "{query} {response}"),
        (PAIRS, "{query}"),
        (PAIRS, "{response} {query}"),
    ):
        with pytest.raises(
            ValueError, match=r"pairs is empty|must hold \{query\} and end in \{response\}"
        ):
            curation.few_shot_examples("Do it.", pairs, template=template)


@given(st.integers(1, 5), st.data())
def test_subsets_are_all_different_and_come_from_the_seed(k, data):
    pairs = [(f"q{i}", f"r{i}") for i in range(k)]
    shots = data.draw(st.integers(0, k - 1))
    possible = k * math.comb(k - 1, shots)
    count = data.draw(st.integers(0, possible))
    examples = curation.few_shot_subsets("I", pairs, count=count, shots=shots, seed=3)
    assert len({(e.prompt, e.response) for e in examples}) == len(examples) == count
    for example in examples:
        context = example.prompt.split("\n\n")[1:-1]
        assert len(context) == shots
        assert context == sorted(context)
        assert example.response not in example.prompt
    assert examples == curation.few_shot_subsets("I", pairs, count=count, shots=shots, seed=3)
    with pytest.raises(ValueError, match=rf"{k} pairs give {possible} different examples"):
        curation.few_shot_subsets("I", pairs, count=possible + 1, shots=shots)
    with pytest.raises(ValueError, match=f"shots={k}"):
        curation.few_shot_subsets("I", pairs, count=1, shots=k)


def test_another_seed_gives_other_subsets():
    draws = [curation.few_shot_subsets("I", PAIRS, count=4, shots=2, seed=seed) for seed in (0, 1)]
    assert draws[0] != draws[1]


# ------------------------------------------------------------------------------------------------------------ tables

SPLITS = {
    "train": [
        Demonstration("one two", "a b c d", source="labeler", use_case="chat", labeler="ann"),
        Demonstration("one two three", "a b", source="customer", use_case="rewrite", labeler="bob"),
        Demonstration("one", "a", source="customer", use_case="chat", labeler="bob"),
        Ranking("x y", ("p", "q", "r"), (0, 1, 1), source="customer", labeler="ann", use_case="chat"),
        Ranking("x y", ("p", "q", "r", "s"), (0, 1, -1, 2), source="customer", use_case="chat"),
        Typed("lone", user="u1"), Typed("lone wolf", user="u1"), Typed("wolf", user="u2"), Typed("fox"),
        PlainText("a story", source="books"),
    ],
    "test": [Prompt("last one here", source="customer")],
}  # fmt: skip


def test_the_tables_hold_the_numbers():
    """Counted by hand from the records above; the spaces between columns aside."""
    text = curation.data_tables(SPLITS)
    tables = {
        block.split("\n")[0]: block.split("\n")[1:] for block in text.rstrip("\n").split("\n\n")
    }
    cells = {title: [" ".join(line.split()) for line in lines] for title, lines in tables.items()}
    assert cells["Sizes: records by kind, source and split"] == [
        "train test all",
        "demonstrations, customer 2 0 2", "demonstrations, labeler 1 0 1", "demonstrations 3 0 3",
        "rankings, customer 2 0 2",
        "prompts, (no source) 4 0 4", "prompts, customer 0 1 1", "prompts 4 1 5",
        "documents, books 1 0 1",
    ]  # fmt: skip
    assert cells["Use cases: share of each kind"] == [
        "demonstrations rankings prompts records", "(none) 0.0% 0.0% 100.0% 5", "chat 66.7% 100.0% 0.0% 4",
        "rewrite 33.3% 0.0% 0.0% 1",
    ]  # fmt: skip
    assert cells["Records per user"] == [
        "users mean median most without user",
        "prompts, train 2 1.50 1.5 2 1",
    ]
    assert "Records per organization: no record names one" in tables
    header = "n mean std min 25% 50% 75% max"
    assert cells["Prompts: words by kind and split"] == [
        header, "demonstrations, train 3 2 1 1 2 2 2 3", "rankings, train 2 2 0 2 2 2 2 2",
        "prompts, train 4 1 0 1 1 1 1 2", "prompts, test 1 3 0 3 3 3 3 3",
    ]  # fmt: skip
    assert cells["Demonstrations: words by source"] == [
        header, "customer 2 2 1 1 1 2 2 2", "labeler 1 4 0 4 4 4 4 4",
    ]  # fmt: skip
    assert cells["Demonstrations: words by use case"] == [
        header,
        "chat 2 2 2 1 2 2 3 4",
        "rewrite 1 2 0 2 2 2 2 2",
    ]
    # K = 3: (best, tied second, tied second) is two pairs and a tie. The four with one unranked is K = 3 too.
    assert cells["Rankings: responses ranked, and their pairs"] == [
        "prompts share pairs tied", "K = 3 2 100.0% 5 1", "all 2 100.0% 5 1",
    ]  # fmt: skip
    assert cells["Labelers, and records of each"] == [
        "labelers least median most unnamed", "demonstrations 2 1 1.5 2 0", "rankings 1 1 1 1 1",
    ]  # fmt: skip


def test_tokens_and_languages_where_they_can_be_had():
    text = curation.data_tables(
        SPLITS, tokens=len, identify=lambda text: "fi" if "wolf" in text else "en"
    )
    assert "Prompts: tokens by kind and split" in text
    assert "Languages of 10 of the 10 prompts\n    share\nen  80.0%\nfi  20.0%" in text
    assert "Languages" not in curation.data_tables(SPLITS)


def test_no_table_is_wider_than_a_screen_or_longer_than_its_most_rows():
    """Long and many names: cut, and summed up as others; every record is still counted."""
    records = [
        Demonstration("p", "r", source="s" * 150 + str(i), use_case=f"case {i:02d}")
        for i in range(40)
    ]
    text = curation.data_tables({f"split number {i}": records for i in range(4)})
    assert max(map(len, text.split("\n"))) <= 120
    assert "(26 others)" in text
    assert max(len(block.split("\n")) for block in text.split("\n\n")) <= tables.MOST_ROWS + 5
    assert (
        " ".join(text.split("\n\n")[0].split("\n")[-1].split()) == "demonstrations 40 40 40 40 160"
    )


def test_quantiles_are_those_of_numpy():
    numpy = pytest.importorskip("numpy")
    lengths = [3, 9, 4, 11, 2, 5, 8]
    n, mean, std, least, *middle, most = tables._quantiles(lengths)
    assert (n, least, most) == (7, 2, 11)
    assert (mean, std) == (f"{numpy.mean(lengths):.0f}", f"{numpy.std(lengths, ddof=1):.0f}")
    assert middle == [f"{q:.0f}" for q in numpy.percentile(lengths, [25, 50, 75])]


def test_tables_of_nothing_but_documents():
    text = curation.data_tables({"train": [PlainText("a")]})
    assert text.startswith("Sizes")
    assert "Rankings" not in text
