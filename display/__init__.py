"""What a person looks at: figures, the live page, pages and tables of all runs."""
