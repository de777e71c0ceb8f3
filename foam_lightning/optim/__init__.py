"""The FOAM optimizer: folding, one tensor's update, parameter groups."""
