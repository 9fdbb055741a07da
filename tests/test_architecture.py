"""Architectures as values: what the named ones are, and what contradicts."""

from __future__ import annotations

import dataclasses

import pytest

from fp8_recipes.architecture import ARCHITECTURES, FOG_FLASH, FOG_MAX, FOG_OPT, LLAMA3, OP, Architecture, ArchitectureError, from_name


def test_named_architectures_are_the_papers() -> None:
    assert list(ARCHITECTURES) == ["llama3", "smooth-swiglu", "olmo2", "op", "fog-max", "fog-opt", "fog-flash"]
    for fog in (FOG_MAX, FOG_OPT, FOG_FLASH):
        assert not fog.pre_norm and not fog.final_norm and fog.post_norm and fog.post_norm_gain == "depth" and not fog.gated
        assert fog.embedding_multiplier(0.02) == pytest.approx(50) and fog.branch_gain(16) == 0.25
        assert fog.ffn_width(4096) == 6144 and fog.ffn_width(14336) == 21504
        assert fog.softmax_scale(128) == pytest.approx(0.125), "the paper's 1.5B"
    assert (FOG_MAX.activation, FOG_OPT.activation, FOG_FLASH.activation) == ("xielu", "gelu", "gelu")
    assert (FOG_MAX.qk, FOG_OPT.qk, FOG_FLASH.qk) == ("rmsnorm_frozen", "rmsnorm_frozen", "tanh") and FOG_FLASH.tanh_alpha == 0.5
    assert from_name("fog-max:softmax_gain=2").softmax_scale(128) == pytest.approx(0.17678, abs=1e-5), "the paper's 390M"
    assert LLAMA3.softmax_scale(64) == 0.125 and LLAMA3.embedding_multiplier(0.02) == 1 and LLAMA3.branch_gain(16) == 1 and LLAMA3.ffn_width(4096) == 4096
    assert OP.branch_gain(16) == 0.25 and not OP.post_norm and not OP.pre_norm
    with pytest.raises(dataclasses.FrozenInstanceError):
        LLAMA3.qk = "tanh"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fog", "unknown architecture 'fog'; known: llama3, .*did you mean op or fog-opt or fog-max|did you mean"),
        ("llama", "unknown architecture 'llama'.*did you mean llama3"),
        ("llama3:activaton=gelu", "no key 'activaton' .did you mean activation"),
        ("llama3:activation=silu", "activation='silu' is not one of swiglu, smooth_swiglu, gelu, xielu"),
        ("llama3:qk=layernorm", "qk='layernorm' is not one of none, rmsnorm, rmsnorm_frozen, tanh"),
        ("llama3:pre_norm=no", "pre_norm='no' must be true or false"),
        ("llama3:softmax_gain=large", "softmax_gain='large' must be a number"),
        ("llama3:softmax_gain=0", "softmax_gain=0.0 must be a positive number"),
        ("llama3:softmax_gain=nan", "softmax_gain=nan must be a positive number"),
        ("llama3:post_norm_gain=depth", "post_norm_gain=depth is the gain of a post-norm; set post_norm=true, or use layer_scale=true"),
        ("olmo2:layer_scale=true", "layer_scale=true beside post_norm=true.*use post_norm_gain=depth"),
        ("fog-max:tanh_alpha=1", "tanh_alpha=1.0 belongs to qk=tanh, and this has qk=rmsnorm_frozen"),
        ("fog-max:activation=gelu", r"'fog-max': activation=gelu contradicts the name: fog-max has activation=xielu \(fog-opt has activation=gelu\)"),
        ("fog-flash:qk=rmsnorm_frozen", r"qk=rmsnorm_frozen contradicts the name: fog-flash has qk=tanh \(fog-opt has qk=rmsnorm_frozen\)"),
        ("fog-opt:pre_norm=true", "pre_norm=true contradicts the name: fog-opt has pre_norm=false; leave it out, or give the combination a name of its own"),
        ("fog-opt:activation=swiglu", "activation=swiglu contradicts the name: fog-opt has activation=gelu; leave"),
        ("fog-opt:final_norm=true", "final_norm=true contradicts the name"),
        ("fog-opt:embedding=plain", "embedding=plain contradicts the name"),
    ],
)
def test_contradictions_name_the_option_and_the_way_out(spec: str, words: str) -> None:
    with pytest.raises(ArchitectureError, match=words):
        from_name(spec)


def test_own_combinations_have_their_own_name() -> None:
    mine = from_name("fog-max:name=mine,activation=swiglu")
    assert mine.name == "mine" and mine.gated and mine.ffn_width(4096) == 4096 and mine.post_norm
    assert str(mine).startswith("mine(pre_norm=false, post_norm=true") and "activation=swiglu" in str(mine)
    assert from_name("fog-flash:tanh_alpha=1").tanh_alpha == 1.0
    with pytest.raises(ArchitectureError, match="width of a gated one; 333 is odd"):
        FOG_MAX.ffn_width(333)
    assert Architecture("plain") == dataclasses.replace(LLAMA3, name="plain")
