"""What the GPU path gives on the machine at hand, next to what others do with the same weights."""
