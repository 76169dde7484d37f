"""The quickstart: real data, two models trained in minutes, and the whole loop from device to cloud and back."""
