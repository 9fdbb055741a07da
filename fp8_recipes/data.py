"""Real text on any machine as a Megatron dataset: source files as bytes, or as byte pairs learned from them.

    python -m fp8_recipes.data --out data/text                                  the standard library and site-packages of this Python
    python -m fp8_recipes.data --out data/text --roots /srv/corpus --max-mb 200
    python -m fp8_recipes.data --out data/text --vocab 32000                    byte pairs, with the frequencies of a real vocabulary

Nothing is downloaded. Tokens are bytes (0..255), or byte-pair tokens (0..N - 2) of a tokenizer that is trained here and kept as ``PREFIX.tokenizer.json``; the
last one, 256 or N - 1, ends a document. Megatron reads the result with its NullTokenizer. The files are ``PREFIX.bin`` and ``PREFIX.idx``, written by its own
IndexedDatasetBuilder. The same roots give the same dataset: files are visited in sorted order of their path below the root, identical files are taken once,
and binary files are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

VOCAB_SIZE = 257
"""Tokens of a dataset of bytes. The last token of any vocabulary ends a document."""
VOCAB_SIZES = range(512, 65537)
"""Of byte pairs: all bytes are tokens too, and a token is stored in 16 bits."""
SAMPLE = 4
"""Byte pairs are learned from one document in so many, spread over all of them."""
BATCH = 256
"""Documents that are encoded together, in parallel where the tokenizer can."""
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


@dataclass(frozen=True)
class Tokens:
    """size: of the vocabulary. encode: documents -> their ids without the end-of-document token."""

    size: int
    encode: Callable[[list[bytes]], list[np.ndarray]]

    @property
    def eod(self) -> int:
        return self.size - 1


BYTES = Tokens(VOCAB_SIZE, lambda texts: [np.frombuffer(data, dtype=np.uint8) for data in texts])


def byte_pairs(texts: Iterable[bytes], size: int, path: Path) -> Tokens:
    """Byte pairs learned from ``texts`` (Sennrich et al., arXiv 1508.07909, on bytes), ``size`` tokens with the end of a document; written to ``path``.

    Needs the package tokenizers. ValueError if ``size`` is not in `VOCAB_SIZES`, or if ``texts`` have too few pairs for it.
    """
    if size not in VOCAB_SIZES:
        raise ValueError(f"a vocabulary of {size} byte-pair tokens: choose {VOCAB_SIZES.start} to {VOCAB_SIZES.stop - 1}, or {VOCAB_SIZE} for bytes")
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError("byte pairs need the package tokenizers: pip install 'tokenizers>=0.21'; --vocab 257 (bytes) does not") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator((data.decode() for data in texts), trainer)
    if tokenizer.get_vocab_size() != size - 1:
        raise ValueError(f"the text has pairs for {tokenizer.get_vocab_size() + 1} tokens only, not for {size}; give more text or a smaller --vocab")
    tokenizer.save(str(path))

    def encode(batch: list[bytes]) -> list[np.ndarray]:
        return [np.asarray(found.ids) for found in tokenizer.encode_batch_fast([data.decode() for data in batch])]

    return Tokens(size, encode)


def build(prefix: str | Path, texts: Iterable[bytes], tokens: Tokens = BYTES) -> tuple[int, int]:
    """Write ``texts`` as ``prefix.bin`` and ``prefix.idx``; returns (documents, tokens). Needs Megatron-Core; ValueError when there is no text."""
    import torch

    try:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path
    except ImportError as error:
        raise ImportError("writing a Megatron dataset needs Megatron-Core: pip install 'megatron-core>=0.19,<0.20' (Python 3.12 or newer)") from error
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.uint16)
    count = total = 0
    remaining = iter(texts)
    while batch := list(islice(remaining, BATCH)):
        for encoded in tokens.encode(batch):
            ids = np.append(encoded.astype(np.int32), np.int32(tokens.eod))
            builder.add_item(torch.from_numpy(ids))
            builder.end_document()
            count += 1
            total += len(ids)
    if count == 0:
        raise ValueError("no text found below the roots; give --roots with directories that hold text or source files")
    builder.finalize(get_idx_path(str(prefix)))
    return count, total


def tokenizer_flags(size: int = VOCAB_SIZE) -> list[str]:
    """Megatron flags that read a dataset of ``size`` tokens."""
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size), "--null-tokenizer-eod-id", str(size - 1)]


def build_from_roots(prefix: str | Path, roots: Iterable[Path], max_mb: float | None = None, vocab_size: int = VOCAB_SIZE) -> Summary:
    """`documents` into `build`. ``max_mb``: stop after so many MB (2**20 bytes) of text."""
    skipped: dict[str, int] = {}
    roots, limit = list(roots), None if max_mb is None else int(max_mb * 2**20)
    tokens = BYTES
    if vocab_size != VOCAB_SIZE:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        tokens = byte_pairs(islice(documents(roots, limit), 0, None, SAMPLE), vocab_size, Path(f"{prefix}.tokenizer.json"))
    count, total = build(prefix, documents(roots, limit, skipped), tokens)
    return Summary(count, total, skipped.get("duplicates", 0), skipped.get("binaries", 0))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fp8_recipes.data", description="Write source files as a Megatron dataset of bytes or byte pairs.")
    parser.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--roots", nargs="+", type=Path, metavar="DIR", default=None, help="directories to read (default: this Python's libraries)")
    parser.add_argument("--max-mb", type=float, default=None, help="stop after so many MB of text")
    parser.add_argument("--vocab", type=int, default=VOCAB_SIZE, metavar="N", help=f"byte-pair tokens learned from the text; {VOCAB_SIZE} (default): bytes")
    options = parser.parse_args(argv)
    if options.max_mb is not None and options.max_mb <= 0:
        parser.error(f"--max-mb {options.max_mb} must be positive")
    roots = options.roots or default_roots()
    try:
        summary = build_from_roots(options.out, roots, options.max_mb, options.vocab)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"fp8_recipes.data: {error}")
    print(f"{summary.documents} documents, {summary.tokens} tokens; left out {summary.duplicates} duplicates and {summary.binaries} binaries")
    print(f"--data-path {options.out} {' '.join(tokenizer_flags(options.vocab))}")


if __name__ == "__main__":
    main()
