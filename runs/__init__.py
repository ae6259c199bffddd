"""One run: its settings, name, files, signals, history and reports."""
