"""Small models of the kinds that torchdeq's examples train, written against either package.

``deq`` is torchdeq or ``fastdeq.compat.torchdeq``. A model is called with the data and returns a
loss; what it draws comes from the global generator.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F


class MultiscaleConvolution(nn.Module):
    """Two resolutions that see each other, weight norm, phantom gradients."""

    options: ClassVar = {
        "f_max_iter": 12,
        "f_tol": 1e-3,
        "f_stop_mode": "rel",
        "grad": 4,
        "tau": 0.6,
    }

    def __init__(self, deq, **options):
        super().__init__()
        self.deq_of, fine, coarse = deq, 6, 8
        self.stem = nn.Conv2d(1, fine, 3, padding=1)
        self.cell = nn.ModuleDict(
            {
                "fine": nn.Conv2d(fine, fine, 3, padding=1),
                "coarse": nn.Conv2d(coarse, coarse, 3, padding=1),
                "down": nn.Conv2d(fine, coarse, 3, stride=2, padding=1),
                "up": nn.Conv2d(coarse, fine, 1),
                "fine_norm": nn.GroupNorm(2, fine),
                "coarse_norm": nn.GroupNorm(2, coarse),
            }
        )
        deq.apply_norm(self.cell, filter_out=["_norm"])
        self.deq = deq.get_deq(**{**self.options, **options})
        self.head = nn.Linear(fine + coarse, 4)

    def f(self, x):
        m = self.cell

        def step(fine, coarse):
            up = F.interpolate(m["up"](coarse), scale_factor=2)
            new_fine = torch.tanh(m["fine_norm"](m["fine"](fine) + up) * 0.5 + x)
            new_coarse = torch.tanh(m["coarse_norm"](m["coarse"](coarse) + m["down"](fine)) * 0.5)
            return new_fine, new_coarse

        return step

    def forward(self, images, labels):
        self.deq_of.reset_deq(self.cell)
        x = self.stem(images)
        n, _, h, w = x.shape
        start = (torch.zeros_like(x), x.new_zeros(n, 8, h // 2, w // 2))
        z, _ = self.deq(self.f(x), start)
        pooled = torch.cat([part.mean((2, 3)) for part in z[-1]], 1)
        return F.cross_entropy(self.head(pooled), labels)

    @staticmethod
    def data():
        images = torch.randn(16, 1, 8, 8)
        quarters = F.adaptive_avg_pool2d(images, 2).flatten(1)
        return images, quarters.argmax(1)


class ImplicitGraphNetwork(nn.Module):
    """The nodes of one graph, rows that depend on each other; the implicit gradient."""

    options: ClassVar = {
        "f_max_iter": 100,
        "b_max_iter": 100,
        "f_tol": 1e-6,
        "b_tol": 1e-8,
        "ift": True,
    }

    def __init__(self, deq, **options):
        super().__init__()
        self.deq_of = deq
        self.encode, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.mix = nn.Linear(12, 12, bias=False)
        deq.apply_norm(self.mix, "spectral_norm", target_norm=0.8, learn_scale=False)
        self.deq = deq.get_deq(**{**self.options, **options})

    def forward(self, adjacency, features, labels):
        self.deq_of.reset_deq(self.mix)
        x = self.encode(features)
        z, _ = self.deq(lambda z: torch.tanh(adjacency @ self.mix(z) + x), torch.zeros_like(x))
        return F.cross_entropy(self.head(z[-1]), labels)

    @staticmethod
    def data():
        links = (torch.rand(24, 24) < 0.15).to(torch.get_default_dtype())
        links = ((links + links.T + torch.eye(24)) > 0).to(torch.get_default_dtype())
        size = links.sum(1).rsqrt()
        features = torch.randn(24, 5)
        adjacency = size[:, None] * links * size
        return adjacency, features, (adjacency @ features)[:, :3].argmax(1)


class CharacterTransformer(nn.Module):
    """One causal block with injected input and variational dropout; losses along the solve."""

    options: ClassVar = {
        "core": "indexing",
        "f_solver": "anderson",
        "f_max_iter": 12,
        "f_tol": 1e-6,
        "n_states": 2,
        "ift": True,
        "b_max_iter": 30,
    }
    size, letters = 16, 11

    def __init__(self, deq, **options):
        super().__init__()
        self.deq_of, d = deq, self.size
        self.embed, self.head = nn.Embedding(self.letters, d), nn.Linear(d, self.letters)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.wide, self.narrow = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.norm = nn.LayerNorm(d)
        self.drop = deq.VariationalDropout1d(0.1)
        self.deq = deq.get_deq(**{**self.options, **options})

    def f(self, x):
        def step(z):
            n, t, d = z.shape
            q, k, v = self.qkv(z).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = self.out(seen.transpose(1, 2).reshape(n, t, d))
            h = self.narrow(F.gelu(self.wide(0.5 * z + h)))
            return self.drop(self.norm(0.3 * h + x))

        return step

    def forward(self, text):
        self.deq_of.reset_deq(self)
        x = self.embed(text[:, :-1])
        z, _ = self.deq(self.f(x), torch.zeros_like(x))

        def loss(state):
            return F.cross_entropy(self.head(state).flatten(0, 1), text[:, 1:].flatten())

        return self.deq_of.fp_correction(loss, (z,), gamma=0.8)

    @classmethod
    def data(cls):
        steps = torch.randint(1, 3, (16, 1))
        return ((torch.randint(cls.letters, (16, 1)) + steps * torch.arange(13)) % cls.letters,)


MODELS = (MultiscaleConvolution, ImplicitGraphNetwork, CharacterTransformer)


def train(model_class, deq, steps, lr=1e-2, seed=0, **options):
    """Losses of ``steps`` steps of Adam from the same seed, in float64: in float32 rounding grows
    a thousandfold within 30 steps, whoever solves."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(seed)
        data = model_class.data()
        model = model_class(deq, **options).train()
        optimizer = torch.optim.Adam(model.parameters(), lr)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(*data)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        torch.set_default_dtype(before)
    return losses
