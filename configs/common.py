"""The keys of each stage with the paper's values (Ouyang et al. 2022); presets and small worlds change them from here.

Every value that the paper gives stands here as it gives it. A key that is empty (``""``) is a path to fill in.
"""

from ml_collections import ConfigDict

from rlhf_jax.config import fn_spec

ADAM = {"b1": 0.9, "b2": 0.95}
"""Ouyang et al. 2022, appendix C: for everything."""


def sft() -> ConfigDict:
    """Supervised fine-tuning, appendix C.1 (1.3B and 6B)."""
    return ConfigDict(
        {
            "seed": 0,
            "mesh": (-1, 1, 1),
            "model": "",
            "demonstrations": "",
            "validation": "",
            "pretraining_text": "",
            "pretraining_fraction": 0.0,
            "row_length": 2048,
            "epochs": 16,
            "batch_size": 32,
            "learning_rate": 9.65e-6,
            "dropout": 0.2,
            "clip_norm": None,
            **ADAM,
        }
    )


def ppo_init() -> ConfigDict:
    """The policy that PPO starts from and is held to, appendix C.3 (1.3B)."""
    config = sft()
    config.update(epochs=2, pretraining_fraction=0.1, learning_rate=5e-6, dropout=0.0)
    return config


def sample() -> ConfigDict:
    """K responses to each prompt, section 3.5: K from 4 to 9."""
    return ConfigDict(
        {
            "seed": 0,
            "mesh": (-1, 1, 1),
            "models": ("",),
            "prompts": "",
            "min_k": 4,
            "max_k": 9,
            "temperature": 1.0,
            "prompt_length": 1024,
            "max_new_tokens": 1024,
            "batch_size": 256,
            "labelers": 0,
            "labeler_group": "train",
            "labels_each": 1,
        }
    )


def reward_model() -> ConfigDict:
    """The 6B reward model, appendix C.2."""
    return ConfigDict(
        {
            "seed": 0,
            "mesh": (-1, 1, 1),
            "model": "",
            "rankings": "",
            "demonstrations": "",
            "evaluation": {"validation_train": "", "validation_heldout": ""},
            "loss": fn_spec("rlhf_jax.losses.ranking:ranking_loss"),
            "max_k": 9,
            "row_length": 1024 + 9 * 1024,
            "epochs": 1,
            "batch_size": 64,
            "learning_rate": 9e-6,
            "clip_norm": None,
            "save_every": 100,
            "bias_demonstrations": 1024,
            "score_batch_size": 256,
            **ADAM,
        }
    )


def ppo() -> ConfigDict:
    """PPO-ptx, appendix C.4 (1.3B): 256,000 episodes in iterations of 512, 8 minibatches, one inner epoch."""
    return ConfigDict(
        {
            "name": "ppo_ptx",
            "seed": 0,
            "mesh": (-1, 1, 1),
            "model": "",
            "reward_model": "",
            "prompts": "",
            "prompt_length": 1024,
            "max_new_tokens": 1024,
            "temperature": 1.0,
            "iterations": 500,
            "episodes": 512,
            "epochs": 1,
            "minibatches": 8,
            "microbatches": 1,
            "learning_rate": 9e-6,
            "value_learning_rate": 9e-6,
            "warmup_iterations": 10,
            "adam_eps": 1e-8,
            "ppo_clip_norm": None,
            "ptx_clip_norm": None,
            "value_clip_norm": None,
            "policy_loss": fn_spec("rlhf_jax.losses.policy:ppo_policy_loss"),
            "value_loss": fn_spec("rlhf_jax.losses.value:ppo_value_loss"),
            "whiten_advantages": True,
            "gamma": 1.0,
            "lam": 0.95,
            "missing_eos_score": None,
            "truncation": "terminal",
            "kl": {"controller": "fixed", "coef": 0.02, "target": 6.0, "horizon": 10_000},
            "kl_ceiling": 1e3,
            "ema_decay": 0.992,
            "ptx_coef": 27.8,
            "ptx_rows_per_episode": 8.0,
            "ptx_row_length": 2048,
            "pretraining_text": "",
            "held_out_text": "",
            "held_out_rows": 64,
            "evaluate_every": 10,
            "save_every": 25,
            "gold": "",
            **ADAM,
        }
    )


def evaluate() -> ConfigDict:
    """Evaluation against the SFT baseline."""
    return ConfigDict(
        {
            "seed": 1,
            "mesh": (-1, 1, 1),
            "models": {"base": "", "sft": "", "ppo": "", "ppo_ptx": ""},
            "reference": "",
            "kl_of": ("ppo", "ppo_ptx"),
            "reward_model": "",
            "prompts": "",
            "limit": None,
            "temperature": 1.0,
            "samples": 1,
            "baseline_samples": 1,
            "max_new_tokens": 1024,
            "batch_size": 256,
            "gold": "",
            "held_out_text": "",
            "held_out_row_length": 2048,
            "held_out_batches": 8,
            "few_shot": {
                "demonstrations": "",
                "template": "Task: {prompt}\nAnswer: {response}",
                "examples": 2,
                "candidates": 4,
                "trial_prompts": 64,
            },
        }
    )
