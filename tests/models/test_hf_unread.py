"""No tensor and no setting of a model folder is left out without a word."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from rlhf_jax.models import (
    DecoderConfig,
    gpt2,
    language_model,
    load_hf,
    load_llama2c,
    save_hf,
    scalar_model,
)
from rlhf_jax.models.hf import config_from_hf, hf_config
from rlhf_jax.models.hf.gguf_tokenizer import gguf_tokenizer
from rlhf_jax.models.hf.settings import check_settings

LLAMA = DecoderConfig(40, 16, 2, 16, 4, kv_heads=2, mlp_width=24, tied=False)
TIED = dataclasses.replace(LLAMA, tied=True)
GPT2 = gpt2(40, 16, 2, 16, 4)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True)


def _random(model, seed: int = 0):
    noise = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(noise.normal(size=x.shape), jnp.float32), shapes)


def _saved(folder: Path, config: DecoderConfig = LLAMA, build=language_model):
    model = build(config)
    params = _random(model)
    save_hf(folder, model, params)
    return params


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def _write(folder: Path, tensors: dict[str, np.ndarray], name: str = "model.safetensors") -> None:
    safetensors.numpy.save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / name
    )


def _add(folder: Path, **tensors: np.ndarray) -> None:
    _write(folder, _tensors(folder) | tensors)


def _set(folder: Path, **fields) -> None:
    file = folder / "config.json"
    description = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in description.items() if v is not ...}))


def _same(one, two) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def _ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


# ----------------------------------------------------------------------------------------------------- tensors

LAYER = "model.layers.1"
UNREAD = {
    f"{LAYER}.self_attn.q_proj.bias": ((16,), "a bias that config.json does not announce"),
    f"{LAYER}.mlp.down_proj.bias": ((16,), "a bias that config.json does not announce"),
    f"{LAYER}.self_attn.q_norm.weight": ((4,), "a norm of queries or keys"),
    "model.layers.2.input_layernorm.weight": ((16,), "of layer 2, and config.json says 2 layers"),
    "model.layers.2.self_attn.rotary_emb.inv_freq": (
        (2,),
        "of layer 2, and config.json says 2 layers",
    ),
    f"{LAYER}.eh_proj.weight": ((16, 32), "predict several tokens"),
    "mtp.fc.weight": ((16, 32), "predict several tokens"),
    "v_head.summary.weight": ((1, 16), "a value head"),
    "value_head.weight": ((1, 16), "a value head"),
    "classifier.weight": ((1, 16), "a head for another task"),
    "score.bias": ((1,), "a head for another task"),
    "visual.patch_embed.proj.weight": ((4, 4), "reads images"),
    "model.vision_tower.embeddings.weight": ((4, 4), "reads images"),
    f"{LAYER}.self_attn.q_proj.lora_A.weight": ((2, 16), "a LoRA adapter that was not merged"),
    f"base_model.model.{LAYER}.self_attn.q_proj.lora_B.default.weight": ((16, 2), "a LoRA adapter"),
    f"{LAYER}.mlp.up_proj.weight_scale": ((24, 1), "of quantised weights"),
    f"{LAYER}.mlp.up_proj.weight.absmax": ((24,), "of quantised weights"),
    f"{LAYER}.mlp.experts.0.up_proj.weight": ((24, 16), "a mixture of experts"),
    "lm_head.bias": ((40,), "an unembedding beside"),
    "something.else": ((3,), "no part of the decoder"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_tensor_that_nothing_reads_is_named_with_its_shape(name: str, tmp_path: Path):
    _saved(tmp_path)
    shape, meaning = UNREAD[name]
    _add(tmp_path, **{name: _ones(*shape)})
    with pytest.raises(ValueError, match="would be left out") as refused:
        load_hf(tmp_path)
    assert meaning in str(refused.value)
    assert str(list(shape)) in str(refused.value)
    assert name.removeprefix("base_model.model.") in str(refused.value)


def test_what_modelling_code_computes_itself_is_read_over(tmp_path: Path):
    params = _saved(tmp_path / "llama")
    each = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": _ones(2) for i in range(2)}
    _add(tmp_path / "llama", **each, **{"model.rotary_emb.inv_freq": _ones(2)})
    _same(load_hf(tmp_path / "llama")[1], params)
    params = _saved(tmp_path / "gpt2", GPT2)
    masks = {f"transformer.h.{i}.attn.bias": np.tri(16, dtype=bool)[None, None] for i in range(2)}
    _add(
        tmp_path / "gpt2",
        **masks,
        **{"transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32)},
    )
    _same(load_hf(tmp_path / "gpt2")[1], params)
    _add(tmp_path / "gpt2", **{"transformer.h.2.attn.bias": _ones(1, 1, 16, 16)})
    with pytest.raises(ValueError, match=r"transformer\.h\.2\.attn\.bias.*of layer 2"):
        load_hf(tmp_path / "gpt2")


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."]
)
def test_what_wrappers_put_before_names_is_taken_off(prefix: str, tmp_path: Path):
    params = _saved(tmp_path)
    _write(tmp_path, {prefix + name: value for name, value in _tensors(tmp_path).items()})
    _same(load_hf(tmp_path)[1], params)
    _add(tmp_path, **{"model.norm.weight": _ones(16)})
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is in both"):
        load_hf(tmp_path)


def test_a_trunk_without_its_head_loads_where_the_head_is_the_embedding(tmp_path: Path):
    params = _saved(tmp_path, TIED)
    _write(
        tmp_path, {name.removeprefix("model."): value for name, value in _tensors(tmp_path).items()}
    )
    _same(load_hf(tmp_path)[1], params)
    _set(tmp_path, tie_word_embeddings=False)
    with pytest.raises(
        ValueError, match=r"no tensor 'lm_head\.weight'.*write tie_word_embeddings=true"
    ):
        load_hf(tmp_path)


@pytest.mark.parametrize("config", [TIED, GPT2], ids=["llama", "gpt2"])
def test_a_second_copy_of_a_tied_head_is_read_over_and_another_head_is_used(
    config, tmp_path: Path, capsys
):
    params = _saved(tmp_path, config)
    table = np.asarray(params["embed"]["embedding"])
    for copy in (table, table.astype(np.float16)):  # rounded, it is the same head still
        _add(tmp_path, **{"lm_head.weight": copy})
        loaded, again, _ = load_hf(tmp_path)
        assert loaded.config == config
        _same(again, params)
    assert "lm_head" not in capsys.readouterr().err
    head = np.random.default_rng(1).normal(size=table.shape).astype(np.float32)
    _add(tmp_path, **{"lm_head.weight": head})
    loaded, again, _ = load_hf(tmp_path)
    assert "'lm_head.weight' of shape [40, 16] that differs" in capsys.readouterr().err
    np.testing.assert_array_equal(again["unembed"]["kernel"], head.T)
    save_hf(tmp_path / "again", loaded, again)
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    _same(load_hf(tmp_path / "again")[1], again)
    _add(tmp_path, **{"lm_head.weight": head[:39]})
    with pytest.raises(ValueError, match=r"lm_head\.weight.*\(39, 16\)"):
        load_hf(tmp_path)


def test_a_head_in_a_reward_model_is_named(tmp_path: Path):
    params = _saved(tmp_path, TIED, scalar_model)
    _add(tmp_path, **{"lm_head.weight": np.asarray(params["embed"]["embedding"])})
    _same(load_hf(tmp_path)[1], params)
    _add(tmp_path, **{"lm_head.weight": _ones(40, 16)})
    with pytest.raises(
        ValueError, match=r"lm_head\.weight' of shape \[40, 16\].*an unembedding beside"
    ):
        load_hf(tmp_path)


def test_a_bias_of_the_score_is_used(tmp_path: Path):
    """Other people's heads have it as a tensor; our own exports have it in config.json."""
    params = _saved(tmp_path, build=scalar_model)
    _add(tmp_path, **{"score.bias": np.array([0.75], np.float32)})
    with pytest.raises(ValueError, match=r"'score\.bias' \(0\.75\).*rlhf_jax_score_bias"):
        load_hf(tmp_path)
    _set(tmp_path, rlhf_jax_score_bias=...)
    model, loaded, _ = load_hf(tmp_path)
    assert float(loaded["score"]["bias"]) == 0.75
    np.testing.assert_array_equal(loaded["score"]["weight"], params["score"]["weight"])
    save_hf(tmp_path / "again", model, loaded)
    _same(load_hf(tmp_path / "again")[1], loaded)


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path: Path):
    _saved(tmp_path, build=scalar_model)
    _add(tmp_path, **{"score.weight": _ones(2, 16)})
    _set(tmp_path, id2label={"0": "toxic", "1": "fine"}, num_labels=2)
    with pytest.raises(
        ValueError, match=r"score\.weight.*\[2, 16\]: a classifier of 2 labels.*'toxic'"
    ):
        load_hf(tmp_path)
    tensors = _tensors(tmp_path)
    tensors["rewards.weight"] = tensors.pop("score.weight")[:1]
    _write(tmp_path, tensors)
    with pytest.raises(
        ValueError, match=r"speaks of a classifier, and .* holds no tensor 'score\.weight'"
    ):
        load_hf(tmp_path)
    _set(tmp_path, architectures=None)
    with pytest.raises(ValueError, match=r"rlhf_jax_score_bias=.* is of a reward model"):
        load_hf(tmp_path)


# ------------------------------------------------------------------------------------------------- which files


def _sharded(folder: Path) -> dict:
    model = language_model(LLAMA)
    save_hf(folder, model, _random(model), max_shard_size=6000)
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_another_layout_of_the_same_weights_lies_beside_them(tmp_path: Path):
    params = _saved(tmp_path)
    _write(tmp_path, {"tok_embeddings.weight": _ones(40, 16)}, "consolidated.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a copy")
    (tmp_path / "original").mkdir()
    _write(tmp_path / "original", {"x": _ones(1)})
    _same(load_hf(tmp_path)[1], params)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds consolidated\.safetensors alone"):
        load_hf(tmp_path)


def test_index_and_shards_are_of_one_model(tmp_path: Path):
    index = _sharded(tmp_path)
    _write(tmp_path, {"value_head.weight": _ones(1, 16)}, "value_head.safetensors")
    with pytest.raises(
        ValueError, match=r"value_head\.safetensors in .* is not in model\.safetensors\.index\.json"
    ):
        load_hf(tmp_path)
    (tmp_path / "value_head.safetensors").unlink()
    names = sorted(set(index["weight_map"].values()))
    moved = next(name for name, file in index["weight_map"].items() if file == names[0])
    index["weight_map"][moved] = names[1]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError,
        match=rf"says that tensor '{moved}' is in '{names[1]}', and it is in '{names[0]}'",
    ):
        load_hf(tmp_path)


def test_a_tensor_that_the_index_does_not_name_is_accounted_for_too(tmp_path: Path):
    index = _sharded(tmp_path)
    file = sorted(set(index["weight_map"].values()))[0]
    tensors = safetensors.numpy.load_file(tmp_path / file)
    _write(tmp_path, tensors | {"model.extra.weight": _ones(5)}, file)
    with pytest.raises(
        ValueError, match=r"'model\.extra\.weight' of shape \[5\], which would be left out"
    ):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "value_head.bin", "v_head.bin", "non_lora_trainables.bin"]
)
def test_a_part_of_the_model_in_a_pickle_is_named(name: str, tmp_path: Path):
    _saved(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match=f"{name} is a part of the model in a pickle"):
        load_hf(tmp_path)


# ---------------------------------------------------------------------------------------------------- adapters


def _adapter(folder: Path, modules: dict[str, tuple[int, int]], **fields) -> dict[str, np.ndarray]:
    """An adapter of rank 2 for modules of the shape (out, in), as PEFT saves it; what it adds to each matrix."""
    noise, tensors, changes = np.random.default_rng(2), {}, {}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", "base_model_name_or_path": "org/base",
              "target_modules": sorted({name.split(".")[-1] for name in modules}), **fields}  # fmt: skip
    scale = config["lora_alpha"] / (2**0.5 if config.get("use_rslora") else 2)
    for module, (outputs, inputs) in modules.items():
        a, b = noise.normal(size=(2, inputs)), noise.normal(size=(outputs, 2))
        for part, value in (("A", a), ("B", b)):
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = value.astype(np.float32)
        changes[module] = scale * np.einsum("or,ri->oi", b.astype(np.float32), a.astype(np.float32))
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    _write(folder, tensors, "adapter_model.safetensors")
    return changes


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_beside_its_base_is_merged(rslora: bool, tmp_path: Path, capsys):
    """``W + alpha / r * B A``, or ``alpha / sqrt(r)``: the matrices of one layer change, no other number does."""
    key, down = "model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"
    modules = {key: (8, 16), down: (16, 24), "lm_head": (40, 16)}
    params = _saved(tmp_path)
    changes = _adapter(tmp_path, modules, use_rslora=rslora)
    model, loaded, _ = load_hf(tmp_path)
    told = capsys.readouterr().err
    assert "merged into its base: 3 matrices" in told
    wanted = jax.tree.map(np.array, params)
    wanted["blocks"]["attention"]["key"]["kernel"][1] += changes[key].T
    wanted["blocks"]["mlp"]["down"]["kernel"][0] += changes[down].T
    wanted["unembed"]["kernel"] += changes["lm_head"].T
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), loaded, wanted)
    np.testing.assert_array_equal(
        loaded["blocks"]["mlp"]["down"]["kernel"][1], params["blocks"]["mlp"]["down"]["kernel"][1]
    )
    save_hf(tmp_path / "merged", model, loaded)
    _same(load_hf(tmp_path / "merged")[1], loaded)


def test_a_model_is_not_saved_beside_an_adapter(tmp_path: Path):
    """The adapter is in the loaded numbers already: saved over their base, they would get it a second time."""
    _saved(tmp_path)
    _adapter(tmp_path, {"model.layers.1.self_attn.k_proj": (8, 16)})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model, merged, _ = load_hf(tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        with pytest.raises(
            ValueError,
            match=f"holds a model with {name}, which would be merged again.*choose another folder",
        ):
            save_hf(tmp_path, model, merged)
        assert all(
            (tmp_path / file).read_bytes() == before[file]
            for file in before
            if (tmp_path / file).exists()
        )
        (tmp_path / name).unlink()
    save_hf(tmp_path, model, merged)
    _same(load_hf(tmp_path)[1], merged)


def test_an_adapter_of_gpt2_is_turned_as_its_matrices_are(tmp_path: Path):
    params = _saved(tmp_path, GPT2)
    changes = _adapter(tmp_path, {"transformer.h.1.attn.c_attn": (48, 16)}, fan_in_fan_out=True)
    loaded = load_hf(tmp_path)[1]
    query, key, value = np.split(changes["transformer.h.1.attn.c_attn"].T, 3, axis=1)
    for name, change in (("query", query), ("key", key), ("value", value)):
        wanted = np.asarray(params["blocks"]["attention"][name]["kernel"][1]) + change
        np.testing.assert_allclose(
            loaded["blocks"]["attention"][name]["kernel"][1], wanted, atol=1e-5
        )


NOT_PLAIN = {
    "use_dora": True,
    "peft_type": "IA3",
    "modules_to_save": ["lm_head"],
    "bias": "lora_only",
    "rank_pattern": {"k_proj": 4},
    "alpha_pattern": {"k_proj": 4},
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [3],
    "some_future_option": 7,
}


@pytest.mark.parametrize("field", NOT_PLAIN)
def test_more_than_plain_lora_is_refused_by_name(field: str, tmp_path: Path):
    _saved(tmp_path)
    _adapter(tmp_path, {"model.layers.1.self_attn.k_proj": (8, 16)}, **{field: NOT_PLAIN[field]})
    with pytest.raises(ValueError, match=rf"{field}=.*adapter_config\.json.*PEFT"):
        load_hf(tmp_path)


def test_an_adapter_that_does_not_fit_is_named(tmp_path: Path):
    _saved(tmp_path)
    part = "model.layers.1.self_attn.k_proj"
    for modules, message in (
        (
            {part: (9, 16)},
            r"changes 'model\.layers\.1\.self_attn\.k_proj\.weight' by a matrix of shape \(9, 16\)",
        ),
        (
            {"model.layers.7.self_attn.k_proj": (8, 16)},
            r"changes 'model\.layers\.7.*of another base",
        ),
    ):
        _adapter(tmp_path, modules)
        with pytest.raises(ValueError, match=message):
            load_hf(tmp_path)
    _adapter(tmp_path, {part: (8, 16)}, target_modules=["k_proj", "v_proj"])
    with pytest.raises(ValueError, match="names 'v_proj', for which"):
        load_hf(tmp_path)
    _adapter(tmp_path, {part: (8, 16)}, r=4)
    with pytest.raises(ValueError, match=r"has the shape \[2, 16\], and r=4"):
        load_hf(tmp_path)
    _adapter(tmp_path, {part: (8, 16)})
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    name = f"base_model.model.{part}.lora_A.weight"
    _write(tmp_path, {name: tensors[name]}, "adapter_model.safetensors")
    with pytest.raises(ValueError, match="without its other half"):
        load_hf(tmp_path)
    _write(
        tmp_path,
        tensors | {"base_model.model.score.weight": _ones(1, 16)},
        "adapter_model.safetensors",
    )
    with pytest.raises(
        ValueError,
        match=r"'base_model\.model\.score\.weight' of shape \[1, 16\], which is more than",
    ):
        load_hf(tmp_path)


def test_half_an_adapter_is_refused(tmp_path: Path):
    _adapter(tmp_path, {"model.layers.1.self_attn.k_proj": (8, 16)})
    with pytest.raises(
        ValueError, match=r"an adapter alone; its base is 'org/base'.*copy the files of the base"
    ):
        load_hf(tmp_path)
    _saved(tmp_path)
    (tmp_path / "adapter_config.json").rename(tmp_path / "config.txt")
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        load_hf(tmp_path)
    (tmp_path / "config.txt").rename(tmp_path / "adapter_config.json")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"but no adapter_model\.safetensors"):
        load_hf(tmp_path)


def test_an_adapter_of_a_tied_head_is_refused(tmp_path: Path):
    _saved(tmp_path, TIED)
    _adapter(tmp_path, {"lm_head": (40, 16)})
    with pytest.raises(
        ValueError, match=r"changes 'lm_head\.weight', which the base does not have"
    ):
        load_hf(tmp_path)


# ---------------------------------------------------------------------------------------------------- settings

DESCRIPTIONS = {
    "llama": hf_config(LLAMA, score=False),
    "mistral": hf_config(LLAMA, score=False) | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
    "qwen2": hf_config(dataclasses.replace(LLAMA, bias="qkv"), score=False),
    "qwen3": hf_config(QWEN3, score=False),
    "gpt2": hf_config(GPT2, score=False),
    "gemma3_text": hf_config(
        dataclasses.replace(
            QWEN3, tied=True, norm="rmsnorm_plus_one", activation="geglu", post_norm=True, embedding_scaled=True,
            query_scalar=12, window=5, window_every=2,
        ), score=False,
    ),
}  # fmt: skip

REFUSED = [
    ("llama", "attn_logit_softcapping", 50.0),
    ("llama", "final_logit_softcapping", 30.0),
    ("qwen3", "clip_qkv", 8.0),
    ("llama", "query_pre_attn_scalar", 256),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "rotary_dim", 2),
    ("llama", "attention_multiplier", 0.015625),
    ("llama", "residual_multiplier", 0.22),
    ("llama", "scale_emb", 12),
    ("llama", "embedding_multiplier", 12.0),
    ("llama", "logits_scaling", 8.0),
    ("mistral", "num_local_experts", 8),
    ("llama", "n_routed_experts", 64),
    ("llama", "use_qk_norm", True),
    ("llama", "qk_layernorm", True),
    ("qwen2", "use_mrope", True),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "add_cross_attention", True),
    ("gpt2", "activation_function", "relu"),
    ("llama", "hidden_act", "gelu"),
    ("llama", "is_causal", False),
    ("gemma3_text", "use_bidirectional_attention", True),
    ("llama", "alibi", True),
    ("gemma3_text", "final_logit_softcapping", 30.0),
    ("gemma3_text", "attention_bias", True),
    ("llama", "mlp_bias", True),
    ("llama", "no_rope_layers", [1, 0]),
    ("llama", "attention_chunk_size", 8192),
    ("llama", "num_nextn_predict_layers", 1),
    ("llama", "some_new_attention_trick", "on"),
    ("llama", "logits_soft_cap", 30.0),
    ("gpt2", "position_embedding_type", "relative_key"),
    ("llama", "architectures", ["LlamaBidirectionalModel"]),
    ("llama", "tie_word_embeddings", None),
    ("llama", "layer_types", ["linear_attention", "full_attention"]),
    ("llama", "layer_types", ["full_attention"]),
    ("llama", "layer_types", ["sliding_attention", "full_attention"]),
    ("llama", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
    ("llama", "rope_parameters", {"rope_theta": 500000.0}),
    ("llama", "rope_parameters", {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}),
    ("llama", "rope_scaling", {"type": "default", "mrope_section": [1, 1]}),
    ("llama", "vision_config", {"depth": 2}),
    ("llama", "quantization_config", {"bits": 4}),
]


@pytest.mark.parametrize(("kind", "name", "value"), REFUSED, ids=lambda x: str(x)[:40])
def test_a_setting_that_would_change_numbers_is_refused_by_name(kind: str, name: str, value):
    config_from_hf(DESCRIPTIONS[kind])
    mentioned = (
        "partial_rotary_factor|mrope_section|rope_theta|rope type"
        if name.startswith("rope")
        else name
    )
    with pytest.raises(ValueError, match=mentioned):
        config_from_hf(DESCRIPTIONS[kind] | {name: value})


PLAIN = [
    ("llama", "attn_logit_softcapping", None),
    ("llama", "partial_rotary_factor", 1.0),
    ("llama", "clip_qkv", None),
    ("llama", "attention_multiplier", 0.5),
    ("llama", "residual_multiplier", 1.0),
    ("llama", "query_pre_attn_scalar", 4),
    ("llama", "use_qk_norm", False),
    ("qwen3", "use_qk_norm", True),
    ("mistral", "num_local_experts", None),
    ("llama", "pretraining_tp", 2),
    ("gpt2", "position_embedding_type", "absolute"),
    ("llama", "attention_dropout", 0.1),
    ("gpt2", "n_ctx", 16),
    ("gpt2", "scale_attn_weights", True),
    ("gpt2", "reorder_and_upcast_attn", True),
    ("llama", "rope_scaling", None),
    ("llama", "hidden_act", "swish"),
    ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
    ("llama", "eos_token_id", [1, 2]),
    ("qwen2", "attention_bias", True),
    ("qwen2", "sliding_window", 4),
    ("llama", "quantization_config", None),
    ("llama", "no_rope_layers", [1, 1]),
    ("llama", "layer_types", ["full_attention", "full_attention"]),
    ("gemma3_text", "attn_logit_softcapping", None),
    ("llama", "id2label", {"0": "A", "1": "B"}),
    ("llama", "torch_dtype", "float16"),
]


@pytest.mark.parametrize(("kind", "name", "value"), PLAIN, ids=lambda x: str(x)[:40])
def test_a_setting_that_changes_nothing_is_read_over(kind: str, name: str, value):
    changed = DESCRIPTIONS[kind] | {name: value}
    assert config_from_hf(changed) == config_from_hf(DESCRIPTIONS[kind])
    assert not check_settings(changed)


def test_a_setting_that_nobody_knows_is_told(tmp_path: Path, capsys):
    params = _saved(tmp_path)
    _set(tmp_path, favourite_colour="green", nothing_much=None, empty={})
    _same(load_hf(tmp_path)[1], params)
    assert (
        "config.json has settings that are not read: favourite_colour='green'\n"
        in capsys.readouterr().err
    )


def test_the_context_ends_with_a_window_that_is_used():
    def context(kind: str, **fields) -> int:
        return config_from_hf(DESCRIPTIONS[kind] | fields).context_length

    layers = ["sliding_attention", "full_attention"]
    assert context("mistral", sliding_window=4) == 4
    assert context("mistral", sliding_window=None) == 16
    long = {"max_position_embeddings": 32_768}
    assert (
        "sliding_window" not in DESCRIPTIONS["mistral"]
    )  # transformers' default for Mistral alone
    assert (context("mistral", **long), context("mistral", **long, sliding_window=None)) == (
        4096,
        32_768,
    )
    assert (context("llama", **long), context("qwen3", **long)) == (32_768, 32_768)
    assert context("qwen2", sliding_window=4, use_sliding_window=False) == 16
    assert context("qwen2", sliding_window=4, use_sliding_window=True) == 4
    assert context("qwen3", sliding_window=4, layer_types=layers) == 4


# ---------------------------------------------------------------------------------------- GGUF and llama2.c


def _gguf(path: Path, tensors: dict[str, np.ndarray] | None = None, **fields) -> dict:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    config = DecoderConfig(40, 16, 1, 16, 2, mlp_width=24, tied=True)
    for name, value in {"llama.context_length": 16, "llama.embedding_length": 16, "llama.block_count": 1,
                        "llama.feed_forward_length": 24, "llama.attention.head_count": 2}.items():  # fmt: skip
        writer.add_uint32(name, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for name, value in fields.items():
        add[type(value)](name.replace("__", "."), value)
    params = jax.tree.map(np.asarray, _random(language_model(config)))
    blocks = params["blocks"]
    parts = {"token_embd": params["embed"]["embedding"], "output_norm": params["norm"]["scale"],
             "blk.0.attn_norm": blocks["attention_norm"]["scale"][0], "blk.0.ffn_norm": blocks["mlp_norm"]["scale"][0],
             **{f"blk.0.attn_{n}": blocks["attention"][m]["kernel"][0].T
                for n, m in (("q", "query"), ("k", "key"), ("v", "value"), ("output", "out"))},
             **{f"blk.0.ffn_{n}": blocks["mlp"][n]["kernel"][0].T for n in ("gate", "up", "down")}}  # fmt: skip
    whole = {f"{name}.weight": value for name, value in parts.items()} | (tensors or {})
    for name, value in whole.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params


GGUF_FIELDS = [
    ("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 4.0), ("llama.rope.dimension_count", 4),
    ("llama.attention.sliding_window", 8), ("llama.attention.scale", 1.0), ("llama.final_logit_softcapping", 30.0),
    ("llama.attention.clamp_kqv", 8.0), ("llama.expert_count", 8), ("llama.attention.value_length", 4),
    ("llama.logit_scale", 0.5), ("llama.attention.causal", False), ("general.type", "adapter"), ("split.count", 3),
    ("llama.something_new", 2), ("llama.vocab_size", 48),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), GGUF_FIELDS, ids=lambda x: str(x))
def test_a_field_of_a_gguf_file_that_would_change_numbers_is_refused(
    name: str, value, tmp_path: Path
):
    _gguf(tmp_path / "m.gguf", **{name: value})
    with pytest.raises(ValueError, match=rf"{name}=.* is not supported"):
        load_hf(tmp_path / "m.gguf")


def test_a_gguf_file_is_read_whole(tmp_path: Path, capsys):
    plain = {"llama.rope.dimension_count": 8, "llama.vocab_size": 40, "llama.expert_count": 0, "split.count": 1,
             "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0, "general.file_type": 1,
             "llama.attention.scale": 8**-0.5, "vendor.colour": "green"}  # fmt: skip
    params = _gguf(tmp_path / "m.gguf", **plain)
    loaded = load_hf(tmp_path / "m.gguf")[1]
    np.testing.assert_array_equal(loaded["embed"]["embedding"], params["embed"]["embedding"])
    assert "fields that are not read: vendor.colour='green'\n" in capsys.readouterr().err
    for name in (
        "blk.0.attn_q.bias",
        "blk.1.attn_norm.weight",
        "rope_freqs.weight",
        "blk.0.attn_q_norm.weight",
    ):
        _gguf(tmp_path / "m.gguf", {name: _ones(16)})
        with pytest.raises(ValueError, match=r"would be left out|scales its rotary frequencies"):
            load_hf(tmp_path / "m.gguf")


def _gguf_tokens(path: Path, **fields) -> Any:
    """The tokenizer of a GGUF file: bytes, two control tokens and one that somebody defined."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<s>", "</s>", "<tool>", *letters, "ab", *fields.pop("more", ())])
    writer.add_token_types([3, 3, 4, *[1] * (len(letters) + 1)])
    writer.add_token_merges([fields.pop("merge", "a b")])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in fields.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return gguf_tokenizer(gguf.GGUFReader(path))


def test_the_tokenizer_of_a_gguf_file_does_as_its_flags_say(tmp_path: Path):
    plain = _gguf_tokens(tmp_path / "m.gguf").encode("xy")
    assert len(plain) == 2
    for bos, eos in ((True, False), (True, True), (False, True)):
        found = _gguf_tokens(tmp_path / "m.gguf", add_bos_token=bos, add_eos_token=eos)
        assert found.encode("xy") == [0] * bos + plain + [1] * eos
        assert found.encode("xy", add_special_tokens=False) == plain
        assert found.encode("x<tool>y", add_special_tokens=False) == [plain[0], 2, plain[1]]
    with pytest.raises(ValueError, match=r"261 tokens, 260 of them different, and 260 types"):
        _gguf_tokens(tmp_path / "m.gguf", more=("<tool>",))
    with pytest.raises(ValueError, match=r"cannot be read .*`ba` out of vocabulary"):
        _gguf_tokens(tmp_path / "m.gguf", merge="b a")


def _llama2c(path: Path, tables: np.ndarray, tail: bytes = b"") -> None:
    width, mlp, layers, heads, vocabulary, context = 8, 12, 1, 2, 24, 6
    shapes = [(vocabulary, width), (width,), (width, width), (width, width), (width, width), (width, width), (width,),
              (mlp, width), (width, mlp), (mlp, width), (width,)]  # fmt: skip
    noise = np.random.default_rng(0)
    body = b"".join(noise.normal(size=shape).astype("<f4").tobytes() for shape in shapes)
    header = struct.pack("<7i", width, mlp, layers, heads, heads, vocabulary, context)
    path.write_bytes(header + body + tables.astype("<f4").tobytes() + tail)


def test_a_llama2c_file_is_read_whole(tmp_path: Path):
    file = tmp_path / "model.bin"

    def tables(base: float) -> np.ndarray:
        angles = np.arange(6)[:, None] * base ** (-np.arange(0, 4, 2) / 4)
        return np.stack([np.cos(angles), np.sin(angles)])

    for sound in (tables(1e4), np.zeros((2, 6, 2))):
        _llama2c(file, sound)
        load_llama2c(file)
    for found, tail, message in (
        (
            tables(500.0),
            b"",
            r"rotary tables of shape \[6, 4\] that are not those of the base 10000",
        ),
        (tables(1e4), b"\0" * 4, "1 values too many"),
        (tables(1e4), b"\0" * 3, "no whole number of float32"),
    ):
        _llama2c(file, found, tail)
        with pytest.raises(ValueError, match=message):
            load_llama2c(file)
    file.write_bytes(struct.pack("<2i", 0x616B3432, 2) + b"\0" * 300)
    with pytest.raises(ValueError, match=r"of version 2 of llama2\.c"):
        load_llama2c(file)


def test_a_llama2c_tokenizer_is_that_of_its_model(tmp_path: Path):
    _llama2c(tmp_path / "model.bin", np.zeros((2, 6, 2)))

    def write(pieces: list[str]) -> None:
        each = b"".join(
            struct.pack("<fI", -i, len(piece)) + piece.encode() for i, piece in enumerate(pieces)
        )
        (tmp_path / "tok.bin").write_bytes(struct.pack("<I", 4) + each)

    pieces = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstu"]
    write(pieces)
    assert len(load_llama2c(tmp_path / "model.bin", tmp_path / "tok.bin")[2]) == 24
    write([*pieces, "ab"])
    with pytest.raises(ValueError, match="more pieces than the model's 24"):
        load_llama2c(tmp_path / "model.bin", tmp_path / "tok.bin")
    write([*pieces[:-1], "a"])
    with pytest.raises(ValueError, match="the piece 'a' stands in it twice"):
        load_llama2c(tmp_path / "model.bin", tmp_path / "tok.bin")
