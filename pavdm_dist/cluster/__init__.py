"""Ray clusters: joining one or starting one, what it has room for, and what processes there are told."""
