"""What a config's fields say of themselves; below every other package."""
