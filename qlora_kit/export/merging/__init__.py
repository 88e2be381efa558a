"""A merge that reads the base tensor by tensor and never holds the model."""
