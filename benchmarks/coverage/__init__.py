"""Which pipelines of the installed diffusers are served, and how: each one in a tiny form, through the runtime."""
