"""Training on several devices: DDP and FSDP2."""
