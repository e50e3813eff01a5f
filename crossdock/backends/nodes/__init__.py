"""Calls among ranks of several nodes: two hops, over the rail and then within the node."""
