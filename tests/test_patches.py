"""Every diff of patches/ applies to the released wheel without fuzz, compiles, and does what its header says where that can be tried without a GPU."""

from __future__ import annotations

import importlib.util
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


def test_readme_lists_every_patch():
    table = (PATCHES[0].parent / "README.md").read_text()
    assert set(re.findall(r"^\| ([a-z0-9-]+) \|", table, flags=re.MULTILINE)) - {"patch"} == {p.stem for p in PATCHES}


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
