"""Automatic weight scaling: the bound is a bound, it is reached, and a real training run never outgrows its prediction."""

from __future__ import annotations

import math
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fp8_recipes import weight_scaling
from fp8_recipes.formats import scale_from_amax
from fp8_recipes.reference import quantize_weight
from fp8_recipes.weight_scaling import ATTRIBUTE, PredictedScale, WeightScaling, adam_update_bound

BETAS = [(0.9, 0.95), (0.9, 0.999), (0.8, 0.9), (0.0, 0.99), (0.95, 0.95), (0.9, 0.82)]


def quiet(interval: int = 500) -> tuple[WeightScaling, list[str]]:
    messages: list[str] = []
    return WeightScaling(interval=interval, on_message=messages.append), messages


def adam_steps(gradients: torch.Tensor, betas: tuple[float, float], **kwargs) -> torch.Tensor:
    """|step| / lr of torch's AdamW (float64, eps 1e-200) for gradients [steps, n]."""
    w = torch.zeros(gradients.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=1.0, betas=betas, eps=1e-200, weight_decay=0.0, **kwargs)
    moved = []
    for gradient in gradients:
        before = w.detach().clone()
        w.grad = gradient.clone()
        optimizer.step()
        moved.append((w.detach() - before).abs())
    return torch.stack(moved)


def worst_case(betas: tuple[float, float], quiet_steps: int, length: int) -> torch.Tensor:
    """Cauchy-Schwarz holds with equality for gradients proportional to (b1/b2)**age; silence before them takes the bias corrections away."""
    age = torch.arange(length, dtype=torch.float64).flip(0)
    ratio = betas[0] / betas[1]
    return torch.cat((torch.zeros(quiet_steps, dtype=torch.float64), ratio**age))[:, None]


# --- the bound -------------------------------------------------------------------------------------------------------------------------


def test_bound_in_numbers() -> None:
    assert adam_update_bound(0.9, 0.95) == pytest.approx(1.16496, abs=1e-5)
    assert adam_update_bound(0.9, 0.999) == pytest.approx(7.27029, abs=1e-5)
    assert adam_update_bound(0.0, 0.99) == pytest.approx(10.0)


@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_the_worst_gradients_reach_the_bound_and_do_not_pass_it(betas: tuple[float, float]) -> None:
    step = adam_steps(worst_case(betas, int(6 / (1 - betas[1])), 500), betas)[-1].item()
    bound = adam_update_bound(*betas)
    assert 0.99 * bound <= step <= bound * (1 + 1e-9)


@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_short_histories_stay_below_the_bound(betas: tuple[float, float]) -> None:
    """The worst history of every length from 1 on: bias corrections at their largest."""
    bound = adam_update_bound(*betas)
    for length in (1, 2, 3, 5, 8, 13, 30, 60):
        assert adam_steps(worst_case(betas, 0, length), betas)[-1].item() <= bound * (1 + 1e-9)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_random_gradients_stay_below_the_bound(betas: tuple[float, float], amsgrad: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    n, steps = 400, 150
    kinds = [
        torch.randn(steps, n, generator=gen, dtype=torch.float64),
        torch.randn(steps, n, generator=gen, dtype=torch.float64).exp().pow(6),  # heavy tails, one sign
        torch.ones(steps, n, dtype=torch.float64) * 1e-12,
        torch.randn(steps, n, generator=gen, dtype=torch.float64) * (torch.rand(steps, n, generator=gen) < 0.05),  # sparse
        torch.linspace(-10, 10, steps, dtype=torch.float64).exp()[:, None].expand(steps, n),  # growing
    ]
    for gradients in kinds:
        assert adam_steps(gradients, betas, amsgrad=amsgrad).max().item() <= adam_update_bound(*betas) * (1 + 1e-9)


@pytest.mark.parametrize("betas", [(0.9, 0.8), (0.9, 0.81)])
def test_no_bound_when_momentum_outlives_the_variance(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=rf"betas \(0.9, {betas[1]}\): beta1\*\*2 must be below beta2 .* use weight_scale=measured"):
        adam_update_bound(*betas)


@pytest.mark.parametrize("betas", [(1.0, 0.95), (0.9, 1.0), (-0.1, 0.9), (0.9, 0.0)])
def test_betas_outside_the_unit_interval_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\)"):
        adam_update_bound(*betas)


# --- one weight ------------------------------------------------------------------------------------------------------------------------


def one_weight(value: torch.Tensor, interval: int = 500, **options) -> tuple[torch.nn.Parameter, WeightScaling, PredictedScale, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(value)
    clock, _ = quiet(interval)
    optimizer = torch.optim.AdamW([weight], **{"lr": 0.01, "betas": (0.9, 0.95), **options})
    clock.attach(optimizer)
    return weight, clock, clock.track(weight), optimizer


def predicted(scale: PredictedScale, weight: torch.Tensor) -> float:
    anchor, increment = scale.amax_and_increment(weight)
    return anchor.item() + increment


def test_both_bf16_roundings_are_covered() -> None:
    """The master can be half a step above the bf16 weight that was measured, and then be rounded up itself: a full step for next to no travel."""
    for mantissa in (1.0, 1.25, 1.7421875, 1.984375):
        measured = torch.tensor([[mantissa]], dtype=torch.bfloat16)
        master = torch.tensor(mantissa + 2.0**-8 - 2.0**-20)
        assert master.bfloat16() == measured[0, 0]
        later = (master + 2.0**-18).bfloat16().item()
        weight, clock, scale, _ = one_weight(measured)
        predicted(scale, weight)
        clock.advance(2.0**-18)
        assert later > mantissa
        assert predicted(scale, weight) >= later


def test_worst_case_training_is_followed_closely() -> None:
    """The gradients that move a weight fastest, through a schedule: the prediction stays above the weight by a few percent, not more."""
    betas, steps = (0.9, 0.95), 60
    weight, clock, scale, optimizer = one_weight(torch.full((1, 1), 0.25), betas=betas, weight_decay=0.0, eps=1e-30)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.2 + abs(math.sin(step)))
    start = predicted(scale, weight)
    for gradient in worst_case(betas, 0, steps)[:, 0].tolist():
        weight.grad = torch.full_like(weight, -gradient)
        optimizer.step()
        schedule.step()
        assert predicted(scale, weight) >= weight.detach().abs().max().item()
    grown, allowed = weight.item() - 0.25, predicted(scale, weight) - start
    assert grown > 0.3, "the weight really ran away"
    assert grown >= 0.9 * allowed, "and the prediction was no wild overestimate"


def test_travel_is_the_sum_of_scheduled_learning_rates_times_the_bound() -> None:
    weight, clock, _, optimizer = one_weight(torch.ones(2, 2))
    rates = [0.1, 0.05, 0.0, 0.2]
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert clock.steps == 4
    assert clock.travel == pytest.approx(sum(rates) * adam_update_bound(0.9, 0.95))


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_a_rate_that_is_no_number_is_refused(rate: float) -> None:
    weight, _, _, optimizer = one_weight(torch.ones(2, 2))
    optimizer.param_groups[0]["lr"] = rate
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=f"learning rate {rate} of a parameter group"):
        optimizer.step()


def test_the_group_with_the_longest_reach_counts() -> None:
    a, b = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    clock, _ = quiet()
    optimizer = torch.optim.AdamW([{"params": [a], "lr": 0.1, "betas": (0.9, 0.95)}, {"params": [b], "lr": 0.03, "betas": (0.9, 0.999)}])
    clock.attach(optimizer)
    a.grad, b.grad = torch.ones(2, 2), torch.ones(2, 2)
    optimizer.step()
    assert clock.travel == pytest.approx(0.03 * adam_update_bound(0.9, 0.999))


def test_weight_decay_shrinks_and_needs_no_term() -> None:
    weight, clock, scale, optimizer = one_weight(torch.full((1, 1), 4.0), lr=0.1, weight_decay=0.5)
    predicted(scale, weight)
    for _ in range(50):
        weight.grad = torch.full_like(weight, -1.0)  # pushes up, decay pulls down
        optimizer.step()
        assert weight.item() <= predicted(scale, weight)


def test_anchor_is_measured_at_the_interval_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    real = weight_scaling.measure_amax
    weight, clock, scale, optimizer = one_weight(torch.ones(2, 2), interval=4)
    monkeypatch.setattr(weight_scaling, "measure_amax", lambda *a: (measured.append(clock.steps), real(*a))[1])
    for _ in range(10):
        for _ in range(3):  # microbatches of one step
            scale.amax_and_increment(weight)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert measured == [0, 4, 8]


def test_load_and_save_measure_again() -> None:
    weight, clock, scale, optimizer = one_weight(torch.ones(2, 2))
    predicted(scale, weight)
    with torch.no_grad():
        weight.fill_(50.0)  # what loading a checkpoint does
    assert predicted(scale, weight) < 50
    clock.reanchor()
    anchor, increment = scale.amax_and_increment(weight)
    assert anchor.item() >= 50
    assert increment == 0
    assert scale_from_amax(anchor + increment) == scale_from_amax(torch.tensor(50.0))


def test_a_skipped_step_moves_nothing() -> None:
    """GradScaler leaves the optimizer out when a gradient overflowed; the clock hangs on the optimizer's own hook and stands still too."""
    weight, clock, _, optimizer = one_weight(torch.ones(2, 2))
    scaler = torch.amp.GradScaler("cpu")
    for factor, steps in ((math.inf, 0), (1.0, 1)):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert clock.steps == steps
    assert clock.travel == pytest.approx(0.01 * adam_update_bound(0.9, 0.95))


def test_an_optimizer_without_a_bound_is_named_and_measured_at_every_use() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    clock, messages = quiet()
    optimizer = torch.optim.SGD([weight], lr=100.0)
    clock.attach(optimizer)
    assert len(messages) == 1
    assert "no bound for SGD (known: Adam, AdamW, FusedAdam" in messages[0]
    assert "measured again at every step" in messages[0]
    scale = clock.track(weight)
    for _ in range(3):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
        anchor, increment = scale.amax_and_increment(weight)
        assert increment == 0
        assert weight.max().item() <= anchor.item() <= weight.max().item() * 1.01


def test_without_an_optimizer_every_use_measures() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    clock, _ = quiet()
    scale = clock.track(weight)
    for value in (1.0, 7.0, 0.5):
        with torch.no_grad():
            weight.fill_(value)
        assert value <= predicted(scale, weight) <= value * 1.01


def test_track_is_idempotent_and_lives_on_the_parameter() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    clock, _ = quiet()
    scale = clock.track(weight)
    assert clock.track(weight) is scale
    assert getattr(weight, ATTRIBUTE) is scale
    assert not weight.data.__dict__, "nothing is left on the data"


RANK = """
import sys, torch
from fp8_recipes.weight_scaling import measure_amax
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
print(measure_amax(torch.full((2, 2), [3.0, -7.0][rank]), torch.distributed.group.WORLD).item())
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_shards_of_one_weight_agree(tmp_path: Path) -> None:
    root = Path(weight_scaling.__file__).parents[1]
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(r), f"{tmp_path}/store"], cwd=root, stdout=subprocess.PIPE, text=True) for r in range(2)]
    amax = [float(process.communicate(timeout=120)[0].strip().splitlines()[-1]) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert amax[0] == amax[1] == pytest.approx(7 * (1 + 2**-8) ** 2)


# --- a real training run ---------------------------------------------------------------------------------------------------------------


def real_text(size: int = 200_000) -> torch.Tensor:
    """Bytes of the running Python's own sources."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))[:size]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


class TinyModel(torch.nn.Module):
    """Byte model: embedding, one causal attention block, one SwiGLU, head; bf16 weights, fp32 arithmetic."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(1)
        shapes = {"embed": (256, width), "qkv": (3 * width, width), "proj": (width, width), "fc1": (4 * width, width), "fc2": (width, 2 * width)}
        for name, shape in (shapes | {"head": (256, width)}).items():
            self.register_parameter(name, torch.nn.Parameter((0.05 * torch.randn(shape, generator=gen)).bfloat16()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        w = {name: p.float() for name, p in self.named_parameters()}
        x = F.embedding(tokens, w["embed"])
        q, k, v = F.linear(F.rms_norm(x, x.shape[-1:]), w["qkv"]).chunk(3, dim=-1)
        x = x + F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True), w["proj"])
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:]), w["fc1"]).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, w["fc2"])
        return F.linear(F.rms_norm(x, x.shape[-1:]), w["head"])


@pytest.mark.slow
def test_a_training_run_never_outgrows_its_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW with warm-up, cosine, clipping and weight decay; fp32 masters, bf16 weights; re-anchored every 40 steps."""
    steps, interval = 120, 40
    text, model = real_text(), TinyModel()
    masters = {name: torch.nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), lr=2e-2, betas=(0.9, 0.95), weight_decay=0.1)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 15, 0.5 + 0.5 * math.cos(math.pi * s / steps)))
    clock, messages = quiet(interval)
    clock.attach(optimizer)
    measured: list[int] = []
    real = weight_scaling.measure_amax
    monkeypatch.setattr(weight_scaling, "measure_amax", lambda *a: (measured.append(clock.steps), real(*a))[1])
    gen = torch.Generator().manual_seed(2)
    losses, outgrew_anchor, tightest = [], 0, math.inf
    for _ in range(steps):
        for p in model.parameters():
            anchor, increment = clock.track(p).amax_and_increment(p)
            true = p.detach().float().abs().max()
            assert anchor + increment >= true
            q = quantize_weight(p.detach(), anchor, increment)
            assert (p.detach().float().abs() <= 448 * q.scale).all(), "nothing saturates"
            outgrew_anchor += bool(true > anchor)
            tightest = min(tightest, ((anchor + increment) / true).item())
        start = torch.randint(len(text) - 65, (8,), generator=gen)
        batch = torch.stack([text[s : s + 65] for s in start.tolist()])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            masters[name].grad = p.grad.float()
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        rates.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
    assert not messages
    assert sorted(set(measured)) == list(range(0, steps, interval))
    assert len(measured) == len(set(measured)) * len(masters)
    assert losses[-1] < 0.7 * losses[0], "it is a training run"
    assert outgrew_anchor > 50, "weights did outgrow what was measured, so the increment was needed"
    assert tightest < 1.02
