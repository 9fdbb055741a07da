"""The mixture-of-experts layers that bench_moe.py compares: ours, torch in bf16, TransformerEngine as Megatron uses it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from fp8_recipes import from_name, ops
from fp8_recipes.nn import moe_experts
from fp8_recipes.weight_scaling import WeightScaling

SHAPES = {  # tokens, K, experts, hidden, ffn
    "V3, 8 local experts": (32768, 1, 8, 7168, 2048),
    "Qwen3-30B-A3B": (16384, 8, 128, 2048, 768),
    "V2-Lite": (16384, 6, 64, 2048, 1408),
}
MICROBATCHES = 4


class Problem:
    """Tokens, routing and weights of one shape; every contender copies the weights."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokens, self.k, self.experts, self.hidden, self.ffn = SHAPES[name]
        gen = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", generator=gen).bfloat16()

        self.x, self.dy = normal(self.tokens, self.hidden), normal(self.tokens, self.hidden)
        self.index = torch.rand(self.tokens, self.experts, device="cuda", generator=gen).topk(self.k, dim=1).indices.int()
        score = torch.rand(self.tokens, self.k, device="cuda", generator=gen) + 0.5
        self.prob = score / score.sum(1, keepdim=True)
        self.w1 = torch.stack([normal(2 * self.ffn, self.hidden) * self.hidden**-0.5 for _ in range(self.experts)])
        self.w2 = torch.stack([normal(self.hidden, self.ffn) * self.ffn**-0.5 for _ in range(self.experts)])

    def flop(self) -> float:
        """Of the three products of both layers, forward and backward."""
        return 3 * 2 * self.tokens * self.k * 3 * self.hidden * self.ffn


@torch.compile
def weighted_swiglu(h: torch.Tensor, prob: torch.Tensor) -> torch.Tensor:
    gate, up = h.float().chunk(2, dim=1)
    return (F.silu(gate) * up * prob[:, None]).to(h.dtype)


class Contender:
    """One implementation of the layer with weights of its own. ``run(microbatch)`` is its forward pass."""

    def __init__(self, problem: Problem, name: str) -> None:
        self.problem, self.name = problem, name
        self.x, self.prob = problem.x.clone().requires_grad_(), problem.prob.clone().requires_grad_()
        self.times: list[float] = []
        self.make()

    def make(self) -> None:
        raise NotImplementedError

    def run(self, microbatch: int) -> torch.Tensor:
        raise NotImplementedError

    def parameters(self) -> list[torch.Tensor]:
        raise NotImplementedError

    def weight_gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """dw1, dw2 of the last steps, [E, 2F, H] and [E, H, F]."""
        grads = [w.main_grad for w in self.parameters()]  # type: ignore[attr-defined]
        return torch.stack(grads[: len(grads) // 2]), torch.stack(grads[len(grads) // 2 :])

    def step(self, microbatch: int = 0) -> torch.Tensor:
        self.x.grad = self.prob.grad = None
        for p in self.parameters():
            p.grad = None
        y = self.run(microbatch)
        y.backward(self.problem.dy)
        return y.detach()

    def results(self) -> dict[str, torch.Tensor]:
        for p in self.parameters():
            if hasattr(p, "main_grad"):
                p.main_grad.zero_()
        y = self.step()
        dw1, dw2 = self.weight_gradients()
        assert self.x.grad is not None and self.prob.grad is not None
        return {"y": y, "dx": self.x.grad, "dprob": self.prob.grad, "dw1": dw1, "dw2": dw2}

    def timed(self) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.step(1)
        start.record()
        for i in range(MICROBATCHES):
            self.step(i)
        end.record()
        end.synchronize()
        self.times.append(start.elapsed_time(end) / MICROBATCHES)

    def peak_mib(self) -> float:
        self.step()
        self.x.grad = self.prob.grad = None
        for p in self.parameters():
            p.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(1)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def with_main_grad(weights: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    for w in weights:
        w.main_grad = torch.zeros(w.shape, device=w.device)  # type: ignore[attr-defined]
    return weights


@contextmanager
def replaced(patches: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Operations of `fp8_recipes.ops` replaced."""
    kept = {name: getattr(ops, name) for name in patches}
    try:
        for name, patch in patches.items():
            setattr(ops, name, patch)
        yield
    finally:
        for name, original in kept.items():
            setattr(ops, name, original)


class Ours(Contender):
    patches: dict[str, Callable[..., Any]] = {}

    def make(self) -> None:
        p = self.problem
        self.recipe = from_name(self.name)
        self.w1 = with_main_grad([torch.nn.Parameter(w.clone()) for w in p.w1])
        self.w2 = with_main_grad([torch.nn.Parameter(w.clone()) for w in p.w2])
        scaling = WeightScaling(attached=True)
        for w in self.parameters():
            scaling.track(w)

    def parameters(self) -> list[Any]:
        return [*self.w1, *self.w2]

    def step(self, microbatch: int = 0) -> torch.Tensor:
        with replaced(self.patches):
            return super().step(microbatch)

    def run(self, microbatch: int) -> torch.Tensor:
        return moe_experts(self.x, self.problem.index, self.prob, self.w1, self.w2, recipe=self.recipe)


class TorchBf16(Contender):
    """Groups padded to 16 rows, as torch._grouped_mm's weight gradient needs; sizes stay on the device."""

    def make(self) -> None:
        self.w1, self.w2 = (torch.nn.Parameter(w.clone()) for w in (self.problem.w1, self.problem.w2))

    def parameters(self) -> list[Any]:
        return [self.w1, self.w2]

    def weight_gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.w1.grad is not None and self.w2.grad is not None
        return self.w1.grad, self.w2.grad

    def run(self, microbatch: int) -> torch.Tensor:
        p = self.problem
        expert, order = p.index.flatten().sort(stable=True)
        counts = torch.zeros(p.experts, dtype=torch.int64, device="cuda").scatter_add_(0, expert.long(), torch.ones_like(expert, dtype=torch.int64))
        padded = (counts + 15) // 16 * 16
        ends = padded.cumsum(0)
        position = (ends - padded)[expert] + torch.arange(order.numel(), device="cuda") - (counts.cumsum(0) - counts)[expert]
        token, rows = order // p.k, order.numel() + 16 * p.experts
        x = self.x.new_zeros(rows, p.hidden).index_copy(0, position, self.x.index_select(0, token))
        prob = self.prob.new_zeros(rows).index_copy(0, position, self.prob.flatten().index_select(0, order))
        h = torch._grouped_mm(x, self.w1.transpose(1, 2), offs=ends.int())
        y = torch._grouped_mm(weighted_swiglu(h, prob), self.w2.transpose(1, 2), offs=ends.int())
        return torch.zeros_like(self.x).index_add(0, token, y.index_select(0, position))


class TransformerEngine(Contender):
    """Megatron's stock path on one rank: token counts on the host, as its dispatcher has them."""

    def make(self) -> None:
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import Float8BlockScaling, Format

        p = self.problem
        self.recipe = Float8BlockScaling(fp8_format=Format.E4M3) if self.name == "te blockwise" else None
        options: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "fuse_wgrad_accumulation": True}
        self.fc1, self.fc2 = te.GroupedLinear(p.experts, p.hidden, 2 * p.ffn, **options), te.GroupedLinear(p.experts, p.ffn, p.hidden, **options)
        for module, weights in ((self.fc1, p.w1), (self.fc2, p.w2)):
            for e, w in enumerate(weights):
                getattr(module, f"weight{e}").data.copy_(w)
            with_main_grad(self.weights(module))

    def step(self, microbatch: int = 0) -> torch.Tensor:
        os.environ["NVTE_USE_CUTLASS_GROUPED_GEMM"] = "1" if self.name == "te bf16 cutlass" else "0"  # read at every product
        return super().step(microbatch)

    def weights(self, module: Any) -> list[Any]:
        return [getattr(module, f"weight{e}") for e in range(self.problem.experts)]

    def parameters(self) -> list[Any]:
        return [*self.weights(self.fc1), *self.weights(self.fc2)]

    def run(self, microbatch: int) -> torch.Tensor:
        import transformer_engine.pytorch as te
        from transformer_engine.pytorch.permutation import moe_permute_and_pad_with_probs

        p = self.problem
        routing = torch.zeros(p.tokens, p.experts, dtype=torch.int32, device="cuda").scatter_(1, p.index.long(), 1)
        prob = torch.zeros(p.tokens, p.experts, device="cuda").scatter(1, p.index.long(), self.prob)
        counts, pads = routing.sum(0), None
        if self.recipe is None:
            x, prob, row_ids = te.moe_permute_with_probs(self.x, prob, routing, num_out_tokens=p.tokens * p.k)
        else:
            x, prob, row_ids, pads, counts = moe_permute_and_pad_with_probs(self.x, prob, routing, counts, 16)
        splits, first = counts.tolist(), microbatch == 0
        with te.autocast(enabled=self.recipe is not None, recipe=self.recipe):
            h = self.fc1(x, splits, is_first_microbatch=first)
            y = self.fc2(weighted_swiglu(h, prob), splits, is_first_microbatch=first)
        return te.moe_unpermute(y, row_ids, restore_shape=self.x.shape, map_type="mask", pad_offsets=pads)
