"""The iteration of any map between its evaluations, for tensors on a GPU."""
