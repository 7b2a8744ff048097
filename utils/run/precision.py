"""An ONNX graph in lower precision: products in half precision or in 8-bit integers, all else as it was.

Only what lies in modules of certain names goes down; PyTorch's exporter writes beside every node where it lies.
Distances, densities and decisions are small differences of large numbers and stay in float32. (The converters of
onnxruntime and onnxconverter-common round at every node that is to be left alone, so that nothing is gained by it.)
"""

from __future__ import annotations

import ast
import copy
import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # (B, S, S, 3), RGB
SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules that it lies in, outermost first, and itself
HALF = (  # what loses nothing but digits in half precision; sums, squares and exponentials may overflow
    "Add", "AveragePool", "Clip", "Concat", "Conv", "Gemm", "MatMul", "MaxPool", "Relu", "Sigmoid", "Tanh",
)  # fmt: skip
LARGEST = np.finfo(np.float16).max  # also of bounds that mean "none"


def nodes_within(graph: Any, modules: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """Names of an ONNX graph's nodes of these `kinds` that lie in one of `modules` (dotted names)."""

    def inside(node: Any) -> bool:
        said = next((p.value for p in node.metadata_props if p.key == SCOPES), "[]")
        return any(scope == m or scope.startswith(m + ".") for scope in ast.literal_eval(said) for m in modules)

    return [node.name for node in graph.node if node.op_type in kinds and inside(node)]


class Halves:
    """Rewrites a graph so that some nodes compute in half precision: their weights are stored so, and what passes
    between them and the others is cast once."""

    def __init__(self, graph: Any, floats: Iterable[str], low: Iterable[str]) -> None:
        import onnx

        self.onnx, self.graph, self.low = onnx, graph, set(low)
        self.weights = {w.name: w for w in graph.initializer}
        self.half = dict.fromkeys(floats, False)  # of tensors that were float32: whether they are half now
        self.made: dict[str, str] = {}  # tensors in the other precision
        self.nodes: list[Any] = []

    def rewrite(self) -> None:
        """Change the graph."""
        for node in self.graph.node:
            low = node.name in self.low
            for i, name in enumerate(node.input):
                if self.half.get(name, low) != low:
                    node.input[i] = self.other(name)
            self.half.update((name, low) for name in node.output if name in self.half)
            self.nodes.append(node)
        used = {name for node in self.nodes for name in node.input}
        kept = [w for name, w in self.weights.items() if name in used]
        for field, values in (
            (self.graph.node, self.nodes),
            (self.graph.initializer, kept),
            (self.graph.value_info, []),
        ):
            del field[:]
            field.extend(values)

    def other(self, name: str) -> str:
        """The name of a tensor in the other precision."""
        if name not in self.made:
            new = self.made[name] = f"{name}_{'float' if self.half[name] else 'half'}"
            if name in self.weights:
                value = self.onnx.numpy_helper.to_array(self.weights[name]).clip(-LARGEST, LARGEST).astype(np.float16)
                self.weights[new] = self.onnx.numpy_helper.from_array(value, new)
            else:
                kind = self.onnx.TensorProto.FLOAT if self.half[name] else self.onnx.TensorProto.FLOAT16
                self.nodes.append(self.onnx.helper.make_node("Cast", [name], [new], name=f"cast_{new}", to=kind))
        return self.made[name]


def to_float16(model: Any, modules: Sequence[str]) -> Any:
    """A copy of an ONNX model whose `modules` compute their products in half precision."""
    import onnx

    model = copy.deepcopy(model)
    graph = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    kinds |= {w.name: w.data_type for w in graph.initializer}
    floats = [name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT]
    Halves(model.graph, floats, nodes_within(model.graph, modules, HALF)).rewrite()
    return model


def products_within(graph: Any, modules: Sequence[str]) -> list[str]:
    """Names of the nodes in `modules` whose products keep their meaning in 8 bits: of dense weights, but not the first,
    and not of a sum of two branches.

    Depthwise convolutions and the one that sees the image are cheap, and cost most of the accuracy; OpenVINO computes
    wrongly what follows such a sum in integers (BENCHMARKS.md).
    """
    weights = {w.name: w.dims for w in graph.initializer}
    sums = {n.output[0] for n in graph.node if n.op_type == "Add" and not weights.keys() & {*n.input}}
    names = set(nodes_within(graph, modules, ("Conv", "Gemm", "MatMul")))
    dense = [n for n in graph.node if n.name in names and n.input[1] in weights]
    single = [n for n in dense[1:] if n.input[0] not in sums]
    return [n.name for n in single if n.op_type != "Conv" or weights[n.input[1]][1] > 1]


def to_int8(model: Any, modules: Sequence[str], batches: Sequence[Images]) -> Any:
    """A copy of an ONNX model whose `modules` compute their products in 8-bit integers (QDQ).

    Args:
        batches: images (B, S, S, 3), whose activations say what ranges the integers must hold.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        left = iter(batches)

        def get_next(self) -> dict[str, Images] | None:  # type: ignore[override]
            return next(({"image": batch} for batch in self.left), None)

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises a preparation that this graph has had
    try:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "model.onnx"
            quantize_static(
                copy.deepcopy(model), target, Reader(), per_channel=True,
                nodes_to_quantize=products_within(model.graph, modules),
            )  # fmt: skip
            return onnx.load(target)
    finally:
        logging.disable(level)
