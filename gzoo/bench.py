"""Speed and memory against the same network in escnn, and against the plain network of the expanded width.

The plain network of the expanded width has fields * |G| channels where the equivariant one has fields, so both multiply
the same matrices: it is the floor for a dense group convolution. Both rivals are twins of the gzoo model: copies in
which only the equivariant layers are replaced, so that all three share every line of code that is not compared.

Everything is measured in fresh processes. Steps are timed in turns, gzoo, escnn, plain, gzoo ..., because a busy
machine slows neighbours in time alike; a ratio is the median of the ratios of neighbours.
"""

import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from gzoo import _escnn
from gzoo.check import in_channels
from gzoo.equivariant import group_of
from gzoo.groups import Group
from gzoo.interop import EscnnLayer, activated
from gzoo.nn import FibreNorm, GroupConv2d, GroupLinear, InvariantLinear, LiftingConv2d, Restriction, SymmetricPool2d
from gzoo.winograd import Winograd


class Case(NamedTuple):
    """A registered model, and the side of its square images in pixels."""

    model: str
    size: int


CASES = (Case("p4m_resnet44", 32), Case("p4m_resnet18", 64))

# The ratio gzoo / rival that each measure is to stay within, on 2 CPU cores with a batch of 16; None: no goal.
TARGETS: dict[str, dict[str, float | None]] = {
    "train_ms": {"escnn": 1.0, "plain": 1.10},
    "eval_ms": {"escnn": None, "plain": 1.02},
    "construction_s": {"escnn": 0.3, "plain": None},
    "memory_mb": {"escnn": None, "plain": None},
}
IMPORT_TARGET_S = 0.5  # of `import gzoo`, after `import timm`

_PACKAGES = ("gzoo", "escnn", "timm", "torch")
_STATUS = Path("/proc/self/status")  # where Linux says how much memory a process has had at most
_IMPORT = "import time, timm; start = time.perf_counter(); import gzoo; print(time.perf_counter() - start)"
_CALL = "import json, sys; from gzoo import bench; print(json.dumps(bench.{}(*json.loads(sys.argv[1]))))"

# glibc gives large blocks back to the kernel or keeps them, depending on the holes that whoever ran before left in the
# heap. That decides over up to half of a step, for all three alike, so it keeps them all while steps are timed.
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}


def escnn_twin(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with escnn's convolutions and batch norms, freshly initialised, of the same fields.

    Without the symmetric resampling, as one would write it in escnn: equivariant where the strides fit the image.
    Layers other than convolutions, batch norms and pools stay as they are.

    Raises:
        ValueError: ``model`` is not equivariant.
    """
    return _replace(copy.deepcopy(model), "escnn")


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with torch's own layers of fields * |G| channels: the expanded width, no symmetry.

    Layers other than convolutions, batch norms, pools and linear maps stay as they are.

    Raises:
        ValueError: ``model`` is not equivariant.
    """
    return _replace(copy.deepcopy(model), "plain")


def _require_one_group(model: nn.Module) -> Group:
    group = group_of(model)
    if group is None:
        raise ValueError(f"{type(model).__name__} is not equivariant; bench compares models such as p4m_resnet44")
    if any(isinstance(module, Restriction) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} changes its group between stages; bench compares networks of one group"
        )
    return group


def _replace(model: nn.Module, library: str) -> nn.Module:
    group = _require_one_group(model)
    for path, module in list(model.named_modules()):
        new = _COUNTERPARTS[library](module, group)
        if new is not None:
            model.set_submodule(path, new)
    return model


def _to_escnn(module: nn.Module, group: Group) -> nn.Module | None:
    enn = _escnn.load().nn
    if isinstance(module, LiftingConv2d | GroupConv2d):
        return EscnnLayer(enn.R2Conv(module.in_type, module.out_type, module.kernel_size, **_window(module)))
    if isinstance(module, FibreNorm) and isinstance(module.norm, nn.BatchNorm2d):
        norm = module.norm
        new = EscnnLayer(enn.InnerBatchNorm(group.field_type(norm.num_features), norm.eps, norm.momentum))
        return activated(new, norm)
    return module.pool if isinstance(module, SymmetricPool2d) else None


def _to_plain(module: nn.Module, group: Group) -> nn.Module | None:
    order = group.order
    if isinstance(module, LiftingConv2d | GroupConv2d):
        return nn.Conv2d(module.in_channels, module.out_fields * order, module.kernel_size, **_window(module))
    if isinstance(module, FibreNorm) and isinstance(module.norm, nn.BatchNorm2d):
        norm = module.norm
        return activated(nn.BatchNorm2d(norm.num_features * order, norm.eps, norm.momentum), norm)
    if isinstance(module, GroupLinear):
        return nn.Linear(module.in_fields * order, module.out_fields * order, module.bias is not None)
    if isinstance(module, InvariantLinear):
        linear = nn.Linear(module.in_features * order, module.out_features, module.bias is not None)
        linear.knows_fibres = True  # type: ignore[assignment]  # it reads all channels, where others are given pooled ones
        return linear
    return module.pool if isinstance(module, SymmetricPool2d) else None


_COUNTERPARTS = {"escnn": _to_escnn, "plain": _to_plain}
_LIBRARIES = ("gzoo", *_COUNTERPARTS)


def _window(module: LiftingConv2d | GroupConv2d) -> dict[str, Any]:
    window = module.window
    return {
        "stride": window.stride,
        "dilation": window.dilation,
        "groups": module.groups,
        "padding_mode": module.padding_mode,
        "padding": (window.padding + 1) // 2,
        "bias": module.bias is not None,
    }


def bench(
    cases: Sequence[Case] = CASES,
    batch_size: int = 16,
    threads: int = 2,
    rounds: int = 15,
    processes: int = 5,
    device: str = "cpu",
    say: Callable[[str], object] = lambda text: None,
    winograd: bool = False,
) -> dict[str, Any]:
    """Measures all cases in one run.

    Args:
        cases: registered equivariant models, and image sizes.
        batch_size: images in a step.
        threads: of torch, on the CPU.
        rounds: how often a training step is timed. An evaluation takes a quarter of its time, and is timed four times
            as often, because its target leaves 2%.
        processes: how many fresh processes time a construction, a peak of memory, an import.
        device: "cpu" or "cuda".
        say: is told what is measured now.
        winograd: whether gzoo's own steps run under `gzoo.winograd.Winograd`; those of its rivals do not.

    Returns:
        What was measured, on what machine and with which versions, as JSON has it; `table` prints it.

    Raises:
        ValueError: a model is not registered, not equivariant or does not take images of its size; there is no such
            device; one of the numbers is below 1; or Winograd is asked for on a GPU.
    """
    from gzoo.predict import load_model
    from gzoo.train import machine

    for name, count in {"batch_size": batch_size, "threads": threads, "rounds": rounds, "processes": processes}.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; the least is 1")
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"device is {device!r}; it is cpu, or cuda where torch finds a GPU")
    if winograd and device != "cpu":
        raise ValueError(f"winograd is for CPUs, and device is {device!r}; leave it out")
    for case in cases:  # an error now, not after minutes
        model = load_model(case.model, pretrained=False).eval()
        _require_one_group(model)
        try:
            with torch.no_grad():
                logits = model(torch.zeros(1, in_channels(model), case.size, case.size))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{case.model} takes no images of {case.size}x{case.size} pixels: {error}") from error
        if logits.ndim != 2:
            raise ValueError(f"{case.model} is no classifier of images, whose training steps bench could time")
    torch.set_num_threads(threads)
    report: dict[str, Any] = {
        "machine": machine(torch.device(device)),
        "load_average": os.getloadavg()[0],  # a busy machine makes times longer and ratios less certain
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "device": device,
        "dtype": "float32",
        "batch_size": batch_size,
        "rounds": rounds,
        "processes": processes,
        "winograd": winograd,
        "targets": {**TARGETS, "import_s": IMPORT_TARGET_S},
    }
    say("import")
    report["import_s"] = _spread([_in_fresh_process(_IMPORT) for _ in range(processes)])
    report["cases"] = []
    for case in cases:
        what = f"{case.model} at {case.size}x{case.size}:"
        say(f"{what} training and evaluation")
        steps = (*case, batch_size, threads, rounds, device, winograd)
        taken = _in_fresh_process(_CALL.format("step_times"), *steps, environment=_KEEP_MEMORY)
        say(f"{what} construction")
        taken["construction_s"] = _in_fresh_processes("construction_seconds", processes, case.model, threads)
        if device == "cuda" or _STATUS.exists():
            say(f"{what} memory")
            taken["memory_mb"] = _in_fresh_processes("peak_memory_mb", processes, *steps[:4], device, winograd)
        report["cases"].append({**case._asdict(), **{measure: _summary(values) for measure, values in taken.items()}})
    return report


def _summary(taken: dict[str, list[float]]) -> dict[str, Any]:
    ratios = {rival: [a / b for a, b in zip(taken["gzoo"], taken[rival], strict=True)] for rival in _COUNTERPARTS}
    return {
        **{library: _spread(values) for library, values in taken.items()},
        "ratio": {rival: _spread(values) for rival, values in ratios.items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def step_times(
    name: str, size: int, batch_size: int, threads: int, rounds: int, device: str, winograd: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of training and evaluation steps of each library: ``{"train_ms": {"gzoo": [...], ...}, ...}``."""
    torch.set_num_threads(threads)
    models = {library: _build(library, name).to(device) for library in _LIBRARIES}
    x = _images(models["gzoo"], size, batch_size).to(device)
    own = _under_winograd if winograd else (lambda step: step)
    training = {library: _train_step(model, x) for library, model in models.items()}
    train = _in_turns(training | {"gzoo": own(training["gzoo"])}, rounds, device)
    with torch.no_grad():
        evaluations: dict[str, Callable[[], object]] = {
            library: partial(model.eval(), x) for library, model in models.items()
        }
        evaluations["gzoo"] = own(evaluations["gzoo"])
        return {"train_ms": train, "eval_ms": _in_turns(evaluations, 4 * rounds, device)}


def _under_winograd(step: Callable[[], object]) -> Callable[[], object]:
    def under() -> None:
        with Winograd():
            step()

    return under


def _build(library: str, name: str) -> nn.Module:
    model = timm.create_model(name)
    return model if library == "gzoo" else _replace(model, library)


def _images(model: nn.Module, size: int, batch_size: int) -> Tensor:
    config: Any = model.pretrained_cfg
    return torch.randn(batch_size, config["input_size"][0], size, size)


def _train_step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward, backward and a step of SGD with momentum, so small that the weights stay what they are."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def _in_turns(steps: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each step, taken in turns; who goes first changes with the round."""
    names, taken = list(steps), {name: list[float]() for name in steps}
    for i in range(-2, rounds):  # two rounds to warm up
        first = i % len(names)
        for name in names[first:] + names[:first]:
            _synchronize(device)
            start = time.perf_counter()
            steps[name]()
            _synchronize(device)
            if i >= 0:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return taken


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _in_fresh_processes(function: str, processes: int, *arguments: Any) -> dict[str, list[float]]:
    """The numbers that a function of this module gives for each library, each in a new Python, taken in turns."""
    taken: dict[str, list[float]] = {library: [] for library in _LIBRARIES}
    for _ in range(processes):
        for library in _LIBRARIES:
            taken[library].append(_in_fresh_process(_CALL.format(function), library, *arguments))
    return taken


def _in_fresh_process(code: str, *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What ``code`` prints in a new Python, as JSON."""
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def construction_seconds(library: str, name: str, threads: int) -> float:
    """Seconds to build a model, without imports: all of ``create_model`` for gzoo, the replaced layers for a rival.

    For a fresh process, since every library remembers the kernel bases that it has built.
    """
    torch.set_num_threads(threads)
    if library == "gzoo":
        start = time.perf_counter()
        timm.create_model(name)
        return time.perf_counter() - start
    model = timm.create_model(name)
    with _empty_escnn_cache():
        _escnn.load()
        start = time.perf_counter()
        _replace(model, library)
        return time.perf_counter() - start


@contextmanager
def _empty_escnn_cache() -> Iterator[None]:
    """Gives escnn, if not imported yet, an empty folder for the cache that it keeps inside its own package."""
    import joblib  # type: ignore[import-untyped]

    memory = joblib.Memory
    with tempfile.TemporaryDirectory() as folder:
        joblib.Memory = lambda location, **options: memory(folder, **options)
        try:
            yield
        finally:
            joblib.Memory = memory


def peak_memory_mb(
    library: str, name: str, size: int, batch_size: int, threads: int, device: str, winograd: bool = False
) -> float:
    """Megabytes that building and training a model need at most: of the process, or allocated on the GPU.

    For a fresh process, since a peak does not come down again.
    """
    torch.set_num_threads(threads)
    if library == "escnn":
        _escnn.load()
    before = _peak_resident_mb() if device == "cpu" else 0.0
    model = _build(library, name).to(device)
    step = _train_step(model, _images(model, size, batch_size).to(device))
    step = _under_winograd(step) if winograd and library == "gzoo" else step
    for _ in range(2):  # the first step makes the optimizer's state
        step()
    return _peak_resident_mb() - before if device == "cpu" else torch.cuda.max_memory_allocated() / 1e6


def _peak_resident_mb() -> float:
    # Not resource.getrusage: what it gives starts from the peak of the parent process.
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def evaluation_ms(name: str, size: int, batch_size: int, threads: int, device: str) -> float:
    """Milliseconds of an evaluation step; the median of ten."""
    torch.set_num_threads(threads)
    model = _build("gzoo", name).to(device).eval()
    x = _images(model, size, batch_size).to(device)
    with torch.no_grad():
        return median(_in_turns({name: partial(model, x)}, 10, device)[name])


def costs(names: Sequence[str], batch_size: int = 64, threads: int = 2, device: str = "cpu") -> dict[str, Any]:
    """What registered models cost, each in fresh processes at the size of its own images, in float32.

    Returns:
        The machine and the settings, and ``models``: for each name ``images_per_second`` in evaluation, and
        ``training_memory_mb``, the megabytes that building and training it need at most; None where the system does not
        say.
    """
    from gzoo.train import machine

    torch.set_num_threads(threads)
    found = {}
    for name in names:
        config: Any = timm.models.get_pretrained_cfg(name)
        step = (name, config.input_size[-1], batch_size, threads, device)
        taken = _in_fresh_process(_CALL.format("evaluation_ms"), *step, environment=_KEEP_MEMORY)
        measured = device == "cuda" or _STATUS.exists()
        memory = _in_fresh_process(_CALL.format("peak_memory_mb"), "gzoo", *step) if measured else None
        found[name] = {"images_per_second": 1e3 * batch_size / taken, "training_memory_mb": memory}
    settings = {"dtype": "float32", "batch_size": batch_size, "device": device}
    return {"machine": machine(torch.device(device)), **settings, "models": found}


def table(report: dict[str, Any]) -> str:
    """The medians in a report of `bench`, and the ratios gzoo / rival with their targets; what misses one has a "!"."""
    threads = report["machine"]["threads"]
    own = ", gzoo under Winograd" if report.get("winograd") else ""
    lines = [f"batch {report['batch_size']}, {report['dtype']}, {report['device']}, {threads} threads{own}"]
    for case in report["cases"]:
        title = f"{case['model']} at {case['size']}x{case['size']}"
        lines += ["", f"{title:24}{'gzoo':>10}{'escnn':>10}{'plain':>10}   {'gzoo / escnn':18}gzoo / plain"]
        for measure, targets in TARGETS.items():
            if measure in case:
                taken = case[measure]
                times = "".join(f"{taken[library]['median']:10.4g}" for library in _LIBRARIES)
                ratios = [_ratio(taken["ratio"][rival]["median"], target) for rival, target in targets.items()]
                lines.append(f"{measure:24}{times}   {ratios[0]:18}{ratios[1]}".rstrip())
    seconds = report["import_s"]["median"]
    lines += ["", f"import gzoo after import timm: {_ratio(seconds, IMPORT_TARGET_S)} s"]
    return "\n".join(lines)


def _ratio(value: float, target: float | None) -> str:
    goal = "" if target is None else f" (<= {target:g}{' !' if value > target else ''})"
    return f"{value:.3f}{goal}"
