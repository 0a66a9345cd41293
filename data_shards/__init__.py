"""Image collections as WebDataset shards, and the loaders that read them. Never imports models or pipeline."""
