"""The grouped products: under Triton's interpreter with small tiles, on a GPU with Hopper's; compiled for Hopper without one."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from assertions import assert_bitwise, assert_snr
from data import GROUPS, group_layout
from machine_code import has_compiler, listings, spills

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton, whose own library is decorated then

from fp8_recipes import reference  # noqa: E402
from fp8_recipes.formats import E4M3, E5M2, Format  # noqa: E402
from fp8_recipes.kernels.grouped_configs import SHARED, SMALL, WIDE, GroupedConfig, select_config, storing  # noqa: E402
from fp8_recipes.kernels.grouped_gemm import grouped_gemm  # noqa: E402
from fp8_recipes.kernels.grouped_wgrad import grouped_wgrad  # noqa: E402
from fp8_recipes.reference import grouped  # noqa: E402
from fp8_recipes.reference.grouped import GroupedTensor  # noqa: E402
from fp8_recipes.tensor import ScaledTensor  # noqa: E402

modules = [import_module(f"fp8_recipes.kernels.{name}") for name in ("grouped_gemm", "grouped_wgrad")]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TILE = GroupedConfig(64, 64, stages=2, subtiles=2, group=2, warps=4) if GPU else GroupedConfig(64, 32, stages=2, subtiles=2, group=2)
pytestmark = pytest.mark.usefixtures("tma_reduction")
groups = pytest.mark.parametrize("blocks", GROUPS.values(), ids=GROUPS)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs, so that each has several tiles, of several experts."""
    for module in modules:
        monkeypatch.setattr(module, "_multiprocessors", lambda device: 3)


def integers(*shape: int, seed: int, fmt: Format = E4M3) -> torch.Tensor:
    """Small integers: every sum below is exact, also in Hopper's 14-bit accumulator, so that results must be equal bit for bit."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float().to(fmt.dtype).to(DEVICE)


def powers(*shape: int, seed: int) -> torch.Tensor:
    return torch.exp2(torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()).to(DEVICE)


def operands(blocks: tuple[int, ...], n: int, k: int, fmt: Format = E4M3, per_feature: bool = True) -> tuple[ScaledTensor, GroupedTensor, torch.Tensor, int]:
    """a, b, block_expert and the number of used rows; the last rows of every group are padding, unused rows NaN."""
    rows, offsets, block_expert = group_layout(blocks, DEVICE)
    used, experts = int(offsets[-1]), len(blocks)
    payload, scale = integers(rows, k, seed=1, fmt=fmt), powers(rows, seed=2)
    for start, stop in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        if stop > start:
            payload.view(torch.uint8)[stop - 127 : stop], scale[stop - 127 : stop] = 0, grouped.SMALLEST_SCALE
    payload.view(torch.uint8)[used:], scale[used:] = 0x7F, torch.nan
    b = GroupedTensor(integers(experts, n, k, seed=3), powers(experts, n, seed=4) if per_feature else powers(experts, seed=4))
    return ScaledTensor(payload, scale, "row"), b, block_expert, used


def transposed(blocks: tuple[int, ...], n: int, k: int, fmt: Format = E4M3) -> tuple[GroupedTensor, GroupedTensor, torch.Tensor]:
    rows, offsets, _ = group_layout(blocks, DEVICE)
    experts = len(blocks)
    pair = [GroupedTensor(integers(c, rows, seed=5 + i, fmt=f), powers(experts, c, seed=7 + i)) for i, (c, f) in enumerate(((n, fmt), (k, E4M3)))]
    for q in pair:
        q.payload.view(torch.uint8)[:, int(offsets[-1]) :] = 0x7F
    return pair[0], pair[1], offsets


@groups
@pytest.mark.parametrize(("n", "k"), [(64, 144), (80, 16), (72, 272)], ids=str)
def test_gemm_is_exact_on_integers(blocks: tuple[int, ...], n: int, k: int) -> None:
    a, b, block_expert, used = operands(blocks, n, k)
    out = torch.full((a.shape[0], n), -7.0, device=DEVICE)
    got = grouped_gemm(a, b, block_expert, out=out, config=TILE)
    want = grouped.grouped_gemm(a, b, block_expert, out_dtype=torch.float32)
    assert got is out and torch.equal(got[:used], want[:used])
    assert (got[used:] == -7).all(), "rows of unused blocks were written"
    if used:
        assert (got[used - 127 : used] == 0).all(), "padding rows must come out zero"


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("promote", [0, 128, 256])
@pytest.mark.parametrize("n", [48, 41], ids=["tma", "pointer"])
def test_gemm_formats_scales_promotion_and_stores(fmt: Format, per_feature: bool, promote: int, n: int) -> None:
    a, b, block_expert, used = operands((1, 0, 1), n, 400, fmt, per_feature)
    got = grouped_gemm(a, b, block_expert, out_dtype=torch.float32, promote=promote, config=TILE)
    assert torch.equal(got[:used], grouped.grouped_gemm(a, b, block_expert, out_dtype=torch.float32)[:used])


def test_default_config_writes_bf16() -> None:
    a, b, block_expert, used = operands((1, 1), 160, 128)
    got = grouped_gemm(a, b, block_expert)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got[:used], grouped.grouped_gemm(a, b, block_expert)[:used], rtol=2**-7, atol=0)  # the interpreter truncates


@groups
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("n", "k"), [(64, 96), (80, 48), (40, 41)], ids=["tma", "rows cross experts", "pointer"])
def test_wgrad_is_exact_on_integers(blocks: tuple[int, ...], accumulate: bool, n: int, k: int) -> None:
    a_t, b_t, offsets = transposed(blocks, n, k)
    before = torch.randint(-8, 9, (len(blocks), n, k)).float().to(DEVICE) if accumulate else torch.full((len(blocks), n, k), torch.nan, device=DEVICE)
    got = grouped_wgrad(a_t, b_t, offsets, out=before.clone(), accumulate=accumulate, config=TILE)
    assert torch.equal(got, grouped.grouped_wgrad(a_t, b_t, offsets, out=before.clone(), accumulate=accumulate))


def scattered(placing: str, experts: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """One matrix per expert in a buffer of NaN: in order, in reverse as Megatron lays out gradients, with gaps, or beginning anywhere."""
    step = n * k + {"gaps": 64, "unaligned": 3}.get(placing, 0)
    memory = torch.full((experts * step + 8,), torch.nan, dtype=dtype, device=DEVICE)
    starts = [1 + e * step if placing == "unaligned" else e * step for e in range(experts)]
    return [memory[start : start + n * k].view(n, k) for start in (starts[::-1] if placing == "reverse" else starts)]


@pytest.mark.parametrize("blocks", [GROUPS["ragged"], GROUPS["first and last empty"], GROUPS["more experts than blocks"]], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("placing", "n", "k"), [("in order", 64, 96), ("reverse", 64, 96), ("reverse", 40, 41), ("gaps", 80, 48), ("unaligned", 40, 41)], ids=str
)
def test_wgrad_into_matrices_anywhere(blocks: tuple[int, ...], accumulate: bool, placing: str, n: int, k: int) -> None:
    a_t, b_t, offsets = transposed(blocks, n, k)
    before = torch.randint(-8, 9, (len(blocks), n, k)).float().to(DEVICE) if accumulate else torch.full((len(blocks), n, k), torch.nan, device=DEVICE)
    out = scattered(placing, len(blocks), n, k)
    around = out[0].as_strided((out[0].untyped_storage().nbytes() // 4,), (1,), 0)
    for matrix, start in zip(out, before, strict=True):
        matrix.copy_(start)
    assert grouped_wgrad(a_t, b_t, offsets, out=out, accumulate=accumulate, config=TILE) is out
    want = grouped.grouped_wgrad(a_t, b_t, offsets, out=before.clone(), accumulate=accumulate)
    assert torch.equal(torch.stack(out), want)
    assert int(around.isnan().sum()) == around.numel() - want.numel(), "something was written between the matrices"
    separate = [t.clone() for t in before]
    grouped_wgrad(a_t, b_t, offsets, out=separate, accumulate=accumulate, config=TILE)
    assert torch.equal(torch.stack(separate), want)


@pytest.mark.parametrize("placing", ["reverse", "gaps"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_wgrad_into_bf16_matrices(placing: str, accumulate: bool) -> None:
    a_t, b_t, offsets = transposed((1, 0, 2), 64, 48)
    out = [t.fill_(2) for t in scattered(placing, 3, 64, 48, torch.bfloat16)]
    grouped_wgrad(a_t, b_t, offsets, out=out, accumulate=accumulate, config=TILE)
    want = grouped.grouped_wgrad(a_t, b_t, offsets, out=torch.full((3, 64, 48), 2.0, device=DEVICE), accumulate=accumulate)
    torch.testing.assert_close(torch.stack(out).float(), want, rtol=2**-7, atol=0)


@pytest.mark.parametrize("store", ["reduce", "add"])
@pytest.mark.parametrize("promote", [0, 128, 256])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
def test_wgrad_formats_promotion_and_stores(store: str, promote: int, fmt: Format) -> None:
    a_t, b_t, offsets = transposed((4, 0, 1), 64, 80, fmt)
    before = torch.randint(-8, 9, (3, 64, 80)).float().to(DEVICE)
    got = grouped_wgrad(a_t, b_t, offsets, out=before.clone(), accumulate=True, promote=promote, config=replace(TILE, store=store))
    assert torch.equal(got, grouped.grouped_wgrad(a_t, b_t, offsets, out=before.clone(), accumulate=True))


@pytest.mark.parametrize("accumulate", [False, True])
def test_wgrad_into_bf16(accumulate: bool) -> None:
    a_t, b_t, offsets = transposed((1, 0, 2), 64, 48)
    before = torch.randint(-8, 9, (3, 64, 48), device=DEVICE).bfloat16()
    got = grouped_wgrad(a_t, b_t, offsets, out=before.clone(), accumulate=accumulate, config=TILE)
    want = grouped.grouped_wgrad(a_t, b_t, offsets, out=before.float(), accumulate=accumulate)
    torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=0)


@pytest.mark.parametrize("promote", [0, 256])
@pytest.mark.parametrize(("n", "k", "swapped"), [(512, 120, True), (256, 384, True), (512, 136, False), (512, 256, False), (264, 120, False)], ids=str)
def test_wgrad_whose_transpose_has_fewer_tiles(promote: int, n: int, k: int, swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into bf16, in both orders of memory; nothing beside the results. Not chosen where a box of 256 rows would reach into the next expert."""
    seen = []
    original = modules[1].launch
    monkeypatch.setattr(modules[1], "launch", lambda *args, **constants: seen.append(constants["SWAPPED"]) or original(*args, **constants))
    monkeypatch.setattr(modules[1], "in_gluon", lambda *args: False)
    a_t, b_t, offsets = transposed((1, 0, 3, 2), n, k)
    want = grouped.grouped_wgrad(a_t, b_t, offsets, out=torch.zeros(4, n, k, device=DEVICE))
    around = torch.full((6, n, k), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    for out in (around[1:-1], list(around[1:-1].unbind()[::-1])):
        around[1:-1] = torch.nan
        got = grouped_wgrad(a_t, b_t, offsets, out=out, promote=promote)
        torch.testing.assert_close(torch.stack(list(got)).float(), want, rtol=2**-7, atol=0)  # the interpreter truncates
        assert bool(around[[0, -1]].isnan().all()), "something was written beside the result"
    assert seen == [swapped] * 2


@pytest.mark.parametrize("resident", [1, 2, 50])
@pytest.mark.parametrize("group", [1, 3])
def test_every_tile_once_whatever_the_order(resident: int, group: int) -> None:
    config = replace(TILE, group=group, resident=resident)
    a, b, block_expert, used = operands((2, 1, 3), 112, 32)
    got = grouped_gemm(a, b, block_expert, out_dtype=torch.float32, config=config)
    assert torch.equal(got[:used], grouped.grouped_gemm(a, b, block_expert, out_dtype=torch.float32)[:used])
    a_t, b_t, offsets = transposed((2, 1, 3), 192, 112)
    got = grouped_wgrad(a_t, b_t, offsets, out=torch.zeros(3, 192, 112, device=DEVICE), accumulate=True, config=config)
    assert torch.equal(got, grouped.grouped_wgrad(a_t, b_t, offsets, out=torch.zeros(3, 192, 112, device=DEVICE)))


def test_promotion_of_wgrad_restarts_with_every_tile() -> None:
    # Sums of four K blocks: 2**24, 0, 1, 1. One fp32 accumulator loses both ones (2**24 + 1 is a tie to even); promoted after two blocks they survive as 2.
    payload = torch.zeros(64, 1152)
    for start in (0, 640):  # the second expert follows one without and one with a single block
        payload[:, start], payload[:, start + 256], payload[:, start + 384] = 4096, 1, 1
    q = GroupedTensor(payload.to(E5M2.dtype).to(DEVICE), torch.ones(4, 64, device=DEVICE))
    offsets = torch.tensor([0, 512, 512, 640, 1152], dtype=torch.int32, device=DEVICE)
    for promote, want in ((0, 2.0**24), (128, 2.0**24), (256, 2.0**24 + 2), (512, 2.0**24)):
        out = grouped_wgrad(q, q, offsets, out=torch.empty(4, 64, 64, device=DEVICE), promote=promote, config=TILE)
        assert out[:, 0, 0].tolist() == [want, 0, 0, want]
        for store in ("reduce", "atomic", "add"):  # the total is in out
            out = torch.zeros(4, 64, 64, device=DEVICE)
            grouped_wgrad(q, q, offsets, out=out, accumulate=True, promote=promote, config=replace(TILE, store=store))
            assert out[:, 0, 0].tolist() == [want, 0, 0, want]


def test_promotion_adds_to_the_experts_results_in_order() -> None:
    # 1 + 2**24 + 0 - 2**24: added one after the other the 1 is lost at the second step (a tie to even); in any other order it would survive.
    payload = torch.zeros(64, 1024)
    payload[:, 0], payload[:, 768] = 4096, 4096
    left, right = payload.clone(), payload.clone()
    left[:, 768] = -4096
    a_t, b_t = (GroupedTensor(t.to(E5M2.dtype).to(DEVICE), torch.ones(1, 64, device=DEVICE)) for t in (left, right))
    offsets = torch.tensor([0, 1024], dtype=torch.int32, device=DEVICE)
    out = [torch.ones(64, 64, device=DEVICE)]
    grouped_wgrad(a_t, b_t, offsets, out=out, accumulate=True, promote=256, config=TILE)
    assert (out[0] == 0).all()


def test_random_data_and_two_runs() -> None:
    torch.manual_seed(0)
    rows, offsets, block_expert = group_layout((1, 2), DEVICE)
    x, dy = (torch.randn(rows, c, device=DEVICE) * torch.randn(rows, 1, device=DEVICE).exp() for c in (144, 96))
    w = [reference.quantize(torch.randn(96, 144, device=DEVICE), "tensor") for _ in range(2)]
    b = GroupedTensor(torch.stack([q.payload for q in w]), torch.stack([q.scale for q in w]))
    a = reference.quantize(x, "tile", fold="row")
    a_t, b_t = (grouped.grouped_fold_transpose(reference.quantize(t, "row"), offsets, block_expert) for t in (dy, x))

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        y = grouped_gemm(a, b, block_expert, out_dtype=torch.float32, promote=128, config=TILE)[:384]
        return y, grouped_wgrad(a_t, b_t, offsets, out=torch.ones(2, 96, 144, device=DEVICE), accumulate=True, promote=128, config=TILE)

    y, dw = once()
    for first, second in zip((y, dw), once(), strict=True):
        assert_bitwise(second, first)
    assert_snr(grouped.grouped_gemm(a, b, block_expert, out_dtype=torch.float32)[:384], y, at_least=66)
    assert_snr(grouped.grouped_wgrad(a_t, b_t, offsets, out=torch.ones(2, 96, 144, device=DEVICE), accumulate=True), dw, at_least=66)


def _gemm(**change):
    a, b, block_expert, _ = operands((1, 1), 16, 32)
    return grouped_gemm(**({"a": a, "b": b, "block_expert": block_expert, "config": TILE} | change))


def _wgrad(**change):
    a_t, b_t, offsets = transposed((1, 1), 16, 32)
    return grouped_wgrad(**({"a_t": a_t, "b_t": b_t, "offsets": offsets, "out": torch.zeros(2, 16, 32, device=DEVICE), "config": TILE} | change))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _gemm(promote=100), ValueError, "promote=100"),
        (lambda: _gemm(config=replace(TILE, block_m=256)), ValueError, "block_m=256 must divide 128"),
        (lambda: _gemm(block_expert=torch.zeros(2, dtype=torch.int32, device=DEVICE)), ValueError, "block_expert must be"),
        (lambda: _gemm(out_dtype=torch.float16), TypeError, "bfloat16 or float32"),
        (lambda: _gemm(b=operands((1, 1), 16, 48)[1]), ValueError, "contraction lengths differ"),
        (lambda: _gemm(a=operands((1, 1), 16, 40)[0], b=operands((1, 1), 16, 40)[1]), ValueError, "must end in a positive multiple of 16"),
        (lambda: _gemm(b=GroupedTensor(torch.empty(2, 32, 16, device=DEVICE).to(E4M3.dtype).mT, torch.ones(2, device=DEVICE))), ValueError, "not contiguous"),
        (lambda: _wgrad(offsets=torch.zeros(2, dtype=torch.int32, device=DEVICE)), ValueError, "offsets must be"),
        (lambda: _wgrad(offsets=torch.zeros(3, device=DEVICE)), TypeError, "int32"),
        (lambda: _wgrad(out=torch.zeros(2, 32, 16, device=DEVICE)), ValueError, "out must be contiguous of shape"),
        (lambda: _wgrad(out=torch.zeros(2, 16, 32, dtype=torch.float16, device=DEVICE)), TypeError, "bfloat16 or float32"),
        (lambda: _wgrad(b_t=transposed((1, 1, 1), 16, 32)[1]), ValueError, "row counts differ"),
        (lambda: _wgrad(out=[torch.zeros(16, 32, device=DEVICE)]), ValueError, r"out has 1 matrices for 2 experts; give one \(16, 32\) matrix per expert"),
        (lambda: _wgrad(out=[torch.zeros(16, 32, device=DEVICE), torch.zeros(32, 16, device=DEVICE).t()]), ValueError, r"out\[1\] must be contiguous"),
        (lambda: _wgrad(out=[torch.zeros(16, 32, device=DEVICE).to(t) for t in (torch.float32, torch.bfloat16)]), ValueError, r"out\[1\] is torch.bfloat16"),
        (lambda: _wgrad(out=[torch.zeros(16, 32, device=DEVICE)] * 2), ValueError, "the same memory"),
        (lambda: _wgrad(out=[torch.zeros(16, 32, dtype=torch.float16, device=DEVICE) for _ in range(2)]), TypeError, "bfloat16 or float32"),
    ],
)
def test_bad_input_names_the_value(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_configs() -> None:
    for config in (WIDE, SMALL):
        assert 128 % config.block_m == 0
        for out_bytes, adds in ((2, False), (4, False), (2, True)):
            assert storing(config, out_bytes, adds).shared_bytes(out_bytes, adds) <= SHARED
    assert storing(WIDE, 2, False).subtiles == 1 and storing(WIDE, 4, False).subtiles == storing(WIDE, 2, True).subtiles == 2
    assert select_config(98304, 2816, 132) == WIDE  # 11 full tiles of 256
    assert select_config(98304, 128, 132) == SMALL


COMPILE = """
from fp8_recipes.kernels.first_product import compiling
from fp8_recipes.kernels.grouped_configs import WIDE, adding, promoting, storing
from fp8_recipes.kernels.grouped_gemm import _grouped_gemm_kernel
from fp8_recipes.kernels.grouped_wgrad import _grouped_wgrad_kernel
from machine_code import show
for kernel, dtype, constants in (
    (_grouped_gemm_kernel, "bf16", dict(PROMOTE=0, STRIDE_B=0, STORE="tma", ACCUMULATE=False)),
    (_grouped_gemm_kernel, "bf16", dict(PROMOTE=8, STRIDE_B=1, STORE="tma", ACCUMULATE=False)),
    (_grouped_wgrad_kernel, "fp32", dict(EXPERTS=64, PROMOTE=0, STORE="atomic", ACCUMULATE=True, out_desc=None)),
    (_grouped_wgrad_kernel, "fp32", dict(EXPERTS=64, PROMOTE=16, IN_OUT=True, STORE="atomic", ACCUMULATE=True, out_desc=None)),
    (_grouped_wgrad_kernel, "fp32", dict(EXPERTS=64, PROMOTE=16, STORE="tma", ACCUMULATE=False)),
    (_grouped_wgrad_kernel, "bf16", dict(EXPERTS=64, PROMOTE=0, STORE="tma", ACCUMULATE=False)),
    (_grouped_wgrad_kernel, "bf16", dict(EXPERTS=64, PROMOTE=0, STORE="tma", ACCUMULATE=True)),
    (_grouped_wgrad_kernel, "fp32", dict(EXPERTS=64, PROMOTE=0, STORE="reduce", ACCUMULATE=True, ORDER=-1)),
    (_grouped_wgrad_kernel, "fp32", dict(EXPERTS=64, PROMOTE=16, IN_OUT=True, STORE="atomic", ACCUMULATE=True, ORDER=0, out_desc=None)),
    (_grouped_wgrad_kernel, "bf16", dict(EXPERTS=64, PROMOTE=0, STORE="tma", ACCUMULATE=False, SWAPPED=True)),
):
    in_registers = bool(constants["PROMOTE"] and not constants.get("IN_OUT"))
    adds, out_bytes = constants["ACCUMULATE"], 4 if dtype == "fp32" else 2
    c = adding(WIDE) if adds and out_bytes == 4 else promoting(WIDE) if in_registers else storing(WIDE, out_bytes, adds)
    constants = dict(PROGRAMS=132, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=128, GROUP=c.group, SUBTILES=c.subtiles, **constants)
    if kernel is _grouped_gemm_kernel:
        del constants["ACCUMULATE"]
    else:
        constants = {"ORDER": 1, "ALIGNED": True, "IN_OUT": False, "SWAPPED": False, **constants}
        constants |= {} if constants["ORDER"] == 0 else {"table_ptr": None}
    box = f"{c.block_n},{c.block_m}" if constants.get("SWAPPED") else f"{c.block_m},{c.block_n // c.subtiles}"
    types = dict(a_desc=f"tensordesc<fp8e4nv[{c.block_m},128]>", b_desc=f"tensordesc<fp8e4nv[{c.block_n},128]>",
                 out_desc=f"tensordesc<{dtype}[{box}]>", out_ptr=f"*{dtype}", scale_a_ptr="*fp32", scale_b_ptr="*fp32",
                 block_expert_ptr="*i32", offsets_ptr="*i32", table_ptr="*i64")
    multiples = [n for n in kernel.arg_names if n.endswith("_ptr") or n in ("rows", "N", "K")]
    with compiling(kernel, constants):
        show(kernel, types, constants, dict(num_warps=c.warps, num_stages=c.stages), multiples=multiples,
             name=kernel.__name__, dtype=dtype, promote=constants["PROMOTE"], in_registers=in_registers, adds=adds,
             allowed=2 if constants.get("SWAPPED") else 0)  # one word for the whole of a tile, away and back
"""


@pytest.mark.slow
@has_compiler
def test_machine_code_streams_products() -> None:
    """Compiled for sm_90, which needs no GPU: four asynchronous FP8 matrix instructions per K block, next to no spills between them and the loop's branch."""
    found = listings(COMPILE)
    assert len(found) == 10
    for kernel, lines in found:
        assert kernel["shared"] <= 227 * 1024, f"{kernel}: bytes of shared memory a Hopper multiprocessor gives one program"
        products = [i for i, line in enumerate(lines) if "QGMMA.64x256x32.F32.E4M3.E4M3" in line]
        assert len(products) == 4, kernel
        loop = lines[products[0] : next(i for i in range(products[-1], len(lines)) if "BRA" in lines[i])]
        assert any("DEPBAR.LE gsb0, 0x1" in line for line in loop), f"{kernel}: the product of one K block is waited for before the next is issued"
        assert len(spills(loop)) <= 3, f"{kernel}: spills beside the products"
        if not kernel["in_registers"]:
            assert len(spills(lines)) <= kernel["allowed"], f"{kernel}: spills, although nothing but the accumulator is held"
            overwrites = [bool(re.search(r"R\d+, U?P\d", lines[i])) for i in products]
            assert overwrites == [not kernel["adds"], False, False, False], f"{kernel}: zeros are added to at the start of a tile"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs one Hopper GPU")
@pytest.mark.parametrize("promote", [0, 1024])
@pytest.mark.parametrize("blocks", [(5, 0, 17, 1, 9), (0, 32, 0)], ids=str)
def test_real_tiles(blocks: tuple[int, ...], promote: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in modules:
        monkeypatch.setattr(module, "_multiprocessors", lambda device: torch.cuda.get_device_properties(device).multi_processor_count)
    a, b, block_expert, used = operands(blocks, 1408, 2064)
    got = grouped_gemm(a, b, block_expert, out_dtype=torch.float32, promote=promote)
    assert torch.equal(got[:used], grouped.grouped_gemm(a, b, block_expert, out_dtype=torch.float32)[:used])
    a_t, b_t, offsets = transposed(blocks, 1408, 2064)
    for n in (1408, 1360):
        left = GroupedTensor(a_t.payload[:n], a_t.scale[:, :n].contiguous())
        for dtype, accumulate in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
            before = torch.ones(len(blocks), n, 2064, dtype=dtype, device=DEVICE)
            got = grouped_wgrad(left, b_t, offsets, out=before.clone(), accumulate=accumulate, promote=promote)
            assert torch.equal(got, grouped.grouped_wgrad(left, b_t, offsets, out=before.clone(), accumulate=accumulate))
