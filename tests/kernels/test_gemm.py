"""The persistent GEMM: on the CPU under Triton's interpreter, with small tiles; on a GPU the same tests with Hopper's, and a few real shapes."""

from __future__ import annotations

import os

import pytest
import torch
from machine_code import listings, spills

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton, whose own library is decorated then

import triton  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from fp8_recipes import reference  # noqa: E402
from fp8_recipes.formats import E4M3, E5M2, Format  # noqa: E402
from fp8_recipes.kernels import gemm_configs  # noqa: E402
from fp8_recipes.kernels.gemm import gemm, gemm_persistent, uses_torch  # noqa: E402
from fp8_recipes.kernels.gemm_configs import GemmConfig, select_config  # noqa: E402
from fp8_recipes.tensor import ScaledTensor  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TILE = GemmConfig(64, 64, stages=2, subtiles=2, group=2, warps=4) if GPU else GemmConfig(16, 32, stages=2, subtiles=2, group=2)
needs_gpu = pytest.mark.skipif(not GPU, reason="needs one Hopper GPU")
pytestmark = pytest.mark.usefixtures("tma_reduction")
HOPPER_SHARED_BYTES = 227 * 1024


def integers(rows: int, cols: int, seed: int, fmt: Format = E4M3, granularity: str = "row") -> ScaledTensor:
    """Small integers under powers of two: every product and sum below is exact, also in Hopper's 14-bit accumulator, so results must be equal bit for bit."""
    gen = torch.Generator().manual_seed(seed)
    payload = torch.randint(-2, 3, (rows, cols), generator=gen).float().to(fmt.dtype)
    exponent = torch.randint(-3, 4, (rows,) if granularity == "row" else (), generator=gen)
    return ScaledTensor(payload.to(DEVICE), torch.exp2(exponent.float()).to(DEVICE), granularity)


def run(a: ScaledTensor, b: ScaledTensor, out: torch.Tensor, config: GemmConfig = TILE, programs: int = 3, **kwargs) -> torch.Tensor:
    return gemm_persistent(a, b, out, config=config, programs=programs, **kwargs)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("shape", [(64, 64, 128), (40, 72, 400), (1, 16, 16), (100, 8, 272), (17, 130, 128)], ids=str)
@pytest.mark.parametrize("promote", [0, 128, 256])
def test_exact_on_integers_at_ragged_shapes(shape: tuple[int, int, int], promote: int) -> None:
    m, n, k = shape
    a, b = integers(m, k, 0), integers(n, k, 1)
    got = run(a, b, nan(m, n), promote=promote)
    assert torch.equal(got, reference.gemm(a, b, out_dtype=torch.float32))


@pytest.mark.parametrize("fmt_a", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("fmt_b", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize(("granularity_a", "granularity_b"), [("row", "tensor"), ("tensor", "row"), ("tensor", "tensor")])
def test_exact_at_every_format_and_granularity(fmt_a: Format, fmt_b: Format, granularity_a: str, granularity_b: str) -> None:
    a, b = integers(40, 144, 2, fmt_a, granularity_a), integers(24, 144, 3, fmt_b, granularity_b)
    bias = torch.arange(24, dtype=torch.bfloat16, device=DEVICE)
    got = run(a, b, nan(40, 24), bias=bias)
    assert torch.equal(got, reference.gemm(a, b, bias=bias, out_dtype=torch.float32))


@pytest.mark.parametrize("n", [48, 44, 41], ids=["tma", "tma-fp32-only", "pointer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("store", ["reduce", "atomic", "add"])
def test_accumulate_adds_once(n: int, dtype: torch.dtype, store: str) -> None:
    a, b = integers(40, 400, 4), integers(n, 400, 5)
    before = torch.randint(-8, 9, (40, n), device=DEVICE).to(dtype)
    config = GemmConfig(TILE.block_m, TILE.block_n, TILE.stages, TILE.subtiles, TILE.group, TILE.warps, store)
    got = run(a, b, before.clone(), config, accumulate=True, promote=128)
    want = before.float() + reference.gemm(a, b, out_dtype=torch.float32)
    assert torch.allclose(got.float(), want, rtol=0.0 if dtype == torch.float32 else 2**-7, atol=0.0)


@pytest.mark.parametrize("programs", [1, 2, 5, 64])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_tile_once_whatever_the_order(programs: int, group: int) -> None:
    m, n = 5 * TILE.block_m - 3, 3 * TILE.block_n - 8
    a, b = integers(m, 32, 6), integers(n, 32, 7)
    config = GemmConfig(TILE.block_m, TILE.block_n, TILE.stages, TILE.subtiles, group, TILE.warps)
    got = run(a, b, torch.zeros(m, n, device=DEVICE), config, programs, accumulate=True)
    assert torch.equal(got, reference.gemm(a, b, out_dtype=torch.float32))


def test_out_that_starts_off_alignment() -> None:
    a, b = integers(32, 64, 8), integers(32, 64, 9)
    storage = torch.zeros(32 * 32 + 1, device=DEVICE)
    got = run(a, b, storage[1:].view(32, 32), accumulate=True)
    assert torch.equal(got, reference.gemm(a, b, out_dtype=torch.float32)) and storage[0] == 0


def test_promotion_happens_where_it_is_asked_for() -> None:
    # Sums of the four K blocks: 2**24, 0, 1, 1. One fp32 accumulator loses both ones (2**24 + 1 is a tie to even); promoted after two blocks they survive as 2.
    payload = torch.zeros(16, 512)
    payload[:, 0], payload[:, 256], payload[:, 384] = 4096, 1, 1
    q = ScaledTensor(payload.to(E5M2.dtype).to(DEVICE), torch.ones((), device=DEVICE), "tensor")
    sums = {promote: run(q, q, nan(16, 16), promote=promote)[0, 0].item() for promote in (0, 128, 256, 512)}
    assert sums == {0: 2.0**24, 128: 2.0**24, 256: 2.0**24 + 2, 512: 2.0**24}


@pytest.mark.gpu
@needs_gpu
def test_nan_stays_in_its_row_and_column() -> None:
    # Four tiles in one program: a NaN of one tile must not leak into the next through the cleared accumulator. (The interpreter reads an E4M3 NaN as 480.)
    m, n = 2 * TILE.block_m, 2 * TILE.block_n
    a, b = integers(m, 512, 10), integers(n, 512, 11)
    a.payload[3, 5] = torch.nan
    got = run(a, b, nan(m, n), programs=1, promote=128)
    want = reference.gemm(a, b, out_dtype=torch.float32)
    assert got[3].isnan().all() and torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gemm_follows_the_reference_on_random_data(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a = reference.quantize(torch.randn(160, 320, device=DEVICE) * torch.randn(160, 1, device=DEVICE).exp(), "tile", fold="row")
    b = reference.quantize(torch.randn(144, 320, device=DEVICE), "tensor")
    got = gemm(a, b, out_dtype=dtype, promote=128)
    want = reference.gemm(a, b, out_dtype=torch.float32)
    assert got.dtype == dtype and got.shape == (160, 144)
    norm = a.payload.float().norm(dim=1) * a.scale * b.payload.float().norm(dim=1).max() * b.scale
    error = ((got.float() - want).abs() / norm[:, None]).max().item()
    assert error < {torch.float32: 2e-4, torch.bfloat16: 4e-3}[dtype]


def test_rule_between_backends() -> None:
    def q(rows: int, fmt: Format = E4M3) -> ScaledTensor:
        return ScaledTensor(torch.empty(rows, 32, dtype=fmt.dtype, device="cuda"), torch.empty(rows, device="cuda"), "row")

    with FakeTensorMode(allow_non_fake_inputs=True):
        bf16, fp32 = torch.bfloat16, torch.float32
        out, bias = torch.empty(7, 32, device="cuda"), torch.empty(32, dtype=bf16, device="cuda")
        assert uses_torch(q(7), q(32), None, None, bf16) and uses_torch(q(7), q(32), bias, None, bf16)
        others = {
            "fp32 result": uses_torch(q(7), q(32), None, None, fp32),
            "out given": uses_torch(q(7), q(32), None, out, bf16),
            "e5m2": uses_torch(q(7, E5M2), q(32), None, None, bf16) or uses_torch(q(7), q(32, E5M2), None, None, bf16),
            "N % 16": uses_torch(q(7), q(24), None, None, bf16),
            "fp32 bias": uses_torch(q(7), q(32), bias.float(), None, bf16),
        }
    assert not any(others.values()), others


@pytest.mark.parametrize("config", [gemm_configs.WIDE, gemm_configs.TALL, gemm_configs.SMALL])
def test_configs_fit_shared_memory(config: GemmConfig) -> None:
    barriers = 1024
    assert config.store != "add"  # so that only a bf16 `out` is loaded
    assert config.shared_bytes(out_bytes=4) + barriers <= HOPPER_SHARED_BYTES
    assert config.shared_bytes(out_bytes=2, adds=True) + barriers <= HOPPER_SHARED_BYTES
    assert select_config(8192, 8192, 132) == gemm_configs.WIDE
    assert select_config(128, 4096, 132) == gemm_configs.SMALL  # one row of tiles: the narrow ones keep more multiprocessors busy


def _bad(**change) -> dict:
    q = integers(16, 32, 12)
    return {"a": q, "b": q} | change


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: _bad(b=integers(16, 48, 0)), "contraction lengths differ"),
        (lambda: {"a": integers(16, 40, 0), "b": integers(16, 40, 0)}, "K=40 must be a multiple of 16"),
        (lambda: _bad(promote=100), "promote=100"),
        (lambda: _bad(promote=-128), "promote=-128"),
        (lambda: _bad(accumulate=True), "accumulate=True"),
        (lambda: _bad(out=torch.zeros(16, 15, device=DEVICE)), "out must have shape"),
        (lambda: _bad(out=torch.zeros(16, 16, device=DEVICE).t()[:, :16].t().contiguous().t()), "not contiguous"),
        (lambda: _bad(bias=torch.zeros(15, device=DEVICE)), "bias must have shape"),
        (lambda: _bad(a=reference.quantize(torch.randn(16, 32, device=DEVICE), "tile")), "tile scales, which change along K"),
        (lambda: {"a": integers(0, 32, 0), "b": integers(16, 32, 0)}, "empty"),
        (lambda: _bad(a=ScaledTensor(integers(32, 16, 0).payload.t(), torch.ones(16, device=DEVICE), "row")), "not contiguous"),
    ],
)
def test_bad_input_names_the_value(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gemm(**arguments())


@pytest.mark.parametrize(
    "arguments",
    [
        lambda: _bad(out_dtype=torch.float16),
        lambda: _bad(out=torch.zeros(16, 16, dtype=torch.float16, device=DEVICE)),
        lambda: _bad(a=ScaledTensor(torch.zeros(16, 32, dtype=torch.int8, device=DEVICE), torch.ones((), device=DEVICE), "tensor")),
        lambda: _bad(a=ScaledTensor(integers(16, 32, 0).payload, torch.ones((), dtype=torch.float64, device=DEVICE), "tensor")),
    ],
)
def test_bad_dtypes(arguments) -> None:
    with pytest.raises(TypeError):
        gemm(**arguments())


COMPILE = """
from fp8_recipes.kernels.gemm import _gemm_kernel
from fp8_recipes.kernels.gemm_configs import WIDE as c
from machine_code import show
constants = dict(PROGRAMS=132, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=128, GROUP=c.group, SUBTILES=c.subtiles, PROMOTE=8, STRIDE_A=1, STRIDE_B=1,
                 STORE="reduce", ACCUMULATE=True, bias_ptr=None)
types = dict(a_desc=f"tensordesc<fp8e4nv[{c.block_m},128]>", b_desc=f"tensordesc<fp8e4nv[{c.block_n},128]>",
             out_desc=f"tensordesc<fp32[{c.block_m},{c.block_n // c.subtiles}]>", out_ptr="*fp32", scale_a_ptr="*fp32", scale_b_ptr="*fp32")
show(_gemm_kernel, types, constants, dict(num_warps=c.warps, num_stages=c.stages), multiples=())
"""


@pytest.mark.slow
def test_machine_code_keeps_both_accumulators_of_a_wide_tile_out_of_local_memory() -> None:
    """Compiled for sm_90, which needs no GPU: four asynchronous FP8 matrix instructions per K block, and no spill between them and the loop's branch."""
    ((_, lines),) = listings(COMPILE)
    products = [i for i, line in enumerate(lines) if "QGMMA.64x256x32.F32.E4M3.E4M3" in line]
    assert len(products) == 4
    loop = lines[products[0] : next(i for i in range(products[-1], len(lines)) if "BRA" in lines[i])]
    assert any("DEPBAR.LE gsb0, 0x1" in line for line in loop), "the product of one K block is waited for before the next is issued"
    assert not spills(loop)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(1024, 768, 4096), (1000, 1104, 2064), (8192, 4096, 4096)], ids=str)
@pytest.mark.parametrize("promote", [0, 1024])
@pytest.mark.parametrize("mode", ["bf16", "fp32", "accumulate"])
def test_real_shapes(shape: tuple[int, int, int], promote: int, mode: str) -> None:
    m, n, k = shape
    torch.manual_seed(1)
    a = reference.quantize(torch.randn(m, k, device=DEVICE), "tile", fold="row")
    b = reference.quantize(torch.randn(n, k, device=DEVICE), "tensor")
    out = torch.randn(m, n, device=DEVICE) if mode == "accumulate" else None
    want = reference.gemm(a, b, out_dtype=torch.float32) + (0 if out is None else out)

    def once() -> torch.Tensor:
        dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        return gemm(a, b, out_dtype=dtype, out=None if out is None else out.clone(), accumulate=out is not None, promote=promote)

    got, again = once(), once()
    assert torch.equal(got, again), "two runs differ"
    error = ((got.float() - want).norm() / want.norm()).item()
    assert error < (4e-3 if mode == "bf16" or promote == 0 else 8e-4)


@pytest.mark.gpu
@needs_gpu
def test_torch_backend_takes_bias_and_mixed_granularities() -> None:
    torch.manual_seed(2)
    row = reference.quantize(torch.randn(256, 512, device=DEVICE), "row")
    tensor = reference.quantize(torch.randn(256, 512, device=DEVICE), "tensor")
    bias = torch.randn(256, device=DEVICE, dtype=torch.bfloat16)
    for a, b in ((row, tensor), (tensor, row), (tensor, tensor), (row, row)):
        got = gemm(a, b, bias=bias, promote=128)
        want = reference.gemm(a, b, bias=bias, out_dtype=torch.float32)
        assert ((got.float() - want).norm() / want.norm()).item() < 4e-3


def test_triton_is_the_version_these_tests_know() -> None:
    """`tma_reduction` and the machine-code test describe Triton 3.x internals; a new major version must be looked at."""
    assert triton.__version__.startswith("3.")
