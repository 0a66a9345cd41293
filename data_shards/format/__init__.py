"""What a shard set is on disk: samples, manifest, index."""
