"""Assertions shared by the tests: bit for bit, and signal-to-noise in dB; which functions made a tensor."""

from __future__ import annotations

import math

import torch

from fp8_recipes.reference import dequantize
from fp8_recipes.tensor import ScaledTensor


def nodes_behind(y: torch.Tensor) -> set[str]:
    """Names of the autograd functions that made y."""
    found, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [earlier for earlier, _ in node.next_functions]
    return {type(node).__name__ for node in found}


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    """The bytes of ``t``, one element's bytes in the last dimension."""
    return t.detach().cpu().contiguous().view(torch.uint8).reshape(*t.shape, t.element_size()) if t.dim() else as_bytes(t.reshape(1))[0]


def assert_bitwise(actual: torch.Tensor | ScaledTensor, expected: torch.Tensor | ScaledTensor, name: str = "result") -> None:
    """Equal shape, dtype and bits; on failure names the first bad coordinate with both values and bytes. NaN equals NaN of the same bits."""
    if isinstance(expected, ScaledTensor):
        assert isinstance(actual, ScaledTensor), f"{name} is a {type(actual).__name__}, expected a ScaledTensor"
        assert actual.granularity == expected.granularity, f"{name}.granularity {actual.granularity}, expected {expected.granularity}"
        for field in ("scale", "tile_exponent", "global_scale", "payload"):
            a, e = getattr(actual, field), getattr(expected, field)
            assert (a is None) == (e is None), f"{name}.{field} is {a}, expected {e}"
            if e is not None:
                assert_bitwise(a, e, f"{name}.{field}")
        return
    assert isinstance(actual, torch.Tensor)
    assert actual.dtype == expected.dtype, f"{name} has dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    differs = (as_bytes(actual) != as_bytes(expected)).any(dim=-1)
    if not bool(differs.any()):
        return
    at = tuple(differs.nonzero()[0].tolist()) if differs.dim() else ()
    shown = [f"{float(t[at])} (bytes {as_bytes(t)[at].flip(-1).tolist()})" for t in (actual, expected)]
    raise AssertionError(f"{name}: {int(differs.sum())} of {differs.numel()} elements differ; first at {at}: {shown[0]}, expected {shown[1]}")


def assert_nearly_bitwise(actual: torch.Tensor, expected: torch.Tensor, share: float, name: str = "result") -> None:
    """Bits equal except in at most ``share`` of the elements: for results that round differently where a sum or exp differs in the last place."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{name}: {actual.dtype} {tuple(actual.shape)}"
    differs = (as_bytes(actual) != as_bytes(expected)).any(dim=-1).double().mean().item()
    assert differs <= share, f"{name}: {differs:.3%} of {actual.numel()} elements differ, at most {share:.3%} may"


def snr_db(truth: torch.Tensor, approximation: torch.Tensor) -> float:
    """10 log10(|truth|^2 / |truth - approximation|^2) in fp64; inf when equal."""
    truth, approximation = truth.double(), approximation.double()
    noise = (truth - approximation).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(truth.square().sum().item() / noise)


def assert_quantized(actual: ScaledTensor, expected: ScaledTensor, truth: torch.Tensor) -> None:
    """As `expected` up to what a last place of exp or of a sum moves across a rounding boundary, and as near to the truth within 0.05 dB."""
    assert actual.payload.dtype == expected.payload.dtype
    assert_nearly_bitwise(actual.scale, expected.scale, 1e-4, "scale")
    assert (actual.tile_exponent is None) == (expected.tile_exponent is None)
    if actual.tile_exponent is not None and expected.tile_exponent is not None:
        assert_nearly_bitwise(actual.tile_exponent, expected.tile_exponent, 1e-4, "tile_exponent")
    assert_nearly_bitwise(actual.payload, expected.payload, 1e-3, "payload")
    assert abs(snr_db(truth, dequantize(actual)) - snr_db(truth, dequantize(expected))) < 0.05


def assert_snr(truth: torch.Tensor, approximation: torch.Tensor, at_least: float, name: str = "result") -> None:
    """SNR of at least ``at_least`` dB."""
    got = snr_db(truth, approximation)
    assert got >= at_least, f"{name}: {got:.3f} dB against the truth, expected at least {at_least:.3f} dB"
