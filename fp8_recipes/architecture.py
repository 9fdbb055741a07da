"""Architectures: which norms, which bounds on queries and keys, which activation. An architecture is a value, as a `Recipe` is; `nn.gpt` builds it.

    from_name("fog-flash")                         a named architecture
    from_name("fog-max:softmax_gain=2")            with overrides
    from_name("fog-max:name=mine,activation=gelu") a combination of one's own, under its own name

FOG (arXiv 2505.20524) changes the transformer so that FP8 can hold every tensor of a block, attention included: nothing normalises the input of a branch and
lets its weights grow outliers, a norm bounds each branch's *output*, queries and keys are bounded without a gain that could undo it, and no activation has
a gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from .recipe import _near, _parse_overrides


class ArchitectureError(ValueError):
    """An architecture that contradicts itself or its name. The message names the value and the remedy."""


_CHOICES: dict[str, tuple[str, ...]] = {
    "post_norm_gain": ("one", "depth"),
    "qk": ("none", "rmsnorm", "rmsnorm_frozen", "tanh"),
    "embedding": ("plain", "unit"),
    "activation": ("swiglu", "smooth_swiglu", "gelu", "xielu"),
}
TANH_ALPHA = 0.5
UNGATED_WIDTH = 1.5
"""Width of an FFN without a gate over that of a gated one: 2 matrices of 1.5 F hold as many weights as 3 of F."""


@dataclass(frozen=True)
class Architecture:
    """What distinguishes FOG's variants and their baselines. L layers, heads of E features, initial standard deviation sigma of the weights.

    pre_norm: RMSNorm on the input of attention and FFN. post_norm: RMSNorm on their output, before the residual addition.
    post_norm_gain: initial gain of post_norm: "one", or "depth" = 1/sqrt(L).
    layer_scale: a trained gain per feature, initially 1/sqrt(L), on each branch's output: what a post-norm has anyway, without the norm.
    final_norm: RMSNorm before the LM head.
    qk: of queries and keys, per head and before the rotary positions: "none", "rmsnorm" with a trained gain, "rmsnorm_frozen" without one, or "tanh",
        tanh(alpha x) with one trained alpha each for queries and keys.
    tanh_alpha: initial alpha of "tanh".
    softmax_gain: attention's softmax scale is softmax_gain / sqrt(E), fixed. sqrt(2) is FOG's 0.125 at E = 128.
    embedding: "plain", or "unit" = multiplied by 1/sigma, so that the residual stream starts at standard deviation one.
    activation: "swiglu"; "smooth_swiglu", the same with up divided by max |gate| of the token and the FFN's output multiplied by it; "gelu"; "xielu".
        The last two have no gate and an FFN `UNGATED_WIDTH` times as wide.
    """

    name: str
    pre_norm: bool = True
    post_norm: bool = False
    post_norm_gain: str = "one"
    layer_scale: bool = False
    final_norm: bool = True
    qk: str = "none"
    tanh_alpha: float = TANH_ALPHA
    softmax_gain: float = 1.0
    embedding: str = "plain"
    activation: str = "swiglu"

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            if value not in choices:
                raise self._error(f"{key}={value!r} is not one of {', '.join(choices)}{_near(str(value), choices)}")
        for key in ("tanh_alpha", "softmax_gain"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise self._error(f"{key}={value} must be a positive number")
        if self.post_norm_gain != "one" and not self.post_norm:
            raise self._error("post_norm_gain=depth is the gain of a post-norm; set post_norm=true, or use layer_scale=true for the gain alone")
        if self.layer_scale and self.post_norm:
            raise self._error("layer_scale=true beside post_norm=true would be two gains on one tensor; use post_norm_gain=depth")
        if self.tanh_alpha != TANH_ALPHA and self.qk != "tanh":
            raise self._error(f"tanh_alpha={self.tanh_alpha} belongs to qk=tanh, and this has qk={self.qk}")
        for key, value in _DEFINING.get(self.name, {}).items():
            asked = getattr(self, key)
            if asked != value:
                contradiction = f"{key}={_shown(asked)} contradicts the name: {self.name} has {key}={_shown(value)}{_other(self.name, key, asked)}"
                raise self._error(f"{contradiction}; leave it out, or give the combination a name of its own (name=...)")

    def _error(self, what: str) -> ArchitectureError:
        return ArchitectureError(f"architecture {self.name!r}: {what}")

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "smooth_swiglu")

    def ffn_width(self, glu_width: int) -> int:
        """Inner width of the FFN where a gated one would have ``glu_width``."""
        if self.gated:
            return glu_width
        width = UNGATED_WIDTH * glu_width
        if width != int(width):
            raise self._error(f"activation={self.activation} takes 1.5 times the FFN width of a gated one; {glu_width} is odd, use an even width")
        return int(width)

    def softmax_scale(self, head: int) -> float:
        """Softmax scale of attention with ``head`` features per head."""
        return self.softmax_gain / math.sqrt(head)

    def embedding_multiplier(self, std: float) -> float:
        """What embeddings initialised with standard deviation ``std`` are multiplied by."""
        return 1 / std if self.embedding == "unit" else 1.0

    def branch_gain(self, layers: int) -> float:
        """Initial gain on a branch's output in a model of ``layers`` layers, from post-norm or LayerScale; 1 without either."""
        return layers**-0.5 if self.layer_scale or self.post_norm_gain == "depth" else 1.0

    def with_overrides(self, **overrides: Any) -> Architecture:
        """A validated copy with some fields changed; values may be strings."""
        return replace(self, **{key: self._convert(key, value) for key, value in overrides.items()})

    def _convert(self, key: str, value: Any) -> Any:
        known = tuple(f.name for f in fields(self))
        if key not in known:
            raise self._error(f"no key {key!r}{_near(key, known)}; keys: {', '.join(known)}")
        kind = type(getattr(self, key))
        text = str(value)
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise self._error(f"{key}={value!r} must be true or false")
            return text.lower() == "true"
        if kind is float:
            try:
                return float(text)
            except ValueError:
                raise self._error(f"{key}={value!r} must be a number") from None
        return text

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{f.name}={_shown(getattr(self, f.name))}' for f in fields(self) if f.name != 'name')})"


_FOG: dict[str, Any] = {"pre_norm": False, "post_norm": True, "post_norm_gain": "depth", "layer_scale": False, "final_norm": False, "embedding": "unit"}
_DEFINING: dict[str, dict[str, Any]] = {
    "fog-max": {**_FOG, "qk": "rmsnorm_frozen", "activation": "xielu"},
    "fog-opt": {**_FOG, "qk": "rmsnorm_frozen", "activation": "gelu"},
    "fog-flash": {**_FOG, "qk": "tanh", "activation": "gelu"},
}
"""What a published name stands for; other fields of these may be overridden."""


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _other(name: str, key: str, value: Any) -> str:
    """Which other variant has that value where this one differs in nothing else."""
    for other, defining in _DEFINING.items():
        if other != name and defining == {**_DEFINING[name], key: value}:
            return f" ({other} has {key}={_shown(value)})"
    return ""


LLAMA3 = Architecture("llama3")
"""Pre-norm, SwiGLU: the usual decoder, and the paper's first baseline."""
SMOOTH_SWIGLU = Architecture("smooth-swiglu", activation="smooth_swiglu")
"""Llama3 whose FFN keeps its intermediate small by a factor per token (FOG's variant of arXiv 2409.12517, which has one per channel)."""
OLMO2 = Architecture("olmo2", pre_norm=False, post_norm=True, qk="rmsnorm")
"""Norms on the branches' outputs instead of their inputs, trained QK norms, SwiGLU (arXiv 2501.00656)."""
OP = Architecture("op", pre_norm=False, layer_scale=True, final_norm=False, qk="rmsnorm", embedding="unit", activation="gelu")
"""Outlier-protected block (arXiv 2405.19279): no norms on the residual path, LayerScale, trained QK norms, GeLU."""
FOG_MAX = Architecture("fog-max", softmax_gain=math.sqrt(2), **_DEFINING["fog-max"])
FOG_OPT = Architecture("fog-opt", softmax_gain=math.sqrt(2), **_DEFINING["fog-opt"])
FOG_FLASH = Architecture("fog-flash", softmax_gain=math.sqrt(2), **_DEFINING["fog-flash"])

ARCHITECTURES: dict[str, Architecture] = {a.name: a for a in (LLAMA3, SMOOTH_SWIGLU, OLMO2, OP, FOG_MAX, FOG_OPT, FOG_FLASH)}


def from_name(spec: str) -> Architecture:
    """``"name"`` or ``"name:key=value,key=value"`` to an `Architecture`. Unknown names and keys raise `ArchitectureError` with the near misses."""
    name, _, overrides = spec.partition(":")
    if name not in ARCHITECTURES:
        raise ArchitectureError(f"unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}{_near(name, tuple(ARCHITECTURES))}")
    return ARCHITECTURES[name].with_overrides(**_parse_overrides(spec, overrides))
