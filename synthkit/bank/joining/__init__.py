"""Banks made from banks: merge and dedup."""
