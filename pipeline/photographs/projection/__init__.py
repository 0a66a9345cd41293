"""Finds the styles whose composite is a given picture (StyleGAN2's projector), and with them its alpha."""
