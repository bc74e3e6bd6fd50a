"""What people write and what it means: legal values, frame rates, times, arguments, files and overrides of settings."""
