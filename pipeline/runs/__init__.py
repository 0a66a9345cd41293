"""What a run keeps on disk and in MLflow: directory, checkpoints, metrics."""
