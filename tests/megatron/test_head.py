"""The LM head in FP8: values and gradients, the protocol of main_grad, tied weights, two ranks."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

import fog_models as models  # noqa: E402
import head_worker  # noqa: E402

from fp8_recipes.recipe import from_name  # noqa: E402
from fp8_recipes.reference import dequantize, fold_transpose, quantize  # noqa: E402
from fp8_recipes.weight_scaling import ATTRIBUTE, measure_amax  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
S, B, H, V = 16, 3, 64, 96


@pytest.fixture
def layer(groups):
    """layer("moss") -> the output layer of a GPTModel of `V` tokens and `H` features."""
    return lambda recipe="moss", **changes: head_worker.build(recipe, vocab=V, **changes).output_layer


def snr(value, truth):
    return 10 * math.log10((truth.double().square().sum() / (value.double() - truth.double()).square().sum()).item())


def operands(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(S, B, n, generator=generator, dtype=torch.bfloat16).requires_grad_(n == H) for n in (H, V))


class TestValues:
    @pytest.mark.parametrize("recipe", ["moss", "row", "moss_exact", "tile", "moss:weight_scale=measured", "moss:grad=e5m2"])
    def test_logits_and_gradients_against_float64(self, layer, recipe):
        head = layer(f"{recipe}{',' if ':' in recipe else ':'}head=fp8")
        weight = head.weight.data = head.weight.data.bfloat16()
        x, dlogits = operands()
        logits, bias = head(x)
        logits.backward(dlogits)
        assert logits.shape == (S, B, V) and logits.dtype == x.dtype and bias is None
        assert snr(logits, torch.einsum("sbh,vh->sbv", x.double(), weight.double())) > 27.5
        assert snr(x.grad, torch.einsum("sbv,vh->sbh", dlogits.double(), weight.double())) > 23.5  # E5M2 gradients
        assert snr(head.weight.grad, torch.einsum("sbv,sbh->vh", dlogits.double(), x.double())) > 23.5
        assert x.grad.shape == x.shape and head.weight.grad.dtype == torch.bfloat16

    def test_products_of_the_operands_that_the_recipe_says(self, layer):
        """Against float64 products of the same FP8 values: what is left is the sums' own rounding to fp32."""
        recipe, head = from_name("moss").head_recipe, layer()
        x, dlogits = (t.detach().float() for t in operands())
        x.requires_grad_()
        logits, _ = head(x)
        logits.backward(dlogits)
        xq = quantize(x.detach().view(-1, H), "micro", recipe.activation_format, fold="row")
        dq = quantize(dlogits.view(-1, V), "micro", recipe.grad_format, fold="row")
        w = dequantize(quantize_weight(head.weight.detach())).double()
        assert dq.payload.dtype == torch.float8_e5m2
        torch.testing.assert_close(logits.double().view(-1, V), dequantize(xq).double() @ w.t(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad.double().view(-1, H), dequantize(dq).double() @ w, rtol=1e-5, atol=1e-5)
        dw = dequantize(fold_transpose(dq)).double() @ dequantize(fold_transpose(xq)).double().t()
        torch.testing.assert_close(head.weight.grad.double(), dw, rtol=1e-5, atol=1e-5)

    def test_what_backward_keeps(self, layer):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            head = layer()
            head(next(operands()))
        assert sorted((t.dtype, tuple(t.shape)) for t in kept if t is not head.weight and t.numel() > S * B) == [(torch.float8_e4m3fn, (S * B, H))]

    def test_dgrad_sums_in_the_promoted_accumulator(self, layer, monkeypatch):
        """Sums over a vocabulary lose a fifth of a softmax's gradient in the fast one (docs/numerics.md)."""
        from fp8_recipes import ops

        seen, gemm = [], ops.gemm
        monkeypatch.setattr(ops, "gemm", lambda a, b, **how: seen.append((tuple(b.shape), how.get("promote", 0))) or gemm(a, b, **how))
        x, dlogits = operands()
        layer()(x)[0].backward(dlogits.float().bfloat16())
        assert seen == [((V, H), 0), ((H, V), 2048), ((H, S * B), 2048)]

    def test_frozen_weight_and_frozen_input(self, layer):
        x, dlogits = operands()
        head = layer().requires_grad_(False)
        head(x)[0].backward(dlogits)
        assert x.grad is not None and head.weight.grad is None
        head = layer()
        head(x.detach())[0].backward(dlogits)
        assert head.weight.grad is not None

    def test_weight_changed_between_forward_and_backward_is_noticed(self, layer):
        head = layer()
        logits, _ = head(next(operands()))
        with torch.no_grad():
            head.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            logits.sum().backward()

    def test_nan_stays_in_its_token(self, layer):
        x, _ = operands()
        with torch.no_grad():
            x[2, 1, 5] = math.nan
            bad = layer()(x)[0].isnan().all(dim=-1)
        assert bad.sum() == 1 and bad[2, 1]


def quantize_weight(weight):
    from fp8_recipes.reference import quantize_weight as under

    return under(weight, measure_amax(weight))


class TestMainGrad:
    def test_microbatches_add_up_in_the_epilogue(self, layer):
        head, plain = layer(gradient_accumulation_fusion=True), layer()
        plain.weight.data = head.weight.data
        head.weight.main_grad = torch.full((V, H), 0.5)
        for seed in (0, 1):
            for one in (head, plain):
                x, dlogits = operands(seed)
                one(x.float())[0].backward(dlogits.float())
        assert head.weight.grad is None
        torch.testing.assert_close(head.weight.main_grad, 0.5 + plain.weight.grad, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("zero", [False, True])
    def test_stand_in_for_overlapped_reduction(self, layer, monkeypatch, zero):
        """Under DistributedDataParallel autograd gets a tensor that is not added to main_grad, all zeros where the embedding's gradient is added to it."""
        from transformer_engine.pytorch.module import base

        monkeypatch.setattr(base, "get_dummy_wgrad", lambda shape, dtype, zero=False: torch.full(shape, 0.0 if zero else 7.0, dtype=dtype))
        head = layer(gradient_accumulation_fusion=True)
        head.weight.main_grad, head.weight.grad_added_to_main_grad, head.weight.zero_out_wgrad = torch.zeros(V, H), False, zero
        x, dlogits = operands()
        head(x.float())[0].backward(dlogits.float())
        assert head.weight.grad_added_to_main_grad is True and head.weight.main_grad.abs().sum() > 0
        assert head.weight.grad.unique().tolist() == [0.0 if zero else 7.0]


class TestModel:
    def test_same_parameters_and_checkpoint_as_in_bf16(self, groups):
        eight, sixteen = head_worker.build("moss"), head_worker.build("moss:head=bf16")
        assert [n for n, _ in eight.named_parameters()] == [n for n, _ in sixteen.named_parameters()]
        assert list(eight.state_dict()) == list(sixteen.state_dict())
        assert list(eight.sharded_state_dict()) == list(sixteen.sharded_state_dict())
        assert type(sixteen.output_layer).__name__ == "ColumnParallelLinear" and type(eight.output_layer).__name__ == "OutputLayer"

    def test_patch_and_shim_together_install_it_once(self, groups):
        from fp8_recipes.megatron import head

        model = head_worker.build("moss")
        layer, recipe = model.output_layer, model.output_layer.recipe
        model.config.fp8 = "e4m3"
        head.install(model)
        assert model.output_layer is layer and layer.recipe is recipe

    @pytest.mark.parametrize("tied", [False, True])
    def test_loss_and_every_gradient_near_those_of_bf16(self, groups, tied):
        torch.manual_seed(1)
        reference = head_worker.build("moss:head=bf16", tied=tied)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(3 if parameter.dim() == 2 else 1)
        model = head_worker.build("moss", tied=tied)
        model.load_state_dict(reference.state_dict())
        found, expected = head_worker.step(model), head_worker.step(reference)
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=5e-3) and found["loss"] != expected["loss"]
        assert set(found["gradients"]) == set(expected["gradients"]) and ("output_layer.weight" in found["gradients"]) != tied
        for name, gradient in expected["gradients"].items():
            assert snr(found["gradients"][name], gradient) > 18, name

    @pytest.mark.parametrize("tied", [False, True])
    def test_weight_under_automatic_scaling(self, groups, tied):
        model = head_worker.build("moss", tied=tied)
        weight = model.embedding.word_embeddings.weight if tied else model.output_layer.weight
        assert [name for name, p in model.named_parameters() if hasattr(p, ATTRIBUTE)] == [
            "embedding.word_embeddings.weight" if tied else "output_layer.weight"
        ]
        scale = getattr(weight, ATTRIBUTE)
        head_worker.step(model)
        assert scale.anchor_amax == measure_amax(weight.detach())

    def test_measured_scales_and_other_stages_track_nothing(self, groups):
        from fp8_recipes.megatron import head

        assert not list(head.predicted_weights(head_worker.build("row:head=fp8")))
        first = head_worker.build("moss", last=False)
        assert not hasattr(first, "output_layer") and not list(head.predicted_weights(first))
        assert len(list(head.predicted_weights(head_worker.build("moss", first=False)))) == 1

    def test_metrics_see_input_gradient_and_weight(self, groups):
        from fp8_recipes.megatron import metrics

        model = head_worker.build("moss")
        args = argparse.Namespace(fp8="e4m3", fp8_metrics_interval=1)
        run = metrics.install([model], args)
        try:
            head_worker.step(model.train())
            readings = run.hooks.end_step(1)
        finally:
            run.hooks.remove()
        assert {"output_layer.input", "output_layer.grad", "output_layer.weight"} <= set(readings)
        assert readings["output_layer.grad"].elements == models.SEQ * models.BATCH * models.VOCAB
        assert readings["output_layer.grad"].flush_share == 0


@pytest.fixture(scope="module")
def two_ranks(groups, tmp_path_factory):
    """What one rank gives, and a function: "tp" or "sp" -> [what rank 0 gives, what rank 1 gives] with the same parameters."""
    path = tmp_path_factory.mktemp("head")
    torch.manual_seed(2)
    whole = head_worker.build("moss")
    torch.save({name: p.detach().clone() for name, p in whole.named_parameters()}, path / "whole.pt")
    one = head_worker.step(whole)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tests" / "head_worker.py")]
    ranks = [
        subprocess.Popen([*command, str(r), str(path), "tp", "sp"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    for process in ranks:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
    return one, lambda mode: [torch.load(path / f"{mode}-{rank}.pt") for rank in range(2)]


class TestTwoRanks:
    @pytest.mark.parametrize("mode", ["tp", "sp"])
    def test_loss_and_every_gradient_are_those_of_one_rank(self, two_ranks, mode):
        """To the order of the sums: rows of x are quantised alike wherever they are, and both shards of the weight share one scale."""
        one, parts = two_ranks
        for rank, part in enumerate(parts(mode)):
            assert part["loss"].item() == pytest.approx(one["loss"].item(), rel=1e-5)
            assert set(part["gradients"]) == set(one["gradients"])
            for name, gradient in part["gradients"].items():
                whole = one["gradients"][name]
                if name.endswith("linear_fc1.weight"):
                    whole = torch.cat([half.chunk(2)[rank] for half in whole.chunk(2)])
                elif gradient.shape != whole.shape:
                    (dim,) = (d for d in range(2) if gradient.shape[d] != whole.shape[d])
                    whole = whole.chunk(2, dim=dim)[rank]
                assert snr(gradient, whole) > 80, f"rank {rank}: {name}"


@pytest.mark.gpu
def test_gpu_dgrad_over_a_vocabulary():
    """A softmax's gradient, few large terms and tens of thousands of small ones: exact to a percent in the promoted accumulator, far off in the fast one, as
    the model of it says (docs/recipes.md: 0.3 % and 23 %)."""
    from fp8_recipes.nn import products

    generator = torch.Generator().manual_seed(0)
    recipe, tokens, vocabulary, hidden = from_name("moss").head_recipe, 512, 32000, 256
    frequency = (1 / (torch.arange(vocabulary) + 3.7)).log()
    p = torch.softmax(frequency + 1.5 * torch.randn(tokens, vocabulary, generator=generator), dim=1)
    p[torch.arange(tokens), torch.multinomial(p, 1, generator=generator)[:, 0]] -= 1
    weight = (torch.randn(vocabulary, hidden, generator=generator) + frequency[:, None] / 8).bfloat16().cuda()
    dq = products.quantize_grad((p / tokens).bfloat16().cuda(), recipe)
    operand = products.weight_operand(weight, recipe)
    exact = dequantize(dq).double() @ dequantize(operand.row()).double()
    promoted, fast = ((products.dgrad(dq, operand, promote=n).double() - exact).norm() / exact.norm() for n in (2048, 0))
    assert promoted < 1e-2 < fast, f"relative error {promoted:.1e} promoted, {fast:.1e} fast"


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [32000, 102400])
def test_gpu_products_at_the_width_of_a_vocabulary(vocabulary):
    """Kernels against the reference's formulas where rows are wider than anywhere else: in registers up to 32768, in two reads beyond."""
    from fp8_recipes import ops
    from fp8_recipes.nn import products

    recipe, tokens, hidden = from_name("moss").head_recipe, 256, 128
    generator = torch.Generator().manual_seed(0)
    dlogits = torch.randn(tokens, vocabulary, generator=generator).mul(4).exp().bfloat16()
    q = products.quantize_grad(dlogits.cuda(), recipe)
    expected = quantize(dlogits, "micro", recipe.grad_format, fold="row")
    for name in ("payload", "scale", "tile_exponent"):
        got, want = getattr(q, name).cpu(), getattr(expected, name)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), name
    assert torch.equal(ops.fold_transpose(q).payload.cpu().view(torch.uint8), fold_transpose(expected).payload.view(torch.uint8))
    x = torch.randn(tokens, hidden, generator=generator).bfloat16().cuda()
    main_grad = torch.ones(vocabulary, hidden, device="cuda")
    products.wgrad(q, products.quantize_activation(x, recipe), recipe, out=main_grad, accumulate=True)
    assert snr(main_grad - 1, dlogits.cuda().double().t() @ x.double()) > 20
