"""Reading shard sets: order, decoding, loaders."""
