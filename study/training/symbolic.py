"""Symbolic: reads a forward pass without data, where it does not depend on values.

torch.fx runs the model on stand-ins. Modules of torch that stand for one operation are taken as such; every other module is
read line by line, so that nothing with parameters stays a closed box.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from study.training import operations
from study.training.graph import Builder, Graph, Ref
from study.training.normalizations import with_written_norms
from study.training.owners import gain_of_weight_norm, parameter_names


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if operations.of_module(module):
            return True
        return super().is_leaf_module(module, name) and (isinstance(module, nn.PReLU) or next(module.parameters(), None) is None)


def trace(model: nn.Module) -> Graph:
    """Reads the computation of a model symbolically, without running it on data.

    Raises:
        Exception: whatever torch.fx raises on a forward pass that depends on values; the caller decides what that means.
    """
    return trace_module(model)[1]


def trace_module(model: nn.Module) -> tuple[fx.GraphModule, Graph]:
    """Like `trace`, beside the traced module itself; its graph has one node for each of ours, in the same order."""
    with _unchanged(model):
        traced = _Tracer().trace(model)
    builder, indices, names = Builder(), dict[fx.Node, int](), parameter_names(model)
    for step in traced.nodes:
        indices[step] = _add(step, builder, indices, model, names)
    return fx.GraphModule(model, traced), with_written_norms(builder.graph())


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Takes back what a forward pass writes into a model's attributes: while it is traced, stand-ins for tensors."""
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _add(step: fx.Node, builder: Builder, indices: Mapping[fx.Node, int], model: nn.Module, names: Mapping[int, str]) -> int:
    inputs = [indices[before] for before in step.all_input_nodes]
    match step.op:
        case "placeholder":
            return builder.input()
        case "output":
            return builder.output(inputs)
        case "get_attr":
            name = names.get(id(_attribute(model, str(step.target))))
            return builder.parameter(name) if name else builder.constant()
        case "call_module":
            return _of_module(str(step.target), inputs, builder, model, names)
    op = operations.of_function(step.target)
    args, kwargs = _refs(step.args, indices), _refs(step.kwargs, indices)
    if op == "getattr":
        op, args = str(step.args[1]), args[:1]
    return builder.call(op, args, kwargs) if inputs else builder.constant()


def _refs(value: Any, indices: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return Ref(indices[value])
    if isinstance(value, Mapping):
        return {key: _refs(item, indices) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_refs(item, indices) for item in value)
    return value


def _of_module(path: str, inputs: list[int], builder: Builder, model: nn.Module, names: Mapping[int, str]) -> int:
    module = model.get_submodule(path)
    op = operations.of_module(module)
    own = {name: names[id(value)] for name, value in module.named_parameters(recurse=False)}
    gain = gain_of_weight_norm(module)
    if gain is not None:
        steps: Any = module.parametrizations
        own["weight"] = names[id(steps["weight"].original1)]
    return builder.layer(op or type(module).__name__, inputs, names=own, gain=names[id(gain)] if gain is not None else "")


def _attribute(model: nn.Module, path: str) -> object:
    value: object = model
    for part in path.split("."):
        value = getattr(value, part)
    return value
