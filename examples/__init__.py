"""Programs that use Safelight."""
