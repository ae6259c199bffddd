"""One run: its settings, device, processes, files, signals, history, reports and judging."""
