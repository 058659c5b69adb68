"""What a training step minimises: functions from a model and a batch to a summed loss, a count of targets, and metrics."""
