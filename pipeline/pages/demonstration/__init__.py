"""A run in a browser: pictures of its generator, and photographs cut out by what it has learnt."""
