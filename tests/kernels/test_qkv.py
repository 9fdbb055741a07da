"""qkv_tanh_rotary and its backward: reference and kernel against float64, MHA and GQA, ragged numbers of tokens; alphas' gradients in one order; the angles."""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module

import pytest
import torch
import triton
import triton.language as tl
from assertions import assert_bitwise, assert_nearly_bitwise
from machine_code import has_compiler, listings, spills, wide_loads, wide_stores

from fp8_recipes import kernels, reference
from fp8_recipes.reference.qkv import LARGEST_ANGLE

module = import_module("fp8_recipes.kernels.qkv")
BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(5, 1, 2, 4, 128), (3, 2, 3, 1, 128), (7, 3, 2, 2, 64), (1, 1, 1, 1, 64), (2, 1, 5, 3, 64), (4, 1, 1, 7, 16), (1, 2, 2, 6, 256)]
"""Positions, rows a position, groups, query heads a group, size of a head."""
STEP = {BF16: 2.0**-8, torch.float16: 2.0**-11, FP32: 1e-5}
"""Half of the distance to the next number, relative."""
SMALLEST = {BF16: 1e-30, torch.float16: 2.0**-25, FP32: 1e-30}
Inputs = tuple[torch.Tensor, ...]


def inputs(positions: int, batch: int, groups: int, heads: int, head: int, device: torch.device, dtype: torch.dtype = BF16) -> tuple[Inputs, Inputs]:
    """((dq, dk, dv), (mixed, alpha_q, alpha_k, angles)): saturated and tiny values in mixed; angles in wider rows, as Megatron's, the last ones large."""
    normal = partial(torch.randn, generator=torch.Generator(device).manual_seed(positions * groups + head), device=device)
    rows = positions * batch
    mixed = normal(rows, groups * (heads + 2) * head)
    mixed *= torch.exp(2 * normal(mixed.shape))
    mixed.view(-1)[0] = 200.0
    mixed.view(-1)[1] = -1e-3
    gradients = tuple(normal(rows, groups * n * head).to(dtype) for n in (heads, 1, 1))
    place = torch.arange(positions, device=device) + (8192 - positions) * (torch.arange(positions, device=device) > positions // 2)
    frequency = 10000.0 ** (-torch.arange(0, head, 2, device=device) / head)
    angles = torch.outer(place.float(), frequency).repeat(1, 2)[:, : head // 2]
    alphas = torch.tensor(0.5, device=device, dtype=dtype), torch.tensor(0.71, device=device)
    return gradients, (mixed.to(dtype), *alphas, angles)


def truth(gradients: Inputs, given: Inputs, heads: int) -> tuple[Inputs, Inputs, Inputs]:
    """((q, k, v), (dmixed, dalpha_q, dalpha_k), sums of magnitudes of the alphas' terms) in fp64, by autograd through complex numbers."""
    mixed, alpha_q, alpha_k, angles = (t.double() for t in given)
    head, rows = 2 * angles.shape[1], mixed.shape[0]
    mixed, alpha_q, alpha_k = mixed.requires_grad_(), alpha_q.requires_grad_(), alpha_k.requires_grad_()
    turn = torch.polar(torch.ones_like(angles), angles).repeat_interleave(rows // angles.shape[0], dim=0)[:, None, None]
    slots = mixed.view(rows, -1, heads + 2, head)
    terms = []

    def rotated(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        z = (alpha * x).detach()
        # autograd's 1 - tanh^2 is zero from |z| = 19 on, in fp64 too
        slope = 1 / torch.cosh(z).square()
        t = torch.tanh(z) + slope * (alpha * x - z)
        terms.append((t, slope * x.detach()))
        y = torch.complex(*t.chunk(2, dim=-1)) * turn
        return torch.cat((y.real, y.imag), dim=-1).reshape(rows, -1)

    outputs = rotated(slots[:, :, :heads], alpha_q), rotated(slots[:, :, heads : heads + 1], alpha_k), slots[:, :, -1].reshape(rows, -1)
    found = torch.autograd.grad(outputs, (mixed, alpha_q, alpha_k, *(t for t, _ in terms)), [g.double() for g in gradients])
    sizes = tuple((dt * slope_x).abs().sum() for dt, (_, slope_x) in zip(found[3:], terms, strict=True))
    return tuple(y.detach() for y in outputs), found[:3], sizes


def check(backend, gradients: Inputs, given: Inputs, heads: int) -> None:
    expected, expected_gradients, sizes = truth(gradients, given, heads)
    mixed = given[0]
    step = STEP[mixed.dtype]
    got = backend.qkv_tanh_rotary(*given, heads)
    for y, e in zip(got, expected, strict=True):
        assert y.dtype == mixed.dtype and y.is_contiguous()
        assert ((y.double() - e).abs() <= step * e.abs() + 1e-6).all(), "rounded once"
    assert_bitwise(got[2].double(), expected[2], "values are copied")
    dmixed, *dalphas = backend.qkv_tanh_rotary_backward(*gradients, *given, heads)
    e = expected_gradients[0]
    # an error of 2e-7 in z changes the slope by 4e-7 |z| and the rotation has errors of the size of the pair, at a place where the slope may be small
    assert dmixed.dtype == mixed.dtype and dmixed.is_contiguous()
    slope = torch.cosh(0.5 * mixed.double()).pow(-2)
    assert ((dmixed.double() - e).abs() <= (1.01 * step + 4e-7 * mixed.double().abs()) * e.abs() + 4e-6 * slope + SMALLEST[mixed.dtype]).all()
    for dalpha, alpha, exact, size in zip(dalphas, given[1:3], expected_gradients[1:], sizes, strict=True):
        assert dalpha.dtype == alpha.dtype and dalpha.shape == ()
        assert (dalpha.double() - exact).abs() <= STEP[alpha.dtype] * exact.abs() + 4e-6 * size + 1e-30
    for a, b in zip(backend.qkv_tanh_rotary_backward(*gradients, *given, heads), (dmixed, *dalphas), strict=True):
        assert_bitwise(a, b, "twice")


@pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "kernel"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(device, shape, backend):
    check(backend, *inputs(*shape, device), shape[3])


@pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "kernel"])
@pytest.mark.parametrize("dtype", [FP32, torch.float16], ids=str)
def test_other_dtypes(device, dtype, backend):
    check(backend, *inputs(9, 1, 2, 4, 64, device, dtype), 4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_reference_in_bf16(device, shape):
    gradients, given = inputs(*shape, device)
    for y, e in zip(kernels.qkv_tanh_rotary(*given, shape[3]), reference.qkv_tanh_rotary(*given, shape[3]), strict=True):
        assert_nearly_bitwise(y, e, 2e-3)
    got, expected = (m.qkv_tanh_rotary_backward(*gradients, *given, shape[3])[0] for m in (kernels, reference))
    assert_nearly_bitwise(got, expected, 4e-3)


def test_bound_and_rotation_one_after_the_other(device):
    """What the operation replaces, with a rounding in between: `tanh_bound` on each part, then the rotation; in fp32 the same numbers."""
    positions, groups, heads, head = 6, 2, 4, 64
    gradients, given = inputs(positions, 1, groups, heads, head, device, FP32)
    mixed, alpha_q, alpha_k, angles = given
    slots = mixed.view(positions, groups, heads + 2, head)
    x = (slots[:, :, :heads].reshape(positions, -1), slots[:, :, heads].reshape(positions, -1))

    def rotate(t: torch.Tensor, sign: int) -> torch.Tensor:
        first, second = t.view(positions, -1, head).chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], sign * angles.sin()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).view(positions, -1)

    for got, part, alpha in zip(kernels.qkv_tanh_rotary(*given, heads), x, (alpha_q, alpha_k), strict=False):
        torch.testing.assert_close(got, rotate(kernels.tanh_bound(part, alpha.float()), 1), rtol=1e-5, atol=1e-6)
    dmixed, *dalphas = kernels.qkv_tanh_rotary_backward(*gradients, *given, heads)
    slots = dmixed.view(slots.shape)
    for part, dy, dx, alpha, dalpha in zip(x, gradients, (slots[:, :, :heads], slots[:, :, heads]), (alpha_q, alpha_k), dalphas, strict=False):
        expected, expected_alpha = kernels.tanh_bound_backward(rotate(dy, -1), part, alpha.float())
        torch.testing.assert_close(dx.reshape(expected.shape), expected, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(dalpha, expected_alpha, rtol=1e-5, atol=1e-5)


@triton.jit
def _cos_sin_kernel(angle_ptr, cos_ptr, sin_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cos, sin = module.cos_sin(tl.load(angle_ptr + at))
    tl.store(cos_ptr + at, cos)
    tl.store(sin_ptr + at, sin)


def test_cosine_and_sine_of_positions(device):
    """Up to the largest angle, around every quadrant's border, and of multiples of frequencies as a model has them."""
    generator = torch.Generator(device).manual_seed(1)
    borders = torch.arange(4096, device=device) * (math.pi / 4)
    near = borders + 1e-4 * torch.randn(4096, generator=generator, device=device)
    wide = (2 * torch.rand(8192, generator=generator, device=device) - 1) * LARGEST_ANGLE
    model = torch.outer(torch.arange(0, 131072, 512, device=device).float(), 10000.0 ** (-torch.arange(0, 64, device=device) / 64)).view(-1)
    angle = torch.cat((borders.float(), near.float(), wide, -wide, model, torch.tensor([0.0, -0.0] * 512, device=device)))
    cos, sin = torch.empty_like(angle), torch.empty_like(angle)
    _cos_sin_kernel[(angle.numel() // 1024,)](angle, cos, sin, BLOCK=1024)
    for got, exact in ((cos, angle.double().cos()), (sin, angle.double().sin())):
        assert (got.double() - exact).abs().max() <= 2e-7


def test_bad_elements_and_no_rows(device):
    gradients, given = inputs(4, 1, 2, 2, 64, device)
    mixed = given[0]
    mixed[1, 3], mixed[2, 64 * 4 + 5] = float("nan"), float("inf")
    for backend in (reference, kernels):
        q, k, v = backend.qkv_tanh_rotary(*given, 2)
        assert q.isnan().nonzero().tolist() == [[1, 3], [1, 35]] and not k.isnan().any() and not v.isnan().any(), "NaN stays in its pair"
        dmixed, dalpha_q, dalpha_k = backend.qkv_tanh_rotary_backward(*gradients, *given, 2)
        assert dmixed.isnan().nonzero().tolist() == [[1, 3]] and dalpha_q.isnan() and not dalpha_k.isnan()
        q, k, v = backend.qkv_tanh_rotary(mixed[:0], *given[1:], 2)
        assert q.shape == (0, 256) and k.shape == v.shape == (0, 128)
        dmixed, *dalphas = backend.qkv_tanh_rotary_backward(*(g[:0] for g in gradients), mixed[:0], *given[1:], 2)
        assert dmixed.shape == (0, 512) and dalphas == [0, 0]


def test_bad_input(device):
    gradients, (mixed, alpha_q, alpha_k, angles) = inputs(4, 1, 2, 2, 64, device)
    for backend in (reference, kernels):
        call = backend.qkv_tanh_rotary
        with pytest.raises(ValueError, match="mixed of shape .* is not contiguous"):
            call(mixed[:, :256], alpha_q, alpha_k, angles, 2)
        with pytest.raises(TypeError, match="mixed must be .* got torch.float64"):
            call(mixed.double(), alpha_q, alpha_k, angles, 2)
        with pytest.raises(ValueError, match=r"alpha_k must be 0-dim, float32 or torch.bfloat16, .* got torch.float32 \(1,\)"):
            call(mixed, alpha_q, alpha_k[None], angles, 2)
        with pytest.raises(ValueError, match=r"angles must be fp32 \[positions, half of a head\]"):
            call(mixed, alpha_q, alpha_k, angles.double(), 2)
        with pytest.raises(ValueError, match="mixed has 512 features, not groups of 3 query heads, a key and a value of 64 each"):
            call(mixed, alpha_q, alpha_k, angles, 3)
        with pytest.raises(ValueError, match="mixed has 4 rows, not a whole number for each of 3 positions"):
            call(mixed, alpha_q, alpha_k, angles[:3], 2)
        dq, dk, dv = gradients
        with pytest.raises(ValueError, match=r"dk must be contiguous torch.bfloat16 \(4, 128\)"):
            backend.qkv_tanh_rotary_backward(dq, dk[:, :64], dv, mixed, alpha_q, alpha_k, angles, 2)
        with pytest.raises(ValueError, match="dv must be"):
            backend.qkv_tanh_rotary_backward(dq, dk, dv.float(), mixed, alpha_q, alpha_k, angles, 2)
    with pytest.raises(ValueError, match="heads of size 8: the kernels take 16, 32, 64, 128, 256"):
        kernels.qkv_tanh_rotary(mixed, alpha_q, alpha_k, angles[:, :4], 2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 2, 8, 4, 128), (8191, 1, 2, 4, 128), (2048, 1, 32, 1, 64), (1024, 1, 1, 32, 128)], ids=str)
def test_real_sizes(device, shape):
    check(kernels, *inputs(*shape, device), shape[3])
    test_kernel_is_the_reference_in_bf16(device, shape)


COMPILE = """
from fp8_recipes.kernels import qkv
from machine_code import show
types = dict(angle_ptr="*fp32", alpha_gradient_ptr="*fp32", pairs="i32", pairs_of_position="i32", angle_stride="i32")
for heads, head in ((4, 128), (1, 64), (8, 128), (32, 128)):
    for kernel, at_once in ((qkv._qkv_kernel, qkv.FORWARD), (qkv._qkv_backward_kernel, qkv.BACKWARD)):
        constants = dict(qkv.options(heads, head, at_once))
        options = {"num_warps": constants.pop("num_warps")}
        multiples = [n for n in kernel.arg_names if n != "pairs_of_position"]
        facts = dict(backward=kernel is qkv._qkv_backward_kernel, heads=heads, head=head, at_once=constants["AT_ONCE"])
        show(kernel, types, constants, options, "*bf16", multiples, **facts)
"""


@pytest.mark.slow
@has_compiler
def test_machine_code_keeps_loads_in_flight():
    """Compiled for sm_90, which needs no GPU: all loads of a round before its first store, 16 bytes each, no spills, bytes enough on a multiprocessor."""
    found = listings(COMPILE)
    assert len(found) == 8
    for kernel, lines in found:
        at_once, registers = kernel["at_once"], kernel["registers"]
        loads = wide_loads(lines)
        store = next(i for i, line in enumerate(lines) if "STG" in line)
        wanted = 4 * at_once + 6 if kernel["backward"] else 2 * at_once + 4  # of heads, and of key and value or their gradients and the key
        assert len([i for i in loads if i < store]) >= wanted, f"{kernel}: loads wait for stores"
        assert not spills(lines), kernel
        assert wide_stores(lines) >= 2 * at_once + 4, f"{kernel}: narrow stores"
        programs = 65536 // (-(-registers // 8) * 8 * 128)
        assert programs * 128 * 16 * wanted >= (64 << 10), f"{kernel}: {programs} programs on a multiprocessor"
