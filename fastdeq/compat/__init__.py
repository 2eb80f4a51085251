"""Other packages' interfaces on this package's solvers and gradients."""
