"""The one writer: whole files or old ones, synced in the right order, nothing left beside them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf_jax.run import files


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    target = tmp_path / "a.json"
    files.write_json(target, {"old": 1})

    def fail_half_way() -> None:
        with files.written(target) as file:
            file.write("half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_half_way()
    assert files.read_json(target) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        order.append(("sync", os.path.isdir(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def replaced(source: str, target: Path) -> None:
        order.append(("rename", False))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    files.write_json(tmp_path / "a.json", [1])
    assert order == [("sync", False), ("rename", False), ("sync", True)]


def test_a_number_that_is_not_finite_leaves_the_old_file(tmp_path):
    files.write_json(tmp_path / "a.json", [1])
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", [float("nan")])
    assert files.read_json(tmp_path / "a.json") == [1]


def test_a_folder_takes_the_place_of_another_and_a_crash_in_between_is_mended(tmp_path):
    model = tmp_path / "model"
    for text in ("one", "two"):
        (tmp_path / "model.tmp").mkdir()
        (tmp_path / "model.tmp" / "x").write_text(text)
        files.put_folder(tmp_path / "model.tmp", model)
    assert (model / "x").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    model.rename(tmp_path / "model.old")  # as a crash between the two renames leaves it
    (tmp_path / "model.tmp").mkdir()
    files.settle_folder(model)
    assert (model / "x").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_contents_tell_a_flipped_bit_an_emptied_and_a_missing_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_bytes(b"abc")
    (tmp_path / "y").write_bytes(b"d")
    before = files.contents(tmp_path)
    assert list(before) == ["sub/x", "y"]
    (tmp_path / "sub" / "x").write_bytes(b"abb")
    assert files.contents(tmp_path)["sub/x"] != before["sub/x"]
    (tmp_path / "sub" / "x").unlink()
    assert list(files.contents(tmp_path)) == ["y"]
    (tmp_path / "z").symlink_to(tmp_path / "y")
    with pytest.raises(OSError, match="symbolic link"):
        files.contents(tmp_path)


def test_appended_lines_are_kept_in_order(tmp_path):
    for n in range(3):
        files.append_line(tmp_path / "new" / "log.jsonl", {"n": n})
    assert (tmp_path / "new" / "log.jsonl").read_text().split() == ['{"n":', "0}", '{"n":', "1}", '{"n":', "2}"]
