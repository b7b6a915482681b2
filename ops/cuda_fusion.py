"""What compiled steps are told to put together on an NVIDIA GPU: norms, biases and residuals become parts of the
matrices beside them (`fused.fused_linear`), so that between two matrices there is nothing else.

A norm between two matrices, x / rms(x) * gain, is a kernel of one program for each row, for which the rest of a card
waits. Here the gain is multiplied where x is made, by the matrix before, and the root mean square divides where the
matrix behind ends: each of its programs works it out again, while others read weights. What is multiplied is then
x * gain, rounded as exactly as the norm would be in bfloat16; in float16 it could overflow, and a norm stays a norm.

The model says nothing of this: a pass over the compiler's graph, of PyTorch's simplest operators, finds it.
"""
import functools

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ops import EXPERT_ROWS
from ops.cuda_linear import MOST_ROWS

aten, ours, convert = torch.ops.aten, torch.ops.readonce, torch.ops.prims.convert_element_type.default
FUSED, SELECT, ADD, MUL = ours.fused_linear.default, aten.select.int, aten.add.Tensor, aten.mul.Tensor
NAMES = [argument.name for argument in FUSED._schema.arguments]


def norm() -> CallFunction:
    """What becomes of `layers.RMSNorm` in bfloat16."""
    wide = CallFunction(convert, KeywordArg("x"), torch.float32, _users=2)
    mean = CallFunction(aten.mean.dim, CallFunction(aten.pow.Tensor_Scalar, wide, 2), [-1], True)
    rate = CallFunction(aten.rsqrt.default, CallFunction(ADD, mean, KeywordArg("eps")))
    gain = CallFunction(ADD, KeywordArg("gain"), KeywordArg("offset"), _users=MULTIPLE)
    return CallFunction(convert, CallFunction(MUL, CallFunction(MUL, wide, rate), gain), torch.bfloat16)


NORM = norm()


class Fusion(CustomGraphPass):
    """Changes a graph; all that it puts in is fake like the rest (`meta["val"]`)."""

    def uuid(self) -> object:
        return get_hash_for_files((__file__,))

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if arguments := as_fused(node):
                with graph.inserting_before(node):
                    replace(node, call(graph, SELECT, call(graph, FUSED, *arguments), 0, 0))
            elif node.target == FUSED and is_view(view := node.args[0]) and argument(node, "chosen") is not None:
                change(node, x=view.args[0])  # which takes rows in any shape
                if not view.users:
                    graph.erase_node(view)
        gains = {}
        for node in graph.find_nodes(op="call_function", target=convert):
            divide_behind(graph, node, gains)
        for node in graph.find_nodes(op="call_function", target=ADD):
            add_within(graph, node, gains)


def call(graph: fx.Graph, target: torch._ops.OpOverload, *arguments) -> fx.Node:
    node = graph.call_function(target, arguments)
    set_value(node)
    return node


def set_value(node: fx.Node) -> None:
    node.meta["val"] = node.target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args))


def replace(node: fx.Node, other: fx.Node) -> None:
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def change(node: fx.Node, **arguments) -> None:
    """Give a FUSED other arguments."""
    node.args = tuple(arguments.get(name, old) for name, old in zip(NAMES, node.args, strict=True))
    set_value(node)


def argument(node: fx.Node, name: str) -> object:
    """What a FUSED is given."""
    return node.args[NAMES.index(name)]


def is_view(node: fx.Node) -> bool:
    """Whether the same rows come in another shape."""
    same = node.target in (aten.reshape.default, aten.view.default)
    return same and node.args[0].meta["val"].shape[-1] == node.meta["val"].shape[-1]


def few(shape: torch.Size, most: int = MOST_ROWS) -> bool:
    return statically_known_true(shape[:-1].numel() <= most)


def as_fused(node: fx.Node) -> list | None:
    """FUSED's arguments for a product of few rows and one matrix; None: it is no such product."""
    if node.target == ours.linear16.default:
        (x, weight, chosen), scale = node.args, None
    elif node.target == ours.quantized_linear.default:
        (x, weight, scale), chosen = node.args, None
    else:
        return None
    one = chosen is None and few(node.meta["val"].shape)
    return [x, weight, scale, None, None, None, 0.0, None, None, None, 0.0] if one else None


def takes_norm(user: fx.Node, normed: fx.Node) -> bool:
    """Whether a FUSED, of few rows, can divide its products by what x was to be divided by."""
    if user.target != FUSED or user.args[0] != normed:
        return False
    return few(user.meta["val"].shape, MOST_ROWS if argument(user, "chosen") is None else EXPERT_ROWS)


def divide_behind(graph: fx.Graph, normed: fx.Node, gains: dict[fx.Node, tuple]) -> None:
    """If this is a norm, and only matrices take it, they take x * gain and divide by rms(x). In `gains` is kept how x
    is multiplied."""
    match = NORM.match(normed)
    if not match or not all(takes_norm(user, normed) for user in normed.users):
        return
    x, eps, gain, offset = (match.kwargs[name] for name in ("x", "eps", "gain", "offset"))
    with graph.inserting_before(normed):
        factor, wide = call(graph, ADD, gain, offset), call(graph, convert, x, torch.float32)
        scaled = call(graph, convert, call(graph, MUL, wide, factor), torch.bfloat16)
    for user in list(normed.users):
        change(user, x=scaled, rms_of=x, eps=eps)
    match.erase_nodes()
    if x.target == SELECT and x.meta["val"].numel() == x.args[0].meta["val"].numel():
        x = x.args[0]  # the last of one token
    gains[x] = scaled, gain, offset


def add_within(graph: fx.Graph, total: fx.Node, gains: dict[fx.Node, tuple]) -> None:
    """If this adds a bias or a residual to a product, the product's kernel adds it, and multiplies the sum by the gain
    of a norm that takes it."""
    for product, other in () if total.kwargs else (total.args, total.args[::-1]):
        if name := part_of_kernel(product, other):
            break
    else:
        return
    kernel = product.args[0]
    total.prepend(kernel), total.prepend(product)  # where all that it takes is known
    change(kernel, **{name: other.args[0] if other.target == convert and name == "bias" else other})
    replace(total, product)
    if total in gains and gains[total][1].op == "placeholder":
        scaled, gain, offset = gains[total]
        change(kernel, gain=gain, offset=offset)
        with graph.inserting_before(scaled):
            both = call(graph, SELECT, kernel, 0, 1)
            replace(scaled, call(graph, aten.view.default, both, list(scaled.meta["val"].shape)))


def part_of_kernel(product: fx.Node, other: fx.Node) -> str | None:
    """As what the kernel that makes `product`, if one does and only for this, can add something else."""
    if not (isinstance(product, fx.Node) and isinstance(other, fx.Node)) or product.target != SELECT:
        return None
    kernel = product.args[0]
    if kernel.target != FUSED or len(kernel.users) > 1 or len(product.users) > 1:
        return None
    have, value, shape = functools.partial(argument, kernel), other.meta["val"], product.meta["val"].shape
    if have("chosen") is not None or have("residual") is not None:
        return None
    if value.shape == shape:
        return "residual" if value.dtype == product.meta["val"].dtype and few(shape) else None
    return "bias" if have("bias") is have("activation") is None and value.shape == shape[-1:] else None
