# pyright: reportMissingImports=false
"""Times sampling with transformers' ``generate`` on random weights.

Run in an environment with torch and transformers 5:

    python tools/peers/with_transformers.py decode --batch 8 --prompt_len 64 --new_tokens 64

Claim: the seconds of one ``generate`` call of ``GPT2LMHeadModel`` or ``LlamaForCausalLM``.
Work: batch rows of prompt_len random tokens, prefill included, then new_tokens sampled at
temperature 1 with neither top-k nor top-p. No end token exists, so each row has its full length;
that is checked after each call.
Settings: PyTorch's fused attention and DynamicCache, both transformers' defaults;
``--cache static`` is the other. bfloat16 means bfloat16 weights here. Source:
https://github.com/huggingface/transformers, its public API alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

# Offline, because a look-up on the network or a notice about it would delay a run.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import timing

timing.require("torch", "transformers")

import torch
import transformers


def start(flags: argparse.Namespace) -> None:
    """Sets threads and seed; must be called before any model is built."""
    torch.set_num_threads(flags.threads)
    torch.manual_seed(flags.seed)


def random_ids(flags: argparse.Namespace, rows: int, length: int) -> torch.Tensor:
    """Token ids, uniform over the vocabulary."""
    return torch.randint(flags.vocab, (rows, length))


def model_config(
    flags: argparse.Namespace, context: int, **more: Any
) -> transformers.PretrainedConfig:
    """The architecture that the flags name, without dropout and without special tokens."""
    both = {"vocab_size": flags.vocab, "attn_implementation": "sdpa", **more}
    both |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if flags.family == "llama":
        return transformers.LlamaConfig(
            hidden_size=flags.width, num_hidden_layers=flags.layers,
            num_attention_heads=flags.heads, num_key_value_heads=flags.kv_heads,
            intermediate_size=flags.mlp_width, max_position_embeddings=context,
            tie_word_embeddings=True, attention_dropout=0.0, **both,
        )  # fmt: skip
    return transformers.GPT2Config(
        n_embd=flags.width, n_layer=flags.layers, n_head=flags.heads, n_inner=flags.mlp_width,
        n_positions=context, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, **both,
    )  # fmt: skip


def causal_lm(flags: argparse.Namespace, context: int) -> transformers.PreTrainedModel:
    """A language model with tied embeddings and transformers' own initial weights, in float32."""
    return transformers.AutoModelForCausalLM.from_config(
        model_config(flags, context), dtype=torch.float32
    )


def count(model: torch.nn.Module) -> int:
    """The number of parameters, with tied ones counted once."""
    return sum(weight.numel() for weight in model.parameters())


def now(flags: argparse.Namespace) -> float:
    """The clock, read when the device has finished all pending work."""
    if flags.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def device_peak(flags: argparse.Namespace) -> dict[str, float]:
    """The peak memory of tensors on the device, if there is one."""
    if flags.device == "cpu":
        return {}
    return {"peak_device_mb": round(torch.cuda.max_memory_allocated() / (1 << 20), 1)}


def generation_config(flags: argparse.Namespace) -> transformers.GenerationConfig:
    """Plain sampling from the model's distribution for exactly new_tokens tokens."""
    cache = {} if flags.cache == "dynamic" else {"cache_implementation": "static"}
    return transformers.GenerationConfig(
        max_new_tokens=flags.new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        use_cache=True, eos_token_id=None, pad_token_id=0, **cache,
    )  # fmt: skip


def decode(flags: argparse.Namespace) -> None:
    """Times ``generate`` call by call, new prompts for each, and reports."""
    context = flags.prompt_len + flags.new_tokens
    model = causal_lm(flags, context).eval().to(flags.device, getattr(torch, flags.dtype))
    config, seconds = generation_config(flags), []
    for _ in range(flags.warmup + flags.steps):
        prompts = random_ids(flags, flags.batch, flags.prompt_len).to(flags.device)
        begun = now(flags)
        rows = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), generation_config=config
        )
        seconds.append(now(flags) - begun)
        timing.check(
            tuple(rows.shape) == (flags.batch, context), f"generate() returned {tuple(rows.shape)}"
        )
    timed = seconds[flags.warmup :]
    timing.report(
        flags, "transformers", timed,
        (flags.batch * flags.new_tokens, "sampled: batch x new_tokens"), params=count(model),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        # With a static cache, generate() may compile the decoding step at its first call.
        compile_s=seconds[0] - statistics.median(timed) if flags.cache == "static" else 0.0,
        **device_peak(flags),
    )  # fmt: skip


def main() -> None:
    """Reads the flags and runs."""
    parser = timing.parser(__doc__ or "", ("decode",))
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")
    flags = timing.parse(parser)
    start(flags)
    decode(flags)


if __name__ == "__main__":
    main()
