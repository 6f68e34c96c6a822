"""What a preview shows is what the stages encode, and nothing in the data can act on the terminal or the page."""

from __future__ import annotations

import io
import re

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from experiments import prepare_data
from rlhf_jax.data import preview, preview_page, text
from rlhf_jax.data.schema import Demonstration, Message, PlainText, Prompt, Ranking, write_jsonl
from rlhf_jax.run import data_flags, look, rankings
from rlhf_jax.run.cli import main
from rlhf_jax.run.config import load_config
from tests.html_page import Page

TEMPLATE = (
    "{% for m in messages %}{{ '<|go|>' + m['role'] + '\n' + m['content'] + '<|stop|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|go|>assistant\n' }}{% endif %}"
)
TALK = (
    Message("system", "Be brief."), Message("user", "Name a tree <|go|>"), Message("assistant", "An elm."),
    Message("user", "And a \u4e2d\u6587 one\nwith caf\u00e9?"),
)  # fmt: skip
HOSTILE = "\x1b[31m\x07 \u202egnol\u2066 \x00<script>alert(1)</script>&amp;\u200b'\"</pre>\x9b2J"
RECORDS = [
    Demonstration(TALK, "A \u6843 tree."), Demonstration("Why?", "Because."),
    Ranking(TALK, ("Oak", "Ash \u6843", "Fir"), (1, 0, -1)), Ranking("Say", ("a\n", "b"), (0, 1)),
    Prompt("Why?"), Prompt(TALK), PlainText("Once.\nTwice."),
]  # fmt: skip


@pytest.fixture(scope="module")
def tok() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, so that most characters beyond ASCII are several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(alphabet)}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", additional_special_tokens=["<|go|>", "<|stop|>"],
        chat_template=TEMPLATE,
    )  # fmt: skip


def ids(part: preview.Part) -> list[int]:
    return [i for piece in part.pieces for i in piece.ids]


def trained(part: preview.Part) -> list[bool]:
    return ["trained" in piece.role for piece in part.pieces for _ in piece.ids]


def test_texts_show_every_answer_that_is_trained_on():
    record = Demonstration(TALK, "A tree.")
    for turns, wanted in (("all", ["assistant", "response"]), ("last", ["response"])):
        (row,) = preview.rows([record], assistant_turns=turns)
        assert [p.name for p in row.parts if "trained on" in p.facts] == wanted
        assert [p.name for p in row.parts if p.pieces[0].role == "trained"] == wanted
    (row,) = preview.rows([Prompt(TALK)])
    assert {piece.role for part in row.parts for piece in part.pieces} == {"read"}


def test_demonstrations_show_the_ids_and_the_mask_that_sft_trains_on(tok):
    for turns in ("all", "last"):
        for record, row in zip(
            RECORDS[:2], preview.rows(RECORDS[:2], tok, assistant_turns=turns), strict=True
        ):
            encoded, mask = text.encode_demonstration(
                tok, record.prompt, record.response, assistant_turns=turns
            )
            assert ids(row.parts[0]) == list(encoded)
            assert trained(row.parts[0]) == list(mask)
            assert f"{len(encoded)} tokens, {sum(mask)} trained on" in row.parts[0].facts


def test_rankings_show_what_the_reward_model_reads_best_first_and_where_it_scores(tok):
    for record, row in zip(RECORDS[2:4], preview.rows(RECORDS[2:4], tok), strict=True):
        prompt, responses, ranks = rankings.encode_ranking(tok, record)
        assert ids(row.parts[0]) == list(prompt)
        order = [int(part.name.split()[1]) - 1 for part in row.parts[1:]]
        assert [ranks[k] for k in order] == sorted(ranks, key=lambda rank: (rank < 0, rank))
        for k, part in zip(order, row.parts[1:], strict=True):
            seen = ranks[k] >= 0
            assert ids(part) == (list(responses[k]) if seen else [])
            assert not seen or part.pieces[-1] == preview.Piece("score", "note")


def test_prompts_show_what_ends_a_response_and_documents_their_targets(tok):
    one, talk, document = preview.rows(RECORDS[4:], tok)
    assert ids(one.parts[0]) == text.encode_prompt(tok, "Why?")
    assert one.parts[0].facts.endswith("a response ends with <|end|>")
    assert ids(talk.parts[0]) == text.encode_prompt(tok, TALK)
    assert "<|end|> or <|stop|>" in talk.parts[0].facts
    encoded = text.encode_document(tok, "Once.\nTwice.", eos_id=tok.eos_token_id)
    assert ids(document.parts[0]) == encoded
    assert trained(document.parts[0]) == [False] + [True] * (len(encoded) - 1)


def test_pieces_read_as_the_text_and_only_control_tokens_are_special(tok):
    (row,) = preview.rows(RECORDS[:1], tok)
    said = "".join(piece.text for piece in row.parts[0].pieces)
    assert said == tok.decode(ids(row.parts[0]))
    assert "\ufffd" not in said
    special = [piece.text for piece in row.parts[0].pieces if "special" in piece.role]
    assert special == ["<|go|>", "<|stop|>"] * 5  # the user's own <|go|> is letters
    assert any(piece.text == "\u6843" and len(piece.ids) == 3 for piece in row.parts[0].pieces)


def test_spaces_that_a_decoder_drops_at_the_beginning_are_shown():
    """SentencePiece writes a word with its space; decoding the word alone loses it."""
    vocabulary = {"</s>": 0, "<unk>": 1, "\u2581An": 2, "\u2581elm": 3, ".": 4, "\u2581": 5}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>"
    )
    pieces = preview._Tokens(tok, "all")._pieces([2, 3, 4, 3, 0])
    assert "".join(piece.text for piece in pieces) == "An elm. elm</s>"


def test_long_rows_are_cut_in_the_middle_and_say_how_much(tok):
    (row,) = preview.rows([Demonstration("p" * 5_000, "r" * 5_000)], tok)
    (note,) = [piece for piece in row.parts[0].pieces if piece.role == "note"]
    shown = len(ids(row.parts[0]))
    assert shown == preview.HEAD + preview.TAIL
    assert note.text == f"{10_003 - shown:,} tokens, {5_001 - preview.TAIL:,} trained on"
    assert len(preview.as_text(preview.rows([Prompt("p" * 10**6)]), tokens=False)) < 4_000


def test_rows_are_of_every_kind_and_evenly_spaced():
    records = [Prompt(f"p{i}", id=f"p{i}") for i in range(90)] + [
        PlainText(f"t{i}", id=f"t{i}") for i in range(3)
    ]
    assert [row.title.split("id ")[1] for row in preview.rows(records)] == [
        "p0",
        "p30",
        "p60",
        "t0",
        "t1",
    ]
    assert len(preview.rows(records[:2])) == 2
    assert preview.rows([]) == []


def test_a_conversation_that_the_template_refuses_is_shown_as_such(tok):
    refusing = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok.backend_tokenizer, eos_token="<|end|>",
        chat_template="{{ raise_exception('no \x1b system') }}",
    )  # fmt: skip
    shown = preview.rows([Prompt(TALK)], refusing)
    assert "no" in shown[0].problem
    assert "\x1b" not in preview.as_text(shown, tokens=True) + preview_page.page(
        shown, title="", tokens=True
    )


# -------------------------------------------------------------------------------------------------------- on a screen


def hostile(tok) -> list[preview.PreviewRow]:
    records = [
        Demonstration(HOSTILE, HOSTILE),
        Ranking(HOSTILE, (HOSTILE, "b"), (0, 1)),
        Prompt("p", id=HOSTILE),
    ]
    return [*preview.rows(records, tok), *preview.rows(records)]


def test_without_colours_brackets_say_what_is_trained_on_and_what_is_special(tok):
    said = preview.as_text(preview.rows(RECORDS[1:2], tok), tokens=True)
    assert "    Why?\u23ce\n    \u23ce\n    \u27e6Because.\u2039<|end|>\u203a\u27e7\n" in said
    assert f"Special tokens, and their ids: \u2039<|end|>\u203a {tok.eos_token_id}." in said
    plain = preview.as_text(preview.rows(RECORDS[1:2], tok), tokens=True, ascii_only=True)
    assert "    Why?\\n\n    \\n\n    [[Because.{<|end|>}]]\n" in plain


def test_colours_are_for_terminals_whose_user_wants_them(tok, monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert preview.colours(Terminal())
    assert not preview.colours(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not preview.colours(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not preview.colours(Terminal())
    said = preview.as_text(preview.rows(RECORDS[1:2], tok), tokens=True, colour=True)
    assert "\x1b[4;32mBecause.\x1b[0m\x1b[1;4;35m<|end|>\x1b[0m" in said


def test_nothing_in_the_data_reaches_the_terminal_unescaped(tok):
    for options in ({}, {"colour": True}, {"ascii_only": True}):
        said = re.sub(r"\x1b\[[0-9;]*m", "", preview.as_text(hostile(tok), tokens=True, **options))
        assert "\\u001b" in said
        assert not any(preview._is_hidden(c) for c in said if c != "\n")
    assert said.isascii()


def test_the_page_is_well_formed_loads_nothing_and_holds_the_data_as_text(tok):
    written = preview_page.page(
        hostile(tok), title=HOSTILE, tokens=True, report=f"1 < 2 {HOSTILE[20:40]}"
    )
    page = Page(written)
    assert set(page.tags).isdisjoint({"script", "img", "iframe", "object", "a", "form"})
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert links == ["data:,"]
    assert not page.handlers
    assert "url(" not in written
    assert "@import" not in written
    assert "default-src 'none'" in written
    assert "prefers-color-scheme:dark" in written
    assert "<script>alert(1)</script>&amp;" in page.whole_text
    assert not any(preview._is_hidden(c) for c in written if c != "\n")


# ------------------------------------------------------------------------------------------------------- command line


def run(*flags: str) -> None:

    with pytest.raises(SystemExit) as done:
        main(prepare_data.run, config="configs/data/storyland.py", workdir="runs/data",
             argv=data_flags.expand(flags), dry_run=prepare_data.dry_run)  # fmt: skip
    if done.value.code:
        raise ValueError(done.value.code)


def test_look_prints_numbers_and_rows_and_makes_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", "")
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, RECORDS[2:4])
    run(f"--look={path}")
    out = capsys.readouterr().out
    for part in (
        f"{path}: 2 rows",
        "One look",
        "ranking: record 1 of 2",
        "response 2 (rank 1",
        preview.NO_MODEL,
    ):
        assert part in out
    run(
        "--look",
        str(path),
        "--model=storyland:base_small",
        f"--preview={tmp_path}/page.html",
        "--config.rows=1",
    )
    out = capsys.readouterr().out
    assert f"1 rows as the model sees them: {tmp_path}/page.html" in out
    written = (tmp_path / "page.html").read_text()
    assert "&lt;|endoftext|&gt;" in written
    assert "One look" in written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.jsonl", "page.html"]


@pytest.mark.parametrize(
    ("record", "kind"),
    [(RECORDS[1], "demonstration"), (RECORDS[4], "prompt"), (RECORDS[6], "document")],
)
def test_look_sees_the_kind_of_a_file(record, kind: str, tmp_path, capsys):
    write_jsonl(tmp_path / "x.jsonl", [record])
    look.look(load_config("configs/data/look.py", {"data": str(tmp_path / "x.jsonl")}))
    assert f"{kind}: record 1 of 1" in capsys.readouterr().out


def test_look_refuses_what_it_cannot_read(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    for flags, part in (
        ([f"--look={tmp_path}/x.jsonl"], "looks like Alpaca (instruction, output)"),
        ([f"--look={tmp_path}/none.jsonl"], "does not exist"),
        (["--look"], "--look=FILE"),
        (["--config=configs/data/storyland.py", "--dry_run"], "--dry_run"),
    ):
        with pytest.raises(ValueError):
            run(*flags)
        said = capsys.readouterr().err
        assert part in said
        assert "Traceback" not in said


def test_preparing_writes_the_numbers_into_the_report_and_a_page(tmp_path, capsys):
    write_jsonl(
        tmp_path / "d.jsonl",
        [Demonstration(f"How do I spell {i}?", f"Like {i}.") for i in range(60)],
    )
    out, page = tmp_path / "out", tmp_path / "rows.html"
    run(
        "--source=jsonl",
        f"--out={out}",
        f"--config.demonstrations={tmp_path}/d.jsonl",
        f"--preview={page}",
    )
    assert "One look" in (out / "data_report.txt").read_text()
    assert "trained on" in page.read_text()
    assert preview.NO_MODEL in page.read_text()


def test_a_look_at_another_tools_file_names_the_command_that_converts_it(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text('[{"instruction": "Name a tree.", "input": "", "output": "An elm."}]')
    with pytest.raises(ValueError, match=r"looks like Alpaca .*--source=alpaca --data="):
        look.read(path)
