"""Operations: what torch's functions and modules do to scale, by torch's own names for them.

shaping     the same values in another shape or dtype              reshape, permute, to
carrying    the input up to shape and a factor                     dropout, average pooling, a mean
homogeneous scaling the input by c > 0 scales the output by c      relu, max pooling
norm        scaling the input leaves the output as it is           layer_norm, batch_norm, ...
weight      linear in a parameter and in an activation             linear, conv2d, matmul, ...
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

SHAPING = frozenset(
    {
        *("flatten", "reshape", "reshape_as", "view", "view_as", "permute", "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze"),
        *("contiguous", "expand", "expand_as", "broadcast_to", "repeat", "unflatten", "clone", "detach", "alias", "t", "T", "mT", "data", "ravel"),
        *("to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda", "getitem", "select", "narrow", "index_select", "gather"),
        *("chunk", "split", "tensor_split", "unbind", "roll", "flip", "pixel_shuffle", "pixel_unshuffle", "identity", "requires_grad"),
    }
)
CARRYING = SHAPING | frozenset(
    {
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "mean", "sum", "neg", "negative", "positive", "pad"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate"),
        *("masked_fill",),
    }
)
HOMOGENEOUS = CARRYING - {"masked_fill"} | frozenset(
    {
        *("relu", "leaky_relu", "abs", "max_pool1d", "max_pool2d", "max_pool3d", "amax", "cumsum"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    }
)
ADDS = frozenset({"add", "sub"})
NORMS = frozenset({"layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "normalize"})
EMBEDDINGS = frozenset({"embedding", "embedding_bag"})
OPAQUE_WEIGHTS = frozenset({"multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu"})
"""Linear layers and more in one call: weights of a branch, but never scale-invariant as they stand."""

CONTRACTIONS = frozenset({"matmul", "mm", "bmm", "mv", "einsum", "tensordot"})
"""Weight layers where one of the two factors is computed from parameters alone."""

LINEAR = CONTRACTIONS | frozenset(
    {
        *("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("addmm", "baddbmm"),
    }
)
CREATING = frozenset(
    {
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "zeros_like", "ones_like", "empty_like", "full_like"),
        *("rand_like", "randn_like", "randint_like", "size", "shape", "dim", "ndim", "device", "dtype", "numel", "len", "getattr"),
    }
)
"""What they return holds nothing of their input's values."""

OPERANDS = MappingProxyType(
    {
        "layer_norm": ("input", "normalized_shape", "weight", "bias"),
        "rms_norm": ("input", "normalized_shape", "weight"),
        "group_norm": ("input", "num_groups", "weight", "bias"),
        "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training"),
        "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats"),
        "torch.batch_norm": ("input", "weight", "bias", "running_mean", "running_var", "training"),
        "torch.instance_norm": ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats"),
        "bilinear": ("input1", "input2", "weight", "bias"),
        "addmm": ("bias", "input", "weight"),
        "baddbmm": ("bias", "input", "weight"),
        "embedding": ("input", "weight"),
        "embedding_bag": ("input", "weight"),
    }
)
"""Order of the arguments of functions that take parameters; all others take input, weight, bias."""

_SYNONYMS = MappingProxyType(
    {
        "truediv": "div",
        "true_divide": "div",
        "divide": "div",
        "floordiv": "floor_divide",
        "multiply": "mul",
        "subtract": "sub",
        "rtruediv": "rdiv",
        "rmul": "mul",
        "radd": "add",
        "iadd": "add",
        "imul": "mul",
        "isub": "sub",
        "itruediv": "div",
        "idiv": "div",
        "ipow": "pow",
        "imatmul": "matmul",
        "adjoint": "transpose",
        "swapdims": "transpose",
        "moveaxis": "movedim",
        "index": "getitem",
        "vector_norm": "norm",
        "linalg_vector_norm": "norm",
        "linalg_norm": "norm",
        "frobenius_norm": "norm",
        "clip": "clamp",
        "feature_alpha_dropout": "alpha_dropout",
        "bernoulli": "random",
        "threshold": "threshold",
        "_weight_norm": "weight_norm",
        "upsample": "interpolate",
        "constant_pad_nd": "pad",
        "relu6": "relu6",
        "linalg_matmul": "matmul",
        "linalg_vecdot": "matmul",
    }
)

MODULES: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    (_NormBase, "batch_norm"),
    (nn.LayerNorm, "layer_norm"),
    (nn.GroupNorm, "group_norm"),
    (nn.RMSNorm, "rms_norm"),
    (nn.Linear, "linear"),
    (nn.Bilinear, "bilinear"),
    (nn.modules.conv._ConvNd, "conv2d"),
    (nn.MultiheadAttention, "multi_head_attention_forward"),
    (nn.RNNBase, "lstm"),
    (nn.Embedding, "embedding"),
    (nn.EmbeddingBag, "embedding_bag"),
    ((nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle), "identity"),
    ((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "dropout"),
    ((nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd), "avg_pool2d"),
    (nn.modules.padding._ConstantPadNd, "pad"),
    (nn.Upsample, "interpolate"),
    (nn.ReLU, "relu"),
    (nn.LeakyReLU, "leaky_relu"),
    ((nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd), "max_pool2d"),
)
"""Modules that stand for one function; instance norms are batch norms of one image, and share their base class."""


def of_module(module: nn.Module) -> str:
    """The operation that a module of torch's own stands for; empty if it is none of `MODULES`."""
    return next((op for types, op in MODULES if isinstance(module, types)), "")


def of_function(function: Callable[..., Any] | str) -> str:
    """Torch's name of a function or method, without the spellings of in-place and reflected variants."""
    if isinstance(function, str):
        name = function
    else:
        name = str(getattr(function, "__name__", ""))
        if name == "__get__":
            name = str(getattr(getattr(function, "__self__", None), "__name__", ""))
    if name.startswith("__") or name.endswith("_"):
        name = name.strip("_")
    name = _SYNONYMS.get(name, name)
    is_builtin = getattr(function, "__module__", None) != "torch.nn.functional" and not isinstance(function, str)
    return f"torch.{name}" if is_builtin and f"torch.{name}" in OPERANDS else name


def operand_names(op: str) -> tuple[str, ...]:
    """Names of an operation's arguments, in order."""
    return OPERANDS.get(op, ("input", "weight", "bias"))
