r"""Samples K responses to each prompt from one or several models; simulated labelers rank them.

Run:

    python experiments/sample.py --config=configs/sample/storyland.py --workdir=runs/samples \
        --config.prompts=runs/data/prompts_ranking.jsonl --config.models="('runs/sft/epoch-1',)"

Writes ``samples.jsonl`` (prompt, responses, policies, temperatures). With ``config.labelers > 0``
it also writes ``rankings.jsonl``; the prompts must then be storyland's, because the simulated
labelers know the true quality of a response only there.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.data import schema
from rlhf_jax.data.storyland import labelers, task_of
from rlhf_jax.run import checks, cli, contexts, datasets, devices, inputs, networks
from rlhf_jax.run import responses as responses_lib
from rlhf_jax.run.metrics import StageLog
from rlhf_jax.sampling.generate import Sampling


@dataclasses.dataclass(frozen=True)
class Responses:
    """K responses to a prompt and how each was sampled; one line of ``samples.jsonl``."""

    id: str | None
    prompt: schema.Conversation
    responses: tuple[str, ...]
    policies: tuple[str, ...]
    temperatures: tuple[float, ...]


def run(config: ConfigDict, workdir: str) -> dict:
    """Samples, ranks and writes; returns the numbers of prompts and responses."""
    check(config)
    mesh = devices.start(config.mesh)
    prompts = datasets.read_prompts(
        config.prompts, tokenizer=networks.tokenizer_of("".join(config.models[:1]))
    )
    for name in config.models:
        check_context(name, prompts, config)
    ks = [draw_k(config.seed, place, config.min_k, config.max_k) for place in range(len(prompts))]
    # Response k of a prompt comes from model k mod n, so that every prompt compares the models.
    drawn: list[dict[int, str]] = [{} for _ in prompts]
    share = [
        [len(range(which, k, len(config.models))) for k in ks]
        for which in range(len(config.models))
    ]
    with StageLog(workdir, "sample", total=sum(ks), show=(), unit="responses", waited=True) as log:
        for which, name in enumerate(config.models):
            network = networks.load_network(name, mesh, config.decoder)
            asked = [p.prompt for p in prompts]
            ids = datasets.encode_prompts(
                network.tokenizer, asked, length=config.prompt_length, where=config.prompts
            )
            # The log counts the responses of all models, so those of earlier models come first.
            before = sum(sum(counts) for counts in share[:which])
            responses, _ = responses_lib.sample_responses(
                network,
                responses_lib.EncodedPrompts(ids, config.prompt_length, asked),
                mesh,
                Sampling(config.max_new_tokens, config.temperature),
                counts=share[which],
                # A seed for each pair of seed and model, so that no two models draw with the same
                # one.
                seed=config.seed * len(config.models) + which,
                batch_size=config.batch_size,
                progress=lambda done, _, before=before: log(
                    before + done, {"responses": before + done}
                ),
            )
            remaining = iter(responses)
            for place, count in enumerate(share[which]):
                drawn[place] |= {
                    which + n * len(config.models): next(remaining) for n in range(count)
                }
    # Put the responses of all models back in the order of k.
    records = [
        Responses(
            prompt.id, prompt.prompt, tuple(drawn[p][k] for k in range(ks[p])),
            tuple(Path(config.models[k % len(config.models)]).name for k in range(ks[p])),
            (float(config.temperature),) * ks[p],
        )
        for p, prompt in enumerate(prompts)
    ]  # fmt: skip
    schema.write_jsonl(Path(workdir) / "samples.jsonl", records)
    if config.labelers:
        rankings = rank(
            records, group=config.labeler_group, count=config.labelers,
            labels_each=config.labels_each,
        )  # fmt: skip
        schema.write_jsonl(Path(workdir) / "rankings.jsonl", rankings)
    return {"prompts": len(prompts), "responses": sum(ks)}


def check_context(name: str, prompts: Sequence[schema.Prompt], config: ConfigDict) -> None:
    """Refuses prompts that leave a model no room for a response, before any model is loaded.

    Raises:
      ValueError: a prompt is longer than `prompt_length`, or with `max_new_tokens` longer than the
        model's context.
    """
    known = contexts.before_loading(networks.model_folder(name))
    if known is None:
        return
    context, tokenizer = known
    asked = [p.prompt for p in prompts]
    ids = datasets.encode_prompts(
        tokenizer, asked, length=config.prompt_length, where=config.prompts
    )
    contexts.check(
        context, [len(each) for each in ids], contexts.prompt_of(config.prompts, asked),
        new=config.max_new_tokens,
    )  # fmt: skip


def check(config: ConfigDict) -> None:
    """Refuses what cannot be sampled or ranked, before anything is loaded or written."""
    inputs.check_settings(config)
    draw_k(config.seed, 0, config.min_k, config.max_k)
    models = config.models
    checks.require(
        isinstance(models, tuple) and len(models) > 0, "models", models,
        "pass folders, --config.models=\"('FOLDER',)\"",
    )  # fmt: skip
    for place, name in enumerate(models):
        try:
            inputs.check_model(f"models[{place}]", name)
        except ValueError as error:
            raise ValueError(
                f"{error}; the models are given as --config.models=\"('FOLDER',)\""
            ) from None
    inputs.check_file("prompts", config.prompts)
    prompts = datasets.read_prompts(config.prompts)
    if config.labelers:
        people = f"labelers={config.labelers} (simulated people)"
        inputs.check_known(people, "--config.labelers=0", prompts, config.prompts)


def read_samples(path: Path) -> list[Responses]:
    """Reads the ``samples.jsonl`` that `run` wrote."""
    read = lambda row: Responses(
        row.get("id"),
        _prompt(row),
        *(tuple(row[name]) for name in ("responses", "policies", "temperatures")),
    )
    return schema.read_rows(path, read)[0]


def _prompt(row: dict[str, Any]) -> schema.Conversation:
    prompt = row["messages"] if "messages" in row else row["prompt"]
    return (
        prompt
        if isinstance(prompt, str)
        else tuple(schema.Message(**message) for message in prompt)
    )


def draw_k(seed: int, place: int, low: int, high: int) -> int:
    """The number of responses to this prompt, uniform in ``low .. high`` (4 to 9 in the paper)."""
    if not 2 <= low <= high:
        raise ValueError(f"min_k={low} and max_k={high} must satisfy 2 <= min_k <= max_k")
    return random.Random(f"k/{seed}/{place}").randint(low, high)


def rank(
    records: Sequence[Responses], *, group: str, count: int, labels_each: int = 1
) -> list[schema.Ranking]:
    """Each prompt's responses, ranked by the simulated labelers of a group.

    Each prompt is ranked by `labels_each` labelers, one by default, as most are in the paper.

    Args:
      records: sampled responses to storyland prompts.
      group: train or heldout.
      count: labelers in the group.
      labels_each: how many different labelers rank each prompt.
    """
    people = labelers(group, count)
    rankings = []
    for place, record in enumerate(records):
        for extra in range(labels_each):
            # Labelers take turns, and a prompt that is ranked twice gets two different ones.
            person = people[(place + extra) % count]
            ranks = person.rank(task_of(str(record.id)), record.responses, place=record.id)
            rankings.append(
                schema.Ranking(
                    # Labelers rank from 1 as in a file, and records count from 0.
                    record.prompt, record.responses, tuple(r - 1 for r in ranks),
                    id=f"{record.id}/{person.name}", source="storyland", labeler=person.name,
                    labeler_group=group, policies=record.policies, temperatures=record.temperatures,
                )
            )  # fmt: skip
    return rankings


if __name__ == "__main__":
    cli.main(
        run, config="configs/sample/storyland.py", workdir="runs/samples",
        one_process="It reads the model folder that sft.py wrote: run it on one host.", check=check,
    )  # fmt: skip
