"""Trains the mini world's models from scratch: CLIP, VAE, U-Net, BLIP-2 and the judge."""
