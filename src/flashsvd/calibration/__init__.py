"""What a method knows of the data: calibration batches, losses over them, and the statistics that come of both."""
