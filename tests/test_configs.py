"""Every config file resolves, every key is read, and the presets hold the papers' numbers, written out here once more.

Sources of the numbers: [IG] Ouyang et al. 2022 (InstructGPT), [S20] Stiennon et al. 2020, [SFF] its released code,
[Z19] the released code of Ziegler et al. 2019, [HFB] Hugging Face's "N implementation details of RLHF with PPO".
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common as values
from experiments import (
    evaluate,
    instructgpt,
    ppo,
    prepare_data,
    pretrain,
    reward_model,
    sample,
    sft,
)
from rlhf_jax.data.loader import Batches
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.data.text import load_tokenizer
from rlhf_jax.models.config import gpt2
from rlhf_jax.models.heads import language_model, scalar_model
from rlhf_jax.models.hf import save_hf
from rlhf_jax.ppo import PPO
from rlhf_jax.run import optimizers
from rlhf_jax.run import rankings as ranked
from rlhf_jax.run.config import leaf_keys, load_config, record_reads, resolve
from rlhf_jax.run.ppo import settings
from rlhf_jax.run.ppo import setup as setup_lib
from rlhf_jax.steps import make_ppo_step, make_reward_step, make_sft_step, train_state
from rlhf_jax.types import KLState, LMBatch, PPOState, RankingBatch, Rollout

ROOT = Path(__file__).parents[1]
FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("configs/*/*.py"))
PRESETS = (
    "instructgpt_1_3b",
    "instructgpt_6b",
    "instructgpt_175b",
    "stiennon_tldr",
    "ziegler_stylistic",
)


def load(name: str, **overrides: str) -> ConfigDict:
    """A config file below ``configs/`` with its variant, as ``ppo/storyland:smoke``."""
    path, _, arg = name.partition(":")
    return load_config(f"{ROOT}/configs/{path}.py" + (f":{arg}" if arg else ""), overrides)


def preset(name: str, arg: str = "") -> ConfigDict:
    """The whole-pipeline config of a paper."""
    return load(f"instructgpt/{name}:{arg}")


# ------------------------------------------------------------------------------------------------------ resolving


@pytest.mark.parametrize("file", FILES)
def test_every_config_file_resolves_with_and_without_its_variants(file):
    path = f"{ROOT}/{file}"
    plain, smoke = load_config(path), load_config(f"{path}:smoke")
    assert leaf_keys(plain) >= {k for k in leaf_keys(smoke) if not k.startswith("shapes.")}
    assert json.dumps(plain.to_dict(), sort_keys=True) != json.dumps(
        smoke.to_dict(), sort_keys=True
    )
    assert plain.is_locked


@pytest.mark.parametrize("file", FILES)
def test_misspelt_keys_are_refused_with_the_nearest_name(file):
    key = max(leaf_keys(load_config(f"{ROOT}/{file}")), key=lambda k: len(k.split(".")[-1]))
    wrong, name = key[:-1], key.split(".")[-1]
    with pytest.raises(ValueError, match=f"no key '{name[:-1]}'; did you mean '{name}'"):
        load_config(f"{ROOT}/{file}", {wrong: "1"})
    with pytest.raises(ValueError, match="did you mean"):
        load_config(f"{ROOT}/{file}:smok")


def test_preset_files_are_all_there():
    assert {Path(f).stem for f in FILES if "instructgpt/" in f} >= {*PRESETS, "storyland"}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_keys_of_the_stages(name):
    """So that what is shown of the stages' keys below holds for the presets."""
    config = preset(name)
    for stage in values.STAGES:
        wanted, found = leaf_keys(getattr(values, stage)()), leaf_keys(config[stage])
        assert {k for k in wanted ^ found if not k.startswith("loss.")} == set(), stage


@pytest.mark.parametrize("name", PRESETS)
def test_preset_docstring_gives_paper_command_and_departures(name):
    text = (ROOT / "configs" / "instructgpt" / f"{name}.py").read_text()
    docstring = text.split('"""')[1]
    assert "https://arxiv.org/abs/" in docstring
    assert f"--config=configs/instructgpt/{name}.py" in docstring
    assert "departs from the paper" in docstring


# ----------------------------------------------------------------------------------------- the papers' numbers

EVERY_INSTRUCTGPT = {
    "data.demonstrations": 12_725,  # [IG table 6]
    "data.ranking_prompts": 33_207,  # [IG table 6]
    "data.ppo_prompts": 31_144,  # [IG table 6]
    "data.validation_prompts": 1_653,  # [IG table 9: SFT validation]
    "data.test_prompts": 3_196,  # [IG table 9]
    "data.labelers": 40,  # [IG 3.4]: about 40
    "sft.epochs": 16,  # [IG C.1]
    "sft.schedule": "cosine",  # [IG C.1]
    "sft.dropout": 0.2,  # [IG C.1]
    "sft.pretraining_fraction": 0.0,  # [IG C.1]
    "sft.pieces_per_row": 1,  # so that 32 rows are 32 demonstrations
    "ppo_init.epochs": 2,  # [IG C.3]
    "ppo_init.pretraining_fraction": 0.1,  # [IG C.3]
    "ppo_init.schedule": "cosine",  # [IG C.3]
    "sample.min_k": 4,  # [IG 3.5]
    "sample.max_k": 9,  # [IG 3.5]
    "sample.prompt_length": 1024,  # [IG C]: 1k
    "sample.max_new_tokens": 1024,  # [IG C]: 1k
    "reward_model.epochs": 1,  # [IG C.2]
    "reward_model.learning_rate": 9e-6,  # [IG C.2]
    "reward_model.schedule": "cosine",  # [IG C.2]
    "reward_model.batch_size": 64,  # [IG C.2]: prompts
    "reward_model.prompts_per_row": 1,  # so that 64 rows are 64 prompts
    "reward_model.max_k": 9,  # [IG 3.5]
    "reward_model.loss.fn": "rlhf_jax.losses.ranking:ranking_loss",  # [IG eq. 1]
    "reward_model.bias_demonstrations": 12_725,  # [IG 3.5]: all demonstrations score 0 on average
    "ppo.kl.controller": "fixed",  # [IG C.4]
    "ppo.kl.coef": 0.02,  # [IG C.4]
    "ppo.ptx_coef": 27.8,  # [IG C.4]
    "ppo.ptx_rows_per_episode": 8.0,  # [IG C.4]
    "ppo.episodes": 512,  # [IG C.4]: batch
    "ppo.minibatches": 8,  # [IG C.4]: minibatch 64
    "ppo.epochs": 1,  # [IG C.4]: inner epochs
    "ppo.iterations": 500,  # [IG C.4]: 256k episodes
    "ppo.policy_loss.clip_ratio": 0.2,  # [IG C.4]
    "ppo.value_loss.clip_value": 0.2,  # not in the paper; [Z19]
    "ppo.gamma": 1.0,  # [IG C.4]: no discount
    "ppo.lam": 0.95,  # not in the paper; [S20 B.1, Z19]
    "ppo.temperature": 1.0,  # [IG C.4]
    "ppo.schedule": "constant",  # [IG C.4]
    "ppo.warmup_iterations": 10,  # [IG C.4]
    "ppo.ema_decay": 0.992,  # [IG C.4]
    "ppo.prompt_length": 1024,  # [IG C]: 1k
    "ppo.max_new_tokens": 1024,  # [IG C]: 1k
    "ppo.missing_eos_score": None,  # not in the paper
    "ppo.whiten_rewards": False,  # not in the paper
    "shapes.reward_model.layers": 32,  # [IG C.2]: one reward model of 6B; sizes of GPT-3
    "shapes.reward_model.width": 4096,
    "shapes.policy.vocab_size": 50_257,
    "shapes.policy.context_length": 2048,  # [IG C]: 2k
} | {f"{stage}.{key}": value for stage in ("sft", "ppo_init", "reward_model", "ppo")
     for key, value in {"optimizer": "adam", "b1": 0.9, "b2": 0.95}.items()}  # [IG C]  # fmt: skip

NUMBERS = {
    "instructgpt_1_3b": EVERY_INSTRUCTGPT
    | {
        "sft.learning_rate": 9.65e-6,  # [IG C.1]
        "sft.batch_size": 32,  # [IG C.1]
        "ppo_init.learning_rate": 5e-6,  # [IG C.3]
        "ppo_init.batch_size": 32,  # [IG C.3]
        "ppo.value_learning_rate": 9e-6,  # [IG C.4]
        "shapes.policy.layers": 24,  # [S20 table 3]
        "shapes.policy.width": 2048,  # [S20 table 3]
        "shapes.policy.heads": 16,  # [S20 table 3]
    },
    "instructgpt_6b": EVERY_INSTRUCTGPT
    | {
        "sft.learning_rate": 9.65e-6,  # [IG C.1]
        "sft.batch_size": 32,  # [IG C.1]
        "ppo_init.learning_rate": 1.04e-5,  # [IG C.3]
        "ppo_init.batch_size": 32,  # [IG C.3]
        "ppo.value_learning_rate": 9e-6,  # [IG C.4]
        "shapes.policy.layers": 32,  # [S20 table 3]
        "shapes.policy.width": 4096,  # [S20 table 3]
        "shapes.policy.heads": 32,  # [S20 table 3]
    },
    "instructgpt_175b": EVERY_INSTRUCTGPT
    | {
        "sft.learning_rate": 5.03e-6,  # [IG C.1]
        "sft.batch_size": 8,  # [IG C.1]
        "ppo_init.learning_rate": 2.45e-6,  # [IG C.3]
        "ppo_init.batch_size": 8,  # [IG C.3]
        "ppo.value_learning_rate": 5e-6,  # [IG C.4]
        "shapes.policy.layers": 96,  # Brown et al. 2020, table 2.1
        "shapes.policy.width": 12_288,
        "shapes.policy.heads": 96,
    },
    "stiennon_tldr": {
        "sft.epochs": 1,  # [S20 B.1]
        "sft.batch_size": 128,  # [S20 B.1]
        "sft.learning_rate": 6.35e-5,  # [S20 B.1]
        "sft.schedule": "cosine",  # [S20 B.1]
        "ppo_init.epochs": 1,  # [S20 B.1]: the policy starts from the supervised model
        "ppo_init.batch_size": 128,
        "ppo_init.learning_rate": 6.35e-5,
        "ppo_init.pretraining_fraction": 0.0,
        "sample.min_k": 2,  # [S20 3.4]: pairs
        "sample.max_k": 2,
        "reward_model.epochs": 1,  # [S20 B.1]
        "reward_model.batch_size": 64,  # [S20 B.1]
        "reward_model.learning_rate": 1.5e-5,  # [S20 B.1]
        "reward_model.schedule": "cosine",  # [S20 B.1]
        "reward_model.loss.fn": "rlhf_jax.losses.ranking:ranking_loss",  # [S20 3.4]
        "ppo.gamma": 1.0,  # [S20 B.1]
        "ppo.lam": 0.95,  # [S20 B.1]
        "ppo.epochs": 4,  # [S20 B.1]
        "ppo.learning_rate": 1.5e-5,  # [S20 B.1]
        "ppo.schedule": "linear",  # [S20 B.1]
        "ppo.warmup_iterations": 0,
        "ppo.kl.controller": "fixed",  # [S20 B.1]
        "ppo.kl.coef": 0.05,  # [S20 B.1]
        "ppo.episodes": 512,  # [S20 B.1]
        "ppo.ptx_coef": 0.0,  # no pretraining mix
        "ppo.prompt_length": 512,  # [SFF]
        "ppo.max_new_tokens": 48,  # [SFF; S20 3.2]
        "evaluate.temperature": 0.0,  # [S20 3.4]
        "data.ranking_prompts": 64_832,  # [SFF]
        "shapes.policy.layers": 24,  # [S20 table 3]
        "shapes.policy.width": 2048,
        "shapes.policy.heads": 16,
        "shapes.reward_model.width": 2048,  # [S20 3.4]: all of the same size
    },
    "ziegler_stylistic": {
        "sample.min_k": 4,  # [Z19]: best of 4
        "sample.max_k": 4,
        "sample.temperature": 0.7,  # [Z19]
        "data.ranking_prompts": 4_992,  # [Z19]
        "reward_model.loss.fn": "rlhf_jax.losses.ranking:best_of_loss",  # [Z19]
        "reward_model.epochs": 1,  # [Z19]
        "reward_model.batch_size": 32,  # [Z19]
        "reward_model.learning_rate": 5e-5,  # [Z19]
        "reward_model.schedule": "linear",  # [Z19]
        "ppo.episodes": 512,  # [Z19]
        "ppo.minibatches": 1,  # [Z19]
        "ppo.epochs": 4,  # [Z19]
        "ppo.learning_rate": 1e-5,  # [Z19]
        "ppo.schedule": "linear",  # [Z19]
        "ppo.optimizer": "tf_adam",  # [HFB]
        "ppo.adam_eps": 1e-5,  # [HFB]
        "ppo.policy_loss.clip_ratio": 0.2,  # [Z19]
        "ppo.value_loss.clip_value": 0.2,  # [Z19]
        "ppo.gamma": 1.0,  # [Z19]
        "ppo.lam": 0.95,  # [Z19]
        "ppo.whiten_rewards": True,  # [Z19]
        "ppo.whiten_advantages": True,  # [Z19]
        "ppo.kl.controller": "adaptive",  # [Z19]
        "ppo.kl.coef": 0.15,  # [Z19]
        "ppo.kl.target": 6.0,  # [Z19]
        "ppo.kl.horizon": 10_000,  # [Z19]
        "ppo.temperature": 0.7,  # [Z19]
        "ppo.prompt_length": 64,  # [Z19]
        "ppo.max_new_tokens": 24,  # [Z19]
        "ppo.missing_eos_score": -1.0,  # [Z19]
        "ppo.ptx_coef": 0.0,
        "shapes.policy.layers": 12,  # [Z19]: 124M
        "shapes.policy.width": 768,
        "shapes.policy.heads": 12,
        "shapes.policy.context_length": 1024,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in PRESETS for key in NUMBERS[name]]
)
def test_preset_value_is_the_papers(name, key):
    value = preset(name)
    for part in key.split("."):
        value = value[part]
    assert value == NUMBERS[name][key]
    assert type(value) is type(NUMBERS[name][key])


def test_policy_learning_rates_lie_in_the_swept_ranges():
    """[IG C.4, E.9]: 2.55e-6 to 2.55e-5 for 1.3B and 6B, of which above 8.05e-6 diverged; two values for 175B."""
    for name in ("instructgpt_1_3b", "instructgpt_6b"):
        assert 2.55e-6 <= preset(name).ppo.learning_rate <= 8.05e-6
    assert preset("instructgpt_175b").ppo.learning_rate in (2.55e-6, 3.74e-6)


# ------------------------------------------------------------------------------------------------- arithmetic


def test_ppo_arithmetic_of_the_paper():
    """512 / 64 -> 8 optimizer steps an iteration; 256k episodes -> 500 iterations, 4,000 steps; 512 ptx rows a step."""
    config = preset("instructgpt_1_3b").ppo
    steps = config.epochs * config.minibatches
    assert (config.episodes // config.minibatches, steps) == (64, 8)
    assert (config.iterations * config.episodes, config.iterations * steps) == (256_000, 4_000)
    assert config.ptx_rows_per_episode * config.episodes / steps == 512
    assert (
        round(256_000 / preset("instructgpt_1_3b").data.ppo_prompts, 1) == 8.2
    )  # visits of a prompt


@pytest.mark.parametrize("name", ["stiennon_tldr", "ziegler_stylistic"])
def test_a_million_episodes_need_1954_iterations(name):
    config = preset(name).ppo
    assert config.iterations == math.ceil(1_000_000 / config.episodes) == 1954


def test_supervised_steps_of_the_paper():
    """12,725 x 16 / 32 = 6,363 steps of SFT (an epoch's last batch is filled up here), 33,207 / 64 = 519 of rewards."""
    config = preset("instructgpt_1_3b")
    demonstrations = Batches(
        {"row": np.zeros(config.data.demonstrations)}, batch_size=config.sft.batch_size, seed=0
    )
    prompts = Batches(
        {"row": np.zeros(config.data.ranking_prompts)},
        batch_size=config.reward_model.batch_size,
        seed=0,
    )
    assert demonstrations.steps(config.sft.epochs) == 6_363
    assert demonstrations.steps(1) * config.sft.epochs - 6_363 < config.sft.epochs
    assert prompts.steps(config.reward_model.epochs) == 519


def test_learning_rates_over_the_run():
    """[IG C.1, C.2]: cosine to 10%, no warmup. [IG C.4]: a tenth, up to the peak over 10 iterations. [Z19]: to zero."""
    cosine = optimizers.schedule("cosine", 9.65e-6, 6_363)
    np.testing.assert_allclose([cosine(0), cosine(6_363)], [9.65e-6, 9.65e-7], rtol=1e-5)
    warmup = optimizers.schedule("constant", 1.0, 4_000, warmup=80)
    np.testing.assert_allclose([warmup(0), warmup(80), warmup(3_999)], [0.1, 1.0, 1.0], rtol=1e-5)
    linear = optimizers.schedule("linear", 1.0, 10)
    np.testing.assert_allclose([linear(0), linear(9), linear(10)], [1.0, 0.1, 0.0], atol=1e-6)
    later = optimizers.schedule("linear", 1.0, 14, warmup=4)
    np.testing.assert_allclose(
        [later(0), later(4), later(13), later(14)], [0.1, 1.0, 0.1, 0.0], atol=1e-6
    )
    with pytest.raises(ValueError, match="leaves none for schedule=linear"):
        optimizers.schedule("linear", 1.0, 10, warmup=10)
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        optimizers.schedule("cosin", 1.0, 10)


def test_ppo_optimizers_take_their_rates_from_the_config():
    """Warmup is counted in optimizer steps: 10 iterations of 8; both networks, each to its own peak."""
    config = preset("instructgpt_1_3b").ppo
    params = {"w": jnp.ones(3)}
    for tx, peak in zip(setup_lib.optimizers(config), (8.05e-6, 9e-6), strict=True):
        state, moved = tx.init(params), []
        for _ in range(81):
            update, state = tx.update({"w": jnp.ones(3)}, state, params)
            moved.append(float(-update["w"][0]))
        np.testing.assert_allclose(
            [moved[0], moved[80]], [0.1 * peak, peak], rtol=1e-3
        )  # Adam: 1 for a constant gradient


# ------------------------------------------------------------------ steps at the papers' sizes, in the abstract


def abstract(tree):
    """Shapes instead of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def bools(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def lm_batch(rows: int, length: int) -> LMBatch:
    return LMBatch(ints(rows, length), ints(rows, length), ints(rows, length), bools(rows, length))


def networks(config: ConfigDict):
    policy = language_model(gpt2(**config.shapes.policy, **config.ppo.decoder))
    return policy, scalar_model(gpt2(**config.shapes.reward_model, **config.ppo.decoder))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_takes_an_abstract_step_of_each_kind_at_its_real_size(name):
    """Nothing is computed: shapes, types and divisions of SFT, reward and PPO steps go through the real steps."""
    config = preset(name)
    policy, value = networks(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    weights = [jax.eval_shape(model.init, key) for model in (policy, value)]

    tx = optimizers.optimizer(config.sft, 1e-5)
    state = jax.eval_shape(lambda p: train_state(p, tx), weights[0])
    batch = lm_batch(config.sft.batch_size, config.sft.row_length)
    after, metrics = jax.eval_shape(
        make_sft_step(policy, tx, microbatches=config.sft.microbatches), state, batch, None
    )
    assert abstract(after) == abstract(state)
    assert "sft/loss" in metrics

    state = jax.eval_shape(lambda p: train_state(p, tx), weights[1])
    rows = config.reward_model.batch_size
    slots, k = (rows, config.reward_model.row_length), (rows, 1, config.reward_model.max_k)
    rankings = RankingBatch(
        ints(*slots), ints(*slots), ints(*slots), ints(*slots), ints(*k), ints(*k)
    )
    loss = resolve(config.reward_model.loss, available=("rewards", "ranks"))
    after, metrics = jax.eval_shape(make_reward_step(value, tx, loss=loss), state, rankings, None)
    assert abstract(after) == abstract(state)
    assert "reward/accuracy" in metrics

    after, state = ppo_step(config.ppo, policy, value, weights, key)
    assert abstract(after) == abstract(state)


def ppo_step(config: ConfigDict, policy, value, weights, key):
    settings.validate(config)
    numbers = PPO(
        ptx_coef=config.ptx_coef, epochs=config.epochs, minibatches=config.minibatches,
        microbatches=config.microbatches, temperature=config.temperature,
    )  # fmt: skip
    policy_tx, value_tx = txs = setup_lib.optimizers(config)
    step = make_ppo_step(policy, value, txs, numbers, losses=settings.losses(config))
    b, t = config.episodes, config.prompt_length + config.max_new_tokens
    rollout = Rollout(
        tokens=ints(b, t), mask=bools(b, t), old_logp=floats(b, t), ref_logp=floats(b, t), old_values=floats(b, t),
        rewards=floats(b, t), advantages=floats(b, t), returns=floats(b, t), score=floats(b),
        prompt_lengths=ints(b), lengths=ints(b), finished=bools(b), ids=ints(b),
    )  # fmt: skip
    pretraining = None
    if config.ptx_coef:
        pretraining = lm_batch(round(config.ptx_rows_per_episode * b), config.ptx_row_length)
    state = PPOState(
        policy=jax.eval_shape(lambda p: train_state(p, policy_tx, ema=True), weights[0]),
        value=jax.eval_shape(lambda p: train_state(p, value_tx), weights[1]),
        kl=KLState(floats()),
        iteration=ints(),
    )
    after, _ = jax.eval_shape(step, state, rollout, pretraining, key)
    return after, state


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("instructgpt_1_3b", 1.3),
        ("instructgpt_6b", 6.7),
        ("instructgpt_175b", 174.6),
        ("ziegler_stylistic", 0.124),
    ],
)
def test_preset_sizes_have_the_parameters_of_their_name(name, billions):
    policy, _ = networks(preset(name))
    count = sum(
        math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(policy.init, jax.random.key(0)))
    )
    np.testing.assert_allclose(count / 1e9, billions, rtol=0.015)


# ------------------------------------------------------------------------ every key is read (PITFALLS J5): real stages

TINY = {"row_length": "256", "batch_size": "8", "clip_norm": "1.0"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """Every stage run once at its smoke size on a network of a few thousand numbers: config, keys read, result."""
    folder = tmp_path_factory.mktemp("stages")
    model = tiny_model(folder / "base")
    stages: dict[str, SimpleNamespace] = {}

    def run(stage: str, run_stage, name: str, **overrides: str) -> dict:
        config = load(name, **{key.replace("__", "."): value for key, value in overrides.items()})
        recorded, reads = record_reads(config)
        result = run_stage(recorded, str(folder / stage))
        stages[stage] = SimpleNamespace(
            config=config, unread=leaf_keys(config) - reads, result=result
        )
        return result

    few = dict.fromkeys(
        ("demonstrations", "ranking_prompts", "ppo_prompts", "validation_prompts", "test_prompts"),
        "16",
    )
    run(
        "data",
        prepare_data.run,
        "data/storyland:smoke",
        **few,
        documents="100",
        held_out_documents="40",
    )
    data = {p.stem: str(p) for p in (folder / "data").glob("*.jsonl")}
    run(
        "pretrain", pretrain.run, "pretrain/storyland:smoke",
        documents="60", held_out_documents="60", batch_size="8", evaluate_every="2", model__width="16",
    )  # fmt: skip
    run(
        "sft", sft.run, "sft/storyland:smoke", **TINY, epochs="1", model=model,
        demonstrations=data["demonstrations"], validation=data["demonstrations_validation"],
        pretraining_text=data["corpus"], pretraining_fraction="0.2",
    )  # fmt: skip
    run(
        "sample", sample.run, "sample/storyland:smoke", models=f"({model!r},)", prompts=data["prompts_ranking"],
        max_new_tokens="16", batch_size="32", min_k="4", max_k="4",
    )  # fmt: skip
    rankings = str(folder / "sample" / "rankings.jsonl")
    rewards = run(
        "reward_model", reward_model.run, "reward_model/storyland:smoke", model=model, rankings=rankings,
        demonstrations=data["demonstrations"], evaluation__validation_train=rankings, score_batch_size="32",
        loss="rlhf_jax.losses.ranking:best_of_loss",
    )  # fmt: skip
    prompts = {
        "prompts": data["prompts_ppo"],
        "pretraining_text": data["corpus"],
        "held_out_text": data["corpus_held_out"],
    }
    trained = run(
        "ppo", ppo.run, "ppo/storyland:smoke", model=model, reward_model=rewards["model"], **prompts,
        iterations="2", ptx_rows_per_episode="3.0", max_new_tokens="16", kl__controller="adaptive",
        epochs="3", schedule="linear", warmup_iterations="0", optimizer="tf_adam", whiten_rewards="True",
    )  # fmt: skip
    run(
        "evaluate", evaluate.run, "evaluate/storyland:smoke", models__base=model, models__sft=model,
        models__ppo_ptx=trained["ema"], reference=model, reward_model=rewards["model"], prompts=data["prompts_test"],
        held_out_text=data["corpus_held_out"], few_shot__demonstrations=data["demonstrations"], max_new_tokens="16",
        baseline_samples="1", batch_size="16", limit="8",
    )  # fmt: skip
    return stages


def tiny_model(folder: Path) -> str:
    """A random GPT-2 of one layer with storyland's tokenizer."""
    tokenizer = load_tokenizer(storyland_assets.assets())
    model = language_model(gpt2(len(tokenizer), 512, 1, 16, 2))
    save_hf(folder, model, model.init(jax.random.key(0)), tokenizer)
    return str(folder)


STAGES = ("data", "pretrain", "sft", "sample", "reward_model", "ppo", "evaluate")


@pytest.mark.parametrize("stage", STAGES)
def test_no_config_key_is_declared_and_never_read(ran, stage):
    assert ran[stage].unread == set()


def test_number_of_optimizer_steps_is_epochs_times_minibatches(ran):
    """Of the PPO stage itself: no key of the loop is without effect."""
    config, result = ran["ppo"].config, ran["ppo"].result
    assert (
        result["optimizer_steps"]
        == config.iterations * config.epochs * config.minibatches
        == 2 * 3 * 2
    )
    assert result["episodes"] == config.iterations * config.episodes


def test_the_adaptive_controller_of_the_config_acts(ran):
    assert ran["ppo"].result["kl_coef"] != ran["ppo"].config.kl.coef


def test_every_file_below_configs_belongs_to_a_stage_that_ran(ran):
    assert {Path(f).parts[1] for f in FILES} <= {*ran, "instructgpt"}


# ------------------------------------------------------------------------------------------------- the pipeline


def test_base_model_of_another_size_is_refused(tmp_path):
    model = tiny_model(tmp_path / "base")
    config, reads = record_reads(
        load("instructgpt/instructgpt_1_3b", **{"base": model, "reward_model.model": model})
    )
    with pytest.raises(
        ValueError,
        match=r"base=.* has context_length=512 and this config is for context_length=2048",
    ):
        instructgpt.check_shapes(config)
    with pytest.raises(ValueError, match="base is empty: pass the folder"):
        instructgpt.check_shapes(preset("instructgpt_1_3b"))
    with config.unlocked():
        for shape in config.shapes.values():
            shape.update(layers=1, width=16, heads=2, context_length=512)
            shape.vocab_size = len(load_tokenizer(storyland_assets.assets()))
        config.ppo.update(prompt_length=256, max_new_tokens=256)
    instructgpt.check_shapes(config)
    assert {k for k in leaf_keys(config) if k.startswith("shapes.")} <= reads


def test_pipeline_hands_its_own_keys_and_each_group_to_the_stages(tmp_path, monkeypatch):
    """`base` and `seed` reach the stages, and each stage gets its own group."""
    given = {}
    monkeypatch.setattr(
        sft,
        "run",
        lambda config, folder: given.setdefault(folder, config.to_dict()) and {"last": "x"},
    )
    monkeypatch.setattr(
        instructgpt.Pipeline, "done", lambda self, name: {"last": name, "model": name}
    )
    monkeypatch.setattr(
        ppo, "run", lambda config, folder: given.setdefault(folder, config.to_dict())
    )
    monkeypatch.setattr(ranked, "read_rankings", lambda path: [])
    monkeypatch.setattr(instructgpt, "agreement", lambda rankings: 0.5)
    monkeypatch.setattr(
        reward_model,
        "run",
        lambda config, folder: given.setdefault(folder, config.to_dict()) and {},
    )
    config = load("instructgpt/storyland:smoke", seed="7", base="my_base")
    pipeline = instructgpt.Pipeline(config, tmp_path)
    pipeline.sft("sft")
    pipeline.ppo_init("ppo_init")
    pipeline.reward_model("reward_model")
    pipeline.ppo("ppo", ptx=False)
    for stage in ("sft", "ppo_init", "reward_model", "ppo"):
        assert given[stage]["seed"] == 7
        changed = {k for k, v in config[stage].to_dict().items() if given[stage][k] != v}
        assert changed <= {
            "seed", "model", "demonstrations", "validation", "pretraining_text", "rankings", "evaluation", "name",
            "reward_model", "prompts", "held_out_text", "ptx_coef",
        }  # fmt: skip
    assert given["sft"]["model"] == given["ppo_init"]["model"] == "my_base"
    assert given["reward_model"]["model"] == "sft"
    assert given["ppo"]["ptx_coef"] == 0.0
