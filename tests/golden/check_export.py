"""Loads a model folder with rlhf_jax and with torch transformers, and compares what they say.

Run, where torch and transformers are installed beside the package:

    python tests/golden/check_export.py runs/instructgpt/ppo_ptx/ema
    python tests/golden/check_export.py runs/instructgpt/reward_model/model

The texts are random tokens of different lengths, each with its EOS, padded on the right as the folder's config says.
Prints the largest difference and fails when it is above the tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rlhf_jax import scoring
from rlhf_jax.models.hf import load_hf

LENGTHS = (3, 9, 24, 40)


def main() -> int:
    """Compares the logits of a language model or the scores of a reward model; exit code 0 where they agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    description = json.loads((args.folder / "config.json").read_text())
    ids, mask = rows(description)
    is_reward_model = "ForSequenceClassification" in description["architectures"][0]
    ours, theirs = (f(args.folder, ids, mask, is_reward_model) for f in (with_rlhf_jax, with_torch))
    text = np.ones_like(mask[:, 0]) if is_reward_model else mask[..., None]
    gap = float(np.abs((ours - theirs) * text).max())
    what = "scores" if is_reward_model else "logits"
    print(f"{args.folder}: {description['architectures'][0]}, {len(ids)} rows, {what} between {ours.min():.3f} and "
          f"{ours.max():.3f}, largest difference {gap:.1e}")  # fmt: skip
    return int(not gap <= args.tolerance)


def rows(description: dict) -> tuple[np.ndarray, np.ndarray]:
    """Ragged rows that end in EOS, and where they hold text."""
    eos, pad = description["eos_token_id"], description["pad_token_id"]
    assert eos != pad, "padding would hide the EOS from a sequence classifier"
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    ids = np.random.default_rng(0).integers(0, description["vocab_size"], mask.shape)
    ids = np.where(np.isin(ids, (eos, pad)), (max(eos, pad) + 1) % description["vocab_size"], ids)
    ids[np.arange(len(LENGTHS)), np.array(LENGTHS) - 1] = eos
    return np.where(mask, ids, pad), mask.astype(np.int64)


def with_rlhf_jax(
    folder: Path, ids: np.ndarray, mask: np.ndarray, is_reward_model: bool
) -> np.ndarray:
    """Logits ``[B, T, V]`` or scores ``[B]``."""
    model, params, _ = load_hf(folder)
    lengths = jnp.asarray(mask.sum(axis=1), jnp.int32)
    if is_reward_model:
        return np.asarray(
            scoring.sequence_values(model, params, jnp.asarray(ids, jnp.int32), lengths)[1]
        )
    segments, positions = scoring.row_layout(lengths, ids.shape[1])
    hidden = model.apply(
        params, jnp.asarray(ids, jnp.int32), segments=segments, positions=positions
    ).hidden
    return np.asarray(model.head(params, hidden))


def with_torch(
    folder: Path, ids: np.ndarray, mask: np.ndarray, is_reward_model: bool
) -> np.ndarray:
    """The same by torch; to a reward model's logits the bias of config.json is added."""
    try:
        import torch  # no dependency of the package
        import transformers
    except ImportError as error:
        sys.exit(
            f"this check needs torch and transformers ({error}): pip install torch transformers"
        )
    kind = (
        transformers.AutoModelForSequenceClassification
        if is_reward_model
        else transformers.AutoModelForCausalLM
    )
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)
        ).logits.numpy()
    return logits[:, 0] + model.config.rlhf_jax_score_bias if is_reward_model else logits


if __name__ == "__main__":
    sys.exit(main())
