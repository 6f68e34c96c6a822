"""What the stages share: devices, models on disk, text to ids, sampling in batches, and one training loop."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import hashlib
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that there is no PyTorch, which is as wanted

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from experiments import contexts, guards, pretrained
from rlhf_jax import checkpoint, optim, processes, scoring, sharding
from rlhf_jax import config as config_lib
from rlhf_jax.data import chat, parsed, schema, templated, text
from rlhf_jax.data.loader import Batches
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.metrics import StageLog
from rlhf_jax.models.heads import language_model, scalar_model
from rlhf_jax.models.hf import config_from_hf, load_hf, save_hf
from rlhf_jax.models.lora import init_lora, lora_model, merge_lora, with_lora
from rlhf_jax.models.vocabulary import with_texts_only
from rlhf_jax.run import cache, files
from rlhf_jax.run import records as run_records
from rlhf_jax.run.console import Progress
from rlhf_jax.sampling.refill import generate_many
from rlhf_jax.types import LMBatch, Model, Params, PromptBatch, Samples, StepFn

SHIPPED = "storyland:"
"""Prefix of a model that comes with the package: ``storyland:base_large``."""


TRAIN = ("all", "lora", "head")
"""What `trained` knows."""

OPTIMIZERS = ("adam", "tf_adam", "adam_bf16", "adafactor")
"""What `optimizer` knows."""

SCHEDULES = ("cosine", "linear", "constant")
"""What `schedule` knows."""


class Network(NamedTuple):
    """A model with its parameters and tokenizer, as it lies on disk."""

    model: Model
    params: Params
    tokenizer: Any


def start(mesh_shape: Sequence[int]) -> jax.sharding.Mesh:
    """The device mesh of a stage, ``(-1, 1, 1)`` for data parallel over all devices.

    Compiled programs are kept in a cache folder of the user, so that a second run starts at once; where none can be
    written they are compiled each time.

    Raises:
      ValueError: the mesh does not fit the devices, or there are none of the platform that JAX is told to use.
    """
    if not gc.get_freeze_count():
        # Tracing makes so many objects that Python looks for garbage again and again, among all that was imported too.
        gc.collect()
        gc.freeze()
    if not has_accelerator():
        keep_freed_memory()
        compile_lightly()
    compiled = cache.folder("compiled")
    if jax.config.values["jax_compilation_cache_dir"] is None and compiled is not None:
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    Compiling.listen()
    parsed.begin()
    try:
        return sharding.make_mesh(tuple(mesh_shape))
    except RuntimeError as error:
        if "nable to initialize backend" not in str(error):
            raise
        platforms = jax.config.values["jax_platforms"]
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"JAX_PLATFORMS={platforms}: {reason}; unset it to use what this machine has") from error


def agree_on_inputs(*paths: str) -> None:
    """Stops all processes unless each reads the same files: data and models, by what is in them.

    Args:
      *paths: files, and models as `model_folder` takes them; empty ones are left out.

    Raises:
      ValueError: they differ; the message names path, processes and hosts.
    """
    for path in paths:
        files.local_path("the input", path)
    if processes.count() > 1:
        processes.agree("inputs", {f"what is in {path}": contents_digest(model_folder(path)) for path in paths if path})


def contents_digest(path: Path) -> str:
    """sha256 of the files in a folder, or of one; of larger weights the size and 64 pieces."""
    digest, piece = hashlib.sha256(), 2**20
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not path.exists():
        return "no such file"
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        whole = size <= 64 * piece or file.suffix not in (".safetensors", ".gguf", ".bin")
        places = range(0, size, piece) if whole else np.linspace(0, size - piece, 64).astype(int)
        with file.open("rb") as f:
            for place in places:
                f.seek(int(place))
                digest.update(f.read(piece))
    return digest.hexdigest()[:16]


def batches(rows: Any, mesh: jax.sharding.Mesh, *, batch_size: int, seed: int) -> Batches[Any]:
    """The stream of batches of `rows`, of each batch this process's share."""
    index, count = sharding.batch_share(mesh)
    return Batches(rows, batch_size=batch_size, seed=seed, process_index=index, process_count=count)


def held_out_batches(
    rows: LMBatch, mesh: jax.sharding.Mesh, *, batch_size: int, seed: int, most: int | None = None
) -> list[LMBatch]:
    """Rows of text to measure a loss on, placed, each of them once: what fills up the last batch is no target.

    Args:
      rows: all of them.
      mesh: where batches go.
      batch_size: rows of a batch.
      seed: of their order, which matters where only some batches are taken.
      most: at most so many batches; None takes all.
    """
    found = batches(rows, mesh, batch_size=batch_size, seed=seed).each_once(most)
    return [
        sharding.place_batch(dataclasses.replace(batch, mask=batch.mask & counts[:, None]), mesh)
        for batch, counts in found
    ]


def has_accelerator() -> bool:
    """Whether JAX may find a GPU or TPU: its plugin is installed and not ruled out. Devices are not touched."""
    installed = bool(metadata.entry_points(group="jax_plugins")) or util.find_spec("libtpu") is not None
    return installed and jax.config.values["jax_platforms"] != "cpu"


LARGE = 20_000_000
"""Parameters from which memory is scarcer than the time to fault it in."""


def keep_freed_memory(keep: bool = True) -> None:
    """Has glibc keep what is freed, for the next step; elsewhere it does nothing. Call it before devices are found.

    XLA takes the scratch memory of a CPU step from malloc. By default such large pieces go back to the system after
    each step and are faulted in page by page in the next one: on a virtual machine of two cores an SFT step of a
    million parameters took 1.3 to 1.6 times as long. Not all faults go: what XLA's own threads free beyond 64 MB is
    still handed back. One arena for all threads would keep that too, but compiling then takes a quarter longer.

    With ``keep=False`` large pieces go back at once again, as by default: a model of 135M parameters in PPO held 19 GB
    otherwise. So they do, above 32 MiB, where glibc takes large pages (`make` asks it to): faults are few then, and a
    PPO step of 5M parameters whose scratch memory was kept ran 3% faster and held up to a third more, because a small
    piece may lie in the way of the next step's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    large_pages = "malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
    mallopt(m_mmap_max, 0 if keep and not large_pages else 65_536)
    mallopt(m_trim_threshold, 2**31 - 1 if keep else 2**17)
    if keep and large_pages:
        mallopt(m_mmap_threshold, 2**25)  # the largest that it takes


def release_freed_memory() -> None:
    """Hands back to the system what a stage has freed; elsewhere than under glibc it does nothing.

    `keep_freed_memory` keeps it for the next step, but the next stage has arrays of other sizes, and what is kept adds
    up.
    """
    gc.collect()
    _trim()


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def compile_lightly() -> None:
    """Asks XLA for LLVM's level 1 where nothing was asked for. Call it before devices are found.

    Programs compiled in a fifth less time and ran as fast (measured on PPO's, whose time is in matrix products).
    """
    ask_xla("xla_backend_optimization_level", "1")


def ask_xla(flag: str, value: str) -> None:
    """Sets a flag of XLA's unless it was set already. XLA reads them when devices are found."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}={value}".strip()


def model_folder(name: str) -> Path:
    """The folder of a model: a path, a shipped one (``storyland:base_large``), or one fetched by name (``smollm2``)."""
    if name.startswith(SHIPPED):
        return storyland_assets.assets() / config_lib.require_name("model", name.removeprefix(SHIPPED))
    return pretrained.folder(name) if name in pretrained.MODELS else files.local_path("model", name)


def load_network(
    name: str, mesh: jax.sharding.Mesh, decoder: Mapping[str, Any] | None = None, *, dropout: float = 0.0,
    rules: sharding.Rules = sharding.DECODER_RULES,
) -> Network:  # fmt: skip
    """A language or scalar model, its parameters placed on the mesh, with its tokenizer.

    Args:
      name: a folder, or a shipped model.
      mesh: where the parameters go.
      decoder: how it computes (`config.decoder`): fields of `DecoderConfig` such as dtype and remat.
      dropout: residual dropout, for training.
      rules: how the parameters lie on the mesh.

    Raises:
      ValueError: the folder is missing, damaged, or its tokenizer does not fit.
    """
    folder = model_folder(name)
    try:
        # Each array is read straight to where it belongs; nothing is placed again.
        shardings = functools.partial(sharding.tree_shardings, mesh=mesh, rules=rules)
        parsed.loading(folder)
        model, params, tokenizer = load_hf(folder, shardings=shardings)
    except FileNotFoundError as error:
        raise ValueError(f"model {name!r} cannot be read: {error}; pass the folder of a model") from None
    if tokenizer is None:
        raise ValueError(f"{folder} holds no tokenizer.json: copy the tokenizer of the model there")
    if size(params) > LARGE:
        keep_freed_memory(False)
    changes = {**(decoder or {}), "dropout": dropout, "mesh": mesh if mesh.size > 1 else None}
    model = type_of(model)(dataclasses.replace(model.config, **changes))
    return Network(model, params, tokenizer)


class Trained(NamedTuple):
    """Which parameters a stage trains. The others are frozen: shared with whoever else holds them, never copied."""

    params: Params
    """What the optimizer sees, at step 0: all parameters, or LoRA adapters and a score head."""
    frozen: Params
    """The rest; empty where everything is trained."""
    alpha: float

    def model(self, model: Model, frozen: Params) -> Model:
        """`model` as a function of `params`, for `compile_frozen_step`."""
        return lora_model(model, frozen, alpha=self.alpha)

    def full(self, params: Params) -> Params:
        """Parameters of the model that share the frozen arrays, for `Model.apply`."""
        return with_lora(self.frozen, params, alpha=self.alpha)

    def merged(self, params: Params) -> Params:
        """Plain parameters without adapters, for sampling and for saving."""
        return merge_lora(self.frozen, params, alpha=self.alpha)


def trained(params: Params, config: ConfigDict) -> Trained:
    """What `config.train` asks for: ``all`` parameters, ``lora`` adapters (`config.lora`), or the score ``head`` alone.

    With ``lora`` a score head is trained whole, beside the adapters of the trunk. A head alone starts at 0: its problem
    is convex, and what a random head says is noise that a few thousand pairs would have to unlearn first.

    Raises:
      ValueError: another word, ``head`` for a language model, or adapters that do not fit the model.
    """
    config_lib.require_one_of("train", config.train, TRAIN)
    rank, alpha, targets, layers = (config.lora[name] for name in ("rank", "alpha", "targets", "layers"))
    if config.train == "all":
        return Trained(params, {}, alpha)
    frozen = {name: part for name, part in params.items() if name != "score"}
    own = {name: part for name, part in params.items() if name == "score"}
    if config.train == "lora":
        own |= init_lora(frozen, jax.random.key(config.seed), rank=rank, targets=targets, layers=layers)
    else:
        own = jax.tree.map(jnp.zeros_like, own)
    config_lib.require(bool(own), "train", config.train, "needs a reward model; for a language model use lora or all")
    return Trained(own, frozen, alpha)


def check_shape(field: str, name: str, shape: Mapping[str, Any]) -> None:
    """Refuses a model on disk whose decoder is not the one a preset speaks of; an empty `shape` takes any.

    Raises:
      ValueError: a size differs, or there is no such model.
    """
    if not name:
        raise ValueError(f"{field} is empty: pass the folder of a pretrained model with --config.{field}=FOLDER")
    found = config_from_hf(read_json(model_folder(name) / "config.json"))
    for key, wanted in shape.items():
        if getattr(found, key) != wanted:
            raise ValueError(
                f"{field}={name} has {key}={getattr(found, key)} and this config is for {key}={wanted}: "
                "choose another model, or set the size under --config.shapes"
            )


def type_of(model: Model) -> Callable[..., Model]:
    """The function that builds this kind of model from a `DecoderConfig`."""
    return scalar_model if "score" in jax.eval_shape(model.init, jax.random.key(0)) else language_model


def optimizer(
    config: ConfigDict, learning_rate: optim.LearningRate, *, clip_norm: float | None = None
) -> optax.GradientTransformation:
    """The optimizer that `config` asks for: ``optimizer`` and, for the forms of Adam, ``b1, b2, adam_eps``.

    ``adam``, ``tf_adam`` (the form of 2019), ``adam_bf16`` (first moment in bfloat16) or ``adafactor``, which has a
    factored second moment and no first one, and does not read those three.
    """
    adams = {
        "adam": optim.adam,
        "tf_adam": optim.tf_adam,
        "adam_bf16": functools.partial(optim.adam, first_moment_dtype="bfloat16"),
    }
    config_lib.require_one_of("optimizer", config.optimizer, OPTIMIZERS)
    if config.optimizer == "adafactor":
        return optim.adafactor(learning_rate, clip_norm=clip_norm)
    make = adams[config.optimizer]
    return make(learning_rate, b1=config.b1, b2=config.b2, eps=config.adam_eps, clip_norm=clip_norm)


def schedule(name: str, peak: float, steps: int, *, warmup: int = 0) -> optax.Schedule:
    """The learning rate over `steps` optimizer steps.

    ``cosine`` falls to 10%, ``linear`` to 0, ``constant`` stays at `peak`; the first `warmup` steps lead up to it.

    Raises:
      ValueError: an unknown name, or a warmup that leaves no steps.
    """
    config_lib.require_one_of("schedule", name, SCHEDULES)
    if name == "constant":
        return optim.warmup_then_constant(peak, warmup)
    config_lib.require(warmup < steps, "warmup", warmup, f"of {steps} steps leaves none for schedule={name}: lower it")
    after = optim.cosine_to if name == "cosine" else optim.linear_to_zero
    return optim.with_warmup(after(peak, steps - warmup), warmup)


def size(params: Params) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def lower(step: StepFn, *arguments: Any) -> jax.stages.Lowered:
    """The program of a step from `compile_step` or `compile_frozen_step` for such arguments, not yet compiled."""
    frozen = step.args if isinstance(step, functools.partial) else ()
    function: Any = step.func if isinstance(step, functools.partial) else step
    return function.lower(*frozen, *arguments)


def train_resumable(
    step_fn: StepFn,
    state: Any,
    batches: Batches,
    mesh: jax.sharding.Mesh,
    *,
    workdir: str | os.PathLike[str],
    stage: str,
    steps: int,
    save_every: int,
    seed: int,
    show: Sequence[str],
    dropout: bool = False,
    keep: int = 2,
    max_skipped: int = 5,
    origin: Mapping[str, Any] | None = None,
    records: guards.Records | None = None,
    on_save: Callable[[int, Any, StageLog], None] = lambda step, state, log: None,
) -> Any:
    """Runs a supervised stage to its end, going on from its newest checkpoint; Ctrl-C saves first.

    What `on_save` writes is there before the checkpoint that says it was written: a kill in between repeats it.

    Args:
      step_fn: a compiled step.
      state: the state at step 0, placed.
      batches: a function of the step.
      mesh: where batches go.
      workdir: folder of the stage: ``checkpoints/`` and ``metrics.jsonl``.
      stage: name in the log.
      steps: how many.
      save_every: steps between checkpoints (an epoch, say).
      seed: of dropout.
      show: metrics for the console.
      dropout: hand the step a key.
      keep: newest checkpoints that stay.
      max_skipped: steps in a row that may be skipped by the guard of the step.
      origin: `guards.origin` of the stage, stored in each checkpoint and compared on resume.
      records: which records lie in which row of `batches`, to name those of a skipped step.
      on_save: called with (steps done, state, log) at each multiple of `save_every` and at the end; after a kill it may
        be called again for the same step.

    Returns:
      The state after `steps`.

    Raises:
      FloatingPointError: `max_skipped` steps in a row were skipped, or all of them; their records are named.
    """
    records, origin = records or guards.Records("the data", []), dict(origin or {})
    with (
        checkpoint.Checkpoints(Path(workdir) / "checkpoints", keep=keep) as saved,
        checkpoint.stop_requests() as stop,
    ):
        done, kept = saved.newest_good() or 0, {}
        if done:
            state, kept = saved.restore(done, state)
            changes = guards.check_origin(kept, origin)
            origin |= guards.changed_config(kept, changes, step=done, steps=steps)
        skips = guards.Skips(
            workdir, stage, records.path, limit=max_skipped, resume_step=done, counts=kept.get("skips")
        )
        with StageLog(workdir, stage, total=steps, resume_step=done, show=show) as log:
            for step in range(done, steps):
                batch = sharding.place_batch(batches.at(step), mesh)
                key = jax.random.fold_in(jax.random.key(seed), step) if dropout else None
                state, metrics = step_fn(state, batch, key)
                log(step + 1, metrics)
                skips.watch(step + 1, metrics, functools.partial(_rows_of_step, batches, records, step))
                at_end, stopping = (step + 1) % save_every == 0 or step + 1 == steps, stop(step + 1)
                if at_end or stopping:
                    skips.flush(last=step + 1 == steps)
                    if at_end:  # before the checkpoint: once that stands, this is never done again
                        checkpoint.refuse_non_finite(state, f"the state of step {step + 1}")
                        on_save(step + 1, state, log)
                    log.flush()
                    saved.save(step + 1, state, extra=origin | {"position": step + 1, "skips": skips.counts})
                if stopping:
                    saved.wait()
                    raise KeyboardInterrupt(f"{stage} at step {step + 1} of {steps}")
    return state


def _rows_of_step(batches: Batches, records: guards.Records, step: int) -> tuple[list[int], list]:
    rows = batches.indices(step).tolist()
    return rows, records.of(rows)


def save_network(folder: str | os.PathLike[str], network: Network) -> None:
    """Writes a model folder all or nothing: a crash leaves the old one, here or as ``<folder>.old``, or none.

    All processes call it, process 0 writes. The folder survives a power cut when this returns.

    Raises:
      OSError: it could not be written; what was there before still is.
    """
    folder = files.local_path("the folder of the model", folder)
    temporary = folder.with_name(folder.name + ".tmp")
    first = processes.index() == 0
    if first:
        files.settle_folder(folder)
    try:
        save_hf(temporary, network.model, network.params, network.tokenizer)
        if first:
            files.put_folder(temporary, folder)
    except OSError as error:
        if first:
            files.settle_folder(folder)
        raise OSError(
            f"the model could not be written to {folder} ({error}); what was saved before is intact. Free disk space, "
            "or choose a workdir that can be written, and give the same command again."
        ) from error
    processes.barrier("model saved")


# ------------------------------------------------------------------------------------------------------- results


def write_result(path: str | os.PathLike[str], make: Callable[[], Any]) -> Any:
    """Process 0 makes the result of a stage, which may read its log, and writes it; all processes get it."""

    def made() -> Any:
        result = make()
        # Paths in the folder are written as names in it, so that it can be moved and copied.
        files.write_json(path, run_records.relative(result, Path(path).parent)[0])
        return result

    return processes.on_first("result", made)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads what `checkpoint.write_json` wrote.

    Raises:
      ValueError: the file is missing or damaged.
    """
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run the stage that makes it first") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run the stage that makes it again") from None


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compiling:
    """Seconds that XLA has compiled in this process, cache look-ups included.

    What the compiler took and freed, up to 300 MB for a step, goes back to the system after each longer compilation:
    the first step's arrays would come on top of it.
    """

    seconds = 0.0
    _together = False

    @classmethod
    def listen(cls) -> None:
        """Starts to count; calling it again changes nothing."""
        if not getattr(cls, "_listening", False):
            jax.monitoring.register_event_duration_secs_listener(cls._add)
            cls._listening = True

    @classmethod
    def _add(cls, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in (_COMPILED, "/jax/core/compile/jaxpr_to_mlir_module_duration") and not cls._together:
            cls.seconds += duration_secs
        if event == _COMPILED and duration_secs > 0.5:
            _trim()

    @classmethod
    @contextlib.contextmanager
    def together(cls) -> Iterator[None]:
        """Counts the time of the block, and not that of programs which overlap in it."""
        begun, cls._together = time.monotonic(), True
        try:
            yield
        finally:
            cls.seconds, cls._together = cls.seconds + time.monotonic() - begun, False


def compile_together(programs: Iterator[jax.stages.Lowered]) -> None:
    """Compiles programs side by side, while the next ones are traced; their functions then find them compiled.

    The three of PPO take half the time of one after the other on a GPU. Not on a CPU, whose cores a compiler keeps busy
    as it is: nothing is done there; nor with several processes, which might not compile in the same order.

    Args:
      programs: from ``jit(..).lower(..)``, each made when it is asked for, the longest first. What fails is left out:
        it fails again where its function is called, and is told there.
    """
    if not has_accelerator() or processes.count() > 1:
        return
    with Compiling.together(), ThreadPoolExecutor(4) as pool, contextlib.suppress(Exception):
        for program in programs:
            pool.submit(program.compile)


# ----------------------------------------------------------------------------------------------------- text to ids


def read_records(
    path: str | os.PathLike[str], kind: type[schema.Record], tokenizer: Any = None, **reading: Any
) -> list[schema.Record]:
    """`schema.read_jsonl`, and a line on the screen where a chat template wrote texts of the file before.

    Args:
      path: the file.
      kind: of its records.
      tokenizer: whose special tokens are looked for too; None looks for those of well-known models alone.
      **reading: further arguments of `schema.read_jsonl`.
    """
    records, report = schema.read_jsonl(path, kind, special_tokens=templated.pattern(tokenizer), **reading)
    note = report and templated.note(records, report, tokenizer)
    if note and processes.index() == 0:
        print(note, flush=True)
    return records


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model that is loaded later; None where it cannot be had, which loading the model then says."""
    with contextlib.suppress(ValueError, OSError):
        return text.load_tokenizer(model_folder(name))
    return None


def read_prompts(
    path: str | os.PathLike[str], limit: int | None = None, *, tokenizer: Any = None
) -> list[schema.Prompt]:
    """The prompts of a JSONL file, at most `limit` of them.

    Raises:
      ValueError: the file holds fewer than one.
    """
    prompts = read_records(path, schema.Prompt, tokenizer)
    if not prompts:
        raise ValueError(f"{path} holds no prompts: check how it was made")
    return prompts if limit is None else prompts[:limit]


def encode_prompts(
    tokenizer: Any, prompts: Sequence[schema.Conversation], *, length: int, where: str
) -> list[list[int]]:
    """Ids of each prompt.

    Raises:
      ValueError: a prompt is longer than `length` tokens.
    """
    ids = [text.encode_prompt(tokenizer, prompt) for prompt in prompts]
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > length:
        raise ValueError(
            f"{where}: a prompt has {len(ids[longest])} tokens and prompt_length is {length} "
            f"({chat.readable(prompts[longest])[:60]!r}...): raise prompt_length or leave the prompt out"
        )
    return ids


def lm_rows(
    tokenizer: Any, path: str | os.PathLike[str], *, length: int, context: contexts.Context | None = None,
    key: str = "row_length",
) -> LMBatch:  # fmt: skip
    """Packed rows of a JSONL file of plain text.

    Args:
      tokenizer: of the model that reads them.
      path: the file.
      length: slots of a row; a longer document is split.
      context: of that model; None asks for nothing.
      key: of the config, where `length` comes from.

    Raises:
      ValueError: a piece of a document needs more positions than the model has.
    """
    documents = read_records(path, schema.PlainText, tokenizer)
    ids = [text.encode_document(tokenizer, d.text, eos_id=tokenizer.eos_token_id) for d in documents]
    rows = text.lm_rows(ids, length=length)
    if context is not None:
        contexts.check_rows(context, rows, f"{path}: a piece of a document in rows of {key}={length}")
    return rows


# -------------------------------------------------------------------------------------------------------- sampling


def sample_responses(
    network: Network,
    prompts: Sequence[Sequence[int]],
    mesh: jax.sharding.Mesh,
    *,
    asked: Sequence[schema.Conversation] = (),
    counts: int | Sequence[int] = 1,
    prompt_length: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    stop_ids: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[str], Samples]:
    """Responses to each prompt, as text and as arrays; the responses to a prompt follow each other.

    Args:
      network: a language model.
      prompts: token ids.
      mesh: where to sample.
      asked: what the ids stand for, prompt by prompt: after messages a response ends as the chat template ends a turn.
        Without it EOS ends every response.
      counts: responses to each prompt, one number for all or one each.
      prompt_length: slots of the prompts; fewer where the model's context leaves no more beside `max_new_tokens`.
      max_new_tokens: longest response, EOS included.
      temperature: of sampling; 0 is greedy.
      seed: with each prompt's place and the number of the response the only source of randomness.
      batch_size: rows sampled together.
      stop_ids: tokens that end a response besides those of `asked`.
      progress: called with (responses done, responses).

    Raises:
      ValueError: a prompt with `max_new_tokens` after it is longer than the model's context.
    """
    context = contexts.of_network(network)
    name = contexts.prompt_of("prompts", asked) if asked else lambda i: f"prompt {i + 1}"
    contexts.check(context, [len(ids) for ids in prompts], name, new=max_new_tokens)
    if context.length is not None:  # callers round up, and slots of padding need no positions
        prompt_length = min(prompt_length, context.length - max_new_tokens)
    data = mesh.shape["data"] * mesh.shape["fsdp"]
    ends = text.stop_ids(network.tokenizer, asked)
    samples = generate_many(
        with_texts_only(network.model, network.tokenizer), network.params,
        text.prompt_batch(prompts, length=prompt_length), jax.random.key(seed),
        counts=counts, rows=-(-batch_size // data) * data, streams=sampling_streams(mesh),
        max_new_tokens=max_new_tokens, temperature=temperature, stop_ids=(*ends, *stop_ids),
        sharding=sharding.batch_sharding(mesh), progress=progress,
    )  # fmt: skip
    each = [p for p, k in zip(asked, np.broadcast_to(counts, len(asked)), strict=True) for _ in range(k)]
    return response_texts(network.tokenizer, samples, each), samples


def sampling_streams(mesh: jax.sharding.Mesh) -> int:
    """Two on a CPU of two cores or more, which one stream does not keep busy; one on accelerators."""
    alone = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 if alone and cores > 1 else 1


def response_texts(tokenizer: Any, samples: Samples, asked: Sequence[schema.Conversation] = ()) -> list[str]:
    """The responses as text, for people and judges; the token ids go on to an update as they are.

    Args:
      tokenizer: of the model that spoke.
      samples: N responses.
      asked: the N prompts they answer; without it they end at EOS.
    """
    fetched = processes.gather(samples)
    rows = [
        row[start:end].tolist()
        for row, start, end in zip(fetched.tokens, fetched.prompt_lengths, fetched.lengths, strict=True)
    ]
    ends = text.stop_ids(tokenizer, asked)
    prompts = asked or [""] * len(rows)
    return [text.decode_answer(tokenizer, p, ids, stop_ids=ends) for p, ids in zip(prompts, rows, strict=True)]


def score_responses(
    network: Network,
    prompts: Sequence[schema.Conversation],
    responses: Sequence[str],
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
) -> np.ndarray:
    """Raw reward-model score of each response to its prompt, one number each.

    Raises:
      ValueError: a prompt with its response is longer than the model's context; nothing is computed then.
    """
    return score_rows(network, scoring_rows(network, prompts, responses), mesh, batch_size=batch_size)


def scoring_rows(network: Network, prompts: Sequence[schema.Conversation], responses: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt with its whole response, as the reward model was trained on them.

    Raises:
      ValueError: one is longer than the model's context.
    """
    rows = [
        [*text.encode_prompt(network.tokenizer, p), *text.encode_answer(network.tokenizer, p, r)]
        for p, r in zip(prompts, responses, strict=True)
    ]

    def name(i: int) -> str:
        return f"scoring: the response {responses[i][:40]!r}.. with its prompt {chat.readable(prompts[i])[:40]!r}.."

    contexts.check(contexts.of_network(network), [len(row) for row in rows], name)
    return rows


def fitting_scoring_rows(
    network: Network, prompts: Sequence[schema.Conversation], responses: Sequence[str]
) -> tuple[list[list[int]], int]:
    """`scoring_rows` of sampled responses, and how many are scored only as far as they fit.

    Text that is encoded again may take more tokens than were sampled: another tokenizer, or bytes that are no text. The
    ids beyond the context are left out then, as PPO scores a response that `max_new_tokens` ended.

    Raises:
      ValueError: a prompt alone fills the model's context.
    """
    most = contexts.of_network(network).length
    rows, cut = [], 0
    for prompt, response in zip(prompts, responses, strict=True):
        asked = text.encode_prompt(network.tokenizer, prompt)
        said = text.encode_answer(network.tokenizer, prompt, response)
        room = len(said) if most is None else most - len(asked)
        if room < 1:
            raise ValueError(
                f"scoring: the prompt {chat.readable(prompt)[:60]!r}.. has {len(asked)} tokens and "
                f"{contexts.of_network(network)}, which leaves nothing for a response: {contexts.ADVICE}"
            )
        cut += len(said) > room
        rows.append([*asked, *said[:room]])
    return rows, cut


def score_rows(
    network: Network, rows: Sequence[Sequence[int]], mesh: jax.sharding.Mesh, *, batch_size: int
) -> np.ndarray:
    """Raw reward-model score of each row of ids, read at its last one."""
    scores, most = np.zeros(len(rows)), contexts.of_network(network).length
    parts = [*by_length([len(row) for row in rows], batch_size, most=most)]
    # Counted in slots: the rows are sorted, and the last batches of them take longest.
    work = np.cumsum([len(index) * slots for index, slots in parts], dtype=int)
    with Progress("scoring", int(work[-1]) if parts else 0, unit="slots") as progress:
        for (index, slots), done in zip(parts, work, strict=True):
            batch = text.prompt_batch([rows[i] for i in index], length=slots)
            placed = sharding.place_batch(sharding.own_rows(batch, mesh), mesh)
            scores[index] = processes.gather(_scores(network.model, network.params, placed))
            progress(int(done))
    return scores


def by_length(lengths: ArrayLike, batch_size: int, *, most: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
    """Rows in batches of like lengths, so that little padding is computed: their indices and the slots they need.

    The last batch is filled up with the longest row; slots are multiples of 32, few lengths for few compiled programs,
    but never more than `most`: a model has no positions beyond its context, not even for padding.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        index = order[np.minimum(np.arange(start, start + batch_size), len(order) - 1)]
        slots = -(-int(lengths[index[-1]]) // 32) * 32
        yield index, slots if most is None else min(slots, most)


@functools.partial(jax.jit, static_argnames="model")
def _scores(model: Model, params: Params, rows: PromptBatch) -> jax.Array:
    return scoring.sequence_scores(model, params, rows.tokens, rows.lengths)


def config_dict(config: ConfigDict) -> ConfigDict:
    """A copy that may be changed: a pipeline fills in the paths of its stages."""
    return ConfigDict(config.to_dict()).unlock()
