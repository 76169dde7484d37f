"""The device's program: serves the light model, escalates hard requests, updates itself, works offline."""
