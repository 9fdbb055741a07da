#!/usr/bin/env python3
"""Rewrite every benchmark table of README.md and docs/ from the CSV files under docs/benchmarks.

    python3 scripts/make_tables.py            rewrite
    python3 scripts/make_tables.py --check    exit 1 if a table differs from its CSV

A table stands between ``<!-- csv FILE.csv [columns] [where KEY=VALUE] -->`` and ``<!-- end -->``; columns are ``name`` or ``name:Heading``, comma-separated.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSV_DIR = ROOT / "docs" / "benchmarks"
BLOCK = re.compile(r"(<!-- csv (?P<spec>[^>]*?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


def render(spec: str) -> str:
    """Markdown of one table from its marker's text."""
    spec, _, condition = spec.partition(" where ")
    name, _, columns = spec.partition(" ")
    with open(CSV_DIR / name, newline="") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
        chosen = [c.strip().partition(":") for c in columns.split(",") if c.strip()] or [(c, "", c) for c in reader.fieldnames or []]
    missing = [key for key, _, _ in chosen if rows and key not in rows[0]]
    if missing:
        raise SystemExit(f"{name} has no column {', '.join(missing)}; it has {', '.join(rows[0])}")
    if condition:
        key, _, value = condition.partition("=")
        rows = [row for row in rows if row[key.strip()] == value.strip()]
    lines = ["| " + " | ".join(heading or key for key, _, heading in chosen) + " |", "|" + " --- |" * len(chosen)]
    lines += ["| " + " | ".join(row[key] for key, _, _ in chosen) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 on a difference")
    args = parser.parse_args()
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        new = BLOCK.sub(lambda m: m.group(1) + render(m.group("spec")) + m.group(4), text)
        if new != text:
            stale.append(path.name)
            if not args.check:
                path.write_text(new)
    print("stale: " + ", ".join(stale) if stale else "every table matches its CSV")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
