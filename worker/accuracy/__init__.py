"""Whether the components that this runtime loads compute what diffusers' and transformers' own do."""
