"""Stand-ins for other optimizers: their calls, this program's work.

Arguments that have a counterpart here do what they did; others raise :class:`onnx_lathe.UsageError` rather than be
ignored. Every result runs beside the original, whatever was asked for.
"""
