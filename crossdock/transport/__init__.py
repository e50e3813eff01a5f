"""Reaching peers: the Transport protocol and what stands behind it."""
