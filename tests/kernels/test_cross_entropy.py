"""Cross-entropy's parts and its quantised gradient: reference and kernel against float64; labels elsewhere, confident tokens, bad logits."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bitwise, assert_nearly_bitwise, assert_snr, snr_db

from fp8_recipes import kernels, reference
from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.reference import dequantize

BACKENDS = pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "kernel"])
SHAPES = [(5, 128), (7, 4096), (3, 5000), (2, 9216), (4, 272), (2, 16)]
FORMS = [("micro", "row"), ("row", None), ("tile", "row"), ("tile", None), ("micro", None)]


def inputs(rows: int, cols: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits bf16, labels, dloss fp32): unsure tokens, confident ones, right and wrong."""
    gen = torch.Generator().manual_seed(rows + cols)
    logits = 3 * torch.randn(rows, cols, generator=gen)
    labels = torch.randint(0, cols, (rows,), generator=gen)
    logits[0, labels[0]] = 40.0  # sure and right
    if rows > 1:
        logits[1, (labels[1] + 1) % cols] = 30.0  # sure and wrong
    return logits.bfloat16().to(device), labels.to(device), torch.rand(rows, generator=gen).add(0.1).to(device)


def statistics(backend, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m, s, target = backend.softmax_parts(logits, labels)
    return m + s.log(), target


def truth(logits: torch.Tensor, labels: torch.Tensor, dloss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [T], gradient [T, V]) in fp64."""
    x = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x, labels, reduction="none")
    return loss.detach(), torch.autograd.grad(loss, x, dloss.double())[0]


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_against_float64(device, shape, backend):
    logits, labels, dloss = inputs(*shape, device)
    m, s, target = backend.softmax_parts(logits, labels)
    assert_bitwise(m, logits.float().amax(dim=1))
    assert_bitwise(target, logits.float().gather(1, labels[:, None])[:, 0])
    loss, _ = truth(logits, labels, dloss)
    torch.testing.assert_close((m + s.log() - target).double(), loss, rtol=2e-6, atol=4e-6)


@BACKENDS
@pytest.mark.parametrize(("granularity", "fold"), FORMS)
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_against_float64(device, shape, fmt, granularity, fold, backend):
    logits, labels, dloss = inputs(*shape, device)
    q = backend.cross_entropy_backward_quantize(logits, labels, *statistics(backend, logits, labels), dloss, granularity, fmt, fold=fold)
    exact = truth(logits, labels, dloss)[1]
    assert q.payload.dtype == fmt.dtype and q.granularity == ("row" if fold else granularity) and (q.tile_exponent is None) == (q.granularity != "row")
    got = dequantize(q)
    for row in range(1, shape[0]):  # the first token is sure and right: its gradient is nothing next to fp32's 1
        assert_snr(exact[row], got[row], at_least=25 if fmt is E4M3 else 19)
    assert (got[0].double() - exact[0]).abs().max() <= 2e-5 * dloss[0]


@pytest.mark.parametrize(("granularity", "fold"), FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_reference_up_to_the_bound_of_the_scale(device, shape, granularity, fold):
    logits, labels, dloss = inputs(*shape, device)
    lse, target = statistics(reference, logits, labels)
    want = reference.cross_entropy_backward_quantize(logits, labels, lse, target, dloss, granularity, E5M2, fold=fold)
    got = kernels.cross_entropy_backward_quantize(logits, labels, lse, target, dloss, granularity, E5M2, fold=fold)
    if got.granularity == "row":
        same = got.scale == want.scale
        assert ((got.scale == 2 * want.scale) | same)[1:].all() and same[1:].double().mean() >= 0.5
        assert_bitwise(got.tile_exponent, want.tile_exponent)
        if same.any():
            assert_nearly_bitwise(got.payload[same], want.payload[same], 1e-3)
    else:
        assert_bitwise(got.scale, want.scale)
        assert_nearly_bitwise(got.payload, want.payload, 1e-3)
    assert snr_db(dequantize(want), dequantize(got)) > (60 if got.granularity != "row" else 35)


@BACKENDS
def test_parts_of_two_ranks_combine(device, backend):
    """The vocabulary in two parts: labels of the other part, and those of none, have logit -inf; the gradient's halves are those of the whole."""
    logits, labels, dloss = inputs(6, 1024, device)
    labels[5] = -100
    halves = [(part.contiguous(), labels - first) for part, first in ((logits[:, :512], 0), (logits[:, 512:], 512))]
    parts = [backend.softmax_parts(*half) for half in halves]
    m = torch.maximum(parts[0][0], parts[1][0])
    lse = m + sum(p[1] * (p[0] - m).exp() for p in parts).log()
    target = torch.maximum(parts[0][2], parts[1][2])
    torch.testing.assert_close(lse, torch.logsumexp(logits.float(), dim=1), rtol=1e-6, atol=2e-6)
    assert target[5] == -torch.inf and torch.equal(target[:5], logits.float().gather(1, labels[:5, None])[:, 0])
    got = torch.cat([dequantize(backend.cross_entropy_backward_quantize(*half, lse, target, dloss, "micro", E5M2, fold="row")) for half in halves], dim=1)
    exact = torch.cat((truth(logits[:5], labels[:5], dloss[:5])[1], torch.softmax(logits[5:].double(), dim=1) * dloss[5]))
    for row in range(1, 6):
        assert_snr(exact[row], got[row], at_least=19)


def test_labels_of_another_part_leave_no_trace_in_a_tile_that_is_partly_there(device):
    """272 columns are two tiles and an eighth: the labels lie in the rest of the third, behind it, and before the first."""
    logits, _, dloss = inputs(3, 272, device)
    labels = torch.tensor([273, 272 + 128, -5], device=device)
    m, s, target = reference.softmax_parts(logits, labels)
    lse = m + s.log()
    for granularity, fold in FORMS:
        want = reference.cross_entropy_backward_quantize(logits, labels, lse, target, dloss, granularity, E5M2, fold=fold)
        got = kernels.cross_entropy_backward_quantize(logits, labels, lse, target, dloss, granularity, E5M2, fold=fold)
        if got.granularity == "row":
            assert_bitwise(got.tile_exponent, want.tile_exponent)
        else:
            assert_bitwise(got.scale, want.scale)
            assert_nearly_bitwise(got.payload, want.payload, 1e-3)


@BACKENDS
def test_bad_logits_stay_in_their_token_and_tokens_without_weight_are_zero(device, backend):
    logits, labels, dloss = inputs(5, 512, device)
    logits[2, 7], logits[3, 9], dloss[4] = float("nan"), float("inf"), 0.0
    lse, target = statistics(backend, logits, labels)
    assert lse.isnan().tolist() == [False, False, True, True, False]
    q = backend.cross_entropy_backward_quantize(logits, labels, lse, target, dloss, "micro", E5M2, fold="row")
    assert dequantize(q).isnan().all(dim=1).tolist() == [False, False, True, True, False]
    assert q.scale.isfinite().all() and (q.payload.view(torch.uint8)[4] & 0x7F == 0).all()
    good = backend.cross_entropy_backward_quantize(logits[:2], labels[:2], lse[:2].clone(), target[:2].clone(), dloss[:2].clone(), "micro", E5M2, fold="row")
    assert torch.equal(q.payload[:2].view(torch.uint8), good.payload.view(torch.uint8))


@BACKENDS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(4, dtype=torch.int32)}, r"labels must be int64 of shape \(4,\) on .*, got torch.int32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be int64 of shape \(4,\) on .*, got torch.int64 \(3,\)"),
        ({"logits": torch.zeros(4, 0)}, r"logits of shape \(4, 0\) are empty"),
        ({"lse": torch.zeros(4, dtype=torch.float64)}, r"lse must be contiguous fp32 of shape \(4,\)"),
        ({"dloss": torch.zeros(4, 1)}, r"dloss must be contiguous fp32 of shape \(4,\) on .*, got torch.float32 \(4, 1\)"),
    ],
)
def test_bad_input_names_the_value(device, backend, change, message):
    given = {"logits": torch.zeros(4, 32), "labels": torch.zeros(4, dtype=torch.int64)} | {n: torch.zeros(4) for n in ("lse", "target", "dloss")}
    with pytest.raises(ValueError, match=message):
        backend.cross_entropy_backward_quantize(**{name: t.to(device) for name, t in (given | change).items()})


@pytest.mark.gpu
@pytest.mark.parametrize(("granularity", "fold"), [("row", None), ("micro", "row")])
@pytest.mark.parametrize("vocabulary", [32000, 128256])
def test_real_vocabularies(device, vocabulary, granularity, fold):
    gen = torch.Generator(device=device).manual_seed(0)
    logits = (3 * torch.randn(2048, vocabulary, generator=gen, device=device)).bfloat16()
    labels = torch.randint(0, vocabulary, (2048,), generator=gen, device=device)
    dloss = torch.full((2048,), 2.0**-13, device=device)
    lse, target = statistics(kernels, logits, labels)
    torch.testing.assert_close(lse, torch.logsumexp(logits.float(), dim=1), rtol=1e-6, atol=4e-6)
    q = kernels.cross_entropy_backward_quantize(logits, labels, lse, target, dloss, granularity, E5M2, fold=fold)
    want = reference.cross_entropy_backward_quantize(logits, labels, lse, target, dloss, granularity, E5M2, fold=fold)
    assert_nearly_bitwise(q.scale, want.scale, 1e-2)
    assert_nearly_bitwise(q.payload, want.payload, 2e-2)
    again = kernels.cross_entropy_backward_quantize(logits, labels, lse, target, dloss, granularity, E5M2, fold=fold)
    assert_bitwise(q, again)
