"""A model fetched by name, tried with one question."""

from __future__ import annotations

from pathlib import Path

import jax
from ml_collections import ConfigDict

from rlhf_jax.data.text import encode_opening, prompt_batch, stop_ids
from rlhf_jax.run import devices, networks
from rlhf_jax.run.files import write_json
from rlhf_jax.sampling.generate import Sampling, generate


def pretrained(config: ConfigDict, folder: Path) -> dict:
    """Fetches and converts a model, and tests it with one question.

    A wrong rotary base or a missed permutation of the weights shows in the answer.

    Raises:
      ValueError: the model is unknown, cannot be fetched, or its greedy answer does not contain
        `config.answer`.
    """
    path = networks.model_folder(config.model)
    # One block per iteration of the layer scan compiles fastest; few tokens are generated.
    network = networks.load_network(config.model, devices.start((1, -1, 1)), {"unroll": 1})
    ids = encode_opening(network.tokenizer, config.question)
    prompt = prompt_batch([ids], length=len(ids))
    said = generate(
        network.model,
        network.params,
        prompt,
        jax.random.key(0),
        Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=0.0,
            stop_ids=stop_ids(network.tokenizer, [config.question]),
        ),
    )
    answer = network.tokenizer.decode(said.tokens[0, len(ids) : int(said.lengths[0])])
    if config.answer not in answer:
        raise ValueError(
            f"{path} continues {config.question!r} with {answer!r}: delete the folder and run again"
        )
    result = {
        "model": config.model, "folder": str(path), "question": config.question, "answer": answer,
    }  # fmt: skip
    write_json(folder / "model.json", result)
    print(f"{config.model} is in {path}\n{config.question}{answer}", flush=True)
    return result
