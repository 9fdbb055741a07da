"""The documents show what the CSV files hold, and the CSV files hold what the code gives."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fp8_recipes.recipe import RECIPES, Recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("numerics_tables", ROOT / "scripts" / "numerics_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["numerics.md", "recipes.md"])
def test_tables_in_the_documents_are_the_csv_files(script: ModuleType, name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    assert len(re.findall(r"<!-- table [\w-]+ -->\n\|", text)) >= 5, "tables are filled in"
    assert script.rendered(text, script.tables()) == text, "run: python scripts/numerics_tables.py --render"


@pytest.mark.parametrize("name", ["numerics_mantissa", "numerics_weight"])
def test_csv_files_are_what_the_code_gives(script: ModuleType, name: str) -> None:
    """The two quick measurements again; the others use the same functions on larger data."""
    recorded, measured = script.read_csv(name), list(script.MEASUREMENTS[name]())
    assert len(recorded) == len(measured)
    for old, new in zip(recorded, measured, strict=True):
        assert old.keys() == new.keys()
        assert float(old["snr_db"]) == pytest.approx(float(new["snr_db"]), abs=0.02)


def test_snr_by_hand(script: ModuleType) -> None:
    x, y = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 3.5], [0.0, 0.0]])
    assert script.snr(x, y).item() == pytest.approx(10 * torch.log10(torch.tensor(26 / 1.25)).item(), abs=1e-5)
    assert script.worst_row(x, y) == 0
    assert script.flushed(x, y) == pytest.approx(100 / 3)


def test_an_unknown_table_is_an_error(script: ModuleType) -> None:
    with pytest.raises(KeyError, match="no-such"):
        script.rendered("<!-- table no-such -->\n<!-- end -->", {})


def test_recipes_document_names_every_recipe_and_field() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    fields = text[text.index("## Fields") :]
    for field in dataclasses.fields(Recipe):
        assert field.name == "name" or f"`{field.name}`" in fields
    for name in RECIPES:
        assert f"| `{name}` |" in text


def test_recipes_document_gives_the_defaults() -> None:
    fields = (ROOT / "docs" / "recipes.md").read_text().split("## Fields")[1]
    for field in dataclasses.fields(Recipe):
        if field.name != "name":
            line = next(line for line in fields.splitlines() if line.startswith("|") and f"`{field.name}`" in line)
            assert f"({str(field.default).lower() or 'empty'})" in line, f"{field.name} is {field.default} by default"
