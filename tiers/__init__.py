"""Places that hold containers, under a hard bound."""
