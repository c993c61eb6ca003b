"""Models as somebody might write them that one step for many trials may get wrong; factories for `import:tests.engines.strange:NAME`."""

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS, HIDDEN, CLASSES = 16, 8, 10


class Plain(nn.Module):
    """Nothing strange: the others change what its forward pass does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(PIXELS, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def hidden(self, x: Tensor) -> Tensor:
        """What the head reads."""
        return F.relu(self.inner(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.hidden(x))


class Remembering(Plain):
    """Keeps a running mean of its own in a Python attribute."""

    seen = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Logits of what differs from the running mean."""
        hidden = self.hidden(x)
        self.seen = 0.9 * self.seen + float(hidden.detach().mean())
        return self.head(hidden - self.seen)


class Counting(Plain):
    """Divides by the number of its calls, which torch.fx takes for a constant."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits of less and less."""
        self.calls += 1
        return self.head(self.hidden(x) / self.calls)


class Rolling(Plain):
    """Draws from Python's own generator."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a random share."""
        return self.head(self.hidden(x) * random.random())


class Branching(Plain):
    """Goes one way or the other, as its values say."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of what is made small where it is large."""
        hidden = self.hidden(x)
        return self.head(hidden / 2 if float(hidden.detach().mean()) > 0.1 else hidden)


class Averaging(Plain):
    """Keeps a running mean in a buffer that every forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of what differs from the running mean."""
        hidden = self.hidden(x)
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.9).add_(0.1 * hidden.mean(0))
        return self.head(hidden - self.average)


class Mixing(Plain):
    """Sees other images of the batch, also in evaluation, where engines choose batches of their own."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of what differs from the batch's mean."""
        hidden = self.hidden(x)
        return self.head(hidden - hidden.mean(0, keepdim=True))


class Unreadable(Plain):
    """Iterates over the images, which torch.fx refuses."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits, image by image."""
        return torch.stack([self.head(self.hidden(image[None]))[0] for image in x])


class Raising(Plain):
    """Cannot be trained at all."""

    def forward(self, x: Tensor) -> Tensor:
        """None."""
        if self.training and len(x) > 4:
            raise ArithmeticError("too many images")
        return self.head(self.hidden(x))
