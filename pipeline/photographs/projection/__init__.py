"""Finds the styles whose composite is a given image (StyleGAN2's projector), and with them its alpha."""
