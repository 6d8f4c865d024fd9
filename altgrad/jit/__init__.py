"""What Numba lacks: machine operations, rounding to a grid, threads and the binding of loop templates."""
