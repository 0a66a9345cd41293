"""FurryGAN (ECCV 2022): its losses and phases."""
