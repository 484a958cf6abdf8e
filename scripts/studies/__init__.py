"""Studies: what is asked, which runs answer it, the statistics."""
