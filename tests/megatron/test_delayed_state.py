"""Maxima and scales of delayed scaling in Megatron's checkpoints: saved and loaded by two CPU ranks (see delayed_worker), through Megatron's own functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed (pip install 'fp8_recipes[te]')")
pytest.importorskip("megatron.training", reason="Megatron-Core is not installed (pip install 'fp8_recipes[megatron]', Python 3.12 or newer)")
pytest.importorskip("psutil", reason="psutil is not installed; Megatron's torch_dist writer needs it (pip install psutil)")

TESTS = Path(__file__).resolve().parents[1]
TP, PP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
OURS, SHORT = "moss:attention=fp8", "--fp8-amax-history-len"
EXPERTS = "--num-experts 4 --moe-grouped-gemm --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
JOBS: list[dict] = [
    {"name": "fog", "flags": f"--fp8-recipe fog {TP}", "save": "fog_ckpt", "before": 3, "evaluate": True, "after": 3},
    {"name": "fog_resumed", "flags": f"--fp8-recipe fog {TP}", "load": "fog_ckpt", "first": 4, "after": 3},
    {"name": "fog_in_pipeline", "flags": f"--fp8-recipe fog {PP}", "load": "fog_ckpt"},
    {"name": "fog_on_replicas", "flags": "--fp8-recipe fog", "load": "fog_ckpt"},
    {"name": "fog_into_bf16", "flags": f"--fp8-recipe bf16 {TP}", "load": "fog_ckpt", "save": "bf16_ckpt"},
    {"name": "fog_into_moss", "flags": f"--fp8-recipe moss {TP}", "load": "fog_ckpt"},
    {"name": "fog_into_ours", "flags": f"--fp8-recipe {OURS} {TP}", "load": "fog_ckpt", "after": 1},
    {"name": "from_bf16", "flags": f"--fp8-recipe fog {TP}", "load": "bf16_ckpt"},
    {"name": "shorter", "flags": f"--fp8-recipe fog {TP} {SHORT} 3", "load": "fog_ckpt"},
    {"name": "ours", "flags": f"--fp8-recipe {OURS} {PP}", "save": "our_ckpt", "before": 2, "after": 2},
    {"name": "ours_resumed", "flags": f"--fp8-recipe {OURS} {PP}", "load": "our_ckpt", "first": 3, "after": 2},
    {"name": "ours_into_fog", "flags": "--fp8-recipe fog", "load": "our_ckpt"},
    {"name": "plain", "flags": f"--fp8-recipe fog {TP} --ckpt-format torch", "save": "plain_ckpt", "before": 2, "evaluate": True, "after": 2},
    {"name": "plain_resumed", "flags": f"--fp8-recipe fog {TP} --ckpt-format torch", "load": "plain_ckpt", "first": 3, "after": 2},
    {
        "name": "experts",
        "flags": f"--fp8-recipe fog {EXPERTS} --expert-model-parallel-size 2",
        "save": "experts_ckpt",
        "before": 2,
        "evaluate": True,
        "after": 2,
    },
    {"name": "experts_resumed", "flags": f"--fp8-recipe fog {EXPERTS} --expert-model-parallel-size 2", "load": "experts_ckpt", "first": 3, "after": 2},
    {"name": "experts_undivided", "flags": f"--fp8-recipe fog {EXPERTS}", "load": "experts_ckpt"},
    {"name": "pickled", "flags": f"--fp8-recipe fog {TP}", "save": "pickled_ckpt", "before": 1, "pickles": True},
    {"name": "from_pickled", "flags": f"--fp8-recipe fog {TP}", "load": "pickled_ckpt", "after": 1},
    {"name": "pickled_into_bf16", "flags": f"--fp8-recipe bf16 {TP}", "load": "pickled_ckpt"},
]
ATTENTION = [f"decoder.layers.{layer}.self_attention.core_attention" for layer in (0, 1)]
LINEARS = [
    f"decoder.layers.{layer}.{part}"
    for layer in (0, 1)
    for part in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """outcome("fog") -> what each of the two ranks reported of that job. All jobs in one pair of processes, in order."""
    directory = tmp_path_factory.mktemp("delayed")
    (directory / "jobs.json").write_text(json.dumps(JOBS))
    path = os.pathsep.join(filter(None, [str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(TESTS / "delayed_worker.py")]
    logs = [(directory / f"log-{rank}").open("w") for rank in (0, 1)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(directory), str(directory / "jobs.json")], stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": path})
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(timeout=900) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0], "\n".join((directory / f"log-{rank}").read_text()[-3000:] for rank in (0, 1))
    return lambda name: [torch.load(directory / f"{name}-{rank}.pt") for rank in (0, 1)]


def names(modules):
    return {f"{module}.{direction}.{what}" for module in modules for direction in ("forward", "backward") for what in ("amax_history", "scale")}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(("through", "resumed"), [("fog", "fog_resumed"), ("ours", "ours_resumed"), ("plain", "plain_resumed"), ("experts", "experts_resumed")])
def test_a_resumed_run_casts_with_the_scales_of_the_run_that_went_on(outcome, through, resumed):
    """fog: TP 2, an evaluation before the save; ours: attention alone, two pipeline stages; plain: --ckpt-format torch; experts: two ranks
    that divide them. Maxima fall from step to step, so that
    every later scale is decided by what was saved."""
    for one, two in zip(outcome(through), outcome(resumed), strict=True):
        assert_equal(two["loaded"], one["saved"])
        assert two["registered"] == len(two["loaded"]) / 2, "every history moves on at the next reduction, forward pass or not: virtual stages reduce in turn"
        for later, first in zip(two["read"], one["read"][-len(two["read"]) :], strict=True):
            assert_equal(later, first)
        assert_equal(two["end"], one["end"])
        moved = {name for name in one["end"] if not torch.equal(one["end"][name], one["saved"][name])}
        assert moved >= {name for name in one["end"] if name.endswith("amax_history")}
        assert all((scales != 1).all() for scales in two["read"][0].values())


def test_what_is_saved_of_which_recipe(outcome):
    assert all(rank["saved"].keys() == names(ATTENTION + LINEARS) for rank in outcome("fog"))
    first, second = outcome("ours")
    assert first["saved"].keys() == names(ATTENTION[:1]) and second["saved"].keys() == names(ATTENTION[1:])
    history, scale = (first["saved"][f"{ATTENTION[0]}.forward.{what}"] for what in ("amax_history", "scale"))
    assert history.shape == (1024, 9) and scale.shape == (9,)
    assert torch.equal(scale, 448 / history.amax(dim=0))


def test_maxima_of_an_evaluation_are_the_same_on_all_ranks_before_they_are_saved(outcome):
    one, two = outcome("fog")
    for name in (n for n in names(ATTENTION + LINEARS) if n.endswith("forward.amax_history")):
        before = [rank["unsettled"][name][0] for rank in (one, two)]
        assert (before[0] != before[1]).all(), "the ranks evaluated different tokens"
        assert torch.equal(one["saved"][name][0], torch.maximum(*before)) and torch.equal(one["saved"][name], two["saved"][name])


@pytest.mark.parametrize("name", ["fog_in_pipeline", "fog_on_replicas"])
def test_the_model_may_be_divided_otherwise(outcome, name):
    saved = outcome("fog")[0]["saved"]
    ranks = outcome(name)
    assert set().union(*(rank["loaded"] for rank in ranks)) == saved.keys()
    for rank in ranks:
        assert_equal(rank["loaded"], {name: saved[name] for name in rank["loaded"]})
    layers = [{n.split(".")[2] for n in rank["loaded"]} for rank in ranks]
    assert layers == ([{"0"}, {"1"}] if "pipeline" in name else [{"0", "1"}] * 2)
    assert ranks[0]["printed"] == ["fp8_recipes: maxima and scales of 10 modules under delayed scaling as saved"] and not ranks[1]["printed"]


@pytest.mark.parametrize("name", ["fog_into_bf16", "fog_into_moss", "pickled_into_bf16"])
def test_a_run_without_delayed_scaling_asks_for_nothing(outcome, name):
    assert all(rank["loaded"] == {} and rank["printed"] == [] for rank in outcome(name))


def test_attention_alone_under_our_linears(outcome):
    saved = outcome("fog")[0]["saved"]
    for rank in outcome("fog_into_ours"):
        assert_equal(rank["loaded"], {name: saved[name] for name in names(ATTENTION)})
        for name in ATTENTION:
            assert torch.equal(rank["read"][0][f"{name}.scaling_fwd"], saved[f"{name}.forward.scale"])
    assert outcome("fog_into_ours")[0]["printed"] == ["fp8_recipes: maxima and scales of 2 modules under delayed scaling as saved"]


def test_modules_that_are_not_in_the_checkpoint_are_named(outcome):
    one, two = outcome("ours_into_fog")
    (line,) = one["printed"]
    assert "maxima and scales of 2 modules as saved; 8 are not in " in line and "decoder.layers.0.mlp.linear_fc1" in line and "start anew" in line
    saved = outcome("ours")[0]["saved"] | outcome("ours")[1]["saved"]
    assert_equal({n: one["loaded"][n] for n in names(ATTENTION)}, saved)
    assert two["printed"] == []


def test_experts_that_are_divided_otherwise_start_anew(outcome):
    """A grouped linear has a slot for each of its experts; the others of the layer are as saved."""
    saved, (one, two) = outcome("experts")[0]["saved"], outcome("experts_undivided")
    assert saved["decoder.layers.0.mlp.experts.linear_fc1.forward.scale"].shape == (2 * 3,)
    (line,) = one["printed"]
    assert "of 6 modules as saved; 4 are not in " in line and "or of another shape (decoder.layers.0.mlp.experts.linear_fc1, " in line
    for rank in (one, two):
        experts = {name for name in rank["loaded"] if ".experts." in name}
        assert_equal({n: t for n, t in rank["loaded"].items() if n not in experts}, {n: t for n, t in saved.items() if ".experts." not in n})
        assert experts and all((rank["loaded"][name] == (0 if name.endswith("history") else 1)).all() for name in experts)


@pytest.mark.parametrize("name", ["from_bf16", "from_pickled"])
def test_a_checkpoint_without_them_starts_anew_and_says_so_in_one_line(outcome, name):
    """from_pickled: TransformerEngine's own pickles, which stock ends the run on."""
    one, two = outcome(name)
    (line,) = one["printed"]
    assert "holds no maxima of delayed scaling" in line and "all 10 modules start anew" in line
    assert not two["printed"] and not one["loaded"]
    if one["read"]:
        assert all((scales == 1).all() for scales in one["read"][0].values())


def test_a_shorter_history_keeps_the_newest_steps(outcome):
    saved, loaded = outcome("fog")[0]["saved"], outcome("shorter")[0]["loaded"]
    for name in names(ATTENTION + LINEARS):
        expected = saved[name] if name.endswith("scale") else torch.cat([saved[name][:1], saved[name][-2:]])
        assert torch.equal(loaded[name], expected), name
    assert outcome("shorter")[0]["printed"][0].endswith("as saved; history of 1024 there: the newest steps that fit are kept")


def test_no_pickle_is_written(outcome, tmp_path_factory):
    """A byte of TransformerEngine's pickles would be found by their keys."""
    written = {path.parent.parent.name for path in tmp_path_factory.getbasetemp().rglob("*") if path.is_file() and b"extra_fp8_variables" in path.read_bytes()}
    assert "pickled_ckpt" in written and not written & {"fog_ckpt", "our_ckpt", "bf16_ckpt"}
