"""Pretraining of the two base models that ship with the package.

``:large`` is a Llama (4 x 128), ``:small`` a GPT-2 (2 x 64); ``:smoke`` only shows that it runs.
The results are in ``rlhf_jax/data/storyland/assets/*/pretrain.json``.
"""

from ml_collections import ConfigDict

from rlhf_jax.run.config import apply_arg


def get_config(arg: str = "large") -> ConfigDict:
    """The config for `arg`: large, small or smoke, then ``key=value``."""
    config = ConfigDict(
        {
            "name": "large",
            "seed": 0,
            "mesh": (-1, 1, 1),
            "documents": 280_000,
            "held_out_documents": 1_500,
            "held_out_batches": 16,
            "row_length": 192,
            "epochs": 1.0,
            "batch_size": 16,
            "learning_rate": 2e-3,
            "weight_decay": 0.05,
            "clip_norm": 1.0,
            "evaluate_every": 500,
            "model": {
                "context_length": 256,
                "layers": 4,
                "width": 128,
                "heads": 4,
                "mlp_width": 344,
                "positions": "rotary",
                "norm": "rmsnorm",
                "activation": "swiglu",
                "bias": "none",
            },
        }
    )
    return apply_arg(config, arg or "large", large=lambda c: None, small=_small, smoke=_smoke)


def _small(config: ConfigDict) -> None:
    config.update(name="small", documents=60_000)
    config.model.update(
        layers=2, width=64, heads=2, mlp_width=256,
        positions="learned", norm="layernorm", activation="gelu_tanh", bias="all",
    )  # fmt: skip


def _smoke(config: ConfigDict) -> None:
    _small(config)
    config.update(
        name="smoke", documents=400, held_out_documents=100, held_out_batches=1, evaluate_every=10
    )
