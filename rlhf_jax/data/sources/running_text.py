"""Reads running text for the pretraining mix."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from rlhf_jax.data.schema import DataReport, PlainText, check_text, read_bytes, read_rows
from rlhf_jax.data.sources.hub import download, folder
from rlhf_jax.run.files import local_path

TEXT_REPO = "ggml-org/ci"
TEXT_ARCHIVE = "wikitext-2-raw-v1.zip"
TEXT_FOLDERS = ("english_text", "wikitext2")


def read_text(
    path: str | os.PathLike[str], *, separator: str | None = None
) -> tuple[list[PlainText], DataReport]:
    """Documents of running text, from a file or from all such files of a folder, sorted by name.

    Args:
      path: ``.txt`` (one document, or several between `separator`) or ``.jsonl`` (one ``{text}``
        per line, other fields ignored), plain or with ``.gz``.
      separator: for example "<|endoftext|>"; None = a text file is one document.

    Raises:
      ValueError: nothing to read, not UTF-8, or a bad row (the message names file and line).
    """
    root = local_path("the text", path)
    names = ("*.txt", "*.txt.gz", "*.jsonl", "*.jsonl.gz")
    # Sorted, so that the order of the documents does not depend on the file system.
    files = sorted(f for name in names for f in root.glob(name)) if root.is_dir() else [root]
    documents, rows = [], 0
    for file in files:
        found, count = (
            _jsonl_texts(file) if ".jsonl" in file.suffixes else _txt_documents(file, separator)
        )
        documents += found
        rows += count
    if not documents:
        raise ValueError(
            f"{path} holds no text: pass a .txt, .txt.gz, .jsonl or .jsonl.gz file or a folder of "
            "them"
        )
    dropped = {"empty document": rows - len(documents)} if rows > len(documents) else {}
    return documents, DataReport(str(path), rows, len(documents), dropped)


def read_english(
    data_dir: str | os.PathLike[str] | None = None, *, separator: str | None = None
) -> tuple[list[PlainText], DataReport]:
    """English running text for the pretraining mix, one document per file.

    The download is two splits of WikiText-2.

    Args:
      data_dir: folder with a folder english_text or wikitext2, or with text files itself; None =
        download WikiText-2.
      separator: between the documents of a file in that folder, as in `read_text`; the download has
        none.

    Source: Merity et al. 2016, arXiv 1609.07843 (WikiText-2).
    """
    if data_dir is not None:
        return read_text(folder(data_dir, *TEXT_FOLDERS), separator=separator)
    archive = download(TEXT_REPO, TEXT_ARCHIVE)
    # Read from the archive directly, so that no path in it is ever written to.
    try:
        with zipfile.ZipFile(archive) as packed:
            names = [
                name for name in packed.namelist() if name.endswith((".train.raw", ".test.raw"))
            ]
            texts = [(name, packed.read(name).decode("utf-8")) for name in sorted(names)]
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{archive} is damaged ({error}): download it again") from None
    return [PlainText(text, source=name) for name, text in texts], DataReport(
        TEXT_REPO, len(texts), len(texts)
    )


def _jsonl_texts(file: Path) -> tuple[list[PlainText], int]:
    documents, report = read_rows(
        file, lambda row: PlainText(check_text(row.get("text"), "text"), source=file.name)
    )
    if report.dropped:
        raise ValueError(
            f"{report.rows - report.kept} bad rows: {'; '.join(report.examples.values())}"
        )
    return documents, report.rows


def _txt_documents(file: Path, separator: str | None) -> tuple[list[PlainText], int]:
    try:
        # Without the byte order mark that some editors write.
        text = read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: byte {error.start} is not UTF-8: save the file as UTF-8"
        ) from error
    parts = [text] if separator is None else text.split(separator)
    return [PlainText(part.strip(), source=file.name) for part in parts if part.strip()], len(parts)
