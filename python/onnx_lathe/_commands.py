"""The commands of the program as functions: a keyword is an option of the command line, with `_` for `-`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from onnx_lathe import _models, _native, _sets
from onnx_lathe._answers import Answer, Comparison, Result
from onnx_lathe._models import Model
from onnx_lathe._progress import Meter, Progress
from onnx_lathe._sets import Samples

if TYPE_CHECKING:
    from onnx_lathe.distributed import Executor

StrPath = str | os.PathLike[str]
Shapes = Mapping[str, Sequence[int]]
Quantity = Literal["latency", "size", "params", "flops"]


def optimize(
    model: Model,
    output: StrPath | None = None,
    *,
    calib: Samples | None = None,
    validate: Samples | None = None,
    labels: str | None = None,
    batch: int | None = None,
    calib_select: int | None = None,
    dtype: Literal["float16", "bfloat16", "float16:io", "bfloat16:io"] | None = None,
    kv_cache: Literal["int8", "int4", "int8:tensor", "int4:tensor"] | None = None,
    rtol: float | None = None,
    size: float | None = None,
    params: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    max_drop: float | None = None,
    minimize: Quantity | None = None,
    metric: str | None = None,
    thorough: bool = False,
    allow_slower: bool = False,
    auto: bool = False,
    time: str | None = None,
    pareto: StrPath | None = None,
    passes: Iterable[str] | None = None,
    skip: Iterable[str] | None = None,
    set: Mapping[str, object] | None = None,
    target: Literal["portable", "ort", "tensorrt", "openvino", "qnn"] | None = None,
    opset: int | None = None,
    fix_dim: Mapping[str, int] | None = None,
    outputs: Iterable[str] | None = None,
    rename: Mapping[str, str] | None = None,
    max_growth: str | int | None = None,
    external_data: Literal["auto", "always"] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    no_verify: bool = False,
    paranoid: bool = False,
    bench: bool = False,
    input_shape: Shapes | None = None,
    ep: str | None = None,
    device: int | None = None,
    threads: int | None = None,
    ort: StrPath | None = None,
    seed: int | None = None,
    memory: str | int | None = None,
    timeout: int | None = None,
    jobs: int | None = None,
    store: StrPath | None = None,
    trace: StrPath | None = None,
    on: Executor | None = None,
    report: StrPath | Sequence[StrPath] | None = None,
    recipe: StrPath | None = None,
    save_recipe: StrPath | None = None,
    progress: Progress = None,
) -> Result:
    """Makes a model smaller or faster, proves it, and gives it back in the form in which it came.

    Without a budget only exact passes run. `optimize --help` says more about every option.

    Args:
        model: A path, bytes, ``onnx.ModelProto``, ``onnx_ir.Model`` or ``torch.onnx.ONNXProgram``. A path is best for
            large models: weights stay in the file.
        output: Where the result goes; a temporary folder without it.
        calib: Calibration set: a path, a mapping of names to arrays with samples along the first axis, or an iterable
            of mappings, one per sample or per batch. Its last quarter is held out unless ``validate`` is given.
        validate: What the result is compared on, in the same forms; random inputs without any set.
        labels: The array that holds labels; a calibration set need not have it.
        batch: Samples run at a time where the model leaves the choice.
        calib_select: Choose so many samples of the calibration set.
        dtype: Compute in this type wherever that is allowed; with ``:io`` inputs and outputs change too.
        kv_cache: Keep the caches of ``GroupQueryAttention`` in this type; scales come from ``calib``.
        rtol: The largest relative L2 error of an output under ``dtype`` or ``kv_cache``.
        size: Share of the file's bytes to keep: ``0.3``.
        params: Share of the parameters to keep.
        flops: Share of the floating-point operations to keep.
        latency: Share of the measured latency to keep.
        max_drop: The largest drop of the metric on held-out samples.
        minimize: What becomes as little as ``max_drop`` allows where no share is given.
        metric: What is measured on held-out samples.
        thorough: Ask every lossy method, even where rounding alone keeps to the budget and loses next to nothing.
        allow_slower: Where latency is not limited, take the plan that loses least even if it is slower than the original.
        auto: Try the recipes that the model suggests and write the best that ``max_drop`` allows.
        time: Time after which ``auto`` starts no other recipe: ``"10m"``.
        pareto: A folder for every model that no other beats in both what is saved and what is lost.
        passes: Run only these passes.
        skip: Do not run these passes.
        set: Options of passes: ``{"prune-units.attention": 3}``.
        target: ``"ort"`` lets the result use ``com.microsoft`` operators; the others say whose whole numbers it uses.
        opset: Upgrade to this operator set first.
        fix_dim: Sizes of open dimensions: ``{"batch": 1, "x[1]": 128}``.
        outputs: The outputs of the result; any value that the model computes may be one.
        rename: New names of inputs and outputs: ``{"logits": "scores"}``. Sets have the new names.
        max_growth: Let folding enlarge the model by this much: ``"512MB"``.
        external_data: ``"always"`` puts weights beside the model.
        overwrite: Let the result replace the model itself.
        dry_run: Do everything but write.
        no_verify: Write the result without running it.
        paranoid: Run the model after every pass.
        bench: Time the result in turns with the original.
        input_shape: Shapes of inputs in runs: ``{"x": (1, 3, 224, 224)}``.
        ep: Execution provider: ``"cuda"``.
        device: Device of the execution provider.
        threads: Threads of a run.
        ort: The ONNX Runtime library to use.
        seed: Seed of random inputs.
        memory: Memory that runs may use: ``"8GB"``.
        timeout: Seconds that one run may take.
        jobs: Workers that run models at a time, each with its own threads.
        store: The folder where results are kept for later runs, if not in the user's data folder.
        trace: Write what takes how long to this file, for Perfetto or ``chrome://tracing``.
        on: Who runs models in the place of this machine: :class:`onnx_lathe.distributed.Ray`, or whatever has ``workers``
            and ``map`` as :class:`onnx_lathe.distributed.Executor` tells. ``store`` is then a folder that all share.
        report: Also write the report to these files: .html, .json or .md.
        recipe: Take options from this file; those given here win.
        save_recipe: Write the options of this run to a file.
        progress: A function that is called with done, total and unit; ``None`` shows a bar on a terminal or in a
            notebook, ``False`` nothing.

    Raises:
        Refused: The result differs, loses too much, or the budget cannot be reached; nothing was written.
        InputError: The model or a set cannot be used.
        RuntimeMissing: The ONNX Runtime library that was asked for is not to be had.
        UsageError: The arguments do not go together.
    """
    options = dict(locals())
    for name in ("model", "output", "progress", "report", "calib", "validate"):
        del options[name]
    with _Job("optimizing", progress, options) as job:
        given = _models.put(model, job.folder)
        options["calib"] = job.set("calib", calib, given.path)
        options["validate"] = job.set("validate", validate, given.path)
        target_file = None if dry_run else job.output(given, output)
        where = [] if target_file is None else ["-o", str(target_file)]
        found = job.call([str(given.path), *where, *_flags(options), *_repeated("--report", report)])
        return job.result(found, given, target_file, page=found.json)


def sampler(
    denoiser: Model,
    output: StrPath | None = None,
    *,
    scheduler: Any = None,
    solver: str | None = None,
    steps: int | None = None,
    grid: Sequence[float] | None = None,
    eta: float | None = None,
    tokens: int | None = None,
    explicit_sigmas: bool = False,
    guidance: float | Literal["input"] | None = None,
    guidance_rescale: float | None = None,
    guidance_passes: Literal["batched", "separate"] | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    negative: StrPath | Mapping[str, object] | None = None,
    only: Literal["loop"] | None = None,
    io: Mapping[str, object] | None = None,
    actions: StrPath | Mapping[str, object] | None = None,
    form: Literal["auto", "unrolled", "loop", "adaptive"] | None = None,
    threshold: float | None = None,
    warmup: int | None = None,
    tail: int | None = None,
    plan: StrPath | Mapping[str, object] | None = None,
    latency: float | None = None,
    search: int | None = None,
    evaluations: int | None = None,
    pairs: int | None = None,
    skip_layers: float | None = None,
    reference: StrPath | None = None,
    real: Samples | None = None,
    draws: int | None = None,
    search_log: StrPath | None = None,
    save_plan: StrPath | None = None,
    preview: StrPath | None = None,
    overwrite: bool = False,
    no_verify: bool = False,
    rtol: float | None = None,
    input_shape: Shapes | None = None,
    ep: str | None = None,
    device: int | None = None,
    threads: int | None = None,
    ort: StrPath | None = None,
    seed: int | None = None,
    memory: str | int | None = None,
    timeout: int | None = None,
    jobs: int | None = None,
    store: StrPath | None = None,
    trace: StrPath | None = None,
    on: Executor | None = None,
    report: StrPath | None = None,
    progress: Progress = None,
) -> Result:
    """Compiles a whole diffusion sampling loop into one model: noise in, sample out.

    With the folder of a pipeline the result is the whole pipeline: token ids and noise in, pixels out.

    Args:
        denoiser: The network that one step runs, in any form that :func:`optimize` takes, or the folder of a pipeline as
            diffusers and Optimum lay it out.
        output: Where the sampler goes; a temporary folder without it.
        scheduler: ``scheduler_config.json``, its content as a mapping, or a scheduler of diffusers; a folder has one.
        solver: Another solver than the configuration names.
        steps: How many steps.
        grid: The timesteps themselves, noisy ones first.
        eta: How stochastic DDIM is, 0 unless given, or TCD, 0.3 unless given.
        tokens: Tokens of the latent, for schedulers that shift their noise levels by it.
        explicit_sigmas: Flow noise levels as FLUX pipelines pass them.
        guidance: The scale of classifier-free guidance, or ``"input"``.
        guidance_rescale: Pull a guided prediction to the deviation of the conditional one.
        guidance_passes: How the two passes of a guided step run.
        size: Of a folder: height and width of images in pixels.
        frames: Of a folder: how many frames videos have.
        negative: Of a folder, what stands for the text in the unconditional pass: ``"input"`` for token ids of its own,
            ``"zeros"``, or token ids by the names of the inputs, as a mapping or a .json file.
        only: Of a folder: ``"loop"`` compiles the sampling loop alone.
        io: Roles of the denoiser's inputs where they are not plain: ``{"latent": "x", "uncond:label": 10}``;
            ``{"time-value": "sigma", "predicts": "clean"}`` for networks that do their own preconditioning.
        actions: Of a policy that draws chunks of actions: statistics of the actions, as LeRobot writes them.
        form: The control flow of the result.
        threshold: For the adaptive form: the share of change at which a step is computed.
        warmup: For the adaptive form: first steps that are always computed.
        tail: For the adaptive form: last steps that are always computed.
        plan: A step plan: a .json file or its content, ``"auto"``, or methods by name.
        latency: For ``plan="auto"``: the share of time that is left.
        search: Search this many timesteps.
        evaluations: How many candidates the search scores.
        pairs: Pairs of samples that a score is made of.
        skip_layers: The share of layers that may be left out over all steps.
        reference: A network that gives features of images.
        real: Real images for that network, as a set.
        draws: Samples that are drawn from each of the best candidates.
        search_log: Where scores are kept.
        save_plan: Write the plan of this run.
        preview: Draw samples of the denoiser and of the result into this .png file.
        overwrite: Let the sampler replace the denoiser itself.
        no_verify: Write the result without running it.
        rtol: The largest relative L2 error of the sample.
        report: Also write the report to this .json file.

    The other arguments and the errors are those of :func:`optimize`. The plan is ``result.report["plan"]``.
    """
    options = dict(locals())
    for name in ("denoiser", "output", "progress", "scheduler", "plan", "real", "io"):
        del options[name]
    with _Job("compiling", progress, options) as job:
        given = _models.put(denoiser, job.folder)
        target = job.output(given, output)
        options["scheduler"] = None if scheduler is None else job.scheduler(scheduler)
        options["plan"] = job.json("plan", plan) if isinstance(plan, Mapping) else plan
        options["negative"] = job.json("negative", negative) if isinstance(negative, Mapping) else negative
        options["actions"] = job.json("actions", actions) if isinstance(actions, Mapping) else actions
        options["size"] = None if size is None else f"{size[0]}x{size[1]}"
        features = None if reference is None else Path(reference)
        options["real"] = job.set("real", real, features)
        roles = [f"--io={role}={value}" for role, value in (io or {}).items()]
        found = job.call(["sampler", str(given.path), "-o", str(target), *_flags(options), *roles])
        return job.result(found, given, target, page=None)


def verify(
    a: Model,
    b: Model | None = None,
    *,
    against: str | None = None,
    layers: bool = False,
    rtol: float | None = None,
    bits: bool = False,
    metric: str | None = None,
    max_drop: float | None = None,
    seeds: int | None = None,
    features: StrPath | None = None,
    calib: Samples | None = None,
    validate: Samples | None = None,
    labels: str | None = None,
    batch: int | None = None,
    input_shape: Shapes | None = None,
    ep: str | None = None,
    device: int | None = None,
    threads: int | None = None,
    ort: StrPath | None = None,
    seed: int | None = None,
    memory: str | int | None = None,
    timeout: int | None = None,
    jobs: int | None = None,
    store: StrPath | None = None,
    trace: StrPath | None = None,
    on: Executor | None = None,
    progress: Progress = None,
) -> Comparison:
    """Whether two models compute the same on random inputs or a set, or how much of a metric the second loses there.

    Args:
        a: The reference.
        b: The candidate; with ``against`` it may be left out: ``a`` on both providers.
        against: Run ``a`` on this execution provider, and ``b`` on that of ``ep`` as it will be deployed.
        layers: Compare values inside the models too, down to the first node that computes something else.
        rtol: The largest relative L2 error of an output.
        bits: Expect equal bits.
        metric: What to measure on a set instead of comparing values.
        max_drop: The largest drop of the metric that passes; without it a metric is only measured.
        seeds: Compare two samplers on so many seeds.
        features: A network that gives features of images, for samplers.

    The other arguments are those of :func:`optimize`. A comparison that fails is an answer, which is false; a candidate
    that cannot be run at all raises :class:`Refused`.
    """
    options = dict(locals())
    for name in ("a", "b", "progress", "calib", "validate"):
        del options[name]
    with _Job("comparing", progress, options) as job:
        first = job.model("a", a)
        second = [] if b is None else [str(job.model("b", b))]
        options["calib"] = job.set("calib", calib, first)
        options["validate"] = job.set("validate", validate, first)
        found = job.call(["verify", str(first), *second, *_flags(options)])
        return Comparison(found.report, found.text, found.notes, found.refused)


def diff(a: Model, b: Model, *, html: StrPath | None = None, exit_code: bool = False) -> Answer:
    """What differs between two models, without running them: inputs and outputs, operators, nodes, weights.

    Args:
        a: One model.
        b: The other.
        html: Also write a page with everything.
        exit_code: Raise :class:`InputError` where the models differ.

    ``report["equal"]`` says whether anything differs.
    """
    options = dict(locals())
    for name in ("a", "b"):
        del options[name]
    with _Job("comparing", False, {}) as job:
        first, second = job.model("a", a), job.model("b", b)
        return job.call(["diff", str(first), str(second), *_flags(options)]).answer()


def bench(
    a: Model,
    b: Model | None = None,
    *,
    seconds: float | None = None,
    profile: bool = False,
    calib: Samples | None = None,
    batch: int | None = None,
    input_shape: Shapes | None = None,
    ep: str | None = None,
    device: int | None = None,
    threads: int | None = None,
    ort: StrPath | None = None,
    seed: int | None = None,
    memory: str | int | None = None,
    timeout: int | None = None,
    jobs: int | None = None,
    store: StrPath | None = None,
    trace: StrPath | None = None,
    on: Executor | None = None,
    progress: Progress = None,
) -> Answer:
    """Times a model, or two in turns, with the runtime's own optimizations on.

    Args:
        a: The model.
        b: A second model with the same inputs.
        seconds: Time to spend on timed runs.
        profile: Also tell where the time goes, by operator and by residual unit.

    The other arguments are those of :func:`optimize`. ``answer.report["ratio"]`` is the latency of ``b`` over that of
    ``a``, ``answer.report["verdict"]`` whether that counts.
    """
    options = dict(locals())
    for name in ("a", "b", "progress", "calib"):
        del options[name]
    with _Job("timing", progress, options) as job:
        first = job.model("a", a)
        options["calib"] = job.set("calib", calib, first)
        models = [str(first)] + ([] if b is None else [str(job.model("b", b))])
        return job.call(["bench", *models, *_flags(options)]).answer()


def inspect(
    model: Model,
    *,
    units: bool = False,
    activations: bool = False,
    calib: Samples | None = None,
    labels: str | None = None,
    batch: int | None = None,
    input_shape: Shapes | None = None,
    ep: str | None = None,
    device: int | None = None,
    threads: int | None = None,
    ort: StrPath | None = None,
    memory: str | int | None = None,
    timeout: int | None = None,
    jobs: int | None = None,
    store: StrPath | None = None,
    trace: StrPath | None = None,
    on: Executor | None = None,
    progress: Progress = None,
) -> Answer:
    """What a model is: inputs, nodes, parameters, FLOPs, residual units, and what could be saved at most.

    Args:
        model: The model.
        units: List every residual unit in the text; the report always does.
        activations: Also measure on ``calib`` how many inputs of every layer could be left out.
        ep: Which nodes this execution provider takes in a run, and why it leaves others.
        input_shape: Shapes of inputs in that run.

    The other arguments are those of :func:`optimize`.
    """
    options = dict(locals())
    for name in ("model", "progress", "calib"):
        del options[name]
    with _Job("inspecting", progress, options) as job:
        path = job.model("model", model)
        options["calib"] = job.set("calib", calib, path)
        return job.call(["inspect", str(path), *_flags(options)]).answer()


def passes() -> list[dict[str, Any]]:
    """Every pass and lossy method: name, kind, summary and options."""
    return list(_Job("", False, {}).call(["passes"]).report)


class _Found:
    """What the extension answered."""

    def __init__(self, answer: tuple[str, str, list[str], str | None]) -> None:
        self.json, self.text, self.notes, self.refused = answer
        self.report = json.loads(self.json)

    def answer(self) -> Answer:
        return Answer(self.report, self.text, self.notes)


class _Job:
    """One call with its temporary folder and its progress."""

    def __init__(self, what: str, progress: Progress, options: dict[str, Any]) -> None:
        """Takes from the options who runs models."""
        self.meter = Meter(what, progress)
        self.on: Executor | None = options.pop("on", None)
        # Where other machines see temporary files.
        self.shared: Path | None = None
        if self.on is not None:
            if options["ep"] not in (None, "cpu") and getattr(self.on, "gpus", None) == 0:
                raise _native.UsageError(f"ep={options['ep']} needs workers with graphics processors: gpus=1")
            store = options["store"] = options["store"] or getattr(self.on, "store", None)
            self.shared = Path(store, "scratch") if store else None

    def __enter__(self) -> _Job:
        if self.shared is not None:
            try:
                self.shared.mkdir(parents=True, exist_ok=True)
            except OSError as why:
                raise _native.InputError(f"the store `{self.shared.parent}` cannot be used: {why.strerror}") from None
        self.scratch = self.temporary()
        self.folder = Path(self.scratch.name)
        self.kept: TemporaryDirectory[str] | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self.scratch.cleanup()

    def temporary(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="onnx-lathe-", dir=self.shared)

    def call(self, arguments: Sequence[str]) -> _Found:
        with ExitStack() as served:
            where = []
            if self.on is not None:
                from onnx_lathe import distributed

                try:
                    where = [f"--on={served.enter_context(distributed.served(self.on))}"]
                except RuntimeError as why:
                    raise _native.InputError(str(why)) from None
            with self.meter:
                return _Found(_native.call(["optimize", *arguments, *where], self.meter.hear))

    def model(self, name: str, model: Model) -> Path:
        folder = self.folder / name
        folder.mkdir()
        return _models.put(model, folder).path

    def set(self, name: str, samples: Samples | None, model: Path | None) -> str | None:
        """A set for ``model``; without one, mappings are taken for samples."""

        def ndims() -> dict[str, int | None]:
            if model is None:
                return {}
            found = _Found(_native.call(["optimize", "inspect", str(model)]))
            return {value["name"]: value["ndim"] for value in found.report["inputs"]}

        return _sets.put(samples, self.folder / f"set-{name}", ndims)

    def json(self, name: str, content: Mapping[str, object]) -> str:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(dict(content)))
        return str(path)

    def scheduler(self, scheduler: Any) -> str:
        if isinstance(scheduler, (str, os.PathLike)):
            return os.fsdecode(scheduler)
        if isinstance(scheduler, Mapping):
            return self.json("scheduler", scheduler)
        if hasattr(scheduler, "to_json_string"):
            return self.json("scheduler", json.loads(scheduler.to_json_string()))
        raise TypeError(f"a scheduler is a path, a mapping or one of diffusers, not {type(scheduler).__name__}")

    def output(self, given: _models.Given, output: StrPath | None) -> Path:
        """Where the result goes: a folder that is kept as long as the result, if no other place is given."""
        if output is not None:
            return Path(output)
        self.kept = self.temporary()
        name = f"{given.path.name}.onnx" if given.path.is_dir() else given.path.name
        return Path(self.kept.name) / name

    def result(self, found: _Found, given: _models.Given, path: Path | None, page: str | None) -> Result:
        return Result(page, found.report, found.text, found.notes, path, given.load, self.kept)


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Options of the command line. What is ``None`` or false is not said."""
    arguments = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if name == "input_shape":
            shapes = (value or {}).items()
            arguments += [f"{flag}={key}:{','.join(str(int(size)) for size in shape)}" for key, shape in shapes]
        elif name in ("set", "fix_dim", "rename"):
            arguments += [f"{flag}={key}={_text(setting)}" for key, setting in (value or {}).items()]
        elif value is True:
            arguments.append(flag)
        elif value is not None and value is not False:
            arguments.append(f"{flag}={_text(value)}")
    return arguments


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, os.PathLike)):
        return os.fsdecode(value)
    if isinstance(value, Iterable):
        return ",".join(_text(one) for one in value)
    return str(value)


def _repeated(flag: str, paths: StrPath | Sequence[StrPath] | None) -> list[str]:
    if paths is None:
        return []
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    return [f"{flag}={os.fsdecode(path)}" for path in several]
