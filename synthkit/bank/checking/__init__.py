"""Is every byte what its record says? Verify, repair, and the confined child that parses what a stranger sent."""
