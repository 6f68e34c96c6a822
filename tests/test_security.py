"""Files by somebody who means harm, secrets, and names that would like to be paths."""

from __future__ import annotations

import ast
import gzip
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from rlhf_jax.data import schema, text
from rlhf_jax.data.schema import Message
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.models import DecoderConfig, language_model, load_hf, load_llama2c, save_hf
from rlhf_jax.run import networks, untrusted
from rlhf_jax.run.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
PROGRAMS = [
    p
    for folder in ("rlhf_jax", "experiments", "configs", "tools")
    for p in sorted((ROOT / folder).rglob("*.py"))
]
LLAMA = DecoderConfig(1200, 16, 1, 16, 2, mlp_width=24, tied=False)


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return text.load_tokenizer(storyland_assets.assets())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    built = language_model(LLAMA)
    save_hf(folder, built, built.init(jax.random.key(0)), tokenizer)
    return folder


@pytest.fixture
def model(tmp_path: Path, saved: Path) -> Path:
    """A model folder of a few thousand numbers, with a tokenizer."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


class Marker:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return (Path.touch, (self.place,))


# --------------------------------------------------------------------------------------------- nothing is executed

RUNS_CODE = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "ruamel",
    "jsonpickle", "torch", "h5py", "imp", "runpy", "code",
}  # fmt: skip
"""Modules that load files by running what stands in them."""
CALLS = {"eval", "exec", "compile", "__import__"}


def dangers(tree: ast.AST) -> set[str]:
    """What in a syntax tree might run the content of a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] in RUNS_CODE}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUNS_CODE:
            found.add(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if isinstance(node.func, ast.Name) and name in CALLS:
                found.add(name)
            if name.endswith(("read_pickle", "torch.load", "import_module")) or name in (
                "np.load",
                "numpy.load",
            ):
                found.add(name)
            found |= {
                k.arg
                for k in node.keywords
                if k.arg in ("allow_pickle", "shell") and ast.unparse(k.value) != "False"
            }
            if isinstance(node.func, ast.Attribute) and node.func.attr in (
                "exec_module",
                "extractall",
                "system",
                "popen",
            ):
                found.add(node.func.attr)
    return found


ALLOWED = {
    "rlhf_jax/run/config.py": {"importlib.import_module"},  # the user's own functions
    "rlhf_jax/run/config_file.py": {"exec_module"},  # the user's own config file
    # tensorboardX, wandb: two names in the source.
    "rlhf_jax/run/metrics.py": {"importlib.import_module"},
    # The programs of this package, by names that are files in it.
    "rlhf_jax/run/programs.py": {"importlib.import_module", "runpy"},
}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_program_runs_the_content_of_a_file(path: Path):
    name = path.relative_to(ROOT).as_posix()
    found = dangers(ast.parse(path.read_text()))
    if name.startswith(
        "tools/peers/"
    ):  # other libraries, for speed only; nothing of ours imports them
        found -= {"torch"} | {n for n in found if n.startswith("torch.")}
    assert found <= ALLOWED.get(name, set()), name


def test_the_look_for_code_can_fail():
    for bad in (
        "import pickle", "from yaml import load", "eval(x)", "np.load(f)", "f(allow_pickle=True)", "pd.read_pickle(f)",
        "import torch.nn", "run(c, shell=True)", "tar.extractall(d)", "os.system(c)", "exec(open(f).read())",
    ):  # fmt: skip
        assert dangers(ast.parse(bad)), bad
    assert not dangers(ast.parse("model.eval(); ast.literal_eval(x); re.compile(y); np.load"))


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json",
                                  "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])  # fmt: skip
def test_a_pickle_by_another_name_is_refused_and_never_loaded(
    model: Path, tmp_path: Path, name: str
):
    (model / name).write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    with pytest.raises(ValueError, match=f"(?s)({name}|tokenizer).*(corrupt|cannot be read)"):
        load_hf(model)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_for_a_gguf_or_llama2c_file_is_refused(tmp_path: Path):
    pytest.importorskip("gguf")
    for name, load in (("x.gguf", load_hf), ("x.bin", load_llama2c)):
        (tmp_path / name).write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_pickles_beside_the_weights_are_not_looked_at(model: Path, tmp_path: Path):
    for name in ("pytorch_model.bin", "optimizer.pt", "tokenizer.pkl", "x.npy", "tokenizer.model"):
        (model / name).write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    load_hf(model)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_disguised_as_a_checkpoint_is_put_aside(tmp_path: Path, capsys):
    bomb = pickle.dumps(Marker(tmp_path / "ran"))
    state = {"w": jnp.arange(4.0)}
    with Checkpoints(tmp_path / "run") as saved:
        for step in (1, 2):
            saved.save(step, state)
    (tmp_path / "run" / "3").mkdir()
    (tmp_path / "run" / "3" / "state").write_bytes(bomb)
    (tmp_path / "run" / "4").write_bytes(bomb)
    (tmp_path / "run" / "manifests" / "4.json").write_bytes(bomb)
    largest = max(
        (tmp_path / "run" / "2").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    largest.write_bytes(bomb)
    with Checkpoints(tmp_path / "run") as saved:
        assert saved.newest_good() == 1
        np.testing.assert_array_equal(saved.restore(1, state)[0]["w"], state["w"])
        saved.save(2, state)
    assert Checkpoints(tmp_path / "run").newest_good() == 2
    assert "4 is not used" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------ a hostile model folder


def test_code_in_a_model_folder_is_never_run(model: Path, tmp_path: Path, tokenizer, monkeypatch):
    """auto_map for every class, a module of the library's name, a class nobody knows, options that ask for code."""
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n"
    for name in (
        "evil.py",
        "tokenization_evil.py",
        "modeling_evil.py",
        "__init__.py",
        "sitecustomize.py",
        "tokenizers.py",
    ):
        (model / name).write_text(code)
    auto = {
        key: ["evil.Evil", "evil.Evil"]
        for key in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM")
    }
    change(model / "tokenizer_config.json", auto_map=auto, tokenizer_class="Evil", trust_remote_code=True,
           processor_class="evil.Evil", custom_pipelines={"x": {"impl": "evil.Evil"}})  # fmt: skip
    change(
        model / "config.json",
        auto_map=auto,
        trust_remote_code=True,
        custom_pipelines={"x": {"impl": "evil.Evil"}},
    )
    monkeypatch.chdir(model)
    _, _, loaded = load_hf(model)
    again = text.load_tokenizer(model)
    assert (
        text.tokenizer_fingerprint(loaded)
        == text.tokenizer_fingerprint(again)
        == text.tokenizer_fingerprint(tokenizer)
    )
    assert not ran.exists()


def test_a_tokenizer_config_cannot_name_another_file(model: Path, tmp_path: Path, tokenizer):
    other = json.loads((model / "tokenizer.json").read_text())
    other["added_tokens"] = []
    (tmp_path / "tokenizer.4.0.json").write_text(json.dumps(other))
    elsewhere = str(tmp_path / "tokenizer.4.0.json")
    change(model / "tokenizer_config.json", tokenizer_file=elsewhere, vocab_file=elsewhere, gguf_file=elsewhere,
           fast_tokenizer_files=["../tokenizer.4.0.json"])  # fmt: skip
    for loaded in (load_hf(model)[2], text.load_tokenizer(model)):
        assert text.tokenizer_fingerprint(loaded) == text.tokenizer_fingerprint(tokenizer)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ''['__class__'] }}{{ ('' | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__}'.format_map({'0': ''}) }}",
    "{{ namespace.__init__.__globals__['__builtins__']['open']('RAN', 'w') }}",
    "{{ messages.append(1) }}",
    "{{ messages.__class__ }}{{ messages[0].update({'content': 'other'}) }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}",
    "{% for i in range(10000000000) %}{% endfor %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(tokenizer, tmp_path: Path, monkeypatch, escape: str):
    monkeypatch.chdir(tmp_path)
    chatty = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token,
        chat_template="{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}" + escape,
    )  # fmt: skip
    before = [Message("user", "Hello")]
    with pytest.raises(ValueError, match="the chat template refuses"):
        text.encode_prompt(chatty, tuple(before))
    assert not (tmp_path / "RAN").exists()


def test_what_a_template_may_not_see_is_empty_to_it(tokenizer):
    hidden = "{{ raise_exception.__globals__ }}{{ strftime_now.__code__ if date_string else '' }}"
    chatty = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token,
        chat_template="{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}" + hidden,
    )  # fmt: skip
    assert (
        chatty.decode(text.encode_prompt(chatty, (Message("user", "Hello"),)))
        == f"Hello{tokenizer.eos_token}"
    )


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b", "", ".hidden", "x" * 200, None])
def test_a_chat_template_has_no_path_for_a_name(model: Path, tokenizer, tmp_path: Path, name):
    templates = [{"name": "default", "template": "x"}, {"name": name, "template": "evil"}]
    change(model / "tokenizer_config.json", chat_template=templates)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    for load in (load_hf, text.load_tokenizer):
        with pytest.raises(ValueError, match="names a chat template"):
            load(model)
    chatty = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="x"
    )
    chatty.chat_template = {"default": "x", name: "evil"}
    built = language_model(LLAMA)
    with pytest.raises(ValueError, match="names a chat template"):
        save_hf(tmp_path / "a" / "b" / "c", built, built.init(jax.random.key(0)), chatty)
    assert not [p for p in tmp_path.rglob("*evil*")]


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    "name", [*FILES, "model.safetensors.index.json", "chat_template.jinja", "added_tokens.json"]
)
def test_a_link_out_of_a_model_folder_is_refused(model: Path, tmp_path: Path, name: str):
    outside = tmp_path / f"outside-{name}"
    if (model / name).exists():
        (model / name).rename(outside)
    else:
        outside.write_text("{}")
    (model / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name} is a link out of its folder"):
        load_hf(model)


def test_links_of_the_hugging_face_cache_are_followed(model: Path, tmp_path: Path):
    """``snapshots/<revision>/x -> ../../blobs/<sha>``: how the hub client lays out every model."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (tmp_path / "link").symlink_to(snapshot)
    assert load_hf(snapshot)[2] is not None
    assert load_hf(tmp_path / "link")[2] is not None


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused_at_once(model: Path, name: str):
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        load_hf(model)
    (model / name).unlink()
    (model / name).mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        load_hf(model)


ABSURD = [
    {"vocab_size": 10**12}, {"hidden_size": 10**9}, {"num_hidden_layers": 10**9}, {"num_attention_heads": 10**12},
    {"num_key_value_heads": 10**12}, {"max_position_embeddings": 10**30}, {"intermediate_size": -1}, {"head_dim": 1e3},
    {"vocab_size": "1200"}, {"vocab_size": True}, {"hidden_size": None}, {"num_attention_heads": 0}, {"rope_theta": -1},
    {"rope_theta": float("nan")}, {"rope_theta": 1e400}, {"rms_norm_eps": "x"}, {"rope_scaling": "llama3"},
    {"rope_scaling": {"rope_type": "llama3", "factor": "a", "low_freq_factor": [], "high_freq_factor": 1,
                      "original_max_position_embeddings": 1}},
    {"rlhf_jax_score_bias": "0"}, {"rlhf_jax_score_bias": True}, {"rlhf_jax_score_bias": float("inf")}, {"model_type": ["llama"]}, {"model_type": {}},
    {"sliding_window": 1e99}, {"tie_word_embeddings": "yes"}, {"hidden_act": 7},
]  # fmt: skip


@pytest.mark.parametrize("fields", ABSURD, ids=lambda f: json.dumps(f)[:40])
def test_absurd_numbers_in_a_model_description_are_named(model: Path, fields: dict):
    change(model / "config.json", **fields)
    with pytest.raises(ValueError, match=r"config\.json|model_type|must|supported|tensor"):
        load_hf(model)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "corrupt .nested deeper"),
        ("[" * 70 + "]" * 70, "corrupt .nested deeper than the limit of 64"),
        ('{"a": ' + "9" * 5000 + "}", "corrupt"),
        ('{"a": 1, "a": 2}', "corrupt .*'a' is given twice"),
        ("\xff", "corrupt"),
        ("[1]", "holds no object|corrupt"),
    ],
    ids=["deep", "a little deep", "digits", "twice", "no UTF-8", "a list"],
)
def test_json_of_a_model_folder_has_limits(model: Path, name: str, content: str, message: str):
    (model / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} (is )?{message}"):
        load_hf(model)


@pytest.mark.parametrize("name", sorted(untrusted.LIMITS))
def test_files_of_a_model_folder_have_a_size(model: Path, name: str):
    with (model / name).open("ab") as file:
        file.truncate(untrusted.LIMITS[name] + 1)  # a hole: it takes no space
    with pytest.raises(
        ValueError,
        match=rf"{name} has [\d,]+ bytes, more than the limit of {untrusted.LIMITS[name]:,}",
    ):
        load_hf(model)


# --------------------------------------------------------------------------- tensors: headers, and names as paths


def safetensors_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


HEADERS = {
    "twice": safetensors_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                              b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
    "deep": safetensors_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "above the limit": struct.pack("<Q", 10**12),
    "the longest": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a list": safetensors_file(b"[]"),
    "beyond the end": safetensors_file(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', b"\0" * 4),
    "overflow": safetensors_file(
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "negative": safetensors_file(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"\0" * 4),
    "empty": b"",
    "no UTF-8": safetensors_file(b'{"\xff":1}'),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_safetensors_header_is_refused(model: Path, kind: str):
    (model / "model.safetensors").write_bytes(HEADERS[kind])
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt"):
        load_hf(model)


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_tensor_names_never_become_paths(model: Path, tmp_path: Path):
    """A tensor that nothing reads is refused by its name, cut where it is long; the name is looked for nowhere."""
    before = everything(tmp_path)
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    for name in ("../../etc/x", "/etc/x", "..\\x", "a/../../x", "~/x", "\0", "", "x" * 9000):
        safetensors.numpy.save_file(
            tensors | {name: np.zeros(1, np.float32)}, model / "model.safetensors"
        )
        with pytest.raises(ValueError, match="would be left out") as refused:
            load_hf(model)
        assert repr(name[:100]) in str(refused.value)
        assert len(str(refused.value)) < 600
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "ABSOLUTE", "sub/x.safetensors", "", 3, None, ["x"], ".."]
)
def test_an_index_cannot_name_a_file_elsewhere(model: Path, tmp_path: Path, shard):
    """With all tensors there it is refused for its name; with one missing nothing outside is opened."""
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    safetensors.numpy.save_file(tensors, tmp_path / "outside.safetensors")
    shard = str(tmp_path / "outside.safetensors") if shard == "ABSOLUTE" else shard
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors") | {"lm_head.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no file of this folder"):
        load_hf(model)
    del tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"a shard is missing: tensor 'lm_head\.weight'"):
        load_hf(model)


def test_a_link_planted_where_a_model_is_saved_is_replaced_not_followed(tmp_path: Path, tokenizer):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted = tmp_path / "run" / "model.tmp"
    planted.mkdir(parents=True)
    for name in (*FILES, "README.md"):
        (planted / name).symlink_to(victim)
    built = language_model(LLAMA)
    network = networks.Network(built, built.init(jax.random.key(0)), tokenizer)
    networks.save_network(tmp_path / "run" / "model", network)
    assert victim.read_text() == "precious"
    assert load_hf(tmp_path / "run" / "model")[2] is not None
    assert not planted.exists()


def test_names_of_checkpoint_leaves_never_become_paths(tmp_path: Path):
    names = ("../../../evil", "/evil", "..", ".", "a/b", "~", "x" * 300)
    state = {name: {"w": jnp.arange(3.0) + i} for i, name in enumerate(names)}
    with Checkpoints(tmp_path / "a" / "b" / "run") as saved:
        saved.save(1, state)
        saved.wait()
        restored, _ = saved.restore(1, state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert {p.relative_to(tmp_path).parts[:3] for p in everything(tmp_path) if p.is_file()} == {
        ("a", "b", "run")
    }
    assert not [p for p in everything(tmp_path) if "evil" in p.name]


def test_a_shipped_model_has_a_plain_name():
    assert networks.model_folder("storyland:base_small").is_dir()
    for name in ("../../../tests", "/etc", "", "a/b", ".."):
        with pytest.raises(ValueError, match=r"model='.*': a name is 1 to 128 letters"):
            networks.model_folder(f"storyland:{name}")


# ------------------------------------------------------------------------------------------------------------ GGUF


def gguf_file(fields: bytes = b"", *, tensors: int = 0, count: int = 1, tail: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + fields + tail


def gguf_string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


KEY = gguf_string(b"general.architecture")
GGUF = {
    "no magic": b"GGML" + b"\0" * 40,
    "version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "many tensors": gguf_file(tensors=2**60, count=0),
    "many fields": gguf_file(count=2**60),
    "an array of an unknown type": gguf_file(KEY + struct.pack("<IIQ", 9, 77, 1) + b"x"),
    "an endless array": gguf_file(KEY + struct.pack("<IIQ", 9, 0, 2**60)),
    "an endless array of strings": gguf_file(KEY + struct.pack("<IIQ", 9, 8, 2**60)),
    "arrays in arrays": gguf_file(
        KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100, tail=b"\0" * 9000
    ),
    "a long string": gguf_file(KEY + struct.pack("<IQ", 8, 2**62)),
    "a long key": gguf_file(struct.pack("<Q", 2**63) + b"x"),
    "an unknown type": gguf_file(KEY + struct.pack("<IQ", 77, 0)),
    "many dimensions": gguf_file(
        gguf_string(b"t") + struct.pack("<I", 2**31), tensors=1, count=0, tail=b"\0" * 99
    ),
    "a huge tensor": gguf_file(
        gguf_string(b"t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0),
        tensors=1,
        count=0,
        tail=b"\0" * 99,
    ),
    "cut": gguf_file(KEY)[:-4],
    "nothing": b"",
}


@pytest.mark.parametrize("kind", GGUF)
def test_a_hostile_gguf_header_is_refused_at_once(tmp_path: Path, kind: str):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(GGUF[kind])
    with pytest.raises(ValueError, match=r"x\.gguf is corrupt"):
        load_hf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "numbers", [(0,) * 7, (-1, 1, 1, 1, 1, 1, 1), (2**30,) * 7, (4, 4, 2**31 - 1, 1, 1, 8, 8)]
)
def test_a_hostile_llama2c_header_is_refused(tmp_path: Path, numbers: tuple[int, ...]):
    (tmp_path / "x.bin").write_bytes(struct.pack("<7i", *numbers) + b"\0" * 64)
    with pytest.raises(ValueError, match=r"x\.bin|must be at least 1"):
        load_llama2c(tmp_path / "x.bin")


# ------------------------------------------------------------------------------------------------------------ data


def test_a_line_has_a_largest_size(tmp_path: Path):
    line = b'{"prompt": "' + b"x" * schema.LINE_LIMIT + b'"}\n'
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "p"}\n' + line)
    with pytest.raises(
        ValueError,
        match=rf"x\.jsonl:2: the line has [\d,]+ bytes, the limit is {schema.LINE_LIMIT:,}",
    ):
        schema.read_jsonl(tmp_path / "x.jsonl", schema.Prompt)


def test_a_file_that_unpacks_to_far_more_is_refused(tmp_path: Path):
    packed = gzip.compress(bytes(2**20)) * 100  # 100 MB of zeros in 100 KB
    (tmp_path / "bomb.jsonl.gz").write_bytes(packed)
    with pytest.raises(
        ValueError, match=r"bomb\.jsonl\.gz unpacks to more than 200 times its [\d,]+ bytes"
    ):
        schema.read_jsonl(tmp_path / "bomb.jsonl.gz", schema.Prompt)
    schema.write_jsonl(
        tmp_path / "fine.jsonl.gz",
        [schema.Prompt("the same " * 9000, id=str(i)) for i in range(99)],
    )
    assert len(schema.read_jsonl(tmp_path / "fine.jsonl.gz", schema.Prompt)[0]) == 99
