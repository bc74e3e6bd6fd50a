"""Text encoders and video autoencoders behind two small protocols; nothing heavy is imported here."""
