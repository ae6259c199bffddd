"""What a run leaves: provenance, evaluation, predictions, exports."""
