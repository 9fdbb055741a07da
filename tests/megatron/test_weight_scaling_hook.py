"""Automatic weight scaling: several optimizers in one step, checkpoints, and what Megatron hands us."""

from __future__ import annotations

import argparse
import types

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from fp8_recipes.weight_scaling import ATTRIBUTE, WeightScaling, adam_update_bound  # noqa: E402

BETAS = (0.9, 0.95)
BOUND = adam_update_bound(*BETAS)


def adam(lr, *, parameter=None, betas=BETAS):
    parameter = torch.nn.Parameter(torch.ones(4, 4)) if parameter is None else parameter
    return torch.optim.AdamW([parameter], lr=lr, betas=betas)


def step(*optimizers):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()


def test_several_optimizers_count_one_step_and_the_largest_reach():
    clock, small, large = WeightScaling(), adam(1e-3), adam(3e-3)
    clock.attach(small)
    clock.attach(large)
    for n in range(1, 4):
        step(small, large)
        assert clock.steps == n
        assert clock.travel == pytest.approx(n * 3e-3 * BOUND)


def test_order_of_the_optimizers_does_not_matter():
    clocks = []
    for order in ((1e-3, 3e-3), (3e-3, 1e-3)):
        clock = WeightScaling()
        optimizers = [adam(lr) for lr in order]
        for one in optimizers:
            clock.attach(one)
        step(*optimizers)
        clocks.append((clock.steps, clock.travel))
    assert clocks[0][0] == clocks[1][0] == 1 and clocks[0][1] == pytest.approx(clocks[1][1])


def test_an_optimizer_that_steps_alone_is_still_covered():
    """One of two optimizers skips steps: the travel must still bound the other's."""
    clock, a, b = WeightScaling(), adam(1e-3), adam(2e-3)
    clock.attach(a)
    clock.attach(b)
    step(a)
    step(a, b)
    step(b)
    assert clock.travel >= 2 * 2e-3 * BOUND * 0.999


def test_a_step_after_a_measurement_is_a_new_step():
    clock, a, b = WeightScaling(), adam(1e-3), adam(1e-3)
    clock.attach(a)
    clock.attach(b)
    weight = torch.nn.Parameter(torch.ones(4, 4))
    step(a)  # b skipped this one
    state = clock.track(weight)
    state.amax_and_increment(weight)
    step(b)
    assert state.amax_and_increment(weight)[1] >= 1e-3 * BOUND * 0.999


def test_prediction_bounds_the_weight_with_two_optimizers():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 8) * 0.02) for _ in range(2)]
    optimizers = [adam(1e-2, parameter=weights[0]), adam(3e-2, parameter=weights[1])]
    clock = WeightScaling(interval=10)
    for one in optimizers:
        clock.attach(one)
    states = [clock.track(w) for w in weights]
    for _ in range(35):
        for w, state in zip(weights, states, strict=True):
            amax, increment = state.amax_and_increment(w)
            assert float(w.detach().abs().max()) <= float(amax) + increment
        for w in weights:
            w.grad = torch.randn_like(w)
        for one in optimizers:
            one.step()


def test_reanchor_gives_a_fresh_process_and_the_running_one_the_same_numbers():
    def after_save(warm: bool) -> list[tuple[float, float]]:
        parameter = torch.nn.Parameter(torch.full((4, 4), 0.75))
        clock, optimizer = WeightScaling(), adam(1e-3)
        clock.attach(optimizer)
        state = clock.track(parameter)
        if warm:
            for n in range(7):
                state.amax_and_increment(parameter)
                optimizer.param_groups[0]["lr"] = 1e-3 / (n + 3)
                step(optimizer)
        clock.reanchor()
        seen = []
        for n in range(5):
            amax, increment = state.amax_and_increment(parameter)
            seen.append((float(amax), increment))
            optimizer.param_groups[0]["lr"] = 1e-3 / (n + 11)
            step(optimizer)
        return seen

    assert after_save(True) == after_save(False)


def test_optimizer_without_a_bound_measures_every_step_and_says_so():
    messages = []
    clock = WeightScaling(on_message=messages.append)
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    sgd = torch.optim.SGD([parameter], lr=0.5)
    clock.attach(sgd)
    assert "SGD" in messages[0] and clock.effective_interval == 0
    state = clock.track(parameter)
    state.amax_and_increment(parameter)
    step(sgd)
    amax, increment = state.amax_and_increment(parameter)
    assert increment == 0.0 and float(amax) == pytest.approx(0.5, rel=0.01)


def test_betas_without_a_bound_are_refused_when_attached():
    with pytest.raises(ValueError, match="weight_scale=measured"):
        WeightScaling().attach(adam(1e-3, betas=(0.99, 0.95)))


# --- Megatron -----------------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hook():
    pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
    pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")
    from fp8_recipes.megatron import weight_scaling_hook

    yield weight_scaling_hook
    weight_scaling_hook._clocks.clear()


class Wrapped:
    """Megatron's MixedPrecisionOptimizer, as far as the hook looks at it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def chained(*members):
    return types.SimpleNamespace(chained_optimizers=list(members))


def test_inner_optimizers_of_chains_and_stubs(hook):
    a, b, c = adam(1e-3), adam(1e-3), adam(1e-3)
    stub = types.SimpleNamespace(optimizer=None, is_stub_optimizer=True)
    assert hook.inner_optimizers(chained(Wrapped(a), chained(Wrapped(b)), stub)) == [a, b]
    assert hook.inner_optimizers(Wrapped(c)) == [c]
    with pytest.raises(RuntimeError, match="SimpleNamespace holds no torch optimizer"):
        hook.inner_optimizers(chained(types.SimpleNamespace(optimizer=None)))


def te_like(monkeypatch, hook):
    """A model with the classes that the hook looks for; TransformerEngine's own modules cannot be built without a GPU."""
    import transformer_engine.pytorch as te

    class Linear(torch.nn.Module):
        def __init__(self, out_features, in_features, tp_size=1, parallel_mode=None, tp_group=None):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(out_features, in_features))
            self.bias = torch.nn.Parameter(torch.zeros(out_features))
            self.tp_size, self.parallel_mode, self.tp_group = tp_size, parallel_mode, tp_group

    class LayerNormLinear(Linear):
        pass

    class LayerNormMLP(torch.nn.Module):
        pass

    for cls in (Linear, LayerNormLinear, LayerNormMLP):
        monkeypatch.setattr(te, cls.__name__, cls)
    return Linear, LayerNormLinear


def arguments_of(spec, **more):
    return argparse.Namespace(fp8="e4m3", fp8_recipe=spec, te_precision_config_file=None, first_last_layers_bf16=False, num_layers=2, **more)


def test_every_te_weight_is_tracked_with_its_tensor_parallel_group(monkeypatch, hook, capsys):
    Linear, LayerNormLinear = te_like(monkeypatch, hook)
    model = torch.nn.Sequential(
        Linear(8, 4), LayerNormLinear(8, 4, 2, "column", "group"), Linear(8, 4, 2, None, "group"), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
    )
    inner = adam(1e-2)
    clock = hook.on_model_and_optimizer(arguments_of("moss:interval=7"), [model], chained(Wrapped(inner)))
    assert clock.interval == 7
    groups = [getattr(m.weight, ATTRIBUTE).group if hasattr(m.weight, ATTRIBUTE) else "untracked" for m in model]
    assert groups == [None, "group", None, "untracked", "untracked"]
    assert not hasattr(model[0].bias, ATTRIBUTE)
    step(inner)
    assert clock.steps == 1
    out = capsys.readouterr().out
    assert "FP8 moss" in out and "3 weight scales predicted" in out


def test_measured_and_stock_recipes_get_no_clock(monkeypatch, hook, capsys):
    Linear, _ = te_like(monkeypatch, hook)
    model = torch.nn.Sequential(Linear(8, 4))
    assert hook.on_model_and_optimizer(arguments_of("row"), [model], Wrapped(adam(1e-3))) is None
    assert "FP8 row" in capsys.readouterr().out
    assert hook.on_model_and_optimizer(arguments_of("tensorwise"), [model], Wrapped(adam(1e-3))) is None
    assert capsys.readouterr().out == "" and not hasattr(model[0].weight, ATTRIBUTE)


def test_precision_file_alone_starts_the_clock(monkeypatch, hook, tmp_path):
    Linear, _ = te_like(monkeypatch, hook)
    path = tmp_path / "precision.yaml"
    path.write_text(
        "configs:\n  fp8:\n    transformer_engine_config_type: TEQuantizationParams\n    training_recipe:\n"
        "      fp8_quantization_recipe: custom\n      custom_recipe_factory: fp8_recipes.megatron.factories.moss\n"
        "matchers: {}\n"
    )
    args = arguments_of("tensorwise")
    args.te_precision_config_file = str(path)
    assert hook.specs_in_use(args) == ["moss"]
    assert hook.on_model_and_optimizer(args, torch.nn.Sequential(Linear(8, 4)), Wrapped(adam(1e-3))).interval == 500


def test_log_is_written_under_every_launcher(monkeypatch, hook, tmp_path):
    """--fp8-log begins with the optimizer and not with this package's launcher, so that the adaptor's import line is enough."""
    from megatron.training import training

    monkeypatch.setattr(training, "training_log", stock := training.training_log)
    assert hook.on_model_and_optimizer(arguments_of("tensorwise", fp8_log=None), [], None) is None and training.training_log is stock
    hook.on_model_and_optimizer(arguments_of("tensorwise", fp8_log=str(tmp_path / "logs" / "run.jsonl")), [], None)
    assert training.training_log.__wrapped__ is stock and (tmp_path / "logs").is_dir()


def test_save_and_load_reanchor(monkeypatch, hook):
    from megatron.training import checkpointing, training

    from fp8_recipes.megatron import shims

    shims.install()
    for module in (training, checkpointing):
        for name in ("save_checkpoint", "load_checkpoint"):
            assert hasattr(getattr(module, name), "_fp8_recipes_original")
    monkeypatch.setattr(training, "save_checkpoint", hook._with_reanchor(lambda *a, **k: "saved"))
    Linear, _ = te_like(monkeypatch, hook)
    clock = hook.attach([torch.nn.Sequential(Linear(8, 4))], Wrapped(adam(1e-3)), interval=500)
    clock.advance(0.25)
    assert training.save_checkpoint(1, None) == "saved"
    assert (clock.generation, clock.travel, clock.steps) == (1, 0.0, 0)
