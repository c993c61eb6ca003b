"""Model families, written from scratch with their usual depths and small widths; and a way to rename every part of a model."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class Residual(nn.Module):
    """relu(shortcut + branch), in place as torchvision does it."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None, drop: float = 0.0) -> None:
        super().__init__()
        self.branch, self.shortcut, self.drop = branch, shortcut, drop

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.branch(x)
        if self.drop and self.training:
            out = out * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - self.drop) / (1 - self.drop)
        out += identity
        return F.relu(out, inplace=True)


def basic(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(conv_norm(inputs, width, stride=stride), nn.ReLU(inplace=True), conv_norm(width, width))


def bottleneck(inputs: int, width: int, stride: int, groups: int = 1, gate: bool = False) -> nn.Sequential:
    parts = [conv_norm(inputs, 4, 1), nn.ReLU(), conv_norm(4, 4, stride=stride, groups=groups), nn.ReLU(), conv_norm(4, width, 1)]
    return nn.Sequential(*parts, *([Gate(width)] if gate else []))


def resnet(block: Callable[[int, int, int], nn.Module], depths: tuple[int, ...], widths: tuple[int, ...], drop: float = 0.0) -> nn.Module:
    layers: list[nn.Module] = [conv_norm(3, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    inputs = 4
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for index in range(depth):
            stride = 2 if stage and not index else 1
            shortcut = conv_norm(inputs, width, 1, stride) if stride == 2 or inputs != width else None
            layers.append(Residual(block(inputs, width, stride), shortcut, drop))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 5))


class PreActivation(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.project = nn.Conv2d(inputs, width, 1, stride, bias=False) if inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        shortcut = x if self.project is None else self.project(out)
        return self.conv2(F.relu(self.norm2(self.conv1(out)))) + shortcut


def preactivation_resnet() -> nn.Module:
    blocks = [PreActivation(4, 4), PreActivation(4, 4), PreActivation(4, 6, 2), PreActivation(6, 6)]
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), *blocks, nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    )


class DenseLayer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 8, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))], 1)


def densenet() -> nn.Module:
    transition = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.AvgPool2d(2))
    head = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    return nn.Sequential(conv_norm(3, 4), nn.ReLU(), DenseLayer(4), DenseLayer(6), transition, DenseLayer(4), head)


class ChannelsFirst(nn.Module):
    """A LayerNorm over channels of maps, written out with var and sqrt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        return self.g[:, None, None] * ((x - mean) / torch.sqrt(var + 1e-6)) + self.b[:, None, None]


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.strength = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.strength * self.down(F.gelu(self.up(out)))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 4, 4), ChannelsFirst(4)]
    for stage, depth in enumerate((3, 3, 9, 3)):
        layers += [ChannelsFirst(4), nn.Conv2d(4, 4, 2, 2, padding=1)] if stage else []
        layers += [ConvNeXtBlock(4) for _ in range(depth)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 5))


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(inputs, 8, 1), nn.ReLU6(), conv_norm(8, 8, groups=8), nn.ReLU6(), conv_norm(8, outputs, 1))
        self.adds = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet() -> nn.Module:
    blocks = [Inverted(4, 6), Inverted(6, 6), Inverted(6, 8)]
    return nn.Sequential(
        conv_norm(3, 4), nn.ReLU6(), *blocks, conv_norm(8, 16, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (3, 4, 4, 4):
        layers += [nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 5))


def darknet() -> nn.Module:
    """Branches that end in norm and activation."""
    blocks = [Plus(nn.Sequential(conv_norm(4, 4, 1), nn.LeakyReLU(0.1), conv_norm(4, 4), nn.LeakyReLU(0.1))) for _ in range(2)]
    return nn.Sequential(conv_norm(3, 4), nn.SiLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


class Plus(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Attend(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, x, x, need_weights=False)[0]


def feedforward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class ViT(nn.Module):
    def __init__(self, depth: int = 12, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        parts = [
            part
            for _ in range(depth)
            for part in (
                Plus(nn.Sequential(nn.LayerNorm(width), Attend(width), nn.Dropout(0.1))),
                Plus(nn.Sequential(nn.LayerNorm(width), feedforward(width))),
            )
        ]
        self.blocks, self.norm, self.head = nn.Sequential(*parts), nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Parallel(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), the sums in either order."""

    def __init__(self, width: int, shared: bool, branches_first: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = self.norm1 if shared else nn.LayerNorm(width)
        self.attention, self.mlp, self.branches_first = Attend(width), feedforward(width), branches_first

    def forward(self, x: Tensor) -> Tensor:
        attended, fed = self.attention(self.norm1(x)), self.mlp(self.norm2(x))
        return (attended + fed) + x if self.branches_first else x + attended + fed


_numbers = itertools.count()


def renamed(model: nn.Module) -> nn.Module:
    """The model itself, where every module and bare parameter is called by a new, meaningless name; its code finds them still."""
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            continue
        aliases: dict[str, str] = {}
        own = type(module).__module__.startswith("torch.")
        for held in (module._modules, *(() if own else (module._parameters,))):
            for name in list(held):
                aliases[name] = f"zq{next(_numbers)}"
                held[aliases[name]] = held.pop(name)
        if aliases:
            module.__class__ = _aliased(type(module), aliases)
    return model


def _aliased(cls: type[nn.Module], aliases: dict[str, str]) -> type[nn.Module]:
    def lookup(self: nn.Module, name: str) -> object:
        return nn.Module.__getattr__(self, aliases.get(name, name))

    return type(cls.__name__, (cls,), {"__getattr__": lookup, "__module__": cls.__module__})
