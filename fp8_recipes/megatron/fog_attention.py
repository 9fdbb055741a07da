"""Megatron's self-attention with everything between the joint projection and attention as one operation each way, for bounds by tanh (FOG-flash)."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.attention import SelfAttention

from ..nn.fog import bound_and_rotated
from ..reference.qkv import HEAD_SIZES, LARGEST_ANGLE


class BoundedSelfAttention(SelfAttention):
    """Megatron's SelfAttention whose q_layernorm and k_layernorm are `fog.TanhBound`: split, bounds and rotary embedding by `nn.fog.bound_and_rotated`.

    Parameters and checkpoints are those of SelfAttention. Results differ in last places from bound and rotation after each other, which round in between; for
    backward only the projection's output is kept. What cannot go this way goes Megatron's: the layers that `static_reason` names, which the report at start
    prints, and the calls that `call_reason` names (packed sequences, inference, a model without these rotary positions), with a warning while training.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.separate = static_reason(self)
        self._angles: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        reason = self.separate or call_reason(self, hidden_states, rotary_pos_emb, args, kwargs)
        if reason is not None:
            if self.training and not self.separate:
                _warn(reason)
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        # both halves of a head turn by the same angles
        self._angles = rotary_pos_emb.view(rotary_pos_emb.shape[0], -1)[:, : self.hidden_size_per_attention_head // 2]
        try:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=None, **kwargs)
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """(query [s, b, heads, E], key, value [s, b, groups, E]); bounded and rotated inside a forward pass that goes this class's way."""
        if self._angles is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        mixed, _ = self.linear_qkv(hidden_states)
        heads_per_group = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        # by the modules' own calls, or data parallelism would not wait for the alphas' all-gather (--overlap-param-gather)
        return bound_and_rotated(mixed, self.q_layernorm(), self.k_layernorm(), self._angles, heads_per_group)


def static_reason(attention: Any) -> str | None:
    """Why this layer keeps split, bounds and rotation apart, or None."""
    config, head = attention.config, attention.hidden_size_per_attention_head
    rules = (
        (not config.apply_rope_fusion, "--no-rope-fusion"),
        (config.rotary_interleaved, "--rotary-interleaved"),
        (config.no_rope_freq and config.no_rope_freq[attention.layer_number - 1], "--no-rope-freq: no rotary positions in this layer"),
        (config.mrope_section is not None, "--mrope-section"),
        (attention._yarn_concentration_factor != 1.0, "YaRN's factor on cosines and sines"),
        (config.num_query_groups < attention.world_size, "fewer query groups than tensor-parallel ranks"),
        (config.attention_output_gate, "--attention-output-gate"),
        (config.test_mode, "test_mode"),
        (config.fine_grained_activation_offloading, "--fine-grained-activation-offloading"),
        (head not in HEAD_SIZES, f"heads of size {head}"),
    )
    return next((reason for wrong, reason in rules if wrong), None)


def call_reason(attention: Any, hidden_states: torch.Tensor, rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why this call keeps them apart, or None. args, kwargs: further arguments of the call; of these only attention_bias goes this way."""
    if InferenceMode.is_active():
        return "an inference engine is active"
    given = [name for name, value in kwargs.items() if value is not None and name != "attention_bias"]
    if args or given:
        return f"called with {', '.join(given) or 'arguments by position'}"
    sequence_parallel = attention.config.sequence_parallel
    positions = hidden_states.shape[0] * (attention.world_size if sequence_parallel else 1)
    wanted = (positions, 1, 1, attention.hidden_size_per_attention_head)
    if not (isinstance(rotary, torch.Tensor) and rotary.shape == wanted and rotary.dtype == torch.float32 and rotary.is_contiguous()):
        found = f"{rotary.dtype} {tuple(rotary.shape)}" if isinstance(rotary, torch.Tensor) else type(rotary).__name__
        return f"rotary positions are {found}, not contiguous fp32 {wanted}"
    if positions * attention.config.context_parallel_size > LARGEST_ANGLE:
        return f"more than {LARGEST_ANGLE} positions"
    return None


def describe(attention: BoundedSelfAttention) -> str:
    """For the report at start."""
    return "split, tanh and rotation as one operation" if attention.separate is None else f"split, tanh and rotation one by one: {attention.separate}"


@cache
def _warn(reason: str) -> None:
    warnings.warn(f"attention bounded by tanh goes Megatron's way, operation by operation: {reason}", stacklevel=3)
