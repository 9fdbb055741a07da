"""FOG's architectures in Megatron: the real GPTModel on the CPU against `nn.gpt`, on one rank, under tensor and sequence parallelism and in a pipeline."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

import fog_models as models  # noqa: E402

from fp8_recipes.architecture import ARCHITECTURES, from_name  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FP32 = {True: 1e-4, False: 2e-3}
"""Relative difference of a gradient (2-norm) between two orders of summation in fp32, of a tensor and of one number: xIELU's alphas are sums over a whole
layer that nearly cancel, and differ by 4e-4."""


def assert_same(actual, expected, key):
    assert actual.shape == expected.shape, key
    assert ((actual - expected).norm() / expected.norm()).item() < FP32[expected.numel() > 1], key


def reference(architecture):
    """(loss, parameters, gradients) of the plain model, by Megatron's names."""
    plain = models.plain(architecture)
    loss = plain(*models.batch())
    loss.backward()
    parameters = dict(plain.named_parameters())
    return loss.detach(), models.translate({n: p.detach() for n, p in parameters.items()}), models.translate({n: p.grad for n, p in parameters.items()})


class TestOneRank:
    @pytest.mark.parametrize("name", list(ARCHITECTURES))
    def test_loss_and_every_gradient_are_the_plain_models(self, groups, name):
        architecture = from_name(name)
        loss, parameters, gradients = reference(architecture)
        model = models.build(architecture)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(parameters), "the same parameters, no more"
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                assert parameter.dim() > 0, f"{key}: weight decay spares 1-D parameters, and would meet a 0-dim one"
                parameter.copy_(parameters[key])
        with models.on_cpu():
            found = models.run(model, *models.batch()).mean()
            found.backward()
        assert found.item() == pytest.approx(loss.item(), rel=1e-5)
        for key, gradient in models.gradients(model).items():
            assert_same(gradient, gradients[key], key)

    def test_initial_values(self, groups):
        torch.manual_seed(0)
        model = models.build(from_name("fog-max"), num_layers=4, hidden_size=256, ffn_hidden_size=768, num_attention_heads=4)
        weights = dict(model.named_parameters())
        for key, value in weights.items():
            if key.endswith("post.weight"):
                assert torch.equal(value, torch.full_like(value, 0.5)), "1 / sqrt(4 layers)"
            elif value.dim() == 2:
                assert value.std().item() == pytest.approx(0.02, rel=0.05), f"{key}: no division by sqrt(2 L) in front of a post-norm"
        assert not any("layernorm" in key for key in weights), "neither pre-norms nor a final norm, and queries and keys have no gains"
        with models.on_cpu():
            x = model.embedding(*([torch.arange(models.VOCAB).view(4, 16)] * 2))
        assert x.std().item() == pytest.approx(1, rel=0.05), "embeddings times 1 / 0.02"
        mlp = model.decoder.layers[0].mlp
        assert mlp.activation_func.alpha().tolist() == pytest.approx([0.8, 0.8])
        attention = model.decoder.layers[0].self_attention.core_attention
        assert attention.softmax_scale == pytest.approx(2**0.5 / 64**0.5)

    def test_tanh_starts_at_alpha_and_layer_scale_at_depth(self, groups):
        flash, op = models.build(from_name("fog-flash")), models.build(from_name("op"))
        bound = flash.decoder.layers[1].self_attention
        assert [bound.q_layernorm.alpha.tolist(), bound.k_layernorm.alpha.tolist()] == [[0.5], [0.5]]
        gain = op.decoder.layers[1].mlp_bda.post.weight
        assert gain.shape == (models.WIDTH,) and gain.unique().tolist() == pytest.approx([models.LAYERS**-0.5])

    def test_projections_keep_their_smaller_start_without_a_post_norm(self, groups):
        torch.manual_seed(0)
        model = models.build(from_name("op"), hidden_size=256, ffn_hidden_size=768)
        assert model.decoder.layers[0].mlp.linear_fc2.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)

    def test_experts_take_the_residual_stream_without_a_norm(self, groups):
        options = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 96, "moe_token_dispatcher_type": "allgather"}
        with models.on_cpu(experts=True):
            model = models.build(from_name("fog-flash"), **options)
            loss = models.run(model, *models.batch()).mean()
            loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert not any("pre_mlp_layernorm" in name or "linear_fc1.layer_norm" in name for name in gradients)
        for name in ("mlp.router.weight", "mlp_bda.post.weight", "self_attn_bda.post.weight", "self_attention.q_layernorm.alpha"):
            assert gradients[f"decoder.layers.0.{name}"].abs().sum() > 0, name
        used = [g is not None and bool(g.any()) for name, g in gradients.items() if "layers.0.mlp.experts" in name and "fc1" in name]
        assert len(used) == 8 and sum(used) >= 4

    def test_xielu_of_a_gpu_is_the_same_function(self, groups):
        """CUDA tensors take the compiled form; what is compiled is checked here, the compiler is not."""
        from fp8_recipes.megatron import fog
        from fp8_recipes.nn import fog as parts

        x, dy = torch.randn(2, 8, 2, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
        x, alpha = x.requires_grad_(), torch.tensor([0.8, 0.7], requires_grad=True)
        results = []
        with torch.compiler.set_stance("force_eager"):
            for function in (fog._CompiledXielu, parts._Xielu):
                y = function.apply(x, alpha)
                results.append((y, *torch.autograd.grad(y, (x, alpha), dy.transpose(0, 1).contiguous().transpose(0, 1))))
        for compiled, plain in zip(*results, strict=True):
            assert compiled.dtype == plain.dtype and torch.equal(compiled, plain)

    @pytest.mark.parametrize("name", ["fog-max", "op"])
    def test_pass_without_gradients_keeps_nothing(self, groups, name):
        """Megatron enables gradients around the residual addition whatever surrounds it."""
        model = models.build(from_name(name))
        with models.on_cpu(), torch.no_grad():
            assert not models.run(model, *models.batch()).requires_grad

    @pytest.mark.parametrize(("fp8", "attention", "title"), [(None, "bf16 (attention)", "bf16"), ("hybrid", "FP8 (attention)", "delayed")])
    def test_start_report_names_architecture_and_attention(self, groups, fp8, attention, title):
        from fp8_recipes.megatron import report

        args = argparse.Namespace(fp8=fp8, fp8_recipe="delayed", fp8_dot_product_attention=fp8 is not None, fog="flash", swiglu=False)
        assert report.wanted(args) and not report.wanted(argparse.Namespace(fp8="hybrid", fp8_recipe="delayed"))
        lines = [" ".join(line.split()) for line in report.precision_table(args, [models.build(from_name("fog-flash"))]).splitlines()]
        assert lines[0].endswith(f"--fp8-recipe {title}") and lines[1].startswith("fog-flash(pre_norm=false")
        assert f"decoder.layers.*.self_attention.core_attention 1-2 - {attention}" in lines
        assert "decoder.layers.*.self_attn_bda.post 1-2 64 bf16 (norm)" in lines
        assert "decoder.layers.*.self_attention.q_layernorm 1-2 1 bf16" in lines

    def test_checkpoint_names_every_parameter(self, groups):
        model = models.build(from_name("fog-flash"))
        saved = model.sharded_state_dict()
        for key in ("self_attn_bda.post.weight", "mlp_bda.post.weight", "self_attention.q_layernorm.alpha", "self_attention.k_layernorm.alpha"):
            assert any(name.endswith(key) for name in saved), key


class TestBranch:
    """``residual + dropout(post(x + bias))`` by the way it is called."""

    def tensors(self, dtype=torch.bfloat16):
        x, residual, bias = torch.randn(3, 4, 2, models.WIDTH, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
        return x.requires_grad_(), residual.to(dtype).requires_grad_(), bias[0, 0].clone().requires_grad_()

    def branch(self, **changes):
        from fp8_recipes.megatron import fog

        architecture = from_name("fog-max")
        branch = fog.Branch(models.config_of(architecture, **changes), gain=0.25, norm=True).bfloat16()
        return branch, branch.post.weight

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_norm_and_addition_are_one_node(self, dtype):
        """With --fp32-residual-connection nothing is rounded to bf16 on the way."""
        (x, residual, _), (branch, gain) = self.tensors(dtype), self.branch()
        y = branch(True, False)((x, None), residual, 0.0)
        x64, residual64, gain64 = (t.detach().double().requires_grad_() for t in (x, residual, gain))
        expected = residual64 + x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain64
        assert y.dtype == dtype and type(y.grad_fn).__name__ == "_RMSNormAddBackward"
        step = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(y.double(), expected, rtol=step, atol=1e-6)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        y.backward(dy)
        expected.backward(dy.double())
        assert torch.equal(residual.grad, dy)
        for found, true in ((x, x64), (gain, gain64)):
            assert found.grad.dtype == torch.bfloat16
            torch.testing.assert_close(found.grad.double(), true.grad, rtol=2.0**-8, atol=1e-5)

    def test_bias_and_dropout_go_megatrons_way(self):
        (x, residual, bias), (branch, gain) = self.tensors(), self.branch()
        biased = branch(True, False)((x, bias), residual, 0.0)
        one_node = branch(True, False)((x + bias, None), residual, 0.0)
        torch.testing.assert_close(biased, one_node, rtol=2.0**-7, atol=2.0**-9)  # the norm's result is rounded by itself here
        biased.sum().backward()
        assert bias.grad is not None and x.grad is not None and gain.grad is not None
        torch.manual_seed(8)
        dropped = branch(True, False)((x, None), residual, 0.5)
        norm = branch(True, False)((x, None), torch.zeros_like(residual), 0.0)
        zero = dropped == residual
        assert 0.3 < zero.double().mean() < 0.7
        torch.testing.assert_close(dropped[~zero], (residual + 2 * norm)[~zero], rtol=2.0**-7, atol=2.0**-9)
        assert torch.equal(branch(False, False)((x, None), residual, 0.5), branch(True, False)((x, None), residual, 0.0)), "no dropout in evaluation"

    @pytest.mark.parametrize("bias", [False, True])
    def test_first_pass_under_recompute_keeps_nothing(self, bias):
        """Megatron enables gradients around this call; the layer's input may want one, the branch's output does not."""
        (x, residual, b), (branch, gain) = self.tensors(), self.branch()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
            y = branch(True, False)((x.detach(), b.detach() if bias else None), residual, 0.0)
        assert not kept
        y.sum().backward()
        assert torch.equal(residual.grad, torch.ones_like(residual)) and gain.grad is None

    def test_hooks_of_the_norm_run(self):
        """Data parallelism waits for a parameter's all-gather in a hook of the module that has it (--overlap-param-gather)."""
        (x, residual, _), (branch, _) = self.tensors(), self.branch()
        seen = []
        for module in branch.modules():
            module.register_forward_pre_hook(lambda module, _: seen.extend(module.parameters(recurse=False)))
        branch(True, False)((x, None), residual, 0.0)
        assert len(seen) == 1 and seen[0] is branch.post.weight

    def test_gain_belongs_to_ranks_that_share_a_sequence_and_is_not_centred(self):
        assert not self.branch()[1].sequence_parallel
        assert self.branch(tensor_model_parallel_size=2, sequence_parallel=True)[1].sequence_parallel
        with pytest.raises(ValueError, match="--apply-layernorm-1p.*leave it False"):
            self.branch(layernorm_zero_centered_gamma=True)


TENSOR = [("sp", "fog-max"), ("sp", "fog-flash"), ("sp", "op"), ("sp", "olmo2"), ("tp", "fog-max"), ("tp", "fog-flash")]
PIPELINE = [("pp", "fog-max"), ("pp", "fog-flash"), ("pp", "llama3")]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """two_ranks("sp", "fog-max") -> [what rank 0 gives, what rank 1 gives] of a model with the parameters of `reference`."""
    path = tmp_path_factory.mktemp("ranks")
    jobs = TENSOR + PIPELINE
    for name in {name for _, name in jobs}:
        torch.save(reference(from_name(name))[1], path / f"{name}.pt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tests" / "fog_worker.py")]
    arguments = [str(path), *(f"{mode}:{name}" for mode, name in jobs)]
    ranks = [subprocess.Popen([*command, str(r), *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for process in ranks:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
    return lambda mode, name: [torch.load(path / f"{mode}-{name}-{rank}.pt") for rank in range(2)]


class TestTwoRanks:
    @pytest.mark.parametrize(("mode", "name"), TENSOR)
    def test_tensor_parallelism_changes_no_gradient(self, two_ranks, groups, mode, name):
        architecture = from_name(name)
        (loss, parameters, gradients), ranks = reference(architecture), two_ranks(mode, name)
        model = models.build(architecture)  # for what Megatron says about each parameter
        split = dict(model.named_parameters())
        for rank, part in enumerate(ranks):
            assert part["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
            assert set(part["gradients"]) == set(parameters)
            for key, gradient in part["gradients"].items():
                expected = models.shard(key, split[key], gradients[key], rank, 2, architecture.gated)
                assert_same(gradient, expected, f"rank {rank}: {key}")

    @pytest.mark.parametrize(("mode", "name"), PIPELINE)
    def test_pipeline_puts_every_part_on_its_stage(self, two_ranks, mode, name):
        (loss, parameters, gradients), ranks = reference(from_name(name)), two_ranks(mode, name)
        first, last = (set(part["gradients"]) for part in ranks)
        assert first | last == set(parameters) and not first & last
        assert "embedding.word_embeddings.weight" in first and "output_layer.weight" in last
        assert ("decoder.final_layernorm.weight" in last) == (name == "llama3")
        if name != "llama3":
            assert all(f"decoder.layers.{layer}.mlp_bda.post.weight" in keys for layer, keys in ((0, first), (1, last)))
        assert ranks[1]["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        for part in ranks:
            for key, gradient in part["gradients"].items():
                assert_same(gradient, gradients[key], key)
