"""The demo: one small GPT on real text, once in high precision and once with a recipe, from the same seed, weights and batches.

The high-precision run is bf16 on CUDA (fp32 master weights, as Megatron trains) and fp32 on the CPU, where bf16 arithmetic is slow. On the CPU the recipe
runs its reference numerics: the same roundings as the kernels make, none of their speed.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .architecture import LLAMA3, Architecture
from .metrics import JsonLines, MonitorHooks, Reading, RunMetrics, gpt_targets, observe_linears
from .monitor import Counts, counts_of, total
from .nn import convert
from .nn.gpt import GPT, GPTConfig, is_high_precision
from .recipe import BF16, Recipe
from .weight_scaling import WeightScaling

HELD_OUT = 0.05
"""Share of the text, its tail, that is never trained on."""
MAX_BYTES = 64 << 20
READ_EVERY = 10
"""Steps between two reads of losses from the device; one timing sample covers that many steps."""
OBSERVE_EVERY = 10
"""Steps between two looks at kurtosis, flushes and saturations."""
SUFFIXES = (".py", ".txt", ".md", ".rst")


class DemoError(ValueError):
    """Something the demo cannot start with. The message names the value and the remedy."""


@dataclass(frozen=True)
class Setup:
    """Everything that decides the numbers of a run, besides the recipe and the text."""

    device: str
    steps: int
    gpt: GPTConfig
    batch: int
    peak_lr: float
    seed: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    eval_batches: int = 8

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise DemoError(f"--steps {self.steps} must be at least 1")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of parameters and activations."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def baseline(self) -> str:
        return "bf16" if self.device == "cuda" else "fp32"

    @property
    def window(self) -> int:
        """Steps over which losses are averaged, in the plot and at the end."""
        return min(self.steps, max(10, self.steps // 20))

    def lr(self, step: int) -> float:
        """Linear warm-up over 5 % of the steps, then half a cosine down to a tenth of the peak. step: 0 .. steps - 1."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return self.peak_lr * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.peak_lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def setup(device: str, steps: int | None = None, seed: int = 0, arch: Architecture = LLAMA3) -> Setup:
    """The demo's model and schedule for "cpu" (0.5M parameters, under 3 minutes on two cores) or "cuda" (0.4B parameters), of whatever architecture."""
    if device == "cuda":
        # Fresh branches of width 2048 put out values of std 0.1 to 0.2 (0.01 at width 128): on a residual stream of 0.02 they drown the token, the norms
        # magnify gradients, and the first steps are chaotic. Hence a stream of 1 (arXiv 2312.16903), unless the architecture's multiplier makes it one.
        embedding_std = 1.0 if arch.embedding == "plain" else 0.0
        gpt = GPTConfig(layers=8, width=2048, heads=16, seq=1024, embedding_std=embedding_std, arch=arch)
        return Setup(device, 500 if steps is None else steps, gpt, batch=16, peak_lr=3e-4, seed=seed)
    gpt = GPTConfig(layers=2, width=128, heads=4, seq=128, arch=arch)
    return Setup(device, 400 if steps is None else steps, gpt, batch=8, peak_lr=1e-3, seed=seed)


def choose_device(wanted: str) -> tuple[str, str]:
    """("cpu" or "cuda", why) for ``--device auto|cpu|cuda``. The kernels need a Hopper GPU (compute capability 9.0)."""
    if wanted == "cpu":
        return "cpu", "asked for"
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise DemoError(f"--device cuda: torch {torch.__version__} sees no CUDA device; use --device cpu, or install a CUDA build of torch")
        return "cpu", "torch sees no CUDA device"
    capability, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    if capability[0] != 9:
        if wanted == "cuda":
            raise DemoError(f"--device cuda: {name} has compute capability {capability[0]}.{capability[1]}, the kernels need 9.0 (Hopper); use --device cpu")
        return "cpu", f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need 9.0 (Hopper)"
    return "cuda", name


@dataclass(frozen=True)
class Text:
    """Bytes as tokens: train and held_out are 1-D uint8."""

    train: torch.Tensor
    held_out: torch.Tensor
    source: str
    files: int
    sha256: str


def standard_library() -> tuple[Path, list[Path]]:
    """The running Python's standard library and its ``*.py`` files, without installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "dist-packages", "__pycache__"}
    return root, [p for p in root.rglob("*.py") if not outside & set(p.relative_to(root).parts)]


def load_text(path: Path | None, seq: int) -> Text:
    """Read the text: a file, all text files of a folder, or (None) the standard library's sources; at most 64 MiB.

    Files are joined in the order of the hash of their relative name: the same everywhere, and a tail that resembles the rest.
    """
    if path is None:
        root, files = standard_library()
    elif path.is_file():
        root, files = path.parent, [path]
    elif path.is_dir():
        root, files = path, [p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()]
    else:
        raise DemoError(f"--data {path}: no such file or folder; leave --data out for the Python standard library's sources")
    files.sort(key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())
    data, used = bytearray(), 0
    for file in files:
        if len(data) >= MAX_BYTES:
            break
        data += file.read_bytes()
        used += 1
    data = data[:MAX_BYTES]
    cut = len(data) - int(len(data) * HELD_OUT)
    if len(data) - cut <= seq + 1:
        needed = math.ceil((seq + 2) / HELD_OUT)
        raise DemoError(f"--data {path}: {len(data)} bytes in {used} files ({', '.join(SUFFIXES)}); the demo needs at least {needed}")
    tokens = torch.frombuffer(data, dtype=torch.uint8)
    source = f"Python standard library ({root})" if path is None else str(path)
    return Text(tokens[:cut], tokens[cut:], source, used, hashlib.sha256(data).hexdigest())


def batches(tokens: torch.Tensor, config: Setup) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (tokens, targets), each [batch, seq] int64 on the device; the same sequence for the same seed."""
    generator = torch.Generator().manual_seed(config.seed)
    span = torch.arange(config.gpt.seq + 1)
    while True:
        start = torch.randint(0, len(tokens) - config.gpt.seq - 1, (config.batch, 1), generator=generator)
        window = tokens[start + span].to(config.device).long()
        yield window[:, :-1], window[:, 1:]


class MasterWeights:
    """fp32 masters and fp32 gradients beside bf16 parameters, as Megatron keeps them; fp32 parameters are their own masters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.masters = [p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float()) for p in self.parameters]
        self._pairs = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        for p, m in self._pairs:
            p.main_grad = torch.zeros_like(m)  # type: ignore[attr-defined]  # an fp8_recipes.nn.Linear adds its weight gradient here
            m.grad = p.main_grad  # type: ignore[attr-defined]

    def zero_grad(self) -> None:
        for p, m in zip(self.parameters, self.masters, strict=True):
            if p is m:
                p.grad = None
            elif m.grad is not None:
                m.grad.zero_()

    @torch.no_grad()
    def collect(self) -> None:
        """After backward: add the bf16 gradients, where a layer made one, to the fp32 gradients."""
        for p, m in self._pairs:
            if p.grad is not None and m.grad is not None:
                m.grad.add_(p.grad)
                p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """After the optimizer's step: round the masters into the parameters."""
        for p, m in self._pairs:
            p.copy_(m)


@dataclass
class Run:
    """Results of one training. losses, grad_norms and lrs have one entry per step; ms one per `READ_EVERY` steps."""

    name: str
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    validation: float = math.nan
    counts: dict[str, Counts] = field(default_factory=dict)
    observed_steps: int = 0
    warnings: list[str] = field(default_factory=list)
    """Alarms of the metrics."""

    def count(self, readings: dict[str, Reading]) -> None:
        """Add what one observed step showed about FP8, by role."""
        self.observed_steps += 1
        for suffix, role in ((".input", "activation"), (".weight", "weight"), (".grad", "grad")):
            found = {name: counts_of(r) for name, r in readings.items() if name.endswith(suffix)}
            if found:
                self.counts[role] = total({**found, "": self.counts.get(role, Counts(0, 0, 0, 0, 0, None, None))})

    @property
    def ms_per_step(self) -> float:
        """Median, without the first sample (compilation, warm caches) where there are others."""
        return statistics.median(self.ms[1:] or self.ms)

    def final_loss(self, window: int) -> float:
        return statistics.fmean(self.losses[-window:])


def build_model(recipe: Recipe, config: Setup) -> tuple[GPT, WeightScaling]:
    """The GPT of this seed, its linear layers under `recipe` and, where the recipe predicts scales, under automatic weight scaling."""
    torch.manual_seed(config.seed)
    model = GPT(config.gpt).to(config.device, config.dtype)
    scaling = WeightScaling(interval=recipe.interval)
    if recipe.quantize:
        convert(model, recipe, skip=is_high_precision, scaling=scaling)
    return model, scaling


def train(
    name: str,
    recipe: Recipe,
    config: Setup,
    text: Text,
    on_step: Callable[[int, float | None], None] = lambda step, loss: None,
    log: Path | None = None,
) -> Run:
    """Train one GPT and evaluate it on the held-out text. on_step(steps done, last known loss) is called after every step. log: where the metrics go, as
    JSON lines."""
    model, scaling = build_model(recipe, config)
    weights = MasterWeights(model)
    decayed = [m for m in weights.masters if m.dim() == 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": [m for m in weights.masters if m.dim() != 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr(0), betas=config.betas, fused=config.device == "cuda")
    scaling.attach(optimizer)
    data, run = batches(text.train, config), Run(name)
    metrics = _watch(model, run, log)
    pending: list[torch.Tensor] = []
    began = mark = time.perf_counter()
    for step in range(config.steps):
        metrics.hooks.active |= step == config.steps - 1
        weights.zero_grad()
        loss = model(*next(data))
        loss.backward()
        weights.collect()
        norm = torch.nn.utils.clip_grad_norm_(weights.masters, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.lr(step)
        optimizer.step()
        weights.publish()
        run.lrs.append(config.lr(step))
        pending.append(torch.stack((loss.detach(), norm)))
        if len(pending) == READ_EVERY or step == config.steps - 1:
            values = torch.stack(pending).tolist()  # waits for the device
            run.losses += [v[0] for v in values]
            run.grad_norms += [v[1] for v in values]
            now = time.perf_counter()
            run.ms.append((now - mark) * 1e3 / len(pending))
            mark, pending = now, []
        readings = metrics.after_step(step + 1)
        if readings is not None:
            run.count(readings)
        on_step(step + 1, run.losses[-1] if run.losses else None)
    run.seconds = time.perf_counter() - began
    metrics.hooks.remove()
    metrics.hooks.active = False  # the layers' observers stay
    run.validation = evaluate(model, text.held_out, config)
    return run


def _watch(model: GPT, run: Run, log: Path | None) -> RunMetrics:
    """Kurtosis of every block and what every quantising layer shows, every `OBSERVE_EVERY` steps and in the last one."""
    hooks = MonitorHooks(gpt_targets(model), interval=OBSERVE_EVERY)
    observe_linears(model, hooks)
    return RunMetrics(hooks, sinks=[] if log is None else [JsonLines(log, run.name)], warn=run.warnings.append)


@torch.no_grad()
def evaluate(model: GPT, tokens: torch.Tensor, config: Setup) -> float:
    """Mean loss in nats per byte over up to `eval_batches` batches of held-out text, evenly spaced and the same for every run."""
    seq, wanted = config.gpt.seq, config.eval_batches * config.batch
    starts = torch.linspace(0, len(tokens) - seq - 1, wanted).long()[:, None]
    windows = tokens[starts + torch.arange(seq + 1)].long()
    losses = [model(w[:, :-1], w[:, 1:]) for w in windows.to(config.device).split(config.batch)]
    return float(torch.stack(losses).mean())


def trailing_mean(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values (fewer at the start), one per value."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def deviation(actual: float, baseline: float) -> float:
    """Relative deviation in percent."""
    return (actual / baseline - 1) * 100


def compare(
    recipe: Recipe, config: Setup, text: Text, on_step: Callable[[str, int, float | None], None] = lambda name, step, loss: None, log: Path | None = None
) -> tuple[Run, Run]:
    """(baseline, recipe): two trainings that differ in nothing but the recipe."""
    named = recipe.name if recipe.name != config.baseline else f"{recipe.name} (again)"
    first = train(config.baseline, BF16, config, text, lambda step, loss: on_step(config.baseline, step, loss), log)
    return first, train(named, recipe, config, text, lambda step, loss: on_step(named, step, loss), log)
