"""Package parallel; see ARCHITECTURE.md."""
