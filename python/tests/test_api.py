"""The functions of the package: forms of models, sets, answers, errors."""

import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnx_lathe
import pytest
from conftest import FIXTURES, samples


def nodes(model: onnx.ModelProto) -> int:
    return len(model.graph.node)


def test_a_path_gives_a_path(transformer: Path, tmp_path: Path) -> None:
    result = onnx_lathe.optimize(transformer, tmp_path / "out.onnx")
    assert result.model == result.path == tmp_path / "out.onnx"
    assert result.passed
    assert nodes(onnx.load(result.path)) == result.report["output"]["nodes"] < result.report["input"]["nodes"] == 212
    assert result.report["verify"]["runtime"].startswith("ONNX Runtime")
    assert result.report["command"][:2] == ["optimize", str(transformer)]
    assert "verified against the original" in str(result) and "verified" in repr(result)


def test_without_an_output_the_result_goes_with_the_object(transformer: Path, tmp_path: Path) -> None:
    result = onnx_lathe.optimize(str(transformer))
    path = result.path
    assert path.exists() and result.save(tmp_path / "kept.onnx").exists()
    del result
    assert not path.exists() and onnx.load(tmp_path / "kept.onnx")


def test_bytes_give_bytes(transformer: Path) -> None:
    result = onnx_lathe.optimize(transformer.read_bytes())
    assert isinstance(result.model, bytes)
    assert nodes(onnx.load_from_string(result.model)) == result.report["output"]["nodes"]


def test_a_proto_gives_a_proto_and_is_not_changed(transformer: Path) -> None:
    model = onnx.load(transformer)
    before = model.SerializeToString()
    result = onnx_lathe.optimize(model, skip=["fuse-layer-norm"])
    assert isinstance(result.model, onnx.ModelProto)
    assert "LayerNormalization" not in {node.op_type for node in result.model.graph.node}
    assert model.SerializeToString() == before


def test_onnx_ir_gives_onnx_ir(transformer: Path) -> None:
    result = onnx_lathe.optimize(onnx_ir.load(transformer))
    assert isinstance(result.model, onnx_ir.Model)
    assert result.model.graph.num_nodes() == result.report["output"]["nodes"]


def test_an_onnx_program_gives_one(transformer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch is not among the packages of these tests; `benches/pipelines.py` has the real one.
    class ONNXProgram:
        def __init__(self, model: onnx_ir.Model) -> None:
            self.model = model

    module = types.ModuleType("torch.onnx")
    module.ONNXProgram = ONNXProgram
    monkeypatch.setitem(sys.modules, "torch.onnx", module)
    program = ONNXProgram(onnx_ir.load(transformer))
    result = onnx_lathe.optimize(program)
    assert isinstance(result.model, ONNXProgram) and result.model is not program
    assert result.model.model.graph.num_nodes() < program.model.graph.num_nodes() == 212


def test_external_data_follows(tmp_path: Path) -> None:
    result = onnx_lathe.optimize(FIXTURES / "external.onnx", tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").exists() and result.passed
    with pytest.raises(ValueError, match="must be called `out.onnx`"):
        result.save(tmp_path / "other.onnx")
    (tmp_path / "copy").mkdir()
    onnx.load(result.save(tmp_path / "copy" / "out.onnx"))


def test_what_is_no_model_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"a model is a path, bytes, .* not builtins.int"):
        onnx_lathe.optimize(3)


def budget(classifier: Path, **sets: object) -> onnx_lathe.Result:
    return onnx_lathe.optimize(classifier, size=0.4, metric="rel-l2", progress=False, **sets)


def test_arrays_are_a_set(classifier: Path, tmp_path: Path) -> None:
    whole = budget(classifier, calib={"x": samples(64)})
    assert whole.report["output"]["file_bytes"] <= 0.4 * whole.report["input"]["file_bytes"]
    assert whole.report["verify"]["set"] == "validation" and whole.report["verify"]["samples"] == 16
    np.savez(tmp_path / "calib.npz", x=samples(64))
    by_path = budget(classifier, calib=tmp_path / "calib.npz")
    assert by_path.path.read_bytes() == whole.path.read_bytes()
    one_by_one = budget(classifier, calib=({"x": row} for row in samples(64)))
    assert one_by_one.path.read_bytes() == whole.path.read_bytes()
    equal = budget(classifier, calib=({"x": samples(64)[at : at + 16]} for at in range(0, 64, 16)))
    assert equal.path.read_bytes() == whole.path.read_bytes()
    # The last batch is smaller, as loaders leave it.
    batches = budget(classifier, calib=({"x": samples(64)[at : at + 24]} for at in range(0, 64, 24)))
    assert batches.path.read_bytes() == whole.path.read_bytes()


def test_labels_and_a_validation_set_of_its_own(classifier: Path) -> None:
    x = samples(40, seed=1)
    labelled = {"x": x, "label": np.arange(40) % 10}
    result = onnx_lathe.optimize(
        classifier, calib={"x": samples(32), "label": np.zeros(32, np.int64)}, validate=labelled, labels="label",
        metric="accuracy", params=0.9, max_drop=1.0,
    )  # fmt: skip
    assert result.report["verify"]["metric"] == "accuracy" and result.report["verify"]["samples"] == 40


@pytest.mark.parametrize(
    ("runs", "error", "message"),
    [
        ([], ValueError, "the set is empty"),
        ([samples(2)], TypeError, "run 0 of the set is ndarray, expected a mapping"),
        ([{"x": samples(2)}, {"y": samples(2)}], ValueError, r"run 1 of the set has \['y'\], the first has \['x'\]"),
        (
            [{"x": samples(2)}, {"x": samples(2)[:, :3]}],
            ValueError,
            r"`x` is \[2, 3\] in run 1 and \[2, 64\] in the first",
        ),
        ([{"x": samples(2)}, {"x": samples(2).astype("f8")}], TypeError, "`x` is float64 in run 1 and float32 before"),
        ([{"x": np.array([None])}], TypeError, "`x` holds Python objects"),
    ],
)
def test_a_set_with_a_mistake_says_where(runs: list, error: type[Exception], message: str, classifier: Path) -> None:
    with pytest.raises(error, match=message):
        onnx_lathe.optimize(classifier, calib=runs)


def test_errors_have_types(transformer: Path, classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(onnx_lathe.InputError, match="junk.onnx"):
        onnx_lathe.optimize(tmp_path / "junk.onnx", tmp_path / "out.onnx")
    with pytest.raises(onnx_lathe.UsageError, match="--calib names a set"):
        onnx_lathe.optimize(transformer, tmp_path / "out.onnx", size=0.5)
    with pytest.raises(onnx_lathe.RuntimeMissing, match="no/such/library.so"):
        onnx_lathe.optimize(transformer, tmp_path / "out.onnx", ort="no/such/library.so")
    with pytest.raises(onnx_lathe.InputError, match="cuda"):
        onnx_lathe.optimize(transformer, tmp_path / "out.onnx", ep="cuda")
    with pytest.raises(onnx_lathe.Refused, match="is the least"):
        onnx_lathe.optimize(classifier, tmp_path / "out.onnx", calib={"x": samples(8)}, size=0.001)
    assert not (tmp_path / "out.onnx").exists()
    assert issubclass(onnx_lathe.RuntimeMissing, onnx_lathe.InputError)
    assert all(issubclass(one, onnx_lathe.Error) for one in (onnx_lathe.InputError, onnx_lathe.UsageError))


def test_a_dry_run_has_a_report_only(transformer: Path) -> None:
    result = onnx_lathe.optimize(transformer, dry_run=True, no_verify=True)
    assert result.path is None and not result.passed and result.report["verify"] is None
    with pytest.raises(ValueError, match="a dry run has no result"):
        result.model  # noqa: B018


def test_notebooks_show_the_report(transformer: Path) -> None:
    page = onnx_lathe.optimize(transformer, no_verify=True)._repr_html_()
    assert page.startswith("<iframe srcdoc=") and "fuse-layer-norm" in page and "<html" not in page


def test_verify_is_true_or_false(transformer: Path, classifier: Path, tmp_path: Path) -> None:
    result = onnx_lathe.optimize(transformer, tmp_path / "out.onnx", no_verify=True)
    same = onnx_lathe.verify(transformer, result.model)
    assert same and same.passed and same.reason is None and same.report["metric"] == "rel-l2"
    other = onnx.load(classifier)
    weight = next(tensor for tensor in other.graph.initializer if tensor.name == "w")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.5, "w"))
    differs = onnx_lathe.verify(onnx.load(classifier), other)
    assert not differs and "the outputs differ" in differs.reason and not differs.report["passed"]
    lost = onnx_lathe.verify(classifier, other, validate={"x": samples(16)}, metric="rel-l2", max_drop=0.01)
    assert not lost and lost.report["drop"] > 0.01 and lost.report["limit"] == 0.01
    assert onnx_lathe.verify(classifier, other, validate={"x": samples(16)}, metric="rel-l2", max_drop=1.0)


def test_bench_times_one_or_two(classifier: Path) -> None:
    one = onnx_lathe.bench(classifier, seconds=0.2, threads=1, input_shape={"x": (4, 64)})
    assert one.report["before_ms"] > 0 and one.report["after_ms"] is None and one.report["threads"] == 1
    two = onnx_lathe.bench(classifier, onnx.load(classifier), seconds=0.2, calib={"x": samples(8)}, profile=True)
    assert two.report["ratio"] > 0 and len(two.report["profile"]) == 2


def test_diff_tells_what_differs(classifier: Path, tmp_path: Path) -> None:
    assert onnx_lathe.diff(classifier, onnx.load(classifier)).report["equal"]
    onnx_lathe.optimize(classifier, tmp_path / "out.onnx", rename={"x": "pixels"}, progress=False)
    page = tmp_path / "page.html"
    found = onnx_lathe.diff(classifier, tmp_path / "out.onnx", html=page)
    assert [(port["name"], port["a"] is None) for port in found.report["interface"]] == [("pixels", True), ("x", False)]
    assert not found.report["equal"] and "pixels" in page.read_text()
    with pytest.raises(onnx_lathe.InputError, match="the models differ"):
        onnx_lathe.diff(classifier, tmp_path / "out.onnx", exit_code=True)


def test_inspect_and_passes_tell(transformer: Path) -> None:
    found = onnx_lathe.inspect(transformer, units=True)
    assert found.report["model"]["nodes"] == 212 and "encoder/layer.1/attention" in str(found)
    names = [one["name"] for one in onnx_lathe.passes()]
    assert {"fold-constants", "quantize"} <= set(names)


def test_a_sampler_takes_the_scheduler_as_it_comes(tmp_path: Path) -> None:
    config = {
        "_class_name": "DDIMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
        "num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 0,
        "prediction_type": "epsilon", "timestep_spacing": "leading",
    }  # fmt: skip
    (tmp_path / "scheduler.json").write_text(json.dumps(config))

    class Scheduler:
        def to_json_string(self) -> str:
            return json.dumps(config)

    made = [
        onnx_lathe.sampler(FIXTURES / "dit.onnx", scheduler=scheduler, steps=3, guidance=2.0, io=roles)
        for scheduler, roles in ((tmp_path / "scheduler.json", ROLES), (config, ROLES), (Scheduler(), ROLES))
    ]
    assert len({result.path.read_bytes() for result in made}) == 1
    assert made[0].passed and len(made[0].report["plan"]["grid"]) == 3
    assert made[0]._repr_html_().startswith("<pre>")
    again = onnx_lathe.sampler(
        onnx.load(FIXTURES / "dit.onnx"), scheduler=config, guidance=2.0, io=ROLES, plan=made[0].report["plan"]
    )
    assert again.path.read_bytes() == made[0].path.read_bytes()
    with pytest.raises(TypeError, match="a scheduler is a path, a mapping or one of diffusers"):
        onnx_lathe.sampler(FIXTURES / "dit.onnx", scheduler=3, steps=3)


def test_a_pipeline_is_a_folder_with_a_scheduler_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(onnx_lathe.UsageError, match="--scheduler is missing"):
        onnx_lathe.sampler(FIXTURES / "dit.onnx", steps=3)
    with pytest.raises(onnx_lathe.InputError, match="is a folder and no pipeline of diffusers"):
        onnx_lathe.sampler(tmp_path, steps=3)
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioPipeline"}')
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises(onnx_lathe.InputError, match="pipelines of class `AudioPipeline` are not built"):
        onnx_lathe.sampler(tmp_path, steps=3, size=(64, 64), negative={"input_ids": [1]}, guidance=3.0)


ROLES = {"uncond:label": 10}


def test_progress_is_heard_and_its_exception_ends_the_call(transformer: Path, tmp_path: Path) -> None:
    heard = []
    onnx_lathe.optimize(transformer, tmp_path / "a.onnx", progress=lambda *now: heard.append(now))
    assert heard and all(isinstance(done, int) and unit for done, _, unit in heard)

    class Enough(Exception):
        pass

    def enough(done: int, total: int, unit: str) -> None:
        raise Enough

    with pytest.raises(Enough):
        onnx_lathe.optimize(transformer, tmp_path / "b.onnx", progress=enough)
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx"}


def test_a_recipe_of_the_command_line_works_here(transformer: Path, tmp_path: Path) -> None:
    first = onnx_lathe.optimize(transformer, skip=["fuse-gelu"], seed=3, save_recipe=tmp_path / "r.toml")
    again = onnx_lathe.optimize(transformer, recipe=tmp_path / "r.toml", report=tmp_path / "r.html")
    assert again.path.read_bytes() == first.path.read_bytes() and again.report["seed"] == 3
    assert "<html" in (tmp_path / "r.html").read_text()


# Options of the command line that are arguments by position, or only for terminals.
NO_KEYWORDS = {"output", "help", "version", "verbose", "quiet", "json"}


@pytest.mark.parametrize("command", ["optimize", "sampler", "verify", "diff", "bench", "inspect"])
def test_every_option_of_the_command_line_is_a_keyword(command: str) -> None:
    words = [] if command == "optimize" else [command]
    call = [sys.executable, "-m", "onnx_lathe", *words, "--help"]
    text = subprocess.run(call, check=True, capture_output=True, text=True).stdout
    options = {
        name.replace("-", "_") for name in re.findall(r"^(?:  -\w, |      )--([a-z-]+)", text, re.M)
    } - NO_KEYWORDS
    parameters = inspect.signature(getattr(onnx_lathe, command)).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"progress"}
    assert keywords == options
