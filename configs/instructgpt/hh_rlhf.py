r"""InstructGPT on people's preferences: HH-RLHF pairs and OpenAssistant rankings of up to 9,
SmolLM2-135M-Instruct.

    python experiments/prepare_data.py --model=smollm2 python experiments/instructgpt.py
    --config=configs/instructgpt/hh_rlhf.py:cpu --workdir=runs/hh_rlhf_cpu \
        --config.data_dir=DIR

``DIR`` holds ``hh_rlhf/``, ``oasst*/`` and ``english_text/`` or ``wikitext2/``; without it they are
downloaded from the Hugging Face hub. ``:cpu`` is for two cores and half an hour, ``:smoke`` for a
minute with the small model of storyland; without either the sizes are for one accelerator.

What is different from storyland:

- The rankings are people's, so nothing is sampled to be ranked, and the held-out rankings are those
  of other conversations, not of other labelers: these data do not say who ranked what.
- Nobody knows the truth: there is no gold scorer, and win rates are the reward model's opinion. It
  is the very one that PPO is trained to please.
- The prompt is the dialogue as text ("Human: .. Assistant:") in the template of every other run.
  SmolLM2-Instruct was tuned on a chat template of its own; it is not used, so that base, SFT and
  PPO are asked in the same way.
- Its weights come from a file of 4 bits a weight, so it is a little worse than the model it is
  named after.
- Demonstrations are the responses people liked best, most of them written by another language
  model.
"""

from ml_collections import ConfigDict

from configs import hh_rlhf
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:cpu`` and ``:smoke`` are small, ``key=value`` overrides."""
    return apply_arg(hh_rlhf.instructgpt(), arg, cpu=hh_rlhf.cpu, smoke=hh_rlhf.smoke)
