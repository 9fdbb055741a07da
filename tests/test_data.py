"""Text to Megatron's .bin / .idx: contents, order, duplicates, binaries."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8_recipes import data


def corpus(root):
    (root / "b").mkdir(parents=True)
    (root / "b" / "two.py").write_bytes(b"two = 2\n" * 20)
    (root / "a.py").write_bytes("gr\u00fc\u00df = 1\n".encode() * 20)
    (root / "copy.py").write_bytes(b"two = 2\n" * 20)
    (root / "zero.txt").write_bytes(b"\0" * 200)
    (root / "latin.txt").write_bytes(b"\xff\xfe" * 100)
    (root / "short.py").write_bytes(b"x")
    (root / "image.png").write_bytes(b"p" * 200)
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "c.py").write_bytes(b"cached" * 30)
    return root


def test_documents_are_distinct_text_in_a_fixed_order(tmp_path):
    root = corpus(tmp_path / "src")
    skipped: dict[str, int] = {}
    found = list(data.documents([root], skipped=skipped))
    assert found == ["gr\u00fc\u00df = 1\n".encode() * 20, b"two = 2\n" * 20]
    assert skipped == {"duplicates": 1, "binaries": 2}
    assert list(data.documents([root])) == found


def test_nested_roots_and_limits(tmp_path):
    root = corpus(tmp_path / "src")
    assert list(data.documents([root, root / "b"])) == list(data.documents([root]))
    assert len(list(data.documents([root], max_bytes=10))) == 1


def test_round_trip_through_megatrons_reader(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="Megatron-Core is not installed")
    root = corpus(tmp_path / "src")
    summary = data.build_from_roots(tmp_path / "out" / "text", [root])
    dataset = indexed.IndexedDataset(str(tmp_path / "out" / "text"))
    texts = list(data.documents([root]))
    assert summary == data.Summary(documents=2, tokens=sum(len(t) + 1 for t in texts), duplicates=1, binaries=2)
    assert len(dataset) == 2 and list(dataset.document_indices) == [0, 1, 2]
    for item, text in zip((dataset[0], dataset[1]), texts, strict=True):
        assert bytes(item[:-1].astype("uint8")) == text and item[-1] == data.BYTES.eod


def test_byte_pairs_decode_to_the_text_and_are_fewer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="Megatron-Core is not installed")
    root = Path(data.__file__).parent
    prefix, texts = tmp_path / "out" / "text", list(data.documents([root]))
    summary = data.build_from_roots(prefix, [root], vocab_size=600)
    tokenizer, dataset = tokenizers.Tokenizer.from_file(f"{prefix}.tokenizer.json"), indexed.IndexedDataset(str(prefix))
    assert summary.documents == len(texts) == len(dataset) and summary.tokens < sum(map(len, texts)) / 2
    for number, text in enumerate(texts):
        *ids, last = dataset[number].tolist()
        assert last == 599 and max(ids) < 599 and tokenizer.decode(ids).encode() == text
    data.build_from_roots(tmp_path / "again", [root], vocab_size=600)
    for suffix in (".bin", ".idx", ".tokenizer.json"):
        assert (tmp_path / f"again{suffix}").read_bytes() == Path(f"{prefix}{suffix}").read_bytes()


@pytest.mark.parametrize("size", [256, 511, 65537])
def test_vocabulary_of_a_size_that_cannot_be_is_refused(tmp_path, capsys, size):
    with pytest.raises(SystemExit) as stop:
        data.main(["--out", str(tmp_path / "text"), "--roots", str(corpus(tmp_path / "src")), "--vocab", str(size)])
    assert f"a vocabulary of {size} byte-pair tokens: choose 512 to 65536, or 257 for bytes" in str(stop.value) and not capsys.readouterr().out


def test_too_little_text_for_the_vocabulary_is_said(tmp_path):
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    with pytest.raises(ValueError, match=r"the text has pairs for \d+ tokens only, not for 40000; give more text or a smaller --vocab"):
        data.build_from_roots(tmp_path / "text", [corpus(tmp_path / "src")], vocab_size=40000)


def test_same_roots_same_bytes(tmp_path):
    pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="Megatron-Core is not installed")
    root = corpus(tmp_path / "src")
    data.build_from_roots(tmp_path / "one", [root])
    data.build_from_roots(tmp_path / "two", [root])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_default_roots_hold_the_standard_library():
    assert any((root / "argparse.py").is_file() for root in data.default_roots())


def test_command_line(tmp_path, capsys):
    pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="Megatron-Core is not installed")
    root = corpus(tmp_path / "src")
    data.main(["--out", str(tmp_path / "text"), "--roots", str(root)])
    out = capsys.readouterr().out
    assert "2 documents" in out and f"--data-path {tmp_path / 'text'} --tokenizer-type NullTokenizer --vocab-size 257 --null-tokenizer-eod-id 256" in out


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--max-mb", "0"], "must be positive"), (["--roots", "/nonexistent"], "not a directory"), (["--roots", "EMPTY"], "no text found")]
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, words):
    pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="Megatron-Core is not installed")
    (tmp_path / "empty").mkdir()
    arguments = [str(tmp_path / "empty") if a == "EMPTY" else a for a in arguments]
    with pytest.raises(SystemExit) as stop:
        data.main(["--out", str(tmp_path / "text"), *arguments])
    assert words in str(stop.value) + capsys.readouterr().err
