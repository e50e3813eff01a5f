"""What runs on the device: Triton only, no torch. Memory ordering is in ``sync`` and nowhere else."""
