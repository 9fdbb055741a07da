"""The cuDNN under TransformerEngine's FP8 attention: which one is loaded, and whether it is right."""

from __future__ import annotations

RIGHT = (9, 19, 0)
"""First cuDNN whose FP8 attention was found right on an H200: o 25, dQ and dK 19, dV 21 dB against fp32 on normal data, at every call
(tests/te/test_attention.py). Also the first that TransformerEngine takes for deterministic (get_attention_backend, dot_product_attention/utils.py). 9.14, which
a system may hold beside torch's, returns without any error an output that differs from call to call, right at some and 0 to 20 dB at others, in batches of 8
and more of sequences of 512 and more (smaller ones were right); Llama3 diverges with it at a tenth of its learning rate (docs/log.md). Versions between were
not tried."""


def cudnn_version() -> tuple[int, int, int] | None:
    """(major, minor, patch) of the cuDNN that TransformerEngine runs, 9.12 or newer by its own check; None on a machine without a GPU.

    Not `torch.backends.cudnn.version`, which raises where the cuDNN that is loaded is older than the one torch was compiled with; TransformerEngine runs there.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    from transformer_engine.pytorch.utils import get_cudnn_version

    return get_cudnn_version()


def wrong(version: tuple[int, int, int] | None) -> str | None:
    """Why FP8 attention may not run on this cuDNN, and the way out; None if it may."""
    if version is None or version >= RIGHT:
        return None
    return (
        f"cuDNN {dots(version)}: FP8 attention of 9.14 returns wrong results without an error, {dots(RIGHT)} is the first that was found right; "
        "if a newer one is installed beside it, as with torch, docs/megatron.md says how to have TransformerEngine load it"
    )


def dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
