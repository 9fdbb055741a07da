"""Every operation in plain torch, fp32. The specification: kernels are tested against it, bit for bit where they move or round, in dB where they sum."""

from .activation import rmsnorm_quantize, swiglu_backward_quantize, swiglu_quantize
from .fold import fold, fold_transpose
from .gemm import gemm, gemm_exact
from .quantize import dequantize, quantize, quantize_weight

__all__ = [
    "dequantize",
    "fold",
    "fold_transpose",
    "gemm",
    "gemm_exact",
    "quantize",
    "quantize_weight",
    "rmsnorm_quantize",
    "swiglu_backward_quantize",
    "swiglu_quantize",
]
