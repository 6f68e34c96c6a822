"""What comes before a text and what ends a response: asked of the tokenizer and of the other files of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from rlhf_jax.data import chat, special_ids, text
from rlhf_jax.data.schema import Message
from rlhf_jax.data.storyland.tokenizer import assets

NAMES = ["</doc>", "<doc>", "<turn>", "<stop>", "[sep]"]
EOS, BOS, TURN, STOP, SEP = range(len(NAMES))
TALK = (Message("user", "Is a whale a fish?"),)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + m.role + '\n' + m.content + '<stop>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)


def a_tokenizer(post: Any = None, **fields: Any) -> transformers.PreTrainedTokenizerFast:
    """One token a byte, five control tokens, and a post-processor."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate([*NAMES, *alphabet])}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(NAMES)
    if post is not None:
        inner.post_processor = post
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, **({"eos_token": "</doc>", "bos_token": "<doc>"} | fields)
    )


def around(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=single, special_tokens=[(name, i) for i, name in enumerate(NAMES)]
    )


def a_folder(path: Path, tokenizer: Any, **files: Any) -> Path:
    """The tokenizer as saved, with fields changed in (or files added to) its folder."""
    tokenizer.save_pretrained(str(path))
    for name, fields in files.items():
        file = path / f"{name}.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | fields))
    return path


POST_PROCESSORS = {
    "none": (None, []),
    "BOS": (around("<doc> $A"), [BOS]),
    "BOS and EOS": (around("<doc> $A </doc>"), [BOS]),
    "EOS alone": (around("$A </doc>"), []),
    "as BERT": (around("<turn> $A [sep]"), [TURN]),
    "two before": (around("<turn> <doc> $A"), [TURN, BOS]),
    "as Llama 3": (
        processors.Sequence([processors.ByteLevel(trim_offsets=False), around("<doc> $A")]),
        [BOS],
    ),
    "BERT itself": (processors.BertProcessing(("[sep]", SEP), ("<turn>", TURN)), [TURN]),
    "bytes alone": (processors.ByteLevel(trim_offsets=False), []),
}


@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_every_beginning_has_what_the_post_processor_puts_there_and_no_response_has(kind: str):
    post, begins = POST_PROCESSORS[kind]
    tokenizer = a_tokenizer(post)
    plain = a_tokenizer()
    said = "No, it nurses its young."
    assert list(text.begin_ids(tokenizer)) == begins
    assert text.encode_prompt(tokenizer, "Why?") == [*begins, *text.encode_prompt(plain, "Why?")]
    assert text.encode_opening(tokenizer, "Q: Why?\nA:") == [
        *begins,
        *chat.encode_text(plain, "Q: Why?\nA:"),
    ]
    assert text.encode_document(tokenizer, said, eos_id=EOS) == [
        *begins,
        *chat.encode_text(plain, said),
        EOS,
    ]
    assert text.encode_answer(tokenizer, "Why?", said) == [*chat.encode_text(plain, said), EOS]
    ids, mask = text.encode_demonstration(tokenizer, "Why?", said)
    assert list(ids) == [
        *text.encode_prompt(tokenizer, "Why?"),
        *text.encode_answer(tokenizer, "Why?", said),
    ]
    assert np.flatnonzero(mask)[0] == len(begins) + len("Why?\n\n")


def test_a_tokenizer_without_a_post_processor_is_as_before():
    """GPT-2, Qwen and storyland were trained without BOS."""
    tokenizer = text.load_tokenizer(assets())
    assert text.begin_ids(tokenizer) == ()
    assert text.encode_prompt(tokenizer, "A fox.") == tokenizer.encode(
        "A fox.\n\n", add_special_tokens=False
    )


def test_bos_comes_once_and_its_name_in_a_text_stays_text():
    tokenizer = a_tokenizer(around("<doc> $A"))
    for typed in ("<doc>", "<doc> <doc> x", "x</doc><doc>"):
        ids = text.encode_prompt(tokenizer, typed)
        assert (ids.count(BOS), ids[0], ids.count(EOS)) == (1, BOS, 0)
        assert tokenizer.decode(ids[1:]) == f"{typed}\n\n"
        assert text.encode_document(tokenizer, typed, eos_id=EOS).count(BOS) == 1
    assert text.encode_prompt(tokenizer, "x", bos_id=TURN)[:2] == [
        TURN,
        text.encode_prompt(tokenizer, "x")[1],
    ]


def test_each_document_of_packed_rows_begins_with_bos():
    tokenizer = a_tokenizer(around("<doc> $A"))
    documents = [
        text.encode_document(tokenizer, said, eos_id=EOS) for said in ("ab", "cde", "f", "ghij")
    ]
    rows = text.lm_rows(documents, length=16)
    begins = np.asarray(rows.positions == 0) & np.asarray(rows.segments > 0)
    assert begins.sum() == len(documents)
    np.testing.assert_array_equal(rows.tokens[begins], BOS)
    assert (rows.tokens == BOS).sum() == len(documents)
    assert not np.asarray(rows.mask)[begins].any()


@pytest.mark.parametrize(
    ("template", "count"), [(TEMPLATE, 1), (None, 1), (TEMPLATE.replace("{{ bos_token }}", ""), 0)]
)
def test_conversations_have_the_templates_bos_and_the_plain_form_the_tokenizers(
    template: str | None, count: int
):
    tokenizer = a_tokenizer(around("<doc> $A"), chat_template=template)
    ids = text.encode_prompt(tokenizer, TALK)
    assert (ids.count(BOS), ids[0] == BOS) == (count, count == 1)
    whole, mask = text.encode_demonstration(tokenizer, TALK, "No.")
    assert list(whole[: len(ids)]) == ids
    assert not any(mask[: len(ids)])
    assert BOS not in text.encode_answer(tokenizer, TALK, "<doc> No.")


def test_a_post_processor_that_is_changed_is_asked_again():
    tokenizer = a_tokenizer()
    assert text.begin_ids(tokenizer) == ()
    tokenizer.backend_tokenizer.post_processor = around("<doc> $A")
    assert text.begin_ids(tokenizer) == (BOS,)
    tokenizer("a long text", truncation=True, max_length=2)  # leaves truncation set in the backend
    assert text.begin_ids(tokenizer) == (BOS,)


def test_a_vocabulary_of_other_words_still_says_its_bos():
    inner = tokenizers.Tokenizer(models.WordLevel({"<doc>": 0, "whale": 1}, unk_token="<doc>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<doc> $A", special_tokens=[("<doc>", 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<doc>", eos_token="<doc>"
    )
    assert text.begin_ids(tokenizer) == (0,)
    inner.model = models.BPE(
        {"<doc>": 0, "w": 1}, merges=[]
    )  # no id at all for the words that are tried
    silent = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<doc>", eos_token="<doc>"
    )
    assert silent.encode("x", add_special_tokens=False) == []
    assert text.begin_ids(silent) == (0,)


# ------------------------------------------------------------------------------------------------ the folder's word


@pytest.mark.parametrize("post", [None, "<doc> $A"])
@pytest.mark.parametrize("wanted", [True, False, None])
def test_add_bos_token_decides_and_survives_saving(
    post: str | None, wanted: bool | None, tmp_path: Path
):
    tokenizer = a_tokenizer(post and around(post))
    said = {} if wanted is None else {"add_bos_token": wanted}
    loaded = text.load_tokenizer(a_folder(tmp_path / "a", tokenizer, tokenizer_config=said))
    expected = [BOS] if (wanted if wanted is not None else post) else []
    assert list(text.begin_ids(loaded)) == expected
    assert loaded("whale")["input_ids"][:1] == (
        expected or loaded.encode("whale", add_special_tokens=False)[:1]
    )
    loaded.save_pretrained(str(tmp_path / "b"))
    again = text.load_tokenizer(tmp_path / "b")
    assert list(text.begin_ids(again)) == expected
    assert text.tokenizer_fingerprint(again) == text.tokenizer_fingerprint(loaded)


def test_no_bos_token_and_none_to_be_added_is_no_bos_whatever_the_post_processor_puts(
    tmp_path: Path,
):
    said = {"add_bos_token": False, "bos_token": None}
    loaded = text.load_tokenizer(
        a_folder(tmp_path, a_tokenizer(around("<doc> $A")), tokenizer_config=said)
    )
    assert text.begin_ids(loaded) == ()
    assert BOS not in text.encode_prompt(loaded, "whale")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"add_bos_token": "yes"},
            "tokenizer_config.json: add_bos_token is 'yes': write true or false",
        ),
        (
            {"add_bos_token": True, "bos_token": None},
            "add_bos_token is true and no bos_token is named",
        ),
    ],
)
def test_an_add_bos_token_that_cannot_be_meant_is_refused(
    fields: dict, message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        text.load_tokenizer(a_folder(tmp_path, a_tokenizer(), tokenizer_config=fields))


def test_tokenizers_that_begin_texts_differently_are_refused_and_have_two_fingerprints():
    """PITFALLS 35: PPO hands the policy's ids to the reward model."""
    plain, begins = a_tokenizer(), a_tokenizer(around("<doc> $A"))
    assert text.tokenizer_fingerprint(plain) != text.tokenizer_fingerprint(begins)
    text.check_same_tokenizer(policy=begins, reward_model=a_tokenizer(around("<doc> $A")))
    with pytest.raises(
        ValueError, match=r"policy begins each text with the ids \[\] and reward_model with \[1\]"
    ):
        text.check_same_tokenizer(policy=plain, reward_model=begins)


# -------------------------------------------------------------------------------------------------- what ends


@pytest.mark.parametrize(
    ("files", "stops", "written"),
    [
        ({}, (EOS,), (EOS,)),
        ({"generation_config": {"eos_token_id": EOS}}, (EOS,), (EOS,)),
        (
            {"generation_config": {"eos_token_id": [STOP, EOS, SEP]}},
            (EOS, STOP, SEP),
            (STOP, EOS, SEP),
        ),
        ({"generation_config": {"eos_token_id": STOP}}, (EOS, STOP), (STOP, EOS)),
        ({"config": {"eos_token_id": [EOS, SEP], "vocab_size": 300}}, (EOS, SEP), (EOS, SEP)),
        (
            {"config": {"eos_token_id": SEP}, "generation_config": {"eos_token_id": [EOS, STOP]}},
            (EOS, STOP),
            (EOS, STOP),
        ),
        (
            {"config": {"eos_token_id": SEP}, "generation_config": {"temperature": 0.6}},
            (EOS, SEP),
            (SEP, EOS),
        ),
        ({"config": {"eos_token_id": 50256, "vocab_size": 300}}, (EOS,), (EOS,)),
    ],
)
def test_all_ends_of_the_folder_end_a_response_and_are_written_in_order(
    files, stops, written, tmp_path: Path
):
    tokenizer = text.load_tokenizer(a_folder(tmp_path, a_tokenizer(), **files))
    assert text.stop_ids(tokenizer, ["Why?"]) == stops
    assert text.exported_end_ids(tokenizer) == written
    said = chat.encode_text(tokenizer, "So be it.")
    for end in stops:
        assert (
            text.decode_answer(tokenizer, "Why?", [*said, end, TURN], stop_ids=stops) == "So be it."
        )
    assert (
        text.encode_answer(tokenizer, "Why?", "So be it.")[-1] == EOS
    )  # what training ends a response with


def test_the_end_of_turn_is_among_the_exported_ends(tmp_path: Path):
    tokenizer = a_tokenizer(chat_template=TEMPLATE)
    assert text.end_of_turn_id(tokenizer) == STOP
    assert text.exported_end_ids(tokenizer) == (EOS, STOP)
    assert text.stop_ids(tokenizer, [TALK]) == (EOS, STOP)
    asks = TEMPLATE.replace(
        "{{ bos_token }}",
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}",
    )
    assert text.end_of_turn_id(a_tokenizer(chat_template=asks)) == STOP
    assert text.end_of_turn_id(a_tokenizer(chat_template="{{ 'the same for all' }}")) is None
    assert text.exported_end_ids(a_tokenizer()) == (EOS,)
    loaded = text.load_tokenizer(
        a_folder(tmp_path, tokenizer, generation_config={"eos_token_id": [SEP, EOS]})
    )
    assert text.exported_end_ids(loaded) == (SEP, EOS, STOP)


@pytest.mark.parametrize("value", [[0, 5000], -1, "2", [True], [[0]], 2.0, {"a": 1}])
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_an_end_that_is_no_id_is_refused(value: Any, name: str, tmp_path: Path):
    folder = a_folder(tmp_path, a_tokenizer(), **{name: {"eos_token_id": value}})
    with pytest.raises(
        ValueError,
        match=rf"{name}\.json: eos_token_id=.* holds .*, which is no id of this model \(0 to",
    ):
        text.load_tokenizer(folder)


def test_a_damaged_generation_config_is_named(tmp_path: Path):
    folder = a_folder(tmp_path, a_tokenizer())
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is corrupt"):
        text.load_tokenizer(folder)
    (folder / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"generation_config\.json holds no object"):
        text.load_tokenizer(folder)


def test_ends_are_kept_by_the_tokenizer_object():
    tokenizer = a_tokenizer()
    assert special_ids.folder_end_ids(tokenizer) == ()
    special_ids.set_folder_end_ids(tokenizer, (STOP,))
    assert special_ids.end_ids(tokenizer) == (EOS, STOP)
    with pytest.raises(ValueError, match="names no EOS token"):
        special_ids.end_ids(a_tokenizer(eos_token=None))
