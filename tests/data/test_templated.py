"""Texts that a chat template wrote before are found, counted and told; ordinary texts are not."""

from __future__ import annotations

import json
import time

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from experiments import sft
from rlhf_jax.data import schema, templated, text
from rlhf_jax.data.schema import Demonstration, Message, PlainText, Prompt, Ranking
from rlhf_jax.data.storyland.tokenizer import assets
from rlhf_jax.run import datasets, networks
from rlhf_jax.run import rankings as ranked
from rlhf_jax.run.config import load_config

WRITTEN = {
    "ChatML": "<|im_start|>user\nWhere do owls sleep?<|im_end|>\n<|im_start|>assistant\n",
    "Llama 2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWhere do owls sleep? [/INST]",
    "Llama 3": "<|start_header_id|>user<|end_header_id|>\n\nWhere do owls sleep?<|eot_id|>",
    "Mistral": "[INST]Where do owls sleep?[/INST]",
    "Gemma": "<start_of_turn>user\nWhere do owls sleep?<end_of_turn>\n",
    "Zephyr": "<|user|>\nWhere do owls sleep?</s>\n<|assistant|>\n",
    "Vicuna": "USER: Where do owls sleep? ASSISTANT: In a barn.</s>USER: Why?",
    "DeepSeek": "<\uff5cUser\uff5c>Where do owls sleep?<\uff5cAssistant\uff5c>",
    "GPT-2": "Where do owls sleep?<|endoftext|>",
    "Command R": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Where do owls sleep?<|END_OF_TURN_TOKEN|>",
    "OpenAssistant": "<|prompter|>Where do owls sleep?<|endoftext|>",
    "framed": "<s>Where do owls sleep?</s>",
    "Nemotron": "<extra_id_1>User\nWhere do owls sleep?\n<extra_id_1>Assistant\n",
}
ORDINARY = (
    "Human: Where do owls sleep?\n\nAssistant:",
    "Below is an instruction.\n\n### Instruction:\nName an owl.\n\n### Response:\n",
    "f <| x |> g, and a < b > c, xs[0] | ys[1], List<String>, vector<int>, <b>bold</b>, <br/>",
    "Prices fell from <s>9</s> to 7 dollars, [see 2] and [INSTALL].",
    "<think>Owls are birds.</think> <tool_call>{}</tool_call> In trees.",
    "a | b\n--|--\n<1 | >2\n<|",
)


def tokenizer(*special: str, **names: str) -> transformers.PreTrainedTokenizerFast:
    """One token a byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(alphabet)}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|end|>",
        additional_special_tokens=list(special),
        **names,
    )


@pytest.mark.parametrize("family", WRITTEN)
def test_markers_of_well_known_templates_are_found_whatever_the_tokenizer(family: str):
    assert templated.templated_rows([Prompt(WRITTEN[family])]) == [0]
    assert templated.templated_rows([Demonstration("p", WRITTEN[family])]) == [0]


@pytest.mark.parametrize("said", ORDINARY)
def test_ordinary_text_is_left_alone(said: str):
    assert templated.templated_rows([Prompt(said)], text.load_tokenizer(assets())) == []


def test_special_tokens_of_the_tokenizer_are_found_and_bare_words_are_not():
    own = tokenizer("~turn~", "and", pad_token="!")
    rows = [
        Prompt("~turn~user"),
        Prompt("this and that!"),
        Prompt((Message("user", "x ~turn~"),)),
        PlainText("a"),
    ]
    assert templated.templated_rows(rows, own) == [0, 2]
    assert templated.templated_rows(rows) == []


def test_responses_that_nobody_ranked_do_not_count():
    assert templated.templated_rows([Ranking("p", ("a", "b", "<|eot_id|>"), (0, 1, -1))]) == []


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_note_names_count_file_lines_markers_and_what_to_do(tmp_path):
    good, bad = {"prompt": "p", "response": "r"}, {"prompt": WRITTEN["ChatML"], "response": "r"}
    path = write(tmp_path / "d.jsonl", good, bad, good, bad, bad, bad)
    records, report = schema.read_jsonl(path, Demonstration, special_tokens=templated.pattern())
    note = str(templated.note(records, report))
    assert "\n" not in note
    for part in (
        "4 of 6 rows",
        "special tokens",
        "<|im_start|> <|im_end|>",
        f"{path}:2, 4, 5, ..",
        "messages",
    ):
        assert part in note
    records, report = schema.read_jsonl(write(tmp_path / "e.jsonl", good), Demonstration)
    assert templated.note(records, report) is None


def test_the_note_says_what_the_tokenizer_makes_of_the_markers(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "<|u|>Hi"})
    plain, own = tokenizer(), tokenizer()
    own.add_tokens(["<|u|>"])  # not special: the tokenizer reads it in any text
    for tok, said in ((plain, "ordinary letters"), (own, "reads them as tokens")):
        records, report = schema.read_jsonl(path, Prompt, special_tokens=templated.pattern(tok))
        assert said in str(templated.note(records, report, tok))


def test_every_stage_tells_once_as_it_reads(tmp_path, capsys):
    tok, said = text.load_tokenizer(assets()), WRITTEN["Llama 3"]
    demonstrations = write(tmp_path / "d.jsonl", {"prompt": said, "response": "Yes."})
    rankings = write(
        tmp_path / "r.jsonl", {"prompt": "p", "responses": [said, "no"], "ranks": [1, 2]}
    )
    prompts = write(tmp_path / "p.jsonl", {"prompt": said})
    documents = write(tmp_path / "t.jsonl", {"text": "One.<|endoftext|>Two."})
    config = load_config("configs/sft/storyland.py:smoke", {"row_length": "256"})
    for read, path in (
        (lambda: sft.read_demonstrations(tok, demonstrations, config), demonstrations),
        (lambda: ranked.read_rankings(rankings), rankings),
        (lambda: datasets.read_prompts(prompts), prompts),
        (lambda: datasets.read_prompts(prompts, tokenizer=tok), prompts),
        (lambda: datasets.lm_rows(tok, documents, length=64), documents),
    ):
        read()
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        assert out.startswith("WARNING: 1 of 1 rows")
        assert f"{path}:1" in out


def test_a_stage_says_nothing_of_ordinary_rows(tmp_path, capsys):
    path = write(
        tmp_path / "p.jsonl", *({"prompt": said, "id": str(i)} for i, said in enumerate(ORDINARY))
    )
    assert len(datasets.read_prompts(path, tokenizer=text.load_tokenizer(assets()))) == len(
        ORDINARY
    )
    assert capsys.readouterr().out == ""


def test_a_tokenizer_that_is_not_there_is_left_to_loading_the_model(tmp_path):
    assert networks.tokenizer_of(str(tmp_path / "none")) is None
    assert networks.tokenizer_of("storyland:base_small").eos_token == "<|endoftext|>"


@pytest.mark.parametrize(
    "unit",
    ["<", "<s>", "</s>", "</s> ", "[", "<|", "<|a", "<|" + "a" * 39, "[INST", " ", "\uff5c<"],
)
def test_the_search_takes_linear_time(unit: str):
    search, many = templated.pattern(tokenizer("<a|b>")).search, unit * (200_000 // len(unit))
    start = time.perf_counter()
    search(many + "x")
    assert time.perf_counter() - start < 2


def test_real_texts_hold_none(data_dir):
    from rlhf_jax.data import sources

    rankings, _ = sources.read_hh(data_dir, subsets=("helpful-base",), split="test")
    replies, _ = sources.read_oasst_demonstrations(data_dir, split="train", test_fraction=0.0)
    assert templated.templated_rows([*rankings, *replies], text.load_tokenizer(assets())) == []
