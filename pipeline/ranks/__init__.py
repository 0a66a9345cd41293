"""Many processes: engines, collectives, failures."""
