"""One side's answers on disk, and the comparison of two of them."""
