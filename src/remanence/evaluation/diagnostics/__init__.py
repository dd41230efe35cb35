"""What can be measured of a memory or a model without training it on a benchmark."""
