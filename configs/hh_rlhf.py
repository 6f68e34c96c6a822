"""Settings for human preferences (HH-RLHF, OpenAssistant) with SmolLM2-135M-Instruct."""

from ml_collections import ConfigDict

from configs import common

BASE = "smollm2"
PROMPT_LENGTH = 256
MAX_NEW_TOKENS = 192
FEW_SHOT = "{prompt} {response}"
"""The prompts end in "Assistant:", so the response follows directly."""


def data() -> ConfigDict:
    """Which records, how many at most, and how long in tokens of `model`'s tokenizer."""
    return ConfigDict(
        {
            "source": "hh_rlhf",
            "data_dir": "",
            "subsets": (
                "helpful-base",
                "helpful-rejection-sampled",
                "helpful-online",
                "harmless-base",
            ),
            "model": BASE,
            "seed": 0,
            # Shares of the conversations; no conversation is in two parts. A fifth is held out, so
            # that over a thousand of the 7,415 published test pairs evaluate a reward model.
            "shares": {
                "test": 0.15,
                "validation": 0.05,
                "demonstrations": 0.2,
                "ranking": 0.4,
                "ppo": 0.2,
            },
            "demonstrations": 10_000,
            "ranking_prompts": 30_000,
            "ppo_prompts": 30_000,
            "validation_prompts": 256,
            "test_prompts": 512,
            "held_out_rankings": 2_000,
            "prompt_length": PROMPT_LENGTH,
            "response_length": MAX_NEW_TOKENS,
            "ranked_response_length": 512,
            "ranking_length": 2048,
            "documents": 20_000,
            "held_out_documents": 2_000,
            "document_characters": 2_000,
        }
    )


def oasst_data() -> ConfigDict:
    """OpenAssistant's rankings alone.

    Replies are long and there are few of them, so nearly all of them go into training.
    """
    config = data()
    config.update(
        subsets=(),
        prompt_length=512,
        response_length=512,
        ranking_length=2048,
        ranked_response_length=768,
    )
    config.shares.update(test=0.1, validation=0.05, demonstrations=0.05, ranking=0.75, ppo=0.05)
    return config


def reward_model(source: str) -> ConfigDict:
    """The reward model alone, on the files of a data folder (``--config.data=FOLDER``).

    The held-out rankings are those of the same `source`.
    """
    config = common.reward_model()
    config.data = ""
    # A reference, so that `--config.data` also changes the paths that are made of it.
    folder = config.get_ref("data")
    config.rankings, config.demonstrations = (
        folder + "/rankings.jsonl",
        folder + "/demonstrations.jsonl",
    )
    config.evaluation = {f"held_out_{source}": folder + f"/rankings_held_out_{source}.jsonl"}
    config.update(
        model=BASE, too_long="drop", clip_norm=1.0, bias_demonstrations=128, score_batch_size=16
    )
    if source == "hh_rlhf":
        # The hidden states of the frozen trunk are computed once, so epochs of the head are cheap.
        config.update(
            train="head", row_length=320, batch_size=16, learning_rate=1e-3, epochs=4,
            save_every=1000,
        )  # fmt: skip
    else:
        config.update(
            train="lora", row_length=2048, batch_size=2, learning_rate=2e-4, save_every=50
        )
    config.lora.layers = 10
    config.decoder.unroll = 1
    return config


def smoke_reward_model(config: ConfigDict) -> None:
    """Storyland's small model, one block of it adapted."""
    config.update(model="storyland:base_small", epochs=1, row_length=2048)
    config.lora.update(layers=1, rank=2)


def instructgpt() -> ConfigDict:
    """The pipeline for one accelerator."""
    config = common.pipeline(
        data=data(), sft=common.sft(), ppo_init=common.ppo_init(), sample=common.sample(),
        reward_model=common.reward_model(), ppo=common.ppo(), evaluate=common.evaluate(),
    )  # fmt: skip
    config.base = BASE
    config.data_dir = ""
    # References, so that overriding the pipeline's own key also changes the data stage.
    config.data.data_dir = config.get_ref("data_dir")
    config.data.model = config.get_ref("base")
    # One block per iteration of the layer scan compiles fastest.
    for stage in common.STAGES[1:]:
        config[stage].decoder.update(unroll=1)
    rows = PROMPT_LENGTH + MAX_NEW_TOKENS
    for stage in (config.sft, config.ppo_init):
        stage.update(
            row_length=rows, batch_size=32, learning_rate=2e-5, epochs=2, dropout=0.0, clip_norm=1.0
        )
    config.sample.update(prompt_length=PROMPT_LENGTH, max_new_tokens=MAX_NEW_TOKENS)
    config.reward_model.evaluation = {"held_out_hh_rlhf": "", "held_out_oasst": ""}
    config.reward_model.update(
        row_length=2048, batch_size=16, learning_rate=2e-5, clip_norm=1.0, save_every=200
    )
    config.ppo.update(
        prompt_length=PROMPT_LENGTH, max_new_tokens=MAX_NEW_TOKENS, iterations=200, episodes=128,
        learning_rate=5e-6, value_learning_rate=1e-5, warmup_iterations=4,
        value_warmup_iterations=4, ppo_clip_norm=1.0, ptx_clip_norm=1.0, value_clip_norm=1.0,
        kl_ceiling=200.0, ema_decay=0.97, ptx_coef=1.0, ptx_rows_per_episode=0.5,
        ptx_row_length=rows, save_every=50,
    )  # fmt: skip
    config.ppo.kl.coef = 0.05
    config.evaluate.update(
        max_new_tokens=MAX_NEW_TOKENS,
        samples=1,
        baseline_samples=8,
        batch_size=64,
        held_out_row_length=rows,
    )
    config.evaluate.few_shot.update(template=FEW_SHOT, stop="\n\n", examples=1, candidates=2)
    return config


# ----------------------------------------------------------------------------------- smaller sizes


def few(config: ConfigDict, prompt: int, response: int) -> None:
    """Sets the lengths of every stage, in tokens: at most `prompt` and `response`."""
    rows = prompt + response
    config.data.update(prompt_length=prompt, response_length=response)
    config.sft.row_length = config.ppo_init.row_length = config.ppo.ptx_row_length = rows
    config.evaluate.held_out_row_length = rows
    for stage in (config.sample, config.ppo):
        stage.update(prompt_length=prompt, max_new_tokens=response)
    config.evaluate.max_new_tokens = response


def cpu(config: ConfigDict) -> None:
    """Short prompts and few steps: half an hour on two cores, to show that every stage runs."""
    few(config, 96, 64)
    # The shares of the recorded run (docs/results.md).
    config.data.shares.update(test=0.1, demonstrations=0.25)
    config.data.update(
        subsets=("helpful-base", "helpful-rejection-sampled"), demonstrations=96,
        ranking_prompts=160, ppo_prompts=128, validation_prompts=16, test_prompts=32,
        held_out_rankings=120, ranked_response_length=128, ranking_length=640, documents=400,
        held_out_documents=60, document_characters=600,
    )  # fmt: skip
    config.sft.update(epochs=2, batch_size=4)
    config.ppo_init.update(epochs=1, batch_size=4)
    config.reward_model.update(
        row_length=640, batch_size=4, max_k=9, bias_demonstrations=64, score_batch_size=16
    )
    config.ppo.update(
        iterations=6, episodes=8, minibatches=2, warmup_iterations=1, value_warmup_iterations=1,
        ptx_rows_per_episode=0.5, held_out_rows=8, evaluate_every=3, save_every=100,
    )  # fmt: skip
    config.evaluate.update(samples=1, baseline_samples=1, batch_size=16, held_out_batches=2)
    config.evaluate.few_shot.update(candidates=1, trial_prompts=4)


def smoke(config: ConfigDict) -> None:
    """The whole pipeline in a minute, with a small model that knows only storyland's English."""
    few(config, 96, 32)
    config.base, config.smoke = "storyland:base_small", True
    config.data.update(
        demonstrations=16, ranking_prompts=16, ppo_prompts=16, validation_prompts=8, test_prompts=8,
        held_out_rankings=8, response_length=64, ranked_response_length=64, ranking_length=256,
        documents=64, held_out_documents=16, document_characters=200,
    )  # fmt: skip
    config.sft.update(epochs=1, batch_size=8, row_length=160)
    config.ppo_init.update(epochs=1, batch_size=8, row_length=160)
    config.reward_model.update(row_length=256, batch_size=8, score_batch_size=16)
    config.ppo.update(
        iterations=1, episodes=8, minibatches=1, warmup_iterations=1, value_warmup_iterations=1,
        held_out_rows=8, ptx_row_length=96, ptx_rows_per_episode=1.0,
    )  # fmt: skip
    config.evaluate.update(
        baseline_samples=1, batch_size=8, held_out_batches=1, held_out_row_length=96
    )
    config.evaluate.few_shot.update(candidates=1, trial_prompts=4, examples=1)


def smoke_data(config: ConfigDict) -> None:
    """A few records of each kind, short enough for the 256 tokens of storyland's small model."""
    config.update(
        prompt_length=120, response_length=128, ranked_response_length=128,
        model="storyland:base_small", demonstrations=16, ranking_prompts=16, ppo_prompts=16,
        validation_prompts=8, test_prompts=8, held_out_rankings=8, documents=64,
        held_out_documents=16,
    )  # fmt: skip
