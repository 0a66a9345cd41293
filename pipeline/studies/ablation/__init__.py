"""What `pipeline/ablate.py` compares: the method and itself without one of its parts (paper, section 4.4)."""
