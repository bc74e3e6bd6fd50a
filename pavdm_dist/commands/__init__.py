"""What the verbs of the command line do, and what people see while they work."""
