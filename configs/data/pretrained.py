"""A pretrained model by name: fetched, converted, and tested with one question.

Run:

    python experiments/prepare_data.py --model=smollm2
"""

from ml_collections import ConfigDict

from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "") -> ConfigDict:
    """The config; ``:smoke`` asks for fewer tokens, ``key=value`` overrides."""
    config = ConfigDict(
        {
            "source": "pretrained",
            "model": "smollm2",
            "question": "The capital of France is",
            "answer": "Paris",
            "max_new_tokens": 8,
        }
    )
    return apply_arg(config, arg, smoke=lambda c: c.update(max_new_tokens=2))
