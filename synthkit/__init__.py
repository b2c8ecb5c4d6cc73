"""synthkit."""
