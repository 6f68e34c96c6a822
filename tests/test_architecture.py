"""The rules of the house, read from the syntax trees: who may import whom, sizes, docstrings, nothing machine-made."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
PEERS = ROOT / "tools" / "peers"
"""Scripts that run other libraries in their own environments, to compare speeds; nothing of ours imports them."""
PROGRAMS = [
    path
    for folder in ("experiments", "configs", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if PEERS not in path.parents
]

MAY_IMPORT = {
    "__main__": {"run.programs"},
    "types": set(),
    "backends": {"types"},
    "ops": {"types"},
    "log_probs": {"types", "ops", "backends"},
    "advantages": {"types", "ops"},
    "losses": {"types", "ops", "advantages"},
    "optim": {"types", "backends"},
    "sharding": {"types", "run.processes"},
    "kl_control": {"types"},
    "guard": {"types"},
    "ppo": {"types", "losses"},
    "update": {"types", "ops", "optim", "guard"},
    "steps": {
        "types",
        "ops",
        "losses",
        "ppo",
        "scoring",
        "guard",
        "update",
        "backends",
        "log_probs",
    },
    # `data`: an exported model says what ends its responses, which its tokenizer and chat template know.
    "models": {"backends", "data", "ops", "run.files", "run.processes", "run.untrusted", "types"},
    "sampling": {"types", "ops", "backends", "models"},
    "scoring": {"types", "ops", "log_probs", "models"},
    "rollout": {
        "types",
        "ops",
        "backends",
        "advantages",
        "models",
        "sampling",
        "scoring",
        "kl_control",
    },
    # The frame of HTML pages: the data have a preview as a page, evaluation the report of a run.
    "pages": set(),
    "data": {"pages", "run.files", "run.untrusted", "types"},
    "evaluation": {
        "types",
        "ops",
        "log_probs",
        "sampling",
        "scoring",
        "data",
        "run.files",
        "pages",
    },
    "rewards": {"run.config"},
    "labeling": {"types", "data", "pages"},
    "run.__init__": set(),
    "run.answering": {
        "data",
        "evaluation",
        "rewards",
        "run.asking",
        "run.console",
        "run.contexts",
        "run.networks",
        "run.responses",
        "sampling",
    },
    "run.asking": {"data", "run.datasets", "run.networks"},
    "run.cache": {"run.files"},
    "run.checkpoint": {"backends", "run.files", "run.processes", "run.untrusted", "types"},
    "run.checks": {"run.untrusted"},
    "run.cli": {
        "run.checks",
        "run.config",
        "run.config_file",
        "run.files",
        "run.numerics",
        "run.output",
        "run.processes",
        "run.secrets",
        "run.signals",
        "run.workdir",
    },
    "run.compiling": {"types", "backends", "run.cache", "run.processes"},
    "run.config": {
        "run.checks",
        "run.config_file",
        "run.files",
        "run.programs",
        "run.secrets",
        "run.untrusted",
    },
    "run.config_file": set(),
    "run.console": {"run.processes"},
    "run.contexts": {"data", "models", "run.untrusted"},
    "run.datasets": {"types", "sharding", "data", "run.contexts", "run.processes"},
    "run.data_flags": {"data", "run.checks", "run.look", "run.programs"},
    "run.devices": {
        "backends",
        "sharding",
        "data",
        "run.compiling",
        "run.files",
        "run.networks",
        "run.processes",
    },
    "run.files": set(),
    "run.guards": {
        "data",
        "run.checks",
        "run.cli",
        "run.config",
        "run.files",
        "run.metrics",
        "run.numerics",
        "run.processes",
        "run.workdir",
    },
    "run.inputs": {
        "data",
        "models",
        "run.checks",
        "run.networks",
        "run.optimizers",
        "run.pretrained",
        "run.untrusted",
        "sharding",
    },
    "run.look": {"data", "run.checks", "run.files", "run.networks"},
    "run.loop": {"run.checkpoint", "run.guards", "run.metrics", "run.signals"},
    "run.memory": {"backends", "run.console"},
    "run.metrics": {"types", "run.console", "run.files", "run.processes"},
    "run.networks": {
        "types",
        "backends",
        "data",
        "models",
        "sharding",
        "run.checks",
        "run.files",
        "run.pretrained",
        "run.processes",
        "run.results",
    },
    "run.numerics": {"backends"},
    "run.optimizers": {"optim", "run.checks"},
    "run.output": set(),
    "run.pipeline": set(),
    "run.plans": set(),
    "run.ppo": {
        "data",
        "evaluation",
        "kl_control",
        "models",
        "ppo",
        "rewards",
        "rollout",
        "sampling",
        "scoring",
        "sharding",
        "steps",
        "types",
        "run.checks",
        "run.compiling",
        "run.config",
        "run.contexts",
        "run.datasets",
        "run.guards",
        "run.inputs",
        "run.memory",
        "run.metrics",
        "run.networks",
        "run.optimizers",
        "run.processes",
        "run.responses",
    },
    "run.pretrained": {"models", "run.cache", "run.files"},
    "run.processes": set(),
    "run.programs": set(),
    "run.rankings": {
        "data",
        "evaluation",
        "run.checks",
        "run.contexts",
        "run.datasets",
        "run.inputs",
        "run.networks",
        "run.responses",
        "scoring",
    },
    "run.records": {"run.checkpoint", "run.files", "run.untrusted"},
    "run.responses": {
        "backends",
        "types",
        "data",
        "sampling",
        "models",
        "scoring",
        "sharding",
        "run.console",
        "run.contexts",
        "run.networks",
        "run.processes",
    },
    "run.results": {
        "backends",
        "data",
        "evaluation",
        "run.config",
        "run.files",
        "run.metrics",
        "run.processes",
        "run.records",
        "run.untrusted",
    },
    "run.secrets": set(),
    "run.signals": {"run.processes"},
    "run.stage_checks": {
        "ppo",
        "run.config",
        "run.inputs",
        "run.networks",
        "run.pipeline",
        "run.ppo",
    },
    "run.stages": {"run.config", "run.files", "run.plans", "run.records"},
    "run.trial": {"data", "run.devices", "run.files", "run.networks", "sampling"},
    "run.untrusted": set(),
    "run.workdir": {"run.checkpoint", "run.config", "run.files", "run.processes", "run.untrusted"},
}
"""The first part of a module's name after ``rlhf_jax.`` -> the parts it may import (DESIGN: who may import whom)."""

ONLY_IN = {
    "flax.nnx": "models",
    "jinja2": "pages",
    "orbax": "run.checkpoint",
    "tensorflow_datasets": "data",
    "grain": "data",
    "sqlite3": "labeling",
}
NOWHERE = {"torch", "tensorflow", "chex", "pickle", "clu"}


def part(path: Path) -> str:
    """The part of the package a module is in; in the room `run` each file is a part of its own."""
    return part_of(path.relative_to(PACKAGE).with_suffix("").parts)


def part_of(names: tuple[str, ...]) -> str:
    return ".".join(names[:2]) if names[0] == "run" else names[0]


def imports(path: Path) -> set[str]:
    """Every module a file imports, at any depth; ``from a import b`` counts as ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_method_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked_files() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_who_may_import_whom(path):
    here = part(path)
    if here == "__init__":
        return
    assert here in MAY_IMPORT, f"give {here} a place in the import table"
    for name in imports(path):
        if name.startswith("rlhf_jax.") and name != "rlhf_jax.__version__":
            other = part_of(tuple(name.split(".")[1:]))
            assert other == here or other in MAY_IMPORT[here], (
                f"{name_of(path)} may not import {name}"
            )


@pytest.mark.parametrize("path", MODULES + PROGRAMS, ids=name_of)
def test_each_dependency_has_one_home(path):
    here = part(path) if path in MODULES else ""
    for name in imports(path):
        assert name.split(".")[0] not in NOWHERE, f"{name_of(path)} imports {name}"
        for module, home in ONLY_IN.items():
            if (name + ".").startswith(module + "."):
                assert here == home, f"{name_of(path)} imports {name}; only {home} may"


@pytest.mark.parametrize("path", MODULES + PROGRAMS, ids=name_of)
def test_scripts_of_other_libraries_are_never_imported(path):
    assert not any(name.startswith("tools.peers") for name in imports(path))


@pytest.mark.parametrize("path", [p for p in MODULES if part(p) == "data"], ids=name_of)
def test_data_never_touches_a_device(path):
    bad = {name for name in imports(path) if name.split(".")[0] in ("jax", "flax", "optax")}
    assert not bad, f"{name_of(path)} imports {bad}"


ENCODES = {"encode", "encode_batch", "encode_plus", "apply_chat_template", "tokenize", "__call__"}


@pytest.mark.parametrize("path", MODULES + PROGRAMS, ids=name_of)
def test_one_place_says_how_text_becomes_ids(path):
    """Elsewhere BOS would be forgotten, or come twice, or a user's control token would be one."""
    if name_of(path) in ("rlhf_jax/data/chat.py", "rlhf_jax/data/special_ids.py"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            owner, _, method = called.rpartition(".")
            asked = called if called.endswith("tokenizer") else owner if method in ENCODES else ""
            assert asked.split(".")[-1] != "tokenizer", (
                f"{name_of(path)}:{node.lineno} asks a tokenizer for ids"
            )


def test_the_path_from_samples_to_update_knows_no_tokenizer():
    """PITFALL 34: no text in between, so sampled ids cannot come back as others."""
    for path in MODULES:
        if part(path) in {
            "sampling",
            "rollout",
            "scoring",
            "steps",
            "advantages",
            "losses",
            "ops",
            "log_probs",
        }:
            foreign = {
                n
                for n in imports(path)
                if n.split(".")[0] in ("transformers", "tokenizers") or ".data" in n
            }
            assert not foreign, f"{name_of(path)} imports {foreign}"
            called = {
                n.func.attr for n in ast.walk(ast.parse(path.read_text())) if is_method_call(n)
            }
            assert not {name for name in called if "decode" in name or "encode" in name}, name_of(
                path
            )


def test_only_experiments_and_the_room_that_runs_them_read_a_config():
    readers = {
        part(p) for p in MODULES if any(name.startswith("ml_collections") for name in imports(p))
    }
    outside = {name for name in readers if not name.startswith("run.")}
    assert not outside, f"library functions take plain arguments: {outside}"


def test_a_step_is_jitted_in_one_place():
    """`compile_step` is the only jit of a training step: elsewhere nothing with step in its name is compiled."""
    for path in MODULES:
        if part(path) == "steps":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("jit"):
                assert "step" not in ast.unparse(node), (
                    f"{name_of(path)}:{node.lineno} compiles a step"
                )
        for function in functions(path):
            if any("jit" in ast.unparse(d) for d in function.decorator_list):
                assert "step" not in function.name, (
                    f"{name_of(path)}:{function.lineno} compiles a step"
                )


def test_no_drawer_for_odds_and_ends():
    names = {p.name for p in MODULES}
    assert not names & {
        "utils.py",
        "util.py",
        "base.py",
        "helpers.py",
        "common.py",
        "misc.py",
        "registry.py",
        "trainer.py",
    }


def test_functions_are_short():
    """Sixty lines without docstring and lines that are comments, which are wanted."""
    long = []
    for path in MODULES:
        source = path.read_text().splitlines()
        for function in functions(path):
            docstring = function.body[0] if ast.get_docstring(function) else None
            text = (docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0
            own = source[function.lineno - 1 : function.end_lineno]
            lines = len(own) - text - sum(line.lstrip().startswith("#") for line in own)
            if lines > 60:
                long.append(f"{name_of(path)}:{function.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_files_have_one_subject_and_its_length():
    """A training script is read in one sitting: 300 lines; any other file has 500 at most."""
    limits = {path: 500 for path in MODULES + PROGRAMS}
    limits |= {path: 300 for path in PROGRAMS if path.parent == ROOT / "experiments"}
    long = {
        name_of(path) for path, most in limits.items() if len(path.read_text().splitlines()) > most
    }
    assert not long


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [
        a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    ]
    return len(names) - (names[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("path", MODULES + PROGRAMS, ids=name_of)
def test_functions_take_at_most_eight_arguments(path):
    many = [
        f"{function.name} takes {arguments(function)}"
        for function in functions(path)
        if arguments(function) > 8
    ]
    assert not many, (
        f"{name_of(path)}: {', '.join(many)}: make a dataclass of what belongs together"
    )


ASKS = re.compile(
    r"default_backend|jax\.devices|local_devices|\.platform\b|device_kind|device_count|compute_capability"
)


@pytest.mark.parametrize("path", [p for p in MODULES if "backends" not in p.parts], ids=name_of)
def test_only_backends_ask_what_the_machine_is(path):
    """A mesh is made of devices, and of several processes each says how many it sees: those may count them."""
    allowed = {
        "rlhf_jax/sharding.py": {"jax.devices"},
        "rlhf_jax/run/processes.py": {"jax.local_device_count"},
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ASKS.search(ast.unparse(node)):
            asked = ast.unparse(node)
            fine = any(asked.startswith(name) for name in allowed.get(name_of(path), ()))
            assert fine, f"{name_of(path)}:{node.lineno} asks {asked}; a backend answers that"
    pallas = {name for name in imports(path) if "pallas" in name}
    assert not pallas, f"{name_of(path)} imports {pallas}; kernels are in backends/"


EDITED = [
    *(
        p
        for p in MODULES
        if p.parent.name in ("losses", "sampling") or p.name in ("layers.py", "norms.py")
    ),
    *(
        PACKAGE / f"{name}.py"
        for name in ("advantages", "kl_control", "ppo", "rollout", "steps", "update")
    ),
    *(p for p in PROGRAMS if p.parent == ROOT / "experiments"),
]
"""What researchers read and change."""


@pytest.mark.parametrize("path", EDITED, ids=name_of)
def test_lines_are_not_packed_where_researchers_edit(path):
    """At most eleven nodes of the syntax tree per line of a function's body, on average over a file."""
    nodes, lines = set(), set()
    for function in functions(path):
        for statement in function.body[bool(ast.get_docstring(function)) :]:
            nodes |= {node for node in ast.walk(statement) if not isinstance(node, LEAVES)}
            lines |= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
    density = len(nodes) / max(1, len(lines))
    assert density <= 11, f"{name_of(path)}: {density:.1f} nodes a line"


LEAVES = (ast.expr_context, ast.operator, ast.cmpop, ast.boolop, ast.unaryop)


def test_modules_import_each_other_in_one_direction():
    """No circle, imports inside functions included; the one exception is needed for an error's text alone."""
    names = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in MODULES
    }
    edges = {}
    for name, path in names.items():
        used = {found if found in names else found.rpartition(".")[0] for found in imports(path)}
        edges[name] = (used & set(names)) - {name}
    edges["rlhf_jax.data.schema.jsonl"] -= {
        "rlhf_jax.data.sources.recognise"
    }  # how to convert a foreign file
    done: set[str] = set()
    while ready := {name for name in names if name not in done and edges[name] <= done}:
        done |= ready
    assert not set(names) - done, sorted(set(names) - done)


def test_a_class_has_a_name_of_its_own():
    """One name, one meaning; functions are told apart by their module (`contexts.check`), classes are not."""
    homes: dict[str, list[str]] = {}
    for path in (path for path in MODULES + PROGRAMS if path.parent.name != "experiments"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(name_of(path))
    # TFDS names a dataset by its builder's class.
    assert {name for name, found in homes.items() if len(found) > 1} == {"PlainText"}


def test_every_public_function_and_class_has_a_docstring():
    missing = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        if path.read_text().strip() and not ast.get_docstring(tree):
            missing.append(name_of(path))
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                missing.append(f"{name_of(path)}:{node.name}")
    assert not missing, missing


def test_public_functions_are_annotated():
    bare = []
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare += [
                f"{name_of(path)}:{node.name}({a.arg})" for a in arguments if a.annotation is None
            ]
            bare += [f"{name_of(path)}:{node.name} -> ?"] * (node.returns is None)
    assert not bare, bare


def test_remote_code_is_never_trusted():
    """The word appears as `trust_remote_code=False` and never as a key or an argument somebody could set."""
    for path in MODULES + PROGRAMS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), name_of(path)
                assert node.value.value is False, name_of(path)
            if isinstance(node, ast.arg | ast.Attribute):
                assert "trust_remote_code" not in ast.unparse(node), name_of(path)


# A pattern must not find itself here, hence the brackets.
UNWANTED = {
    "a path of one machine": re.compile(r"(?<![\w./])/(?:[w]ork|[h]ome/\w+|[U]sers/\w+|[r]oot)/"),
    "the address of a package index": re.compile(
        r"(?:index|extra-index|find-links)[-_]?(?:url)?[=\s]+https?:|[p]ypi\.org/simple|files\.[p]ythonhosted|/[s]imple/"
    ),
}


def test_no_tracked_file_names_a_machine_or_an_index():
    found = []
    for path in tracked_files():
        if path.suffix in {".safetensors", ".png", ".gz", ".npz", ".ico", ".woff2"}:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{name_of(path)}: {what}: {m[0]}"
            for what, pattern in UNWANTED.items()
            for m in pattern.finditer(text)
        ]
    assert not found, "\n".join(found)


def test_the_checks_of_this_file_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import torch\nfrom flax import nnx\nfrom orbax.checkpoint import v1\n")
    assert imports(bad) == {"torch", "flax.nnx", "orbax.checkpoint.v1"}
    assert UNWANTED["a path of one machine"].search("see /" + "work/main/x")
    assert UNWANTED["the address of a package index"].search("--index-" + "url https://example.org")
