"""Rows that need more positions than a model has are refused at the start, by name, and rounding refuses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate, instructgpt, ppo, pretrain, reward_model, sample, sft
from rlhf_jax import load_config, scoring, sharding
from rlhf_jax.data import schema, text
from rlhf_jax.data.storyland.tokenizer import assets
from rlhf_jax.models.config import DecoderConfig, gpt2
from rlhf_jax.models.heads import language_model, scalar_model
from rlhf_jax.models.hf import save_hf
from rlhf_jax.run import answering, asking, contexts, devices, networks, responses
from rlhf_jax.sampling.generate import Sampling

ROOT = Path(__file__).parents[2]
TOKENIZER = text.load_tokenizer(assets())


def config(name: str, **overrides: str) -> Any:
    return load_config(f"{ROOT}/configs/{name}/storyland.py:smoke", overrides)


def sized(tokens: int, *, answer: str | None = None) -> str:
    """A text whose prompt (with its answer, where there is one) has so many tokens."""
    more = 0 if answer is None else len(text.encode_answer(TOKENIZER, "x", answer))
    for count in range(1, 4 * tokens):
        for said in ("a bird sang " * count + "q" * letters for letters in range(8)):
            if len(text.encode_prompt(TOKENIZER, said)) + more == tokens:
                return said
    raise AssertionError(tokens)


def network(form: Any, sizes: DecoderConfig) -> networks.Network:
    model = form(sizes)
    return networks.Network(model, model.init(jax.random.key(1)), TOKENIZER)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch, mesh: jax.sharding.Mesh) -> None:
    monkeypatch.setattr(devices, "start", lambda shape: mesh)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``learned`` (32 learned positions), ``rotary`` (48), ``wide`` (256) and scalar ones of each."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {
        "learned": gpt2(1152, 32, 1, 16, 2), "rotary": DecoderConfig(1152, 48, 1, 16, 2),
        "wide": DecoderConfig(1152, 256, 1, 16, 2),
    }  # fmt: skip
    for name, each in sizes.items():
        for form, end in ((language_model, ""), (scalar_model, "_reward")):
            made = network(form, each)
            save_hf(folder / (name + end), made.model, made.params, TOKENIZER)
    return folder


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("weights were loaded")


# ----------------------------------------------------------------------------------------------------------- scoring


LEARNED, ROTARY = gpt2(1152, 44, 1, 16, 2), DecoderConfig(1152, 44, 1, 16, 2)


@pytest.mark.parametrize(("sizes", "tokens"), [(LEARNED, 39), (LEARNED, 44), (ROTARY, 44)])
def test_a_text_that_fits_the_context_has_the_score_of_an_unpadded_row(
    sizes: DecoderConfig, tokens: int, mesh
):
    judge = network(scalar_model, sizes)
    prompt = sized(tokens, answer="It did.")
    (row,) = responses.scoring_rows(judge, [prompt], ["It did."])
    assert len(row) == tokens
    alone = scoring.sequence_scores(
        judge.model, judge.params, jnp.array([row]), jnp.array([tokens])
    )
    scored = responses.score_responses(
        judge, [prompt, "Why?"], ["It did.", "So."], mesh, batch_size=2
    )
    np.testing.assert_allclose(scored[0], float(alone[0]), atol=1e-5)
    assert np.isfinite(scored).all()


def test_a_text_beyond_the_context_is_refused_before_a_score(mesh, monkeypatch: pytest.MonkeyPatch):
    judge = network(scalar_model, gpt2(1152, 44, 1, 16, 2))
    monkeypatch.setattr(responses, "_scores", never)
    with pytest.raises(
        ValueError, match=r"'It did.'.* has 45 tokens and the context of the model is 44 tokens"
    ):
        responses.score_responses(
            judge, ["Why?", sized(45, answer="It did.")], ["So.", "It did."], mesh, batch_size=1
        )


def test_a_sampled_text_that_grows_is_scored_as_far_as_it_fits_and_counted(mesh):
    judge = network(scalar_model, gpt2(1152, 44, 1, 16, 2))
    prompt, said = (
        sized(30),
        "\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd",
    )  # three bytes each, whoever sampled one of them
    rows, cut = responses.fitting_scoring_rows(judge, [prompt, "Why?"], [said, "So."])
    whole = [*text.encode_prompt(TOKENIZER, prompt), *text.encode_answer(TOKENIZER, prompt, said)]
    assert (cut, rows[0], len(rows[0])) == (1, whole[:44], 44)
    assert rows[1] == responses.scoring_rows(judge, ["Why?"], ["So."])[0]
    assert np.isfinite(responses.score_rows(judge, rows, mesh, batch_size=2)).all()
    with pytest.raises(
        ValueError,
        match="has 44 tokens and the context of the model is 44 tokens, which leaves nothing",
    ):
        responses.fitting_scoring_rows(judge, [sized(44)], ["So."])


def test_slots_are_never_more_than_the_context():
    assert [slots for _, slots in responses.by_length([3, 40], 1, most=40)] == [32, 40]
    assert [slots for _, slots in responses.by_length([3, 40], 1)] == [32, 64]


# ---------------------------------------------------------------------------------------------------------- sampling


def test_prompts_and_answers_that_fill_the_context_exactly(mesh):
    """Slots of prompts are rounded up to 16; 34 + 18 is the whole context."""
    sizes = gpt2(1152, 52, 1, 16, 2)
    policy, judge = network(language_model, sizes), network(scalar_model, sizes)
    asked = [schema.Prompt(sized(34)), schema.Prompt("Why?")]
    settings = config("evaluate", max_new_tokens="18", batch_size="2", gold="", temperature="0.0")
    said = answering.answer(policy, judge, None, asked, asking.bare_prompts, 1, settings, mesh)
    assert said.tokens.max() <= 18
    assert np.isfinite(said.reward).all()
    settings.max_new_tokens = 19
    with pytest.raises(
        ValueError,
        match="has 34 tokens and max_new_tokens=19 come after it, together 53, but the context",
    ):
        answering.answer(policy, judge, None, asked, asking.bare_prompts, 1, settings, mesh)
    ids = [text.encode_prompt(TOKENIZER, p.prompt) for p in asked]
    with pytest.raises(ValueError, match="prompt 1 has 34 tokens and max_new_tokens=19"):
        responses.sample_responses(
            policy,
            responses.EncodedPrompts(ids, 64),
            mesh,
            Sampling(max_new_tokens=19, temperature=0.0),
            seed=0,
            batch_size=2,
        )


@pytest.mark.parametrize(("context", "slots"), [(256, 32), (40, 28), (32, 20)])
def test_slots_of_prompts_are_clipped_where_the_context_ends(
    context: int, slots: int, mesh, monkeypatch
):
    class Seen(Exception):
        """Carries the shape of the prompts."""

    def seen(model, params, prompts, *_, **__):
        raise Seen(prompts.tokens.shape)

    monkeypatch.setattr(responses, "generate_many", seen)
    policy = network(language_model, DecoderConfig(1152, context, 1, 16, 2))
    ids = [text.encode_prompt(TOKENIZER, sized(20)), text.encode_prompt(TOKENIZER, "Why?")]
    with pytest.raises(Seen, match=rf"\(2, {slots}\)"):
        responses.sample_responses(
            policy,
            responses.EncodedPrompts(ids, 32),
            mesh,
            Sampling(max_new_tokens=12),
            seed=3,
            batch_size=2,
        )


# ------------------------------------------------------------------------------------------- stages, from their files


@pytest.mark.parametrize("which", ["demonstrations", "validation"])
@pytest.mark.parametrize(
    ("model", "limit"), [("learned", "n_positions=32"), ("rotary", "max_position_embeddings=48")]
)
def test_sft_names_the_line_beyond_the_context(
    which: str, model: str, limit: str, models: Path, tmp_path: Path
):
    short = {"prompt": "Why?", "response": "So."}
    long = {"prompt": sized(60), "response": "So."}
    fine, bad = lines(tmp_path / "fine.jsonl", [short] * 4), tmp_path / "bad.jsonl"
    bad.write_text(
        f"{json.dumps(short)}\n\n{json.dumps(short)}\n{json.dumps(long)}\n"
    )  # an empty line is no record
    files = {"demonstrations": fine, "validation": fine, which: str(bad)}
    settings = config("sft", model=str(models / model), row_length="96", batch_size="2", **files)
    with pytest.raises(
        ValueError,
        match=rf"bad\.jsonl:4 has \d+ tokens and the context of .*{model} is .* \({limit}",
    ):
        sft.prepare(settings)


def test_sft_rows_may_be_longer_than_the_context_where_their_pieces_are_not(
    models: Path, tmp_path: Path
):
    """The positions of packed pieces begin at 0 each."""
    data = lines(tmp_path / "d.jsonl", [{"prompt": sized(20), "response": "So."}] * 8)
    files = {"demonstrations": data, "validation": data}
    setup = sft.prepare(
        config("sft", model=str(models / "learned"), row_length="96", batch_size="2", **files)
    )
    assert int(np.sum(setup.rows.segments > 0, axis=1).max()) > 32
    assert evaluate.lm_loss(setup.network.model, setup.network.params, setup.held) < 10
    documents = lines(tmp_path / "t.jsonl", [{"text": sized(70)}] * 40)
    mixed = config("sft", model=str(models / "learned"), row_length="96", batch_size="2", pretraining_fraction="0.2",
                   pretraining_text=documents, **files)  # fmt: skip
    with pytest.raises(
        ValueError,
        match=r"row_length=96 takes \d\d positions and the context of .*learned is 32 tokens",
    ):
        sft.prepare(mixed)


def test_pretraining_rows_beyond_the_models_context_are_refused():
    settings = config("pretrain", row_length="96", documents="20", held_out_documents="20")
    settings.model.context_length = 48
    with pytest.raises(
        ValueError, match=r"row_length=96 takes \d+ positions and the context of config.model is 48"
    ):
        pretrain.prepare(settings)


def test_evaluation_rankings_are_measured_before_the_reward_model_is_trained(
    models: Path, tmp_path: Path
):
    fine = {"prompt": "Why?", "responses": ["So.", "Who knows."], "ranks": [1, 2]}
    data = lines(tmp_path / "fine.jsonl", [fine] * 4)
    bad = lines(tmp_path / "bad.jsonl", [fine, fine | {"prompt": sized(60)}])
    settings = config("reward_model", model=str(models / "rotary"), rankings=data, demonstrations=data, row_length="64",
                      batch_size="2", **{"evaluation.validation_train": bad})  # fmt: skip
    with pytest.raises(
        ValueError, match=r"bad\.jsonl:2 has \d+ tokens and the context of .*rotary is 48 tokens"
    ):
        reward_model.prepare(settings)


@pytest.mark.parametrize(("model", "reward"), [("rotary", "wide"), ("wide", "learned")])
def test_ppo_measures_policy_and_reward_model_before_it_loads_one(
    model, reward, models: Path, monkeypatch, mesh
):
    monkeypatch.setattr(networks, "load_network", never)
    settings = config("ppo", model=str(models / model), reward_model=str(models / f"{reward}_reward"),
                      prompt_length="40", max_new_tokens="9")  # fmt: skip
    short = model if model != "wide" else reward
    with pytest.raises(
        ValueError, match=rf"prompt_length=40 with max_new_tokens=9 takes 49 positions .*{short}"
    ):
        ppo.prepare(settings, mesh)


def test_ppo_measures_its_pretraining_text(models: Path, tmp_path: Path, mesh):
    prompts = lines(tmp_path / "p.jsonl", [{"prompt": "Why?"}] * 8)
    documents = lines(tmp_path / "t.jsonl", [{"text": sized(70)}] * 40)
    for key in ("pretraining_text", "held_out_text"):
        settings = config("ppo", model=str(models / "rotary"), reward_model=str(models / "rotary_reward"),
                          prompts=prompts, prompt_length="16", max_new_tokens="8", ptx_row_length="96",
                          ptx_coef="1.0" if key == "pretraining_text" else "0.0", pretraining_text="",
                          held_out_text="")  # fmt: skip
        settings[key] = documents
        with pytest.raises(
            ValueError,
            match=r"ptx_row_length=96 takes \d\d positions and the context of .*rotary is 48",
        ):
            ppo.prepare(settings, mesh)


def test_the_pipeline_measures_ppo_before_its_first_stage(models: Path):
    settings = load_config(
        f"{ROOT}/configs/instructgpt/storyland.py:smoke", {"base": str(models / "rotary")}
    )
    settings.shapes.policy = {}
    with pytest.raises(
        ValueError, match=r"prompt_length=\d+ with max_new_tokens=\d+ takes \d+ positions"
    ):
        instructgpt.check_shapes(settings)


def test_sampling_measures_every_model_before_the_first_is_asked(
    models: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(networks, "load_network", never)
    prompts = lines(tmp_path / "p.jsonl", [{"prompt": "Why?"}, {"prompt": sized(30)}])
    names = f"({str(models / 'wide')!r}, {str(models / 'learned')!r})"
    settings = config(
        "sample",
        models=names,
        prompts=prompts,
        prompt_length="64",
        max_new_tokens="4",
        labelers="0",
    )
    with pytest.raises(
        ValueError,
        match=r"p\.jsonl: .* has 30 tokens and max_new_tokens=4 .*, together 34, .*learned",
    ):
        sample.run(settings, str(tmp_path / "out"))


@pytest.mark.parametrize(
    "wrong", ["models.ppo", "reward_model", "reference", "few_shot", "held_out_text"]
)
def test_evaluation_measures_all_models_before_it_loads_one(
    wrong: str, models: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(networks, "load_network", never)
    prompts = lines(tmp_path / "p.jsonl", [{"prompt": sized(30)}])
    shown = lines(tmp_path / "d.jsonl", [{"prompt": sized(100), "response": "So."}] * 3)
    documents = lines(tmp_path / "t.jsonl", [{"text": sized(300)}] * 40)
    wide, learned = str(models / "wide"), str(models / "learned")
    files = {
        "models.sft": wide,
        "models.ppo": wide,
        "reward_model": f"{wide}_reward",
        "reference": wide,
    }
    more = {
        "few_shot": {
            "models.base": wide,
            "few_shot.demonstrations": shown,
            "few_shot.examples": "3",
        },
        "held_out_text": {"held_out_text": documents, "held_out_row_length": "512"},
    }.get(wrong, {wrong: learned + "_reward" * (wrong == "reward_model")})
    base = {"held_out_text": "", "few_shot.demonstrations": "", "models.base": ""}
    settings = config(
        "evaluate", prompts=prompts, max_new_tokens="8", gold="", **(base | files | more)
    )
    found = {"few_shot": "few_shot.examples", "held_out_text": "held_out_row_length=512 takes"}.get(
        wrong, "together 38"
    )
    with pytest.raises(ValueError, match=rf"{found}.*context of"):
        evaluate.run(settings, str(tmp_path / "out"))


# ------------------------------------------------------------------------------------------------- where it is read


@pytest.mark.parametrize(
    ("fields", "length", "field"),
    [
        (
            {"model_type": "mistral", "max_position_embeddings": 90, "sliding_window": 40},
            40,
            "sliding_window=40",
        ),
        (
            {"model_type": "mistral", "max_position_embeddings": 90, "sliding_window": None},
            90,
            "max_position_embeddings",
        ),
        ({"model_type": "llama", "max_position_embeddings": 90}, 90, "max_position_embeddings=90"),
    ],
)
def test_the_field_that_limits_the_context_is_named(
    fields: dict, length: int, field: str, tmp_path: Path
):
    made = network(language_model, DecoderConfig(1152, 90, 1, 16, 2))
    save_hf(tmp_path, made.model, made.params, TOKENIZER)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(description | fields))
    found = contexts.of_folder(tmp_path)
    assert found.length == length
    assert f"{length} tokens ({field}" in str(found)
    assert (
        contexts.of_network(made, tmp_path).length == 90
    )  # the model that is loaded has the last word


def test_a_folder_without_a_config_is_left_to_who_loads_it(tmp_path: Path):
    assert contexts.of_folder(tmp_path / "nothing").length is None
    contexts.check(contexts.Context(None), [10**9], str)
    contexts.check(contexts.Context(3), [], str)


def test_a_record_without_a_line_is_named_by_its_place(tmp_path: Path):
    assert contexts.record_of("nowhere.jsonl", 4)(1) == "nowhere.jsonl: record 2 of 4"
    with pytest.raises(
        ValueError, match=r"here: record 2 of 2 has 9 tokens .* \(and 1 more are too long\)"
    ):
        contexts.check(contexts.Context(5), [7, 9], contexts.record_of("here", 2))
