"""Several devices: DDP and FSDP2."""
