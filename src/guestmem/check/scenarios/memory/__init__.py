"""The provider itself: conversions, holes, poison, the end of a file."""
