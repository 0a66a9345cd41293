"""PyTorch modules of FurryGAN. Imports torch alone."""
