"""Models: the networks that a trial can train. torch.fx can trace each of them, since roles of parameters are read from the trace.

    mlp            flatten ─ [linear norm relu] x depth ─ head
    resnet  post   stem[conv norm relu] ─ layer1 ─ layer2 ... ─ mean ─ head       block   relu(x + [conv norm relu conv norm](x))
            pre    stem[conv] ─ layer1 ... ─ final[norm relu] ─ mean ─ head               x + [norm relu conv norm relu conv](x)
    transformer    patches + positions ─ block x depth ─ mean ─ head
            post   norm after the embedding                                       block   norm(x + attention(x)), norm(x + mlp(x))
            pre    final norm before the head                                             x + attention(norm(x)), x + mlp(norm(x))

    norm           of maps [N, C, H, W]        of vectors [..., C]       weights in front
    batch          BatchNorm2d                 BatchNorm1d               without bias
    layer          GroupNorm(1, C)             LayerNorm                 without bias
    group          GroupNorm(up to 8, C)       GroupNorm(up to 8, C)     without bias
    rms            RMSNorm2d                   RMSNorm                   without bias
    weight         no layer                    no layer                  all but the head: weight_norm and bias
    none           no layer                    no layer                  bias

A transformer's linears keep their biases under every norm. Initial weights are drawn from torch's global generator.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from study.errors import ModelError
from study.training.imported import call_user
from study.trial import IMPORT, ModelSpec

EPS = 1e-5
"""Added to a variance or mean square before its root, in every norm."""

MOST_GROUPS = 8
"""Groups of a GroupNorm, where the channels allow as many of two or more."""

EXPANSION = 4
"""A bottleneck block ends in so many times its width; a transformer's MLP hides so many times the embedding."""

INIT_DEVIATION = 0.02
"""Standard deviation of a transformer's initial weights and positions, as in BERT and GPT-2."""


def build_model(spec: ModelSpec, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A freshly initialized network that maps images [N, *shape] to logits [N, num_classes].

    Args:
        shape: Of one image: (channels, height, width) or (features,).

    Raises:
        ModelError: if the network cannot take such images, or the user's function returns no module.
        ImportFailed: if the user's function cannot be imported, or raises.
    """
    if spec.name.startswith(IMPORT):
        return _imported(spec)
    if spec.name == "mlp":
        return _mlp(spec, shape, num_classes)
    if len(shape) != 3:
        raise ModelError(
            f"a {spec.name} takes images with channels, height and width (got vectors of shape {shape})",
            where="model.name",
            remedy="use mlp, or give images (N, channels, height, width)",
        )
    return _resnet(spec, shape, num_classes) if spec.name == "resnet" else _transformer(spec, shape, num_classes)


class RMSNorm2d(nn.Module):
    """Divides each image's maps [N, C, H, W] by their root mean square over C, H and W, then scales each channel; no shift.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467, eq. 4, over channels and space.
    """

    def __init__(self, channels: int, eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """Normalized maps of the same shape."""
        # pow, unlike square, is computed in float32 by CUDA's autocast, as torch's own norms are.
        scale = torch.rsqrt(maps.pow(2).mean((1, 2, 3), keepdim=True) + self.eps)
        return maps * scale * self.weight[:, None, None]


def _imported(spec: ModelSpec) -> nn.Module:
    model = call_user(spec.name, **spec.args)
    if not isinstance(model, nn.Module):
        raise ModelError(f"must return a torch.nn.Module (got {type(model).__name__})", where=spec.name, remedy="return the network that it builds")
    return model


def _mlp(spec: ModelSpec, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    inputs = torch.Size(shape).numel()
    for index in range(1, spec.depth + 1):
        linear = _weight_normed(nn.Linear(inputs, spec.width, bias=_has_bias(spec.norm)), spec.norm)
        parts[f"layer{index}"] = _sequence(linear=linear, norm=_vector_norm(spec.norm, spec.width), relu=nn.ReLU(), dropout=_dropout(spec.dropout))
        inputs = spec.width
    return nn.Sequential(OrderedDict(parts, head=nn.Linear(inputs, num_classes)))


def _resnet(spec: ModelSpec, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    block = PostActivationBlock if spec.order == "post" else PreActivationBlock
    stem = _conv(spec.norm, shape[0], spec.width, kernel=3)
    channels, parts = spec.width, OrderedDict[str, nn.Module]()
    if spec.order == "post":
        parts["stem"] = _sequence(conv=stem, norm=_map_norm(spec.norm, channels), relu=nn.ReLU())
    else:
        parts["stem"] = _sequence(conv=stem)
    for stage, num_blocks in enumerate(spec.blocks):
        width, blocks = spec.width * 2**stage, []
        for index in range(num_blocks):
            blocks.append(block(spec, channels, width, stride=2 if stage > 0 and index == 0 else 1))
            channels = _outputs(spec, width)
        parts[f"layer{stage + 1}"] = nn.Sequential(*blocks)
    if spec.order == "pre":
        parts["final"] = _sequence(norm=_map_norm(spec.norm, channels), relu=nn.ReLU())
    return nn.Sequential(OrderedDict(parts, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(channels, num_classes)))


class PostActivationBlock(nn.Module):
    """relu(shortcut + branch), where the branch ends in a norm: conv norm relu conv norm.

    The shortcut is the input, or a normalized 1x1 convolution of it where shapes differ. A bottleneck has its stride on the 3x3.

    Source: He et al., Deep Residual Learning for Image Recognition, sections 3.2, 3.3 (option B) and 4.1, arXiv:1512.03385.
    """

    def __init__(self, spec: ModelSpec, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        steps: OrderedDict[str, nn.Module] = OrderedDict()
        channels = inputs
        for index, (kernel, outputs, step) in enumerate(_convolutions(spec, width, stride), start=1):
            if index > 1:
                steps[f"relu{index - 1}"] = nn.ReLU()
            steps[f"conv{index}"] = _conv(spec.norm, channels, outputs, kernel, step)
            steps[f"norm{index}"] = _map_norm(spec.norm, outputs)
            channels = outputs
        self.branch = _register(self, steps, spec.dropout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != channels:
            self.shortcut = _sequence(conv=_conv(spec.norm, inputs, channels, 1, stride), norm=_map_norm(spec.norm, channels))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [N, inputs, H, W] to [N, outputs, H / stride, W / stride], sides rounded up."""
        shortcut: Tensor = self.shortcut(maps)
        return F.relu(shortcut + _through(self, self.branch, maps))


class PreActivationBlock(nn.Module):
    """shortcut + branch, where the branch begins with a norm: norm relu conv norm relu conv.

    The shortcut is the input, or a bare 1x1 convolution of the activated input where shapes differ.

    Source: He et al., Identity Mappings in Deep Residual Networks, section 4 and appendix, arXiv:1603.05027.
    """

    def __init__(self, spec: ModelSpec, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        steps: OrderedDict[str, nn.Module] = OrderedDict()
        channels = inputs
        for index, (kernel, outputs, step) in enumerate(_convolutions(spec, width, stride), start=1):
            steps[f"norm{index}"] = _map_norm(spec.norm, channels)
            steps[f"relu{index}"] = nn.ReLU()
            steps[f"conv{index}"] = _conv(spec.norm, channels, outputs, kernel, step)
            channels = outputs
        self.branch = _register(self, steps, spec.dropout)
        self.projects = stride != 1 or inputs != channels
        self.shortcut: nn.Module = _conv(spec.norm, inputs, channels, 1, stride) if self.projects else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [N, inputs, H, W] to [N, outputs, H / stride, W / stride], sides rounded up."""
        activated = _through(self, self.branch[:2], maps)
        shortcut: Tensor = self.shortcut(activated if self.projects else maps)
        return shortcut + _through(self, self.branch[2:], activated)


def _outputs(spec: ModelSpec, width: int) -> int:
    """The channels that a block of this width ends in."""
    return width * EXPANSION if spec.block == "bottleneck" else width


def _convolutions(spec: ModelSpec, width: int, stride: int) -> tuple[tuple[int, int, int], ...]:
    """Kernel size, output channels and stride of each convolution in a block's branch."""
    if spec.block == "basic":
        return (3, width, stride), (3, width, 1)
    return (1, width, 1), (3, width, stride), (1, _outputs(spec, width), 1)


def _register(block: nn.Module, steps: OrderedDict[str, nn.Module], dropout: float) -> tuple[str, ...]:
    """Makes the steps submodules of the block, dropout before the last convolution; their names in the order of computation."""
    last = max(name for name in steps if name.startswith("conv"))
    names: list[str] = []
    for name, module in steps.items():
        if name == last and dropout > 0:
            block.add_module("dropout", nn.Dropout(dropout))
            names.append("dropout")
        block.add_module(name, module)
        names.append(name)
    return tuple(names)


def _through(block: nn.Module, names: Sequence[str], maps: Tensor) -> Tensor:
    for name in names:
        maps = getattr(block, name)(maps)
    return maps


def _transformer(spec: ModelSpec, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    if shape[1] % spec.patch or shape[2] % spec.patch:
        divisors = [side for side in range(1, min(shape[1:]) + 1) if shape[1] % side == shape[2] % side == 0]
        raise ModelError(
            f"images of {shape[1]}x{shape[2]} pixels do not divide into patches (got side {spec.patch})",
            where="model.patch",
            remedy=f"use one of {', '.join(map(str, divisors))}",
        )
    return Transformer(spec, shape, num_classes)


class Transformer(nn.Module):
    """A small ViT without class token: patches, learned positions, blocks, mean over the patches, a linear head.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, section 3.1, arXiv:2010.11929; mean pooling as in Beyer et al., arXiv:2205.01580.
    """

    def __init__(self, spec: ModelSpec, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        num_patches = (shape[1] // spec.patch) * (shape[2] // spec.patch)
        patches = nn.Conv2d(shape[0], spec.width, spec.patch, stride=spec.patch)
        self.patches = _weight_normed(patches, spec.norm)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_patches, spec.width), std=INIT_DEVIATION))
        self.embedding_norm = _vector_norm(spec.norm, spec.width) if spec.order == "post" else nn.Identity()
        self.blocks = nn.Sequential(*(TransformerBlock(spec) for _ in range(spec.depth)))
        self.final_norm = _vector_norm(spec.norm, spec.width) if spec.order == "pre" else nn.Identity()
        self.head = _linear("none", spec.width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] to logits [N, num_classes]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = self.blocks(self.embedding_norm(tokens + self.positions))
        logits: Tensor = self.head(self.final_norm(tokens).mean(1))
        return logits


class TransformerBlock(nn.Module):
    """Attention, then an MLP, each added to the stream; norms before them, or after the sums.

    Source: Xiong et al., On Layer Normalization in the Transformer Architecture, figure 1, arXiv:2002.04745.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.pre = spec.order == "pre"
        self.norm1 = _vector_norm(spec.norm, spec.width)
        self.attention = Attention(spec)
        self.norm2 = _vector_norm(spec.norm, spec.width)
        self.mlp = _sequence(
            linear1=_linear(spec.norm, spec.width, EXPANSION * spec.width),
            gelu=nn.GELU(),
            linear2=_linear(spec.norm, EXPANSION * spec.width, spec.width),
            dropout=_dropout(spec.dropout),
        )

    def forward(self, stream: Tensor) -> Tensor:
        """Tokens [N, num_tokens, width] to the same shape."""
        if self.pre:
            stream = stream + self.attention(self.norm1(stream))
            stream = stream + self.mlp(self.norm2(stream))
        else:
            stream = self.norm1(stream + self.attention(stream))
            stream = self.norm2(stream + self.mlp(stream))
        return stream


class Attention(nn.Module):
    """Multi-head self-attention over all tokens.

    Source: Vaswani et al., Attention Is All You Need, section 3.2, arXiv:1706.03762.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.query = _linear(spec.norm, spec.width, spec.width)
        self.key = _linear(spec.norm, spec.width, spec.width)
        self.value = _linear(spec.norm, spec.width, spec.width)
        self.out = _linear(spec.norm, spec.width, spec.width)
        self.dropout = _dropout(spec.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [N, num_tokens, width] to the same shape."""
        query, key, value = (self._split(linear(tokens)) for linear in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return out

    def _split(self, tokens: Tensor) -> Tensor:
        """[N, num_tokens, width] to [N, heads, num_tokens, width / heads]."""
        split: Tensor = tokens.unflatten(2, (self.heads, -1))  # type: ignore[no-untyped-call]
        return split.transpose(1, 2)


def _sequence(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def _dropout(rate: float) -> nn.Module:
    return nn.Dropout(rate) if rate > 0 else nn.Identity()


def _has_bias(norm: str) -> bool:
    """Whether a layer of an mlp or a resnet has a bias: the norm behind it would remove it again, or brings a shift of its own."""
    return norm in ("weight", "none")


def _weight_normed(layer: nn.Module, norm: str) -> nn.Module:
    """The layer, its weight split into one gain for each output and a direction where `norm` is `weight`.

    Source: Salimans and Kingma, Weight Normalization, eq. 2, arXiv:1602.07868.
    """
    return weight_norm(layer) if norm == "weight" else layer


def _conv(norm: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    """A convolution that keeps the size of maps at stride 1.

    Source: of its initial weights, He et al., Delving Deep into Rectifiers, eq. 14, arXiv:1502.01852.
    """
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=_has_bias(norm))
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return _weight_normed(conv, norm)


def _linear(norm: str, inputs: int, outputs: int) -> nn.Module:
    """A linear layer of a transformer."""
    linear = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(linear.weight, std=INIT_DEVIATION)
    nn.init.zeros_(linear.bias)
    return _weight_normed(linear, norm)


def _map_norm(norm: str, channels: int) -> nn.Module:
    """What normalizes maps [N, channels, H, W]."""
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels, eps=EPS)
        case "layer":
            return nn.GroupNorm(1, channels, eps=EPS)
        case "group":
            return nn.GroupNorm(_groups(channels), channels, eps=EPS)
        case "rms":
            return RMSNorm2d(channels)
    return nn.Identity()


def _vector_norm(norm: str, width: int) -> nn.Module:
    """What normalizes vectors [..., width]."""
    match norm:
        case "batch":
            return nn.BatchNorm1d(width, eps=EPS)
        case "layer":
            return nn.LayerNorm(width, eps=EPS)
        case "group":
            return nn.GroupNorm(_groups(width), width, eps=EPS)
        case "rms":
            return nn.RMSNorm(width, eps=EPS)
    return nn.Identity()


def _groups(channels: int) -> int:
    """The most groups, up to 8, of two or more channels each: a group of one value would be normalized to a constant."""
    return max(groups for groups in range(1, MOST_GROUPS + 1) if channels % groups == 0 and (groups == 1 or channels // groups > 1))
