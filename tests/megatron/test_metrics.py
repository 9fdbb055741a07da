"""Metrics in Megatron, on plain torch modules with the attributes of a GPTModel: which modules are found and how often a tensor is counted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from metrics_ranks import spawn
from torch.utils.checkpoint import checkpoint

from fp8_recipes.megatron import metrics
from fp8_recipes.metrics import Alarm
from fp8_recipes.recipe import RecipeError
from fp8_recipes.reference import quantize
from fp8_recipes.weight_scaling import WeightScaling

H, F = 16, 32


class Linear(torch.nn.Linear):
    """Megatron's linears return (output, bias)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class Attention(torch.nn.Module):
    def __init__(self, tp: Any) -> None:
        super().__init__()
        self.pg_collection = SimpleNamespace(tp=tp)
        self.linear_qkv, self.linear_proj = Linear(H, 3 * H), Linear(H, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.linear_qkv(x)[0].chunk(3, dim=-1)
        return self.linear_proj(q * k.sigmoid() + v)[0]


class MLP(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = Linear(H, F), Linear(F, H)
        self.tp_group = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(torch.nn.functional.gelu(self.linear_fc1(x)[0]))[0]


class MoE(torch.nn.Module):
    """Two experts, each a module, and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.Module()
        self.experts.local_experts = torch.nn.ModuleList([MLP(), MLP()])
        self.shared_experts = MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2)
        return torch.cat([self.experts.local_experts[0](first), self.experts.local_experts[1](second)]) + self.shared_experts(x)


class Layer(torch.nn.Module):
    def __init__(self, number: int, tp: Any = None, moe: bool = False) -> None:
        super().__init__()
        self.layer_number = number
        self.self_attention, self.mlp = Attention(tp), MoE() if moe else MLP()

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        x = hidden_states + self.self_attention(hidden_states)
        return x + self.mlp(x), None


class GPTModel(torch.nn.Module):
    def __init__(self, numbers: tuple[int, ...], recompute: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(Layer(n, **options) for n in numbers)
        self.mtp = torch.nn.Module()
        self.mtp.layers = torch.nn.ModuleList([Layer(1)])
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.decoder.layers:
            x = checkpoint(lambda y, layer=layer: layer(hidden_states=y)[0], x, use_reentrant=True) if self.recompute else layer(hidden_states=x)[0]
        return x


def args(**changes: Any) -> SimpleNamespace:
    given = {"fp8_metrics_interval": 2, "fp8_metrics_log": None, "fp8_alarm": "warn", "fp8": None, "save": None, "exit_interval": None}
    return SimpleNamespace(**(given | changes))


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._Installed, "run", None)
    monkeypatch.setattr(metrics._Installed, "args", None)
    monkeypatch.setattr(metrics, "_sinks", lambda path: [metrics.JsonLines(path)] if path else [])


def batch() -> torch.Tensor:
    return torch.randn(6, 2, H, generator=torch.Generator().manual_seed(1), requires_grad=True)


def test_modules_found_carry_the_global_layer_number_over_model_chunks() -> None:
    targets = metrics.find_targets([GPTModel((3, 4)), GPTModel((7,), moe=True)], args())
    names = [t.name for t in targets]
    dense = [f"layers.{n}.{t}" for n in (3, 4) for t in ("qkv", "down_input", "block_output")]
    assert names == dense + [f"layers.7.{t}" for t in ("qkv", "down_input", "down_input", "shared_down_input", "block_output")]
    assert all(t.shard is None and t.copies == 1 for t in targets)


def test_latent_attention_is_watched_at_its_own_projections() -> None:
    model = GPTModel((1,))
    attention: Any = model.decoder.layers[0].self_attention
    attention.linear_q_proj, attention.linear_kv_up_proj = Linear(H, H), Linear(H, H)
    del attention.linear_qkv
    assert [t.name for t in metrics.find_targets([model], args())][:2] == ["layers.1.q", "layers.1.kv"]


def test_recompute_and_gradient_accumulation_count_once() -> None:
    readings = []
    for recompute, moe in ((False, False), (True, False)):
        model = GPTModel((1, 2), recompute=recompute, moe=moe)
        run = metrics.install(model, args())
        assert run is not None
        for part in batch().split(3):
            model(part).sum().backward()
        readings.append(run.hooks.end_step(1))
    assert readings[0] == readings[1]
    assert readings[0] is not None and readings[0]["layers.2.block_output"].elements == 6 * 2 * H
    assert readings[0]["layers.1.qkv"].elements == 3 * 6 * 2 * H and readings[0]["layers.1.down_input"].elements == 6 * 2 * F


def test_experts_of_one_layer_are_one_tensor() -> None:
    model = GPTModel((1,), moe=True)
    run = metrics.install([model], args())
    model(batch())
    assert run is not None
    readings = run.hooks.end_step(1)
    assert readings is not None
    assert readings["layers.1.down_input"].elements == readings["layers.1.shared_down_input"].elements == 6 * 2 * F


def test_log_alarm_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    model, options = GPTModel((1,)), args(fp8_metrics_log=str(path), fp8_alarm="stop", save="somewhere")
    assert metrics.install(model, options) is not None
    for iteration in range(1, 6):
        model(batch())
        metrics.after_step(iteration, loss=3.5, grad_norm=1.0, learning_rate=1e-3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert (lines[0]["loss"], lines[0]["grad_norm"], lines[0]["learning_rate"]) == (3.5, 1.0, 1e-3)
    assert options.exit_interval is None
    run = metrics.install(model, options)
    assert run is not None
    run.hooks.active = True
    x = batch().detach()
    x[0, 0, 0] = float("nan")
    model(x)
    metrics.after_step(4)
    assert run.alarms._history["qkv"][0] == [1, 2, 4]  # what the log held before step 4, and step 4 again
    assert options.exit_interval == 4
    assert "layer 1, qkv" in capsys.readouterr().out


def test_training_log_is_wrapped_and_runs_after_every_iteration() -> None:
    calls: list[int] = []

    def training_log(loss_dict: Any, total: Any, learning_rate: Any, iteration: int, *rest: Any) -> str:
        calls.append(iteration)
        return "kept"

    model = GPTModel((1,))
    run = metrics.install(model, args(fp8_metrics_interval=3))
    assert run is not None
    wrapped = metrics.with_after_step(training_log)
    assert hasattr(wrapped, metrics._MARK)
    observed = []
    for iteration in range(1, 7):
        model(batch())
        if run.hooks.active:
            observed.append(iteration)
        assert wrapped({"lm loss": torch.tensor(2.0)}, {}, 1e-3, iteration, 1.0, False, 0, 0.5) == "kept"
    assert (calls, observed) == ([1, 2, 3, 4, 5, 6], [1, 3, 6])


def test_fused_mlp_and_predicted_weights_are_observed() -> None:
    pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
    model = GPTModel((2,))
    states = [WeightScaling(interval=10).track(p) for p in model.parameters()]
    run = metrics.install(model, args(fp8="e4m3"))
    assert run is not None
    x = torch.randn(8, F, generator=torch.Generator().manual_seed(2))
    model.decoder.layers[0].mlp.fp8_observer("linear_fc2", "input", None, quantize(x, "row"))  # type: ignore[operator]
    readings = run.hooks.end_step(1)
    assert readings is not None
    assert readings["layers.2.mlp.linear_fc2.input"].elements == readings["layers.2.down_input"].elements == 8 * F
    assert readings["layers.2.down_input"].kurtosis == pytest.approx(readings["layers.2.mlp.linear_fc2.input"].kurtosis, rel=1e-6)
    assert readings["layers.2.down_input"].scale_exponent_max is None
    weight = readings["layers.2.self_attention.linear_qkv.weight"]
    assert weight.elements == 3 * H * H and weight.saturation_share == 0 and weight.scale_exponent_max is not None
    assert not [name for name in readings if name.startswith("layers.1.")]  # multi-token prediction
    assert all(state.anchor_amax is None for state in states), "watching is no use of a weight: anchors are taken at the next one"


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 100),
        ({"lr_warmup_iters": 300}, 300),
        ({"lr_warmup_samples": 6400, "global_batch_size": 32}, 200),
        ({"lr_warmup_fraction": 0.05, "train_iters": 10_000}, 500),
        ({"lr_warmup_fraction": 0.05, "train_iters": 10_000, "lr_decay_iters": 8_000}, 400),
    ],
)
def test_kurtosis_is_not_judged_while_the_learning_rate_warms_up(changes: dict[str, Any], steps: int) -> None:
    run = metrics.install(GPTModel((1,)), args(**changes))
    assert run is not None and run.alarms.thresholds.warmup == steps


def test_off_means_no_hooks() -> None:
    model = GPTModel((1,))
    assert metrics.install(model, args(fp8_metrics_interval=0)) is None
    assert not any(m._forward_hooks for m in model.modules())
    metrics.after_step(1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fp8_metrics_interval": -1}, "--fp8-metrics-interval -1"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local.*--fp8-metrics-interval 0"),
        ({"fp8_alarm": "stop"}, "--fp8-alarm stop.*--save"),
    ],
)
def test_what_cannot_be_right_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        metrics.install(GPTModel((1,)), args(**changes))


def test_a_model_without_layers_is_named() -> None:
    with pytest.raises(RuntimeError, match="no layers with self_attention"):
        metrics.find_targets([torch.nn.Linear(2, 2)], args(pipeline_model_parallel_size=1))
    assert metrics.find_targets([torch.nn.Linear(2, 2)], args(pipeline_model_parallel_size=2)) == []


# --- two ranks --------------------------------------------------------------------------------------------------------------------------------------------


def _tensor_parallel(rank: int, expected: dict[str, Any]) -> None:
    """Every rank runs the whole model and shows the hooks its half: features of QKV and of the down projection's input, all of the block output."""
    for sequence_parallel in (False, True):
        model = GPTModel((1, 2), tp=dist.group.WORLD)
        targets = metrics.find_targets([model], args(sequence_parallel=sequence_parallel))
        hooks = metrics.MonitorHooks([])
        for target in targets:
            hooks.also(target.module.register_forward_hook(_half(hooks, target, rank, sequence_parallel), with_kwargs=True))
        model(batch())
        readings = hooks.end_step(1)
        assert readings is not None and readings.keys() == expected.keys()
        for name, reading in readings.items():
            for field in ("kurtosis", "pooled_kurtosis", "rms", "amax", "elements"):
                assert getattr(reading, field) == pytest.approx(getattr(expected[name], field), rel=1e-9), (name, field)


def _half(hooks: Any, target: Any, rank: int, sequence_parallel: bool) -> Any:
    def hook(module: Any, given: Any, kwargs: Any, output: Any) -> None:
        x = (output[0] if target.side == "output" else given[0]).detach()
        if target.shard is not None:
            x = x.chunk(2, dim=-1)[rank]
        elif sequence_parallel:
            x = x.chunk(2)[rank]
        hooks.table.add(target.name, x, shard=target.shard, copies=target.copies)

    return hook


def _pipeline(rank: int, expected: dict[str, Any]) -> None:
    """A stage each; the log of the last rank holds both, and both ranks decide to stop."""
    whole = GPTModel((1, 2))
    model = GPTModel((rank + 1,))
    model.decoder.layers[0].load_state_dict(whole.decoder.layers[rank].state_dict())
    x = batch().detach() if rank == 0 else whole.decoder.layers[0](batch().detach())[0].detach()
    options = args(fp8_alarm="stop", save="somewhere", pipeline_model_parallel_size=2)
    run = metrics.install(model, options)
    assert run is not None
    model(x)
    readings = run.hooks.end_step(1)
    assert readings is not None and readings.keys() == expected.keys()
    for name, reading in readings.items():
        assert reading.kurtosis == pytest.approx(expected[name].kurtosis, rel=1e-6), name
    run.hooks.active = True
    model(x * float("nan") if rank == 0 else x)
    metrics.after_step(2)
    assert options.exit_interval == 2


def _both(rank: int, expected: dict[str, Any]) -> None:
    _tensor_parallel(rank, expected)
    _pipeline(rank, expected)


def test_two_ranks_of_tensor_and_of_pipeline_parallelism() -> None:
    pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")
    model = GPTModel((1, 2))
    run = metrics.install(model, args())
    model(batch())
    assert run is not None
    spawn(_both, run.hooks.end_step(1))


def test_stop_leaves_through_exit_interval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(metrics._Installed, "args", args())
    metrics._save_and_exit([Alarm(40, "kurtosis", "layers.1.qkv", 2.0, 1.0, "step 40, layer 1, qkv: grows")])
    assert metrics._Installed.args.exit_interval == 40
    assert "step 40, layer 1, qkv: grows; saving a checkpoint" in capsys.readouterr().out


class TestFlags:
    def test_defaults_are_off(self, configure):
        args, _ = configure("--fp8-recipe moss")
        assert (args.fp8_metrics_interval, args.fp8_metrics_log, args.fp8_alarm) == (0, None, "warn")

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ("--fp8-metrics-interval -1", "--fp8-metrics-interval -1: must be 0"),
            ("--fp8-metrics-log x.jsonl", "--fp8-metrics-log does nothing without --fp8-metrics-interval"),
            ("--fp8-alarm stop", "--fp8-alarm stop does nothing without --fp8-metrics-interval"),
            ("--fp8-metrics-interval 10 --fp8-alarm stop", "needs --save"),
        ],
    )
    def test_what_cannot_work_is_refused(self, configure, flags, words):
        with pytest.raises(RecipeError, match=words):
            configure(f"--fp8-recipe moss {flags}")

    def test_bf16_may_be_watched(self, configure):
        args, _ = configure("--fp8-metrics-interval 10 --fp8-metrics-log x.jsonl")
        assert args.fp8_metrics_interval == 10
