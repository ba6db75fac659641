"""Exports the backend cases of the installed onnx package for tests/backend.rs.

    export_cases.py FOLDER

Every case becomes FOLDER/KIND/NAME with model.onnx and data_0.onnx, data_1.onnx, ...: models whose initializers are
the inputs and expected outputs, so that no second reader of tensors is needed. `input.2` is the tensor for the third
input, `input.2.length` with `input.2.0`, `input.2.1`, ... a sequence, `input.2.none` an absent optional; outputs alike.
"""

import pathlib
import shutil
import sys
import warnings

import numpy as np
import onnx
import onnx.backend.test
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases

DATA = pathlib.Path(onnx.backend.test.__file__).parent / "data"


def tensors(name, value):
    """The initializers that stand for one value."""
    if value is None:
        yield numpy_helper.from_array(np.zeros(0, np.int64), f"{name}.none")
    elif isinstance(value, (list, tuple)):
        yield numpy_helper.from_array(np.array([len(value)], np.int64), f"{name}.length")
        for index, member in enumerate(value):
            yield from tensors(f"{name}.{index}", member)
    elif isinstance(value, TensorProto):
        tensor = TensorProto()
        tensor.CopyFrom(value)
        tensor.name = name
        yield tensor
    else:
        yield numpy_helper.from_array(np.asarray(value), name)


def write_data(path, inputs, outputs):
    """Writes one set of inputs and expected outputs."""
    stored = [t for index, value in enumerate(inputs) for t in tensors(f"input.{index}", value)]
    stored += [t for index, value in enumerate(outputs) for t in tensors(f"output.{index}", value)]
    graph = helper.make_graph([], "data", [], [], initializer=stored)
    path.write_bytes(helper.make_model(graph).SerializeToString())


def load(path, type_proto):
    """A stored value of the given type."""
    data = path.read_bytes()
    if type_proto.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if type_proto.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return TensorProto.FromString(data)


def export_stored(kind, folder, out):
    """Exports a case that the package holds as files."""
    out.mkdir(parents=True)
    shutil.copy(folder / "model.onnx", out / "model.onnx")
    model = onnx.load(folder / "model.onnx")
    stored = {i.name for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in stored]
    for number, data in enumerate(sorted(folder.glob("test_data_set_*"))):
        given = [load(data / f"input_{i}.pb", inputs[i].type) for i in range(len(list(data.glob("input_*.pb"))))]
        outputs = range(len(list(data.glob("output_*.pb"))))
        expected = [load(data / f"output_{i}.pb", model.graph.output[i].type) for i in outputs]
        write_data(out / f"data_{number}.onnx", given, expected)


def export_light(path, out):
    """Exports a model whose weights are made at run time; its input counts up from 0 to 1, as in onnx's own runner."""
    out.mkdir(parents=True)
    shutil.copy(path, out / "model.onnx")
    model = onnx.load(path)
    stored = {i.name for i in model.graph.initializer}
    given = []
    for value in model.graph.input:
        if value.name not in stored:
            dims = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
            count = np.prod(dims)
            given.append((np.arange(count).reshape(dims) / count).astype(np.float32))
    expected = TensorProto.FromString((path.parent / f"{path.stem}_output_0.pb").read_bytes())
    write_data(out / "data_0.onnx", given, [expected])


def main(target):
    warnings.simplefilter("ignore")
    cases = [case for case in collect_testcases() if case.model is not None and case.data_sets]
    for case in cases:
        folder = target / "node" / case.name
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(case.model.SerializeToString())
        for number, (inputs, outputs) in enumerate(case.data_sets):
            write_data(folder / f"data_{number}.onnx", inputs, outputs)
    count = len(cases)
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for folder in sorted(p for p in (DATA / kind).iterdir() if (p / "model.onnx").exists()):
            export_stored(kind, folder, target / kind / folder.name)
            count += 1
    for path in sorted((DATA / "light").glob("*.onnx")):
        export_light(path, target / "light" / path.stem)
        count += 1
    print(f"{count} backend cases of onnx {onnx.__version__} in {target}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
