"""Recipes: what is quantised, how finely, where scales come from. A recipe is a value; it does nothing.

    from_name("moss")                              a named recipe
    from_name("moss:interval=200,grad=e5m2")       with overrides
    from_yaml("configs/recipes/moss.yaml")         from a file, same keys
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .formats import FORMATS, Format


class RecipeError(ValueError):
    """A recipe that cannot be honoured. The message names the value and the remedy."""


_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": tuple(FORMATS),
    "weight": tuple(FORMATS),
    "grad": tuple(FORMATS),
    "activation_granularity": ("micro", "tile", "row"),
    "grad_granularity": ("micro", "tile", "row"),
    "weight_granularity": ("tensor", "block"),
    "fold": ("row", "none"),
    "wgrad_fold": ("column_block", "column", "tensor", "none"),
    "global_scale": ("unit", "measured"),
    "weight_scale": ("predicted", "measured"),
    "weight_cache": ("none", "ffn", "row"),
    "moe": ("none", "flow"),
    "moe_saved": ("activation", "h", "input"),
    "attention": ("bf16", "fp8"),
    "head": ("bf16", "fp8"),
    "stock": ("", "delayed"),
}

RECIPES: dict[str, Recipe] = {}
"""The named recipes; filled below."""


@dataclass(frozen=True)
class Recipe:
    """How the three products of every linear layer are quantised.

    activation, weight, grad: FP8 format of x, w and dy ("e4m3" or "e5m2").
    activation_granularity, grad_granularity: what shares a scale when x and dy are quantised: "micro" (1x32), "tile" (1x128) or "row".
    weight_granularity: "tensor", or "block" (128x128; measured scales, no fold).
    fold: "row" folds x and dy to one scale per row inside the quantising kernel, so that every product runs on FP8 matrix units with scales in its epilogue.
        "none" keeps the fine scales and multiplies exactly, by dequantising to bf16: the check, at bf16 speed.
    wgrad_fold: scale of the transposed operands of wgrad: "column_block" (one for 128 features), "column" (one for each; reads both operands once more, for
        models with massive activations) or "tensor"; "none" multiplies the dequantised payloads in bf16 (exactly, at bf16 speed), to tell what the fold along
        the tokens costs.
    global_scale: of micro granularity: "unit" (1.0, one read) or "measured" (MOSS as published, two reads; needs fold="none").
    weight_scale: "predicted" (automatic weight scaling) or "measured" (amax of the weight at every use).
    interval: steps between true measurements of a predicted scale.
    promote: longest sum along K, in elements, that wgrad (and the LM head's dgrad) may make in Hopper's 14-bit FP8 accumulator before it is promoted to FP32;
        0 = no limit. Longer sums run on the library's split accumulator, which promotes far more often.
    weight_cache: "none" casts a bf16 weight whenever it is used. "row" keeps its row-major payload, one byte per parameter, from the first microbatch of a step
        to the last, "ffn" that of Megatron's FFNs only. Experts are FFNs: either value keeps theirs. It speaks of the layers that run this recipe, so with
        `dense` of the experts alone; the LM head's weight is never kept.
    quantize: False leaves every product in bf16.
    moe: "flow" runs a mixture-of-experts layer as one FP8 dataflow from dispatch to combine (`nn.moe`); "none" leaves it to whoever owns the layer.
        With fold="none" or wgrad_fold="none" its payloads (row scales) are multiplied exactly, expert by expert at bf16 speed: the check.
    moe_saved: what such a layer keeps for backward beside the quantised tokens as they arrived: "activation" (fc1's output h and the SwiGLU's, both FP8),
        "h" (h in FP8; the SwiGLU again), or "input" (nothing; permute, fc1 and the SwiGLU again).
    dense: name of the recipe that every other layer of the model runs; empty = this one.
    attention: "fp8" runs QK^T and PV, forward and backward, in TransformerEngine's FP8 attention (cuDNN) with delayed scaling of Q, K, V, S, O and their
        gradients; E4M3 forward, E5M2 backward. "bf16" leaves attention alone.
    head: "fp8" runs the products of Megatron's output layer (the LM head) as `head_recipe` says; "bf16" leaves them alone. It speaks of Megatron's GPTModel
        only: a TransformerEngine or nn model has no layer of that name, and makes its head of what it likes.
    stock: "delayed" leaves the linear layers to TransformerEngine's delayed scaling (of the last 1024 maxima, per tensor), in the formats of `weight` and
        `grad`; empty = this package's quantisation.
    """

    name: str
    activation: str = "e4m3"
    weight: str = "e4m3"
    grad: str = "e4m3"
    activation_granularity: str = "row"
    grad_granularity: str = "row"
    weight_granularity: str = "tensor"
    fold: str = "row"
    wgrad_fold: str = "column_block"
    global_scale: str = "unit"
    weight_scale: str = "measured"
    interval: int = 500
    promote: int = 2048
    weight_cache: str = "none"
    quantize: bool = True
    moe: str = "none"
    moe_saved: str = "h"
    dense: str = ""
    attention: str = "bf16"
    head: str = "bf16"
    stock: str = ""

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            if value not in choices:
                raise RecipeError(f"recipe {self.name!r}: {key}={value!r} is not one of {', '.join(choices)}{_near(str(value), choices)}")
        if self.interval < 1:
            raise RecipeError(f"recipe {self.name!r}: interval={self.interval} must be at least 1 step; use weight_scale=measured to measure at every use")
        if self.promote < 0 or self.promote % 128:
            raise RecipeError(f"recipe {self.name!r}: promote={self.promote} must be 0 (never) or a multiple of 128")
        if self.fold == "row" and self.weight_granularity != "tensor":
            raise RecipeError(f"recipe {self.name!r}: weight_granularity={self.weight_granularity} changes along K; use fold=none with it")
        if self.fold == "row" and self.global_scale == "measured":
            raise RecipeError(f"recipe {self.name!r}: an FP32 global scale cannot be folded; use global_scale=unit, or fold=none")
        if self.global_scale == "measured" and "micro" not in (self.activation_granularity, self.grad_granularity):
            raise RecipeError(f"recipe {self.name!r}: global_scale=measured belongs to micro granularity; set activation_granularity=micro")
        if self.weight_scale == "predicted" and self.weight_granularity != "tensor":
            raise RecipeError(f"recipe {self.name!r}: weight_scale=predicted gives one scale per tensor; use weight_granularity=tensor")
        self._check_moe()
        self._check_stock()
        self._check_head()

    def _check_stock(self) -> None:
        if self.attention == "fp8" and not self.quantize:
            raise RecipeError(f"recipe {self.name!r}: attention=fp8 runs inside an FP8 recipe; use quantize=true, or attention=bf16")
        if self.attention == "fp8" and self.dense and not RECIPES[self.dense].quantize:
            raise RecipeError(f"recipe {self.name!r}: attention=fp8 runs inside the other layers' FP8 recipe, and dense={self.dense} has none; use dense=moss")
        own = [f for f in fields(self) if f.name not in ("name", "attention", "stock", "grad", "activation", "weight")] if self.stock else []
        for f in own:
            if getattr(self, f.name) != f.default:
                raise RecipeError(
                    f"recipe {self.name!r}: {f.name}={getattr(self, f.name)} belongs to this package's quantisation, and stock={self.stock} leaves the linear "
                    "layers to TransformerEngine's; drop it, or use a recipe of this package with attention=fp8 (moss:attention=fp8)"
                )

    def _check_head(self) -> None:
        if self.head == "fp8" and not self.dense_recipe.quantize:
            value = f"dense={self.dense}" if self.dense else "quantize=false"
            raise RecipeError(f"recipe {self.name!r}: head=fp8 takes the other layers' quantisation, and {value} has none; use moss:head=fp8, or head=bf16")

    def _check_moe(self) -> None:
        if self.moe == "flow":
            row_scales = (self.activation_granularity, self.grad_granularity, self.weight_granularity) == ("row", "row", "tensor")
            fold = "none" if self.fold == "none" and row_scales else "row"  # without a fold the experts run exactly, for checking
            wgrad_fold = "column_block" if self.wgrad_fold == "tensor" else self.wgrad_fold
            for key, needed in (("quantize", True), ("fold", fold), ("wgrad_fold", wgrad_fold)):
                if getattr(self, key) != needed:
                    raise RecipeError(f"recipe {self.name!r}: moe=flow folds every operand of its grouped products; it needs {key}={needed}, or use moe=none")
        if self.dense and self.dense not in RECIPES:
            raise RecipeError(f"recipe {self.name!r}: dense={self.dense!r} is not one of {', '.join(RECIPES)}{_near(self.dense, tuple(RECIPES))}")
        if self.dense and RECIPES[self.dense].moe != "none":
            raise RecipeError(f"recipe {self.name!r}: dense={self.dense!r} is itself a recipe for experts; name the one for the other layers, for example moss")
        if self.dense and RECIPES[self.dense].stock:
            raise RecipeError(f"recipe {self.name!r}: dense={self.dense} leaves its layers to TransformerEngine's own scaling; use dense=moss,attention=fp8")

    @property
    def dense_recipe(self) -> Recipe:
        """What every layer outside the experts and the head runs, with this recipe's attention, and its interval: one optimizer has one clock for its predicted
        scales."""
        return replace(RECIPES[self.dense], interval=self.interval, attention=self.attention, head="bf16") if self.dense else self

    @property
    def head_recipe(self) -> Recipe | None:
        """What the LM head runs, None where it stays in bf16: the other layers' recipe with gradients in E5M2. Most of a softmax's gradient lies below E4M3's
        range under the scale of its largest entry, and the rows of rare tokens would miss it (docs/recipes.md)."""
        return self.dense_recipe.with_overrides(head="bf16", grad="e5m2", weight_cache="none") if self.head == "fp8" else None

    @property
    def activation_format(self) -> Format:
        return FORMATS[self.activation]

    @property
    def weight_format(self) -> Format:
        return FORMATS[self.weight]

    @property
    def grad_format(self) -> Format:
        return FORMATS[self.grad]

    @property
    def folded(self) -> bool:
        """Do the products run on FP8 matrix units (True) or as exact bf16 products of dequantised operands (False)?"""
        return self.fold == "row"

    def with_overrides(self, **overrides: Any) -> Recipe:
        """A validated copy with some fields changed; values may be strings. ``dense="bf16"`` and ``quantize=False`` take the head along, unless ``head`` is
        given too."""
        typed = {key: _convert(self, key, value) for key, value in overrides.items()}
        dense = RECIPES.get(typed.get("dense", ""))
        if typed.get("quantize") is False or (dense is not None and not dense.quantize):
            typed.setdefault("head", "bf16")
        return replace(self, **typed)

    def __str__(self) -> str:
        shown = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name != "name")
        return f"{self.name}({shown})"


BF16 = Recipe("bf16", quantize=False)
"""No quantisation: the baseline of every comparison."""
ROW = Recipe("row")
"""One scale per row of x and dy, one measured scale per weight."""
MOSS = Recipe("moss", activation_granularity="micro", grad_granularity="micro", weight_scale="predicted", head="fp8")
"""MOSS on Hopper: 1x32 microscaling folded to rows in the quantising kernel, predicted weight scales; under Megatron the LM head and its loss too."""
MOSS_EXACT = Recipe(
    "moss_exact",
    activation_granularity="micro",
    grad_granularity="micro",
    fold="none",
    global_scale="measured",
    weight_scale="predicted",
)
"""MOSS as published: measured FP32 global scale, micro scales applied inside the product. For checking; runs at bf16 speed."""
TILE = Recipe("tile", activation_granularity="tile", grad_granularity="tile", weight_granularity="block", fold="none")
"""DeepSeek-V3's granularities: 1x128 activations and gradients, 128x128 weights. For checking; runs at bf16 speed."""

RECIPES.update({r.name: r for r in (MOSS, MOSS_EXACT, TILE, ROW, BF16)})

FP8_FLOW_MOE = Recipe("fp8_flow_moe", weight_scale="predicted", moe="flow", dense="moss", head="fp8")
"""FP8-Flow-MoE: experts in FP8 from dispatch to combine with two casts per layer and step; every other layer runs MOSS."""
RECIPES[FP8_FLOW_MOE.name] = FP8_FLOW_MOE

FOG = Recipe("fog", grad="e5m2", attention="fp8", stock="delayed")
"""FOG as published: linear layers and both products of attention in FP8 with delayed scaling. Made for FOG's architectures; this package's own quantisation
with FP8 attention is "moss:attention=fp8"."""
RECIPES[FOG.name] = FOG


def from_name(spec: str) -> Recipe:
    """``"name"`` or ``"name:key=value,key=value"`` to a `Recipe`. Unknown names and keys raise `RecipeError` with the near misses."""
    name, _, overrides = spec.partition(":")
    if name not in RECIPES:
        raise RecipeError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}{_near(name, tuple(RECIPES))}")
    return RECIPES[name].with_overrides(**_parse_overrides(spec, overrides))


def from_yaml(path: str | Path, overrides: str = "") -> Recipe:
    """Read a recipe from YAML: ``base: NAME`` (a named recipe, optional), ``name:``, and any field of `Recipe`."""
    try:
        import yaml
    except ImportError as error:
        raise RecipeError(f"reading {path} needs pyyaml: pip install pyyaml") from error
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: expected a mapping of recipe fields, got {type(data).__name__}")
    if not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{path}: recipe keys must be words, got {[key for key in data if not isinstance(key, str)]}")
    if not isinstance(data.get("name", ""), str):
        raise RecipeError(f"{path}: name={data['name']!r} must be a word")
    base = from_name(str(data.pop("base"))) if "base" in data else Recipe(str(data.get("name", Path(path).stem)))
    return base.with_overrides(**data).with_overrides(**_parse_overrides(str(path), overrides))


def _parse_overrides(spec: str, overrides: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in overrides.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"{spec!r}: override {item!r} must be key=value")
        pairs[key.strip()] = value.strip()
    return pairs


def _convert(recipe: Recipe, key: str, value: Any) -> Any:
    known = {f.name: f for f in fields(recipe)}
    if key not in known:
        raise RecipeError(f"recipe {recipe.name!r} has no key {key!r}{_near(key, tuple(known))}; keys: {', '.join(known)}")
    kind = type(getattr(recipe, key))
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    text = str(value)
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise RecipeError(f"recipe {recipe.name!r}: {key}={value!r} must be true or false")
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise RecipeError(f"recipe {recipe.name!r}: {key}={value!r} must be an integer") from None
    return text


def _near(word: str, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
