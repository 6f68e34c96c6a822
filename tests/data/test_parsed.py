"""The fingerprint of a data file is that of the bytes that were parsed."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import pytest

from rlhf_jax.data import parsed
from rlhf_jax.data.schema import PlainText, read_jsonl, write_jsonl


@pytest.fixture(autouse=True)
def _fresh():
    parsed.begin()
    yield
    parsed.begin()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["text.jsonl", "text.jsonl.gz"])
def test_a_line_appended_after_the_reading_is_not_in_the_fingerprint(tmp_path, name):
    path, line = tmp_path / name, b'{"text": "the hen sleeps"}\n'
    write = (
        (lambda data: path.write_bytes(gzip.compress(data)))
        if name.endswith("gz")
        else path.write_bytes
    )
    write(line)
    before = path.read_bytes()
    read_jsonl(path, PlainText)
    write(2 * line)
    found = parsed.of(path)
    assert (found.sha256, found.bytes, found.lines) == (
        digest(before),
        len(before),
        before.count(b"\n"),
    )


def test_one_file_by_two_names_is_one(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n')
    os.symlink("a.jsonl", tmp_path / "b.jsonl")
    monkeypatch.chdir(tmp_path)
    read_jsonl("b.jsonl", PlainText)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "b"}\n')
    assert parsed.of(tmp_path / "a.jsonl").sha256 == digest(b'{"text": "a"}\n')


def test_a_file_that_changes_between_two_readings_of_a_run_is_refused(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "one"}\n')
    read_jsonl(path, PlainText)
    read_jsonl(path, PlainText)
    assert parsed.of(path).lines == 1
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}\n')
    read_jsonl(path, PlainText)
    with pytest.raises(
        ValueError, match=r"text\.jsonl changed while this run read it: it held 16 bytes .*32 bytes"
    ):
        parsed.of(path)
    parsed.begin()  # the next stage reads it for itself
    read_jsonl(path, PlainText)
    assert parsed.of(path).lines == 2


def test_what_nobody_read_is_hashed_and_what_was_written_here_is_new(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_bytes(b"x\n")
    assert parsed.of(path) == parsed.Print(digest(b"x\n"), 2, 1)
    write_jsonl(path, [PlainText("one")])
    read_jsonl(path, PlainText)
    write_jsonl(path, [PlainText("two")])
    assert parsed.of(path).sha256 == digest(path.read_bytes())


def test_a_model_whose_files_change_after_loading_is_seen(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1234")
    assert parsed.changed_since_loading(tmp_path) == []
    parsed.loading(tmp_path)
    assert parsed.changed_since_loading(Path(tmp_path)) == []
    weights.write_bytes(b"1235")
    os.utime(weights, ns=(0, 1))  # a file system with coarse times
    (tmp_path / "new.json").write_text("{}")
    assert parsed.changed_since_loading(tmp_path) == ["model.safetensors", "new.json"]
