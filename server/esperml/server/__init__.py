"""One process that runs Oona and Tamiyo. Splitting them is configuration, never code."""
