"""Shard sets behind a URL, and their cache."""
