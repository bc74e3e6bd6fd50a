"""How a long video holds: measures of every chunk, their drift over time, and what it looks like."""
