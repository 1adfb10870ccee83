"""The daemon: HTTP, shared-memory sessions, metrics. Every decision is the core's."""
