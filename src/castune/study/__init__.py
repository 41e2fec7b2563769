"""Studies: arms by seeds, and what they are worth."""
