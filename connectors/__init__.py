"""Engines on one side, a client on the other."""
