"""Trains the clips checkpoint from nothing but a seed: autoencoder, then flow transformer and text encoder."""
