"""What a training step minimises: functions from a model and a batch to a summed loss and a count of targets."""
