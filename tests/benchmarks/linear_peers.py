"""What the benchmark `linear` measures beside int4_linear, each behind one function: weights -> (x -> run).

Every peer gets the same float weights and one of its own INT4 forms, and x in the type that it is fastest with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.numerics import affine
from tests.benchmarks import peers
from tests.benchmarks.timing import Run

#: x [M, K] in float32 -> what multiplies it by the weight of that number.
Product = Callable[[Tensor], Run]
#: Relative error of a product above which a peer computes something else than x @ w.T.
FAR = 0.3


@dataclass(frozen=True)
class Shape:
    """Weights [N, K] in float32, all copies, and how they are grouped."""

    weights: Sequence[Tensor]
    group_size: int

    @property
    def outputs(self) -> int:
        return self.weights[0].shape[0]

    @property
    def columns(self) -> int:
        return self.weights[0].shape[1]

    @cached_property
    def stored(self) -> list[mq.QuantizedWeight]:
        return [mq.quantize_weight_int4(w, self.group_size) for w in self.weights]


@dataclass(frozen=True)
class Peer:
    """One column of the tables.

    Attributes:
        make: prepares the weights; raises where it cannot.
        package: the distribution that computes.
        is_int4: whether the weight is stored in 4 bits.
    """

    make: Callable[[Shape], Product]
    package: str = "torch"
    is_int4: bool = True


def rotate(calls: Sequence[Callable[[], object]]) -> Run:
    """Takes them in turn."""
    return lambda i: calls[i % len(calls)]()


def ours(dtype: torch.dtype, compute: str = "auto") -> Callable[[Shape], Product]:
    def make(shape: Shape) -> Product:
        stored, group_size = shape.stored, shape.group_size

        def product(x: Tensor) -> Run:
            cast = x.to(dtype)
            return lambda i: ops.int4_linear(cast, *stored[i % len(stored)], None, group_size, compute)

        return product

    return make


def plain(dtype: torch.dtype) -> Callable[[Shape], Product]:
    """F.linear."""

    def make(shape: Shape) -> Product:
        weights = [w.to(dtype) for w in shape.weights]

        def product(x: Tensor) -> Run:
            cast = x.to(dtype)
            return lambda i: F.linear(cast, weights[i % len(weights)])

        return product

    return make


def aten(shape: Shape) -> Product:
    """aten._weight_int4pack_mm_for_cpu; bf16 x, with float32 x it is many times slower."""
    group_size = shape.group_size

    def pack(stored: mq.QuantizedWeight) -> tuple[Tensor, Tensor]:
        codes = affine.unpack_int4(stored.weight_packed, shape.columns).int() + 8
        scale = stored.weight_scale.t().bfloat16()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed, torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()

    packed = [pack(stored) for stored in shape.stored]
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu

    def product(x: Tensor) -> Run:
        cast = x.bfloat16()
        return rotate([lambda w=w, s=s: multiply(cast, w, group_size, s) for w, s in packed])

    return product


def onnxruntime(accuracy_level: int) -> Callable[[Shape], Product]:
    """ONNX Runtime's MatMulNBits on our codes (its bytes are the same), one session a weight; float32 x."""

    def make(shape: Shape) -> Product:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # else it disturbs whoever comes next
        sessions = [
            ort.InferenceSession(_onnx_model(stored, shape, accuracy_level), options, ["CPUExecutionProvider"])
            for stored in shape.stored
        ]

        def product(x: Tensor) -> Run:
            feed = {"x": x.numpy()}
            return rotate([lambda s=s: torch.from_numpy(s.run(None, feed)[0]) for s in sessions])

        return product

    return make


def _onnx_model(stored: mq.QuantizedWeight, shape: Shape, accuracy_level: int) -> bytes:
    import onnx
    from onnx import helper, numpy_helper

    n, k, group = shape.outputs, shape.columns, shape.group_size
    codes = stored.weight_packed.view(torch.uint8).view(n, k // group, group // 2).numpy()
    weights = [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(stored.weight_scale.numpy(), "s")]
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
        K=k, N=n, bits=4, block_size=group, accuracy_level=accuracy_level,
    )  # fmt: skip
    x, y = (helper.make_tensor_value_info(a, onnx.TensorProto.FLOAT, ["m", b]) for a, b in (("x", k), ("y", n)))
    model = helper.make_model(
        helper.make_graph([node], "linear", [x], [y], weights),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
    )
    model.ir_version = 9
    return model.SerializeToString()


def converted(convert: Callable[[nn.Module, int], nn.Module]) -> Callable[[Shape], Product]:
    """A package that turns a Sequential of one bf16 Linear, named 0, into its own; bf16 x."""

    def make(shape: Shape) -> Product:
        models = [convert(_bf16_linear(w), shape.group_size).eval() for w in shape.weights]

        def product(x: Tensor) -> Run:
            cast = x.bfloat16()
            return rotate([lambda m=m: m(cast) for m in models])

        return product

    return make


def _bf16_linear(weight: Tensor) -> nn.Module:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    return nn.Sequential(linear)


def _of_accuracy(convert: Any, **options: Any) -> Callable[[nn.Module, int], nn.Module]:
    """A converter of the accuracy benchmark."""

    def call(model: nn.Module, group_size: int) -> nn.Module:
        plan = {"0": mq.QuantScheme(4, group_size)}
        if not convert(model, plan, {"group_size": group_size, **options}):
            raise ValueError("the package leaves this layer float")
        return model

    return call


def bitsandbytes(model: nn.Module, _: int) -> nn.Module:
    """nf4, in the package's own blocks of 64."""
    import bitsandbytes as bnb

    linear = model[0]  # type: ignore[index]
    out = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
    )
    out.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return out.to("cpu")


def torchao_prototype(dynamic: bool) -> Callable[[nn.Module, int], nn.Module]:
    """torchao's INT4 layout for CPUs, float x or INT8 x."""

    def convert(model: nn.Module, group_size: int) -> nn.Module:
        from torchao.prototype.quantization import int4
        from torchao.quantization import quantize_

        config = int4.Int8DynamicActivationInt4WeightConfig if dynamic else int4.PrototypeInt4WeightOnlyConfig
        quantize_(model, config(group_size=group_size, set_inductor_config=False))
        return model

    return convert


FP32, BF16, ATEN = "fp32 F.linear", "bf16 F.linear", "aten int4pack"
PEERS: dict[str, Peer] = {
    FP32: Peer(plain(torch.float32), is_int4=False),
    BF16: Peer(plain(torch.bfloat16), is_int4=False),
    ATEN: Peer(aten),
    "ORT level 0": Peer(onnxruntime(0), "onnxruntime"),
    "ORT level 4": Peer(onnxruntime(4), "onnxruntime"),
    "quanto": Peer(converted(_of_accuracy(peers.quanto)), "optimum-quanto"),
    "bnb nf4": Peer(converted(bitsandbytes), "bitsandbytes"),
    "torchao int4": Peer(converted(torchao_prototype(False)), "torchao"),
    "torchao da8w4": Peer(converted(torchao_prototype(True)), "torchao"),
    "torchao 8da4w": Peer(converted(_of_accuracy(peers.torchao, method="8da4w", symmetric=True)), "torchao"),
}


def prepare(peer: Callable[[Shape], Product], shape: Shape) -> Product:
    """What `peer` makes of the weights, tried on one row.

    Raises:
        ValueError: the result is far from the float one. Whatever the package raises where it is missing or fails.
    """
    product = peer(shape)
    x = torch.randn(1, shape.columns)
    exact = F.linear(x, shape.weights[0])
    found: Any = product(x)(0)
    error = float((found.float() - exact).norm() / exact.norm())
    if not error < FAR:
        raise ValueError(f"computes something else: relative error {error:.2f}")
    return product
