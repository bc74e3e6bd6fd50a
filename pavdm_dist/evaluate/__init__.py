"""What videos show, read back from their pixels."""
