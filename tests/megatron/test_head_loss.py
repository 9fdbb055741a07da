"""The loss of an FP8 LM head: Megatron's value, a gradient that exists in FP8 only, who may use the logits."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")

import head_worker  # noqa: E402
from assertions import assert_snr  # noqa: E402

S, B, H, V = 16, 3, 64, 96


class TestLoss:
    """Cross-entropy between the head's forward and backward: its gradient comes as FP8 and never as bf16."""

    @staticmethod
    def given(seed=3):
        """(model in bf16's layers, hidden states, labels [B, S], weights of the tokens)."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(S, B, H, generator=generator, dtype=torch.bfloat16).requires_grad_()
        return x, torch.randint(0, V, (B, S), generator=generator), torch.rand(B, S, generator=generator)

    def test_gradient_is_made_in_fp8_and_autograd_carries_nothing(self, groups, monkeypatch):
        from fp8_recipes import ops
        from fp8_recipes.nn import products

        model = head_worker.build("moss", vocab=V)
        x, labels, weights = self.given()
        made, carried = [], []
        backward = ops.cross_entropy_backward_quantize
        monkeypatch.setattr(ops, "cross_entropy_backward_quantize", lambda *a, **k: made.append(backward(*a, **k)) or made[-1])
        monkeypatch.setattr(products, "quantize_grad", lambda *a: pytest.fail("the gradient of the logits was quantised from bf16"))
        logits, _ = model.output_layer(x)
        logits.register_hook(lambda g: carried.append(g))
        loss = model.compute_language_model_loss(labels, logits)
        (loss * weights).sum().backward()
        assert loss.shape == (B, S) and loss.dtype == torch.float32
        assert [(q.granularity, q.payload.dtype, tuple(q.shape)) for q in made] == [("row", torch.float8_e5m2, (S * B, V))]
        assert carried[0].shape == logits.shape and carried[0].untyped_storage().nbytes() == logits.element_size(), "no memory of a gradient"
        assert x.grad is not None and x.grad.abs().sum() > 0

    @pytest.mark.parametrize("recipe", ["moss", "row", "moss_exact", "tile", "moss_exact:global_scale=unit"])
    def test_loss_is_megatrons_and_gradients_are_near(self, groups, recipe):
        """The same logits through both losses. A scale of the whole tensor that is measured first keeps Megatron's."""
        head = f"{recipe}{',' if ':' in recipe else ':'}head=fp8"
        model = head_worker.build(head, vocab=V)
        x, labels, weights = self.given()
        original = type(model).compute_language_model_loss.__get__(model)
        found = []
        for compute in (model.compute_language_model_loss, original):
            x.grad = None
            logits, _ = model.output_layer(x)
            carried = []
            logits.register_hook(lambda g, carried=carried: carried.append(g.untyped_storage().nbytes()))
            loss = compute(labels, logits)
            (loss * weights).sum().backward()
            found.append((loss.detach(), x.grad.clone(), carried[0] < logits.numel()))
        (ours, dx, fused), (theirs, dx_theirs, not_fused) = found
        assert not not_fused and fused == (recipe != "moss_exact")
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)
        assert_snr(dx_theirs, dx, at_least=20)

    def test_a_label_that_is_no_token_costs_what_it_costs_in_megatron(self, groups):
        model = head_worker.build("moss", vocab=V)
        x, labels, weights = self.given()
        labels[1, 2], weights[1, 2] = -100, 0.0
        logits, _ = model.output_layer(x)
        loss = model.compute_language_model_loss(labels, logits)
        assert loss.isfinite().all()
        torch.testing.assert_close(loss, type(model).compute_language_model_loss(model, labels, logits.detach().clone()), rtol=1e-6, atol=2e-6)
        (loss * weights).sum().backward()
        assert x.grad.isfinite().all() and (x.grad[2, 1] == 0).all()

    def test_evaluation_needs_no_gradient(self, groups):
        model = head_worker.build("moss", vocab=V)
        x, labels, _ = self.given()
        with torch.no_grad():
            logits, _ = model.output_layer(x)
            loss = model.compute_language_model_loss(labels, logits)
        assert loss.grad_fn is None and loss.shape == (B, S)

    def test_two_forward_passes_before_their_backward_passes(self, groups):
        """As pipeline parallelism runs them: each pass has its own edge."""
        model = head_worker.build("moss", vocab=V)
        passes = [self.given(seed) for seed in (3, 4)]
        losses = [model.compute_language_model_loss(labels, model.output_layer(x)[0]) for x, labels, _ in passes]
        for loss, (_, _, weights) in zip(losses, passes, strict=True):
            (loss * weights).sum().backward()
        for x, labels, weights in passes:
            alone = x.detach().clone().requires_grad_()
            (model.compute_language_model_loss(labels, model.output_layer(alone)[0]) * weights).sum().backward()
            assert torch.equal(alone.grad, x.grad)

    def test_logits_used_by_more_than_the_loss_are_noticed(self, groups):
        model = head_worker.build("moss", vocab=V)
        x, labels, _ = self.given()
        logits, _ = model.output_layer(x)
        loss = model.compute_language_model_loss(labels, logits).mean() + 1e-4 * logits.float().square().mean()
        with pytest.raises(RuntimeError, match=r"used by more than its loss .*: add head=bf16 to the recipe, as in --fp8-recipe moss:head=bf16"):
            loss.backward()

    def test_loss_of_somebody_elses_is_quantised_as_it_comes(self, groups):
        model = head_worker.build("moss", vocab=V)
        x, labels, _ = self.given()
        logits, _ = model.output_layer(x)
        theirs = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.t().flatten())
        theirs.backward()
        dx, x.grad = x.grad, None
        model.compute_language_model_loss(labels, model.output_layer(x)[0]).mean().backward()
        assert_snr(dx, x.grad, at_least=20)
