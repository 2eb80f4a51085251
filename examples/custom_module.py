"""A DEQ layer over a module of your own: a convolution block that works on 8x8 images.

The block maps ``(z, x)`` to a state like z. ``initial_state`` says how large the state is, because
it differs from x. Normalising the block's output keeps the state's size fixed, and the factor 0.5
makes the state's share of it small enough to settle.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdeq import DEQLayer
from fastdeq.study import digits


class ConvBlock(nn.Module):
    """z ``(B, C, 8, 8)``, x ``(B, 1, 8, 8)``."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.inject = nn.Conv2d(1, channels, 3, padding=1)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, channels)

    def initial_state(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.channels, 8, 8)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.inject(x) + 0.5 * torch.tanh(self.mix(z)))


torch.manual_seed(0)
data = digits()
images, labels = data.x_train.view(-1, 1, 8, 8), data.y_train
layer = DEQLayer(ConvBlock(16))
model = nn.Sequential(layer, nn.Flatten(), nn.Linear(16 * 64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(21):
    batch = torch.randint(len(images), (64,))
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    if step % 10 == 0:
        print(f"step {step:2}: loss {loss.item():.3f}; {layer.last_solution.summary()}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# A warm start: the equilibrium of an image is a good guess for a slightly different one.
with torch.no_grad():
    z = layer(images[:64])
    nearby = images[:64] + 0.01 * torch.randn(64, 1, 8, 8)
    for name, start in (("zero", None), ("warm", z)):
        layer(nearby, z0=start)
        print(f"{name} start: {layer.last_solution.summary()}")
