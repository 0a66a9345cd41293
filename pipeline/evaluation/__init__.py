"""What is measured: masks, mattes, distances between image distributions."""
