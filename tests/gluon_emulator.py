"""Runs the Gluon kernel of `kernels.grouped_promoted` as plain Python on the CPU, where Gluon has no interpreter: one program after another, warps as one.

What is asynchronous on the GPU happens here at the worst moment. A load fills its stage with NaN when it is issued and with data when its barrier is waited
for; a product reads its operands, and a store its memory, when it is waited for. A wait for bytes that were never promised, a load into a stage that a product
may still read, memory written or an accumulator read too early therefore end in an error or in NaN. What only several warps can do wrong is not covered, except
that a load must have a barrier of the threads between the wait for the products and itself.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fp8_recipes.kernels import grouped_promoted


class Pointer:
    """An element of a tensor, or a block of them."""

    def __init__(self, base: torch.Tensor, at: Any = 0) -> None:
        self.base, self.at = base.flatten(), at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.base, self.at + offset)


class Memory:
    """Shared memory, or a part or another view of it."""

    def __init__(self, data: torch.Tensor, program: Program) -> None:
        self.data, self.program = data, program

    def index(self, i: int) -> Memory:
        return Memory(self.data[i], self.program)

    def permute(self, order: tuple[int, int]) -> Memory:
        return Memory(self.data.permute(order), self.program)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Memory:
        return Memory(self.data.view(-1).view(dtype).view(*shape), self.program)

    def load(self, layout: object) -> torch.Tensor:
        return self.data.clone()

    def store(self, value: torch.Tensor) -> None:
        assert value.shape == self.data.shape and value.dtype == self.data.dtype
        assert self.program.shared, "some warp may not have waited until TMA had read this memory"
        self.data.copy_(value)
        self.program.fenced = self.program.synchronised = False


class Descriptor:
    """What TMA knows of a tensor, from Gluon's descriptor of it."""

    def __init__(self, made: Any) -> None:
        self.tensor = made.base.as_strided(made.shape, made.strides)
        self.dtype, self.block, self.layout = made.base.dtype, tuple(made.block_shape), made.layout

    def box(self, origin: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(the part of the tensor, the part of the box) that lies inside the tensor."""
        assert all(o >= 0 for o in origin)
        inside = [max(min(o + b, s) - o, 0) for o, b, s in zip(origin, self.block, self.tensor.shape, strict=True)]
        return tuple(slice(o, o + i) for o, i in zip(origin, inside, strict=True)), tuple(slice(0, i) for i in inside)


class Barrier:
    """Counts phases; a phase is over when its one arrival and all promised bytes are there."""

    def __init__(self) -> None:
        self.phase, self.promised, self.copies, self.arrived = 0, 0, [], False


class Accumulator:
    """The result of products that may still run."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Program:
    """One program: its queues, and the functions of Gluon that the kernel calls."""

    def __init__(self, number: int, programs: int) -> None:
        self.number, self.programs = number, programs
        self.products: list[tuple[Callable[[], None], set[int]]] = []
        self.stores: list[Callable[[], None]] = []
        self.barriers: dict[int, Barrier] = {}
        self.synchronised = True
        self.shared = True  # has every thread learnt what TMA has read?
        self.fenced = False

    # gl
    def load(self, pointer: Pointer, mask: Any = None, other: float = 0.0) -> Any:
        at = torch.as_tensor(pointer.at)
        if mask is None:
            assert int(at.min()) >= 0 and int(at.max()) < pointer.base.numel(), "read outside a tensor"
            value = pointer.base[at]
        else:
            mask = torch.as_tensor(mask)
            value = torch.where(mask, pointer.base[torch.where(mask, at, 0)], other)
        return value.item() if value.dim() == 0 else value

    def thread_barrier(self) -> None:
        self.synchronised = self.shared = True

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(x, torch.Tensor), "the accumulator is read while a product runs"
        return x[..., 0].clone(), x[..., 1].clone()

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Memory:
        data = torch.empty(*shape, dtype=dtype)
        data.view(torch.uint8).fill_(0x7F)
        return Memory(data, self)

    # products
    def product(self, a: Memory, b: Memory, acc: Any, use_acc: bool, is_async: bool) -> Accumulator:
        assert is_async
        result = acc if isinstance(acc, Accumulator) else Accumulator(acc)

        def run() -> None:
            result.value = a.data.float() @ b.data.float() + (result.value if use_acc else 0)

        self.products.append((run, {a.data.data_ptr(), b.data.data_ptr()}))
        return result

    def wait_products(self, pending: int, deps: tuple[Any]) -> Any:
        while len(self.products) > pending:
            self.products.pop(0)[0]()
        self.synchronised = False
        acc = deps[0]
        return acc.value.clone() if isinstance(acc, Accumulator) and not self.products else acc

    # barriers and copies
    def expect(self, memory: Memory, promised: int, pred: bool) -> None:
        barrier = self.barriers[memory.data.data_ptr()]
        if pred:
            assert not barrier.arrived, "the phase before was not waited for"
            barrier.arrived, barrier.promised = True, promised

    def wait(self, memory: Memory, phase: int) -> None:
        barrier = self.barriers[memory.data.data_ptr()]
        if barrier.phase % 2 == phase:  # otherwise the phase is over: the barrier lets pass
            assert barrier.arrived and barrier.promised == sum(size for size, _ in barrier.copies), "waits for ever"
            for _, copy in barrier.copies:
                copy()
            barrier.phase, barrier.arrived, barrier.copies = barrier.phase + 1, False, []

    def load_box(self, descriptor: Descriptor, origin: Sequence[int], memory: Memory, result: Memory, pred: bool) -> None:
        if not pred:
            return
        assert self.synchronised, "some warp may still read the stage"
        assert all(result.data.data_ptr() not in read for _, read in self.products), "a product may still read the stage"
        assert result.data.shape == descriptor.block
        part, box = descriptor.box(origin)
        result.data.view(torch.uint8).fill_(0x7F)

        def copy() -> None:
            to = result.data.view(torch.uint8)
            to.zero_()
            to[box] = descriptor.tensor.view(torch.uint8)[part]

        self.barriers[memory.data.data_ptr()].copies.append((result.data.numel() * result.data.itemsize, copy))

    def fence(self) -> None:
        self.fenced = True

    def store_box(self, descriptor: Descriptor, origin: Sequence[int], source: Memory, add: bool = False) -> None:
        assert self.fenced and self.synchronised and source.data.shape == descriptor.block
        part, box = descriptor.box(origin)

        def copy() -> None:
            descriptor.tensor[part] = source.data[box] + (descriptor.tensor[part] if add else 0)

        self.stores.append(copy)

    def wait_stores(self, pending: int) -> None:
        assert pending == 0
        for store in self.stores:
            store()
        self.stores.clear()
        self.synchronised = self.shared = False

    def names(self) -> dict[str, Any]:
        """What the kernel's module imports, for this program."""

        def where(condition: Any, x: Any, y: Any) -> Any:
            return torch.where(condition, x, y) if isinstance(condition, torch.Tensor) else x if condition else y

        gl = types.SimpleNamespace(
            float32=torch.float32, bfloat16=torch.bfloat16, int32=torch.int32, int64=torch.int64,
            load=self.load, thread_barrier=self.thread_barrier, split=self.split,
            allocate_shared_memory=self.allocate, where=where, program_id=lambda axis: self.number,
            num_programs=lambda axis: self.programs, cdiv=lambda a, b: -(-a // b),
            minimum=min, maximum=max, sum=lambda x, axis: int(x.sum(axis)), to_tensor=lambda x: x,
            static_range=range, SliceLayout=lambda *_: None, arange=lambda a, b, layout: torch.arange(a, b),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), reshape=torch.reshape, permute=torch.permute,
            join=lambda a, b: torch.stack((a, b), -1), convert_layout=lambda x, layout, assert_trivial: x, expand_dims=torch.unsqueeze,
        )  # fmt: skip
        barrier = types.SimpleNamespace(
            MBarrierLayout=lambda: None, init=lambda memory, count: self.barriers.update({memory.data.data_ptr(): Barrier()}),
            expect=self.expect, wait=self.wait,
        )  # fmt: skip
        tma = types.SimpleNamespace(async_copy_global_to_shared=self.load_box, async_copy_shared_to_global=self.store_box, store_wait=self.wait_stores)
        return {
            "gl": gl, "mbarrier": barrier, "tma": tma, "fence_async_shared": self.fence, "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.wait_products, "_fetch": lambda *_: None,
            "_add_to_global": lambda *args: self.store_box(*args, add=True),
        }  # fmt: skip


def launch(kernel: Any, grid: tuple[int], *args: Any, num_warps: int, **constants: Any) -> None:
    """`kernels.launch.launch` of the one kernel that this is for."""
    assert kernel is grouped_promoted._promoted_kernel and num_warps == 8
    for number in range(*grid):
        program = Program(number, *grid)
        names = {name: getattr(value, "value", value) for name, value in vars(grouped_promoted).items()}  # constants without their wrapper
        names |= {n: types.FunctionType(value.fn.__code__, names, n) for n, value in names.items() if hasattr(value, "fn") and hasattr(value.fn, "__code__")}
        names |= program.names()
        given = [Pointer(a) if isinstance(a, torch.Tensor) else Descriptor(a) if hasattr(a, "block_shape") else a for a in args]
        names[kernel.__name__](*given, **constants)
        assert not program.stores and not program.products, "something is left undone"
        assert not any(b.arrived or b.copies for b in program.barriers.values()), "loads that nobody waited for"
