"""From a layer to an operator or a loop, and to their gradients."""
