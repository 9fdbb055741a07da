"""The promoted wgrad in Gluon through `grouped_wgrad`, on a GPU or emulated on the CPU; compiled for Hopper without one."""

from __future__ import annotations

import os
import re
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
from fp8_recipes.kernels.grouped_gemm import grouped_wgrad  # noqa: E402
from fp8_recipes.reference import grouped  # noqa: E402
from fp8_recipes.reference.grouped import GroupedTensor  # noqa: E402

module, wgrad = (import_module(f"fp8_recipes.kernels.{name}") for name in ("grouped_promoted", "grouped_gemm"))
DEVICE = "cuda" if GPU else "cpu"
BLOCKS = [(3, 0, 7, 1, 4), (0, 2, 1, 0), (5,), (0, 0, 8), (0, 0)]
"""Blocks of 128 rows per expert. Promoted every two: none, shorter than, equal to, multiples of and beyond the distance."""
SHAPES = [(128, 256), (200, 520), (72, 96), (264, 384)]
LARGE = [(1408, 2064), (1360, 520)]


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The promotion distance of every call that the kernel got. Without a GPU it is emulated, on three multiprocessors."""
    seen: list[int] = []
    original = module.promoted_wgrad
    monkeypatch.setattr(module, "promoted_wgrad", lambda *args: seen.append(args[5]) or original(*args))
    if not GPU:
        monkeypatch.setattr(wgrad, "has_gluon", lambda device: True)
        monkeypatch.setattr(wgrad, "_multiprocessors", lambda device: 3)
        monkeypatch.setattr(module, "launch", gluon_emulator.launch)
    return seen


def transposed(blocks: tuple[int, ...], n: int, k: int, fmt: Format = E4M3, unused: int = 3) -> tuple[GroupedTensor, GroupedTensor, torch.Tensor]:
    """Small integers and powers of two, so that every result is exact; NaN in the rows that belong to nobody."""
    rows, offsets, _ = group_layout(blocks, DEVICE)
    gen = torch.Generator().manual_seed(n + k)
    found = []
    for cols, form in ((n, fmt), (k, E4M3)):
        payload = torch.randint(-2, 3, (cols, rows + 128 * unused), generator=gen).float().to(form.dtype).to(DEVICE)
        payload.view(torch.uint8)[:, int(offsets[-1]) :] = 0x7F
        found.append(GroupedTensor(payload, torch.exp2(torch.randint(-3, 4, (len(blocks), cols), generator=gen).float()).to(DEVICE)))
    return found[0], found[1], offsets


def config(stages: int) -> GroupedConfig:
    return GroupedConfig(128, 256, stages=stages, subtiles=4, group=2)


def exact(blocks: tuple[int, ...], shapes: list[tuple[int, int]], fmt: Format, stages: int, promote: int, dtype: torch.dtype, taken: list[int]) -> None:
    """Equal to the reference, and the same again; in both orders of memory, and nothing beside the results."""
    for n, k in shapes:
        a_t, b_t, offsets = transposed(blocks, n, k, fmt)
        want = grouped.grouped_wgrad(a_t, b_t, offsets, out=torch.zeros(len(blocks), n, k, device=DEVICE)).to(dtype)
        around = torch.full((len(blocks) + 2, n, k), torch.nan, device=DEVICE, dtype=dtype)
        for out in (around[1:-1], list(around[1:-1].unbind()[::-1])):
            runs = []
            for _ in range(2):
                around[1:-1] = torch.nan
                grouped_wgrad(a_t, b_t, offsets, out=out, promote=promote, config=config(stages))
                runs.append(out.clone() if isinstance(out, torch.Tensor) else torch.stack(out))
            assert torch.equal(runs[0], want), f"{n} x {k}"
            assert_bitwise(runs[1], runs[0])
        assert bool(around[[0, -1]].isnan().all()), "something was written beside the result"
        assert taken.count(promote) == (4 if promote < a_t.payload.shape[1] else 0)
        taken.clear()


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize(("stages", "promote", "dtype"), [(3, 256, torch.float32), (3, 384, torch.bfloat16), (2, 256, torch.bfloat16)], ids=str)
def test_exact(blocks: tuple[int, ...], stages: int, promote: int, dtype: torch.dtype, taken: list[int]) -> None:
    """Ragged matrices and groups. Emulated at the worst moments of all that is asynchronous: NaN or an error if anything comes too early or too late."""
    exact(blocks, SHAPES, E4M3, stages, promote, dtype, taken)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs one Hopper GPU")
@pytest.mark.parametrize("blocks", [(1, 1), (5, 0, 17, 1, 8, 9, 16), (0, 32, 0)], ids=str)
@pytest.mark.parametrize(
    ("fmt", "stages", "promote", "dtype"), [(E4M3, 3, 256, torch.float32), (E5M2, 3, 1024, torch.bfloat16), (E5M2, 2, 384, torch.float32)], ids=str
)
def test_exact_on_hopper(blocks: tuple[int, ...], fmt: Format, stages: int, promote: int, dtype: torch.dtype, taken: list[int]) -> None:
    exact(blocks, [*SHAPES, *LARGE], fmt, stages, promote, dtype, taken)


def test_promotion_restarts_with_every_tile(taken: list[int]) -> None:
    # Sums of four K blocks: 2**24, 0, 1, 1. One fp32 accumulator loses both ones (2**24 + 1 is a tie to even); promoted after two blocks they survive as 2.
    payload = torch.zeros(64, 1152)
    for start in (0, 640):  # the second expert follows one without and one with a single block
        payload[:, start], payload[:, start + 256], payload[:, start + 384] = 4096, 1, 1
    q = GroupedTensor(payload.to(E5M2.dtype).to(DEVICE), torch.ones(4, 64, device=DEVICE))
    offsets = torch.tensor([0, 512, 512, 640, 1152], dtype=torch.int32, device=DEVICE)
    for promote, want in ((256, 2.0**24 + 2), (384, 2.0**24), (512, 2.0**24)):
        out = grouped_wgrad(q, q, offsets, out=torch.empty(4, 64, 64, device=DEVICE), promote=promote, config=config(3))
        assert out[:, 0, 0].tolist() == [want, 0, 0, want] and taken.pop() == promote


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


def test_where_it_is_chosen(taken: list[int]) -> None:
    """Promoted into a result that TMA writes and nothing is added to, whatever the order in memory; with the wide tile."""
    configs = import_module("fp8_recipes.kernels.grouped_configs")
    assert not configs.has_gluon(torch.device("cpu")) and configs.has_gluon(torch.device(DEVICE)) == GPU
    assert configs.is_wide(None) and configs.is_wide(WIDE) and not configs.is_wide(SMALL)
    a_t, b_t, offsets = transposed((4, 1), 64, 48)
    memory = torch.zeros(3 * (64 * 48 + 64), device=DEVICE)
    new = memory[: 2 * 64 * 48].view(2, 64, 48)

    def chosen(out=new, promote: int = 256, **options) -> bool:
        taken.clear()
        assert grouped_wgrad(a_t, b_t, offsets, out=out, promote=promote, **options) is out
        return taken == [promote]

    assert chosen() and chosen(config=WIDE) and chosen([new[0], new[1]]) and chosen([new[1], new[0]]) and chosen(new.bfloat16())
    small = GroupedConfig(64, 64, stages=2, subtiles=2, warps=4)
    assert not chosen(config=small) and not chosen(promote=0) and not chosen(promote=128) and not chosen(promote=1152), "1152 rows"
    assert not chosen(accumulate=True) and not chosen(new.bfloat16(), accumulate=True)
    assert not chosen(list(memory.view(3, -1)[:2, : 64 * 48].reshape(2, 64, 48).unbind())[:1] + [new[1].clone()]), "scattered"
    assert not chosen(memory[1 : 1 + 2 * 64 * 48].view(2, 64, 48)), "unaligned"


def test_stages_that_do_not_fit() -> None:
    a_t, b_t, offsets = transposed((4, 1), 64, 48)
    with pytest.raises(ValueError, match="stages=4 of the promoted wgrad must be 2 or 3"):
        module.promoted_wgrad(a_t, b_t, offsets, torch.zeros(2, 64, 48, device=DEVICE), 1, 256, GroupedConfig(128, 256, stages=4, subtiles=1), 3)


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
from fp8_recipes.kernels.grouped_promoted import _OPERAND, _SWIZZLE, _promoted_wgrad_kernel as kernel
from machine_code import show
for a, dtype, bits, stages, promote, order in (("e4nv", "bf16", 16, 3, 8, 1), ("e5", "fp32", 32, 3, 8, -1), ("e4nv", "fp32", 32, 2, 3, 1)):
    types = dict(a_desc=f"tensordesc<fp8{a}[128, 128],{_OPERAND!r}>", b_desc=f"tensordesc<fp8e4nv[256, 128],{_OPERAND!r}>",
                 out_desc=f"tensordesc<{dtype}[1, 128, 128],{NVMMASharedLayout(_SWIZZLE, bits, 3)!r}>",
                 scale_a_ptr="*fp32", scale_b_ptr="*fp32", offsets_ptr="*i32")
    multiples = [n for n in kernel.arg_names if n.endswith("_ptr") or n in ("rows", "K")]
    show(kernel, types, dict(GROUP=8, STAGES=stages, PROMOTE=promote, ORDER=order), dict(num_warps=8), multiples=multiples, dtype=dtype, a=a)
"""


@pytest.mark.slow
@has_compiler
def test_machine_code_streams_products() -> None:
    """Compiled for sm_90: no spills, one product in flight, loads ahead of it, and a total that moves in 16-byte words which meet in no bank."""
    found = listings(COMPILE)
    assert len(found) == 3
    for kernel, lines in found:
        assert kernel["shared"] <= 227 * 1024 and kernel["registers"] <= 255
        assert not spills(lines), kernel
        products = [i for i, line in enumerate(lines) if f"QGMMA.64x256x32.F32.E{'5M2' if kernel['a'] == 'e5' else '4M3'}.E4M3" in line]
        assert len(products) == 4, kernel
        overwrites = [bool(re.search(r"R\d+, U?P\d", lines[i])) for i in products]
        assert overwrites == [True, False, False, False], f"{kernel}: zeros are added to after a promotion"
        waits = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR.LE gsb0" in line]
        assert [lines[i].split("gsb0, ")[1][:3] for i in waits] == ["0x1", "0x0", "0x0"], f"{kernel}: one round, one promotion, one epilogue"
        loads = [i for i, line in enumerate(lines) if "UTMALDG" in line]
        assert waits[0] < loads[-2] < loads[-1] < waits[1], f"{kernel}: a stage is filled between the wait for its product and the next round"
        assert any("BAR.SYNC" in line for line in lines[waits[0] : loads[-2]]), f"{kernel}: both warpgroups have read the stage"
        for word in ("LDS", "STS"):
            total = [line for line in lines if re.search(rf"\b{word}\.128\b", line)]
            assert len(total) == (32 if word == "LDS" else 16), f"{kernel}: {word}"
            starts = sorted(int((re.search(r"\+0x([0-9a-f]+)\]", line) or ["", "0"])[1], 16) for line in total)
            once = starts[:: len(starts) // 16]
            assert [b - a for a, b in zip(once, once[1:], strict=False)] == [512] * 15, f"{kernel}: {word}: 32 threads, 16 bytes each, side by side"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs one Hopper GPU")
def test_random_data_on_hopper() -> None:
    a_t, b_t, offsets = transposed((9, 0, 40, 8, 3), 1360, 2064)
    for q in (a_t, b_t):
        q.payload[:, : int(offsets[-1])] = torch.randn(q.payload.shape[0], int(offsets[-1]), device=DEVICE).to(q.payload.dtype)
    want = grouped.grouped_wgrad(a_t, b_t, offsets, out=torch.empty(5, 1360, 2064, device=DEVICE))
    first, second, tile = (grouped_wgrad(a_t, b_t, offsets, out=torch.empty_like(want), promote=1024, config=c) for c in (None, None, SMALL))
    assert_bitwise(second, first)
    assert_snr(want, first, at_least=56)
    assert_bitwise(tile, first)  # the kernel of the small tile sums in the same order
