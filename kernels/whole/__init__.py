"""The solve of a small affine cell in one launch."""
