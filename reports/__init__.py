"""What a run leaves: provenance, history, evaluation, figures, pages, tables, predictions."""
