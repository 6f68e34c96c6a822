"""Weights in and out: bit-exact round trips, Hugging Face names, a real model, and clear errors."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import struct
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from rlhf_jax import sharding
from rlhf_jax.data.text import encode_document, lm_rows, stop_ids
from rlhf_jax.models import (
    DecoderConfig,
    gpt2,
    language_model,
    load_hf,
    load_llama2c,
    save_hf,
    scalar_model,
)
from rlhf_jax.models.config import RotaryScaling
from rlhf_jax.models.hf import config_from_hf, hf_config, stored
from rlhf_jax.sampling.generate import Sampling, generate
from rlhf_jax.scoring import lm_log_probs
from rlhf_jax.types import PromptBatch
from tests import margins

LLAMA = DecoderConfig(40, 16, 2, 16, 4, kv_heads=2, mlp_width=24, tied=False, rotary_base=5e5)
LLAMA3 = dataclasses.replace(LLAMA, rotary_scaling=RotaryScaling(8.0, 1.0, 4.0, 8))
QWEN2 = dataclasses.replace(LLAMA, bias="qkv", tied=True)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, head_dim=6)
GEMMA3 = dataclasses.replace(
    QWEN3, tied=True, norm="rmsnorm_plus_one", activation="geglu", post_norm=True, embedding_scaled=True,
    query_scalar=12, window=5, window_every=2, local_rotary_base=20.0,
)  # fmt: skip
GPT2 = gpt2(40, 16, 2, 16, 4)
FAMILIES = pytest.mark.parametrize(
    "config",
    [LLAMA, LLAMA3, QWEN2, QWEN3, GEMMA3, GPT2],
    ids=["llama", "llama3", "qwen2", "qwen3", "gemma3", "gpt2"],
)


def _random(model):
    """Parameters without a zero or a one that a lost tensor could hide behind."""
    noise = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(noise.normal(size=x.shape), jnp.float32), shapes)


def _same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def _logits(model, params, ids):
    ids = jnp.asarray(ids)[None]
    positions = jnp.arange(ids.shape[1])[None]
    return model.head(
        params, model.apply(params, ids, segments=jnp.ones_like(ids), positions=positions).hidden
    )[0]


@FAMILIES
@pytest.mark.parametrize("build", [language_model, scalar_model])
def test_save_then_load_is_bit_exact_with_the_score_bias(config, build, tmp_path):
    """PITFALLS 31: the bias of the score head survives."""
    model = build(config)
    params = _random(model)
    save_hf(tmp_path, model, params, None)
    loaded, again, tokenizer = load_hf(tmp_path, dtype=jnp.float32)
    assert loaded is model
    assert tokenizer is None
    _same(again, params)


@FAMILIES
def test_blocks_of_rows_and_pieces_of_devices_add_up_to_the_tensors(config, tmp_path, monkeypatch):
    """Rows that do not divide by the block; each device reads its own part, as it trains."""
    monkeypatch.setattr(stored, "BLOCK", 7 * 16 * 4)
    model = language_model(config)
    params = _random(model)
    save_hf(tmp_path, model, params)
    _same(load_hf(tmp_path)[1], params)
    mesh = sharding.make_mesh((2, 2, 2))
    shardings = partial(sharding.tree_shardings, mesh=mesh)
    loaded = load_hf(tmp_path, shardings=shardings)[1]
    _same(loaded, params)
    wanted = sharding.place_state(params, mesh)
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, wanted)
    save_hf(tmp_path / "again", model, loaded)
    _same(load_hf(tmp_path / "again")[1], params)


def test_a_step_that_donates_loaded_parameters_leaves_the_next_load_alone(tmp_path):
    """A CPU takes over the memory that the file was read into; donating it is safe."""
    model = language_model(dataclasses.replace(LLAMA, width=64))
    params = _random(model)
    save_hf(tmp_path, model, params)
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    loaded = load_hf(tmp_path)[1]
    assert not any(leaf.committed for leaf in jax.tree.leaves(loaded))
    for _ in range(3):
        loaded = add(loaded)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two + 3, rtol=1e-5, atol=1e-5),
        loaded,
        params,
    )
    _same(load_hf(tmp_path)[1], params)


def test_one_place_for_parameters():
    mesh = sharding.make_mesh((1, 8, 1))
    with pytest.raises(ValueError, match="pass one of them"):
        load_hf("nowhere", mesh=mesh, shardings=partial(sharding.tree_shardings, mesh=mesh))


def test_bfloat16_files_load_and_save(tmp_path):
    model = language_model(LLAMA)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _random(model))
    save_hf(tmp_path, model, params, None)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    _same(load_hf(tmp_path, dtype=jnp.bfloat16)[1], params)
    _same(
        load_hf(tmp_path, dtype=jnp.float32)[1],
        jax.tree.map(lambda x: x.astype(jnp.float32), params),
    )


def test_files_have_the_names_and_layout_of_hugging_face(tmp_path):
    """Linear weights are (out, in), except in GPT-2, whose c_attn holds query, key and value side by side."""
    model = language_model(LLAMA)
    params = _random(model)
    save_hf(tmp_path / "llama", model, params, None)
    tensors = safetensors.numpy.load_file(tmp_path / "llama" / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (40, 16)
    key = tensors["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(key, params["blocks"]["attention"]["key"]["kernel"][1].T)
    assert len(tensors) == 3 + 2 * 9

    model = language_model(GPT2)
    params = _random(model)
    save_hf(tmp_path / "gpt2", model, params, None)
    tensors = safetensors.numpy.load_file(tmp_path / "gpt2" / "model.safetensors")
    attention = params["blocks"]["attention"]
    fused = np.concatenate(
        [attention[part]["kernel"][1] for part in ("query", "key", "value")], axis=1
    )
    np.testing.assert_array_equal(tensors["transformer.h.1.attn.c_attn.weight"], fused)
    assert tensors["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64)
    assert len(tensors) == 4 + 2 * 12


@FAMILIES
def test_transformers_reads_our_config(config, tmp_path):
    """The fields mean the same to transformers' own config classes (no torch needed)."""
    transformers = pytest.importorskip("transformers")
    save_hf(tmp_path, language_model(config), _random(language_model(config)), None)
    theirs = transformers.AutoConfig.from_pretrained(str(tmp_path), local_files_only=True)
    assert theirs.num_attention_heads == 4
    assert theirs.vocab_size == 40
    assert config_from_hf(json.loads(theirs.to_json_string(use_diff=False))) == config


class _Tokenizer:
    """Only what `save_hf` asks a tokenizer for."""

    def __init__(self, bos: int | None, eos: int, pad: int | None):
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, pad

    def save_pretrained(self, path):
        (Path(path) / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("tokenizer", "pad"),
    [
        (_Tokenizer(1, 2, 3), 3),
        (_Tokenizer(1, 2, 2), 1),
        (_Tokenizer(None, 2, 2), 0),
        (_Tokenizer(0, 0, 0), 1),
        (_Tokenizer(None, 0, None), 1),
    ],
)
@pytest.mark.parametrize("build", [language_model, scalar_model])
def test_exported_padding_is_never_the_end_of_text(tokenizer, pad, build, tmp_path):
    """PITFALLS 11: a sequence classifier that pads with EOS reads the score before a row's EOS."""
    save_hf(tmp_path, build(LLAMA), _random(build(LLAMA)), tokenizer)
    description = json.loads((tmp_path / "config.json").read_text())
    assert (description["pad_token_id"], description["eos_token_id"]) == (
        pad,
        tokenizer.eos_token_id,
    )
    assert (tmp_path / "generation_config.json").is_file() == (build is language_model)


TURNS = "{% for m in messages %}{{ m.content + '<|turn|>' }}{% endfor %}{% if add_generation_prompt %}{{ ' ' }}{% endif %}"
TURN = 9


@pytest.mark.parametrize(
    ("named", "template", "written"),
    [
        (None, None, 0),
        (0, None, 0),
        ([3, 0, 4], None, [3, 0, 4]),
        ([4, 3], None, [4, 3, 0]),
        (None, TURNS, [0, TURN]),
        ([TURN, 4, 0], TURNS, [TURN, 4, 0]),
        (4, TURNS, [4, 0, TURN]),
    ],
)
def test_all_that_ends_a_response_is_read_and_written_again(named, template, written, tmp_path):
    """Llama 3 Instruct names three ids, Qwen and Gemma two: other programs then stop where PPO did."""
    tokenizer = _letters(template)
    save_hf(tmp_path / "a", language_model(LLAMA), _random(language_model(LLAMA)), tokenizer)
    if named is not None:
        file = tmp_path / "a" / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": named}))
    model, params, loaded = load_hf(tmp_path / "a")
    save_hf(tmp_path / "b", model, params, loaded)
    for name in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "b" / name).read_text())["eos_token_id"] == written
    assert set(stop_ids(load_hf(tmp_path / "b")[2], ["ab"])) == set(np.atleast_1d(written).tolist())
    transformers = pytest.importorskip("transformers")
    assert (
        transformers.GenerationConfig.from_pretrained(str(tmp_path / "b")).eos_token_id == written
    )


@pytest.mark.parametrize("build", [language_model, scalar_model])
@pytest.mark.parametrize(
    "old", [TURNS, {"default": TURNS, "with_tools": TURNS + " "}], ids=["one", "several"]
)
def test_what_an_earlier_save_said_of_turns_and_ends_is_gone(old, build, tmp_path):
    """A folder that is saved anew is the new model's alone: no template and no ends of the one before."""
    save_hf(tmp_path, language_model(LLAMA), _random(language_model(LLAMA)), _letters(old))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 0]}')
    save_hf(tmp_path, build(LLAMA), _random(build(LLAMA)), _letters(None))
    tokenizer = load_hf(tmp_path)[2]
    assert tokenizer.chat_template is None
    assert stop_ids(tokenizer, ["ab"]) == (0,)


def test_an_end_that_the_model_has_no_id_for_is_refused(tmp_path):
    save_hf(tmp_path, language_model(LLAMA), _random(language_model(LLAMA)), _letters(None))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 40]}')
    with pytest.raises(
        ValueError, match=r"generation_config.json: eos_token_id=\[0, 40\] holds '40'.*\(0 to 39\)"
    ):
        load_hf(tmp_path)


def test_exported_padding_is_never_the_end_of_a_turn(tmp_path):
    """A reward model's rows of messages end with it, and a classifier reads the last token that is no padding."""
    tokenizer = _letters(TURNS)
    tokenizer.pad_token = "<|turn|>"
    save_hf(tmp_path, scalar_model(LLAMA), _random(scalar_model(LLAMA)), tokenizer)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] not in (0, TURN)


def _letters(template: str | None):
    """Nine letters, of which the first is EOS, and a control token that ends a turn."""
    transformers = pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate("_?!#%abcx")}, merges=[])
    )
    inner.add_special_tokens(["<|turn|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="_", chat_template=template
    )


def test_the_model_card_says_how_the_score_is_read(tmp_path):
    save_hf(
        tmp_path / "policy",
        language_model(LLAMA),
        _random(language_model(LLAMA)),
        _Tokenizer(1, 2, 3),
    )
    assert "LlamaForCausalLM" in (tmp_path / "policy" / "README.md").read_text()
    params = _random(scalar_model(LLAMA))
    save_hf(tmp_path / "reward", scalar_model(LLAMA), params, _Tokenizer(1, 2, 3))
    card = (tmp_path / "reward" / "README.md").read_text()
    assert "LlamaForSequenceClassification" in card
    assert repr(float(params["score"]["bias"])) in card


def test_shards_and_unprefixed_gpt2_names_load(tmp_path):
    """The first GPT-2 files name tensors without "transformer."; large models come in several files."""
    model = language_model(GPT2)
    params = _random(model)
    save_hf(tmp_path, model, params, None)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    bare = sorted((name.removeprefix("transformer."), value) for name, value in tensors.items())
    safetensors.numpy.save_file(dict(bare[:9]), tmp_path / "model-00001-of-00002.safetensors")
    safetensors.numpy.save_file(dict(bare[9:]), tmp_path / "model-00002-of-00002.safetensors")
    _same(load_hf(tmp_path, dtype=jnp.float32)[1], params)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="shard is missing"):
        load_hf(tmp_path, dtype=jnp.float32)


@FAMILIES
def test_large_models_are_saved_in_shards_with_an_index(config, tmp_path):
    """The layout of transformers: numbered files, none above the limit, and an index of every tensor."""
    model = language_model(config)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _random(model))
    save_hf(tmp_path, model, params)
    whole = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    save_hf(tmp_path, model, params, max_shard_size=3000)  # the one file of before goes
    files = sorted(tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [f.name for f in files] == [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    found = {f.name: safetensors.numpy.load_file(f) for f in files}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: file for file, tensors in found.items() for name in tensors
    }
    sizes = [sum(value.nbytes for value in tensors.values()) for tensors in found.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= 3000
    merged = {name: value for tensors in found.values() for name, value in tensors.items()}
    assert merged.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(merged[name], value)
    _same(load_hf(tmp_path, dtype=jnp.bfloat16)[1], params)
    save_hf(tmp_path, model, params)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert [f.name for f in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


def test_parameters_of_two_types_are_saved_where_readers_find_them(tmp_path):
    """Each tensor starts on a multiple of its own width, as the library's writer has it."""
    model = scalar_model(dataclasses.replace(LLAMA, width=12, heads=3, kv_heads=3))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _random(model))
    params["score"] = jax.tree.map(lambda x: x.astype(jnp.float32), params["score"])
    save_hf(tmp_path, model, params)
    _same(
        load_hf(tmp_path, dtype=jnp.bfloat16)[1],
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
    )
    content = (tmp_path / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    width = {"F32": 4, "BF16": 2}
    assert {entry["dtype"] for entry in header.values()} == set(width)
    assert all(entry["data_offsets"][0] % width[entry["dtype"]] == 0 for entry in header.values())


def test_an_index_names_the_shard_that_is_missing(tmp_path):
    model = language_model(LLAMA)
    save_hf(tmp_path, model, _random(model), max_shard_size=6000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(
        ValueError, match=rf"shard is missing: tensor '[\w.]+' should be in '{gone.name}'"
    ):
        load_hf(tmp_path)
    # A name in the index is never a path: the folder beside it is not looked into.
    save_hf(tmp_path / "other", model, _random(model))
    index["weight_map"] = dict.fromkeys(index["weight_map"], "other/model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"should be in 'other/model\.safetensors'"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json is corrupt"):
        load_hf(tmp_path)


def test_the_weights_of_two_models_in_one_folder_are_refused(tmp_path):
    _saved(tmp_path)
    (tmp_path / "old.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"is in both model\.safetensors and old\.safetensors"):
        load_hf(tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    file = _saved(tmp_path) / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    safetensors.numpy.save_file(tensors | {name: tensors[name].astype(np.int8)}, file)
    with pytest.raises(ValueError, match=rf"{name}.* type I8"):
        load_hf(tmp_path)


def test_a_mesh_splits_the_arrays_and_changes_no_value(tmp_path):
    model = language_model(LLAMA)
    params = _random(model)
    save_hf(tmp_path, model, params, None)
    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 4, 1), ("data", "fsdp", "tensor"), axis_types=axes)
    loaded = load_hf(tmp_path, dtype=jnp.float32, mesh=mesh)[1]
    _same(loaded, params)
    embedding = loaded["embed"]["embedding"]
    assert embedding.addressable_shards[0].data.size * 4 == embedding.size


def _gguf(path: Path, params) -> None:
    """A GGUF file as llama.cpp's converter writes it: query and key rows in interleaved rotary order."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e5)
    p = jax.tree.map(np.asarray, params)
    writer.add_tensor("token_embd.weight", p["embed"]["embedding"])
    writer.add_tensor("output_norm.weight", p["norm"]["scale"])
    writer.add_tensor("output.weight", np.ascontiguousarray(p["unembed"]["kernel"].T))
    for i in range(2):
        attention, mlp = p["blocks"]["attention"], p["blocks"]["mlp"]
        writer.add_tensor(f"blk.{i}.attn_norm.weight", p["blocks"]["attention_norm"]["scale"][i])
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", p["blocks"]["mlp_norm"]["scale"][i])
        for name, kernel in (
            ("attn_q", _interleaved(attention["query"]["kernel"][i].T, 4)),
            ("attn_k", _interleaved(attention["key"]["kernel"][i].T, 2)),
            ("attn_v", attention["value"]["kernel"][i].T),
            ("attn_output", attention["out"]["kernel"][i].T),
            ("ffn_gate", mlp["gate"]["kernel"][i].T),
            ("ffn_up", mlp["up"]["kernel"][i].T),
            ("ffn_down", mlp["down"]["kernel"][i].T),
        ):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ascontiguousarray(kernel))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half goes to 2i, row i of its second half to 2i + 1."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weight[head * size + i]
            out[head * size + 2 * i + 1] = weight[head * size + size // 2 + i]
    return out


def test_gguf_files_load_bit_exact(tmp_path):
    model = language_model(LLAMA)
    params = _random(model)
    _gguf(tmp_path / "model.gguf", params)
    loaded, again, _ = load_hf(tmp_path / "model.gguf", dtype=jnp.float32)
    assert dataclasses.replace(loaded.config, norm_eps=1e-5) == LLAMA
    _same(again, params)
    (tmp_path / "bad.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:200])
    with pytest.raises(ValueError, match="corrupt"):
        load_hf(tmp_path / "bad.gguf", dtype=jnp.float32)


# ------------------------------------------------------------------------------------------------- errors


def _saved(tmp_path: Path) -> Path:
    model = language_model(LLAMA)
    save_hf(tmp_path, model, _random(model), None)
    return tmp_path


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_hf(tmp_path, dtype=jnp.float32)
    (_saved(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_hf(tmp_path, dtype=jnp.float32)
    for missing in (tmp_path / "no.gguf", tmp_path / "no"):
        with pytest.raises(FileNotFoundError):
            load_hf(missing, dtype=jnp.float32)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_cut_files_are_corrupt(name, tmp_path):
    file = _saved(tmp_path) / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{name}.* corrupt"):
        load_hf(tmp_path, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "bert"}, "model_type='bert'"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lacks the field 'factor'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": 32, "head_dim": 4}, "asks for"),
    ],
)
def test_what_does_not_fit_is_named(change, named, tmp_path):
    file = _saved(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=named):
        load_hf(tmp_path, dtype=jnp.float32)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    """PITFALLS 35."""
    tokenizers, transformers = (
        pytest.importorskip("tokenizers"),
        pytest.importorskip("transformers"),
    )
    for size in (40, 41):
        vocabulary = {f"w{i}": i for i in range(size)}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="w0", eos_token="w1"
        )
        model = language_model(LLAMA)
        save_hf(tmp_path, model, _random(model), tokenizer)
        if size == 40:
            assert load_hf(tmp_path, dtype=jnp.float32)[2].convert_tokens_to_ids("w39") == 39
    with pytest.raises(ValueError, match=r"41 tokens.*vocab_size=40"):
        load_hf(tmp_path, dtype=jnp.float32)


def test_a_tokenizer_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    """The Rust writer raises a bare Exception where a disk is full; a folder in its place refuses in the same way."""
    tokenizers, transformers = (
        pytest.importorskip("tokenizers"),
        pytest.importorskip("transformers"),
    )
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="a", eos_token="b"
    )
    (tmp_path / "tokenizer.json").mkdir()
    model = language_model(LLAMA)
    with pytest.raises(OSError, match="the tokenizer could not be written to"):
        save_hf(tmp_path, model, _random(model), tokenizer)


def test_a_mixture_without_a_family_is_not_saved():
    with pytest.raises(ValueError, match="norm='layernorm'"):
        hf_config(dataclasses.replace(LLAMA, norm="layernorm"), score=False)


# ------------------------------------------------------------------------------------------ the real model


@pytest.fixture(scope="module")
def stories():
    folder = Path(os.environ.get("RLHF_JAX_DATA", "")) / "stories260k"
    if not os.environ.get("RLHF_JAX_DATA") or not folder.is_dir():
        pytest.skip("set RLHF_JAX_DATA to a folder with stories260k/ to test against a real model")
    golden = json.loads((folder / "golden.json").read_text())
    logits = np.load(folder / "golden_logits.npz")
    return folder, golden, logits, *load_llama2c(folder / "stories260K.bin", folder / "tok512.bin")


@pytest.mark.parametrize("text", range(4))
def test_real_model_logits_match_the_golden_ones(text, stories):
    _, _, golden, model, params, _ = stories
    # 1e-4: float32 in another order of summation; measured 1.3e-5.
    logits = _logits(model, params, golden[f"ids_{text}"])
    np.testing.assert_allclose(logits, golden[f"logits_{text}"], atol=1e-4)


def test_real_model_greedy_text_is_the_published_one(stories):
    _, golden, _, model, params, tokenizer = stories
    ids = golden["greedy_from_bos"]["ids"]
    bos = PromptBatch(
        jnp.ones((1, 1), jnp.int32), jnp.ones((1,), jnp.int32), jnp.zeros((1,), jnp.int32)
    )
    settings = {"max_new_tokens": len(ids) - 1, "temperature": 0.0, "stop_ids": (1,)}
    greedy = lambda params: (
        generate(model, params, bos, jax.random.key(0), Sampling(**settings)).tokens
    )
    margins.assert_no_near_tie(greedy, params)
    assert greedy(params)[0].tolist() == ids
    # The file keeps the space that the encoder puts before a text.
    assert tokenizer.decode(ids, skip_special_tokens=True) == golden["greedy_from_bos"][
        "text"
    ].removeprefix(" ")


def test_real_tokenizer_encodes_as_golden_and_decodes_back(stories):
    _, golden, _, _, _, tokenizer = stories
    for text, ids in golden["encode"].items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    text = "naïve \u2014 \u732b\n"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_real_model_reads_text_better_after_bos(stories):
    """It was trained with BOS before each story: what the tokenizer puts there lowers the loss of the first tokens."""
    folder, _, _, model, params, tokenizer = stories
    with gzip.open(
        folder.parent / "tinystories_slice" / "stories.jsonl.gz", "rt", encoding="utf-8"
    ) as file:
        said = [json.loads(next(file))["text"][:80] for _ in range(40)]
    documents = [encode_document(tokenizer, each, eos_id=2) for each in said]
    assert all(ids[0] == 1 and ids.count(1) == 1 for ids in documents)
    losses = {}
    for begins in (True, False):
        rows = lm_rows([ids if begins else ids[1:] for ids in documents], length=64)
        logp = lm_log_probs(model, params, jax.tree.map(jnp.asarray, rows))
        # The first token of a text is a target only where BOS predicts it: the others are compared.
        shared = rows.mask & (rows.positions > (1 if begins else 0))
        losses[begins] = -float(np.asarray(logp)[shared].sum() / shared.sum())
    assert losses[True] < losses[False] - 0.02  # measured: 1.790 and 1.825 nats a token


def test_real_model_survives_save_and_load_with_its_tokenizer(stories, tmp_path):
    _, golden, _, model, params, tokenizer = stories
    save_hf(tmp_path, model, params, tokenizer)
    loaded, again, words = load_hf(tmp_path, dtype=jnp.float32)
    _same(again, params)
    assert loaded.config == model.config
    assert all(words.encode(text) == ids for text, ids in golden["encode"].items())


def test_a_cut_llama2c_file_is_corrupt(tmp_path):
    header = struct.pack("<7i", 8, 16, 1, 2, 2, 32, 16)
    for content in (header[:10], header, header + b"\0" * 400):
        (tmp_path / "model.bin").write_bytes(content)
        with pytest.raises(ValueError, match="corrupt"):
            load_llama2c(tmp_path / "model.bin")
