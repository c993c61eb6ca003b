"""A model and data of one's own, for `user_model.yaml`: any factory of a torch module, any tensors."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Gated(nn.Module):
    """A residual block that a gate opens and closes; its norms are found by where they stand, not by their names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        self.write = nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Adds what the block writes to what it reads; x is [images, width]."""
        return torch.relu(x + self.write(self.read(x)))


def make_model(width: int = 32, blocks: int = 2) -> nn.Module:
    """Maps [images, 64] to ten logits."""
    stem = [nn.Linear(64, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*stem, *(Gated(width) for _ in range(blocks)), nn.Linear(width, 10))


def make_data(validation: int = 360) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then validation images and labels; images are vectors in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    pixels, classes = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    pixels, classes = pixels[order], classes[order]
    return pixels[validation:], classes[validation:], pixels[:validation], classes[:validation]
