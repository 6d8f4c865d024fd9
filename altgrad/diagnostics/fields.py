"""What one measurement of an update counts: its fields, the bins of its histograms, and where near zero ends."""

NEAR_ZERO = 1e-8
"""Gradients below this magnitude count as near zero: the customary eps of Adam, under which its update fades."""

BINS = 1024
"""Magnitude histograms have four linear bins per binade of float32: bin = bits of |x| >> 21; bin 0 holds zero."""

UPDATE_FIELDS = (
    "count",  # elements
    # the weight at the start of the step
    "w_zero",
    "w_nonfinite",
    "w_amax",  # over finite elements, as all sums below
    "w_sum_sq",
    # its gradient
    "g_count",  # 0 where there is no gradient
    "g_zero",
    "g_near_zero",  # 0 < |g| < near_zero
    "g_nonfinite",
    "g_amax",
    "g_sum_sq",
    "dead_rows",  # rows of a matrix whose gradient is all zero; NaN without gradient or matrix
    "dead_columns",
    # stiffness S of nonzero weights, and pairs (S, |g|)
    "s_count",
    "s_sum",
    "pairs",
    "pair_s_sum",
    "pair_s_sum_sq",
    "pair_s_min",
    "pair_s_max",
    "pair_g_sum",
    "pair_g_sum_sq",
    "pair_g_min",
    "pair_g_max",
    "pair_gs_sum",
    "ratio_sum",  # |g| / S
    "below",  # |g| < S
    # alignment error of the weight on its grid, saturating
    "error_sum",
    "error_sum_sq",
    "error_max",
    "on_grid",
    # what the optimizer attempted, and what became of it
    "attempted",  # finite, nonzero updates
    "u_nonfinite",
    "u_amax",
    "u_sum_sq",
    "stalled",  # attempted, and the code did not change
    "moves",  # elements finite before and after
    "flips",  # the code changed
    "steps_sum",  # movement in steps of the grid
    "steps_max",
    "steps_median",  # lower edge of the median's bin: exact up to 8 steps
    "moved",  # the carrier value changed
    "ulp_sum",  # movement in ULPs of the carrier
    "ulp_max",
    "ulp_median",  # lower edge of the median's bin: at most a quarter of a binade low
)
FIELD = {name: i for i, name in enumerate(UPDATE_FIELDS)}
