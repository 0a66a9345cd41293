"""The training loop: learner, trainer, guard, meter, signals."""
