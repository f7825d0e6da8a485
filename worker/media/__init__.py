"""Media: pictures, clips and sound, from tensors to the bytes of files."""
