"""The fused operations of the model, one file per op; off a GPU every op is its plain-PyTorch reference."""
