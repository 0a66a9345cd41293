"""A small matting network taught by a trained run: one forward pass instead of a projection, and no label."""
