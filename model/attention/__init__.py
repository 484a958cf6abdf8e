"""Package model/attention; see ARCHITECTURE.md."""
