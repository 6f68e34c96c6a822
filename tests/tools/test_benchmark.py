"""The benchmark measures the work it claims: FLOPs by hand, each suite at its smallest size, ratios, refusals."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.backends import cpu_process
from rlhf_jax.models.config import DecoderConfig, gpt2
from tools import benchmark, suites

TINY = (
    "--layers=1", "--width=16", "--heads=2", "--vocab=64", "--batch=2", "--prompt_len=6", "--new_tokens=8", "--k=3",
    "--steps=2", "--warmup=1",
)  # fmt: skip


@pytest.fixture
def run(capsys, monkeypatch):
    """The last line of a run's output, as an object, and all lines."""
    # Settings for a process of its own, which the tests are not.
    monkeypatch.setattr(benchmark.devices, "start", lambda shape: None)
    monkeypatch.setattr(benchmark.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(suites, "bandwidth", lambda: 1e10)

    def run(*flags):
        benchmark.main([*flags, "--json"])
        lines = capsys.readouterr().out.splitlines()
        return json.loads(lines[-1]), lines

    return run


@pytest.mark.parametrize("suite", ["sft", "reward", "decode", "ppo", "slots"])
def test_each_suite_prints_a_table_and_one_object(run, suite):
    found, lines = run(suite, *TINY, *(("--prompts=5",) if suite == "slots" else ()))
    for name in (
        "s_per_step_median",
        "s_per_step_min",
        "tokens_per_s",
        "peak_rss_mb",
        "flops_per_step",
    ):
        assert found[name] > 0, name
    assert found["compile_s"] >= 0
    assert found["s_per_step_min"] <= found["s_per_step_median"]
    assert found["suite"] == suite
    assert found["width"] == 16
    assert any("share of the matrix rate" in line for line in lines)


def test_tokens_of_a_step(run):
    assert run("sft", *TINY)[0]["tokens_per_step"] == 2 * 14
    assert run("reward", *TINY)[0]["tokens_per_step"] == 2 * (6 + 3 * 8)  # the prompt once
    assert run("decode", *TINY)[0]["tokens_per_step"] == 2 * 8


def test_a_ppo_iteration_tells_its_pieces(run):
    found, _ = run("ppo", *TINY, "--epochs=2", "--minibatches=2")
    assert min(found["rollout_s"], found["score_s"], found["update_s"]) > 0


def test_ppo_compiles_each_program_once_and_ahead(run, compiled, monkeypatch):
    together, ahead = suites.compiling.compile_together, []

    def compile_and_tell(programs):
        compiled.clear()
        together(programs)
        ahead.extend(compiled)

    monkeypatch.setattr(cpu_process, "has_accelerator", lambda: True)
    monkeypatch.setattr(suites.compiling, "compile_together", compile_and_tell)
    run("ppo", *TINY, "--width=24")
    phases = ["jit(_generate)", "jit(score_and_shape)", "jit(step)"]
    for names in (ahead, compiled):  # which of them ends first is chance
        assert sorted(name for name in names if name in phases) == phases


def test_an_epoch_packs_ragged_texts(run, tmp_path):
    documents = [list(range(1, 1 + n)) for n in (5, 40, 17, 63, 9, 30)]
    path = tmp_path / "ids.jsonl"
    benchmark.write_ids(documents, path)
    found, lines = run("sft_epoch", *TINY, f"--data={path}")
    assert found["tokens_per_step"] == sum(map(len, documents))
    assert any("in 3 rows of 64" in line for line in lines)


def test_flops_are_those_counted_by_hand():
    config = gpt2(8192, 128, 4, 256, 4)
    # A token: 12 D^2 weights a block, twice; causal pairs; the head.
    blocks = 4 * 2 * 12 * 256**2 * 1024
    attention = 4 * 4 * 256 * 8 * 128 * 129 / 2
    head = 2 * 256 * 8192 * 512
    assert suites.forward_flops(config, [128] * 8, targets=512) == blocks + attention + head


def test_flops_of_grouped_heads_and_a_gated_mlp():
    config = DecoderConfig(100, 16, 1, 8, 4, kv_heads=2, mlp_width=24)
    weights = 8 * (8 + 4 + 4 + 8) + 3 * 8 * 24  # query, key, value, out; gate, up, down
    assert suites.forward_flops(config, [3], targets=1) == 2 * weights * 3 + 4 * 8 * 6 + 2 * 8 * 100


@pytest.mark.parametrize(("epochs", "gigaflops"), [(1, 78), (4, 218)])
def test_an_iteration_of_ppo_has_the_known_number_of_flops(epochs, gigaflops):
    a = benchmark.parse(["ppo", f"--epochs={epochs}"])
    flops = suites._ppo_flops(a, suites.decoder(a, 128))
    assert flops == pytest.approx(gigaflops * 1e9, rel=0.02)


def test_ranking_rows_share_the_prompt():
    a = benchmark.parse(["reward", *TINY])
    rows = suites.ranking_rows(a, 0)
    assert rows.tokens.shape == (2, 6 + 3 * 8)
    np.testing.assert_array_equal(jnp.unique(rows.segments), [1, 2, 3, 4])
    assert suites._shared_pairs(a) == 21 + 3 * (8 * 6 + 36)


def test_ratios_are_theirs_over_ours():
    def side(median, fastest, peak):
        return {"s_per_step_median": median, "s_per_step_min": fastest, "peak_rss_mb": peak}

    found = benchmark.ratios(
        [(side(1.0, 0.5, 100), side(3.0, 2.0, 400)), (side(3.0, 1.0, 200), side(5.0, 4.0, 300))]
    )
    assert found["ratio_median"] == 2.0
    assert found["ratio_min"] == 4.0
    assert found["ratio_of_each_round"] == pytest.approx([3.0, 5 / 3])
    assert found["memory_ratio"] == 0.5


def test_ours_and_the_peer_are_run_in_turn_on_the_same_flags(run, monkeypatch, tmp_path):
    peer = tmp_path / "peer"
    calls = []

    def fake(command, **_):
        calls.append(command)
        seconds = 2.0 if command[0] == str(peer) else 1.0
        figures = {
            "s_per_step_median": seconds,
            "s_per_step_min": seconds,
            "peak_rss_mb": 1.0,
            "compile_s": 3.0,
        }
        return benchmark.subprocess.CompletedProcess(command, 0, json.dumps(figures), "")

    monkeypatch.setattr(benchmark.subprocess, "run", fake)
    found, _ = run("ppo", *TINY, "--peer=trl", f"--peer_python={peer}", "--rounds=2")
    assert found["ratio_median"] == 2.0
    assert [call[0] == str(peer) for call in calls] == [False, True, False, True]
    flags = [
        {f for f in call if f.startswith("--") and f.partition("=")[0] in ("--width", "--batch")}
        for call in calls
    ]
    assert flags == [{"--width=16", "--batch=2"}] * 4
    assert calls[0][0] == sys.executable


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["sft", "--batch=0"], "--batch=0 must be at least 1"),
        (["sft", "--heads=3"], "--heads=3 must divide --width=256"),
        (["ppo", "--minibatches=3"], "--minibatches=3 must divide --batch=8"),
        (["sft", "--dtype=float16"], "choose float32 or bfloat16"),
        (["sft_epoch", "--data=nowhere.jsonl"], "is no file"),
        (["sft", "--sweep=colour=1"], "names no size"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as refused:
        benchmark.parse(flags)
    assert refused.value.code == 2
    assert words in capsys.readouterr().err
