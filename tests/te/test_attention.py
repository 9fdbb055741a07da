"""FP8 attention in the recipe objects that TransformerEngine gets, and what cuDNN then returns. That it is run: tests/megatron/test_fog_training.py."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")

import torch  # noqa: E402
from transformer_engine.common.recipe import DelayedScaling, Format  # noqa: E402
from transformer_engine.pytorch import IdentityQuantizer, QuantizerRole, autocast, distributed, quantization  # noqa: E402
from transformer_engine.pytorch.module import linear  # noqa: E402
from transformer_engine.pytorch.quantization import CustomRecipeState, DelayedScalingRecipeState, FP8GlobalStateManager  # noqa: E402
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer  # noqa: E402

from fp8_recipes import te  # noqa: E402
from fp8_recipes.recipe import RecipeError  # noqa: E402
from fp8_recipes.te import attention, factory, shims  # noqa: E402
from fp8_recipes.te.quantizers import FP8Quantizer  # noqa: E402


def role(kind, tensor):
    return QuantizerRole(module_type=kind, tensor_type=tensor, name="layer")


FORWARD = [role("dpa", "qkv")] * 3 + [QuantizerRole(name="layer.dpa_output")] * 3 + [role("dpa", "s")] * 3
BACKWARD = [QuantizerRole(name="layer.dpa_grad_input")] * 2 + [role("dpa", "do")] * 2 + [role("dpa", "dp")] * 2


@pytest.mark.parametrize(("mode", "roles"), [("forward", FORWARD), ("backward", BACKWARD)])
def test_every_slot_of_attention_is_delayed_and_the_linears_stay_ours(mode, roles):
    recipe = te.recipe("moss:attention=fp8")
    assert recipe.fp8_dpa and not recipe.fp8_mha and recipe.fp8_format == Format.HYBRID
    state = CustomRecipeState(recipe, mode=mode, num_quantizers=len(roles), device=torch.device("cpu"), roles=roles)
    quantizers = state.make_quantizers()
    assert all(type(q) is Float8Quantizer for q in quantizers), "current scaling would leave Hopper without a kernel"
    assert len({q.scale.data_ptr() for q in quantizers}) == len(quantizers) and state.amax_history.shape == (1024, len(roles))
    assert all(isinstance(recipe.qfactory(role("linear", tensor)), FP8Quantizer) for tensor in ("input", "weight", "grad_output"))


def test_without_fp8_attention_its_slots_are_left_alone():
    recipe = te.recipe("moss")
    assert not recipe.fp8_dpa
    assert all(isinstance(recipe.qfactory(r), IdentityQuantizer) for r in FORWARD + BACKWARD)


@pytest.mark.parametrize(("spec", "formats", "attention"), [("fog", Format.HYBRID, True), ("fog:attention=bf16,grad=e4m3", Format.E4M3, False)])
def test_fog_is_transformer_engines_own_delayed_scaling(spec, formats, attention):
    recipe = te.recipe(spec)
    assert recipe.delayed() and recipe.fp8_format == formats and recipe.fp8_dpa == attention and not recipe.fp8_mha
    assert (recipe.amax_history_len, recipe.amax_compute_algo, recipe.margin) == (1024, "max", 0)


def test_a_cudnn_that_is_wrong_is_refused(monkeypatch):
    monkeypatch.setattr(factory, "cudnn_version", lambda: (9, 14, 0))
    for spec in ("moss:attention=fp8,interval=77", "fog:grad=e4m3"):
        with pytest.raises(RecipeError, match=r"FP8 attention cannot run: cuDNN 9\.14\.0: .* 9\.19\.0 is the first"):
            te.recipe(spec)
    assert te.recipe("moss:interval=77") and te.recipe("fog:attention=bf16,grad=e4m3")


def causal(q, k, v, dy):
    """Output and gradients of causal attention in fp32; q, dy: [sequence, batch, heads, 128], k, v: with a divisor of the heads."""
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    repeats = (1, q.shape[2] // k.shape[2], q.shape[2] // k.shape[2])
    per_head = [x.permute(1, 2, 0, 3).repeat_interleave(n, dim=1) for x, n in zip(leaves, repeats, strict=True)]
    y = torch.nn.functional.scaled_dot_product_attention(*per_head, is_causal=True).permute(2, 0, 1, 3)
    y.backward(dy.float())
    return [y.detach(), *(x.grad for x in leaves)]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["fog", "moss:attention=fp8"])
@pytest.mark.parametrize(("batch", "sequence", "heads", "groups"), [(8, 512, 8, 4), (32, 512, 8, 8), (32, 2048, 8, 4), (2, 4096, 32, 8)])
def test_fp8_attention_is_right_at_every_call(spec, batch, sequence, heads, groups):
    """dB against fp32. cuDNN 9.14 is right where few heads and batches run at once, and from call to call differently wrong where many do."""
    if reason := attention.wrong(attention.cudnn_version()):
        pytest.skip(reason)
    from transformer_engine.pytorch import DotProductAttention

    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v, dy = (
        torch.randn(sequence, batch, n, 128, generator=gen, device="cuda", dtype=torch.bfloat16) for n in (heads, groups, groups, heads)
    )  # fmt: skip
    expected = causal(q, k, v, dy)
    module = DotProductAttention(heads, 128, num_gqa_groups=groups, attn_mask_type="causal", qkv_format="sbhd", attention_dropout=0.0)
    for call in range(6):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with autocast(enabled=True, recipe=te.recipe(spec)):
            y = module(*leaves)
        y.backward(dy.view(y.shape))
        found = [y.detach().view(dy.shape), *(x.grad for x in leaves)]
        snr = [float(20 * torch.log10(want.norm() / (got.float() - want).norm())) for got, want in zip(found, expected, strict=True)]
        if call >= 2:  # the first two casts have scales made of no maxima
            assert all(db > least for db, least in zip(snr, (23, 17, 17, 19), strict=True)), f"call {call}: o, dq, dk, dv at {snr} dB"


class Scaled(torch.autograd.Function):
    """What TransformerEngine's linear does with delayed scaling: casts by its scales, records maxima, and moves backward maxima on if it was the first."""

    @staticmethod
    def forward(ctx, x, module, with_gradients):
        state = module.meta["scaling_fwd"]
        state.amax_history[0].clamp_(min=x.abs().max())
        ctx.module = module
        ctx.move = linear._check_fp8_reduce_and_update() if with_gradients else False
        return x * 1.5 + state.scale.sum() * 2.0**-20

    @staticmethod
    def backward(ctx, dy):
        state = ctx.module.meta["scaling_bwd"]
        state.amax_history[0].clamp_(min=dy.abs().max())
        dx = dy * 1.5 + state.scale.sum() * 2.0**-20
        if ctx.move:
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return dx, None, None


class Delayed(torch.nn.Module):
    """A module under delayed scaling on the CPU: prepare_forward and end_forward of TransformerEngineBaseModule around `Scaled`."""

    def __init__(self, recipe):
        super().__init__()
        self.meta = {"recipe": recipe, "fp8_group": None}
        for key, mode in (("scaling_fwd", "forward"), ("scaling_bwd", "backward")):
            self.meta[key] = DelayedScalingRecipeState(recipe, mode=mode, num_quantizers=2, device=torch.device("cpu"))

    def forward(self, x):
        again = distributed.in_fp8_activation_recompute_phase()
        if again:
            FP8GlobalStateManager.get_old_fp8_meta_tensors_for_recompute(self.meta)
        else:
            FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(self.meta)
            if distributed.is_fp8_activation_recompute_enabled():
                FP8GlobalStateManager.copy_forward_fp8_meta_tensors_for_recompute(self.meta)
        y = Scaled.apply(x, self, torch.is_grad_enabled())
        if again:
            FP8GlobalStateManager.restore_fp8_meta_tensors(self.meta)
        return y


@pytest.fixture
def on_cpu(monkeypatch):
    """Regions, their reduction and recompute without a GPU."""
    shims.delayed_maxima()
    monkeypatch.setenv("NVTE_UNFUSED_FP8_UPDATE", "1")
    monkeypatch.setattr(quantization, "check_recipe_support", lambda recipe: None)
    monkeypatch.setattr(FP8GlobalStateManager, "is_fp8_available", lambda: (True, ""))
    monkeypatch.setattr(distributed, "_get_cuda_rng_state", lambda **_: None)
    monkeypatch.setattr(distributed, "_set_cuda_rng_state", lambda *_, **__: None)
    FP8GlobalStateManager.reset()
    with torch.compiler.set_stance("force_eager"):
        yield
    FP8GlobalStateManager.reset()


def histories(recompute=(), nested=False, layers=4, microbatches=3):
    """(output and gradient of every microbatch, state of every module) of layers of two modules each; ``recompute``: (first, one past the last) layer of each
    recomputed segment. Two microbatches are forward before the first is backward, as in a pipeline."""
    FP8GlobalStateManager.reset()
    recipe = DelayedScaling(amax_history_len=8, amax_compute_algo="max")
    modules = [[Delayed(recipe), Delayed(recipe)] for _ in range(layers)]

    def part(first, last):
        def run(x):
            for layer in modules[first:last]:
                with autocast(enabled=True, recipe=recipe) if nested else contextlib.nullcontext():
                    for module in layer:
                        x = module(x)
            return x

        return run

    def forward(number):
        x = torch.full((4,), 10.0 + number, requires_grad=True)
        y, done = x, 0
        with autocast(enabled=True, recipe=recipe):
            for first, last in recompute:
                y = part(done, first)(y)
                y = distributed.checkpoint(part(first, last), y)
                done = last
            return x, part(done, layers)(y)

    seen, waiting = [], []
    for number in range(microbatches):
        waiting.append(forward(number))
        if len(waiting) == 2 or number == microbatches - 1:
            for x, y in waiting:
                y.sum().backward()
                seen += [y.detach(), x.grad]
            waiting = []
    states = [m.meta[key] for layer in modules for m in layer for key in ("scaling_fwd", "scaling_bwd")]
    return seen + [t.clone() for state in states for t in (state.amax_history, state.scale)], states


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("recompute", [[], [(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 2)], [(1, 2), (3, 4)]])
def test_recompute_and_nested_regions_leave_maxima_and_scales_bit_for_bit(on_cpu, recompute, nested):
    """Nested: a region per layer inside the one around all, as Megatron's layers are under recipes of this package."""
    expected, states = histories()
    assert all((state.amax_history != 0).any(dim=1).sum() == 3 for state in states), "three microbatches, three rows"
    actual, _ = histories(recompute, nested)
    for one, two in zip(actual, expected, strict=True):
        assert torch.equal(one, two)
