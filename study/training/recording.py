"""Recording: reads a forward pass from a run on an example, whatever Python decides along the way.

    model(*example)  ──every torch function──>  Builder        tensors are followed by identity

The run changes nothing: generators, buffers, modes and gradients are as before. It is made in eval mode, where nothing is
dropped, and in train mode, where hand-written batch statistics are taken; the reading with more norms counts.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from study.errors import ModelError
from study.training import operations
from study.training.graph import Builder, Graph, Ref
from study.training.normalizations import with_written_norms
from study.training.owners import parameter_names

Example = tuple[Any, ...] | Mapping[str, Any]
"""Inputs of a model: positional ones, or keyword ones by name."""


class Unreadable(Exception):
    """A tensor whose origin was not seen."""


def record(model: nn.Module, example: Example) -> Graph:
    """Reads the computation of a model from a run on an example.

    Raises:
        ModelError: if the model does not run on the example.
        Unreadable: if an operation stays unseen: compiled code, a custom autograd Function.
    """
    evaluated = _recorded(model, example, training=False)
    try:
        trained = _recorded(model, example, training=True)
    except (ModelError, Unreadable):  # a batch norm refuses an example of one value per channel
        return evaluated
    return trained if _gains(trained) > _gains(evaluated) else evaluated


def _gains(graph: Graph) -> int:
    return len({node.gain for node in graph.nodes if node.is_norm} - {""})


def inputs_of(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of an example.

    Raises:
        ModelError: if it is neither a tuple nor a mapping.
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise ModelError(
        f"must be a tuple of inputs, or a dict of keyword inputs (got {type(example).__name__})", where="example", remedy="write (images,)"
    )


@contextmanager
def unchanged(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Lets a model run in a mode, and puts modes, buffers and random generators back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, value, value.detach().clone()) for module in model.modules() for name, value in module._buffers.items() if value is not None
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            model.train(training)
            yield
    finally:
        random.setstate(state)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, value, before in buffers:
                if not torch.equal(value, before):
                    value.copy_(before)
                module._buffers[name] = value


@contextmanager
def _all_differentiable(model: nn.Module) -> Iterator[None]:
    """Makes every tensor carry its history, so that one whose origin was not seen is noticed."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad and parameter.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _recorded(model: nn.Module, example: Example, *, training: bool) -> Graph:
    args, kwargs = inputs_of(example)
    recorder = _Recorder(model)
    with unchanged(model, training=training), _all_differentiable(model):
        args, kwargs = recorder.inputs(args), recorder.inputs(kwargs)
        try:
            with recorder:
                outputs = model(*args, **kwargs)
        except Unreadable:
            raise
        except Exception as error:  # the user's own forward raises any type
            raise ModelError(
                f"the model does not run on it: {type(error).__name__}: {error}".splitlines()[0],
                where="example",
                remedy="give inputs as the model takes them: a tuple, or a dict of keyword inputs",
            ) from error
        return recorder.finish(outputs)


class _Recorder(TorchFunctionMode):
    """Follows each tensor by identity, and keeps it alive so that no other takes its identity."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._builder = Builder()
        self._names = parameter_names(model)
        self._known: dict[int, tuple[Tensor, int]] = {}

    def inputs(self, value: Any) -> Any:
        """A copy of an example whose tensors are known as inputs."""
        if isinstance(value, Tensor):
            discrete = not value.is_floating_point()
            copy = value.detach().clone() if discrete else value.detach().clone().requires_grad_().clone()
            self._known[id(copy)] = (copy, self._builder.input(discrete=discrete))
            return copy
        if isinstance(value, Mapping):
            return {key: self.inputs(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.inputs(item) for item in value)
        return value

    def finish(self, outputs: object) -> Graph:
        """The graph, once the model has returned."""
        found = [self._index(tensor) for tensor in tensors_in(outputs)]
        if not found:
            raise Unreadable(f"the model returns no tensors, but {type(outputs).__name__}")
        self._builder.output([index for index in found if index is not None])
        return with_written_norms(self._builder.graph())

    def __torch_function__(self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        refs, named = self._refs(args), self._refs(kwargs)
        before = [(tensor, tensor._version) for tensor in tensors_in((args, kwargs)) if not tensor.is_inference()]
        result = func(*args, **kwargs)
        op = operations.of_function(func)
        changed = [tensor for tensor, version in before if tensor._version != version]
        returned = list(tensors_in(result)) if isinstance(result, Tensor | tuple | list) else []
        if (returned or changed) and any(_has_ref(value) for value in (*refs, *named.values())):
            self._note(op, refs, named, result, changed)
        return result

    def _note(self, op: str, refs: tuple[Any, ...], named: dict[str, Any], result: Any, changed: list[Tensor]) -> None:
        if op in operations.CREATING:
            return
        discrete = isinstance(result, Tensor) and not _is_floating(result)
        index = self._builder.call(op, refs, named, discrete=discrete)
        if isinstance(result, Tensor):
            self._learn(result, index)
        elif isinstance(result, tuple | list):
            for position, item in enumerate(result):
                if isinstance(item, Tensor):
                    self._learn(item, self._builder.call("getitem", (Ref(index), position), {}, discrete=not _is_floating(item)))
        for tensor in changed if op not in operations.NORMS else ():  # batch norms update their buffers
            self._learn(tensor, index)
            if tensor._base is not None:
                self._learn(tensor._base, self._builder.call("setitem", (*self._refs((tensor._base,)), Ref(index)), {}))

    def _learn(self, tensor: Tensor, index: int) -> None:
        if id(tensor) not in self._names:
            self._known[id(tensor)] = (tensor, index)

    def _refs(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            index = self._index(value)
            return None if index is None else Ref(index)
        if isinstance(value, Mapping):
            return {key: self._refs(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return tuple(self._refs(item) for item in value)
        return value

    def _index(self, tensor: Tensor) -> int | None:
        known = self._known.get(id(tensor))
        if known is not None:
            return known[1]
        if id(tensor) in self._names:
            index = self._builder.parameter(self._names[id(tensor)])
            self._known[id(tensor)] = (tensor, index)
            return index
        if tensor.grad_fn is not None:
            raise Unreadable(
                f"an operation was not seen that made a tensor of shape {list(tensor.shape)}: compiled code, or a custom autograd Function"
            )
        return None


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _has_ref(value: Any) -> bool:
    return isinstance(value, Ref) or (isinstance(value, tuple) and any(map(_has_ref, value)))


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        yield from tensors_in(vars(value))
