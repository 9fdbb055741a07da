"""FOG's parts on one GPU: checked against the reference, then timed against a copy of the same bytes, the unfused way, and SwiGLU and bf16 FFNs.

    python scripts/bench_fog.py [--check | --sweep] [--csv DIR] [--rounds N]      (--check: no timing; --sweep: elements per thread of the row kernels)

A post-norm with its addition stands beside TransformerEngine's norm followed by an addition, bound and rotation of queries and keys as one operation beside
split, tanh and TransformerEngine's rotation, if TransformerEngine is installed.

Bytes are the least that must move. Where no float64 stands beside it, "right" means the reference's bits except for a thousandth of the payload: the GPU's
exponential differs in the last places. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_kernels import ALLOC, attribute, data, differences, poisoned, record_wall, wall, with_per_thread
from benchmark import write
from kernel_timing import Calls, Table, copy_calls, measure, record, rotations

from fp8_recipes import from_name, kernels, reference
from fp8_recipes.formats import FORMATS
from fp8_recipes.nn import fp8_linear, fp8_mlp
from fp8_recipes.nn.fog import XIELU, PostNorm, TanhBound, bound_and_rotated
from fp8_recipes.reference import xielu as reference_xielu
from fp8_recipes.weight_scaling import WeightScaling

FFN = {"390M": (1024, 4096), "1.5B": (2048, 8192), "8B": (4096, 14336)}  # hidden, width of a gated FFN
TOKENS = 8192
STREAMS = (4096, 5120, 7168)
"""Widths of residual streams."""
NORM: Any = import_module("fp8_recipes.kernels.rmsnorm_add")
QKV: Any = import_module("fp8_recipes.kernels.qkv")
QKV_SHAPES = ((8, 4, 128), (32, 1, 128), (32, 1, 64), (2, 4, 128))
"""Groups, query heads a group, size of a head: of 8B, without groups, of small heads, of one of four tensor-parallel ranks."""
MODES = (("micro", "row"), ("row", None), ("tile", None), ("micro", None))


def alpha() -> torch.Tensor:
    return XIELU().cuda().alpha().detach()


def row_checks() -> Iterator[tuple[str, int, float]]:
    """(name, bytes that differ, how many may) of xIELU and GeLU."""
    for cols in (2112, 6144, 12288, 21504):
        h, dy, a, prob = data(1024, cols), data(1024, cols, 1), alpha(), torch.rand(1024, device="cuda")
        for fmt in FORMATS.values():
            for granularity, fold in MODES:
                for p in (None, prob):
                    options = {"fold": fold, "prob": p}
                    for name, first in (("xielu", (a,)), ("gelu", ())):
                        forward, backward = f"{name}_quantize", f"{name}_backward_quantize"
                        q, e = (getattr(m, forward)(h, *first, granularity, fmt, **options) for m in (kernels, reference))
                        label = f"{cols} {fmt.name} {granularity} {fold} {'prob' if p is not None else ''}"
                        yield f"{forward} {label}", differences(q, e), 1e-3 * q.payload.numel()
                        got, expected, again = (getattr(m, backward)(dy, h, *first, granularity, fmt, **options) for m in (kernels, reference, kernels))
                        yield f"{backward} {label}", differences(got.h, expected.h), 1e-3 * q.payload.numel()
                        yield f"{backward} {label}, twice", differences(got.h, again.h), 0
                        for field in ("alpha", "prob"):
                            sums = getattr(got, field, None)
                            if sums is not None:
                                yield f"{backward} {label} d{field}, twice", int((sums != getattr(again, field)).sum()), 0
                                off = (sums - getattr(expected, field)).abs() > 1e-5 * magnitude(field, name, dy, h, p)
                                yield f"{backward} {label} d{field}", int(off.sum()), 0


def magnitude(field: str, name: str, dy: torch.Tensor, h: torch.Tensor, prob: torch.Tensor | None) -> torch.Tensor:
    """Sum of the magnitudes of the terms of a gradient: its errors are a few roundings of that."""
    if field == "alpha":
        return reference_xielu.xielu_alpha_gradient(dy.abs(), h, prob)  # both derivatives are positive
    y = reference_xielu.xielu(h, alpha()) if name == "xielu" else F.gelu(h.float())
    return (dy.float() * y).abs().sum(dim=1)


def tanh_checks() -> Iterator[tuple[str, int, float]]:
    joint, dy, a = data(4096, 6144), data(4096, 6144, 1), torch.tensor(0.5, device="cuda")
    for part in (slice(0, 4096), slice(4096, 5120)):
        x, g = joint[:, part], dy[:, part]
        yield "tanh_bound", int((kernels.tanh_bound(x, a) != reference.tanh_bound(x, a)).sum()), 2e-3 * x.numel()
        (dx, da), (ex, ea), (_, again) = (m.tanh_bound_backward(g, x, a) for m in (kernels, reference, kernels))
        yield "tanh_bound_backward", int((dx != ex).sum()), 4e-3 * x.numel()
        terms = (g.double() * x.double() / torch.cosh(0.5 * x.double()).square()).abs().sum()
        yield "tanh_bound_backward dalpha", int((da - ea).abs() > 1e-5 * terms) + int(da != again), 0


def qkv_data(groups: int, heads: int, head: int, seed: int = 0, tokens: int = TOKENS) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    """((dq, dk, dv), (mixed, alpha_q, alpha_k, angles, heads a group)); half as many positions as tokens."""
    a, frequency = torch.tensor(0.5, device="cuda"), 10000.0 ** (-torch.arange(0, head, 2, device="cuda") / head)
    angles = torch.outer(torch.arange(tokens // 2, device="cuda").float(), frequency).repeat(1, 2)[:, : head // 2]
    gradients = [data(tokens, groups * n * head, seed + 10 + i) for i, n in enumerate((heads, 1, 1))]
    return gradients, (data(tokens, groups * (heads + 2) * head, seed), a, a, angles, heads)


def qkv_checks() -> Iterator[tuple[str, int, float]]:
    for shape in QKV_SHAPES:
        gradients, given = qkv_data(*shape, tokens=2050)
        for name, y, e in zip("qkv", kernels.qkv_tanh_rotary(*given), reference.qkv_tanh_rotary(*given), strict=True):
            yield f"qkv_tanh_rotary {shape} {name}", int((y != e).sum()), 0 if name == "v" else 2e-3 * y.numel()
        (dx, *das), (ex, *_), (_, *again) = (m.qkv_tanh_rotary_backward(*gradients, *given) for m in (kernels, reference, kernels))
        yield f"qkv_tanh_rotary_backward {shape}", int((dx != ex).sum()), 4e-3 * dx.numel()
        alphas = [t.double() for t in reference.qkv_tanh_rotary_backward(*(g.float() for g in gradients), given[0].float(), *given[1:])[1:]]
        terms = [g.float().abs().sum().double() for g in gradients]  # |(1 - tanh^2) x| is below 1 at alpha 1/2, and a rotation keeps sizes to sqrt 2
        off = [(da.double() - e).abs() > 2e-6 * t for da, e, t in zip(das, alphas, terms, strict=False)]
        yield f"qkv_tanh_rotary_backward {shape} dalpha", int(sum(off)) + sum(int(a != b) for a, b in zip(das, again, strict=True)), 0


def norm_checks() -> Iterator[tuple[str, int, float]]:
    for rows, cols in ((4096, 4096), (1000, 5120), (4096, 7168), (333, 2050), (64, 16384)):
        x, residual, dy, gain = data(rows, cols), data(rows, cols, 1), data(rows, cols, 2), data(1, cols, 3)[0]
        (y, rstd), (expected, _) = (m.rmsnorm_add(x, residual, gain) for m in (kernels, reference))
        yield f"rmsnorm_add {rows}x{cols}", int((y != expected).sum()), 1e-3 * y.numel()
        (dx, dgain), (ex, eg), (_, again) = (m.rmsnorm_add_backward(dy, x, gain, rstd) for m in (kernels, reference, kernels))
        yield f"rmsnorm_add_backward {rows}x{cols}", int((dx != ex).sum()), 1e-3 * dx.numel()
        terms = (dy.float() * x.float() * rstd[:, None]).abs().sum(dim=0)
        off = (dgain.float() - eg.float()).abs() > 2.0**-7 * eg.float().abs() + 2e-6 * terms
        yield f"rmsnorm_add_backward {rows}x{cols} dgain", int(off.sum()) + int((dgain != again).sum()), 0


def check() -> bool:
    failures = total = 0
    with attribute(ALLOC, "empty", poisoned):
        for checks in (row_checks, tanh_checks, qkv_checks, norm_checks):
            for name, count, allowed in checks():
                total += 1
                if not 0 <= count <= allowed:
                    failures += 1
                    print(f"  FAIL {name}: {count} differ, {allowed:.0f} may")
    print(f"check: {total - failures} of {total} pass")
    return failures == 0


def unfused(activation: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor) -> object:
    return kernels.quantize(activation(h), "micro", fold="row")


def bench_rows(table: Table, rounds: int) -> None:
    options = {"granularity": "micro", "fold": "row"}
    for _, glu in FFN.values():
        cols = 3 * glu // 2
        size, a = TOKENS * cols, alpha()
        hs, dys = ([data(TOKENS, cols, i + k) for i in range(rotations(2 * size))] for k in (0, 10))
        pairs = list(zip(dys, hs, strict=True))
        cases: dict[str, tuple[float, Calls]] = {
            "xielu_quantize micro+fold": (3 * size, {"": [partial(kernels.xielu_quantize, h, a, **options) for h in hs]}),
            "gelu_quantize micro+fold": (3 * size, {"": [partial(kernels.gelu_quantize, h, **options) for h in hs]}),
            "torch gelu, then quantize": (3 * size, {"": [partial(unfused, F.gelu, h) for h in hs]}),
            "xielu_backward_quantize micro+fold": (5 * size, {"": [partial(kernels.xielu_backward_quantize, dy, h, a, **options) for dy, h in pairs]}),
            "gelu_backward_quantize micro+fold": (5 * size, {"": [partial(kernels.gelu_backward_quantize, dy, h, **options) for dy, h in pairs]}),
        }
        for name, (moved, calls) in cases.items():
            record(table, (TOKENS, cols), measure({"copy": copy_calls(moved), name: calls[""]}, rounds), {"copy": moved, name: moved})


def bench_tanh(table: Table, rounds: int) -> None:
    """Queries of the 8B geometry inside their joint projection."""
    joints, dys, a = [data(TOKENS, 6144, i) for i in range(3)], [data(TOKENS, 4096, i) for i in range(3)], torch.tensor(0.5, device="cuda")
    xs, size = [j[:, :4096] for j in joints], TOKENS * 4096
    cases: dict[str, tuple[float, Calls]] = {
        "tanh_bound": (4 * size, {"": [partial(kernels.tanh_bound, x, a) for x in xs]}),
        "torch.tanh(x * alpha)": (4 * size, {"": [partial(lambda x: torch.tanh(x * a), x) for x in xs]}),
        "tanh_bound_backward": (6 * size, {"": [partial(kernels.tanh_bound_backward, dy, x, a) for dy, x in zip(dys, xs, strict=True)]}),
    }
    for name, (moved, calls) in cases.items():
        record(table, (TOKENS, 4096), measure({"copy": copy_calls(moved), name: calls[""]}, rounds), {"copy": moved, name: moved})


def te_rotation() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """TransformerEngine's fused rotation of [s, b, heads, E] by [s, 1, 1, E], None if it is not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    return partial(apply_rotary_pos_emb, tensor_format="sbhd", fused=True)


def apart(rotate: Callable[..., torch.Tensor], bound: TanhBound, freqs: torch.Tensor, heads: int, mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the one operation replaces, as Megatron has it. mixed: [s, b, features]."""
    s, b, head = *mixed.shape[:2], freqs.shape[-1]
    q, k, v = mixed.view(s, b, -1, (heads + 2) * head).split((heads * head, head, head), dim=3)
    return rotate(bound(q.reshape(s, b, -1, head)), freqs), rotate(bound(k), freqs), v


def bench_qkv(table: Table, rounds: int) -> None:
    """Between the joint projection and attention, two sequences. All are given the one operation's bytes: backward does not read the values' input."""
    for shape in QKV_SHAPES:
        (groups, heads, head), rotate, bound = shape, te_rotation(), TanhBound().cuda()
        made = [qkv_data(*shape, seed=20 * i) for i in range(3)]
        size, values = TOKENS * groups * (heads + 2) * head, TOKENS * groups * head
        moved = {"forward": 4.0 * size, "backward": 6.0 * size - 2 * values}
        half = made[0][1][3]
        freqs = torch.cat((half, half), dim=-1)[:, None, None].contiguous()
        mixed = [given[0].view(TOKENS // 2, 2, -1).requires_grad_() for _, given in made]
        ways: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = {
            "qkv, one operation": lambda x, b=bound, a=half, n=heads: bound_and_rotated(x, b.alpha, b.alpha, a, n)
        }
        if rotate is not None:
            ways["qkv, one by one"] = partial(apart, rotate, bound, freqs, heads)
        for direction, nbytes in moved.items():
            contenders: Calls = {"copy": copy_calls(nbytes)}
            for name, way in ways.items():
                if direction == "forward":
                    contenders[f"{name}, forward"] = [partial(way, x) for x in mixed]
                    continue
                outputs = [way(x) for x in mixed]
                dys = [[g.view(y.shape) for g, y in zip(gradients, ys, strict=True)] for (gradients, _), ys in zip(made, outputs, strict=True)]
                leaves = [(x, bound.alpha) for x in mixed]
                graphs = zip(outputs, leaves, dys, strict=True)
                contenders[f"{name}, backward"] = [partial(torch.autograd.grad, *graph, retain_graph=True) for graph in graphs]
            record(table, (TOKENS, size // TOKENS), measure(contenders, rounds), dict.fromkeys(contenders, nbytes))


def with_heads_at_once(name: str, heads: int, call: Callable[..., object], *args: Any) -> object:
    with attribute(QKV, name, heads):
        return call(*args)


def sweep_qkv(table: Table, rounds: int) -> None:
    """Query heads that a program loads at once."""
    gradients, given = qkv_data(*QKV_SHAPES[0])
    size = given[0].numel()
    calls = {
        "qkv_tanh_rotary": ("FORWARD", kernels.qkv_tanh_rotary, given, 4.0 * size),
        "qkv_tanh_rotary_backward": ("BACKWARD", kernels.qkv_tanh_rotary_backward, (*gradients, *given), 6.0 * size),
    }
    for name, (constant, call, args, nbytes) in calls.items():
        contenders: Calls = {f"{name}, {n} heads at once": [partial(with_heads_at_once, constant, n, call, *args)] * 2 for n in (1, 2, 4)}
        times = measure({"copy": copy_calls(nbytes), **contenders}, rounds)
        record(table, (TOKENS, size // TOKENS), times, dict.fromkeys(times, nbytes))


def te_norm(cols: int) -> Any:
    """TransformerEngine's RMSNorm of bf16 rows, None if it is not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    import transformer_engine.pytorch as te

    return te.RMSNorm(cols, eps=1e-5, dtype=torch.bfloat16, device="cuda")


def then_add(norm: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return residual + norm(x)


@torch.no_grad()
def bench_norm(table: Table, rounds: int) -> None:
    """A branch's end each way. The separate way moves 10 bytes per value forward and as many as the fused one backward; both are given the fused one's."""
    for cols in STREAMS:
        size, gain, norm = TOKENS * cols, data(1, cols, 9)[0], te_norm(cols)
        xs, residuals, dys = ([data(TOKENS, cols, i + k) for i in range(rotations(2 * size))] for k in (0, 10, 20))
        rstds = [kernels.rmsnorm_add(x, x, gain)[1] for x in xs]
        contenders: Calls = {
            "copy": copy_calls(6 * size),
            "rmsnorm_add": [partial(kernels.rmsnorm_add, x, residual, gain) for x, residual in zip(xs, residuals, strict=True)],
            "rmsnorm_add_backward": [partial(kernels.rmsnorm_add_backward, dy, x, gain, r) for dy, x, r in zip(dys, xs, rstds, strict=True)],
        }
        if norm is not None:
            import transformer_engine_torch as tex

            contenders["TE RMSNorm, then add"] = [partial(then_add, norm, x, residual) for x, residual in zip(xs, residuals, strict=True)]
            contenders["TE RMSNorm backward"] = [partial(tex.rmsnorm_bwd, dy, x, r, gain, 0, False) for dy, x, r in zip(dys, xs, rstds, strict=True)]
        record(table, (TOKENS, cols), measure(contenders, rounds), dict.fromkeys(contenders, float(6 * size)))


def bench_norm_host(table: Table, rounds: int) -> None:
    """Microseconds of the host for a branch's end, forward and backward through autograd, on tensors that the GPU is quick with."""
    x, residual, dy = data(256, 512).requires_grad_(), data(256, 512, 1).requires_grad_(), data(256, 512, 2)
    post, norm = PostNorm(512).cuda().bfloat16(), te_norm(512)
    ways: dict[str, Callable[[], object]] = {"PostNorm, both ways": lambda: torch.autograd.grad(post(x, residual), (x, residual, post.weight), dy)}
    if norm is not None:
        ways["TE RMSNorm, then add, both ways"] = lambda: torch.autograd.grad(then_add(norm, x, residual), (x, residual, norm.weight), dy)
    for name, call in ways.items():
        record_wall(table, "host", name, [wall(call) for _ in range(rounds)])


def swiglu_ffn(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def step(ffn: Callable[..., torch.Tensor], leaves: list[torch.Tensor], dy: torch.Tensor) -> object:
    """Forward and backward."""
    return torch.autograd.grad(ffn(*leaves), leaves, dy)


def bench_ffn(table: Table, rounds: int) -> None:
    """Forward and backward of a whole FFN; the fused one beside separate layers and bf16, of GeLU, and of SwiGLU with as many weights."""
    recipe = from_name("moss")
    for name, (hidden, glu) in FFN.items():
        cols, scaling, a = 3 * glu // 2, WeightScaling(interval=500, attached=True), alpha().requires_grad_()
        x, dy = data(TOKENS, hidden).requires_grad_(), data(TOKENS, hidden, 1)
        up, down, gate_up, glu_down = (
            torch.nn.Parameter((0.02 * torch.randn(*s, device="cuda")).bfloat16()) for s in ((cols, hidden), (hidden, cols), (2 * glu, hidden), (hidden, glu))
        )
        for w in (up, down):
            scaling.track(w)

        def separate(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
            return fp8_linear(F.gelu(fp8_linear(x, up, recipe=recipe)), down, recipe=recipe)

        contenders: Calls = {
            "FFN bf16 SwiGLU": [partial(step, swiglu_ffn, [x, gate_up, glu_down], dy)] * 2,
            "FFN bf16 GeLU": [partial(step, lambda x, up, down: F.linear(F.gelu(F.linear(x, up)), down), [x, up, down], dy)] * 2,
            "FFN moss GeLU, separate layers": [partial(step, separate, [x, up, down], dy)] * 2,
            "FFN moss GeLU, fused": [partial(step, partial(fp8_mlp, recipe=recipe), [x, up, down], dy)] * 2,
            "FFN moss xIELU, fused": [partial(step, partial(fp8_mlp, recipe=recipe), [x, up, down, a], dy)] * 2,
        }
        times = measure(contenders, rounds)
        print(f"{name}: {TOKENS} tokens, {hidden} -> {cols} -> {hidden} (SwiGLU {glu})")
        record(table, (hidden, cols), times, {"FFN bf16 SwiGLU": 0.0}, "FFN bf16 SwiGLU")
        best = times["FFN bf16 SwiGLU"]
        print("              " + "   ".join(f"{key.removeprefix('FFN ')} {best / us:.2f}x" for key, us in times.items()))


def sweep(table: Table, rounds: int) -> None:
    """Elements per thread, widths of all three sizes."""
    options = {"granularity": "micro", "fold": "row"}
    for _, glu in FFN.values():
        cols, a = 3 * glu // 2, alpha()
        h, dy = data(TOKENS, cols), data(TOKENS, cols, 1)
        operations: dict[str, tuple[int, Callable[..., object], tuple[torch.Tensor, ...]]] = {
            "xielu_quantize": (3, kernels.xielu_quantize, (h, a)),
            "gelu_quantize": (3, kernels.gelu_quantize, (h,)),
            "xielu_backward_quantize": (5, kernels.xielu_backward_quantize, (dy, h, a)),
            "gelu_backward_quantize": (5, kernels.gelu_backward_quantize, (dy, h)),
        }
        for name, (per_value, call, arguments) in operations.items():
            moved = per_value * TOKENS * cols
            calls: Calls = {str(n): [partial(with_per_thread, n, call, *arguments, **options)] * 2 for n in (32, 64, 128)}
            times = measure({"copy": copy_calls(moved), **calls}, rounds)
            named = {"copy": times["copy"], **{f"{name}, {n} per thread": times[n] for n in calls}}
            record(table, (TOKENS, cols), named, dict.fromkeys(named, float(moved)))


def with_norm_plan(per_thread: int, part: float, call: Callable[..., object], *args: Any) -> object:
    """The call with so many elements per thread, and backward with this part of the programs that fit."""

    def plan(rows: int, cols: int, nbytes: int) -> tuple[int, dict[str, Any]]:
        programs, options = backward(rows, cols, nbytes, per_thread=per_thread)
        return max(int(programs * part), 1), options

    forward, backward = NORM.row_options, NORM.backward_plan
    with attribute(NORM, "row_options", partial(forward, per_thread=per_thread)), attribute(NORM, "backward_plan", plan):
        return call(*args)


def sweep_norm(table: Table, rounds: int) -> None:
    for cols in STREAMS:
        size, gain = TOKENS * cols, data(1, cols, 9)[0]
        x, residual, dy = data(TOKENS, cols), data(TOKENS, cols, 1), data(TOKENS, cols, 2)
        rstd = kernels.rmsnorm_add(x, residual, gain)[1]
        calls: Calls = {}
        for n in (16, 32, 64):
            calls[f"rmsnorm_add, {n} per thread"] = [partial(with_norm_plan, n, 1.0, kernels.rmsnorm_add, x, residual, gain)] * 2
            for part in (1.0, 0.5):
                call = partial(with_norm_plan, n, part, kernels.rmsnorm_add_backward, dy, x, gain, rstd)
                calls[f"rmsnorm_add_backward, {n} per thread, {part:.0%} of the programs"] = [call] * 2
        times = measure({"copy": copy_calls(6 * size), **calls}, rounds)
        record(table, (TOKENS, cols), times, dict.fromkeys(times, float(6 * size)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--sweep", action="store_true", help="after the check, sweep instead of the benchmark")
    parser.add_argument("--csv", type=Path, help="directory for fog_bench.csv or fog_sweep.csv")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_fog.py needs a CUDA GPU; the tests in tests/kernels check the same kernels on the CPU")
    start = time.time()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if not check():
        sys.exit(1)
    table: Table = []
    if not args.check:
        for bench in (sweep, sweep_norm, sweep_qkv) if args.sweep else (bench_rows, bench_tanh, bench_qkv, bench_norm, bench_norm_host, bench_ffn):
            bench(table, args.rounds)
    if args.csv and table:
        write(table, args.csv / f"fog_{'sweep' if args.sweep else 'bench'}.csv")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
