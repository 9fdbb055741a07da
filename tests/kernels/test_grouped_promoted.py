"""The grouped products in Gluon through `grouped_gemm` and `grouped_wgrad`, on a GPU or emulated on the CPU; compiled for Hopper without one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from assertions import assert_bitwise, assert_snr
from data import group_layout
from machine_code import has_compiler, listings, spills

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="this Triton has no Gluon for Hopper")
import gluon_emulator  # noqa: E402

from fp8_recipes.formats import E4M3, E5M2, Format  # noqa: E402
from fp8_recipes.kernels.grouped_configs import SMALL, WIDE, GroupedConfig  # noqa: E402
from fp8_recipes.kernels.grouped_gemm import grouped_gemm  # noqa: E402
from fp8_recipes.kernels.grouped_wgrad import grouped_wgrad  # noqa: E402
from fp8_recipes.reference import grouped  # noqa: E402
from fp8_recipes.reference.grouped import GroupedTensor  # noqa: E402
from fp8_recipes.tensor import ScaledTensor  # noqa: E402

module, configs, *products = (
    import_module(f"fp8_recipes.kernels.{name}") for name in ("grouped_promoted", "grouped_configs", "grouped_gemm", "grouped_wgrad")
)
DEVICE = "cuda" if GPU else "cpu"
BLOCKS = [(3, 0, 7, 1, 4), (0, 2, 1, 0), (5,), (0, 0, 8), (0, 0)]
"""Blocks of 128 rows per expert. Promoted every two: none, shorter than, equal to, multiples of and beyond the distance."""
SHAPES = [(128, 256), (200, 520), (72, 96), (264, 384)]
LARGE = [(1408, 2064), (1360, 520)]


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(product, promotion distance) of every call that the kernel got. Without a GPU it is emulated, on three multiprocessors."""
    seen: list[tuple[str, int]] = []
    for name, place in (("promoted_gemm", 4), ("promoted_wgrad", 7)):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, place=place, original=original: seen.append((name, args[place])) or original(*args))
    if not GPU:
        monkeypatch.setattr(configs, "has_gluon", lambda device: True)
        for product in products:
            monkeypatch.setattr(product, "_multiprocessors", lambda device: 3)
        monkeypatch.setattr(module, "launch", gluon_emulator.launch)
    return seen


@pytest.fixture
def wide_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The choice of tiles has one."""
    monkeypatch.setattr(configs, "_RATE", {WIDE: 1.0})
    configs.select_config.cache_clear()
    yield
    configs.select_config.cache_clear()


def integers(shape: tuple[int, ...], fmt: Format, seed: int) -> torch.Tensor:
    """Small ones, so that every sum is exact."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float().to(fmt.dtype).to(DEVICE)


def powers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.exp2(torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()).to(DEVICE)


def transposed(blocks: tuple[int, ...], n: int, k: int, fmt: Format = E4M3, unused: int = 3) -> tuple[GroupedTensor, GroupedTensor, torch.Tensor]:
    """Operands of a wgrad; NaN in the rows that belong to nobody."""
    rows, offsets, _ = group_layout(blocks, DEVICE)
    found = []
    for cols, form in ((n, fmt), (k, E4M3)):
        payload = integers((cols, rows + 128 * unused), form, n + k + cols)
        payload.view(torch.uint8)[:, int(offsets[-1]) :] = 0x7F
        found.append(GroupedTensor(payload, powers((len(blocks), cols), n)))
    return found[0], found[1], offsets


def activation(blocks: tuple[int, ...], k: int, n: int, fmt: Format, stride: int, unused: int = 3) -> tuple[ScaledTensor, GroupedTensor, torch.Tensor]:
    """Operands of a forward product; NaN in the rows that belong to nobody."""
    rows, offsets, block_expert = group_layout(blocks, DEVICE)
    payload = integers((rows + 128 * unused, k), fmt, k)
    payload.view(torch.uint8)[int(offsets[-1]) :] = 0x7F
    block_expert = torch.cat([block_expert, torch.full((unused,), -1, dtype=torch.int32, device=DEVICE)])
    experts = len(blocks)
    b = GroupedTensor(integers((experts, n, k), E4M3, n), powers((experts, n) if stride else (experts,), k))
    return ScaledTensor(payload, powers((rows + 128 * unused,), k + 1), "row"), b, block_expert


def config(stages: int) -> GroupedConfig:
    return replace(WIDE, stages=stages, group=2)


def exact_wgrad(
    blocks: tuple[int, ...], shapes: list[tuple[int, int]], fmt: Format, stages: int, promote: int, dtype: torch.dtype, taken: list, accumulate: bool = False
) -> None:
    """Equal to the reference, and the same again; in both orders of memory, and nothing beside the results."""
    for n, k in shapes:
        a_t, b_t, offsets = transposed(blocks, n, k, fmt)
        before = torch.full((len(blocks), n, k), torch.nan, device=DEVICE)
        if accumulate:
            before = torch.randint(-9, 9, before.shape, generator=torch.Generator().manual_seed(n)).to(before)
            before[offsets[1:] == offsets[:-1]] = torch.nan  # of experts without rows
        want = grouped.grouped_wgrad(a_t, b_t, offsets, out=before.clone(), accumulate=accumulate).to(dtype)
        rows = a_t.payload.shape[1]
        here = promote < rows and (not accumulate or rows > len(blocks) * promote)  # else Triton's kernel, with a tile that suits it
        around = torch.full((len(blocks) + 2, n, k), torch.nan, device=DEVICE, dtype=dtype)
        for out in (around[1:-1], list(around[1:-1].unbind()[::-1])):
            runs = []
            for _ in range(2):
                for matrix, start in zip(out, before, strict=True):
                    matrix.copy_(start)
                grouped_wgrad(a_t, b_t, offsets, out=out, accumulate=accumulate, promote=promote, config=config(stages) if here else None)
                runs.append(out.clone() if isinstance(out, torch.Tensor) else torch.stack(out))
            assert torch.equal(runs[0].nan_to_num(12345), want.nan_to_num(12345)), f"{n} x {k}"
            assert_bitwise(runs[1], runs[0])
        assert bool(around[[0, -1]].isnan().all()), "something was written beside the result"
        assert taken == ([("promoted_wgrad", promote)] * 4 if here else [])
        taken.clear()


def exact_gemm(blocks: tuple[int, ...], k: int, widths: list[int], fmt: Format, stages: int, promote: int, dtype: torch.dtype, taken: list) -> None:
    """Equal to the reference, and the same again; rows of unused blocks and what lies around the result stay as they are."""
    for n, stride in zip(widths, (0, 1) * len(widths), strict=False):
        a, b, block_expert = activation(blocks, k, n, fmt, stride)
        rows = 128 * sum(blocks)
        want = grouped.grouped_gemm(a, b, block_expert, out_dtype=torch.float32)[:rows].to(dtype)
        runs = []
        for _ in range(2):
            around = torch.full((a.shape[0] + 256, n), -7.0, device=DEVICE, dtype=dtype)
            grouped_gemm(a, b, block_expert, out=around[128:-128], promote=promote, config=config(stages))
            assert torch.equal(around[128 : 128 + rows], want), f"{n} x {k}"
            assert bool((around[:128] == -7).all() and (around[128 + rows :] == -7).all()), "something was written beside the result"
            runs.append(around)
        assert_bitwise(runs[1], runs[0])
        used = promote if promote < k else 0
        assert taken == ([("promoted_gemm", used)] * 2 if used else [])
        taken.clear()


CASES = [(3, 256, torch.float32), (3, 384, torch.bfloat16), (2, 256, torch.bfloat16)]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize(("stages", "promote", "dtype"), CASES, ids=str)
def test_exact(blocks: tuple[int, ...], stages: int, promote: int, dtype: torch.dtype, taken: list) -> None:
    """Ragged matrices and groups. Emulated at the worst moments of all that is asynchronous: NaN or an error if anything comes too early or too late."""
    exact_wgrad(blocks, SHAPES, E4M3, stages, promote, dtype, taken)


ADDED = [((3, 0, 7, 1, 4), 256), ((5,), 384), ((0, 0, 8), 256), ((9, 1, 0, 12), 384), ((9, 1, 0, 40), 1024), ((20, 3), 1024)]
"""Blocks per expert and a distance that is shorter than the average group. Of the last two the pending half waits five blocks, more than some groups have."""


@pytest.mark.parametrize(("blocks", "promote"), ADDED, ids=str)
def test_exact_added(blocks: tuple[int, ...], promote: int, taken: list) -> None:
    """To main_grads in fp32; those of experts without rows stay as they are."""
    exact_wgrad(blocks, SHAPES[1:3] if promote == 1024 else SHAPES, E4M3, 3, promote, torch.float32, taken, accumulate=True)


def test_experts_without_rows_are_left_alone(taken: list) -> None:
    """Whatever their scales are: nothing is added to their main_grads, not even zero times NaN."""
    a_t, b_t, offsets = transposed((0, 9, 0, 4, 0), 200, 520)
    for q in (a_t, b_t):
        q.scale[[0, 2, 4]] = torch.nan
    before = torch.ones(5, 200, 520, device=DEVICE)
    out = grouped_wgrad(a_t, b_t, offsets, out=before.clone(), accumulate=True, promote=256, config=config(3))
    assert torch.equal(out[[0, 2, 4]], before[[0, 2, 4]]) and bool(out.isfinite().all())
    assert torch.equal(out, grouped.grouped_wgrad(a_t, b_t, offsets, out=before.clone(), accumulate=True)) and taken == [("promoted_wgrad", 256)]


@pytest.mark.parametrize(("n", "k"), [(512, 120), (256, 376), (256, 8)], ids=str)
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.usefixtures("wide_only")
def test_exact_swapped(n: int, k: int, order: int, taken: list) -> None:
    """New bf16 results whose transpose fewer tiles cover, in both orders of memory; nothing beside them."""
    a_t, b_t, offsets = transposed((3, 0, 7, 1), n, k)
    want = grouped.grouped_wgrad(a_t, b_t, offsets, out=torch.zeros(4, n, k, device=DEVICE)).bfloat16()
    around = torch.full((6, n, k), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    grouped_wgrad(a_t, b_t, offsets, out=list(around[1:-1].unbind()[::order]), promote=256)
    assert torch.equal(around[1:-1].flip(0) if order < 0 else around[1:-1], want) and configs.better_swapped(n, k)
    assert bool(around[[0, -1]].isnan().all()) and taken == [("promoted_wgrad", 256)]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("k", [400, 1040])
@pytest.mark.parametrize(("stages", "promote", "dtype"), CASES, ids=str)
def test_exact_gemm(blocks: tuple[int, ...], k: int, stages: int, promote: int, dtype: torch.dtype, taken: list) -> None:
    exact_gemm(blocks, k, [256, 520, 96], E4M3, stages, promote, dtype, taken)


ON_HOPPER = [(E4M3, 3, 256, torch.float32), (E5M2, 3, 1024, torch.bfloat16), (E5M2, 2, 384, torch.float32)]
"""(format of the gradient or activation, stages, promote, result)"""


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs one Hopper GPU")
@pytest.mark.parametrize("blocks", [(1, 1), (5, 0, 17, 1, 8, 9, 16), (0, 32, 0)], ids=str)
@pytest.mark.parametrize(("fmt", "stages", "promote", "dtype"), ON_HOPPER, ids=str)
def test_exact_on_hopper(blocks: tuple[int, ...], fmt: Format, stages: int, promote: int, dtype: torch.dtype, taken: list) -> None:
    exact_wgrad(blocks, [*SHAPES, *LARGE], fmt, stages, promote, dtype, taken)
    exact_wgrad(blocks, [*SHAPES, *LARGE], fmt, stages, promote, torch.float32, taken, accumulate=True)
    exact_gemm(blocks, 1360, [256, 520, 2064, 4096], fmt, stages, promote, dtype, taken)


def test_promotion_restarts_with_every_tile(taken: list) -> None:
    # Sums of four K blocks: 2**24, 0, 1, 1. One fp32 accumulator loses both ones (2**24 + 1 is a tie to even); promoted after two blocks they survive as 2.
    payload = torch.zeros(64, 1152)
    for start in (0, 640):  # the second expert follows one without and one with a single block
        payload[:, start], payload[:, start + 256], payload[:, start + 384] = 4096, 1, 1
    q = GroupedTensor(payload.to(E5M2.dtype).to(DEVICE), torch.ones(4, 64, device=DEVICE))
    offsets = torch.tensor([0, 512, 512, 640, 1152], dtype=torch.int32, device=DEVICE)
    for promote, want in ((256, 2.0**24 + 2), (384, 2.0**24), (512, 2.0**24)):
        out = grouped_wgrad(q, q, offsets, out=torch.empty(4, 64, 64, device=DEVICE), promote=promote, config=config(3))
        assert out[:, 0, 0].tolist() == [want, 0, 0, want] and taken.pop() == ("promoted_wgrad", promote)
    added = grouped_wgrad(q, q, offsets, out=torch.zeros(4, 64, 64, device=DEVICE), accumulate=True, promote=256, config=config(3))
    assert added[:, 0, 0].tolist() == [2.0**24 + 2, 0, 0, 2.0**24 + 2] and taken == [("promoted_wgrad", 256)]


@pytest.mark.skipif(GPU, reason="without a GPU")
@pytest.mark.parametrize("name", ["wait_products", "wait", "expect", "thread_barrier", "fence", "wait_stores"])
def test_the_emulator_misses_every_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel asks for is needed: idle, it ends in an error or a wrong result."""
    a_t, b_t, offsets = transposed((3, 0, 7), 200, 520)
    want = grouped.grouped_wgrad(a_t, b_t, offsets, out=torch.zeros(3, 200, 520))
    monkeypatch.setattr(gluon_emulator.Program, name, lambda self, *args, deps=(None,), **_: deps[0])
    try:
        got = grouped_wgrad(a_t, b_t, offsets, out=torch.zeros(3, 200, 520), promote=256, config=config(3))
    except AssertionError:
        return
    assert not torch.equal(got, want)


def test_where_it_is_chosen(taken: list) -> None:
    """Promoted sums into a result that TMA writes, or into fp32 if groups are long, whatever the order in memory; with the wide tile."""
    a_t, b_t, offsets = transposed((4, 1), 64, 48)
    memory = torch.zeros(3 * (64 * 48 + 64), device=DEVICE)
    new = memory[: 2 * 64 * 48].view(2, 64, 48)

    def chosen(out=new, promote: int = 256, config: GroupedConfig | None = WIDE, **options) -> bool:
        taken.clear()
        assert grouped_wgrad(a_t, b_t, offsets, out=out, promote=promote, config=config, **options) is out
        return taken == [("promoted_wgrad", promote)]

    assert chosen() and chosen([new[0], new[1]]) and chosen([new[1], new[0]]) and chosen(new.bfloat16())
    small = GroupedConfig(64, 64, stages=2, subtiles=2, warps=4)
    assert not chosen(config=small) and not chosen(promote=0) and not chosen(promote=128) and not chosen(promote=1152), "1152 rows"
    assert chosen(accumulate=True) and not chosen(new.bfloat16(), accumulate=True)
    assert not chosen(list(memory.view(3, -1)[:2, : 64 * 48].reshape(2, 64, 48).unbind())[:1] + [new[1].clone()]), "scattered"
    assert not chosen(memory[1 : 1 + 2 * 64 * 48].view(2, 64, 48)), "unaligned"
    assert configs.select_config(64 * 2816, 2048, 132) == WIDE == configs.select_config(98304, 2816, 132), "what training's shapes take"


def test_which_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not configs.has_gluon(torch.device("cpu")) and configs.has_gluon(torch.device(DEVICE)) == GPU
    assert not configs.in_gluon(WIDE, 256, torch.device("cpu"))


def test_the_total_lies_without_bank_conflicts() -> None:
    """In a step of LDS.128 or STS.128 the 32 threads of a warp reach 512 bytes that lie side by side; no word is reached twice."""
    words = {}  # (row, column): number of the word
    for number in range(128 * 128):
        row, col = (sum(b[i] for bit, b in enumerate(module._WORDS) if number >> bit & 1) for i in (0, 1))
        words[row, col] = number
    assert len(words) == 128 * 128
    for warp in range(8):
        for j in range(0, 128, 8):  # as PTX defines the accumulator of wgmma: a thread has columns 2 (lane % 4) + j, and the next, of two rows
            for lane in range(32):
                row, col = 16 * warp + lane // 4, j + 2 * (lane % 4)
                mine = [words[r, c] for r in (row, row + 8) for c in (col, col + 1)]
                assert mine == [words[16 * warp, j] + 4 * lane + i for i in range(4)]
            assert words[16 * warp, j] % 128 == 0


COMPILE = """
from triton.experimental.gluon.language import NVMMASharedLayout
from fp8_recipes.kernels.grouped_promoted import _OPERAND, _SWIZZLE, _promoted_kernel as kernel
from machine_code import show
for a, dtype, bits, stages, promote, order, stride, add, swapped in (
    ("e4nv", "bf16", 16, 3, 8, 1, 1, 0, 0), ("e5", "fp32", 32, 3, 8, -1, 1, 0, 0), ("e4nv", "fp32", 32, 2, 3, 1, 1, 0, 0),
    ("e4nv", "bf16", 16, 3, 8, 1, 1, 0, 1),
    ("e4nv", "bf16", 16, 3, 8, 0, 0, 0, 0), ("e5", "bf16", 16, 3, 8, 0, 1, 0, 0), ("e4nv", "fp32", 32, 3, 16, -1, 1, 1, 0),
):
    types = dict(a_desc=f"tensordesc<fp8{a}[128, 128],{_OPERAND!r}>", b_desc=f"tensordesc<fp8e4nv[256, 128],{_OPERAND!r}>",
                 out_desc=f"tensordesc<{dtype}[1, 128, 128],{NVMMASharedLayout(_SWIZZLE, bits, 3)!r}>",
                 scale_a_ptr="*fp32", scale_b_ptr="*fp32", table_ptr="*i32")
    multiples = [n for n in kernel.arg_names if n.endswith("_ptr") or n in ("width", "depth")]
    constants = dict(GROUP=8, STAGES=stages, PROMOTE=promote, ORDER=order, STRIDE_B=stride, ADD=add, SWAPPED=swapped, LATER=min(5, promote - 1))
    show(kernel, types, constants, dict(num_warps=8), multiples=multiples, dtype=dtype, a=a, order=order, add=add)
"""


@pytest.mark.slow
@has_compiler
def test_machine_code_streams_products() -> None:
    """Compiled for sm_90: no spills, one product in flight, loads ahead of it, and a total that moves in 16-byte words which meet in no bank."""
    found = listings(COMPILE)
    assert len(found) == 7
    for kernel, lines in found:
        assert kernel["shared"] <= 227 * 1024 and kernel["registers"] <= 255
        assert not spills(lines), kernel
        loops = 2 if kernel["add"] else 1  # before and after what is left of the last tile is sent
        products = [i for i, line in enumerate(lines) if f"QGMMA.64x256x32.F32.E{'5M2' if kernel['a'] == 'e5' else '4M3'}.E4M3" in line]
        assert len(products) == 4 * loops, kernel
        overwrites = [bool(re.search(r"R\d+, U?P\d", lines[i])) for i in products]
        assert overwrites == [True, False, False, False] * loops, f"{kernel}: zeros are added to after a promotion"
        waits = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR.LE gsb0" in line]
        places = [lines[i].split("gsb0, ")[1][:3] for i in waits]
        rounds = [i for i, place in zip(waits, places, strict=True) if place == "0x1"]
        assert len(rounds) == loops and places.count("0x0") <= 3, f"{kernel}: one round, one promotion, one epilogue, and that of an empty contraction"
        loads = [i for i, line in enumerate(lines) if "UTMALDG" in line]
        assert rounds[-1] < loads[-2] < loads[-1] < waits[waits.index(rounds[-1]) + 1], f"{kernel}: a stage is filled between its product and the next round"
        assert any("BAR.SYNC" in line for line in lines[rounds[-1] : loads[-2]]), f"{kernel}: both warpgroups have read the stage"
        for word in ("LDS", "STS"):
            total = [line for line in lines if re.search(rf"\b{word}\.128\b", line)]
            assert len(total) == (32 if word == "LDS" else 16), f"{kernel}: {word}"
            starts = sorted(int((re.search(r"\+0x([0-9a-f]+)\]", line) or ["", "0"])[1], 16) for line in total)
            once = starts[:: len(starts) // 16]
            assert [b - a for a, b in zip(once, once[1:], strict=False)] == [512] * 15, f"{kernel}: {word}: 32 threads, 16 bytes each, side by side"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs one Hopper GPU")
@pytest.mark.usefixtures("wide_only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_random_data_on_hopper(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, taken: list) -> None:
    """Bit for bit what Triton's kernels compute; also where the transpose is computed."""
    blocks, promote = (9, 0, 40, 8, 3), 1024
    a_t, b_t, offsets = transposed(blocks, 2048, 1408)
    a, b, block_expert = activation(blocks, 2064, 1360, E4M3, 1)
    rows = int(offsets[-1])
    for q in (a_t, b_t):
        q.payload[:, :rows] = torch.randn(q.payload.shape[0], rows, device=DEVICE).to(q.payload.dtype)
    a.payload[:rows] = torch.randn(rows, 2064, device=DEVICE).to(a.payload.dtype)
    b.payload[:] = torch.randn(b.payload.shape, device=DEVICE).to(b.payload.dtype)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        grad = grouped_wgrad(a_t, b_t, offsets, out=torch.empty(5, 2048, 1408, device=DEVICE, dtype=dtype), promote=promote)
        return grad, grouped_gemm(a, b, block_expert, out_dtype=dtype, promote=promote)[:rows]

    first, second = run(), run()
    assert len(taken) == 4
    for product in products:
        monkeypatch.setattr(product, "in_gluon", lambda *args: False)
    triton_wgrad = grouped_wgrad(a_t, b_t, offsets, out=torch.empty(5, 2048, 1408, device=DEVICE, dtype=dtype), promote=promote, config=SMALL)
    triton_gemm = grouped_gemm(a, b, block_expert, out_dtype=dtype, promote=promote)[:rows]
    want = grouped.grouped_wgrad(a_t, b_t, offsets, out=torch.empty(5, 2048, 1408, device=DEVICE)), grouped.grouped_gemm(a, b, block_expert)[:rows]
    for got, again, other, reference in zip(first, second, (triton_wgrad, triton_gemm), want, strict=True):
        assert_bitwise(again, got)
        assert_bitwise(other, got)
        assert_snr(reference, got, at_least=56 if dtype == torch.float32 and got is first[0] else 45)
