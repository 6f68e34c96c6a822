"""Every stage on prompts of several turns, with a chat template whose end of turn is not EOS."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from experiments import evaluate, ppo, reward_model, sample, sft
from rlhf_jax import sharding
from rlhf_jax.data import chat, schema, text
from rlhf_jax.data.schema import Demonstration, Message, Prompt, Ranking
from rlhf_jax.models import DecoderConfig, language_model, save_hf
from rlhf_jax.run import asking, datasets, devices, guards, inputs, networks, rankings
from rlhf_jax.run import responses as responses_lib
from rlhf_jax.run.config import load_config
from rlhf_jax.run.networks import Network
from rlhf_jax.types import Model

ROOT = Path(__file__).parents[2]
EOS, START, END, TURN = "<|end_of_text|>", "<|start|>", "<|end_header|>", "<|turn_end|>"
TEMPLATE = (
    f"{{% for m in messages %}}{{{{ '{START}' + m['role'] + '{END}' + m['content'] | trim + '{TURN}' }}}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{START}assistant{END}{{% endif %}}"
)
ASKED, FIRST = (Message("user", "sky?"),), Message("assistant", "blue")
LONG = (*ASKED, FIRST, Message("user", f"sure {TURN}?"))
ANSWERS = {ASKED: "blue", LONG: "yes"}
SEEN: list[str] = []


def one_device(_) -> jax.sharding.Mesh:
    """Programs for one device compile faster than those for the eight that tests have."""
    return sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])


def told(prompt_id: str, response: str) -> float:
    """A judge of texts, which keeps what it is shown."""
    SEEN.append(response)
    return float(len(response))


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, and the four control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [EOS, START, END, TURN]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate([*special, *alphabet])}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=EOS, chat_template=TEMPLATE,
        additional_special_tokens=[START, END, TURN],
    )  # fmt: skip


RECORDS = {
    "demonstrations": [Demonstration(p, a) for p, a in ANSWERS.items() for _ in range(32)],
    "rankings": [
        Ranking(p, (a, "no"), (0, 1), id=f"{i}") for i, (p, a) in enumerate([*ANSWERS.items()] * 4)
    ],
    "prompts": [Prompt(p, id=f"p{i}") for i, p in enumerate([*ANSWERS] * 4)],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("chat")
    tok = tokenizer()
    model = language_model(DecoderConfig(len(tok), 256, 1, 32, 4))
    save_hf(folder / "base", model, model.init(jax.random.key(0)), tok)
    read, sampled = schema.read_jsonl, []

    def records(path, kind, **how):
        return (RECORDS[str(path)], None) if str(path) in RECORDS else read(path, kind, **how)

    def load(name: str, **overrides: str):
        return load_config(f"{ROOT}/configs/{name}/storyland.py:smoke", overrides)

    def sample_and_keep(*arguments):
        sampled.append(draw(*arguments))
        return sampled[-1]

    base, draw = str(folder / "base"), ppo.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "read_jsonl", records)
        patch.setattr(inputs, "check_file", lambda *_, **__: None)  # nor is there one to look at
        patch.setattr(guards, "origin", lambda config, **_: {})  # the records lie in no file
        patch.setattr(devices, "start", one_device)
        patch.setattr(ppo, "sample", sample_and_keep)
        patch.setattr(
            ppo, "check_step_zero", lambda *_: None
        )  # tested elsewhere, and compiles five programs
        tuned = sft.run(
            load("sft", model=base, demonstrations="demonstrations", validation="demonstrations", epochs="10",
                 row_length="120", batch_size="4", learning_rate="1e-2", dropout="0.0", schedule="constant"),
            str(folder / "sft"),
        )  # fmt: skip
        policy = tuned["last"]
        sample.run(
            load("sample", models=f"({policy!r},)", prompts="prompts", prompt_length="72", max_new_tokens="12",
                 temperature="0.0", min_k="2", max_k="2", batch_size="16", labelers="0"),
            str(folder / "sample"),
        )  # fmt: skip
        rewards = reward_model.run(
            load("reward_model", model=policy, rankings="rankings", demonstrations="demonstrations", row_length="120",
                 batch_size="2", score_batch_size="8", **{"evaluation.validation_train": "rankings"}),
            str(folder / "reward_model"),
        )  # fmt: skip
        trained = ppo.run(
            load("ppo", model=policy, reward_model=rewards["model"], prompts="prompts", prompt_length="72",
                 max_new_tokens="12", iterations="1", episodes="8", minibatches="1", ptx_coef="0.0",
                 gold=f"{__name__}:told",
                 pretraining_text="", held_out_text="", warmup_iterations="0", value_warmup_iterations="0"),
            str(folder / "ppo"),
        )  # fmt: skip
        evaluation = evaluate.run(
            load("evaluate", reward_model=rewards["model"], prompts="prompts", max_new_tokens="12", batch_size="8",
                 gold="", reference="", held_out_text="", baseline_samples="1", temperature="0.0",
                 **{"models.base": base, "models.sft": policy, "few_shot.demonstrations": "demonstrations",
                    "few_shot.candidates": "1"}),
            str(folder / "evaluate"),
        )  # fmt: skip
    return SimpleNamespace(
        folder=folder, tokenizer=tok, tuned=tuned, rewards=rewards, trained=trained, evaluation=evaluation,
        sampled=sampled[0],
    )  # fmt: skip


def test_sft_trains_on_every_answer_or_the_last(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        schema, "read_jsonl", lambda *_, **__: (RECORDS["demonstrations"][-1:], None)
    )
    config = load_config(f"{ROOT}/configs/sft/storyland.py:smoke", {"row_length": "96"})
    trained = {}
    for config.assistant_turns in ("all", "last"):
        rows = sft.demonstration_rows(tokenizer(), "", config)
        trained[config.assistant_turns] = tokenizer().decode(rows.tokens[0][rows.mask[0]])
    assert trained == {"all": f"blue{TURN}yes{TURN}", "last": f"yes{TURN}"}
    config.assistant_turns = "first"
    with pytest.raises(ValueError, match="assistant_turns"):
        sft.demonstration_rows(tokenizer(), "", config)


def test_the_tuned_model_answers_each_conversation_and_ends_its_turn(ran):
    """What SFT puts at an answer's end is what generation stops at, and decoding leaves out."""
    records = sample.read_samples(ran.folder / "sample" / "samples.jsonl")
    assert [r.prompt for r in records] == [p.prompt for p in RECORDS["prompts"]]
    assert [set(r.responses) for r in records] == [{ANSWERS[r.prompt]} for r in records]
    assert 0 < ran.tuned["padding_share"] < 0.5


def test_ppo_continues_the_conversation_and_its_rows_end_with_the_end_of_turn(ran):
    samples = jax.tree.map(np.asarray, ran.sampled)
    end = ran.tokenizer.convert_tokens_to_ids(TURN)
    prompts = {tuple(text.encode_prompt(ran.tokenizer, p)): p for p in ANSWERS}
    assert samples.finished.mean() > 0.5
    for row, start, length, finished in zip(
        samples.tokens, samples.prompt_lengths, samples.lengths, samples.finished, strict=True
    ):
        prompt = prompts[tuple(row[:start].tolist())]
        assert not finished or row[length - 1] in (end, ran.tokenizer.eos_token_id)
        assert (row[start:length] == end).sum() <= 1
        if finished and row[start:length].tolist() == text.encode_answer(
            ran.tokenizer, prompt, ANSWERS[prompt]
        ):
            assert ANSWERS[prompt] in SEEN
    assert len(SEEN) == len(samples.tokens)
    assert not any(TURN in said for said in SEEN)
    assert set(SEEN) & set(ANSWERS.values())


def test_reward_model_scores_what_ppo_samples(ran, monkeypatch: pytest.MonkeyPatch):
    """The same ids for a conversation and its answer in the rows of the reward model, in scoring, and in PPO."""
    prompt, responses, _ = rankings.encode_ranking(ran.tokenizer, RECORDS["rankings"][1])
    assert prompt == text.encode_prompt(ran.tokenizer, LONG)
    assert responses[0] == text.encode_answer(ran.tokenizer, LONG, "yes")
    seen: list[list[int]] = []
    monkeypatch.setattr(text, "prompt_batch", lambda rows, **_: seen.extend(map(list, rows)))
    for name in ("place_batch", "own_rows"):
        monkeypatch.setattr(responses_lib.sharding, name, lambda *_: None)
    monkeypatch.setattr(responses_lib, "_scores", lambda *_: np.zeros(1))
    nothing: Any = lambda *_, **__: None
    network = Network(Model(nothing, nothing, nothing, nothing), {}, ran.tokenizer)
    responses_lib.score_responses(network, [LONG], ["yes"], one_device(None), batch_size=1)
    assert seen == [[*prompt, *responses[0]]]
    assert ran.rewards["validation_train"]["prompts"] == 8


def test_evaluation_shows_conversations_as_text(ran):
    lines = [
        json.loads(line)
        for line in (ran.folder / "evaluate" / "samples.jsonl").read_text().splitlines()
    ]
    assert {line["prompt"] for line in lines} == {chat.readable(p) for p in ANSWERS}
    asked = {chat.readable(p): answer for p, answer in ANSWERS.items()}
    assert all(
        line["response"] == asked[line["prompt"]] for line in lines if line["model"] == "sft"
    )
    assert "prompted_base" in ran.evaluation["reward_score"]


def test_exported_models_carry_the_template(ran):
    """A policy that PPO made is used elsewhere with the conversations it was trained on."""
    exported = text.load_tokenizer(ran.trained["last"])
    assert exported.chat_template == TEMPLATE
    for prompt in ANSWERS:
        assert text.encode_prompt(exported, prompt) == text.encode_prompt(ran.tokenizer, prompt)
    assert text.stop_ids(exported, ANSWERS) == text.stop_ids(ran.tokenizer, ANSWERS)
    ends = [ran.tokenizer.eos_token_id, ran.tokenizer.convert_tokens_to_ids(TURN)]
    for folder in (
        ran.tuned["last"],
        ran.trained["last"],
    ):  # other programs stop at the end of a turn too
        assert (
            json.loads((Path(folder) / "generation_config.json").read_text())["eos_token_id"]
            == ends
        )


def test_a_policy_and_a_reward_model_with_two_templates_are_refused(
    ran, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(schema, "read_jsonl", lambda *_, **__: (RECORDS["prompts"], None))
    network = networks.load_network(ran.rewards["model"], one_device(None))
    network.tokenizer.chat_template = None
    networks.save_network(tmp_path / "other", network)
    config = load_config(
        f"{ROOT}/configs/ppo/storyland.py:smoke",
        {"model": ran.tuned["last"], "reward_model": str(tmp_path / "other"), "prompts": "prompts"},
    )
    with pytest.raises(ValueError, match="chat templates of policy and reward_model differ"):
        ppo.prepare(config, one_device(None))


def test_every_stage_begins_a_text_with_the_tokenizers_bos_and_no_response(tmp_path: Path):
    """Base models of Llama, Mistral and Gemma were trained so: rows, few-shot prompts, scores and documents alike."""
    begins = tokenizer()
    begins.add_special_tokens({"bos_token": "<bos>"})
    bos = begins.bos_token_id
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<bos> $A {EOS}", special_tokens=[("<bos>", bos), (EOS, begins.eos_token_id)]
    )
    asked, said = "Who sang? <bos>", "A bird <bos>."
    data = {
        "demonstrations": [{"prompt": asked, "response": said}],
        "text": [{"text": asked}, {"text": said}],
    }
    files = {}
    for name, rows in data.items():
        files[name] = str(tmp_path / f"{name}.jsonl")
        Path(files[name]).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = load_config(f"{ROOT}/configs/evaluate/storyland.py:smoke", {
        "few_shot.demonstrations": files["demonstrations"], "few_shot.examples": "1", "few_shot.candidates": "1",
    })  # fmt: skip
    network = networks.Network(None, {}, begins)  # pyright: ignore[reportArgumentType]
    (few_shot,) = asking.few_shot_asks(config)
    training = load_config(f"{ROOT}/configs/sft/storyland.py:smoke", {"row_length": "96"})
    whole = datasets.encode_prompts(begins, [asked], length=99, where="x")[0]
    prompt, (response,), _ = rankings.encode_ranking(begins, Ranking(asked, (said,), (0,)))
    beginnings = [
        whole,
        prompt,
        responses_lib.scoring_rows(network, [asked], [said])[0],
        asking.bare_prompts(network, [Prompt(asked)])[0][0],
        few_shot(network, [Prompt(asked)])[0][0],
        sft.read_demonstrations(begins, files["demonstrations"], training)[1].tokens[0].tolist(),
    ]
    for ids in beginnings:
        assert (ids[0], ids.count(bos)) == (bos, 1)
    assert bos not in response
    rows = datasets.lm_rows(begins, files["text"], length=48)
    starts = (rows.positions == 0) & (rows.segments > 0)
    assert all(i == bos for i in rows.tokens[starts].tolist())
    assert sum(row.count(bos) for row in rows.tokens.tolist()) == 2
