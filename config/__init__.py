"""What can be asked: settings, recipes, the command line."""
