"""The loop of PPO as it is run, on a network of a few thousand numbers: four iterations whole, and cut and resumed."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import ppo
from rlhf_jax import sharding
from rlhf_jax.backends import cpu_process
from rlhf_jax.data.schema import PlainText, Prompt, write_jsonl
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.data.text import load_tokenizer
from rlhf_jax.models.config import gpt2
from rlhf_jax.models.heads import language_model, scalar_from_language_model, scalar_model
from rlhf_jax.models.hf import load_hf, save_hf
from rlhf_jax.run import config as config_lib
from rlhf_jax.run import devices
from rlhf_jax.run.config import load_config
from rlhf_jax.run.metrics import to_host
from rlhf_jax.run.ppo import programs, settings, watch
from tests import margins

ROOT = Path(__file__).parents[1]
EPISODES, ITERATIONS, OPTIMIZER_STEPS = 8, 4, 4
PEAK, TARGET, HORIZON = 0.02, 0.05, 40


def inputs(folder: Path) -> dict[str, str]:
    """A random model, a reward model grown from it, one prompt many times over, and some text.

    A tenth of its embedding has no token, as where a table is padded: those ids would be drawn as often as others.
    """
    tokenizer = load_tokenizer(storyland_assets.assets())
    model = language_model(gpt2(len(tokenizer) + 128, 64, 1, 16, 2))
    params = model.init(jax.random.key(0))
    save_hf(folder / "model", model, params, tokenizer)
    reward_params = scalar_from_language_model(params, jax.random.key(1))
    save_hf(folder / "reward", scalar_model(model.config), reward_params, tokenizer)
    write_jsonl(
        folder / "prompts.jsonl", [Prompt("Write a story.", id=f"p{i}") for i in range(EPISODES)]
    )
    write_jsonl(
        folder / "text.jsonl", [PlainText(f"A dog and a cat. Number {i}.") for i in range(40)]
    )
    return {
        "model": str(folder / "model"),
        "reward_model": str(folder / "reward"),
        "prompts": str(folder / "prompts.jsonl"),
        "pretraining_text": str(folder / "text.jsonl"),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, compiled: list[str]) -> SimpleNamespace:
    """``whole`` ran without a break; ``cut`` stopped after three iterations, one past its checkpoint, and went on.

    `ahead` were compiled before the first iteration, `in_iterations` after it began.
    """
    folder = tmp_path_factory.mktemp("ppo")
    overrides = {
        "iterations": str(ITERATIONS), "episodes": str(EPISODES), "epochs": "2", "minibatches": "2", "save_every": "2",
        "prompt_length": "16", "max_new_tokens": "8", "ptx_row_length": "32", "ptx_rows_per_episode": "1.0",
        "gold": "", "schedule": "linear", "warmup_iterations": "0", "learning_rate": str(PEAK),
        "kl.controller": "adaptive", "kl.target": str(TARGET), "kl.horizon": str(HORIZON), "kl_ceiling": "1e6",
    }  # fmt: skip
    config = load_config(f"{ROOT}/configs/ppo/storyland.py:smoke", overrides | inputs(folder))
    sampled: list[np.ndarray] = []
    pieces = None
    prepare, sample, iterate = ppo.prepare, ppo.sample, ppo.iterate

    def prepare_once(*arguments):
        """The same config: the second and the third start use the programs that the first one compiled."""
        nonlocal pieces
        setup = prepare(*arguments)
        pieces = pieces or {"pieces": setup.pieces, "paired": setup.paired}
        return setup._replace(**pieces)

    def sample_and_keep(*arguments):
        samples = sample(*arguments)
        sampled.append(np.asarray(samples.tokens))
        return samples

    def pull_the_plug(setup, state, iteration, *rest):
        if iteration == 3:
            raise KeyboardInterrupt
        return iterate(setup, state, iteration, *rest)

    compile_ahead, ahead = programs.compile_ahead, []

    def compile_and_tell(*arguments):
        compiled.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                cpu_process, "has_accelerator", lambda: True
            )  # on a CPU nothing is compiled ahead
            compile_ahead(*arguments)
        ahead.extend(compiled)
        compiled.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "prepare", prepare_once)
        patch.setattr(ppo, "sample", sample_and_keep)
        patch.setattr(programs, "compile_ahead", compile_and_tell)
        result = ppo.run(config, str(folder / "whole"))
        in_iterations = list(compiled)
        patch.setattr(
            ppo, "check_step_zero", lambda *_: None
        )  # passed a moment ago, and compiles five programs
        patch.setattr(ppo, "iterate", pull_the_plug)
        with pytest.raises(KeyboardInterrupt):
            ppo.run(config, str(folder / "cut"))
        patch.setattr(ppo, "iterate", iterate)
        resumed = ppo.run(config, str(folder / "cut"))
    return SimpleNamespace(
        folder=folder, config=config, result=result, resumed=resumed, sampled=sampled, ahead=ahead,
        in_iterations=in_iterations,
    )  # fmt: skip


def history(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and k != "time"} for line in lines]


def column(runs: SimpleNamespace, name: str) -> list[float]:
    return [line[name] for line in history(runs.folder / "whole")]


def test_a_cut_run_that_goes_on_ends_bit_for_bit_like_a_whole_one(runs):
    """PITFALLS 49, J7: weights, average, moments, KL coefficient, keys, rate and place in the data; no line twice."""
    whole, cut = runs.folder / "whole", runs.folder / "cut"
    assert len(runs.sampled) == ITERATIONS + 3 + (
        ITERATIONS - 2
    )  # it did start again from its checkpoint
    for i, tokens in enumerate(runs.sampled[ITERATIONS:]):
        np.testing.assert_array_equal(tokens, runs.sampled[i if i < 3 else i - 1])
    for name in ("last", "ema"):
        for file in sorted((whole / name).iterdir()):
            assert file.read_bytes() == (cut / name / file.name).read_bytes(), file.name
    assert history(cut) == history(whole)
    assert runs.resumed["kl_coef"] == runs.result["kl_coef"]


def test_what_was_compiled_ahead_is_what_the_iterations_run(runs):
    """Another dtype, shape or placement of one argument would compile the program a second time."""
    phases = {"jit(_generate)", "jit(score_and_shape)", "jit(step)"}
    assert sorted(phases & set(runs.ahead)) == sorted(phases)
    assert not phases & set(runs.in_iterations)


def test_a_rollout_has_no_id_without_a_text(runs):
    """The check before the first update held the sampler's log-probs against those of the update."""
    tokens = np.concatenate([rows.ravel() for rows in runs.sampled])
    assert tokens.max() < len(load_tokenizer(storyland_assets.assets()))
    assert (tokens > 0).sum() > 300


def test_consecutive_rollouts_of_the_same_prompts_differ(runs):
    """PITFALL J2: one prompt, eight rows, four rollouts; no two rows are alike."""
    rows = [tuple(row) for tokens in runs.sampled[:ITERATIONS] for row in tokens.tolist()]
    assert len(rows) == ITERATIONS * EPISODES == len(set(rows))


def test_kl_is_zero_before_the_first_update_and_positive_after(runs):
    """PITFALL 30: the reference is a copy that stays; the policy moves away from it."""
    kl = column(runs, "rollout/kl_k3_nats_per_sequence")
    assert abs(kl[0]) < 1e-4
    assert min(kl[1:]) > 1e-3


def test_kl_controller_is_stepped_once_a_rollout(runs):
    """PITFALL 29: the coefficients that were used, against the rule by hand."""
    coef, kl = column(runs, "rollout/kl_coef"), column(runs, "rollout/kl_nats_per_sequence")
    expected = [runs.config.kl.coef]
    for value in kl:
        expected.append(
            expected[-1] * (1 + np.clip(value / TARGET - 1, -0.2, 0.2) * EPISODES / HORIZON)
        )
    np.testing.assert_allclose([*coef, runs.result["kl_coef"]], expected, rtol=1e-5)


def test_learning_rate_reaches_its_end_with_the_last_optimizer_step(runs):
    """PITFALL 38: linear to 0 over all optimizer steps, so the last iteration uses the last four rates."""
    total = ITERATIONS * OPTIMIZER_STEPS
    assert runs.result["optimizer_steps"] == total
    rates = PEAK * (1 - np.arange(total) / total)
    np.testing.assert_allclose(
        column(runs, "policy/lr"), rates.reshape(ITERATIONS, -1).mean(axis=1), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["warmup_iterations", "value_warmup_iterations"])
def test_a_warmup_as_long_as_the_run_is_refused_by_its_name(name):
    from configs.ppo.storyland import get_config

    config = get_config(f"iterations=5,{name}=4")
    settings.validate(config)
    config[name] = 5
    with pytest.raises(
        ValueError, match=f"^{name}=5: leaves none of iterations=5 for schedule=cosine"
    ):
        settings.validate(config)
    config.schedule = "constant"
    settings.validate(config)


def test_the_overoptimised_variant_is_storylands_ppo_off_its_leash():
    from configs.ppo.storyland import get_config

    usual, off = get_config().to_dict(), get_config("overoptimised").to_dict()
    changed = {key for key in usual if usual[key] != off[key]}
    assert changed == {"name", "iterations", "ptx_coef", "schedule", "kl", "kl_ceiling"}
    assert off["kl"]["coef"] < usual["kl"]["coef"] / 10


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two iterations that train adapters alone, and what the networks were before and after."""
    folder = tmp_path_factory.mktemp("lora")
    overrides = {
        "iterations": "2", "episodes": "8", "minibatches": "2", "prompt_length": "16", "max_new_tokens": "8",
        "ptx_row_length": "32", "ptx_rows_per_episode": "1.0", "gold": "", "kl_ceiling": "1e6", "save_every": "1",
        "learning_rate": "0.02", "value_learning_rate": "0.02", "warmup_iterations": "0",
        "train": "lora", "lora.rank": "2", "value_warmup_iterations": "0",
    }  # fmt: skip
    config = load_config(f"{ROOT}/configs/ppo/storyland.py:smoke", overrides | inputs(folder))
    setups = []
    with pytest.MonkeyPatch.context() as patch:
        prepare = ppo.prepare
        patch.setattr(
            ppo, "prepare", lambda *arguments: setups.append(prepare(*arguments)) or setups[-1]
        )
        ppo.run(config, str(folder / "run"))
    return SimpleNamespace(folder=folder, setup=setups[0])


def test_policy_and_reference_reward_model_and_value_network_share_their_base(lora_run):
    setup = lora_run.setup
    for network, trained in (
        (setup.policy, setup.trained_policy),
        (setup.reward, setup.trained_value),
    ):
        kernel = network.params["blocks"]["mlp"]["up"]["kernel"]
        assert trained.frozen["blocks"]["mlp"]["up"]["kernel"] is kernel
        assert trained.whole(trained.params)["blocks"]["mlp"]["up"]["kernel"] is kernel
        assert not kernel.is_deleted()  # the step donates its state and nothing else
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(tree))
        for tree in (setup.state.policy, setup.policy.params)
    ]
    assert (
        sizes[0] < sizes[1]
    )  # weights, moments and average of the adapters, beside one copy of the network


def test_adapters_are_trained_and_what_is_saved_is_merged(lora_run):
    before = load_hf(lora_run.folder / "model")[1]
    after = load_hf(lora_run.folder / "run" / "last")[1]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert moved["embed"]["embedding"] == 0.0
    assert moved["blocks"]["attention"]["query"]["kernel"] > 1e-4
    kl = [line["rollout/kl_nats_per_sequence"] for line in history(lora_run.folder / "run")]
    assert abs(kl[0]) < 1e-4 < 1e-2 < abs(kl[1])  # eight samples: the estimate may be negative


def test_the_stage_itself_gives_the_same_on_a_mesh_with_all_axes(runs, monkeypatch):
    """Two iterations on (2, 2, 2), networks cut or whole as their rules say, against the (8, 1, 1) of `runs`."""
    config = config_lib.unlocked_copy(runs.config)
    config.mesh = (2, 2, 2)
    config.sharding.value = config.sharding.reward_model = ()
    monkeypatch.setattr(ppo, "check_step_zero", lambda *_: None)
    mesh = devices.start(config.mesh)
    setup = ppo.prepare(config, mesh)
    shards = lambda params: {x.addressable_shards[0].data.size / x.size for x in kernels(params)}
    assert shards(setup.policy.params) == {0.25}
    assert shards(setup.reward.params) == {1.0}
    state = setup.state
    for iteration, expected in enumerate(history(runs.folder / "whole")[:2]):
        # Tokens of two meshes can be compared where rounding, grown by the first update, does not choose them.
        margins.assert_no_near_tie(
            partial(drawn, setup, state, iteration, config, mesh),
            state.policy.params,
            size=(1e-5, 1e-4)[iteration],
        )
        state, found = ppo.iterate(setup, state, iteration, config, mesh)
        found = to_host(found)
        assert shards(state.policy.params) == shards(state.policy.ema) == {0.25}
        assert shards(state.value.params) == {1.0}
        np.testing.assert_array_equal(
            found["rollout/response_tokens"], expected["rollout/response_tokens"]
        )
        for name in (
            "rollout/score",
            "rollout/kl_nats_per_sequence",
            "policy/loss",
            "policy/grad_norm",
            "value/loss",
        ):
            # The rate of this run is large: after 4 steps of Adam rounding has grown.
            limit = 2e-5 if iteration == 0 else 2e-3
            np.testing.assert_allclose(
                found[name], expected[name], rtol=limit, atol=limit, err_msg=name
            )
    assert setup.pieces.step._cache_size() == 1


def drawn(setup, state, iteration: int, config, mesh, params) -> jax.Array:
    """The tokens of an iteration, sampled with `params`."""
    state = dataclasses.replace(state, policy=dataclasses.replace(state.policy, params=params))
    places = np.arange(iteration * EPISODES, (iteration + 1) * EPISODES, dtype=np.int32)
    prompts = sharding.place_batch(
        dataclasses.replace(setup.prompts.at(iteration), ids=places), mesh
    )
    return ppo.sample(
        setup, state, prompts, watch.iteration_keys(config, iteration)[0], config
    ).tokens


def kernels(params) -> list[jax.Array]:
    return [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if "kernel" in jax.tree_util.keystr(path)
    ]
