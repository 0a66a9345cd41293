"""A run in a browser: images of its generator, and photographs cut out by what it has learnt."""
