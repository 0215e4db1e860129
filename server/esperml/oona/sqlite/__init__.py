"""The embedded engine: one SQLite file, and what saves it where it is damaged."""
