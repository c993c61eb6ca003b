"""The libraries that tests hold ours against, where they are installed."""

from types import ModuleType

import pytest
import torch

MISSING_OPERATORS = ("nms", "qnms")
"""What torchvision's Python code asks for while it is imported, and finds only beside the torch that its wheel was built for."""

_stubs: list[object] = []


def library(name: str) -> ModuleType:
    """Imports a library, or skips the test with the reason why it cannot.

    The torchvision wheel of the package index is built for the CUDA torch. Beside a CPU torch its operators are missing; they are
    declared here, without code behind them, so that what needs none of them (timm, transformers) can still be imported.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        stub = torch.library.Library("torchvision", "FRAGMENT")
        for operator in MISSING_OPERATORS:
            stub.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _stubs.append(stub)
    except ImportError:
        pass
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install {name.partition('.')[0]}")
