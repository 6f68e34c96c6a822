"""What a stage of the pipeline would refuse later, as far as the config shows it at the start."""

from __future__ import annotations

import json

from ml_collections import ConfigDict

from rlhf_jax.ppo import RANKING_ARGUMENTS
from rlhf_jax.run import config as config_lib
from rlhf_jax.run import inputs, networks, pipeline
from rlhf_jax.run.ppo import settings


def check(config: ConfigDict) -> None:
    """Refuses settings that no stage can use, and models whose sizes differ from the config's.

    Raises:
      ValueError: a setting is filled in by the pipeline and was set in vain, a loss or a reward
        cannot be resolved, numbers do not fit together, or a model has not the sizes of
        `config.shapes`.
    """
    inputs.check_settings(config)
    in_vain = pipeline.set_in_vain(json.loads(config_lib.to_json(config), parse_constant=str))
    if in_vain:
        raise ValueError("; ".join(in_vain))
    config_lib.resolve(config.reward_model.loss, available=RANKING_ARGUMENTS)
    try:
        settings.validate(config.ppo)
    except ValueError as error:
        # Validation names a key within its group, so the group is put before it.
        raise ValueError(f"ppo.{error}") from None
    for name in (config.ppo.gold, config.ppo.text_reward, config.evaluate.gold):
        settings.judge(name)
    inputs.check_model("base", config.base)
    networks.check_shape("base", config.base, config.shapes.policy)
    own = config.reward_model.model
    if own:
        networks.check_shape("reward_model.model", own, config.shapes.reward_model)
    # The models of PPO do not exist yet; the base model has the same context length.
    later = config_lib.unlocked_copy(config.ppo)
    later.update(model=config.base, reward_model=own)
    settings.check_contexts(later)
