"""``fp8-recipes``: demo, inspect and recipes. Errors a user can mend exit with code 2 and one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .architecture import ARCHITECTURES, ArchitectureError
from .architecture import from_name as architecture
from .recipe import RECIPES, Recipe, RecipeError, from_name, from_yaml


def describe(recipe: Recipe) -> str:
    """One line about a recipe, made from its fields."""
    if not recipe.quantize:
        return "no quantisation: the baseline"
    attention = "; attention's products in FP8" if recipe.attention == "fp8" else ""
    if recipe.stock:
        return f"TransformerEngine's {recipe.stock} scaling, x and w {recipe.weight}, dy {recipe.grad}{attention} (Megatron and TransformerEngine only)"
    head = "; under Megatron the LM head and its loss too" if recipe.head == "fp8" else ""
    experts = f"experts as one FP8 dataflow{f', every other layer {recipe.dense}' if recipe.dense else ''}; " if recipe.moe == "flow" else ""

    def side(granularity: str, fmt: str) -> str:
        folded = f"{granularity} folded to row" if recipe.folded and granularity != "row" else granularity
        measured = " under a measured global scale" if granularity == "micro" and recipe.global_scale == "measured" else ""
        return f"{fmt} {folded}{measured}"

    x, dy = side(recipe.activation_granularity, recipe.activation), side(recipe.grad_granularity, recipe.grad)
    both = f"x, dy: {x}" if x == dy else f"x: {x}; dy: {dy}"
    w = f"w: {recipe.weight} per {recipe.weight_granularity}, {recipe.weight_scale} scale"
    return f"{experts}{both}; {w}; {'FP8 products' if recipe.folded else 'exact bf16 products (for checking)'}{attention}{head}"


def _recipe(spec: str) -> Recipe:
    """A named recipe with overrides, or a YAML file by its suffix."""
    path, _, overrides = spec.partition(":")
    if path.endswith((".yaml", ".yml")):
        if not Path(path).is_file():
            raise RecipeError(f"--recipe {path}: no such file; `fp8-recipes recipes` lists the named recipes")
        return from_yaml(path, overrides)
    return from_name(spec)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fp8-recipes", description="FP8 training recipes for Megatron-LM and TransformerEngine.")
    parser.add_argument("--version", action="version", version=f"fp8_recipes {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train a small GPT on real text in high precision and with a recipe, and compare")
    demo.add_argument("--recipe", default="moss", help="name, name:key=value,... or a YAML file (default: moss)")
    demo.add_argument("--arch", default="llama3", help=f"{', '.join(ARCHITECTURES)}; name or name:key=value,... (default: llama3)")
    demo.add_argument("--steps", type=int, default=None, help="training steps of each run (default: 400 on the CPU, 500 on CUDA)")
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA on a Hopper GPU (default)")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for loss.png, log.jsonl and summary.json (default: runs/demo)")
    demo.add_argument("--data", type=Path, default=None, help="text file or folder (default: the Python standard library's sources)")
    demo.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    inspect = commands.add_parser("inspect", help="draw loss, kurtosis and FP8 scales of finished or running trainings, with a one-page report")
    inspect.add_argument("run", type=Path, nargs="+", metavar="RUN", help="folder with a run's .jsonl files, or one such file; several are drawn side by side")
    inspect.add_argument("--out", type=Path, default=None, help="folder for report.html and the PNGs (default: the first RUN)")
    inspect.add_argument("--judge", action="store_true", help="judge kurtosis again by this version's defaults (warm-up 100), instead of the log's alarms")
    commands.add_parser("recipes", help="list the named recipes")
    return parser


def _inspect(runs: list[Path], out: Path | None, judge: bool) -> int:
    from .inspection import InspectError, inspect

    try:
        page = inspect(runs, out, judge)
    except InspectError as error:
        print(f"fp8-recipes: {error}", file=sys.stderr)
        return 2
    print(f"wrote {page}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.command == "recipes":
        for name, recipe in RECIPES.items():
            print(f"{name:<12} {describe(recipe)}")
        return 0
    if arguments.command == "inspect":
        return _inspect(arguments.run, arguments.out, arguments.judge)
    from .demo import DemoError
    from .demo_report import run_demo

    try:
        recipe, arch = _recipe(arguments.recipe), architecture(arguments.arch)
        run_demo(recipe, arch, steps=arguments.steps, device=arguments.device, out=arguments.out, data=arguments.data, seed=arguments.seed)
    except (DemoError, RecipeError, ArchitectureError) as error:
        print(f"fp8-recipes: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
