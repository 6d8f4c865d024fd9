"""Counter-based random bits, and the streams that name them."""
