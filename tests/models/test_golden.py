"""Parity with torch transformers: tiny random models of every family, their logits made once by `tests/golden`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax import scoring
from rlhf_jax.models import DecoderConfig, language_model, load_hf, save_hf
from rlhf_jax.models.config import RotaryScaling
from rlhf_jax.models.hf import config_from_hf
from rlhf_jax.sampling.generate import Sampling, generate
from rlhf_jax.types import PromptBatch

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
NAMES = ("gpt2", "llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3")
FAMILIES = pytest.mark.parametrize("name", NAMES)


def golden(name: str):
    found = np.load(GOLDEN / name / "golden.npz")
    return found["ids"], found["lengths"], found["logits"]


def logits(model, params, ids, lengths):
    segments, positions = scoring.row_layout(jnp.asarray(lengths), ids.shape[1])
    hidden = model.apply(params, jnp.asarray(ids), segments=segments, positions=positions).hidden
    return np.asarray(model.head(params, hidden))


@FAMILIES
def test_logits_of_ragged_rows_are_those_of_torch(name):
    ids, lengths, wanted = golden(name)
    model, params, _ = load_hf(GOLDEN / name)
    found = logits(model, params, ids, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row, :length], wanted[row, :length], atol=1e-4)
    assert np.abs(wanted).max() > 1  # the tolerance means something


@FAMILIES
def test_scores_are_those_of_a_torch_sequence_classifier(name):
    ids, lengths, wanted = golden(f"{name}_score")
    model, params, _ = load_hf(GOLDEN / f"{name}_score")
    _, scores = scoring.sequence_values(model, params, jnp.asarray(ids), jnp.asarray(lengths))
    np.testing.assert_allclose(scores, wanted[:, 0], atol=1e-4)


@FAMILIES
@pytest.mark.parametrize("head", ["", "_score"])
def test_tensors_of_a_round_trip_are_bit_exact(name, head, tmp_path):
    folder = GOLDEN / (name + head)
    model, params, _ = load_hf(folder)
    save_hf(tmp_path, model, params)
    before, after = (
        safetensors.numpy.load_file(f / "model.safetensors") for f in (folder, tmp_path)
    )
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        np.testing.assert_array_equal(value, after[tensor], err_msg=tensor)
    assert load_hf(tmp_path)[0].config == model.config


@FAMILIES
def test_cached_decoding_agrees_with_whole_rows(name):
    """Rotary scaling and the norms of queries and keys act in decoding as in training."""
    ids, lengths, _ = golden(name)
    model, params, _ = load_hf(GOLDEN / name)
    prompts = PromptBatch(
        jnp.asarray(ids[:, :6]), jnp.minimum(jnp.asarray(lengths), 6), jnp.arange(3)
    )
    samples = generate(model, params, prompts, jax.random.key(0), Sampling(max_new_tokens=8))
    mask = scoring.response_mask(samples.prompt_lengths, samples.lengths, samples.tokens.shape[1])
    again = scoring.sequence_log_probs(model, params, samples.tokens, samples.lengths, mask)
    np.testing.assert_allclose(samples.logp, again, atol=1e-4)


def test_the_golden_rotary_scaling_meets_all_three_parts_of_its_rule():
    config = load_hf(GOLDEN / "llama3")[0].config
    assert config.rotary_scaling == RotaryScaling(4.0, 0.5, 2.0, 16)
    turns = 16 * 100.0 ** (-np.arange(0, 8, 2) / 8) / (2 * np.pi)
    assert turns[0] > 2
    assert 0.5 < turns[1] < 2
    assert turns[2:].max() < 0.5


def test_other_rotary_scalings_are_refused(tmp_path):
    description = json.loads((GOLDEN / "llama3" / "config.json").read_text())
    description["rope_parameters"]["rope_type"] = "yarn"
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="rope type 'yarn' is not supported"):
        load_hf(tmp_path)
    with pytest.raises(ValueError, match="must have 0 < low < high"):
        DecoderConfig(8, 8, 1, 8, 2, rotary_scaling=RotaryScaling(8.0, 4.0, 1.0, 8192))


def test_norms_of_queries_and_keys_beside_biases_are_no_family(tmp_path):
    model = language_model(DecoderConfig(8, 8, 1, 8, 2, bias="qkv", qk_norm=True))
    with pytest.raises(ValueError, match="qk_norm=True"):
        save_hf(tmp_path / "model", model, model.init(jax.random.key(0)))


def test_a_window_counts_positions_where_responses_share_a_prompt():
    """Two responses after one prompt see what they see in rows of their own, also over the edge of the window."""
    model, params, _ = load_hf(GOLDEN / "gemma3")
    prompt, one, two = np.arange(3, 9), np.arange(9, 14), np.arange(20, 25)
    alone = [
        logits(model, params, np.concatenate([prompt, end])[None], [11])[0, 6:]
        for end in (one, two)
    ]
    packed = {
        "segments": np.repeat([1, 2, 3], [6, 5, 5]),
        "parents": np.repeat([0, 1, 1], [6, 5, 5]),
        "positions": np.concatenate([np.arange(6), np.arange(6, 11), np.arange(6, 11)]),
    }
    rows = {name: jnp.asarray(value)[None] for name, value in packed.items()}
    hidden = model.apply(
        params, jnp.asarray(np.concatenate([prompt, one, two]))[None], **rows
    ).hidden
    together = np.asarray(model.head(params, hidden))[0]
    np.testing.assert_allclose(together[6:11], alone[0], atol=1e-4)
    np.testing.assert_allclose(together[11:], alone[1], atol=1e-4)


def test_the_golden_window_and_its_rotary_angles_matter():
    """What gemma3 is compared with does depend on each part: without it the logits are others."""
    ids, lengths, wanted = golden("gemma3")
    model, params, _ = load_hf(GOLDEN / "gemma3")
    for change in (
        {"window": 0},
        {"window_every": 2},
        {"local_rotary_base": 10_000.0},
        {"query_scalar": 0},
    ):
        other = language_model(dataclasses.replace(model.config, **change))
        assert np.abs(logits(other, params, ids, lengths)[0] - wanted[0]).max() > 0.01, change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (
            {
                "layer_types": [
                    "full_attention",
                    "full_attention",
                    "sliding_attention",
                    "full_attention",
                ]
            },
            "layer_types=",
        ),
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"model_type": "gemma2"}, "model_type='gemma2'"),
    ],
)
def test_other_gemmas_are_refused(change, named):
    description = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    with pytest.raises(ValueError, match=named):
        config_from_hf(description | change)


def test_the_fields_of_earlier_transformers_describe_the_same_gemma():
    description = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    wanted = config_from_hf(description)
    for name in ("rope_parameters", "layer_types"):
        del description[name]
    early = {"rope_theta": 1000.0, "rope_local_base_freq": 20.0, "sliding_window_pattern": 3}
    assert config_from_hf(description | early) == wanted
