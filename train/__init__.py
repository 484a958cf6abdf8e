"""Package train; see ARCHITECTURE.md."""
