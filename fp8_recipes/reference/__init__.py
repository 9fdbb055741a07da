"""Every operation in plain torch, fp32. The specification: kernels are tested against it, bit for bit where they move or round, in dB where they sum."""

from .activation import ActivationGradients, rmsnorm_quantize, swiglu_backward_quantize, swiglu_quantize, swiglu_quantize_saving
from .cross_entropy import cross_entropy_backward_quantize, softmax_parts
from .dispatch import RowLayout, SendMap, combine_sent, copies_of_sent, pack_rows, send_map, unpack_rows
from .experts import measure_experts, quantize_experts
from .fold import fold, fold_transpose
from .gelu import gelu_backward_quantize, gelu_quantize, gelu_quantize_saving
from .gemm import gemm, gemm_exact
from .grouped import GroupedTensor, grouped_fold_transpose, grouped_gemm, grouped_wgrad, scaling_aware_transpose
from .moments import moments
from .permute import RowMap, combine_rows, copies_of_rows, gather_rows, route_map, rows_for
from .qkv import qkv_tanh_rotary, qkv_tanh_rotary_backward
from .quantize import dequantize, quantize, quantize_weight
from .rmsnorm_add import rmsnorm_add, rmsnorm_add_backward
from .routing import chosen_experts, chosen_experts_backward
from .tanh import tanh_bound, tanh_bound_backward
from .xielu import xielu_backward_quantize, xielu_quantize, xielu_quantize_saving

__all__ = [
    "ActivationGradients",
    "GroupedTensor",
    "RowLayout",
    "RowMap",
    "SendMap",
    "chosen_experts",
    "chosen_experts_backward",
    "combine_rows",
    "combine_sent",
    "copies_of_rows",
    "copies_of_sent",
    "cross_entropy_backward_quantize",
    "dequantize",
    "fold",
    "fold_transpose",
    "gather_rows",
    "gelu_backward_quantize",
    "gelu_quantize",
    "gelu_quantize_saving",
    "gemm",
    "gemm_exact",
    "grouped_fold_transpose",
    "grouped_gemm",
    "grouped_wgrad",
    "measure_experts",
    "moments",
    "pack_rows",
    "qkv_tanh_rotary",
    "qkv_tanh_rotary_backward",
    "quantize",
    "quantize_experts",
    "quantize_weight",
    "rmsnorm_add",
    "rmsnorm_add_backward",
    "rmsnorm_quantize",
    "route_map",
    "rows_for",
    "scaling_aware_transpose",
    "send_map",
    "softmax_parts",
    "swiglu_backward_quantize",
    "swiglu_quantize",
    "swiglu_quantize_saving",
    "tanh_bound",
    "tanh_bound_backward",
    "unpack_rows",
    "xielu_backward_quantize",
    "xielu_quantize",
    "xielu_quantize_saving",
]
