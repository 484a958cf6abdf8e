"""What a run shows and leaves behind: metrics, evaluations, tables, reports."""
