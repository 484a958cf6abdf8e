"""Package model/moe; see ARCHITECTURE.md."""
