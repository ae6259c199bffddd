"""How a run goes on: claim its name, load what it begins from, follow its steps, resume."""
