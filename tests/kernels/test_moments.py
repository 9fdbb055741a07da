from __future__ import annotations

import re
from collections import Counter
from importlib import import_module

import pytest
import torch
from machine_code import has_compiler, listings, spills
from torch.utils._python_dispatch import TorchDispatchMode

from fp8_recipes import kernels, ops, reference
from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.kernels import moments
from fp8_recipes.megatron.metrics import _add_predicted, _fused_observer
from fp8_recipes.metrics import MonitorHooks, Target
from fp8_recipes.reference.moments import FIELDS, WIDTH, joined, neutral
from fp8_recipes.tensor import ScaledTensor
from fp8_recipes.weight_scaling import WeightScaling


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Counts and maxima are equal, sums agree to fp32 accuracy within a row."""
    assert actual.dtype == torch.float64 and tuple(actual.shape) == (WIDTH,)
    for name, a, b in zip(FIELDS, actual.tolist(), expected.tolist(), strict=False):
        tolerance = 1e-5 if name in ("kurtosis", "sum2", "sum4") else 0
        assert a == pytest.approx(b, rel=tolerance, abs=0), name


def data(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Heavy tails, rows from 1e-20 to 1e12 with values far below their row, a row of zeros, NaN and Inf."""
    g = torch.Generator().manual_seed(rows * cols)
    x = torch.randn(rows, cols, generator=g) * torch.randn(rows, cols, generator=g).exp()
    top = 4 if dtype == torch.float16 else 12
    x *= torch.logspace(-top if dtype == torch.float16 else -20, top - 1, rows)[:, None]
    x[:, 5::7] *= 1e-12
    x = x.to(dtype)
    if rows > 2:
        x[1] = 0
        x[2, 0], x[2, cols // 2] = float("nan"), float("-inf")
    return x.to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (5, 1000), (19, 2096)])
def test_moments_of_a_tensor(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
    x = data(rows, cols, dtype, device)
    check(moments(x), reference.moments(x))


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
@pytest.mark.parametrize("per_row", [False, True])
def test_under_a_given_scale(per_row: bool, fmt, device: torch.device) -> None:
    x = data(6, 256, torch.bfloat16, device)
    scale = torch.logspace(-27, 5, 6).to(device) if per_row else torch.tensor(2.0**-3, device=device)
    expected = reference.moments(x, scale=scale, fmt=fmt)
    assert expected[7] > 0 and expected[8] > 0
    check(moments(x, scale=scale, fmt=fmt), expected)


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
@pytest.mark.parametrize(("granularity", "fold"), [("row", None), ("tile", "row"), ("tensor", None), ("tile", None), ("block", None), ("micro", None)])
@pytest.mark.parametrize("source", [True, False])
def test_beside_or_from_a_payload(source: bool, granularity: str, fold: str | None, fmt, device: torch.device) -> None:
    for cols in (400, 4400):
        x = data(9, cols, torch.bfloat16, device)
        q = reference.quantize(x, granularity, fmt, fold=fold)
        given = x if source else None
        expected = reference.moments(given, q)
        assert expected[7] > 0
        if fold:
            assert expected[9] > 0
        check(moments(given, q), expected)


def test_parts_and_accumulation_repeat_bit_for_bit(device: torch.device) -> None:
    x = torch.randn(150, 64, generator=torch.Generator().manual_seed(5)).to(device)
    expected = reference.moments(x * 2, reference.quantize(x * 2, "row"), out=reference.moments(x))
    tables = [neutral(7, device=device), neutral(7, device=device), neutral(1000, device=device), neutral(device=device)]
    for out in tables:
        assert moments(x, out=out) is out
        moments(x * 2, reference.quantize(x * 2, "row"), out=out)
        check(out if out.dim() == 1 else joined(out), expected)
    assert torch.equal(tables[0], tables[1])
    assert (tables[0][:, 0] > 0).all() and (tables[2][:, 0] > 0).sum() == 19  # eight rows a program


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [0.0, 2.0**-60, 2.0**-19, 2.0**23, 2.0**60])
def test_rows_far_from_one(factor: float, dtype: torch.dtype, device: torch.device) -> None:
    """Beyond the range in which sums of x^4 are taken as they come."""
    x = torch.randn(20, 1100, generator=torch.Generator().manual_seed(6))
    x[3::4] *= factor
    x = x.to(dtype).to(device)
    check(moments(x), reference.moments(x))
    q = reference.quantize(x, "tensor")
    check(moments(x, q), reference.moments(x, q))


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
def test_special_codes_in_a_payload(fmt, device: torch.device) -> None:
    q = reference.quantize(data(24, 600, torch.bfloat16, device), "tile", fmt, fold="row")
    for row, code in zip(range(8, 24, 2), (0x7B, 0x7C, 0x7D, 0x7E, 0x7F, 0x80, 0xFC, 0xFF), strict=True):
        q.payload.view(torch.uint8)[row, 101 + row // 2] = code
    q.payload.view(torch.uint8)[9] = 0x7F
    for at in range(8, 24, 8):  # eight rows that are read again, and eight that are not
        check(moments(None, q), reference.moments(None, q))
        q.payload.view(torch.uint8)[at : at + 8] = 0


def test_a_fold_that_keeps_all_that_keeps_nothing_and_everything_between(device: torch.device) -> None:
    for fmt in (E4M3, E5M2):
        codes = torch.arange(256, dtype=torch.uint8).repeat(70, 1)
        q = ScaledTensor(codes.view(fmt.dtype), torch.ones(70), "row", torch.full((70, 2), 127, dtype=torch.uint8))
        q.scale *= 2.0 ** torch.arange(-64, 6)
        q = ScaledTensor(q.payload.to(device), q.scale.to(device), "row", q.tile_exponent.to(device))
        actual = moments(None, q)
        check(actual, reference.moments(None, q))
        assert 0 < actual[9] < 70 * 252


def test_rows_without_a_token_do_not_count(device: torch.device) -> None:
    x = data(70, 200, torch.bfloat16, device)  # more rows than a program takes of the tile exponents
    q = reference.quantize(x, "tile", fold="row")
    source = torch.arange(70, dtype=torch.int32)
    source[[0, 7, 20, 69]] = -1
    source[30:66] = -1
    source = source.to(device)
    q.payload.view(torch.uint8)[40] = 0x7F
    q.tile_exponent[41] = 254
    for given in (None, x):
        check(moments(given, q, source=source), reference.moments(given, q, source=source))
    here = source >= 0
    assert moments(None, q, source=source)[2] == here.sum() * 200
    none = moments(None, q, source=torch.full_like(source, -1))
    assert torch.equal(none, neutral(device=device))


def test_row_sums(device: torch.device) -> None:
    x = data(5, 160, torch.bfloat16, device)
    actual, expected = (torch.zeros(5, 2, dtype=torch.float64, device=device) for _ in range(2))
    check(moments(x, row_sums=actual), reference.moments(x, row_sums=expected))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


class _Ops(TorchDispatchMode):
    """Counts torch's operations that are more than another view."""

    VIEWS = ("detach", "view", "slice", "select", "unsqueeze", "expand", "unbind", "alias", "t")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches by kernel, none of them carried out; `ops` takes the kernels."""
    found: Counter[str] = Counter()
    monkeypatch.setattr(import_module("fp8_recipes.kernels.moments"), "launch", lambda kernel, *args, **constants: found.update([kernel.__name__]))
    monkeypatch.setattr(ops, "_backend", lambda t: kernels)
    monkeypatch.setattr(ops, "moment_parts", lambda device: kernels.MOMENT_PARTS)
    return found


def test_what_an_observed_microbatch_costs(launched: Counter[str], device: torch.device) -> None:
    """A dense layer under a folded recipe: three activations, inputs and gradients of four linears. One launch each, one for the targets of each fold, and
    no other work on the device; FC2's input is read once for two names."""
    qkv, layer = torch.nn.Identity(), torch.nn.Identity()
    hooks = MonitorHooks([Target("layers.1.qkv", qkv), Target("layers.1.block_output", layer)])
    observer = _fused_observer(hooks, layer, "layers.1")
    x = torch.randn(4, 2, 256).bfloat16().to(device)
    rows = x.view(8, 256)
    q = reference.quantize(rows, "tile", fold="row")

    def microbatch() -> None:
        qkv(x)
        layer(x)
        for linear in ("linear_qkv", "linear_proj"):
            for role in ("input", "grad"):
                hooks.observe(f"layers.1.self_attention.{linear}", role, rows, q)
        observer("linear_fc1", "input", None, q)
        observer("linear_fc2", "input", None, q)
        observer("linear_fc2", "grad", rows, q)
        observer("linear_fc1", "grad", None, q)

    microbatch()  # the first one makes rows of the table
    launched.clear()
    with _Ops() as counted:
        microbatch()
    assert launched == {"_moments_kernel": 10, "_target_kernel": 8}
    assert not counted.found
    assert len(hooks.table.reduce()) == 11


def test_what_the_end_of_an_observed_step_costs(launched: Counter[str], device: torch.device) -> None:
    """A launch for each weight under a predicted scale; everything else does not depend on how many there are."""
    counts = []
    for number in (3, 40):
        clock = WeightScaling()
        weights = [torch.nn.Parameter(torch.randn(16, 32, device=device)) for _ in range(number)]
        clock.attach(torch.optim.AdamW(weights))
        states = [clock.track(w) for w in weights]
        for w, state in zip(weights, states, strict=True):
            state.amax_and_increment(w)
        hooks = MonitorHooks([])
        named = [(f"layers.{n}.weight", w) for n, w in enumerate(weights)]
        hooks.before_reading.append(lambda hooks=hooks, named=named: _add_predicted(hooks, named))
        hooks.end_step(1)
        hooks.active = True
        launched.clear()
        with _Ops() as counted:
            readings = hooks.end_step(10)
        assert readings is not None and len(readings) == number
        assert launched == {"_moments_kernel": number}
        counts.append(counted.found)
    assert counts[0] == counts[1]
    assert counts[0].total() <= 25, counts[0]


def test_bad_arguments_raise_before_a_launch(device: torch.device) -> None:
    with pytest.raises(ValueError, match="needs x"):
        moments(None)
    with pytest.raises(TypeError, match="int32"):
        moments(torch.ones(2, 2, dtype=torch.int32, device=device))
    q = reference.quantize(torch.ones(2, 64, device=device), "row")
    with pytest.raises(ValueError, match="not contiguous"):
        moments(None, ScaledTensor(q.payload[:, ::2], q.scale, "row"))


COMPILE = """
from machine_code import show
from importlib import import_module
m = import_module("fp8_recipes.kernels.moments")
types = dict(x_ptr="*bf16", payload_ptr="*i32", scale_ptr="*fp32", target_ptr="*i32", source_ptr="*i32", out_ptr="*fp64", row_sum_ptr="*fp64")
for case, x, payload, scale in (("x", 1, 0, 0), ("x, scale", 1, 0, 1), ("x, q", 1, 1, 1), ("q", 0, 1, 1)):
    constants = dict(X=bool(x), PAYLOAD=bool(payload), SCALE=bool(scale), FOLD=bool(payload), SOURCE=False, ROW_SUMS=False, E5M2=False, ROWS=m.ROWS)
    show(m._moments_kernel, types, constants, dict(num_warps=m.ROWS, maxnreg=m.REGISTERS), case=case, warps=m.ROWS, programs=m.MOMENT_PARTS // 132)
"""
STEPS = {"x": [5.7], "x, scale": [11.0], "x, q": [3.0, 8.7], "q": [8.4]}
"""Instructions that a value may take in the loops over most of a row. An H200 issues about 14 in the time in which it reads two bytes of every thread."""


def _loops(lines: list[str]) -> list[list[str]]:
    """Instructions of the innermost loops of a listing."""
    found, labels, seen = [], {}, []
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(seen)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            seen.append(line)
            back = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
            if back and labels.get(back.group(1), len(seen)) < len(seen) - 1:
                found.append((labels[back.group(1)], len(seen)))
    return [seen[a:b] for a, b in found if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in found)]


@has_compiler
def test_machine_code_reads_at_the_speed_of_memory() -> None:
    """Compiled for sm_90 without a GPU: few instructions for a value, four loads of 16 bytes in a step, nothing spilled there, and all programs resident."""
    found = listings(COMPILE)
    assert [kernel["case"] for kernel, _ in found] == list(STEPS)
    for kernel, lines in found:
        steps = [loop for loop in _loops(lines) if sum("LDG.E.128" in line for line in loop) == 4]
        values = [64 if any("IDP" in line for line in loop) else 32 for loop in steps]
        assert len(steps) == len(STEPS[kernel["case"]]), kernel
        for loop, count, most in zip(steps, values, STEPS[kernel["case"]], strict=True):
            assert len(loop) <= most * count, f"{kernel}: {len(loop)} instructions for {count} values"
            assert not spills(loop) and not any("BAR" in line or "SHFL" in line for line in loop), kernel
        threads = 32 * kernel["warps"] * kernel["programs"]
        assert threads * kernel["registers"] <= 65536 and threads * 64 >= 32 << 10, f"{kernel}: {threads} threads on a multiprocessor"
