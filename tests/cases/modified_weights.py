"""What can be attached to a weight module, or to the map in it, so that W is another matrix."""

from torch import nn


def lopsided(w):
    """W without what either family promises: entries above the diagonal are halved."""
    return w - 0.5 * w.triu(1)


def wrap(module, name):
    """Patches a method on the object itself."""
    method = getattr(module, name)
    setattr(module, name, lambda *a: lopsided(method(*a)))


class OtherMap(nn.Module):
    max_eigenvalue = None

    def forward(self, raw):
        return lopsided(raw)


ATTACHED = {
    "forward hook": lambda w: w.register_forward_hook(lambda m, i, o: lopsided(o)),
    "hook with keywords": lambda w: w.register_forward_hook(
        lambda m, i, k, o: lopsided(o), with_kwargs=True
    ),
    "forward pre-hook": lambda w: w.register_forward_pre_hook(lambda m, i: None),
    "backward hook": lambda w: w.register_full_backward_hook(lambda m, i, o: None),
    "backward pre-hook": lambda w: w.register_full_backward_pre_hook(lambda m, o: None),
    "patched forward": lambda w: wrap(w, "forward"),
    "patched compose": lambda w: wrap(w, "compose"),
    "hook on the map": lambda w: w.map.register_forward_hook(lambda m, i, o: lopsided(o)),
    "patched map": lambda w: wrap(w.map, "forward"),
    "another map": lambda w: setattr(w, "map", OtherMap()),
}
