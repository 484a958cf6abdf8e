"""Package model; see ARCHITECTURE.md."""
