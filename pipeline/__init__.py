"""Training, evaluation and use of FurryGAN."""
