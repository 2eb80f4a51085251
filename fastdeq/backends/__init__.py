"""Which engine solves an affine cell, and what this build and machine have."""
