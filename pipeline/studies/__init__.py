"""Studies of many trainings: sweeps and ablations."""
