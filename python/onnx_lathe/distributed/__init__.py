"""Runs models on several machines, or in several processes of this one.

    import onnx_lathe
    from onnx_lathe.distributed import Ray

    with Ray(store="/shared/store") as cluster:
        onnx_lathe.optimize("model.onnx", "out.onnx", calib="calib.npz", size=0.3, on=cluster, store=cluster.store)

A task is a request to a worker process as bytes, its outcome is what a worker process writes for it. Paths travel in
tasks, weights never: every machine sees the same files under the same paths. Tasks write nothing but files that are put in
place whole, so that one may be carried out again. Whatever has ``workers`` and ``map`` serves: see :class:`Executor`.

The program starts this package for ``--on ray``. It needs nothing but Python, and Ray where that is asked for.
"""

from ._futures import Futures
from ._process import sentence
from ._ray import Ray
from ._server import Executor, Server, served

__all__ = ["Executor", "Futures", "Ray", "Server", "sentence", "served"]
