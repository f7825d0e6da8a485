"""What is on disk: checkpoints, safetensors files, their digests, and where the embedded ones are."""
