"""Writing shard sets."""
