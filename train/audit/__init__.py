"""The audit: what ran is what was asked for."""
