"""Tiny random models of every family, written by torch transformers, with their logits: what `test_golden.py` compares.

    pip install torch transformers safetensors
    python tests/golden/make_torch_models.py

torch is no dependency of the package; only who changes the families runs this. The weights are drawn here from a fixed
seed, so the files are our own. Each folder under ``tests/golden/models`` holds ``config.json``, ``model.safetensors``
and ``golden.npz``: ragged rows, padded on the right, and what torch says of them.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent / "models"
LENGTHS = (11, 6, 1)
SHARED = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# The base and the context are small, so that each of the three parts of the rule is met within eleven tokens.
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "gpt2": transformers.GPT2Config(
        vocab_size=32,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "llama": transformers.LlamaConfig(**SHARED, tie_word_embeddings=False),
    "llama3": transformers.LlamaConfig(
        **SHARED, tie_word_embeddings=True, rope_parameters=LLAMA3, head_dim=8
    ),
    "mistral": transformers.MistralConfig(**SHARED, sliding_window=32, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**SHARED, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SHARED, head_dim=8, tie_word_embeddings=False),
    # Two local layers, then a global one; the window is shorter than the longest row.
    "gemma3": transformers.Gemma3TextConfig(
        **(SHARED | {"num_hidden_layers": 4}),
        head_dim=8,
        query_pre_attn_scalar=12,
        sliding_window=4,
        layer_types=[
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    ),
}


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """No weight is left at 0 or 1, so that a tensor that was lost or mixed up shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.2 * noise if "norm" in name or ".ln_" in name else 0.3 * noise)
    return model.eval()


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of 3 to 31, and the mask of what is text."""
    ids = np.random.default_rng(seed).integers(3, 32, (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    return torch.tensor(np.where(mask, ids, 0)), torch.tensor(mask.astype(np.int64))


def write(name: str, model: torch.nn.Module, seed: int) -> None:
    """The model and its logits."""
    model = randomise(model, seed)
    ids, mask = rows(seed)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits.float().numpy()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(HERE / name, safe_serialization=True)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    np.savez(HERE / name / "golden.npz", ids=ids.numpy(), lengths=np.array(LENGTHS), logits=logits)
    print(name, logits.shape, f"mean {logits.mean():.4f}")


if __name__ == "__main__":
    for place, (family, config) in enumerate(FAMILIES.items()):
        if sys.argv[1:] and family not in sys.argv[1:]:
            continue  # names of families: only these are made anew
        write(family, transformers.AutoModelForCausalLM.from_config(config), place)
        config.num_labels = 1
        write(
            f"{family}_score",
            transformers.AutoModelForSequenceClassification.from_config(config),
            100 + place,
        )
