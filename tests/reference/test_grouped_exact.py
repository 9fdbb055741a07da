"""The exact grouped products against float64 at every granularity, and the folded ones against them."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bitwise, snr_db

from fp8_recipes import ops, reference
from fp8_recipes.formats import E4M3, E5M2
from fp8_recipes.reference.grouped import GroupedTensor
from fp8_recipes.reference.grouped_exact import grouped_gemm_exact, grouped_wgrad_exact

OFFSETS = torch.tensor([0, 256, 256, 384], dtype=torch.int32)
BLOCK_EXPERT = torch.tensor([0, 0, 2, -1], dtype=torch.int32)
ROWS, USED = 512, 384
GRANULARITIES = [("row", None), ("tile", None), ("micro", None), ("micro", "measured"), ("tensor", None)]


def rows_of(cols: int, granularity: str, global_scale=None, fmt=E4M3, seed: int = 0):
    """Tokens spread over twelve binades, the last of each group padding; of unused rows the payload is NaN."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, cols, generator=gen) * torch.exp2(torch.randint(-6, 7, (ROWS, 1), generator=gen).float())
    x[250:256] = 0
    q = reference.quantize(x, granularity, fmt, global_scale=global_scale)
    q.payload.view(torch.uint8)[USED:] = 0x7F
    return q


def weights(n: int, k: int, granularity: str):
    return [reference.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(e)), granularity) for e in range(3)]


@pytest.mark.parametrize(("granularity", "global_scale"), GRANULARITIES)
@pytest.mark.parametrize("of_weight", ["block", "tile", "grouped"])
def test_gemm_against_float64(granularity, global_scale, of_weight):
    a = rows_of(272, granularity, global_scale)
    each = weights(24, 272, "tensor" if of_weight == "grouped" else of_weight)
    b = GroupedTensor(torch.stack([q.payload for q in each]), torch.stack([q.scale for q in each])) if of_weight == "grouped" else each
    out = torch.full((ROWS, 24), 7.0)
    assert grouped_gemm_exact(a, b, BLOCK_EXPERT, out=out) is out
    x, w = reference.dequantize(a).double(), [reference.dequantize(q).double() for q in each]
    assert snr_db(torch.cat((x[:256] @ w[0].t(), x[256:USED] @ w[2].t())), out[:USED]) > 120
    assert (out[USED:] == 7).all() and (out[250:256] == 0).all()
    assert grouped_gemm_exact(a, b, BLOCK_EXPERT).dtype == torch.bfloat16


@pytest.mark.parametrize(("granularity", "global_scale"), GRANULARITIES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_wgrad_against_float64(granularity, global_scale, accumulate):
    dy, x = rows_of(32, granularity, global_scale, E5M2, 1), rows_of(272, granularity, global_scale, E4M3, 2)
    before = torch.randn(3, 32, 272)
    out = grouped_wgrad_exact(dy, x, OFFSETS, out=before.clone(), accumulate=accumulate)
    want = before.double() if accumulate else torch.zeros(3, 32, 272, dtype=torch.float64)
    a, b = (reference.dequantize(q).double() for q in (dy, x))
    want[0] += a[:256].t() @ b[:256]
    want[2] += a[256:USED].t() @ b[256:USED]
    assert snr_db(want, out) > 120
    assert torch.equal(out[1], before[1] if accumulate else torch.zeros(32, 272))
    separate = [t.clone() for t in before]
    assert ops.grouped_wgrad_exact(dy, x, OFFSETS, out=separate, accumulate=accumulate) is separate
    assert_bitwise(torch.stack(separate), out)


def test_folded_gemm_is_the_exact_one_where_nothing_was_folded():
    """One scale per row can stand before or behind the sum."""
    a, each = rows_of(64, "row"), weights(16, 64, "row")
    b = GroupedTensor(torch.stack([q.payload for q in each]), torch.stack([q.scale for q in each]))
    exact = ops.grouped_gemm_exact(a, b, BLOCK_EXPERT, out_dtype=torch.float32)
    assert snr_db(exact[:USED], reference.grouped_gemm(a, b, BLOCK_EXPERT, out_dtype=torch.float32)[:USED]) > 120


def test_folds_of_wgrad_against_the_exact_product():
    """What the folds of dy and x cost: the flushes of small tokens beside large ones. The paper's tiles of 128 tokens lose less than whole experts, and both
    far less than FP8 itself."""
    gen = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(ROWS, cols, generator=gen) * torch.exp2(torch.randint(-4, 5, (ROWS, 1), generator=gen).float()) for cols in (48, 32))
    q, g = reference.quantize(x, "tile"), reference.quantize(dy, "tile")
    exact = grouped_wgrad_exact(g, q, OFFSETS, out=torch.empty(3, 32, 48))
    true = torch.stack([dy[a:b].double().t() @ x[a:b].double() for a, b in ((0, 256), (256, 384))])
    quantised = snr_db(true, exact[[0, 2]])
    ours = reference.grouped_wgrad(*(reference.grouped_fold_transpose(t, OFFSETS, BLOCK_EXPERT) for t in (g, q)), OFFSETS, out=torch.empty(3, 32, 48))
    tiles = [reference.scaling_aware_transpose(t, BLOCK_EXPERT) for t in (g, q)]
    a, b = (t.payload.double() * t.scale.double().repeat_interleave(128, dim=0).t() for t in tiles)
    paper = torch.stack([a[:, s] @ b[:, s].t() for s in (slice(0, 256), slice(256, 384))])
    of_ours, of_paper = snr_db(exact[[0, 2]], ours[[0, 2]]), snr_db(exact[[0, 2]], paper)
    assert of_paper >= of_ours > quantised + 6, (of_paper, of_ours, quantised)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grouped_gemm_exact(rows_of(48, "tile"), weights(16, 32, "block"), BLOCK_EXPERT), "contraction lengths differ"),
        (lambda: grouped_gemm_exact(rows_of(48, "tile"), weights(16, 48, "block"), BLOCK_EXPERT[:2]), "block_expert must be"),
        (lambda: grouped_gemm_exact(rows_of(48, "block"), weights(16, 48, "block"), BLOCK_EXPERT), "block scales are shared by 128 rows"),
        (lambda: grouped_gemm_exact(rows_of(48, "tile"), weights(16, 48, "block"), BLOCK_EXPERT, out=torch.zeros(ROWS, 17)), "out must have shape"),
        (lambda: grouped_wgrad_exact(rows_of(32, "tile"), rows_of(48, "tile"), OFFSETS, out=torch.zeros(3, 32, 47)), r"out\[0\] must have shape \(32, 48\)"),
        (lambda: grouped_wgrad_exact(rows_of(32, "tile"), rows_of(48, "tile"), OFFSETS[:3], out=torch.zeros(3, 32, 48)), "offsets must be"),
        (lambda: grouped_wgrad_exact(rows_of(32, "tile"), rows_of(48, "tile"), OFFSETS + 1, out=torch.zeros(3, 32, 48)), "rise in multiples of 128"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
