"""Every diff of patches/ applies to the released wheel without fuzz, compiles, and does what its header says where that can be tried without a GPU."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

PATCHES = sorted((Path(__file__).resolve().parents[1] / "patches").glob("*.patch"))
WHEELS = {"megatron": "megatron-core==0.19.2", "transformer_engine": "transformer-engine==2.20.2"}

pytestmark = pytest.mark.skipif(shutil.which("patch") is None, reason="the patch program is not installed")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Directory with the unpacked Python files of both wheels, from the package index."""
    root = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.12", "-d", str(root)]
    download = subprocess.run([*command, *WHEELS.values()], capture_output=True, text=True, timeout=300, check=False)
    if download.returncode != 0:
        pytest.skip(f"the released wheels cannot be downloaded: {download.stderr.strip().splitlines()[-1:]}")
    for wheel in root.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root / "site", [name for name in archive.namelist() if name.endswith(".py")])
    return root / "site"


def files_of(patch: Path) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), flags=re.MULTILINE)


def apply(patch: Path, released: Path, into: Path) -> Path:
    """Copies of the files that ``patch`` touches, patched."""
    for name in files_of(patch):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(released / name, into / name)
    for extra in (["--dry-run"], []):
        result = subprocess.run(["patch", "-p1", "-F0", "-i", str(patch), *extra], cwd=into, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "offset" not in result.stdout and "fuzz" not in result.stdout, result.stdout
    return into


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_applies_and_compiles(patch, released, tmp_path):
    names = files_of(patch)
    assert names, f"{patch.name} changes no file"
    into = apply(patch, released, tmp_path)
    for name in names:
        text = (into / name).read_text()
        assert text != (released / name).read_text()
        compile(text, name, "exec")


def test_all_of_them_together(released, tmp_path):
    for name in {name for patch in PATCHES for name in files_of(patch)}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(released / name, tmp_path / name)
    for patch in PATCHES:
        result = subprocess.run(["patch", "-p1", "-F0", "-i", str(patch)], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


README = (PATCHES[0].parent / "README.md").read_text()
PACKAGE = PATCHES[0].parents[1] / "fp8_recipes"


def test_readme_lists_every_patch():
    assert set(re.findall(r"^\| ([a-z0-9-]+) \|", README, flags=re.MULTILINE)) - {"patch", "shim"} == {p.stem for p in PATCHES}


def changes_upstream(function: ast.FunctionDef) -> bool:
    """Does it call te.shims.replace (three arguments, unlike dataclasses.replace), or assign into something that it imported from upstream?"""
    imports = [n for n in ast.walk(function) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(("megatron", "transformer_engine"))]
    upstream = {alias.asname or alias.name for n in imports for alias in n.names}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "replace" and len(node.args) == 3:
            return True
        for target in node.targets if isinstance(node, ast.Assign) else []:
            while isinstance(target, (ast.Attribute, ast.Subscript)):
                target = target.value
                if isinstance(target, ast.Name) and target.id in upstream:
                    return True
    return False


def shims() -> set[str]:
    """Every function of the package that changes upstream, as module.function; what the two `install` functions call counts as well."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        functions = {f.name: f for f in ast.parse(path.read_text()).body if isinstance(f, ast.FunctionDef)}
        found |= {f"{module}.{name}" for name, f in functions.items() if changes_upstream(f)}
        if module in ("te.shims", "megatron.shims"):
            called = {n.func.id for n in ast.walk(functions["install"]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            found |= {f"{module}.{name}" for name in called & set(functions) if not name.startswith(("require", "refuse"))}
    return found


def test_every_shim_has_a_patch_or_a_reason_why_it_has_none():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if line.startswith("| ")]
    patched = [name for row in rows if len(row) == 6 for name in row[1].split(", ") if row[0] != "patch"]
    reasons = {row[0]: row[1] for row in rows if len(row) == 2 and row[0] != "shim"}
    listed = [*patched, *reasons]
    assert shims() - set(listed) == set(), "neither a patch nor a reason in patches/README.md"
    assert set(listed) - shims() == set(), "in patches/README.md, but no such shim"
    assert len(set(listed)) == len(listed) and all(len(reason) > 20 for reason in reasons.values())


def test_a_shim_without_patch_is_noticed():
    source = """
def wraps(): replace(upstream, "forward", wrapper)
def sets():
    from megatron.training import training
    training.training_log = None
def fills():
    from transformer_engine.pytorch import _extra_state as state
    state._RECIPE_POLICIES[("a", "b")] = 1
def copies(recipe):
    from megatron.core import parallel_state
    return replace(recipe, spec=parallel_state.get())
def own(self):
    self.value = 1
"""
    assert [f.name for f in ast.parse(source).body if isinstance(f, ast.FunctionDef) and changes_upstream(f)] == ["wraps", "sets", "fills"]


def load(path: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def patch_named(name: str) -> Path:
    return next(p for p in PATCHES if p.stem == name)


def test_patched_custom_gemm_writes_main_grad(released, tmp_path):
    """A custom quantizer's wgrad with fused accumulation: upstream leaves main_grad alone, the patched file adds to it, with and without grad=True."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformer_engine.pytorch", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
    name = "transformer_engine/pytorch/custom_recipes/gemm.py"
    patched = load(apply(patch_named("te-custom-gemm-out"), released, tmp_path) / name, "patched_custom_gemm")
    original = load(released / name, "released_custom_gemm")
    x, dy = torch.randn(12, 8), torch.randn(12, 6)

    class Quantizer:
        def qgemm(self, qx, qw, *rest, **kwargs):
            return qx @ qw.t()

    def storage(t):
        one = torch.ones(())
        return types.SimpleNamespace(
            custom=True, data=t, scale=one, data_t=t.t().contiguous(), scale_t=one, dtype=t.dtype, original_shape=t.shape, _quantizer=Quantizer()
        )

    def main_grad_after(module, **flags):
        module.is_custom = lambda t: True
        main_grad = torch.full((6, 8), 0.5)
        module.custom_gemm(storage(x), storage(dy), None, layout="NT", out=main_grad, **flags)
        return main_grad

    torch.testing.assert_close(main_grad_after(patched, grad=True, accumulate=True), 0.5 + dy.t() @ x)
    torch.testing.assert_close(main_grad_after(patched, grad=False, accumulate=True), 0.5 + dy.t() @ x)
    torch.testing.assert_close(main_grad_after(patched, grad=True, accumulate=False), dy.t() @ x)
    assert torch.equal(main_grad_after(original, grad=True, accumulate=True), torch.full((6, 8), 0.5)), "upstream is fixed: drop the patch and the shim"


def test_patched_compile_helpers_leaves_make_alone(released, tmp_path, monkeypatch):
    utils = pytest.importorskip("megatron.core.datasets.utils", reason="Megatron-Core is not installed")
    name = "megatron/core/datasets/utils.py"
    source = (apply(patch_named("megatron-compile-helpers"), released, tmp_path) / name).read_text()
    body = source[source.index("def compile_helpers") : source.index("def normalize")]
    called: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command: called.append(command) or types.SimpleNamespace(returncode=0))
    namespace = {"__file__": utils.__file__}
    exec(compile(body, name, "exec"), namespace)
    namespace["compile_helpers"]()
    assert called == []
    (tmp_path / "Makefile").write_text("default:\n")
    namespace["__file__"] = str(tmp_path / "utils.py")
    namespace["compile_helpers"]()
    assert called == [["make", "-C", str(tmp_path)]]


PATCHED_MEGATRON = """
import sys
from types import SimpleNamespace
import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.training import arguments

base = sys.argv[1:]
for flags, expected in (
    ("--fp8-recipe moss:interval=9 --swiglu --normalization RMSNorm", (512, "moss:interval=9", "e4m3")),
    ("--fp8-recipe moss:attention=fp8 --fog flash", (768, "moss:attention=fp8", "e4m3")),
    ("--fp8-recipe tensorwise --fp8-format hybrid --swiglu", (512, "tensorwise", "hybrid")),
):
    sys.argv = ["pretrain_gpt.py", *base, *flags.split()]
    args = arguments.validate_args(arguments.parse_args())
    found = (args.ffn_hidden_size, str(getattr(args.fp8_recipe, "value", args.fp8_recipe)), args.fp8)
    assert found == expected, (found, expected)
sys.argv = ["pretrain_gpt.py", *base, "--fp8-recipe", "moss", "--fog", "flash", "--swiglu"]
try:
    arguments.validate_args(arguments.parse_args())
except Exception as error:
    assert "--swiglu" in str(error), error
else:
    raise AssertionError("--fog flash with --swiglu was taken")

config = SimpleNamespace(use_mup=False, fp32_residual_connection=False, sequence_parallel=False)
layer = SimpleNamespace(word_embeddings=lambda ids: ids.float(), add_position_embedding=False, reduce_scatter_embeddings=True, tokentype_embeddings=None,
                        config=config, embedding_dropout=lambda x: x)
ids = torch.arange(4)
assert torch.equal(LanguageModelEmbedding.forward(layer, ids, None), ids.float())
config.embedding_multiplier = 3.0
assert torch.equal(LanguageModelEmbedding.forward(layer, ids, None), 3.0 * ids)

from fp8_recipes.megatron import shims
try:
    shims.install()
except RuntimeError as error:
    assert "patches of fp8_recipes applied" in str(error), error
else:
    raise AssertionError("shims on top of patches were taken")
print("all as expected")
"""


def test_a_patched_megatron_takes_the_recipes_with_no_line_added(released, tmp_path):
    """Megatron's own parser and checks, from the released files with every megatron patch applied; FOG's width and multiplier act once."""
    pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
    pytest.importorskip("megatron.training", reason="Megatron-Core is not installed")
    shutil.copytree(released / "megatron", tmp_path / "megatron")
    for patch in PATCHES:
        if patch.stem.startswith("megatron-"):
            subprocess.run(["patch", "-s", "-p1", "-F0", "-i", str(patch)], cwd=tmp_path, check=True)
    flags = (
        "--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 2 --seq-length 128 --max-position-embeddings 128 --micro-batch-size 2 "
        "--train-iters 5 --lr 3e-4 --bf16 --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 "
        "--hidden-dropout 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 256 --eval-iters 0"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"}
    command = [sys.executable, "-c", PATCHED_MEGATRON, *flags.split()]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "all as expected" in result.stdout, (result.stdout + result.stderr)[-4000:]
