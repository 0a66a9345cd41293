"""Studies of many trainings: what a search or a grid tries, runs over Ray Tune, and finds."""
