"""Package model/kernels; see ARCHITECTURE.md."""
