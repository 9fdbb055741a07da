"""Real text on any machine as a Megatron dataset: source files as bytes.

    python -m fp8_recipes.data --out data/text                                  the standard library and site-packages of this Python
    python -m fp8_recipes.data --out data/text --roots /srv/corpus --max-mb 200

Tokens are bytes (0..255) and 256 ends a document, so no tokenizer has to be downloaded; Megatron reads the result with its NullTokenizer. The files are
``PREFIX.bin`` and ``PREFIX.idx``, written by Megatron's own IndexedDatasetBuilder. The same roots give the same dataset: files are visited in sorted order
of their path
below the root, identical files are taken once, and binary files are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

EOD = 256
"""Token that ends a document."""
VOCAB_SIZE = 257
SUFFIXES = (
    ".py",
    ".pyi",
    ".txt",
    ".md",
    ".rst",
    ".c",
    ".cc",
    ".cpp",
    ".cu",
    ".cuh",
    ".h",
    ".hpp",
    ".js",
    ".ts",
    ".html",
    ".css",
    ".json",
    ".toml",
    ".yaml",
    ".yml",
    ".cfg",
)
"""Files read by default: source and text."""
MIN_BYTES, MAX_BYTES = 64, 1 << 20
"""Shorter files say nothing, longer ones are generated tables."""


@dataclass(frozen=True)
class Summary:
    """What `build` wrote. tokens include one end-of-document token per document."""

    documents: int
    tokens: int
    duplicates: int
    binaries: int


def default_roots() -> list[Path]:
    """The standard library and every directory of installed packages on sys.path: tens to hundreds of MB of real text on every machine."""
    packages = [Path(entry) for entry in sys.path if entry and Path(entry).is_dir() and any(Path(entry).glob("*.dist-info"))]
    return list(dict.fromkeys(root.resolve() for root in [Path(sysconfig.get_paths()["stdlib"]), *packages]))


def text_files(roots: Iterable[Path], suffixes: tuple[str, ...] = SUFFIXES) -> Iterator[Path]:
    """Files below ``roots`` with one of ``suffixes``, root by root, each root in sorted order; a root nested in another is not visited twice."""
    seen: set[Path] = set()
    for root in roots:
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is not a directory; --roots takes directories")
        files = (path for path in root.rglob("*") if path.suffix.lower() in suffixes and "__pycache__" not in path.parts)
        for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
            if path not in seen and path.is_file():
                seen.add(path)
                yield path


def is_text(data: bytes) -> bool:
    """UTF-8 without NUL bytes."""
    if b"\0" in data:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def documents(roots: Iterable[Path], max_bytes: int | None = None, skipped: dict[str, int] | None = None) -> Iterator[bytes]:
    """Contents of the distinct text files below ``roots`` until ``max_bytes`` are reached. ``skipped`` counts "duplicates" and "binaries"."""
    counts = skipped if skipped is not None else {}
    seen: set[bytes] = set()
    total = 0
    for path in text_files(roots):
        if not MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
            continue
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        if digest in seen:
            counts["duplicates"] = counts.get("duplicates", 0) + 1
            continue
        seen.add(digest)
        if not is_text(data):
            counts["binaries"] = counts.get("binaries", 0) + 1
            continue
        yield data
        total += len(data) + 1
        if max_bytes is not None and total >= max_bytes:
            return


def build(prefix: str | Path, texts: Iterable[bytes]) -> tuple[int, int]:
    """Write ``texts`` as ``prefix.bin`` and ``prefix.idx``; returns (documents, tokens). Needs Megatron-Core; ValueError when there is no text."""
    import torch

    try:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path
    except ImportError as error:
        raise ImportError("writing a Megatron dataset needs Megatron-Core: pip install 'megatron-core>=0.19,<0.20' (Python 3.12 or newer)") from error
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.uint16)
    count = tokens = 0
    for data in texts:
        ids = np.append(np.frombuffer(data, dtype=np.uint8).astype(np.uint16), np.uint16(EOD))
        builder.add_item(torch.from_numpy(ids.astype(np.int32)))
        builder.end_document()
        count += 1
        tokens += len(ids)
    if count == 0:
        raise ValueError("no text found below the roots; give --roots with directories that hold text or source files")
    builder.finalize(get_idx_path(str(prefix)))
    return count, tokens


def tokenizer_flags() -> list[str]:
    """Megatron flags that read such a dataset."""
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE), "--null-tokenizer-eod-id", str(EOD)]


def build_from_roots(prefix: str | Path, roots: Iterable[Path], max_mb: float | None = None) -> Summary:
    """`documents` into `build`. ``max_mb``: stop after so many MB (2**20 bytes) of text."""
    skipped: dict[str, int] = {}
    limit = None if max_mb is None else int(max_mb * 2**20)
    count, tokens = build(prefix, documents(roots, limit, skipped))
    return Summary(count, tokens, skipped.get("duplicates", 0), skipped.get("binaries", 0))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fp8_recipes.data", description="Write source files as a Megatron dataset of bytes.")
    parser.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--roots", nargs="+", type=Path, metavar="DIR", default=None, help="directories to read (default: this Python's libraries)")
    parser.add_argument("--max-mb", type=float, default=None, help="stop after so many MB of text")
    options = parser.parse_args(argv)
    if options.max_mb is not None and options.max_mb <= 0:
        parser.error(f"--max-mb {options.max_mb} must be positive")
    roots = options.roots or default_roots()
    try:
        summary = build_from_roots(options.out, roots, options.max_mb)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"fp8_recipes.data: {error}")
    print(f"{summary.documents} documents, {summary.tokens} tokens; left out {summary.duplicates} duplicates and {summary.binaries} binaries")
    print(f"--data-path {options.out} {' '.join(tokenizer_flags())}")


if __name__ == "__main__":
    main()
