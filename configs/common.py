"""The settings of every stage, with the values of the paper (Ouyang et al. 2022).

Presets and small worlds start from these and override what differs. Every value that the paper
states is copied unchanged. A key that is empty (``""``) is a path to fill in.
"""

from ml_collections import ConfigDict

from rlhf_jax.run.config import fn_spec
from rlhf_jax.sharding import DECODER_RULES, rules_as_data

ADAM = {"optimizer": "adam", "b1": 0.9, "b2": 0.95, "adam_eps": 1e-8}
"""Ouyang et al. 2022, appendix C, for every stage; the paper gives no epsilon. ``tf_adam`` is the
form in the 2019 and 2020 code."""

TRAINED = {
    "train": "all",
    "lora": {"rank": 16, "alpha": 32.0, "targets": "attention/|mlp/", "layers": None},
}
"""Which parameters are trained: ``all``, ``lora`` adapters (in the last `layers` blocks; None: in
all blocks) or, for a reward model, only the score ``head``."""

DECODER = {"dtype": "float32", "remat": "none", "unroll": None}
"""How models compute: fields of `DecoderConfig`. Weights are float32 with every setting."""

GUARD = {"spike_std": 20.0, "max_skipped": 5}
"""A step is skipped when its loss, gradient norm or reward exceeds the mean of the last 128 steps
by `spike_std` standard deviations (None: only when it is not finite); `max_skipped` skipped
steps in a row end the run. Not in the paper. Gradient norms of healthy storyland runs
reached 13.5 deviations, so the common threshold of 6 would have changed those runs."""

SHARDING = rules_as_data(DECODER_RULES)
"""How the arrays of a network are sharded over the mesh: ``((regex, (mesh axes of each dimension)),
..)``; the first regex found in an array's path decides. ``()`` replicates the whole network on
every device. See docs/scaling.md."""

STORYLAND_GOLD = "rlhf_jax.data.storyland.gold:gold_of"
"""The gold scorer of the embedded world; empty for data whose true quality is unknown."""

STAGES = ("data", "sft", "ppo_init", "sample", "reward_model", "ppo", "evaluate")
"""The groups of a pipeline's config, in the order in which the stages run."""


def pipeline(**stages: ConfigDict) -> ConfigDict:
    """The config of ``experiments/instructgpt.py``: one group per stage, and what the stages share.

    ``base`` is the pretrained model and ``shapes`` gives the decoder sizes that a preset is for
    (empty: any). The SFT baseline is the epoch that scores best on ``validation_samples`` responses
    to each validation prompt. ``smoke`` marks sizes too small for the numbers to mean anything.
    """
    shared = {
        "seed": 0,
        "base": "",
        "shapes": {"policy": {}, "reward_model": {}},
        "validation_samples": 2,
    }
    shared["smoke"] = False
    config = ConfigDict(shared | stages)
    for stage in ("sft", "ppo_init"):  # filled in by the pipeline, from `base`
        config[stage].model = ""
    return config


def data() -> ConfigDict:
    """Amounts of data: table 6; test prompts: table 9; 8 documents per episode: appendix C.4."""
    return ConfigDict(
        {
            "source": "storyland",
            "labelers": 40,
            "demonstrations": 12_725,
            "ranking_prompts": 33_207,
            "ppo_prompts": 31_144,
            "validation_prompts": 1_653,
            "test_prompts": 3_196,
            # Eight for each of the 256,000 episodes.
            "documents": 2_048_000,
            "held_out_documents": 10_000,
        }
    )


def sft() -> ConfigDict:
    """Supervised fine-tuning, appendix C.1 (1.3B and 6B)."""
    return ConfigDict(
        {
            "seed": 0,
            "mesh": (-1, 1, 1),
            "model": "",
            "decoder": DECODER,
            "sharding": SHARDING,
            "demonstrations": "",
            "validation": "",
            "pretraining_text": "",
            "pretraining_fraction": 0.0,
            "row_length": 2048,
            "pieces_per_row": None,
            "assistant_turns": "all",
            "epochs": 16,
            "batch_size": 32,
            "microbatches": 1,
            "learning_rate": 9.65e-6,
            "schedule": "cosine",
            "dropout": 0.2,
            "clip_norm": None,
            "guard": GUARD,
            "keep": 2,
            **TRAINED,
            **ADAM,
        }
    )


def ppo_init() -> ConfigDict:
    """The policy that PPO starts from and is penalised for leaving, appendix C.3 (1.3B)."""
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
            "decoder": DECODER,
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
            "decoder": DECODER,
            "sharding": SHARDING,
            "rankings": "",
            "demonstrations": "",
            "evaluation": {"validation_train": "", "validation_heldout": ""},
            "loss": fn_spec("rlhf_jax.losses.ranking:ranking_loss"),
            "max_k": 9,
            # A prompt and nine responses of full length share a row.
            "row_length": 1024 + 9 * 1024,
            "too_long": "error",
            "prompts_per_row": None,
            "epochs": 1,
            "batch_size": 64,
            "microbatches": 1,
            "learning_rate": 9e-6,
            "schedule": "cosine",
            "clip_norm": None,
            "save_every": 100,
            "guard": GUARD,
            "keep": 2,
            "bias_demonstrations": 1024,
            "score_batch_size": 256,
            **TRAINED,
            **ADAM,
        }
    )


def ppo() -> ConfigDict:
    """PPO-ptx, appendix C.4 (1.3B).

    256,000 episodes in iterations of 512, each with 8 minibatches and one inner epoch.
    """
    return ConfigDict(
        {
            "name": "ppo_ptx",
            "seed": 0,
            "mesh": (-1, 1, 1),
            "model": "",
            "decoder": DECODER,
            "sharding": {
                "policy": SHARDING,
                "reference": SHARDING,
                "value": SHARDING,
                "reward_model": SHARDING,
            },
            "reward_model": "",
            "text_reward": "",
            "prompts": "",
            "prompt_length": 1024,
            "max_new_tokens": 1024,
            "temperature": 1.0,
            "iterations": 500,
            "episodes": 512,
            "epochs": 1,
            "minibatches": 8,
            "microbatches": 1,
            "ptx_microbatches": None,
            "score_microbatches": 1,
            # The paper swept 2.55e-6 to 2.55e-5 and does not state its choice; without the
            # pretraining mix all runs above this rate diverged.
            "learning_rate": 8.05e-6,
            "value_learning_rate": 9e-6,
            "schedule": "constant",
            "warmup_iterations": 10,
            "value_warmup_iterations": 10,
            "ppo_clip_norm": None,
            "ptx_clip_norm": None,
            "value_clip_norm": None,
            "policy_loss": fn_spec("rlhf_jax.losses.policy:ppo_policy_loss"),
            "value_loss": fn_spec("rlhf_jax.losses.value:ppo_value_loss"),
            "whiten_advantages": True,
            "whiten_rewards": False,
            "gamma": 1.0,
            "lam": 0.95,
            "missing_eos_score": None,
            "truncation": "terminal",
            "kl": {"controller": "fixed", "coef": 0.02, "target": 6.0, "horizon": 10_000},
            # Limits that stop the run: KL in nats per sequence, entropy in nats per token, and
            # the squared error of the values relative to the squared score.
            "kl_ceiling": 1e3,
            "entropy_floor": 1e-4,
            "value_error_ceiling": 1e3,
            "guard": GUARD,
            "ema_decay": 0.992,
            "ptx_coef": 27.8,
            "ptx_rows_per_episode": 8.0,
            "ptx_row_length": 2048,
            "pretraining_text": "",
            "held_out_text": "",
            "held_out_rows": 64,
            "evaluate_every": 10,
            "save_every": 25,
            "keep": 2,
            "gold": "",
            **TRAINED,
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
            "decoder": DECODER,
            "reference": "",
            "kl_of": ("ppo", "ppo_ptx"),
            "reward_model": "",
            "prompts": "",
            "limit": None,
            "temperature": 1.0,
            "samples": 1,
            "baseline_samples": 1,
            "base_samples": 1,
            "max_new_tokens": 1024,
            "batch_size": 256,
            "gold": "",
            "held_out_text": "",
            "held_out_row_length": 2048,
            "held_out_batches": 8,
            "few_shot": {
                "demonstrations": "",
                "template": "Question: {prompt}\nReply: {response}",
                "stop": "\n",
                "examples": 2,
                "candidates": 4,
                "trial_prompts": 64,
            },
        }
    )


# ------------------------------------------------------------ whole pipelines at the paper's sizes


def gpt3(layers: int, width: int, heads: int) -> ConfigDict:
    """Sizes of a decoder of the GPT-3 family (vocabulary of GPT-2, 2,048 positions)."""
    return ConfigDict(
        {
            "layers": layers,
            "width": width,
            "heads": heads,
            "vocab_size": 50_257,
            "context_length": 2048,
        }
    )


GPT3_1_3B = (24, 2048, 16)
GPT3_6B = (32, 4096, 32)
GPT3_175B = (96, 12_288, 96)


def instructgpt(policy: tuple[int, int, int]) -> ConfigDict:
    """The whole of Ouyang et al. 2022 with the settings of the 1.3B policy.

    The reward and value models are 6B at every policy size. Each row has one demonstration or one
    prompt, so that batch sizes count what the paper counts. Labelers, demonstrations and the gold
    scorer are storyland's until files of human data replace them.
    """
    config = pipeline(
        data=data(), sft=sft(), ppo_init=ppo_init(), sample=sample(), reward_model=reward_model(),
        ppo=ppo(), evaluate=evaluate(),
    )  # fmt: skip
    config.shapes.policy, config.shapes.reward_model = gpt3(*policy), gpt3(*GPT3_6B)
    # Unpacked rows: a batch of 32 rows is then 32 demonstrations, as in the paper.
    config.sft.pieces_per_row = config.ppo_init.pieces_per_row = 1
    config.sample.labelers = 40
    config.reward_model.update(prompts_per_row=1, bias_demonstrations=12_725)
    config.ppo.gold = config.evaluate.gold = STORYLAND_GOLD
    for_accelerators(config)
    return config


def for_accelerators(config: ConfigDict, mesh: tuple[int, int, int] = (1, -1, 1)) -> None:
    """Settings for billions of parameters: bfloat16, rematerialised blocks, sharded weights."""
    # The data stage loads no model onto devices.
    for stage in STAGES[1:]:
        config[stage].mesh = mesh
        config[stage].decoder.update(dtype="bfloat16", remat="block", unroll=1)
