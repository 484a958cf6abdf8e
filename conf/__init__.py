"""What a config holds: YAML of values in the groups beside this, ranges of numbers in ranges.py."""
