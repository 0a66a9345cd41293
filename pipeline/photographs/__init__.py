"""Real photographs: projection, distillation, comparison of both."""
