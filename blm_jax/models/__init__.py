"""What is computed, and nothing else: no files, no data formats, no training."""
