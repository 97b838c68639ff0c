"""What executes a guest: the Engine protocol and the engines behind it."""
