"""The tables in README and docs are those of the CSV files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_tables_match_their_csv():
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "make_tables.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stale_table_is_found(tmp_path, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "scripts" / "make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "docs" / "benchmarks").mkdir(parents=True)
    (tmp_path / "docs" / "benchmarks" / "t.csv").write_text("a,b\n1,2\n3,4\n")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- csv t.csv a:First where b=4 -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "CSV_DIR", tmp_path / "docs" / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["make_tables.py", "--check"])
    assert module.main() == 1
    monkeypatch.setattr(sys, "argv", ["make_tables.py"])
    assert module.main() == 0
    assert readme.read_text() == "<!-- csv t.csv a:First where b=4 -->\n| First |\n| --- |\n| 3 |\n<!-- end -->\n"
