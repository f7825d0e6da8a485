"""Trains the shapes checkpoint from nothing but a seed: autoencoder, then flow transformer and text encoders."""
