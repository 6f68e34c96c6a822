"""Prints what search finds against storyland's gold scorer, as the rows of docs/storyland.md.

Run:

    python tools/adversaries.py best_of --model=storyland:base_large
    python tools/adversaries.py samples --model=runs/ppo_gold/ema

``best_of`` draws 256 responses to each of 20 test prompts and prints the one that the gold scorer
rates highest. ``samples`` prints one response to each, from a policy that was trained on the gold
scorer itself (`text_reward` of experiments/ppo.py).
"""

from __future__ import annotations

import argparse

import numpy as np

from rlhf_jax.data.storyland import gold, task
from rlhf_jax.run import datasets, devices, networks, responses
from rlhf_jax.sampling.generate import Sampling

PROMPTS, BEST_OF, SLOTS = 20, 256, 48


def main() -> None:
    """Parses the command line, samples and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("how", choices=("best_of", "samples"))
    parser.add_argument("--model", required=True, help="a model folder, or storyland:base_large")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mesh = devices.start((-1, 1, 1))
    network = networks.load_network(args.model, mesh)
    tasks = [task("test", index) for index in range(PROMPTS)]
    ids = datasets.encode_prompts(
        network.tokenizer, [t.prompt for t in tasks], length=SLOTS, where="test prompts"
    )
    count = BEST_OF if args.how == "best_of" else 1
    texts, _ = responses.sample_responses(
        network,
        responses.EncodedPrompts(ids, SLOTS),
        mesh,
        Sampling(max_new_tokens=SLOTS),
        counts=count,
        seed=args.seed,
        batch_size=256,
    )
    scores = np.array([gold(tasks[i // count], t).score for i, t in enumerate(texts)]).reshape(
        PROMPTS, count
    )
    for i, asked in enumerate(tasks):
        best = int(scores[i].argmax())
        print(f"| {scores[i, best]:.2f} | {asked.prompt} | {texts[i * count + best]!r} |")
    print(f"mean of the shown {scores.max(axis=1).mean():.3f}, mean of all {scores.mean():.3f}")


if __name__ == "__main__":
    main()
