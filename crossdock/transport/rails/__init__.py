"""Engines of the scale-out axis, each a way to send notes and chunks between ranks of one local index."""
