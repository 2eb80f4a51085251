"""What autograd visits for a product: the rule by which it leaves nodes out, and records of it."""

import torch


def topological_numbers(*roots):
    """The longest way to a leaf of every node that is reached: what autograd compares."""
    numbers = {}
    stack = list(roots)
    while stack:
        node = stack[-1]
        below = [n for n, _ in node.next_functions if n is not None]
        missing = [n for n in below if n not in numbers]
        if missing:
            stack += missing
        else:
            numbers[stack.pop()] = 1 + max((numbers[n] for n in below), default=-1)
    return numbers


def visited(value, at):
    """Number of nodes whose edges autograd follows for the gradient of value with respect to at."""
    if at.grad_fn is None:
        lowest, numbers = 0, topological_numbers(value.grad_fn)
    else:
        numbers = topological_numbers(value.grad_fn, at.grad_fn)
        lowest = numbers[at.grad_fn]
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen or numbers[node] < lowest:
            continue
        seen.add(node)
        stack += [n for n, _ in node.next_functions]
    return len(seen)


def record_products(monkeypatch):
    """Counts, for each vector-Jacobian product from now on, the nodes that autograd visits."""
    counts = []
    original = torch.autograd.grad

    def recording(outputs, inputs, *args, **kwargs):
        if isinstance(outputs, torch.Tensor) and isinstance(inputs, torch.Tensor):
            counts.append(visited(outputs, inputs))
        return original(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", recording)
    return counts


def layers_above(leaf, count):
    x = leaf
    for _ in range(count):
        x = 1.001 * x
    return x
