"""Inputs, the float64 truth and the tolerances of the mixture-of-experts tests; and a watch over what a layer launches."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from assertions import assert_snr
from torch.utils._python_dispatch import TorchDispatchMode

from fp8_recipes import from_name, ops
from fp8_recipes.nn import moe_experts
from fp8_recipes.nn.activations import activation_of
from fp8_recipes.nn.moe import plain_experts
from fp8_recipes.recipe import Recipe

FLOW = from_name("fp8_flow_moe")
H, F = 128, 96
SAVED = ("activation", "h", "input")

# Rounding to E4M3 is noise of n = 10**-3.15 of a tensor's energy (31.5 dB, docs/numerics.md), and the noises of a chain add up. In units of n, for SwiGLU, with
# c = 1.05 for what silu makes of its argument's noise (E[silu'^2] s^2 / E[silu^2] for normal gates of s = 1):
#   h = x w1                     2                       from x and w1, in gate and up
#   act = silu(gate) up          2 c + 2 = 4.1           c + 1 more when h was stored in FP8 and the product made again: 6.15
#   y = act w2                   4.1 + 1 + 1 = 6.1
#   da = dy w2                   2
#   dh                           2 + what its factors carry: 2 (from h), + 1 if stored = 5.1 (4.05)
#   dx = dh w1                   5.1 + 1 + 1 = 7.1 (6.05)
#   dw1 = dh^T x                 the same
#   dw2 = dy^T act               1 + 4.1 + 1, or 1 + 6.15 + 1 with the product made again
#   dprob = sum da act           2 + 6.15 (4.1)
# GeLU of normal h of s = 1, by integration. Noise of h that does not depend on it (x, w1) counts E[gelu'^2] / E[gelu^2] = 1.07 in act and E[gelu''^2] /
# E[gelu'^2] = 0.60 in dh; that of storing h, which is in proportion to h, E[h^2 gelu'^2] / E[gelu^2] = 1.36 and E[h^2 gelu''^2] / E[gelu'^2] = 0.11:
#   act = 2.15 (from a stored h 3.5), dh = 2 + 1.2 = 3.2 (3.3), and the rest as above
# xIELU with both alphas 0.8, the same integrals: 1.19 and 0.67 for noise that does not depend on h, 3.03 and 0.63 for that of storing it:
#   act = 2.4 (5.4), dh = 2 + 1.35 = 3.35 (4.0)
#   dalpha = sum da x^2          2 + 2 * 1.33, + 4 where h was stored = 4.7 (8.7) on the right; less on the left
UNITS: dict[str, dict[str, dict[str, float]]] = {
    "swiglu": {
        "activation": {"y": 6.1, "dx": 7.1, "dprob": 8.2, "dw1": 7.1, "dw2": 6.1},
        "h": {"y": 6.1, "dx": 7.1, "dprob": 8.2, "dw1": 7.1, "dw2": 8.2},
        "input": {"y": 6.1, "dx": 6.1, "dprob": 6.1, "dw1": 6.1, "dw2": 6.1},
    },
    "gelu": {
        "activation": {"y": 4.15, "dx": 5.3, "dprob": 5.5, "dw1": 5.3, "dw2": 4.15},
        "h": {"y": 4.15, "dx": 5.3, "dprob": 5.5, "dw1": 5.3, "dw2": 5.5},
        "input": {"y": 4.15, "dx": 5.2, "dprob": 4.15, "dw1": 5.2, "dw2": 4.15},
    },
    "xielu": {
        "activation": {"y": 4.4, "dx": 6.0, "dprob": 7.4, "dw1": 6.0, "dw2": 4.4, "dalpha": 8.7},
        "h": {"y": 4.4, "dx": 6.0, "dprob": 7.4, "dw1": 6.0, "dw2": 7.4, "dalpha": 8.7},
        "input": {"y": 4.4, "dx": 5.35, "dprob": 4.4, "dw1": 5.35, "dw2": 4.4, "dalpha": 4.7},
    },
}
SLACK = 1.0
"""dB, for the sample and for higher derivatives of the activation, which the count leaves out. A wrong row, expert or scale costs far more."""


def floor(name: str, saved: str = "h", activation: str = "swiglu") -> float:
    return 31.5 - 10 * math.log10(UNITS[activation][saved][name]) - SLACK


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """Inputs of one layer and the gradient of its output."""

    x: torch.Tensor
    index: torch.Tensor
    prob: torch.Tensor
    w1: list[torch.Tensor]
    w2: list[torch.Tensor]
    dy: torch.Tensor
    activation: str = "swiglu"
    alpha: torch.Tensor | None = None
    """Of xIELU."""

    def to(self, device: str) -> Case:
        w1, w2 = ([w.to(device) for w in ws] for ws in (self.w1, self.w2))
        alpha = None if self.alpha is None else self.alpha.to(device)
        return Case(*(t.to(device) for t in (self.x, self.index, self.prob)), w1, w2, self.dy.to(device), self.activation, alpha)

    @property
    def alphas(self) -> dict[str, torch.Tensor]:
        """``alpha`` as a keyword, where the activation has it."""
        return {} if self.alpha is None else {"alpha": self.alpha}


def case(index: torch.Tensor, experts: int, seed: int = 0, hidden: int = H, ffn: int = F, activation: str = "swiglu") -> Case:
    tokens, k = index.shape
    scores = torch.rand(tokens, k, generator=torch.Generator().manual_seed(seed + 1)) + 0.1
    act = activation_of(activation)
    wide, alpha = act.parts * ffn, torch.tensor([0.8, 0.8]) if act.has_alpha else None
    w1 = [(normal(wide, hidden, seed=seed + 100 + e) * hidden**-0.5).bfloat16() for e in range(experts)]
    w2 = [(normal(hidden, ffn, seed=seed + 200 + e) * ffn**-0.5).bfloat16() for e in range(experts)]
    x, dy = normal(tokens, hidden, seed=seed + 2).bfloat16(), normal(tokens, hidden, seed=seed + 3).bfloat16()
    return Case(x, index.int().contiguous(), scores / scores.sum(1, keepdim=True), w1, w2, dy, activation, alpha)


def top_k(tokens: int, k: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).topk(k, dim=1).indices


Results = dict[str, torch.Tensor]
Experts = Callable[..., torch.Tensor]


def results(c: Case, experts: Experts, dtype: torch.dtype | None = None) -> Results:
    """y and all gradients. dtype: float64 for the truth."""
    x, prob = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (c.x, c.prob))
    w1, w2 = ([w.detach().to(dtype or w.dtype).requires_grad_() for w in ws] for ws in (c.w1, c.w2))
    alpha = {name: a.detach().to(dtype or a.dtype, copy=True).requires_grad_() for name, a in c.alphas.items()}
    y = experts(x, c.index, prob, w1, w2, **alpha)
    y.backward(c.dy.to(y.dtype))
    grads = {"dx": x.grad, "dprob": prob.grad, "dw1": torch.stack([w.grad for w in w1]), "dw2": torch.stack([w.grad for w in w2])}  # type: ignore[misc]
    return {"y": y.detach(), **grads, **{f"d{name}": a.grad for name, a in alpha.items()}}  # type: ignore[dict-item]


def flow(recipe: Recipe | str = FLOW, **kwargs: Any) -> Experts:
    recipe = from_name(recipe) if isinstance(recipe, str) else recipe
    return lambda *args, **alpha: moe_experts(*args, recipe=recipe, **alpha, **kwargs)


def truth(c: Case) -> Results:
    return results(c, partial(plain_experts, act=activation_of(c.activation)), torch.float64)


def dprob_noise(c: Case, saved: str) -> torch.Tensor:
    """Standard deviation of the noise of dprob, [T, K]: of sum_h dy y_e, whose terms each have the noise of `UNITS`; 0 for dropped copies."""
    noise = torch.zeros(c.prob.shape, dtype=torch.float64, device=c.x.device)
    for expert, (w1, w2) in enumerate(zip(c.w1, c.w2, strict=True)):
        token, copy = (c.index == expert).nonzero(as_tuple=True)
        one = torch.ones(len(token), 1, dtype=torch.float64, device=c.x.device)
        index = torch.zeros_like(one, dtype=torch.int32)
        y = plain_experts(c.x[token].double(), index, one, [w1.double()], [w2.double()], activation_of(c.activation), c.alpha)
        noise[token, copy] = (c.dy[token].double() * y).norm(dim=1)
    return noise * (UNITS[c.activation][saved]["dprob"] * 10**-3.15) ** 0.5


def dalpha_noise(c: Case, saved: str) -> torch.Tensor:
    """Standard deviation of the noise of xIELU's dalpha, [2]: of sums over all rows and features, whose terms each have the noise of `UNITS`."""
    squares = torch.zeros(2, dtype=torch.float64, device=c.x.device)
    for expert, (w1, w2) in enumerate(zip(c.w1, c.w2, strict=True)):
        token, copy = (c.index == expert).nonzero(as_tuple=True)
        h, da = c.x[token].double() @ w1.double().t(), c.dy[token].double() @ w2.double() * c.prob[token, copy, None].double()
        squares += torch.stack([(da * h.clamp(min=0) ** 2).square().sum(), (da * (torch.expm1(h.clamp(max=0)) - h.clamp(max=0))).square().sum()])
    return (squares * UNITS[c.activation][saved]["dalpha"] * 10**-3.15).sqrt()


def check(c: Case, got: Results, saved: str = "h", per_expert: float = 3.0, per_token: float = 9.0) -> None:
    """Every result over the whole tensor; y and dx by token and the weights by expert within so many dB of that. (A token whose activation happens to be small
    has fewer dB. The row of another token has none.)"""
    want = truth(c)
    if c.alpha is not None:
        expected, dalpha = want.pop("dalpha"), got["dalpha"]
        assert dalpha.dtype == torch.float32 and ((dalpha - expected).abs() <= 6 * dalpha_noise(c, saved)).all(), f"dalpha {dalpha} is not {expected}"
    for name, expected in want.items():
        if name != "dprob" or expected.numel() >= 64:
            scatter = 4 * expected.numel() ** -0.5 if name == "dprob" else 0.0  # of a ratio of two energies of so few numbers, twice
            assert_snr(expected, got[name], floor(name, saved, c.activation) - 10 * math.log10(1 + scatter), name)
        assert got[name].shape == expected.shape and torch.isfinite(got[name]).all()
        for part, (e, g) in enumerate(zip(expected, got[name], strict=True)):
            if not e.any():
                assert not g.any(), f"{name}[{part}] must be zero"
            elif name != "dprob":
                assert_snr(e, g, floor(name, saved, c.activation) - (per_expert if name in ("dw1", "dw2") else per_token), f"{name}[{part}]")
    assert ((got["dprob"] - want["dprob"]).abs() <= 6 * dprob_noise(c, saved)).all(), "a copy's gradient of prob"


def leaves(c: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [w.clone().requires_grad_() for w in c.w1], [w.clone().requires_grad_() for w in c.w2]


def with_main_grad(c: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    w1, w2 = leaves(c)
    for w in (*w1, *w2):
        w.main_grad = torch.zeros(w.shape, dtype=torch.float32, device=w.device)  # type: ignore[attr-defined]
    return w1, w2


COUNTED = tuple(name for name in ops.__all__ if isinstance(getattr(ops, name), type(ops.quantize)) and name != "rows_for")  # which is only a number
CALLS = {  # of one forward and backward with moe_saved=h
    "quantize": 2,  # the two casts: x before dispatch, dy before the combine's backward
    "measure_experts": 2,
    "quantize_experts": 4,
    "route_map": 1,
    "gather_rows": 3,
    "grouped_gemm": 4,
    "swiglu_quantize": 1,
    "swiglu_quantize_saving": 1,
    "swiglu_backward_quantize": 1,
    "grouped_fold_transpose": 4,
    "grouped_wgrad": 2,
    "combine_rows": 2,
    "copies_of_rows": 1,
}
FREE = {f"aten.{name}" for name in ["empty", "new_empty", "view", "detach", "alias", "unbind", "slice", "select", "as_strided", "_unsafe_view"]}
"""Operators that move nothing."""


class Movements(TorchDispatchMode):
    """Every operator outside fp8_recipes.ops that reads or writes a tensor of at least ``large`` elements."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large, self.inside, self.seen = large, 0, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).rsplit(".", 1)[0]
        tensors = [t for t in (*torch.utils._pytree.tree_leaves(args), *torch.utils._pytree.tree_leaves(out)) if isinstance(t, torch.Tensor)]
        if not self.inside and name not in FREE and any(t.numel() >= self.large for t in tensors):
            self.seen.append(f"{name} {[tuple(t.shape) for t in tensors]}")
        return out


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, large: int) -> Iterator[tuple[collections.Counter[str], Movements]]:
    """(calls of each operation, operators outside the operations)."""
    calls: collections.Counter[str] = collections.Counter()
    movements = Movements(large)

    def counted(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            movements.inside += 1
            try:
                return original(*args, **kwargs)
            finally:
                movements.inside -= 1

        return call

    with monkeypatch.context() as patch:
        for name in COUNTED:
            patch.setattr(ops, name, counted(name, getattr(ops, name)))
        with movements:
            yield calls, movements


def check_nan_in_one_token(c: Case, run: Experts) -> None:
    """A NaN in token 5 is in that token's results and in the gradients of its experts, and changes no bit of the others."""
    clean = results(c, run)
    c.x = c.x.clone()
    c.x[5, 7] = math.nan
    got = results(c, run)
    others = torch.arange(len(c.x)) != 5
    for name in ("y", "dx", "dprob"):
        assert torch.isnan(got[name][5]).all() and torch.equal(got[name][others], clean[name][others]), name
    mine = torch.zeros(len(c.w1), dtype=torch.bool)
    mine[c.index[5].long()] = True
    for name in ("dw1", "dw2"):
        assert torch.isnan(got[name][mine]).all() and torch.equal(got[name][~mine], clean[name][~mine]), name
    if c.alpha is not None:
        assert not torch.isnan(clean["dalpha"]).any() and torch.isnan(got["dalpha"]).any(), "a sum over all tokens shows it"
