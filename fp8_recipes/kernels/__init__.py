"""The operations as Triton kernels for Hopper: the names and signatures of `fp8_recipes.reference`, for CUDA tensors.

Choose through `fp8_recipes.ops`, which takes these for CUDA tensors and the reference for CPU tensors. With ``TRITON_INTERPRET=1`` they run on CPU
tensors, for tests.
"""

from .cross_entropy import cross_entropy_backward_quantize, softmax_parts
from .dispatch import combine_sent, copies_of_sent, pack_rows, send_map, unpack_rows
from .experts import measure_experts, quantize_experts
from .fold_transpose import fold_transpose
from .gemm import gemm
from .grouped_gemm import grouped_gemm
from .grouped_transpose import grouped_fold_transpose
from .grouped_wgrad import grouped_wgrad
from .moments import MOMENT_PARTS, moments
from .permute import combine_rows, gather_rows, route_map
from .qkv import qkv_tanh_rotary, qkv_tanh_rotary_backward
from .quantize import fold, quantize, quantize_weight
from .rmsnorm import rmsnorm_quantize
from .rmsnorm_add import rmsnorm_add, rmsnorm_add_backward
from .routing import chosen_experts, chosen_experts_backward, copies_of_rows
from .swiglu import swiglu_backward_quantize, swiglu_quantize, swiglu_quantize_saving
from .tanh import tanh_bound, tanh_bound_backward
from .tile_transpose import scaling_aware_transpose
from .ungated import (
    gelu_backward_quantize,
    gelu_quantize,
    gelu_quantize_saving,
    xielu_backward_quantize,
    xielu_quantize,
    xielu_quantize_saving,
)

__all__ = [
    "MOMENT_PARTS",
    "chosen_experts",
    "chosen_experts_backward",
    "combine_rows",
    "combine_sent",
    "copies_of_rows",
    "copies_of_sent",
    "cross_entropy_backward_quantize",
    "fold",
    "fold_transpose",
    "gather_rows",
    "gelu_backward_quantize",
    "gelu_quantize",
    "gelu_quantize_saving",
    "gemm",
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
