"""grouped_fold_transpose: bit for bit the reference in the columns of used rows, whatever the groups; compiled for Hopper without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from assertions import assert_bitwise
from data import GROUPS, all_codes, group_layout, nasty
from machine_code import has_compiler

from fp8_recipes import reference
from fp8_recipes.formats import E4M3, E5M2, FORMATS, pow2
from fp8_recipes.kernels import fold_transpose as alone
from fp8_recipes.kernels import grouped_transpose as module
from fp8_recipes.kernels.grouped_transpose import grouped_fold_transpose
from fp8_recipes.reference import grouped
from fp8_recipes.tensor import ScaledTensor

formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)


def check(q: ScaledTensor, offsets: torch.Tensor, block_expert: torch.Tensor) -> grouped.GroupedTensor:
    used = int(offsets[-1])
    got, want = grouped_fold_transpose(q, offsets, block_expert), grouped.grouped_fold_transpose(q, offsets, block_expert)
    assert got.payload.shape == want.payload.shape
    assert_bitwise(got.scale, want.scale, "scale")
    assert_bitwise(got.payload[:, :used], want.payload[:, :used], "payload")
    assert (got.payload.view(torch.uint8)[:, used:] == 0x7F).all(), "columns of unused rows were written"
    return got


@pytest.mark.parametrize("blocks", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(("cols", "fmt"), [(128, E5M2), (272, E4M3), (36, E5M2)], ids=str)
def test_groups(device, blocks, cols, fmt):
    """Heavy tails, NaN and Inf; the last rows of every group are padding; unused rows hold garbage, scales and tile exponents included."""
    rows, offsets, block_expert = group_layout(blocks, device)
    x = nasty(rows, cols, device)
    for stop in offsets.tolist()[1:]:
        x[max(stop - 100, 0) : stop] = 0
    q = reference.quantize(x, "row", fmt)
    used = int(offsets[-1])
    q.payload.view(torch.uint8)[used:], q.tile_exponent[used:] = 0x55, 254
    got = check(q, offsets, block_expert)
    empty = (offsets[1:] == offsets[:-1]).nonzero().flatten()
    assert (got.scale[empty] == grouped.SMALLEST_SCALE).all()


@pytest.mark.parametrize(("granularity", "fold"), [("micro", "row"), ("tile", "row"), ("tile", None), ("micro", None)])
def test_granularities(device, granularity, fold):
    rows, offsets, block_expert = group_layout((1, 0, 2), device)
    check(reference.quantize(nasty(rows, 160, device), granularity, fold=fold), offsets, block_expert)


@formats
def test_every_code_and_shift(device, fmt):
    """256 codes x shifts -64 .. 63 in the first expert; the second, of one scale, must come out as it went in."""
    rows, offsets, block_expert = group_layout((1, 1), device)
    shifts = torch.cat((torch.arange(-64, 64), torch.zeros(256))).int()
    q = ScaledTensor(
        all_codes().repeat(rows, 1).view(fmt.dtype).to(device),
        pow2(shifts).to(device),
        "row",
        tile_exponent=torch.full((rows, 2), 127, dtype=torch.uint8, device=device),
    )
    check(q, offsets, block_expert)


def test_each_expert_has_its_own_target(device):
    """The largest exponent is found wherever it stands in the group, and does not reach the neighbours."""
    rows, offsets, block_expert = group_layout((1, 3, 1), device)
    for hot in (128, 300, 511):
        x = torch.ones(rows, 128, dtype=torch.bfloat16, device=device)
        x[hot] = 1000.0
        got = check(reference.quantize(x, "row"), offsets, block_expert)
        assert (got.scale[1] == 4.0).all() and (got.scale[[0, 2]] == 2.0**-8).all()


def test_many_blocks_in_one_expert(device, monkeypatch):
    """More blocks than the maximum is taken over at a time."""
    monkeypatch.setattr(module, "CHUNK", 2)
    rows, offsets, block_expert = group_layout((0, 5, 1), device)
    x = torch.ones(rows, 4, dtype=torch.bfloat16, device=device)
    x[4 * 128 + 5] = 1000.0
    check(reference.quantize(x, "row"), offsets, block_expert)


def test_one_expert_is_fold_transpose(device):
    _, offsets, _ = group_layout((2,), device)
    q = reference.quantize(nasty(256, 160, device), "row")
    got = grouped_fold_transpose(q, offsets, torch.zeros(2, dtype=torch.int32, device=device))
    want = alone(q)
    assert_bitwise(got.payload, want.payload)
    assert_bitwise(got.scale[0], want.scale)


def test_a_scale_that_is_no_power_of_two_becomes_nan(device):
    rows, offsets, block_expert = group_layout((1,), device)
    q = reference.quantize(torch.ones(rows, 128, dtype=torch.bfloat16, device=device), "row")
    q.scale[3] = 3.0
    payload = grouped_fold_transpose(q, offsets, block_expert).payload.float()[:, :128]
    assert payload[:, 3].isnan().all() and int(payload.isnan().sum()) == 128


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda q, o, b: (ScaledTensor(q.payload, q.scale, "row"), o, b), ValueError, "tile exponents"),
        (lambda q, o, b: (reference.quantize(torch.ones(130, 128, device=o.device), "row"), o, b), ValueError, "multiple of 128 rows, got 130"),
        (lambda q, o, b: (reference.quantize(torch.ones(256, 6, device=o.device), "row"), o, b), ValueError, "cols=6"),
        (lambda q, o, b: (ScaledTensor(q.payload[:, :64], q.scale, "row", q.tile_exponent), o, b), ValueError, "not contiguous"),
        (lambda q, o, b: (q, o, b[:1]), ValueError, "block_expert must be"),
        (lambda q, o, b: (q, o.long(), b), TypeError, "int32"),
    ],
)
def test_bad_input(device, change, error, match):
    rows, offsets, block_expert = group_layout((1,), device)
    q = reference.quantize(torch.ones(rows, 128, dtype=torch.bfloat16, device=device), "row")
    with pytest.raises(error, match=match):
        grouped_fold_transpose(*change(q, offsets, block_expert))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fp8_recipes.kernels.grouped_transpose import _block_maximum_kernel, _grouped_fold_transpose_kernel
types = dict(exponent_ptr="*u8", maximum_ptr="*u8", scale_ptr="*fp32", offsets_ptr="*i32", block_expert_ptr="*i32", payload_ptr="*i32", out_ptr="*i32")
for kernel, constants, source in (
    (_block_maximum_kernel, dict(TILES=32, OVERLAP=True), ""),
    (_grouped_fold_transpose_kernel, dict(GROUP=0, E5M2=False, CHUNK=128, OVERLAP=True), "*fp32"),
    (_grouped_fold_transpose_kernel, dict(GROUP=0, E5M2=True, CHUNK=128, OVERLAP=True), "*fp32"),
    (_grouped_fold_transpose_kernel, dict(GROUP=32, E5M2=False, CHUNK=128, OVERLAP=True), "*u8"),
):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, source if n == "source_ptr" else "i32") for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n in ("rows", "cols")}
    built = triton.compile(ASTSource(kernel, signature, constexprs=constants, attrs=attributes), target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))
    lines = built.asm["ptx"].splitlines()
    print(sum("ld.global" in line and ".v4.b32" in line for line in lines), sum("st.global" in line and ".v4.b32" in line for line in lines))
"""


@has_compiler
def test_machine_code_moves_16_bytes_at_a_time():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(counts) == 4
    assert all(loads >= 8 and stores >= 8 for loads, stores in counts[1:]), counts


@pytest.mark.gpu
@pytest.mark.parametrize("cols", [2048, 7168, 1408])
def test_real_sizes(device, cols):
    generator = torch.Generator().manual_seed(0)
    blocks = tuple(torch.randint(0, 8, (32,), generator=generator).tolist())
    rows, offsets, block_expert = group_layout(blocks, device)
    for fmt in FORMATS.values():
        check(reference.quantize(nasty(rows, cols, device), "row", fmt), offsets, block_expert)
