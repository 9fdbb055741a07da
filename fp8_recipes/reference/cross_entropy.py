"""Cross-entropy over a vocabulary, and its gradient quantised where it is computed: what stands between an FP8 LM head's forward and backward products.

With logits x of a token and its label c: ``lse = log sum_j exp x_j``, ``loss = lse - x_c``, ``dx_j = (exp(x_j - lse) - [j = c]) * dloss``. No entry of dx is
larger than the label's: the probabilities sum to one, so ``p_j <= 1 - p_c`` for every other j. A row's scale is therefore known from its label alone.
"""

from __future__ import annotations

import torch

from ..formats import E5M2, Format
from ..tensor import ScaledTensor, check_matrix
from .quantize import quantize


def check_labels(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise unless logits are a matrix [T, V] without gaps and labels int64 [T] on its device."""
    check_matrix(logits, "logits")
    if logits.numel() == 0:
        raise ValueError(f"logits of shape {tuple(logits.shape)} are empty; skip the loss when there are no tokens")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64 or labels.device != logits.device:
        found = f"{labels.dtype} {tuple(labels.shape)} on {labels.device}"
        raise ValueError(f"labels must be int64 of shape ({logits.shape[0]},) on {logits.device}, got {found}")


def check_statistics(logits: torch.Tensor, **vectors: torch.Tensor) -> None:
    """Raise unless every vector is fp32 [T], contiguous, on the device of logits [T, V]."""
    for name, t in vectors.items():
        if t.shape != logits.shape[:1] or t.dtype != torch.float32 or t.device != logits.device or not t.is_contiguous():
            found = f"{t.dtype} {tuple(t.shape)} on {t.device}"
            raise ValueError(f"{name} must be contiguous fp32 of shape ({logits.shape[0]},) on {logits.device}, got {found}")


def softmax_parts(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(largest logit m, sum of exp(x - m), logit of the label), fp32 [T] each. logits: [T, V], labels: int64 [T].

    A label outside 0 .. V - 1 (another rank's part of the vocabulary, or none) has logit -inf. Parts of several ranks combine to those of the whole vocabulary.
    """
    check_labels(logits, labels)
    x = logits.float()
    m = x.amax(dim=1)
    here = (labels >= 0) & (labels < x.shape[1])
    target = x.gather(1, torch.where(here, labels, 0)[:, None])[:, 0]
    return m, (x - m[:, None]).exp().sum(dim=1), torch.where(here, target, -torch.inf)


def cross_entropy_backward_quantize(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    target: torch.Tensor,
    dloss: torch.Tensor,
    granularity: str = "row",
    fmt: Format = E5M2,
    *,
    fold: str | None = None,
) -> ScaledTensor:
    """Gradient of the logits [T, V], quantised. lse, target: of the whole vocabulary (`softmax_parts`), dloss: of each token's loss; fp32 [T].

    The kernel takes a row's scale from the bound above, here it is measured: they may differ by one power of two.
    """
    check_labels(logits, labels)
    check_statistics(logits, lse=lse, target=target, dloss=dloss)
    return quantize(logit_gradient(logits, labels, lse, dloss), granularity, fmt, fold=fold)


def logit_gradient(logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, dloss: torch.Tensor) -> torch.Tensor:
    """dx [T, V] in fp32."""
    p = (logits.float() - lse[:, None]).exp()
    here = (labels >= 0) & (labels < p.shape[1])
    p.scatter_add_(1, torch.where(here, labels, 0)[:, None], torch.where(here, -1.0, 0.0)[:, None])
    return p * dloss[:, None]
