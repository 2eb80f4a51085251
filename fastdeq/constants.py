"""Numbers that decide how a solve goes on, each written once.

Python imports them. ``csrc/common/constants.h`` is generated from this file (``python
csrc/generate_constants.py``, which the build runs too), and the Triton kernels make compile-time
constants of them. Nothing is imported here, so that the build can read it before torch is there.

Numbers that belong to one implementation alone (tile sizes, grain sizes) stand beside it.
"""

# A residual relative to a state of zeros is an absolute one: |f(z) - z| / (|f(z)| + RESIDUAL_EPS).
RESIDUAL_EPS = 1e-9

# States of norm max^SIZE_EXPONENT and more, max being the largest number of the dtype, count as
# diverged: 7e30 in float32. Up to the largest number is room for the scale of a gradient.
SIZE_EXPONENT = 0.8

# Results of a solve, per sample; fastdeq.Status is made of them.
STATUS_CONVERGED = 0
STATUS_MAX_ITER = 1
STATUS_STAGNATED = 2
STATUS_NONFINITE = 3

# Iterates in a row that may not be the best so far before a sample counts as stagnated, with a
# limit of up to PATIENCE_LIMIT updates; in proportion more with a higher one, but not at the
# rounding floor. A sample goes on whose residual norms fall, each half of its patience to
# STILL_FALLING of the half before.
PATIENCE = 50
PATIENCE_ENERGY = 200
PATIENCE_MINRES = 20
PATIENCE_GMRES = 3
PATIENCE_LIMIT = 100
STILL_FALLING = 0.9
# The relative residual, in units of the machine epsilon, below which rounding may be all that is
# left.
ROUNDING_FLOOR = 16.0

# A history that grows (Anderson's first_window) has one difference more after every GROW_EVERY
# updates beyond GROW_AFTER: who has not converged by then has a hard problem.
GROW_AFTER = 12
GROW_EVERY = 3

# Adjoint solves: D g is divided by no less than this part of the largest entry of g.
LEAST_SCALE = 1e-30

# Heavy-ball steps. The estimate of the spectral radius begins at FIRST_RADIUS and stays below
# LARGEST_RADIUS: beyond it the gain is small and the transient long. It is improved after
# LEARN_AFTER steps. The residual is to halve within HALVE_WITHIN steps: a slower one is an
# eigenvalue beyond 0.993, or no contraction at all.
FIRST_RADIUS = 0.5
LARGEST_RADIUS = 0.98
LEARN_AFTER = 3
HALVE_WITHIN = 6

# The precision schedule: early evaluations with low-precision products (bfloat16, and 8-bit ones
# on the CPU), each run of them ended by one in full precision. How far the residual may fall in
# between, by kind; the most low-precision evaluations of an accelerated sample in a row. The next
# full-precision one is due at TARGET_FRACTION of the tolerance at the latest.
DROP_BFLOAT16 = 400.0
DROP_INT8 = 150.0
DROP_ACCELERATED = 30.0
LONGEST_LOW_PRECISION = 25
TARGET_FRACTION = 0.97
# A rate of convergence that is not known yet, and the slowest that is worth low-precision products.
UNKNOWN_RATE = 0.9
SLOWEST_RATE = 0.98
# Within this factor of the residual at which full precision is due, rounding hides the rate; a run
# whose verified residual is further than this from the one expected was too coarse.
TRUST_FACTOR = 1.5
# A run of low-precision evaluations must leave no more than this of the residual before it.
REQUIRED_GAIN = 0.5

# Up to so many samples, and from that size on, a bitwise symmetric weight is not packed by the CPU
# engine, unless low-precision products are asked for: its upper triangle is read where it lies.
TRIANGLE_BATCH = 2
TRIANGLE_SIZE = 512

# Energy: truncated Newton steps. Measured: 0.5 and 0.5 in the place of MOST_FORCING and
# FORCING_POWER take 16 % (spectral radius 2 and 4) to 37 % (8) more products.
MOST_FORCING = 0.7
FORCING_POWER = 0.2
SUFFICIENT_DECREASE = 1e-4  # of what the slope promises
# Curvature along a direction, relative to its square: less counts as negative; and the least that
# the step along such a direction assumes.
LEAST_CURVATURE = 1e-6
ASSUMED_CURVATURE = 0.3
# After so many halvings the plain step takes the place of the Newton step: at a kink of phi only
# that is sure to go downhill.
NEWTON_HALVINGS = 8
MOST_HALVINGS = 30
# Where the leading term of kappa is good to 1e-3, or 0.1 across elu's kink.
SMALL_STEP = 0.1
# Below ROUNDING_FLOOR its rounding decides whether E seems to fall: a few halvings are enough to
# know.
FLOOR_HALVINGS = 3
# The smallest forcing for which directions may be rounded to bfloat16. In 8 bits some samples
# stall.
LOW_PRECISION_FORCING = 1e-2

# MINRES: the part of the tolerance at which the estimate counts as met; how far the true residual
# may be from the estimate; restarts in a row that do not halve the residual; and, in units of the
# machine epsilon, the length below which the Krylov space is exhausted.
ESTIMATE_FRACTION = 0.9
DRIFT = 4.0
MOST_VAIN_RESTARTS = 2
KRYLOV_FLOOR = 10.0
