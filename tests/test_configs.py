"""configs/recipes holds every named recipe in full, each with its source."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fp8_recipes.recipe import RECIPES, Recipe, from_yaml

yaml = pytest.importorskip("yaml", reason="pyyaml is needed to read recipes from files")
FOLDER = Path(__file__).parents[1] / "configs" / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_one_file_per_named_recipe() -> None:
    assert [path.stem for path in FILES] == sorted(RECIPES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_is_the_named_recipe_in_full(path: Path) -> None:
    assert from_yaml(path) == RECIPES[path.stem]
    written = yaml.safe_load(path.read_text())
    assert set(written) == {field.name for field in dataclasses.fields(Recipe)}, "no field is left to a default"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_comments_give_the_source(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^# Source: \w", text, re.MULTILINE)
    if path.stem.startswith("moss"):
        assert "arXiv 2511.05811" in text
        assert "section 3.1" in text
        assert "section 3.2" in text


def test_overrides_apply_to_a_file() -> None:
    recipe = from_yaml(FOLDER / "moss.yaml", "interval=200,grad=e5m2")
    assert recipe == dataclasses.replace(RECIPES["moss"], interval=200, grad="e5m2")
