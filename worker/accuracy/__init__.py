"""Accuracy: compares the components that the runtime loads with those of diffusers and transformers."""
