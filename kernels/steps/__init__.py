"""The solve of an affine cell of any size, with every solver: two launches per iteration."""
