"""One job on several devices: ranks of torch.distributed that compute each picture together."""
