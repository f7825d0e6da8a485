"""LoRA adapters: read from files, merged into weights or computed beside them, on this rank."""
