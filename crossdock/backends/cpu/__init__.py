"""Calls among ranks whose memory the host can load from and store to."""
