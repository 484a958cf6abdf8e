"""A run's config: its schema, how it is read, and how it stands in files."""
