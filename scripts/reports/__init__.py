"""Reports: a study, or runs side by side, in words, tables and pictures."""
