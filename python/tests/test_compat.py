"""The stand-ins for onnxsim and onnxslim: their documented calls, and arguments that mean nothing here."""

import inspect
from pathlib import Path

import numpy as np
import onnx
import onnx_lathe
import pytest
from conftest import samples
from onnx import TensorProto, helper
from onnx_lathe import _native
from onnx_lathe.compat import onnxsim, onnxslim

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_the_documented_calls_run_on_light_models(name: str, tmp_path: Path) -> None:
    filename = str(LIGHT / f"light_{name}.onnx")
    model = onnx.load(filename)
    model_simp, check = onnxsim.simplify(model)
    assert check, "Simplified ONNX model could not be validated"
    onnx.checker.check_model(model_simp)
    assert len(model_simp.graph.node) <= len(model.graph.node)
    slimmed_model = onnxslim.slim(model)
    if slimmed_model:
        onnx.save(slimmed_model, tmp_path / "slimmed_model.onnx")
    assert (tmp_path / "slimmed_model.onnx").exists()
    assert onnxslim.slim(filename, str(tmp_path / "out.onnx")) is None
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "slimmed_model.onnx").read_bytes()


def open_model() -> onnx.ModelProto:
    """A batch normalization after a convolution, sizes that are computed from open ones, and a second output."""
    ones, shape = np.ones(4, np.float32), np.array([0, -1], np.int64)
    constants = {"w": np.ones((4, 3, 1, 1), np.float32), "scale": ones * 2, "bias": ones, "mean": ones, "var": ones}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"]),
        helper.make_node("BatchNormalization", ["conv", "scale", "bias", "mean", "var"], ["norm"]),
        helper.make_node("Shape", ["norm"], ["size"]),
        helper.make_node("Reshape", ["norm", "flat"], ["y"]),
    ]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in (constants | {"flat": shape}).items()]
    graph = helper.make_graph(
        nodes,
        "open",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"]),
            helper.make_tensor_value_info("size", TensorProto.INT64, [4]),
        ],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def sizes(model: onnx.ModelProto) -> list[int]:
    return [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]


def test_onnxsim_arguments_do_what_they_did(tmp_path: Path) -> None:
    model = open_model()
    before = model.SerializeToString()
    simple, ok = onnxsim.simplify(model, check_n=3, test_input_shapes={"x": [2, 3, 5, 5]})
    assert ok and "BatchNormalization" not in operators(simple)
    kept, ok = onnxsim.simplify(model, skip_fuse_bn=True)
    assert ok and "BatchNormalization" in operators(kept)
    folded, ok = onnxsim.simplify(model, perform_optimization=False)
    assert ok and "BatchNormalization" in operators(folded)
    fixed, ok = onnxsim.simplify(
        model, overwrite_input_shapes={None: [1, 3, 8, 8]}, output_path=str(tmp_path / "f.onnx")
    )
    assert ok and sizes(fixed) == [1, 3, 8, 8] and "Shape" not in operators(fixed) and (tmp_path / "f.onnx").exists()
    open_sizes, ok = onnxsim.simplify(model, True, skip_constant_folding=True)
    assert ok and "Shape" in operators(open_sizes)
    one, ok = onnxsim.simplify(model, unused_output=["size"])
    assert ok and [value.name for value in one.graph.output] == ["y"]
    newer, ok = onnxsim.simplify(model, target_opset_version=21, include_subgraph=True)
    assert ok and newer.opset_import[0].version == 21
    fed, ok = onnxsim.simplify(model, input_data={"x": np.ones((1, 3, 4, 4), np.float32)})
    assert ok and fed.graph.node
    assert model.SerializeToString() == before


def test_onnxslim_arguments_do_what_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = open_model()
    fixed = onnxslim.slim(model, input_shapes=["x:1,3,8,8"], model_check=True)
    assert fixed is not None and sizes(fixed) == [1, 3, 8, 8]
    kept = onnxslim.slim(model, skip_optimizations=["graph_fusion"])
    assert kept is not None and "BatchNormalization" in operators(kept)
    onnxslim.slim(model, str(tmp_path / "out.onnx"), save_as_external_data=True, model_check_inputs=["x:1,3,4,4"])
    np.save(tmp_path / "x.npy", np.ones((1, 3, 4, 4), np.float32))
    assert onnxslim.slim(model, model_check=True, model_check_inputs=[f"x:{tmp_path / 'x.npy'}"]) is not None
    assert "verified" in capsys.readouterr().out
    assert onnxslim.slim([model, str(tmp_path / "out.onnx")], inspect=True) is None
    assert capsys.readouterr().out.count("inputs") >= 2


def test_a_model_that_cannot_be_proven_comes_back_as_it_was(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx_lathe.Refused("it differs")

    monkeypatch.setattr(onnx_lathe, "optimize", refuse)
    model = onnx.load(classifier)
    same, ok = onnxsim.simplify(model)
    assert not ok and same.SerializeToString() == model.SerializeToString()
    with pytest.raises(onnx_lathe.Refused):
        onnxslim.slim(model)


def test_a_check_that_fails_is_false(classifier: Path) -> None:
    model = onnx.load(classifier)
    assert onnxsim.simplify(model, input_data={"x": samples(4)})[1]
    # The convolution takes the normalization in, which moves outputs by a rounding.
    assert not onnxsim.simplify(open_model(), check_n=1, check_rtol=1e-12)[1]


def test_outputs_are_those_that_are_chosen(classifier: Path) -> None:
    model = onnx.load(classifier)
    inner = model.graph.node[0].output[0]
    found = onnxslim.slim(model, outputs=[inner])
    assert [output.name for output in found.graph.output] == [inner]
    with pytest.raises(onnx_lathe.UsageError, match="the model has no value `z:fp16`"):
        onnxslim.slim(model, outputs=["z:fp16"])


def test_providers_are_those_of_the_program() -> None:
    assert onnxsim.PROVIDERS["CPUExecutionProvider"] == "cpu"
    assert onnxsim.PROVIDERS["DmlExecutionProvider"] == "directml"
    assert len(onnxsim.PROVIDERS) == len(_native.providers())


UNUSUAL = {
    "skipped_optimizers": ["fuse_bn_into_conv"], "skip_shape_inference": True, "custom_lib": "ops.so",
    "mutable_initializer": True, "initializers_as_constants": False, "extra_optimizers": ["x"],
    "custom_rewriter": print, "function_rewrite_rules": [1], "check_atol": 1.0, "input_fill": "ones",
    "gemm_fusion_backend": "webgpu", "profile": "p.json", "ort_profile": "p", "merge_ort_profile": True,
    "external_data_threshold": "1GB", "inputs": ["x:fp16"], "no_shape_infer": True, "dtype": "fp16",
    "skip_fusion_patterns": ["FusionGelu"], "dump_to_disk": True,
}  # fmt: skip


@pytest.mark.parametrize(("library", "call"), [(onnxsim, onnxsim.simplify), (onnxslim, onnxslim.slim)])
def test_arguments_without_a_counterpart_are_refused(library: object, call: object, classifier: Path) -> None:
    defaults = library.DEFAULTS
    parameters = inspect.signature(call).parameters
    for name in defaults:
        assert parameters[name].default == defaults[name]
        with pytest.raises(onnx_lathe.UsageError, match=f"`{name}` of .* has no counterpart in onnx_lathe"):
            call(classifier, **{name: UNUSUAL[name]})
    for model, options, message in [
        (onnxsim, {"providers": ["AbacusExecutionProvider"]}, "it knows CPUExecutionProvider"),
        (onnxsim, {"providers": [("CUDAExecutionProvider", {})]}, "name the provider alone"),
        (onnxsim, {"overwrite_input_shapes": {"z": [1]}}, "there is no input `z`; the model has x"),
        (onnxsim, {"unused_output": ["z"]}, "there is no output `z`; the model has logits"),
        (onnxsim, {"unused_output": ["logits"]}, "no output would be left"),
        (onnxslim, {"input_shapes": ["x"]}, "`x` is no shape, expected NAME:1,3,224,224"),
        (onnxslim, {"skip_optimizations": ["all"]}, "there is no optimization `all`"),
        (onnxslim, {"model_check_inputs": ["x:a.npy", "y:1,2"]}, "mixes files and shapes"),
    ]:
        if model is library:
            with pytest.raises(onnx_lathe.UsageError, match=message):
                call(classifier, **options)
