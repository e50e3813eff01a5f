"""CUDA peers of one scale-up domain: Triton kernels, their launches, and the backend on top of them."""
