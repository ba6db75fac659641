"""Writes `schemas.txt`: which element types the parameters of every operator take, by version.

Run with a Python that has onnx and onnxruntime: `python analysis/schemas.py > analysis/schemas.txt`.
One line is `DOMAIN NAME SINCE INPUTS OUTPUTS VARIABLES`, where `-` is an empty field. A parameter is a variable, `=` and a
type, or `?` where it is no tensor; `*` before it repeats it, `~` repeats it with types of their own. A variable is
`NAME=TYPES`, with a letter per element type (`a` is number 1, as ONNX numbers them) and `?` for what is no tensor.
"""

import onnx
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

OLDEST = 7


def letter(text):
    if not text.startswith("tensor("):
        return "?"
    name = text[len("tensor(") : -1].upper()
    return chr(96 + onnx.TensorProto.DataType.Value("FLOAT" if name == "FLOAT" else name))


def parameters(formal, variables, variadic):
    out = []
    for p in formal:
        # The two packages spell the fields differently.
        stated = getattr(p, "type_str", None) or p.typeStr
        if stated in variables:
            text = stated
        else:
            text = letter(stated)
            text = text if text == "?" else "=" + text
        if p.option == variadic:
            same = getattr(p, "is_homogeneous", getattr(p, "isHomogeneous", True))
            text = ("*" if same else "~") + text
        out.append(text)
    return ",".join(out) or "-"


def line(schema, variadic):
    variables = {c.type_param_str: "".join(sorted({letter(t) for t in c.allowed_type_strs})) for c in schema.type_constraints}
    names = ";".join(f"{name}={types}" for name, types in sorted(variables.items())) or "-"
    return " ".join(
        [
            schema.domain or "-",
            schema.name,
            str(schema.since_version),
            parameters(schema.inputs, variables, variadic),
            parameters(schema.outputs, variables, variadic),
            names,
        ]
    )


rows = {}
for schema in onnx.defs.get_all_schemas_with_history():
    if schema.domain == "":
        rows.setdefault(("", schema.name), {})[schema.since_version] = schema
lines = []
for (_, name), versions in rows.items():
    newest_old = max((v for v in versions if v <= OLDEST), default=0)
    for since, schema in versions.items():
        if since >= newest_old and not schema.deprecated:
            lines.append(line(schema, onnx.defs.OpSchema.FormalParameterOption.Variadic))
for schema in runtime.get_all_operator_schema():
    # The runtime puts some of its own into the standard domain.
    if schema.domain == "com.microsoft" or (schema.domain == "" and ("", schema.name) not in rows):
        lines.append(line(schema, runtime.schemadef.OpSchema.FormalParameterOption.Variadic))
print("\n".join(sorted(set(lines), key=lambda l: (l.split()[0], l.split()[1], int(l.split()[2])))))
