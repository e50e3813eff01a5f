"""Moving rows: the Backend protocol and what stands behind it."""
