"""Graphs in lower precision: what is named goes down, all else stays as it was."""

from typing import Any

import numpy as np
import pytest

from utils.run.precision import SCOPES, products_within, to_float16, to_int8

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
SHAPES = {
    "first": (4, 3, 3, 3), "deep": (4, 1, 3, 3), "dense": (6, 4, 1, 1), "joined": (6, 6, 1, 1), "after": (2, 6, 1, 1),
}  # fmt: skip


def model() -> Any:
    """image (B, 8, 8, 3) -> convolutions first, deep (depthwise), dense and, after a sum of two branches, joined in
    `net`, `after` and a square outside."""
    rng, make = np.random.default_rng(0), onnx.helper
    values = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in SHAPES.items()}
    values["bound"] = np.float32(3.4e38)  # no bound at all
    nodes = [
        make.make_node("Cast", ["image"], ["whole"], "cast", to=onnx.TensorProto.FLOAT),
        make.make_node("Div", ["whole", "scale"], ["level"], "div"),
        make.make_node("Transpose", ["level"], ["x0"], "turn", perm=[0, 3, 1, 2]),
    ]
    flow = "x0"
    for name in SHAPES:
        groups = 4 if name == "deep" else 1
        nodes.append(make.make_node("Conv", [flow, name], [f"{name}_out"], name, group=groups))
        flow = f"{name}_out"
        if name == "dense":
            nodes.append(make.make_node("Clip", [flow, "", "bound"], ["clipped"], "clip"))
            nodes.append(make.make_node("Add", ["clipped", f"{name}_out"], ["sum"], "sum"))
            flow = "sum"
    nodes.append(make.make_node("Mul", [flow, flow], ["score"], "square"))
    for node in nodes:
        inside = node.name in ("first", "deep", "dense", "clip", "sum", "joined")
        entry = node.metadata_props.add()
        entry.key, entry.value = SCOPES, str(["", "net.layer" if inside else "network", node.name])
    values["scale"] = np.float32(255)
    graph = make.make_graph(
        nodes, "test",
        [make.make_tensor_value_info("image", onnx.TensorProto.UINT8, ["batch", 8, 8, 3])],
        [make.make_tensor_value_info("score", onnx.TensorProto.FLOAT, ["batch", 2, 4, 4])],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in values.items()],
    )  # fmt: skip
    made = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


IMAGES = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def scores(made: Any) -> np.ndarray:
    session = runtime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["score"], {"image": IMAGES})[0]


def test_half_precision_where_it_is_named() -> None:
    plain = model()
    before, expected = plain.SerializeToString(), scores(plain)
    half = to_float16(plain, ["net"])
    assert plain.SerializeToString() == before, "the original is left alone"
    onnx.checker.check_model(half, full_check=True)
    kinds = {w.name: w.data_type for w in half.graph.initializer}
    low = {"first_half", "deep_half", "dense_half", "joined_half", "bound_half"}
    assert {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT16} == low
    assert set(kinds) == low | {"after", "scale"}
    casts = [node for node in half.graph.node if node.op_type == "Cast" and node.name != "cast"]
    assert [list(node.input) for node in casts] == [["x0"], ["joined_out"]]
    found = scores(half)
    assert 0 < np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()


def test_integers_for_dense_products_but_the_first() -> None:
    plain = model()
    assert products_within(plain.graph, ["net"]) == ["dense"]
    expected = scores(plain)
    small = to_int8(plain, ["net"], [IMAGES[:2], IMAGES[2:]])
    weights = {w.name: w.data_type for w in small.graph.initializer}
    assert [n for n, kind in weights.items() if kind == onnx.TensorProto.INT8 and "zero" not in n] == [
        "dense_quantized"
    ]
    found = scores(small)
    assert 0 < np.abs(found - expected).max() < 5e-2 * np.abs(expected).max()
