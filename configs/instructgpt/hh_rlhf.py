r"""InstructGPT on human preferences (HH-RLHF, OpenAssistant) with SmolLM2-135M-Instruct.

    python experiments/prepare_data.py --model=smollm2
    python experiments/instructgpt.py --config=configs/instructgpt/hh_rlhf.py:cpu \
        --workdir=runs/hh_rlhf_cpu --config.data_dir=DIR

``DIR`` has ``hh_rlhf/``, ``oasst*/`` and ``english_text/`` or ``wikitext2/``; without it they are
downloaded from the Hugging Face hub. ``:cpu`` is for two cores and half an hour, ``:smoke`` for a
minute with storyland's small model; without either the sizes are for one accelerator.

Differences from storyland:

- The rankings are by people: pairs, and OpenAssistant's of up to 9 replies. Nothing is sampled for
  ranking. Held-out rankings come from other conversations, not from other labelers, because these
  data do not record who ranked what.
- The true quality of a response is unknown: there is no gold scorer, and win rates are judged by
  the same reward model that PPO optimizes.
- The prompt is the dialogue as text ("Human: .. Assistant:") in the template of every other run.
  SmolLM2-Instruct was tuned on its own chat template; it is not used, so that base, SFT and PPO
  models get identical prompts.
- The weights come from a file with 4 bits per weight, so the model is slightly worse than the
  original.
- Demonstrations are the responses that people liked best, most of them written by another language
  model.
"""

from ml_collections import ConfigDict

from configs import hh_rlhf
from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:cpu`` and ``:smoke`` are small, ``key=value`` overrides."""
    return apply_arg(hh_rlhf.instructgpt(), arg, cpu=hh_rlhf.cpu, smoke=hh_rlhf.smoke)
