"""Probes: what else a trial may measure once, at its end.

class_error    {"0": 0.02, "1": 0.11, ...}             error of each class
branch_ratio   {"layer1.0": 0.8, "layer1.1": 0.4}      variance of branch over shortcut, of each residual sum
"""

import torch
from torch import Tensor, fx, nn

from study.errors import ModelError
from study.training.places import residual_sums
from study.training.symbolic import trace_module


def probe(name: str, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """What one probe finds on a model in eval mode, by key.

    Args:
        name: `class_error` or `branch_ratio`.
        images: [num_images, ...].
        labels: [num_images].
    """
    return PROBES[name](model, images, labels)


def class_error(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of each class's images that are misclassified."""
    wrong = (model(images).argmax(1) != labels).float()
    return {str(int(label)): float(wrong[labels == label].mean()) for label in torch.unique(labels)}


def branch_ratio(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Variance of branch over variance of shortcut at every residual sum, by the block that the sum stands in.

    Source: Kim et al., Guidelines for the Regularization of Gammas in Batch Normalization for Deep Residual Networks,
    arXiv:2205.07260 (variance control); the ratio is our reading of it.

    Raises:
        ModelError: if the computation cannot be read symbolically.
    """
    try:
        recorder = _SumRecorder(model)
    except Exception as error:  # torch.fx raises many types, and the user's own forward any
        raise ModelError(f"branch_ratio needs a model that torch.fx can trace ({error})", where="probes", remedy="remove the probe") from error
    recorder.run(images)
    return recorder.ratios


class _SumRecorder(fx.Interpreter):
    """Runs a traced model and keeps the ratio of variances at each of its residual sums."""

    def __init__(self, model: nn.Module) -> None:
        traced, graph = trace_module(model)
        super().__init__(traced)
        steps = list(traced.graph.nodes)
        self._sums = {steps[found.sum]: (steps[found.branch], steps[found.shortcut]) for found in residual_sums(graph)}
        self.ratios: dict[str, float] = {}

    def run_node(self, node: fx.Node) -> object:
        """Runs one step; at a residual sum, compares its addends first."""
        if node in self._sums:
            branch, shortcut = (self.env[addend] for addend in self._sums[node])
            self.ratios[self._key(node)] = float(branch.var() / shortcut.var())
        return super().run_node(node)

    def _key(self, node: fx.Node) -> str:
        """The module whose forward holds the sum; its second sum is numbered 1."""
        block = next(reversed(node.meta.get("nn_module_stack", {"model": None})))
        return block if block not in self.ratios else f"{block}.{sum(key.startswith(block) for key in self.ratios)}"


PROBES = {"class_error": class_error, "branch_ratio": branch_ratio}
